//! The messages of a row: what they must be, and what the chat template makes of them.

use std::borrow::Cow;

use serde_json::Value;

use crate::data::{Encoder, Row, RowResult};

pub(crate) fn text<'a>(row: &'a Row, key: &str) -> RowResult<&'a str> {
    let value = row.value.get(key).unwrap_or(&Value::Null);
    value.as_str().ok_or_else(|| format!("{key:?}: expected a string, found {}", kind(value)))
}

pub(crate) fn messages<'a>(row: &'a Row, key: &str) -> RowResult<&'a [Value]> {
    let value = row.value.get(key).unwrap_or(&Value::Null);
    let list = value
        .as_array()
        .ok_or_else(|| format!("{key:?}: expected a list of messages, found {}", kind(value)))?;
    if list.is_empty() {
        return Err(format!("{key:?}: the list of messages is empty"));
    }
    for (i, message) in list.iter().enumerate() {
        if message.get("role").and_then(Value::as_str).is_none() {
            return Err(format!(
                "{key:?}[{i}]: expected an object with \"role\" and \"content\", found {}{}",
                kind(message),
                if message.is_object() { " without them" } else { "" }
            ));
        }
    }
    Ok(list)
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// The text of messages, which stand under `key`; `open`: with what opens an answer. A call without content has an empty
/// one where the template needs a text: clients write `null` there, and servers read it so.
pub(crate) fn render(
    messages: &mut Cow<'_, [Value]>,
    tools: Option<&Value>,
    encoder: &dyn Encoder,
    (key, open): (&str, bool),
) -> RowResult<String> {
    let mut rendered = encoder.render(messages, tools, open);
    let silent = |m: &Value| {
        m.get("content").is_none_or(Value::is_null) && m.get("tool_calls").is_some_and(|c| !c.is_null())
    };
    if rendered.is_err() && messages.iter().any(silent) {
        for message in messages.to_mut().iter_mut().filter(|m| silent(m)) {
            message["content"] = "".into();
        }
        rendered = encoder.render(messages, tools, open);
    }
    rendered.map_err(|problem| {
        if let Some(key) = unparsed(messages, tools) {
            return format!("{key:?}: expected a list, found a string: parse it ({problem})");
        }
        let content = |(at, message): (usize, &Value)| {
            let advice = match message.get("content") {
                None => "nothing: write \"\"".to_owned(),
                Some(Value::Null) => "null: write \"\"".to_owned(),
                Some(Value::String(_)) => return None,
                Some(other) => format!("{}: write the content as one string", kind(other)),
            };
            Some(format!("{key:?}[{at}]: \"content\": expected a string, found {advice} ({problem})"))
        };
        let named = messages.iter().enumerate().find_map(content);
        named.unwrap_or(problem)
    })
}

/// The key of tools or calls that are JSON in a string, which templates refuse or print letter by letter.
pub(crate) fn unparsed(messages: &[Value], tools: Option<&Value>) -> Option<&'static str> {
    if tools.is_some_and(Value::is_string) {
        return Some("tools");
    }
    messages.iter().any(|m| m.get("tool_calls").is_some_and(Value::is_string)).then_some("tool_calls")
}

/// Whether a character shows nothing and takes no room: marks of direction, joiners and the like.
pub fn is_invisible(c: char) -> bool {
    matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

/// Whether a message has this role.
pub(crate) fn is_from(message: &Value, role: &str) -> bool {
    message.get("role").and_then(Value::as_str) == Some(role)
}
