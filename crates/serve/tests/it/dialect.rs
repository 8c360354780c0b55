//! Anthropic's form of a chat says the same as OpenAI's.

use std::sync::OnceLock;

use graft_testkit::CHAT_STYLES;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::client::{Reply, get, post};
use crate::server::{Server, shared, start};

const MESSAGES: &str = "/v1/messages";

fn asked(fields: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 24});
    let Value::Object(fields) = fields else { panic!("fields are an object, not {fields}") };
    body.as_object_mut().unwrap().extend(fields);
    body
}

/// The events of a stream, each checked to be named by its type.
fn events(reply: &Reply) -> Vec<Value> {
    let text = reply.text();
    assert!(text.ends_with("\n\n"), "{text:?}");
    let event = |event: &str| {
        let (name, data) = event.split_once('\n').unwrap();
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(name.strip_prefix("event: ").unwrap(), data["type"]);
        data
    };
    text.split_terminator("\n\n").map(event).collect()
}

fn qwen() -> &'static Server {
    static SERVER: OnceLock<(TempDir, Server)> = OnceLock::new();
    &SERVER
        .get_or_init(|| {
            let dir = CHAT_STYLES.iter().find(|style| style.name == "qwen 3").unwrap().model();
            let server = start(|engine, _| {
                engine.model_dir = dir.path().to_path_buf();
                engine.adapters.clear();
            });
            (dir, server)
        })
        .1
}

#[test]
fn a_message_is_the_chats_answer_streamed_or_not() {
    let addr = shared().addr;
    let chat = post(addr, "/v1/chat/completions", &asked(json!({}))).json();
    let reply = post(addr, MESSAGES, &asked(json!({})));
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert!(reply.header("request-id").is_some());
    let message = reply.json();
    let text = chat["choices"][0]["message"]["content"].as_str().unwrap();
    assert_eq!(message["content"], json!([{"type": "text", "text": text}]));
    assert_eq!((&message["type"], &message["role"]), (&json!("message"), &json!("assistant")));
    let usage = &chat["usage"];
    assert_eq!(message["usage"]["input_tokens"], usage["prompt_tokens"]);
    assert_eq!(message["usage"]["output_tokens"], usage["completion_tokens"]);
    let reason = if chat["choices"][0]["finish_reason"] == "length" { "max_tokens" } else { "end_turn" };
    assert_eq!((&message["stop_reason"], &message["stop_sequence"]), (&json!(reason), &Value::Null));

    let events = events(&post(addr, MESSAGES, &asked(json!({"stream": true}))));
    let types: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert_eq!(types[..2], ["message_start", "content_block_start"]);
    assert_eq!(types[types.len() - 3..], ["content_block_stop", "message_delta", "message_stop"]);
    assert_eq!(events[0]["message"]["usage"]["input_tokens"], usage["prompt_tokens"]);
    let said: String = events.iter().filter_map(|event| event["delta"]["text"].as_str()).collect();
    assert_eq!(said, text);
    let delta = &events[events.len() - 2];
    assert_eq!(
        (&delta["delta"]["stop_reason"], &delta["usage"]["output_tokens"]),
        (&json!(reason), &usage["completion_tokens"])
    );

    let counted = post(addr, "/v1/messages/count_tokens", &json!({"messages": asked(json!({}))["messages"]}));
    assert_eq!(counted.json(), json!({"input_tokens": usage["prompt_tokens"]}));
    let system = asked(json!({"system": [{"type": "text", "text": "be brief"}]}));
    let long = post(addr, "/v1/messages/count_tokens", &system).json()["input_tokens"].as_u64().unwrap();
    assert!(long > usage["prompt_tokens"].as_u64().unwrap());
}

#[test]
fn a_stop_sequence_is_named() {
    let addr = shared().addr;
    let whole = post(addr, MESSAGES, &asked(json!({}))).json();
    let text = whole["content"][0]["text"].as_str().unwrap();
    let stop: String = text.chars().skip(5).take(3).collect();
    let cut = post(addr, MESSAGES, &asked(json!({"stop_sequences": ["never", stop]}))).json();
    assert_eq!((&cut["stop_reason"], &cut["stop_sequence"]), (&json!("stop_sequence"), &json!(stop)));
    assert_eq!(cut["content"][0]["text"], text[..text.find(&stop).unwrap()]);
}

