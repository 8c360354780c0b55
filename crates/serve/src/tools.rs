//! Tools of a request, and how a model's family writes a call of one.

use serde_json::{Map, Value};

use crate::ApiError;
use crate::fields::{Fields, wrong};

/// Tools per request.
const MAX_TOOLS: usize = 128;
/// Longest name of a tool, in characters.
pub(crate) const MAX_NAME: usize = 64;

/// A function that the model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// Its name: letters, digits, `_`, `-` and `.`.
    pub name: String,
    /// The JSON schema of its arguments, an object.
    pub parameters: Value,
    /// The whole of it as the client wrote it, for the chat template.
    pub source: Value,
}

/// Whether tools may or must be called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolChoice {
    /// No call.
    None,
    /// As the model likes.
    Auto,
    /// At least one call.
    Required,
    /// A call of this tool.
    Named(String),
}

/// How a family writes a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CallStyle {
    /// `<tool_call>{"name": ..., "arguments": ...}</tool_call>`: Hermes, Qwen, SmolLM.
    Tagged,
    /// `{"name": ..., "parameters": ...}` as the whole answer, perhaps after `<|python_tag|>`: Llama 3.
    Bare,
    /// `[TOOL_CALLS] [{"name": ..., "arguments": ...}]`: Mistral.
    List,
    /// `[TOOL_CALLS]name[ARGS]{...}`: Mistral's later models.
    Named,
}

pub(crate) const TAG_OPEN: &str = "<tool_call>";
pub(crate) const TAG_CLOSE: &str = "</tool_call>";
pub(crate) const PYTHON_TAG: &str = "<|python_tag|>";
pub(crate) const CALLS: &str = "[TOOL_CALLS]";
pub(crate) const ARGS: &str = "[ARGS]";

impl CallStyle {
    /// The style that a chat template (the text that is used with tools) writes calls in; none where it knows no tools
    /// or writes them in another way.
    pub(crate) fn of(template: &str) -> Option<Self> {
        let has = |text: &str| template.contains(text);
        if !has("tools") {
            None
        } else if has(CALLS) {
            Some(if has(ARGS) { Self::Named } else { Self::List })
        } else if has(TAG_OPEN) {
            // Qwen's coder models write XML between the same marks.
            (!has("<function=")).then_some(Self::Tagged)
        } else if has("parameters") && (has(PYTHON_TAG) || has("ipython")) {
            Some(Self::Bare)
        } else {
            None
        }
    }

    /// Mistral's templates refuse ids of calls that have not nine letters and digits.
    pub(crate) fn short_ids(self) -> bool {
        matches!(self, Self::List | Self::Named)
    }

    /// What an answer's text is compared with to find where its calls begin.
    pub(crate) fn mark(self) -> &'static str {
        match self {
            Self::Tagged => TAG_OPEN,
            Self::Bare => PYTHON_TAG,
            Self::List | Self::Named => CALLS,
        }
    }
}

/// Reads and checks `tools`.
pub(crate) fn tools(fields: Fields) -> Result<Vec<Tool>, ApiError> {
    let Some(value) = fields.get("tools") else { return Ok(Vec::new()) };
    let expected = format!("a list of at most {MAX_TOOLS} tools");
    let items = value.as_array().filter(|items| items.len() <= MAX_TOOLS);
    let items = items.ok_or_else(|| wrong("tools", &expected, value))?;
    let mut tools: Vec<Tool> = Vec::with_capacity(items.len());
    for (index, item) in items.iter().enumerate() {
        let tool = tool(&format!("tools[{index}]"), item)?;
        if tools.iter().any(|other| other.name == tool.name) {
            let name = format!("tools[{index}].function.name");
            let why = format!("`{name}`: another tool is called {:?} too", tool.name);
            return Err(ApiError::invalid(&name, why));
        }
        tools.push(tool);
    }
    Ok(tools)
}

