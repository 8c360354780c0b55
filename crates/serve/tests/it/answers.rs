//! What is answered: the same as without a server, streamed or not, alone or beside others.

use graft_model::Sampling;
use serde_json::{Value, json};

use crate::client::{Client, JSON, get, post, streamed_text};
use crate::server::{chat_text, direct, fixture, shared};

fn chat(question: &str) -> Value {
    json!({"messages": [{"role": "user", "content": question}], "max_tokens": 24})
}

fn with(mut body: Value, fields: Value) -> Value {
    let Value::Object(fields) = fields else { panic!("fields are an object, not {fields}") };
    body.as_object_mut().unwrap().extend(fields);
    body
}

#[test]
fn models_are_listed_with_their_parents() {
    let server = shared();
    for path in ["/v1/models", "/models"] {
        let reply = get(server.addr, path);
        assert_eq!(reply.status, 200);
        let data = reply.json()["data"].as_array().unwrap().clone();
        let of = |key: &str| data.iter().map(|card| card[key].clone()).collect::<Vec<_>>();
        assert_eq!(of("id"), [json!("org/tiny"), json!("lora"), json!("org/dora"), json!("broken")]);
        let parent = json!("org/tiny");
        assert_eq!(of("parent"), [Value::Null, parent.clone(), parent.clone(), parent]);
        assert!(of("object").iter().all(|o| o == "model"));
    }
    for path in ["/v1/models/org/dora", "/v1/models/org%2Fdora"] {
        assert_eq!(get(server.addr, path).json()["id"], "org/dora");
    }
    let reply = get(server.addr, "/v1/models/nobody");
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (404, &json!("model_not_found")));
    assert_eq!(get(server.addr, "/health").json(), json!({"status": "ok"}));
}

#[test]
fn a_chat_is_what_the_model_says_and_the_stream_says_the_same() {
    let server = shared();
    let f = fixture();
    let prompt = chat_text("hello there");
    let mut answers = Vec::new();
    for (model, dir) in
        [(None, None), (Some("lora"), Some(f.lora.path())), (Some("org/dora"), Some(f.dora.path()))]
    {
        let (ids, text) = direct(dir, &prompt, false, Sampling::greedy(), 24);
        let body = with(chat("hello there"), json!({"model": model}));
        let reply = post(server.addr, "/v1/chat/completions", &body);
        assert_eq!(reply.status, 200, "{}", reply.text());
        assert_eq!(reply.header("content-type"), Some("application/json"));
        let whole = reply.json();
        let choice = &whole["choices"][0];
        assert_eq!(choice["message"], json!({"role": "assistant", "content": text}), "{model:?}");
        assert_eq!(choice["finish_reason"], if ids.len() == 24 { "length" } else { "stop" });
        assert_eq!(whole["model"], model.unwrap_or("org/tiny"));
        assert_eq!(whole["object"], "chat.completion");
        assert_eq!(whole["usage"]["completion_tokens"], ids.len());
        let read = whole["usage"]["prompt_tokens"].as_u64().unwrap();
        assert_eq!(whole["usage"]["total_tokens"].as_u64().unwrap(), read + ids.len() as u64);

        let body = with(body, json!({"stream": true, "stream_options": {"include_usage": true}}));
        let reply = post(server.addr, "/chat/completions", &body);
        assert_eq!(reply.header("content-type"), Some("text/event-stream"));
        let chunks = reply.chunks();
        assert_eq!(streamed_text(&chunks), text);
        assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
        for chunk in &chunks {
            assert_eq!(chunk["id"], chunks[0]["id"]);
            assert_eq!(chunk["created"], chunks[0]["created"]);
            assert_eq!(chunk["object"], "chat.completion.chunk");
        }
        let (last, before) = chunks.split_last().unwrap();
        assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &whole["usage"]));
        assert!(before.iter().all(|chunk| chunk.get("usage") == Some(&Value::Null)));
        assert!(before[1..].iter().all(|chunk| chunk["choices"][0]["delta"].get("role").is_none()));
        let end = &before.last().unwrap()["choices"][0];
        assert_eq!((&end["delta"], &end["finish_reason"]), (&json!({}), &choice["finish_reason"]));
        answers.push(text);
    }
    answers.sort();
    answers.dedup();
    assert_eq!(answers.len(), 3, "each adapter changes the answer: {answers:?}");
}

