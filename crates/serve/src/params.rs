//! How an answer is to be generated: the fields that chat and completion requests share, checked one by one, and those
//! that would change the answer and are not supported, refused by name.

use std::collections::BTreeSet;

use graft_model::Sampling;
use serde_json::{Map, Value, json};

use crate::ApiError;
use crate::fields::{Fields, wrong};

/// Stop strings per request. OpenAI allows 4, other servers more.
const MAX_STOPS: usize = 16;
/// Factor on an adapter's scale, in either direction.
const MAX_SCALE: f64 = 16.0;
/// Answers per prompt.
const MAX_CHOICES: i64 = 32;
/// Longest stop string, in characters: it is compared at every token.
const MAX_STOP: usize = 256;

/// What a request gets where it names nothing.
#[derive(Debug, Clone)]
pub struct Defaults {
    /// Most tokens of an answer.
    pub max_tokens: usize,
    /// What a request's own fields replace one by one.
    pub sampling: Sampling,
    /// Arguments of the chat template that a request's `chat_template_kwargs` may override.
    pub template_args: Map<String, Value>,
}

/// How an answer is to be generated.
#[derive(Debug, Clone, PartialEq)]
pub struct Params {
    /// Most tokens, the stop token included.
    pub max_tokens: usize,
    /// How tokens are chosen, log-probabilities and the seed included.
    pub sampling: Sampling,
    /// Strings that end the answer.
    pub stop: Vec<String>,
    /// Ids that end the answer beside the model's own.
    pub stop_ids: BTreeSet<u32>,
}

/// Fields that both kinds of request share.
#[derive(Debug, Clone)]
pub struct Common {
    /// The model asked for.
    pub model: Option<String>,
    /// Factor on the scale of the adapter that `model` names; 1 is the adapter as it was made, 0 the base.
    pub adapter_scale: f32,
    /// How to generate.
    pub params: Params,
    /// Answers per prompt.
    pub choices: usize,
    /// The JSON schema that an answer has to follow.
    pub schema: Option<Value>,
    /// The answer goes on until it is as long as it may be.
    pub ignore_eos: bool,
    /// As server-sent events.
    pub stream: bool,
    /// With a last event that holds the usage.
    pub include_usage: bool,
}

/// Reads what both kinds share; `logprobs` is what they call differently.
pub(crate) fn common(
    fields: Fields,
    defaults: &Defaults,
    vocab: usize,
    logprobs: Option<usize>,
) -> Result<Common, ApiError> {
    refusals(fields)?;
    let stream = fields.boolean("stream")?.unwrap_or(false);
    // Clients set this for every request, streamed or not.
    let options = fields.object("stream_options")?;
    let include_usage = match options {
        Some(options) => Fields(options)
            .boolean("include_usage")
            .map_err(|e| ApiError { param: Some("stream_options.include_usage".into()), ..e })?
            .unwrap_or(false),
        None => false,
    };
    Ok(Common {
        model: fields.string("model")?.map(str::to_owned),
        adapter_scale: fields.number("adapter_scale", -MAX_SCALE, MAX_SCALE)?.unwrap_or(1.0),
        params: params(fields, defaults, vocab, logprobs)?,
        choices: fields.integer("n", 1, MAX_CHOICES)?.unwrap_or(1) as usize,
        schema: schema(fields)?,
        ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
        stream,
        include_usage: stream && include_usage,
    })
}

