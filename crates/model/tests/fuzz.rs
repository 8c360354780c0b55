//! Chat templates come with models and messages from anywhere: whatever both hold, rendering ends, without a panic.

#![allow(clippy::unwrap_used, reason = "a panic is a test's report")]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use graft_model::ChatTemplate;
use graft_testkit::CHAT_STYLES;
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

const TEMPLATES: &str = include_str!("corpus/templates.jsonl");

fn corpus() -> Vec<String> {
    let own = TEMPLATES.lines().map(|line| serde_json::from_str(line).unwrap());
    own.chain(CHAT_STYLES.iter().map(|style| style.template.to_owned())).collect()
}

fn word() -> impl Strategy<Value = String> {
    let known = [
        "role",
        "content",
        "user",
        "assistant",
        "tool",
        "system",
        "tool_calls",
        "function",
        "name",
        "arguments",
        "</think>",
        "",
    ];
    prop_oneof![2 => proptest::sample::select(known.map(String::from).to_vec()), 1 => any::<String>()]
}

fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(|n| json!(n)),
        word().prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            vec((word(), inner), 0..4).prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

/// Messages that are nearly right.
fn message() -> impl Strategy<Value = Value> {
    let roles = ["user", "assistant", "tool", "system", "other"];
    let content = prop_oneof![3 => any::<String>().prop_map(Value::from), 1 => json_value()];
    let call = (word(), json_value()).prop_map(|(name, arguments)| {
        json!([{"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}])
    });
    (proptest::sample::select(roles.to_vec()), content, proptest::option::of(call)).prop_map(
        |(role, content, calls)| match calls {
            Some(calls) => json!({"role": role, "content": content, "tool_calls": calls}),
            None => json!({"role": role, "content": content}),
        },
    )
}

/// Renders; whether it can be or not, it ends.
fn render(text: &str, messages: &[Value], tools: Option<&Value>) {
    let began = Instant::now();
    let tokens =
        Map::from_iter([("bos_token".to_owned(), json!("<s>")), ("eos_token".to_owned(), json!("</s>"))]);
    let templates = [("default".to_owned(), text.to_owned())];
    if let Ok(template) = ChatTemplate::new(PathBuf::from("test"), &templates, tokens) {
        let _either = template.render(messages, tools, true, &Map::new());
    }
    assert!(began.elapsed() < Duration::from_secs(20), "{text:.200?} took {:?}", began.elapsed());
}

#[test]
fn the_corpus_ends() {
    for text in corpus() {
        render(&text, &[json!({"role": "user", "content": "axb"})], Some(&json!([{"type": "function"}])));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn no_messages_panic(
        text in proptest::sample::select(corpus().into_iter().filter(|t| !t.contains("1000000000")).collect::<Vec<_>>()),
        messages in vec(prop_oneof![4 => message(), 1 => json_value()], 0..4),
        tools in proptest::option::of(json_value()),
    ) {
        render(&text, &messages, tools.as_ref());
    }

    #[test]
    fn no_template_panics(
        parts in vec(
            prop_oneof![
                proptest::sample::select(
                    ["{{", "}}", "{%", "%}", "{%-", "-%}", "{#", "#}", " for m in messages ", " endfor ", " if ", " endif ",
                     " set x = ", "messages", "[0]", ".content", " | tojson", " | length", "'", "\"", "(", ")", "[", "]", ":",
                     " generation ", " endgeneration ", "+", " ~ ", "1", "-1", "loop.index", "namespace()", "{{ m.role }}"]
                    .map(String::from).to_vec()
                ),
                any::<String>(),
            ],
            0..14,
        ),
    ) {
        render(&parts.concat(), &[json!({"role": "user", "content": "a"})], None);
    }
}
