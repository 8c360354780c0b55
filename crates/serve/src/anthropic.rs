//! Anthropic's form of a chat, `/v1/messages`, as a translation: a request becomes one of `/v1/chat/completions`, and
//! the same parts of an answer are written in the other form.

use std::collections::VecDeque;

use bytes::Bytes;
use serde_json::{Map, Value, json};

use crate::fields::{Fields, wrong};
use crate::reply::{Choice, Reply};
use crate::split::Part;
use crate::{ApiError, Finish, Usage};

/// What is sent while nothing has come for a while.
pub(crate) const PING: &[u8] = b"event: ping\ndata: {\"type\":\"ping\"}\n\n";

/// The chat request that says the same; `max_tokens` must be there unless the tokens are only `counted`.
///
/// # Errors
/// 400 naming the field that is wrong or has no translation.
pub(crate) fn chat_request(body: &Map<String, Value>, counted: bool) -> Result<Map<String, Value>, ApiError> {
    let fields = Fields(body);
    for (name, neutral, why) in [
        ("container", &[][..], "this server runs no code"),
        ("mcp_servers", &[json!([])], "this server calls no others"),
        ("context_management", &[], "messages are taken as they are"),
        ("cache_control", &[json!({"type": "ephemeral"})], "there is one kind of cache"),
    ] {
        fields.refuse(name, neutral, why)?;
    }
    let mut out = Map::new();
    for (name, as_name) in [
        ("model", "model"),
        ("max_tokens", "max_tokens"),
        ("temperature", "temperature"),
        ("top_p", "top_p"),
        ("top_k", "top_k"),
        ("stream", "stream"),
    ] {
        if let Some(value) = fields.get(name) {
            out.insert(as_name.into(), value.clone());
        }
    }
    if !counted && fields.integer("max_tokens", 1, i64::MAX)?.is_none() {
        return Err(ApiError::invalid(
            "max_tokens",
            "`max_tokens` is missing; it must be an integer of at least 1",
        ));
    }
    if let Some(stops) = fields.get("stop_sequences") {
        let strings = stops.as_array().is_some_and(|all| all.iter().all(Value::is_string));
        if !strings {
            return Err(wrong("stop_sequences", "a list of strings", stops));
        }
        out.insert("stop".into(), stops.clone());
    }
    out.insert("messages".into(), messages(fields)?.into());
    if let Some(tools) = fields.get("tools") {
        out.insert("tools".into(), tools_of(tools)?);
    }
    tool_choice(fields, &mut out)?;
    if let Some(thinking) = fields.object("thinking")? {
        let kind = Fields(thinking).string("type")?;
        let think = match kind {
            Some("enabled" | "adaptive") => true,
            Some("disabled") => false,
            _ => {
                let why = "`thinking.type` must be \"enabled\", \"adaptive\" or \"disabled\"";
                return Err(ApiError::invalid("thinking", why));
            }
        };
        out.insert("chat_template_kwargs".into(), json!({"enable_thinking": think}));
    }
    let format = match fields.object("output_config")? {
        Some(config) => Fields(config).object("format")?,
        None => None,
    };
    if let Some(format) = format {
        let schema = Fields(format).object("schema")?;
        let named = format.get("type").is_some_and(|kind| kind == "json_schema");
        let (true, Some(schema)) = (named, schema) else {
            let why = "`output_config.format` must be {\"type\": \"json_schema\", \"schema\": {...}}";
            return Err(ApiError::invalid("output_config", why));
        };
        let inner = json!({"name": "answer", "schema": schema});
        out.insert("response_format".into(), json!({"type": "json_schema", "json_schema": inner}));
    }
    Ok(out)
}

fn tool_choice(fields: Fields, out: &mut Map<String, Value>) -> Result<(), ApiError> {
    let Some(choice) = fields.object("tool_choice")? else { return Ok(()) };
    let choice = Fields(choice);
    let value = match (choice.string("type")?, choice.string("name")?) {
        (Some("auto"), _) => json!("auto"),
        (Some("any"), _) => json!("required"),
        (Some("none"), _) => json!("none"),
        (Some("tool"), Some(name)) => json!({"type": "function", "function": {"name": name}}),
        _ => {
            let why = "`tool_choice` must be of type \"auto\", \"any\", \"none\", or \"tool\" with a `name`";
            return Err(ApiError::invalid("tool_choice", why));
        }
    };
    if let Some(single) = choice.boolean("disable_parallel_tool_use")? {
        out.insert("parallel_tool_calls".into(), (!single).into());
    }
    out.insert("tool_choice".into(), value);
    Ok(())
}

