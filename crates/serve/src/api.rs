//! The requests of `/v1/chat/completions` and `/v1/completions`: what is supported is read and checked, what would
//! change the answer and is not supported is refused by name, anything else is ignored as OpenAI's servers do.

use graft_model::Sampling;
use serde_json::{Map, Value, json};

use crate::ApiError;
use crate::fields::{Fields, integer, wrong};
use crate::messages::messages;

/// Stop strings per request. OpenAI allows 4, other servers more.
const MAX_STOPS: usize = 16;
/// Alternatives per token, as OpenAI limits them.
const MAX_TOP_LOGPROBS: i64 = 20;
/// Factor on an adapter's scale, in either direction.
const MAX_SCALE: f64 = 16.0;
/// Prompts per completion request.
const MAX_PROMPTS: usize = 64;

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
    /// As server-sent events.
    pub stream: bool,
    /// With a last event that holds the usage.
    pub include_usage: bool,
}

/// A chat request.
#[derive(Debug, Clone)]
pub struct ChatRequest {
    /// What both kinds share.
    pub common: Common,
    /// Messages as a chat template wants them: contents are strings.
    pub messages: Vec<Value>,
    /// Tools for the template.
    pub tools: Option<Value>,
    /// Further variables of the template.
    pub template_args: Map<String, Value>,
}

/// One prompt of a completion request.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// Text.
    Text(String),
    /// Token ids.
    Ids(Vec<u32>),
}

/// A completion request.
#[derive(Debug, Clone)]
pub struct CompletionRequest {
    /// What both kinds share.
    pub common: Common,
    /// One choice is made for each.
    pub prompts: Vec<Prompt>,
}

impl ChatRequest {
    /// Reads and checks a request; `vocab` is the number of token ids.
    ///
    /// # Errors
    /// 400 naming the field.
    pub fn parse(body: &Map<String, Value>, defaults: &Defaults, vocab: usize) -> Result<Self, ApiError> {
        let fields = Fields(body);
        for (name, why) in [
            ("functions", "use `tools`"),
            ("function_call", "use `tools`"),
            ("audio", "this server answers in text"),
            ("prediction", "there is no predicted output"),
        ] {
            fields.refuse(name, &[], why)?;
        }
        fields.refuse("modalities", &[json!(["text"])], "this server answers in text")?;
        fields.refuse("role_mapping", &[], "the model's chat template decides")?;
        let logprobs = chat_logprobs(fields)?;
        let mut template_args = defaults.template_args.clone();
        for (name, value) in fields.object("chat_template_kwargs")?.into_iter().flatten() {
            if matches!(name.as_str(), "messages" | "tools" | "add_generation_prompt") {
                let why = format!("`chat_template_kwargs` may not set `{name}`");
                return Err(ApiError::invalid("chat_template_kwargs", why));
            }
            template_args.insert(name.clone(), value.clone());
        }
        Ok(Self {
            common: common(fields, defaults, vocab, logprobs)?,
            messages: messages(fields)?,
            tools: tools(fields)?,
            template_args,
        })
    }
}

impl CompletionRequest {
    /// Reads and checks a request; `vocab` is the number of token ids.
    ///
    /// # Errors
    /// 400 naming the field.
    pub fn parse(body: &Map<String, Value>, defaults: &Defaults, vocab: usize) -> Result<Self, ApiError> {
        let fields = Fields(body);
        fields.refuse("echo", &[json!(false)], "the answer holds the completion alone")?;
        fields.refuse("suffix", &[json!("")], "the model continues a prompt, it does not fill a gap")?;
        let logprobs = match fields.get("logprobs") {
            // mlx-lm takes a boolean here, OpenAI a number.
            Some(Value::Bool(wanted)) => wanted.then_some(0),
            _ => fields.integer("logprobs", 0, MAX_TOP_LOGPROBS)?.map(|n| n as usize),
        };
        Ok(Self { common: common(fields, defaults, vocab, logprobs)?, prompts: prompts(fields, vocab)? })
    }
}

