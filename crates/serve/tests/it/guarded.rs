//! Who may ask, what is told about the server, and what it tells of itself.

use std::time::Duration;

use graft_serve::{ApiKeys, LogEvent};
use serde_json::{Value, json};

use crate::client::{Client, JSON, Reply, get, post};
use crate::server::{shared, start};

fn ask(
    addr: std::net::SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: Option<&Value>,
) -> Reply {
    let mut client = Client::new(addr);
    let text = body.map(Value::to_string);
    client.send(method, path, headers, text.as_ref().map(String::as_bytes));
    client.receive(method == "HEAD")
}

#[test]
fn without_a_known_key_only_what_tells_nothing_is_open() {
    let server = start(|_, serve| serve.api_keys = ApiKeys::new(["secret-1", "secret-2"]));
    let addr = server.addr;
    let body = json!({"prompt": "x", "max_tokens": 1});
    for path in ["/", "/health", "/ready"] {
        assert_eq!(get(addr, path).status, 200, "{path}");
    }
    for path in ["/v1/models", "/v1/models/lora", "/metrics", "/openapi.json", "/nothing"] {
        let reply = get(addr, path);
        assert_eq!((reply.status, reply.header("www-authenticate")), (401, Some("Bearer")), "{path}");
        let error = &reply.json()["error"];
        assert_eq!(
            (&error["type"], &error["code"]),
            (&json!("authentication_error"), &json!("invalid_api_key"))
        );
    }
    let wrong =
        ask(addr, "POST", "/v1/completions", &[JSON, ("Authorization", "Bearer secret-3")], Some(&body));
    let missing = ask(addr, "POST", "/v1/completions", &[JSON], Some(&body));
    assert_eq!((wrong.status, wrong.json()), (401, missing.json()), "missing and wrong look the same");
    for header in [("Authorization", "Bearer secret-2"), ("X-Api-Key", "secret-1")] {
        assert_eq!(ask(addr, "POST", "/v1/completions", &[JSON, header], Some(&body)).status, 200);
    }
    assert_eq!(ask(addr, "OPTIONS", "/v1/completions", &[], None).status, 204);
    let message = ask(addr, "POST", "/v1/messages", &[JSON], Some(&json!({})));
    assert_eq!((message.status, &message.json()["error"]["type"]), (401, &json!("authentication_error")));
    let logs = format!("{:?}", server.logs.lock().unwrap());
    assert!(!logs.contains("secret"), "{logs}");
}

#[test]
fn another_name_than_the_machines_own_is_not_answered_to() {
    let addr = shared().addr;
    let with_host = |host: &str| {
        let mut client = Client::new(addr);
        client.write(format!("GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes());
        client.receive(false)
    };
    assert_eq!(with_host("localhost:1").status, 200);
    let reply = with_host("evil.example");
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (403, &json!("host_not_allowed")));
}

#[test]
fn no_origin_may_call_unless_it_is_named_and_a_named_one_may_send_its_headers() {
    let addr = shared().addr;
    let mine = ("Origin", "http://localhost:3000");
    let wanted = ("Access-Control-Request-Headers", "x-stainless-lang, authorization");
    let reply = ask(addr, "OPTIONS", "/v1/messages", &[mine, wanted], None);
    assert_eq!(reply.header("access-control-allow-headers"), Some("x-stainless-lang, authorization"));
    for origin in ["http://localhost:3001", "http://localhost:3000.evil.example", "null"] {
        let reply = ask(addr, "GET", "/v1/models", &[("Origin", origin)], None);
        assert_eq!((reply.status, reply.header("access-control-allow-origin")), (200, None), "{origin}");
    }
}

/// The value of a line of /metrics.
fn value(text: &str, line: &str) -> f64 {
    let found = text.lines().find_map(|l| l.strip_prefix(line).map(|rest| rest.trim().parse().unwrap()));
    found.unwrap_or_else(|| panic!("no {line} in\n{text}"))
}

#[test]
fn figures_are_those_of_the_requests() {
    let server = start(|_, _| {});
    let body = json!({"model": "lora", "prompt": ["a b c", "d"], "max_tokens": 5, "ignore_eos": true});
    let usage = post(server.addr, "/v1/completions", &body).json()["usage"].clone();
    let mut streamed = body.clone();
    streamed["stream"] = true.into();
    assert_eq!(post(server.addr, "/v1/completions", &streamed).status, 200);
    assert_eq!(post(server.addr, "/v1/completions", &json!({"model": "made up", "prompt": "x"})).status, 404);
    assert_eq!(get(server.addr, "/nothing/here").status, 404);
    let reply = get(server.addr, "/metrics");
    assert_eq!(reply.header("content-type"), Some("text/plain; version=0.0.4"));
    let text = reply.text();
    let total = |key: &str| 2.0 * usage[key].as_f64().unwrap();
    for (line, expected) in [
        ("vllm:prompt_tokens_total{model_name=\"lora\"}", total("prompt_tokens")),
        ("vllm:generation_tokens_total{model_name=\"lora\"}", total("completion_tokens")),
        ("vllm:request_success_total{finished_reason=\"length\",model_name=\"lora\"}", 4.0),
        ("vllm:e2e_request_latency_seconds_count{model_name=\"lora\"}", 2.0),
        ("vllm:time_to_first_token_seconds_count{model_name=\"lora\"}", 2.0),
        ("graft_http_requests_total{method=\"POST\",route=\"/v1/completions\",status=\"200\"}", 2.0),
        ("graft_http_requests_total{method=\"POST\",route=\"/v1/completions\",status=\"404\"}", 1.0),
        ("graft_http_requests_total{method=\"GET\",route=\"none\",status=\"404\"}", 1.0),
        ("graft_engine_up", 1.0),
        ("vllm:num_requests_running", 0.0),
    ] {
        assert_eq!(value(&text, line), expected, "{line}");
    }
    assert!(!text.contains("made up") && !text.contains("/nothing"), "clients make no labels");
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let name = line.split(['{', ' ']).next().unwrap();
        let family =
            ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        for kind in ["HELP", "TYPE"] {
            assert!(text.contains(&format!("# {kind} {family} ")), "{family} has no {kind}");
        }
    }
}