fn tools_of(tools: &Value) -> Result<Value, ApiError> {
    let items = tools.as_array().ok_or_else(|| wrong("tools", "a list of tools", tools))?;
    let tool = |(index, item): (usize, &Value)| -> Result<Value, ApiError> {
        let at = format!("tools[{index}]");
        let own = Fields(item.as_object().ok_or_else(|| wrong(&at, "an object", item))?);
        if let Some(kind) = own.string("type")?.filter(|kind| *kind != "custom") {
            let why =
                format!("`{at}`: this server runs no tools of its own, so {kind:.80?} is not supported");
            return Err(ApiError::unsupported(&at, why));
        }
        let mut function = Map::new();
        for (name, as_name) in [
            ("name", "name"),
            ("description", "description"),
            ("input_schema", "parameters"),
            ("strict", "strict"),
        ] {
            if let Some(value) = own.get(name) {
                function.insert(as_name.into(), value.clone());
            }
        }
        Ok(json!({"type": "function", "function": function}))
    };
    items.iter().enumerate().map(tool).collect()
}

fn messages(fields: Fields) -> Result<Vec<Value>, ApiError> {
    let mut out = Vec::new();
    if let Some(system) = fields.get("system") {
        out.push(json!({"role": "system", "content": text_of(system, "system")?}));
    }
    let list = fields.get("messages").and_then(Value::as_array).filter(|list| !list.is_empty());
    let Some(list) = list else {
        return Err(ApiError::invalid("messages", "`messages` must be a list of at least one message"));
    };
    for (index, message) in list.iter().enumerate() {
        let at = format!("messages[{index}]");
        let role = message.get("role").and_then(Value::as_str);
        let content = message.get("content").unwrap_or(&Value::Null);
        match role {
            Some("user") => user(content, &format!("{at}.content"), &mut out)?,
            Some("assistant") => out.push(assistant(content, &format!("{at}.content"))?),
            _ => {
                let name = format!("{at}.role");
                return Err(ApiError::invalid(&name, format!("`{name}` must be user or assistant")));
            }
        }
    }
    if out.last().is_some_and(|last| last["role"] == "assistant") {
        let why = "`messages` must end with the user's: this server does not go on with an answer";
        return Err(ApiError::unsupported("messages", why));
    }
    Ok(out)
}

/// Results of tools are messages of their own, before what the user says beside them.
fn user(content: &Value, at: &str, out: &mut Vec<Value>) -> Result<(), ApiError> {
    let Some(blocks) = content.as_array() else {
        out.push(json!({"role": "user", "content": text_of(content, at)?}));
        return Ok(());
    };
    let is_result = |block: &&Value| block["type"] == "tool_result";
    for block in blocks.iter().filter(is_result) {
        let Some(id) = block["tool_use_id"].as_str() else {
            return Err(ApiError::invalid(at, format!("`{at}`: a tool_result needs a `tool_use_id`")));
        };
        let text = match &block["content"] {
            Value::Null => String::new(),
            content => text_of(content, at)?,
        };
        out.push(json!({"role": "tool", "tool_call_id": id, "content": text}));
    }
    let rest: Vec<Value> = blocks.iter().filter(|block| !is_result(block)).cloned().collect();
    if !rest.is_empty() || blocks.is_empty() {
        out.push(json!({"role": "user", "content": text_of(&rest.into(), at)?}));
    }
    Ok(())
}

fn assistant(content: &Value, at: &str) -> Result<Value, ApiError> {
    let Some(blocks) = content.as_array() else {
        return Ok(json!({"role": "assistant", "content": text_of(content, at)?}));
    };
    let (mut text, mut thought, mut calls) = (String::new(), String::new(), Vec::new());
    for block in blocks {
        match block["type"].as_str() {
            Some("thinking") => thought.push_str(block["thinking"].as_str().unwrap_or_default()),
            Some("redacted_thinking") => {}
            Some("tool_use") => {
                let function = json!({"name": block["name"], "arguments": block["input"]});
                calls.push(json!({"id": block["id"], "type": "function", "function": function}));
            }
            _ => text.push_str(&block_text(block, at)?),
        }
    }
    let mut message = json!({"role": "assistant", "content": text});
    if !thought.is_empty() {
        message["reasoning_content"] = thought.into();
    }
    if !calls.is_empty() {
        message["tool_calls"] = calls.into();
    }
    Ok(message)
}

/// A text, or the texts of blocks.
fn text_of(content: &Value, at: &str) -> Result<String, ApiError> {
    match content {
        Value::String(text) => Ok(text.clone()),
        Value::Array(blocks) => blocks.iter().map(|block| block_text(block, at)).collect(),
        other => Err(wrong(at, "a string or a list of text blocks", other)),
    }
}

fn block_text(block: &Value, at: &str) -> Result<String, ApiError> {
    match (block["type"].as_str(), block["text"].as_str()) {
        (Some("text"), Some(text)) => Ok(text.to_owned()),
        (Some(kind), _) if kind != "text" => {
            Err(ApiError::unsupported(at, format!("`{at}`: this model reads text, not {kind:.40?}")))
        }
        _ => Err(ApiError::invalid(at, format!("`{at}` must be {{\"type\": \"text\", \"text\": ...}}"))),
    }
}