fn common(
    fields: Fields,
    defaults: &Defaults,
    vocab: usize,
    logprobs: Option<usize>,
) -> Result<Common, ApiError> {
    fields.refuse("n", &[json!(1)], "one answer is given per request, so `n` must be 1")?;
    fields.refuse("best_of", &[json!(1)], "one answer is given per request, so `best_of` must be 1")?;
    fields.refuse("response_format", &[json!({"type": "text"})], "answers are free text")?;
    fields.refuse("adapters", &[], "start the server with --adapter NAME=DIR and give NAME as `model`")?;
    fields.refuse("draft_model", &[json!("default_model")], "there is no speculative decoding")?;
    fields.refuse("logits_processors", &[], "this server runs no code of a request")?;
    for name in ["guided_json", "guided_regex", "guided_choice", "guided_grammar", "grammar"] {
        fields.refuse(name, &[], "answers are free text")?;
    }
    let stream = fields.boolean("stream")?.unwrap_or(false);
    // Clients set this for every request, streamed or not.
    let options = if stream { fields.object("stream_options")? } else { None };
    let include_usage = match options {
        Some(options) => Fields(options)
            .boolean("include_usage")
            .map_err(|e| ApiError { param: Some("stream_options.include_usage".into()), ..e })?
            .unwrap_or(false),
        None => false,
    };
    fields.refuse(
        "lora",
        &[json!([])],
        "give the adapter's name as `model` and its scale as `adapter_scale`",
    )?;
    let model = fields.string("model")?.map(str::to_owned);
    let adapter_scale = fields.number("adapter_scale", -MAX_SCALE, MAX_SCALE)?.unwrap_or(1.0);
    let params = params(fields, defaults, vocab, logprobs)?;
    Ok(Common { model, adapter_scale, params, stream, include_usage })
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
    })
}

fn chat_logprobs(fields: Fields) -> Result<Option<usize>, ApiError> {
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    // -1 is mlx-lm's none.
    let top = fields.integer("top_logprobs", -1, MAX_TOP_LOGPROBS)?.unwrap_or(0).max(0);
    Ok(wanted.then_some(top as usize))
}

fn stops(fields: Fields) -> Result<Vec<String>, ApiError> {
    let expected = format!("a string or a list of at most {MAX_STOPS} strings");
    let Some(value) = fields.get("stop") else { return Ok(Vec::new()) };
    let one = |v: &Value| v.as_str().map(str::to_owned);
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

fn tools(fields: Fields) -> Result<Option<Value>, ApiError> {
    match fields.get("tool_choice") {
        None => {}
        Some(Value::String(choice)) if choice == "auto" => {}
        Some(Value::String(choice)) if choice == "none" => return Ok(None),
        Some(_) => {
            let why = "`tool_choice` must be \"auto\" or \"none\": a call cannot be forced";
            return Err(ApiError::unsupported("tool_choice", why));
        }
    }
    let Some(value) = fields.get("tools") else { return Ok(None) };
    let items = value.as_array().ok_or_else(|| wrong("tools", "a list of objects", value))?;
    if let Some(item) = items.iter().find(|item| !item.is_object()) {
        return Err(wrong("tools", "a list of objects", item));
    }
    Ok((!items.is_empty()).then(|| value.clone()))
}

fn prompts(fields: Fields, vocab: usize) -> Result<Vec<Prompt>, ApiError> {
    let expected = "a string, a list of strings, a list of token ids, or a list of such lists";
    let Some(value) = fields.get("prompt") else {
        return Err(ApiError::invalid("prompt", format!("`prompt` is missing; it must be {expected}")));
    };
    let ids = |items: &[Value]| -> Result<Prompt, ApiError> {
        let id = |v: &Value| integer(v).filter(|id| (0..vocab as i64).contains(id)).map(|id| id as u32);
        let ids: Option<Vec<u32>> = items.iter().map(id).collect();
        let ids = ids.ok_or_else(|| {
            ApiError::invalid("prompt", format!("`prompt` must be {expected}, with token ids below {vocab}"))
        })?;
        Ok(Prompt::Ids(ids))
    };
    let prompts = match value {
        Value::String(text) => vec![Prompt::Text(text.clone())],
        Value::Array(items) if items.len() > MAX_PROMPTS && !items.iter().all(Value::is_number) => {
            return Err(ApiError::invalid(
                "prompt",
                format!("`prompt` may hold at most {MAX_PROMPTS} prompts"),
            ));
        }
        Value::Array(items) => match items.first() {
            None => return Err(ApiError::invalid("prompt", "`prompt` is an empty list")),
            Some(Value::Number(_)) => vec![ids(items)?],
            Some(_) => items
                .iter()
                .map(|item| match item {
                    Value::String(text) => Ok(Prompt::Text(text.clone())),
                    Value::Array(inner) => ids(inner),
                    other => Err(wrong("prompt", expected, other)),
                })
                .collect::<Result<_, _>>()?,
        },
        other => return Err(wrong("prompt", expected, other)),
    };
    Ok(prompts)
}
