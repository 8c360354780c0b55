//! Answers that have to look like something: JSON of a schema, calls of tools, thoughts apart, several at once.

use std::sync::OnceLock;

use graft_testkit::CHAT_STYLES;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::client::{post, streamed_text};
use crate::server::{Server, shared, start};

const CHAT: &str = "/v1/chat/completions";

fn style(name: &str) -> TempDir {
    CHAT_STYLES.iter().find(|style| style.name == name).unwrap().model()
}

/// A server on a tiny model that writes conversations in this style.
fn server_of(name: &str, template: Option<&str>) -> (TempDir, Server) {
    let dir = style(name);
    let server = start(|engine, _| {
        engine.model_dir = dir.path().to_path_buf();
        engine.adapters.clear();
        engine.chat_template = template.map(str::to_owned);
    });
    (dir, server)
}

fn qwen() -> &'static Server {
    static SERVER: OnceLock<(TempDir, Server)> = OnceLock::new();
    &SERVER.get_or_init(|| server_of("qwen 3", None)).1
}

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "city": {"enum": ["서울", "Paris"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "rain": {"type": "boolean"},
            "place": {"$ref": "#/$defs/place"},
        },
        "$defs": {"place": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 2}},
        "required": ["city", "days", "rain", "place"],
        "additionalProperties": false,
    })
}

fn follows_schema(value: &Value) {
    let keys: Vec<&String> = value.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["city", "days", "rain", "place"], "{value}");
    assert!(value["city"] == "서울" || value["city"] == "Paris", "{value}");
    assert!((1..=9).contains(&value["days"].as_i64().unwrap()) && value["rain"].is_boolean(), "{value}");
    assert_eq!(value["place"].as_array().unwrap().len(), 2);
}

fn tool(name: &str) -> Value {
    json!({"type": "function", "function": {"name": name, "description": "d", "parameters": schema()}})
}

fn asked(fields: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "weather?"}], "max_tokens": 300});
    let Value::Object(fields) = fields else { panic!("fields are an object, not {fields}") };
    body.as_object_mut().unwrap().extend(fields);
    body
}

#[test]
fn an_answer_follows_its_schema_streamed_or_not_and_whatever_the_sampling() {
    let format =
        json!({"type": "json_schema", "json_schema": {"name": "w", "strict": true, "schema": schema()}});
    for extra in [
        json!({}),
        json!({"temperature": 1.0, "seed": 3, "logprobs": true, "top_logprobs": 5}),
        json!({"temperature": 2.0, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "seed": 4}),
        json!({"temperature": 1.0, "xtc_probability": 1.0, "seed": 5, "repetition_penalty": 2.0}),
    ] {
        let mut body = asked(extra);
        body["response_format"] = format.clone();
        let reply = post(shared().addr, CHAT, &body);
        assert_eq!(reply.status, 200, "{}", reply.text());
        let whole = reply.json();
        let choice = &whole["choices"][0];
        let text = choice["message"]["content"].as_str().unwrap();
        follows_schema(&serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}")));
        assert_eq!(choice["finish_reason"], "stop");
        for token in choice["logprobs"]["content"].as_array().into_iter().flatten() {
            let top = token["top_logprobs"].as_array().unwrap();
            assert!(!top.is_empty() && top.iter().all(|t| t["logprob"].is_number()), "{token}");
        }
        body["stream"] = true.into();
        assert_eq!(streamed_text(&post(shared().addr, CHAT, &body).chunks()), text);
    }
    let inner = json!({"type": "json_object", "schema": {"const": "42"}});
    let other = post(shared().addr, CHAT, &asked(json!({"response_format": inner}))).json();
    assert_eq!(other["choices"][0]["message"]["content"], "\"42\"");
    let body = json!({"prompt": "x", "max_tokens": 300, "response_format": format});
    let text = post(shared().addr, "/v1/completions", &body).json()["choices"][0]["text"].clone();
    follows_schema(&serde_json::from_str(text.as_str().unwrap()).unwrap());
}