#[test]
fn the_page_comes_with_its_policy() {
    let reply = get(shared().addr, "/");
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("text/html; charset=utf-8")));
    let policy = reply.header("content-security-policy").unwrap();
    assert!(policy.contains("default-src 'none'") && policy.contains("script-src 'sha256-"), "{policy}");
    let head = ask(shared().addr, "HEAD", "/", &[], None);
    assert_eq!(head.header("content-length").unwrap(), reply.body.len().to_string());
}

#[test]
fn logs_tell_what_happened_and_nothing_of_what_was_written() {
    let server = start(|_, _| {});
    let secret = "xyzzy";
    let chat =
        json!({"messages": [{"role": "user", "content": secret}], "max_tokens": 2, "ignore_eos": true});
    assert_eq!(post(server.addr, "/v1/chat/completions", &chat).status, 200);
    for body in [
        json!({"messages": [{"role": secret, "content": secret}]}),
        json!({"messages": [{"role": "user", "content": "x"}], "stop": [[secret]]}),
        json!({"messages": [{"role": "user", "content": "x"}], "tool_choice": secret}),
        json!({"messages": [{"role": "user", "content": "x"}], "model": secret}),
    ] {
        assert!(post(server.addr, "/v1/chat/completions", &body).status >= 400);
    }
    let requests = server.requests();
    assert_eq!((requests.len(), requests[0].usage.completion, requests[0].status), (5, 2, 200));
    assert_eq!((requests[0].route, requests[0].finishes.len()), ("/v1/chat/completions", 1));
    assert_eq!(requests[1].error.as_deref(), Some("invalid_value messages[0].role"));
    let all = format!("{:?}", server.logs.lock().unwrap());
    assert!(!all.contains(secret), "{all}");
    assert!(server.logs.lock().unwrap().iter().all(|event| matches!(event, LogEvent::Request(_))));
}

#[test]
fn a_slow_header_and_a_slow_body_cost_only_their_own_connection() {
    let server = start(|_, serve| {
        serve.header_timeout = Duration::from_millis(200);
        serve.body_timeout = Duration::from_millis(200);
    });
    let mut slow = Client::new(server.addr);
    slow.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n");
    let mut body = Client::new(server.addr);
    body.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{");
    assert_eq!(get(server.addr, "/health").status, 200);
    assert_eq!(body.receive(false).status, 408);
    use std::io::Read as _;
    let mut rest = Vec::new();
    slow.stream.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty() || rest.starts_with(b"HTTP/1.1 408"), "{rest:?}");
}
