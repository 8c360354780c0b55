//! What is refused: each with its status, the one envelope, and the field that is to blame.

use serde_json::{Value, json};

use crate::client::{Client, JSON, get, post};
use crate::server::shared;

/// Sends `body` and checks the envelope; the error's status, param and code.
fn refused(path: &str, body: &Value) -> (u16, Option<String>, Option<String>) {
    let reply = post(shared().addr, path, body);
    let json = reply.json();
    let error = json["error"].as_object().unwrap_or_else(|| panic!("{body} gave {json}"));
    assert_eq!(error.keys().collect::<Vec<_>>(), ["message", "type", "param", "code"]);
    assert!(!error["message"].as_str().unwrap().is_empty());
    let word = |key: &str| error[key].as_str().map(str::to_owned);
    (reply.status, word("param"), word("code"))
}

#[test]
fn bad_fields_are_named() {
    for (field, value) in [
        ("n", json!(0)),
        ("n", json!(33)),
        ("best_of", json!(3)),
        ("temperature", json!(-0.1)),
        ("temperature", json!("hot")),
        ("top_p", json!(1.5)),
        ("top_k", json!(-2)),
        ("top_k", json!(1.5)),
        ("min_p", json!(2)),
        ("repetition_penalty", json!(-1)),
        ("presence_penalty", json!(3)),
        ("frequency_penalty", json!([])),
        ("xtc_threshold", json!(0.9)),
        ("max_tokens", json!(0)),
        ("max_completion_tokens", json!(-5)),
        ("max_tokens", json!("9")),
        ("logit_bias", json!({"99999999": 5})),
        ("logit_bias", json!({"-1": 5})),
        ("logit_bias", json!({"a": 5})),
        ("logit_bias", json!({"1": 101})),
        ("logit_bias", json!([1])),
        ("stop", json!(5)),
        ("stop", json!([1])),
        ("stop", json!(vec!["a"; 17])),
        ("top_p", json!(-0.5)),
        ("stream", json!("yes")),
        ("seed", json!("x")),
        ("model", json!(5)),
        ("response_format", json!("json_object")),
        ("store", json!(true)),
        ("service_tier", json!("flex")),
        ("min_tokens", json!(5)),
        ("stop_token_ids", json!([1])),
        ("use_beam_search", json!(true)),
        ("mirostat", json!(2)),
        ("prompt_logprobs", json!(1)),
        ("lora", json!([{"id": 0, "scale": 1}])),
        ("ignore_eos", json!(1)),
        ("adapters", json!("some/dir")),
        ("draft_model", json!("x")),
        ("guided_json", json!({})),
    ] {
        for path in ["/v1/chat/completions", "/v1/completions"] {
            let mut body = json!({"messages": [{"role": "user", "content": "x"}], "prompt": "x"});
            body[field] = value.clone();
            let (status, param, code) = refused(path, &body);
            assert_eq!((status, param.as_deref()), (400, Some(field)), "{field}: {value}");
            assert!(matches!(code.as_deref(), Some("invalid_value" | "unsupported_value")), "{code:?}");
        }
    }
}

#[test]
fn what_clients_send_out_of_habit_is_taken() {
    let message = json!([{"role": "user", "content": "x"}]);
    for (field, value) in [
        ("temperature", json!(3)),
        ("top_p", json!(0)),
        ("top_logprobs", json!(-1)),
        ("top_logprobs", json!(5)),
        ("stop", json!("")),
        ("stop", json!([])),
        ("stop", json!(["", "a"])),
        ("stop", json!(vec!["a"; 16])),
        ("stop", json!(null)),
        ("stream_options", json!({"include_usage": true})),
    ] {
        for path in ["/v1/chat/completions", "/v1/completions"] {
            let mut body = json!({"messages": message, "prompt": "x", "max_tokens": 1});
            body[field] = value.clone();
            let reply = post(shared().addr, path, &body);
            assert_eq!(reply.status, 200, "{field}: {value}: {}", reply.json());
            assert!(reply.json()["choices"][0]["logprobs"].is_null());
        }
    }
}

#[test]
fn xtc_spares_line_ends_and_the_end() {
    // With every token a top choice only the least probable one is left, beside those that are spared.
    let body = json!({"prompt": "x", "max_tokens": 4, "temperature": 1, "xtc_probability": 1.0, "xtc_threshold": 0.0});
    let reply = post(shared().addr, "/v1/completions", &body).json();
    let text = reply["choices"][0]["text"].as_str().unwrap_or_else(|| panic!("{reply}"));
    assert!(text.chars().all(|c| c == '\n'), "{text:?}");
}