/// Fields of OpenAI's interface or of other servers that would change the answer and that nothing here does; each with
/// the values that ask for nothing.
fn refusals(fields: Fields) -> Result<(), ApiError> {
    let off = [json!(false)];
    let none = [json!(0), json!(0.0)];
    let one = [json!(1), json!(1.0)];
    let structured = "use `response_format` with a JSON schema";
    let refused: [(&str, &[Value], &str); 34] = [
        ("lora", &[json!([])], "give the adapter's name as `model` and its scale as `adapter_scale`"),
        ("best_of", &one, "use `n`, which returns all of them"),
        ("store", &off, "this server keeps no answers"),
        ("service_tier", &[json!("auto"), json!("default")], "there is one tier"),
        ("adapters", &[], "start the server with --adapter NAME=DIR and give NAME as `model`"),
        ("draft_model", &[json!("default_model")], "there is no speculative decoding"),
        ("num_draft_tokens", &[], "there is no speculative decoding"),
        ("logits_processors", &[], "this server runs no code of a request"),
        ("guided_json", &[], structured),
        ("guided_regex", &[], structured),
        ("guided_choice", &[], structured),
        ("guided_grammar", &[], structured),
        ("structured_outputs", &[], structured),
        ("grammar", &[], structured),
        ("json_schema", &[], structured),
        ("regex", &[], structured),
        ("min_tokens", &none, "set `ignore_eos` with `max_tokens` for an answer of that length"),
        ("stop_token_ids", &[json!([])], "use `stop`, or `logit_bias`"),
        ("include_stop_str_in_output", &off, "the stop string is no part of the answer"),
        ("use_beam_search", &off, "tokens are sampled"),
        ("length_penalty", &one, "it belongs to beam search"),
        ("early_stopping", &off, "it belongs to beam search"),
        ("bad_words", &[json!([])], "use `logit_bias`"),
        ("typical_p", &one, "use `top_p` or `min_p`"),
        ("top_a", &none, "use `top_p` or `min_p`"),
        ("tfs", &one, "use `top_p` or `min_p`"),
        ("mirostat", &none, "use `top_p` or `min_p`"),
        ("mirostat_mode", &none, "use `top_p` or `min_p`"),
        ("dry_multiplier", &none, "use the penalties"),
        ("dynatemp_range", &none, "use `temperature`"),
        ("prompt_logprobs", &[], "log-probabilities are those of the answer"),
        ("truncate_prompt_tokens", &[], "a prompt that is too long is refused"),
        ("truncation", &[json!("disabled")], "a prompt that is too long is refused"),
        ("adapter_id", &[], "give the adapter's name as `model`"),
    ];
    for (name, neutral, why) in refused {
        fields.refuse(name, neutral, why)?;
    }
    Ok(())
}

/// The schema of `response_format`; none for free text.
fn schema(fields: Fields) -> Result<Option<Value>, ApiError> {
    let Some(format) = fields.object("response_format")? else { return Ok(None) };
    let at = |field: &str, e: ApiError| ApiError { param: Some(format!("response_format.{field}")), ..e };
    let kind = Fields(format).string("type").map_err(|e| at("type", e))?;
    let unknown = || {
        let why = "`response_format.type` must be \"text\", \"json_object\" or \"json_schema\"";
        ApiError::invalid("response_format.type", why)
    };
    match kind.ok_or_else(unknown)? {
        "text" => Ok(None),
        // Some clients give the schema here, as llama.cpp's server takes it.
        "json_object" => {
            let schema = Fields(format).object("schema").map_err(|e| at("schema", e))?;
            Ok(Some(schema.map_or_else(|| json!({"type": "object"}), |schema| Value::Object(schema.clone()))))
        }
        "json_schema" => {
            let missing = || {
                let name = "response_format.json_schema";
                ApiError::invalid(name, format!("`{name}` must be an object with `name` and `schema`"))
            };
            let own = Fields(format).object("json_schema").map_err(|e| at("json_schema", e))?;
            let own = Fields(own.ok_or_else(missing)?);
            // Whether it is strict makes no difference: the answer always follows the schema.
            own.boolean("strict").map_err(|e| at("json_schema.strict", e))?;
            own.string("name").map_err(|e| at("json_schema.name", e))?;
            own.string("description").map_err(|e| at("json_schema.description", e))?;
            let schema = own.object("schema").map_err(|e| at("json_schema.schema", e))?;
            Ok(Some(Value::Object(schema.ok_or_else(missing)?.clone())))
        }
        _ => Err(unknown()),
    }
}