#[test]
fn neighbours_change_nothing_and_a_failing_one_fails_alone() {
    let server = shared();
    let questions = ["one", "a somewhat longer second question", "three"];
    let models = ["org/tiny", "lora", "org/dora"];
    let ask = |model: &str, question: &str| {
        post(server.addr, "/v1/chat/completions", &with(chat(question), json!({"model": model})))
    };
    let jobs: Vec<(&str, &str)> =
        models.iter().flat_map(|m| questions.iter().map(move |q| (*m, *q))).collect();
    let content = |reply: &crate::client::Reply| reply.json()["choices"][0]["message"]["content"].clone();
    let solo: Vec<Value> = jobs.iter().map(|(m, q)| content(&ask(m, q))).collect();
    std::thread::scope(|scope| {
        let broken: Vec<_> = (0..3).map(|_| scope.spawn(|| ask("broken", "one"))).collect();
        let all: Vec<_> = jobs.iter().map(|(m, q)| scope.spawn(|| ask(m, q))).collect();
        for ((thread, solo), job) in all.into_iter().zip(&solo).zip(&jobs) {
            assert_eq!(&content(&thread.join().unwrap()), solo, "{job:?}");
        }
        for thread in broken {
            let reply = thread.join().unwrap();
            assert_eq!((reply.status, &reply.json()["error"]["type"]), (500, &json!("server_error")));
        }
    });
    assert_eq!(get(server.addr, "/health").status, 200);
}

#[test]
fn completions_take_text_lists_and_ids() {
    let server = shared();
    let ask =
        |prompt: Value| post(server.addr, "/v1/completions", &json!({"prompt": prompt, "max_tokens": 12}));
    let (ids, text) = direct(None, "once upon", true, Sampling::greedy(), 12);
    let whole = ask(json!("once upon")).json();
    assert_eq!(whole["object"], "text_completion");
    assert_eq!(
        (&whole["choices"][0]["text"], &whole["usage"]["completion_tokens"]),
        (&json!(text), &json!(ids.len()))
    );
    let prompt =
        graft_model::Tokenizer::load(fixture().model.path()).unwrap().encode("once upon", true).unwrap();
    assert_eq!(ask(json!(prompt)).json()["choices"][0]["text"], text);
    let (_, other) = direct(None, "two", true, Sampling::greedy(), 12);
    let both = ask(json!(["once upon", "two"])).json();
    let texts: Vec<_> =
        both["choices"].as_array().unwrap().iter().map(|c| (&c["index"], &c["text"])).collect();
    assert_eq!(texts, [(&json!(0), &json!(text)), (&json!(1), &json!(other))]);
    // An empty prompt begins where a text begins; it harms nothing.
    let empty = ask(json!(""));
    assert_eq!((empty.status, &empty.json()["usage"]["prompt_tokens"]), (200, &json!(1)));
    let streamed = post(
        server.addr,
        "/completions",
        &json!({"prompt": ["once upon", "two"], "max_tokens": 12, "stream": true}),
    );
    let chunks = streamed.chunks();
    for (index, expected) in [(0, &text), (1, &other)] {
        let mine: String = chunks
            .iter()
            .map(|chunk| &chunk["choices"][0])
            .filter(|choice| choice["index"] == index)
            .filter_map(|choice| choice["text"].as_str())
            .collect();
        assert_eq!(&mine, expected);
    }
}

#[test]
fn a_long_prompt_is_read_in_chunks_as_without_a_server() {
    let long = "a long text that goes on and on, ".repeat(60);
    let (_, text) = direct(None, &long, true, Sampling::greedy(), 8);
    let whole = post(shared().addr, "/v1/completions", &json!({"prompt": long, "max_tokens": 8})).json();
    assert!(whole["usage"]["prompt_tokens"].as_u64().unwrap() > 1024);
    assert_eq!(whole["choices"][0]["text"], text);
}

#[test]
fn stop_strings_end_the_answer_across_tokens() {
    let server = shared();
    let (ids, text) = direct(None, &chat_text("stop here"), false, Sampling::greedy(), 40);
    assert!(ids.len() > 8, "the answer is long enough to be cut: {text:?}");
    let chars: Vec<(usize, char)> = text.char_indices().collect();
    // Three characters from the middle: no token of the tiny vocabulary is as long.
    let at = chars.len() / 2;
    let stop: String = chars[at..at + 3].iter().map(|(_, c)| c).collect();
    let expected = &text[..text.find(&stop).unwrap()];
    for stops in [json!(stop), json!(["never there", stop])] {
        let body = with(chat("stop here"), json!({"stop": stops, "max_tokens": 40}));
        let whole = post(server.addr, "/v1/chat/completions", &body).json();
        let choice = &whole["choices"][0];
        assert_eq!(
            (&choice["message"]["content"], &choice["finish_reason"]),
            (&json!(expected), &json!("stop"))
        );
        let chunks = post(server.addr, "/v1/chat/completions", &with(body, json!({"stream": true}))).chunks();
        assert_eq!(streamed_text(&chunks), expected);
    }
    // What was held back as a possible beginning belongs to the answer when it ends otherwise.
    let last = chars.last().unwrap().1;
    let body = with(chat("stop here"), json!({"stop": format!("{last}and more"), "max_tokens": 40}));
    assert_eq!(
        post(server.addr, "/v1/chat/completions", &body).json()["choices"][0]["message"]["content"],
        text
    );
}