#[test]
fn tools_are_used_and_their_results_go_back() {
    let addr = qwen().addr;
    let schema = json!({"type": "object", "properties": {"city": {"enum": ["Seoul"]}}, "required": ["city"], "additionalProperties": false});
    let tools = json!([{"name": "look", "description": "d", "input_schema": schema}]);
    let body = asked(
        json!({"tools": tools, "tool_choice": {"type": "any", "disable_parallel_tool_use": true}, "max_tokens": 200,
        "thinking": {"type": "disabled"}}),
    );
    let message = post(addr, MESSAGES, &body).json();
    assert_eq!(message["stop_reason"], "tool_use", "{message}");
    let block = message["content"].as_array().unwrap().last().unwrap();
    assert_eq!(
        (&block["type"], &block["name"], &block["input"]),
        (&json!("tool_use"), &json!("look"), &json!({"city": "Seoul"}))
    );
    let mut streamed = body.clone();
    streamed["stream"] = true.into();
    let events = events(&post(addr, MESSAGES, &streamed));
    let started = events.iter().find(|event| event["content_block"]["type"] == "tool_use").unwrap();
    assert_eq!(
        (&started["content_block"]["name"], &started["content_block"]["input"]),
        (&json!("look"), &json!({}))
    );
    let input: String = events.iter().filter_map(|event| event["delta"]["partial_json"].as_str()).collect();
    let input: Value = serde_json::from_str(&input).unwrap();
    assert_eq!(input, block["input"]);

    let again = json!({"max_tokens": 4, "tools": tools, "messages": [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, block]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block["id"], "content": [{"type": "text", "text": "sun"}]}, {"type": "text", "text": "and?"}]},
    ]});
    let reply = post(addr, MESSAGES, &again);
    assert_eq!(reply.status, 200, "{}", reply.text());
}

#[test]
fn what_has_no_translation_is_refused_in_its_envelope() {
    let user = |content: Value| json!({"max_tokens": 1, "messages": [{"role": "user", "content": content}]});
    for (body, status, kind) in [
        (json!({"messages": [{"role": "user", "content": "x"}]}), 400, "invalid_request_error"),
        (json!({"max_tokens": 5}), 400, "invalid_request_error"),
        (user(json!(5)), 400, "invalid_request_error"),
        (user(json!([{"type": "image", "source": {}}])), 400, "invalid_request_error"),
        (user(json!([{"type": "tool_result"}])), 400, "invalid_request_error"),
        (
            json!({"max_tokens": 1, "messages": [{"role": "system", "content": "x"}]}),
            400,
            "invalid_request_error",
        ),
        (
            json!({"max_tokens": 1, "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}),
            400,
            "invalid_request_error",
        ),
        (asked(json!({"stop_sequences": "x"})), 400, "invalid_request_error"),
        (
            asked(json!({"tools": [{"type": "web_search_20250305", "name": "web_search"}]})),
            400,
            "invalid_request_error",
        ),
        (asked(json!({"tool_choice": {"type": "maybe"}})), 400, "invalid_request_error"),
        (asked(json!({"thinking": {"type": "hard"}})), 400, "invalid_request_error"),
        (asked(json!({"mcp_servers": [{}]})), 400, "invalid_request_error"),
        (asked(json!({"model": "nobody"})), 404, "not_found_error"),
    ] {
        let reply = post(shared().addr, MESSAGES, &body);
        let error = reply.json();
        assert_eq!(
            (reply.status, &error["type"], &error["error"]["type"]),
            (status, &json!("error"), &json!(kind)),
            "{body}"
        );
        assert_eq!(error["request_id"].as_str(), reply.header("request-id"));
    }
    assert_eq!(get(shared().addr, MESSAGES).json()["type"], "error");
}