fn tool(at: &str, item: &Value) -> Result<Tool, ApiError> {
    let name = |field: &str| format!("{at}{field}");
    let at_field = |field: &str, e: ApiError| {
        // The message names the field by its last word; where it stands is said before it.
        ApiError { param: Some(name(field)), message: format!("`{}`: {}", name(field), e.message), ..e }
    };
    let own = item.as_object().ok_or_else(|| wrong(at, "an object", item))?;
    match Fields(own).string("type").map_err(|e| at_field(".type", e))? {
        Some("function") => {}
        Some(other) => {
            let why = format!("`{}`: {other:?} is not supported; use \"function\"", name(".type"));
            return Err(ApiError::unsupported(&name(".type"), why));
        }
        None => {
            let why = format!("`{}` is missing; it must be \"function\"", name(".type"));
            return Err(ApiError::invalid(&name(".type"), why));
        }
    }
    let function = Fields(own).object("function").map_err(|e| at_field(".function", e))?;
    let function = Fields(function.ok_or_else(|| {
        let why = format!("`{}` is missing; it must be an object with a `name`", name(".function"));
        ApiError::invalid(&name(".function"), why)
    })?);
    let title = function.string("name").map_err(|e| at_field(".function.name", e))?.unwrap_or_default();
    if !is_name(title) {
        let field = name(".function.name");
        let why =
            format!("`{field}` must be 1 to {MAX_NAME} letters, digits, `_`, `-` or `.`, found {title:.80?}");
        return Err(ApiError::invalid(&field, why));
    }
    function.string("description").map_err(|e| at_field(".function.description", e))?;
    function.boolean("strict").map_err(|e| at_field(".function.strict", e))?;
    let parameters = function.object("parameters").map_err(|e| at_field(".function.parameters", e))?;
    let mut parameters = parameters.cloned().unwrap_or_default();
    parameters.entry("type").or_insert_with(|| "object".into());
    let parameters = Value::Object(parameters);
    Ok(Tool { name: title.to_owned(), parameters, source: item.clone() })
}

/// Names go into grammars and into the text of calls, so they are plain.
fn is_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    (1..=MAX_NAME).contains(&name.len()) && name.chars().all(plain)
}

/// Reads and checks `tool_choice`, which must fit the tools.
pub(crate) fn tool_choice(fields: Fields, tools: &[Tool]) -> Result<ToolChoice, ApiError> {
    let expected =
        "\"none\", \"auto\", \"required\" or {\"type\": \"function\", \"function\": {\"name\": ...}}";
    let choice = match fields.get("tool_choice") {
        None => ToolChoice::Auto,
        Some(Value::String(word)) => match word.as_str() {
            "none" => ToolChoice::None,
            "auto" => ToolChoice::Auto,
            "required" => ToolChoice::Required,
            _ => return Err(wrong("tool_choice", expected, &word.as_str().into())),
        },
        Some(Value::Object(own)) => ToolChoice::Named(named(own).ok_or_else(|| {
            ApiError::unsupported("tool_choice", format!("`tool_choice` must be {expected}"))
        })?),
        Some(other) => return Err(wrong("tool_choice", expected, other)),
    };
    match &choice {
        ToolChoice::Required if tools.is_empty() => {
            Err(ApiError::invalid("tool_choice", "`tool_choice` asks for a call, but there are no `tools`"))
        }
        ToolChoice::Named(name) if !tools.iter().any(|tool| tool.name == *name) => {
            let why = format!("`tool_choice` names {name:.80?}, which is none of the `tools`");
            Err(ApiError::invalid("tool_choice", why))
        }
        _ => Ok(choice),
    }
}

fn named(own: &Map<String, Value>) -> Option<String> {
    let function = own.get("type").is_some_and(|kind| kind == "function");
    let name = own.get("function").and_then(|f| f.get("name")).and_then(Value::as_str);
    name.filter(|_| function).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_tells_how_calls_are_written() {
        for (template, style) in [
            ("{% if tools %}<tool_call>", Some(CallStyle::Tagged)),
            ("{% if tools %}<tool_call><function=x>", None),
            ("{{ tools }} [TOOL_CALLS]", Some(CallStyle::List)),
            ("{{ tools }} [TOOL_CALLS] [ARGS]", Some(CallStyle::Named)),
            ("{{ tools }} 'ipython' {'parameters': 1}", Some(CallStyle::Bare)),
            ("{{ tools }}", None),
            ("{{ messages }} <tool_call>", None),
        ] {
            assert_eq!(CallStyle::of(template), style, "{template}");
        }
    }
}