#[test]
fn a_character_is_never_split() {
    let server = shared();
    let tokenizer = graft_model::Tokenizer::load(fixture().model.path()).unwrap();
    let ids = tokenizer.encode("가", false).unwrap();
    assert!(ids.len() >= 2, "the tiny vocabulary spells it in bytes");
    // The penalty forbids the last tokens again, so the bytes come in the order of their bias, over and over.
    let bias: serde_json::Map<_, _> =
        ids.iter().enumerate().map(|(i, id)| (id.to_string(), json!(100 - 12 * i as i32))).collect();
    let body = json!({
        "prompt": "x", "max_tokens": ids.len() * 5, "logit_bias": bias, "stream": true,
        "repetition_penalty": 10.0, "repetition_context_size": ids.len() - 1,
    });
    let chunks = post(server.addr, "/v1/completions", &body).chunks();
    assert_eq!(streamed_text(&chunks), "가".repeat(5));
    let pieces: Vec<_> =
        chunks.iter().filter_map(|c| c["choices"][0]["text"].as_str()).filter(|t| !t.is_empty()).collect();
    assert_eq!(pieces, ["가"; 5]);
}

#[test]
fn seeds_repeat_and_log_probabilities_add_up() {
    let server = shared();
    let body = with(
        chat("roll"),
        json!({"temperature": 1.0, "top_p": 0.95, "top_k": 40, "min_p": 0.01, "seed": 7,
        "logprobs": true, "top_logprobs": 3}),
    );
    let ask = |body: &Value| post(server.addr, "/v1/chat/completions", body).json();
    let first = ask(&body);
    assert_eq!(first["choices"], ask(&body)["choices"]);
    assert_ne!(first["choices"], ask(&with(body.clone(), json!({"seed": 8})))["choices"]);
    let choice = &first["choices"][0];
    let content = choice["logprobs"]["content"].as_array().unwrap();
    let bytes: Vec<u8> = content
        .iter()
        .flat_map(|t| t["bytes"].as_array().unwrap())
        .map(|b| b.as_u64().unwrap() as u8)
        .collect();
    assert_eq!(String::from_utf8_lossy(&bytes), choice["message"]["content"].as_str().unwrap());
    for token in content {
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        let best = top[0]["logprob"].as_f64().unwrap();
        assert!(best <= 0.0 && token["logprob"].as_f64().unwrap() <= best);
    }
    let streamed = post(server.addr, "/v1/chat/completions", &with(body, json!({"stream": true}))).chunks();
    let tokens: Vec<Value> = streamed
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array())
        .flatten()
        .cloned()
        .collect();
    assert_eq!(&tokens, content);
    let plain = json!({"prompt": "a", "max_tokens": 4, "logprobs": 2});
    let plain = post(server.addr, "/v1/completions", &plain).json();
    assert_eq!(plain["choices"][0]["logprobs"]["tokens"].as_array().unwrap().len(), 4);
    assert_eq!(plain["choices"][0]["logprobs"]["text_offset"][0], 0);
}

#[test]
fn messages_may_be_parts_and_hold_tool_calls() {
    let server = shared();
    let plain = post(server.addr, "/v1/chat/completions", &chat("hello there")).json();
    let parts = json!({
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]}],
        "max_completion_tokens": 24, "max_tokens": 1, "user": "me", "n": 1, "response_format": {"type": "text"},
        "stop": null, "temperature": null, "tool_choice": "none", "tools": [{"type": "function", "function": {"name": "f"}}], "unheard_of": [1],
    });
    let parts = post(server.addr, "/v1/chat/completions", &parts).json();
    assert_eq!(parts["choices"], plain["choices"]);
    let calls = json!({"max_tokens": 1, "messages": [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"서울\"}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "sun"},
    ]});
    assert_eq!(post(server.addr, "/v1/chat/completions", &calls).status, 200);
}

#[test]
fn a_connection_serves_one_request_after_another() {
    let mut client = Client::new(shared().addr);
    let body = with(chat("hello there"), json!({"stream": true})).to_string();
    client.send("POST", "/v1/chat/completions", &[JSON, ("X-Request-Id", "abc-1")], Some(body.as_bytes()));
    let first = client.receive(false);
    assert_eq!((first.status, first.header("x-request-id")), (200, Some("abc-1")));
    client.send("HEAD", "/v1/models", &[("X-Request-Id", "not one; really")], None);
    let second = client.receive(true);
    assert_eq!(second.status, 200);
    assert!(second.header("x-request-id").unwrap().starts_with("req-"));
    client.send("GET", "/health", &[], None);
    assert_eq!(client.receive(false).status, 200);
}