#[test]
fn bad_chats_and_prompts_are_named() {
    let message = |message: Value| json!({"messages": [message]});
    let user = |content: Value| message(json!({"role": "user", "content": content}));
    let ok = json!([{"role": "user", "content": "x"}]);
    let tool = json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}});
    for (body, param) in [
        (json!({}), "messages"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": "hi"}), "messages"),
        (message(json!("hi")), "messages[0]"),
        (message(json!({"content": "x"})), "messages[0].role"),
        (message(json!({"role": "robot", "content": "x"})), "messages[0].role"),
        (user(json!(5)), "messages[0].content"),
        (user(json!(null)), "messages[0].content"),
        (
            user(json!([{"type": "image_url", "image_url": {"url": "http://localhost/"}}])),
            "messages[0].content[0]",
        ),
        (user(json!([{"type": "text"}])), "messages[0].content[0]"),
        (
            message(json!({"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]})),
            "messages[0].tool_calls",
        ),
        (json!({"messages": ok, "tools": "x"}), "tools"),
        (json!({"messages": ok, "tools": [5]}), "tools[0]"),
        (json!({"messages": ok, "tool_choice": "required"}), "tool_choice"),
        (json!({"messages": ok, "tool_choice": "perhaps"}), "tool_choice"),
        (
            json!({"messages": ok, "tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [tool]}),
            "tool_choice",
        ),
        (json!({"messages": ok, "tool_choice": {"type": "allowed_tools"}, "tools": [tool]}), "tool_choice"),
        (json!({"messages": ok, "tools": [{"type": "function"}]}), "tools[0].function"),
        (json!({"messages": ok, "tools": [{"type": "web_search"}]}), "tools[0].type"),
        (
            json!({"messages": ok, "tools": [{"type": "function", "function": {"name": "a b"}}]}),
            "tools[0].function.name",
        ),
        (json!({"messages": ok, "tools": [tool, tool]}), "tools[1].function.name"),
        // The tiny model's template knows no tools.
        (json!({"messages": ok, "tools": [tool]}), "tools"),
        (json!({"messages": ok, "reasoning_effort": "high"}), "reasoning_effort"),
        (json!({"messages": ok, "reasoning_effort": "great"}), "reasoning_effort"),
        (json!({"messages": ok, "parallel_tool_calls": 1}), "parallel_tool_calls"),
        (json!({"messages": ok, "functions": []}), "functions"),
        (json!({"messages": ok, "web_search_options": {}}), "web_search_options"),
        (json!({"messages": ok, "continue_final_message": true}), "continue_final_message"),
        (json!({"messages": ok, "response_format": {"type": "xml"}}), "response_format.type"),
        (json!({"messages": ok, "response_format": {"type": "json_schema"}}), "response_format.json_schema"),
        (
            json!({"messages": ok, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}}}),
            "response_format.json_schema.schema",
        ),
        (
            json!({"messages": ok, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}}),
            "response_format",
        ),
        (json!({"messages": ok, "logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"messages": ok, "logprobs": 1}), "logprobs"),
        (
            json!({"messages": ok, "stream": true, "stream_options": {"include_usage": 1}}),
            "stream_options.include_usage",
        ),
        (json!({"messages": ok, "chat_template_kwargs": {"messages": []}}), "chat_template_kwargs"),
        (json!({"messages": ok, "modalities": ["audio"]}), "modalities"),
    ] {
        let (status, found, _) = refused("/v1/chat/completions", &body);
        assert_eq!((status, found.as_deref()), (400, Some(param)), "{body}");
    }
    for (body, param) in [
        (json!({}), "prompt"),
        (json!({"prompt": 5}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": [1, "a"]}), "prompt"),
        (json!({"prompt": [99999999]}), "prompt"),
        (json!({"prompt": [-1]}), "prompt"),
        (json!({"prompt": [[1], [2.5]]}), "prompt"),
        (json!({"prompt": [{}]}), "prompt"),
        (json!({"prompt": "x", "echo": true}), "echo"),
        (json!({"prompt": "x", "suffix": "y"}), "suffix"),
        (json!({"prompt": "x", "logprobs": -1}), "logprobs"),
    ] {
        let (status, found, _) = refused("/v1/completions", &body);
        assert_eq!((status, found.as_deref()), (400, Some(param)), "{body}");
    }
}

#[test]
fn an_unknown_model_is_not_the_base_and_a_prompt_must_fit() {
    for path in ["/v1/chat/completions", "/v1/completions"] {
        for stream in [false, true] {
            let messages = json!([{"role": "user", "content": "x"}]);
            let body = json!({"model": "nobody", "messages": messages, "prompt": "x", "stream": stream});
            let expected = (404, Some("model".to_owned()), Some("model_not_found".to_owned()));
            assert_eq!(refused(path, &body), expected);
        }
    }
    let long = "x y z ".repeat(20_000);
    for stream in [false, true] {
        let messages = json!([{"role": "user", "content": long}]);
        let body = json!({"messages": messages, "stream": stream});
        let (status, param, code) = refused("/v1/chat/completions", &body);
        assert_eq!(
            (status, param.as_deref(), code.as_deref()),
            (400, Some("messages"), Some("context_length_exceeded"))
        );
    }
}

#[test]
fn wrong_http_has_its_own_status() {
    let addr = shared().addr;
    let exchange = |method: &str, path: &str, headers: &[(&str, &str)], body: Option<&[u8]>| {
        let mut client = Client::new(addr);
        client.send(method, path, headers, body);
        let reply = client.receive(false);
        let code = (reply.status != 204)
            .then(|| reply.json()["error"]["code"].as_str().map(str::to_owned))
            .flatten();
        (reply.status, code.unwrap_or_default(), reply)
    };
    let chat = "/v1/chat/completions";
    let form = ("Content-Type", "application/x-www-form-urlencoded");
    let huge = ("Content-Length", "99999999999");
    let chunked = ("Transfer-Encoding", "chunked");
    for (method, path, headers, body, status, code) in [
        ("GET", "/v2/models", &[][..], None, 404, "not_found"),
        ("POST", "/", &[JSON], Some(&b"{}"[..]), 405, "method_not_allowed"),
        ("GET", chat, &[], None, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", &[], None, 405, "method_not_allowed"),
        ("POST", chat, &[JSON], None, 411, "length_required"),
        ("POST", chat, &[JSON, huge], None, 413, "request_body_too_large"),
        ("POST", chat, &[form], Some(&b"{}"[..]), 415, "invalid_content_type"),
        ("POST", chat, &[], Some(b"{}"), 415, "invalid_content_type"),
        ("POST", chat, &[JSON], Some(b"{"), 400, "invalid_json"),
        ("POST", chat, &[JSON], Some(b"[]"), 400, "invalid_json"),
        ("POST", chat, &[JSON], Some(b"\xff\xfe"), 400, "invalid_json"),
    ] {
        let (found, word, reply) = exchange(method, path, headers, body);
        assert_eq!((found, word.as_str()), (status, code), "{method} {path}");
        assert_eq!(reply.header("content-type"), Some("application/json"));
        if status == 405 {
            assert!(reply.header("allow").unwrap().contains("OPTIONS"));
        }
    }
    let deep = format!("{{\"messages\": {}{}}}", "[".repeat(5000), "]".repeat(5000));
    assert_eq!(exchange("POST", chat, &[JSON], Some(deep.as_bytes())).0, 400);
    // A body that does not say its length is cut off at the limit too.
    let mut client = Client::new(addr);
    client.send("POST", chat, &[JSON, chunked], None);
    let block = format!("{:x}\r\n{}\r\n", 1 << 16, "a".repeat(1 << 16));
    for _ in 0..17 {
        client.write(block.as_bytes());
    }
    assert_eq!(client.receive(false).status, 413);
    // Pages of other origins get nothing, a named one may ask.
    let (_, _, reply) = exchange("GET", "/nothing", &[("Origin", "http://evil.example")], None);
    assert_eq!(reply.header("access-control-allow-origin"), None);
    let (status, _, reply) = exchange("OPTIONS", chat, &[("Origin", "http://localhost:3000")], None);
    assert_eq!(status, 204);
    assert_eq!(reply.header("access-control-allow-origin"), Some("http://localhost:3000"));
    assert_eq!(reply.header("access-control-allow-methods"), Some("POST, OPTIONS"));
    assert_eq!(get(addr, "/health").status, 200);
}