#[test]
fn any_object_will_do_and_one_that_is_cut_says_so() {
    let body = asked(json!({"response_format": {"type": "json_object"}, "temperature": 1.0, "seed": 1}));
    for seed in 0..8 {
        let mut body = body.clone();
        (body["seed"], body["max_tokens"]) = (seed.into(), 60.into());
        let choice = post(shared().addr, CHAT, &body).json()["choices"][0].clone();
        let text = choice["message"]["content"].as_str().unwrap();
        assert!(text.trim_start().starts_with('{'), "{text:?}");
        if choice["finish_reason"] == "stop" {
            assert!(serde_json::from_str::<Value>(text).unwrap().is_object(), "{text}");
        } else {
            assert_eq!(choice["finish_reason"], "length");
        }
    }
    // A neighbour with a schema changes nothing for one without.
    let plain = asked(json!({"max_tokens": 40}));
    let alone = post(shared().addr, CHAT, &plain).json()["choices"].clone();
    std::thread::scope(|scope| {
        let shaped = scope.spawn(|| post(shared().addr, CHAT, &body).status);
        assert_eq!(post(shared().addr, CHAT, &plain).json()["choices"], alone);
        assert_eq!(shaped.join().unwrap(), 200);
    });
}

#[test]
fn schemas_that_cannot_be_followed_are_refused() {
    for schema in [
        json!({"type": "nothing"}),
        json!({"$ref": "http://elsewhere.example/schema"}),
        json!({"$ref": "#/$defs/none"}),
        json!({"type": "string", "pattern": "("}),
        json!({"type": "object", "if": {}, "then": {}}),
        json!({"allOf": [{"type": "string"}, {"type": "integer"}]}),
    ] {
        let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
        let reply = post(shared().addr, CHAT, &asked(json!({"response_format": format})));
        assert_eq!(
            (reply.status, &reply.json()["error"]["param"]),
            (400, &json!("response_format")),
            "{schema}"
        );
    }
}

#[test]
fn a_forced_call_is_written_as_the_family_writes_it_and_read_again() {
    for name in ["llama 3", "mistral", "qwen 2", "qwen 3"] {
        let (_dir, server) = server_of(name, None);
        for (choice, allowed) in [
            (json!("required"), &["look", "ask.me-2"][..]),
            (json!({"type": "function", "function": {"name": "look"}}), &["look"]),
        ] {
            let body = asked(json!({
                "tools": [tool("look"), tool("ask.me-2")], "tool_choice": choice, "parallel_tool_calls": false,
                "temperature": 1.0, "seed": 3, "stop": ["\u{1}"],
            }));
            let reply = post(server.addr, CHAT, &body);
            assert_eq!(reply.status, 200, "{name}: {}", reply.text());
            let choice = reply.json()["choices"][0].clone();
            assert_eq!(choice["finish_reason"], "tool_calls", "{name}: {choice}");
            assert_eq!(choice["message"]["content"], Value::Null, "{name}: {choice}");
            let calls = choice["message"]["tool_calls"].as_array().unwrap();
            assert_eq!(calls.len(), 1);
            let function = &calls[0]["function"];
            assert!(allowed.contains(&function["name"].as_str().unwrap()), "{name}: {function}");
            follows_schema(&serde_json::from_str(function["arguments"].as_str().unwrap()).unwrap());
            let id = calls[0]["id"].as_str().unwrap();
            assert!(
                name != "mistral" || (id.len() == 9 && id.chars().all(|c| c.is_ascii_alphanumeric())),
                "{id}"
            );

            let mut streamed = body.clone();
            streamed["stream"] = true.into();
            let chunks = post(server.addr, CHAT, &streamed).chunks();
            let deltas: Vec<Value> = chunks
                .iter()
                .filter_map(|chunk| chunk["choices"][0]["delta"]["tool_calls"].get(0).cloned())
                .collect();
            assert_eq!(
                (&deltas[0]["function"]["name"], &deltas[0]["type"]),
                (&function["name"], &json!("function"))
            );
            assert!(deltas[0]["id"].is_string() && deltas[1..].iter().all(|d| d.get("id").is_none()));
            assert!(deltas.iter().all(|delta| delta["index"] == 0));
            let arguments: String =
                deltas.iter().filter_map(|delta| delta["function"]["arguments"].as_str()).collect();
            assert_eq!(&json!(arguments), &function["arguments"]);
            assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
            assert_eq!(streamed_text(&chunks), "");

            // The call and its result go back to the model.
            let mut again = body.clone();
            again["messages"] = json!([
                {"role": "user", "content": "weather?"}, choice["message"],
                {"role": "tool", "tool_call_id": id, "content": "sun"},
            ]);
            again["tool_choice"] = "auto".into();
            again["max_tokens"] = 3.into();
            let reply = post(server.addr, CHAT, &again);
            assert_eq!(reply.status, 200, "{name}: {}", reply.text());
        }
    }
}

