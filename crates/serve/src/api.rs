//! The requests of `/v1/chat/completions` and `/v1/completions`: what is supported is read and checked, what would
//! change the answer and is not supported is refused by name, anything else is ignored as OpenAI's servers do.

use serde_json::{Map, Value, json};

use crate::ApiError;
use crate::fields::{Fields, integer, wrong};
use crate::messages::messages;
use crate::params::{Common, Defaults, common};
use crate::tools::{Tool, ToolChoice, tool_choice, tools};

/// Alternatives per token, as OpenAI limits them.
const MAX_TOP_LOGPROBS: i64 = 20;
/// Prompts per completion request.
const MAX_PROMPTS: usize = 64;
/// What `reasoning_effort` may be.
const EFFORTS: [&str; 6] = ["none", "minimal", "low", "medium", "high", "xhigh"];

/// A chat request.
#[derive(Debug, Clone)]
pub struct ChatRequest {
    /// What both kinds share.
    pub common: Common,
    /// Messages as a chat template wants them: contents are strings.
    pub messages: Vec<Value>,
    /// Tools that may be called; none where `tool_choice` forbids it.
    pub tools: Vec<Tool>,
    /// Whether they may or must be called.
    pub tool_choice: ToolChoice,
    /// More than one call in an answer.
    pub parallel_calls: bool,
    /// How long to think, for a template that knows this.
    pub effort: Option<String>,
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
    /// `n` choices are made for each.
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
            ("function_call", "use `tool_choice`"),
            ("audio", "this server answers in text"),
            ("prediction", "there is no predicted output"),
            ("web_search_options", "this server searches nothing"),
            ("role_mapping", "the model's chat template decides"),
            ("chat_template", "a template is a program; start the server with --chat-template"),
            ("documents", "put them into a message"),
        ] {
            fields.refuse(name, &[], why)?;
        }
        fields.refuse("modalities", &[json!(["text"])], "this server answers in text")?;
        fields.refuse("add_generation_prompt", &[json!(true)], "an answer is always begun")?;
        fields.refuse(
            "continue_final_message",
            &[json!(false)],
            "use /v1/completions to go on with a text",
        )?;
        let mut template_args = defaults.template_args.clone();
        for (name, value) in fields.object("chat_template_kwargs")?.into_iter().flatten() {
            if matches!(name.as_str(), "messages" | "tools" | "add_generation_prompt") {
                let why = format!("`chat_template_kwargs` may not set `{name}`");
                return Err(ApiError::invalid("chat_template_kwargs", why));
            }
            template_args.insert(name.clone(), value.clone());
        }
        let tools = tools(fields)?;
        let tool_choice = tool_choice(fields, &tools)?;
        let tools = if tool_choice == ToolChoice::None { Vec::new() } else { tools };
        Ok(Self {
            common: common(fields, defaults, vocab, chat_logprobs(fields)?)?,
            messages: messages(fields)?,
            tools,
            tool_choice,
            parallel_calls: fields.boolean("parallel_tool_calls")?.unwrap_or(true),
            effort: effort(fields)?,
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

fn chat_logprobs(fields: Fields) -> Result<Option<usize>, ApiError> {
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    // -1 is mlx-lm's none.
    let top = fields.integer("top_logprobs", -1, MAX_TOP_LOGPROBS)?.unwrap_or(0).max(0);
    Ok(wanted.then_some(top as usize))
}

fn effort(fields: Fields) -> Result<Option<String>, ApiError> {
    let Some(effort) = fields.string("reasoning_effort")? else { return Ok(None) };
    if EFFORTS.contains(&effort) {
        Ok(Some(effort.to_owned()))
    } else {
        let expected = format!("one of {}", EFFORTS.join(", "));
        Err(wrong("reasoning_effort", &expected, &effort.into()))
    }
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
