//! The messages of a chat request, brought to the form that chat templates are written for.

use serde_json::{Map, Value};

use crate::ApiError;
use crate::fields::Fields;

/// Roles a message may have.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// Checks each message; contents become strings, arguments of tool calls objects, `developer` becomes `system`.
pub(crate) fn messages(fields: Fields) -> Result<Vec<Value>, ApiError> {
    let list = fields.get("messages").and_then(Value::as_array).filter(|list| !list.is_empty());
    let Some(list) = list else {
        return Err(ApiError::invalid("messages", "`messages` must be a list of at least one message"));
    };
    list.iter().enumerate().map(|(index, message)| one(index, message).map(Value::Object)).collect()
}

fn one(index: usize, message: &Value) -> Result<Map<String, Value>, ApiError> {
    let at = |field: &str| format!("messages[{index}]{field}");
    let invalid = |field: &str, expected: String| {
        let name = at(field);
        ApiError::invalid(&name, format!("`{name}` must be {expected}"))
    };
    let Some(message) = message.as_object() else { return Err(invalid("", "an object".into())) };
    let role = message.get("role").and_then(Value::as_str).filter(|role| ROLES.contains(role));
    let role = role.ok_or_else(|| invalid(".role", format!("one of {}", ROLES.join(", "))))?;
    let mut out = message.clone();
    out.insert("role".into(), if role == "developer" { "system" } else { role }.into());
    let content = match message.get("content") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => text_of(parts, &at(".content"))?,
        None | Some(Value::Null) if role == "assistant" => String::new(),
        _ => return Err(invalid(".content", "a string or a list of text parts".into())),
    };
    out.insert("content".into(), content.into());
    if let Some(calls) = message.get("tool_calls").filter(|calls| !calls.is_null()) {
        out.insert("tool_calls".into(), tool_calls(calls, &at(".tool_calls"))?);
    } else {
        out.remove("tool_calls");
    }
    Ok(out)
}

fn text_of(parts: &[Value], name: &str) -> Result<String, ApiError> {
    let mut text = String::new();
    for (index, part) in parts.iter().enumerate() {
        let name = format!("{name}[{index}]");
        match (part.get("type").and_then(Value::as_str), part.get("text").and_then(Value::as_str)) {
            (Some("text"), Some(piece)) => text.push_str(piece),
            (Some("text") | None, _) => {
                return Err(ApiError::invalid(
                    &name,
                    format!("`{name}` must be {{\"type\": \"text\", \"text\": ...}}"),
                ));
            }
            (Some(_), _) => {
                return Err(ApiError::unsupported(
                    &name,
                    format!("`{name}`: this model reads text parts only"),
                ));
            }
        }
    }
    Ok(text)
}

/// Templates expect arguments as an object; clients send them as they got them, a string of JSON.
fn tool_calls(calls: &Value, name: &str) -> Result<Value, ApiError> {
    let expected = || ApiError::invalid(name, format!("`{name}` must be a list of function calls"));
    let mut out = calls.as_array().ok_or_else(expected)?.clone();
    for call in &mut out {
        let function = call.get_mut("function").and_then(Value::as_object_mut).ok_or_else(expected)?;
        if let Some(Value::String(text)) = function.get("arguments") {
            let text = if text.trim().is_empty() { "{}" } else { text };
            let arguments: Value = serde_json::from_str(text).map_err(|e| {
                ApiError::invalid(name, format!("`{name}`: arguments that are not JSON: {e}"))
            })?;
            function.insert("arguments".into(), arguments);
        }
        function.entry("arguments").or_insert_with(|| Value::Object(Map::new()));
        if !function["arguments"].is_object() || !function.get("name").is_some_and(Value::is_string) {
            let why = format!("`{name}`: a call needs a `name`, and `arguments` that are a JSON object");
            return Err(ApiError::invalid(name, why));
        }
    }
    Ok(Value::Array(out))
}