#[test]
fn a_call_may_stand_in_for_an_answer_of_a_schema() {
    let format = json!({"type": "json_schema", "json_schema": {"name": "w", "schema": schema()}});
    let body = asked(json!({"tools": [tool("look")], "response_format": format, "temperature": 1.0}));
    for seed in 0..6 {
        let mut body = body.clone();
        body["seed"] = seed.into();
        let reply = post(qwen().addr, CHAT, &body).json();
        let message = &reply["choices"][0]["message"];
        assert!(
            reply["choices"][0]["finish_reason"] != "length" || message["reasoning_content"].is_string(),
            "{reply}"
        );
        if let Some(text) = message["content"].as_str().filter(|text| !text.is_empty()) {
            follows_schema(&serde_json::from_str(text).unwrap());
        }
    }
}

#[test]
fn thoughts_stand_apart_from_the_answer() {
    let template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}\
                    {{ '<|im_start|>assistant\n<think>\n' }}";
    let (dir, server) = server_of("qwen 3", Some(template));
    let tokenizer = graft_model::Tokenizer::load(dir.path()).unwrap();
    let plain = asked(json!({"max_tokens": 12, "ignore_eos": true}));
    let message = post(server.addr, CHAT, &plain).json()["choices"][0]["message"].clone();
    let thought = message["reasoning_content"].as_str().unwrap();
    assert!(!thought.is_empty() && message["content"] == "", "{message}");
    let mut streamed = plain.clone();
    streamed["stream"] = true.into();
    let chunks = post(server.addr, CHAT, &streamed).chunks();
    let said: String = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["reasoning_content"].as_str())
        .collect();
    assert_eq!((said.as_str(), streamed_text(&chunks).as_str()), (thought, ""));

    // A schema binds what comes after the thought.
    let close = tokenizer.token_to_id("</think>").unwrap().to_string();
    let format = json!({"type": "json_schema", "json_schema": {"name": "w", "schema": schema()}});
    let body = asked(json!({"response_format": format, "logit_bias": {close: 100}}));
    let message = post(server.addr, CHAT, &body).json()["choices"][0]["message"].clone();
    follows_schema(&serde_json::from_str(message["content"].as_str().unwrap()).unwrap());
}

#[test]
fn several_answers_are_those_of_their_seeds() {
    let sampled = json!({"max_tokens": 12, "temperature": 1.0, "seed": 40});
    let with = |fields: Value| {
        let mut body = asked(sampled.clone());
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        body
    };
    let three = post(shared().addr, CHAT, &with(json!({"n": 3}))).json();
    let mut completion = 0;
    for (index, choice) in three["choices"].as_array().unwrap().iter().enumerate() {
        let one = post(shared().addr, CHAT, &with(json!({"seed": 40 + index}))).json();
        assert_eq!((&choice["index"], &choice["message"]), (&json!(index), &one["choices"][0]["message"]));
        assert_eq!(three["usage"]["prompt_tokens"], one["usage"]["prompt_tokens"], "a prompt counts once");
        completion += one["usage"]["completion_tokens"].as_u64().unwrap();
    }
    assert_eq!(three["usage"]["completion_tokens"], completion);
    let chunks = post(shared().addr, CHAT, &with(json!({"n": 3, "stream": true}))).chunks();
    for index in 0..3 {
        let own: Vec<Value> =
            chunks.iter().filter(|chunk| chunk["choices"][0]["index"] == index).cloned().collect();
        assert_eq!(streamed_text(&own), three["choices"][index]["message"]["content"].as_str().unwrap());
    }
    let both = json!({"prompt": ["a", "b"], "n": 2, "max_tokens": 3, "temperature": 1.0, "seed": 1});
    let both = post(shared().addr, "/v1/completions", &both).json();
    assert_eq!(both["choices"].as_array().unwrap().len(), 4);
    assert_eq!(both["usage"]["prompt_tokens"], 2);
    let many = post(shared().addr, "/v1/completions", &json!({"prompt": vec!["a"; 60], "n": 32}));
    assert_eq!((many.status, &many.json()["error"]["param"]), (400, &json!("n")));
}

#[test]
fn an_answer_that_may_not_end_goes_on_to_its_limit() {
    for max in [1, 40] {
        let body =
            json!({"prompt": "x", "ignore_eos": true, "max_tokens": max, "temperature": 1.0, "seed": 1});
        let whole = post(shared().addr, "/v1/completions", &body).json();
        assert_eq!(
            (&whole["choices"][0]["finish_reason"], &whole["usage"]["completion_tokens"]),
            (&json!("length"), &json!(max))
        );
    }
}