/// A whole answer.
pub(crate) fn whole(reply: &Reply, choice: &Choice, sum: Usage) -> Value {
    let mut content = Vec::new();
    if !choice.thought.is_empty() {
        content.push(json!({"type": "thinking", "thinking": choice.thought, "signature": ""}));
    }
    if !choice.text.is_empty() {
        content.push(json!({"type": "text", "text": choice.text}));
    }
    for (index, call) in choice.calls.iter().enumerate() {
        let input: Value = serde_json::from_str(&call.arguments).unwrap_or_else(|_| json!({}));
        let id = reply.call_id(0, index);
        content.push(json!({"type": "tool_use", "id": id, "name": call.name, "input": input}));
    }
    let (reason, sequence) = stop_reason(reply, choice.finish, !choice.calls.is_empty());
    let mut message = head(reply, &content, &usage(sum));
    message["stop_reason"] = reason.into();
    message["stop_sequence"] = sequence.into();
    message
}

fn head(reply: &Reply, content: &[Value], usage: &Value) -> Value {
    json!({
        "id": reply.id, "type": "message", "role": "assistant", "model": reply.model, "content": content,
        "stop_reason": null, "stop_sequence": null, "usage": usage,
    })
}

/// Tokens that had to be read are told apart from those that had been read before.
fn usage(sum: Usage) -> Value {
    json!({
        "input_tokens": sum.prompt.saturating_sub(sum.cached), "output_tokens": sum.completion,
        "cache_read_input_tokens": sum.cached, "cache_creation_input_tokens": 0,
    })
}

fn stop_reason(reply: &Reply, finish: Finish, called: bool) -> (&'static str, Option<String>) {
    match finish {
        Finish::Length => ("max_tokens", None),
        _ if called => ("tool_use", None),
        Finish::StopString(index) => match reply.stops.get(index) {
            Some(stop) => ("stop_sequence", Some(stop.clone())),
            None => ("end_turn", None),
        },
        Finish::Stop => ("end_turn", None),
    }
}

/// One event, named by its type.
fn event(value: &Value) -> Bytes {
    Bytes::from(format!("event: {}\ndata: {value}\n\n", value["type"].as_str().unwrap_or_default()))
}

/// The event that opens a stream.
pub(crate) fn opening(reply: &Reply) -> Bytes {
    let sum = Usage { prompt: reply.prompt_tokens, completion: 0, cached: 0 };
    event(&json!({"type": "message_start", "message": head(reply, &[], &usage(sum))}))
}

/// The events that end a stream.
pub(crate) fn closing(reply: &Reply, finish: Finish, called: bool, sum: Usage, out: &mut VecDeque<Bytes>) {
    let (reason, sequence) = stop_reason(reply, finish, called);
    let delta = json!({"stop_reason": reason, "stop_sequence": sequence});
    out.push_back(event(&json!({"type": "message_delta", "delta": delta, "usage": usage(sum)})));
    out.push_back(event(&json!({"type": "message_stop"})));
}

/// The envelope of an error.
pub(crate) fn error_body(error: &ApiError) -> Value {
    let kind = match error.status {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 => "overloaded_error",
        500.. => "api_error",
        _ => "invalid_request_error",
    };
    json!({"type": "error", "error": {"type": kind, "message": error.message}})
}

/// An error after the status line has gone.
pub(crate) fn failure(error: &ApiError) -> Bytes {
    event(&error_body(error))
}

/// The blocks of a streamed answer: one after another, each with a beginning and an end.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    index: usize,
    open: Option<&'static str>,
}

impl Blocks {
    /// Writes a part; `id` is for a call.
    pub(crate) fn part(&mut self, part: &Part, id: &str, out: &mut VecDeque<Bytes>) {
        match part {
            Part::Thought(text) => {
                let block = json!({"type": "thinking", "thinking": "", "signature": ""});
                self.within("thinking", &block, out);
                self.delta(&json!({"type": "thinking_delta", "thinking": text}), out);
            }
            Part::Text(text) => {
                self.within("text", &json!({"type": "text", "text": ""}), out);
                self.delta(&json!({"type": "text_delta", "text": text}), out);
            }
            Part::Call(call) => {
                self.close(out);
                let block = json!({"type": "tool_use", "id": id, "name": call.name, "input": {}});
                self.within("tool_use", &block, out);
                if !call.arguments.is_empty() {
                    self.delta(&json!({"type": "input_json_delta", "partial_json": call.arguments}), out);
                }
            }
            Part::Arguments(text) => {
                self.delta(&json!({"type": "input_json_delta", "partial_json": text}), out);
            }
        }
    }

    /// Sees to it that a block of this kind is open.
    fn within(&mut self, kind: &'static str, block: &Value, out: &mut VecDeque<Bytes>) {
        if self.open == Some(kind) {
            return;
        }
        self.close(out);
        let start = json!({"type": "content_block_start", "index": self.index, "content_block": block});
        out.push_back(event(&start));
        self.open = Some(kind);
    }

    fn delta(&self, delta: &Value, out: &mut VecDeque<Bytes>) {
        out.push_back(event(&json!({"type": "content_block_delta", "index": self.index, "delta": delta})));
    }

    /// Ends the open block, if there is one.
    pub(crate) fn close(&mut self, out: &mut VecDeque<Bytes>) {
        if self.open.take().is_some() {
            out.push_back(event(&json!({"type": "content_block_stop", "index": self.index})));
            self.index += 1;
        }
    }
}