fn params(
    fields: Fields,
    defaults: &Defaults,
    vocab: usize,
    logprobs: Option<usize>,
) -> Result<Params, ApiError> {
    let limit = fields.integer("max_tokens", 1, i64::MAX)?;
    let limit = fields.integer("max_completion_tokens", 1, i64::MAX)?.or(limit);
    let base = &defaults.sampling;
    let context = |name: &str, default: usize| {
        Ok::<_, ApiError>(fields.integer(name, 0, i64::MAX)?.map_or(default, |n| n as usize))
    };
    let number = |name: &str, low: f64, high: f64, default: f32| {
        Ok::<_, ApiError>(fields.number(name, low, high)?.unwrap_or(default))
    };
    let sampling = Sampling {
        temperature: number("temperature", 0.0, f64::from(f32::MAX), base.temperature)?,
        // 0 turns it off, as in mlx-lm.
        top_p: number("top_p", 0.0, 1.0, base.top_p)?,
        // -1 is vLLM's way to keep all.
        top_k: fields.integer("top_k", -1, i64::MAX)?.map_or(base.top_k, |k| k.max(0) as usize),
        min_p: number("min_p", 0.0, 1.0, base.min_p)?,
        xtc_probability: number("xtc_probability", 0.0, 1.0, base.xtc_probability)?,
        xtc_threshold: number("xtc_threshold", 0.0, 0.5, base.xtc_threshold)?,
        repetition_penalty: number("repetition_penalty", 0.0, 10.0, base.repetition_penalty)?,
        repetition_context: context("repetition_context_size", base.repetition_context)?,
        presence_penalty: number("presence_penalty", -2.0, 2.0, base.presence_penalty)?,
        presence_context: context("presence_context_size", base.presence_context)?,
        frequency_penalty: number("frequency_penalty", -2.0, 2.0, base.frequency_penalty)?,
        frequency_context: context("frequency_context_size", base.frequency_context)?,
        logit_bias: logit_bias(fields, vocab)?,
        logprobs,
        seed: fields.integer("seed", i64::MIN, i64::MAX)?.map(|n| n as u64),
        ..base.clone()
    };
    Ok(Params {
        max_tokens: limit.map_or(defaults.max_tokens, |n| n as usize),
        sampling,
        stop: stops(fields)?,
        stop_ids: BTreeSet::new(),
    })
}

fn stops(fields: Fields) -> Result<Vec<String>, ApiError> {
    let expected =
        format!("a string or a list of at most {MAX_STOPS} strings of at most {MAX_STOP} characters");
    let Some(value) = fields.get("stop") else { return Ok(Vec::new()) };
    let one = |v: &Value| v.as_str().filter(|stop| stop.chars().count() <= MAX_STOP).map(str::to_owned);
    let stops: Option<Vec<String>> = match value {
        Value::Array(items) if items.len() <= MAX_STOPS => items.iter().map(one).collect(),
        Value::Array(_) => None,
        other => one(other).map(|stop| vec![stop]),
    };
    let mut stops = stops.ok_or_else(|| wrong("stop", &expected, value))?;
    // An empty string is some clients' way to say that there is none.
    stops.retain(|stop| !stop.is_empty());
    Ok(stops)
}

fn logit_bias(fields: Fields, vocab: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let mut biases = Vec::new();
    for (key, value) in fields.object("logit_bias")?.into_iter().flatten() {
        let Some(id) = key.parse::<u32>().ok().filter(|id| (*id as usize) < vocab) else {
            let why =
                format!("`logit_bias` must map token ids below {vocab} to numbers, found the key {key:?}");
            return Err(ApiError::invalid("logit_bias", why));
        };
        let Some(bias) = value.as_f64().filter(|b| (-100.0..=100.0).contains(b)) else {
            return Err(wrong("logit_bias", "an object of numbers from -100 to 100", value));
        };
        biases.push((id, bias as f32));
    }
    Ok(biases)
}
