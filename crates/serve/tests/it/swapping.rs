//! Adapters that are replaced, or fail to load, while many requests run.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::{Client, JSON, get, post, streamed_text};
use crate::lifecycle::{admin, ask, load, publish, put, solo, text, with_root};
use crate::server::{Server, fixture, start};

const STREAMS: usize = 200;
const SWAPS: usize = 50;
const PROMPTS: [&str; 3] = ["hello", "once upon a time", "a somewhat longer question than the others"];

/// The server's figures once nothing runs.
fn settled(server: &Server) -> Value {
    let began = Instant::now();
    loop {
        let stats = get(server.addr, "/v1/stats").json();
        let held = ["/sequences/running", "/sequences/waiting", "/adapters/leases", "/kv_bytes/reserved"];
        if held.iter().all(|field| stats.pointer(field) == Some(&json!(0))) {
            return stats;
        }
        assert!(began.elapsed() < Duration::from_secs(5), "something is held: {stats}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn streams_while_an_adapter_is_replaced_are_each_of_one_version() {
    let (server, root) = with_root(|_| {});
    let addr = server.addr;
    let mut expected = BTreeMap::new();
    for (version, dora) in [false, true, false].into_iter().enumerate() {
        let name = format!("v{version}");
        publish(root.path(), &name, dora, 80 + version as u64);
        let generation =
            load(addr, &name, &name, false).json()["adapter_generation"].as_str().unwrap().to_owned();
        for prompt in PROMPTS {
            expected.insert((generation.clone(), prompt), solo(Some(&root.path().join(&name)), prompt));
        }
        assert_eq!(admin(addr, "/v1/unload_lora_adapter", &json!({"lora_name": name})).status, 200);
    }
    put(root.path(), "a", &root.path().join("v0"));
    assert_eq!(load(addr, "a", "a", false).status, 200);
    let before = settled(&server);
    let (asked, swapping) = (AtomicUsize::new(0), AtomicBool::new(true));
    let answers: Vec<(String, &str, String)> = std::thread::scope(|scope| {
        let client = || {
            let mut answers = Vec::new();
            loop {
                let n = asked.fetch_add(1, Ordering::Relaxed);
                if n >= STREAMS && !swapping.load(Ordering::Relaxed) {
                    return answers;
                }
                let prompt = PROMPTS[n % PROMPTS.len()];
                let body = json!({"model": "a", "prompt": prompt, "max_tokens": 12, "stream": true});
                let reply = post(addr, "/v1/completions", &body);
                assert_eq!(reply.status, 200, "{}", reply.text());
                let chunks = reply.chunks();
                let generation = chunks[0]["adapter_generation"].as_str().unwrap().to_owned();
                assert!(chunks.iter().all(|chunk| chunk["adapter_generation"] == generation.as_str()));
                answers.push((generation, prompt, streamed_text(&chunks)));
            }
        };
        let clients: Vec<_> = (0..8).map(|_| scope.spawn(client)).collect();
        for swap in 1..=SWAPS {
            put(root.path(), "a", &root.path().join(format!("v{}", swap % 3)));
            let reply = load(addr, "a", "a", true);
            assert_eq!(reply.status, 200, "{}", reply.text());
            std::thread::sleep(Duration::from_millis(4));
        }
        swapping.store(false, Ordering::Relaxed);
        clients.into_iter().flat_map(|client| client.join().unwrap()).collect()
    });
    assert!(answers.len() >= STREAMS);
    for (generation, prompt, text) in &answers {
        assert_eq!(Some(text), expected.get(&(generation.clone(), *prompt)), "{generation} {prompt}");
    }
    let mut seen: Vec<&String> = answers.iter().map(|answer| &answer.0).collect();
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 3, "all versions have answered");
    let after = settled(&server);
    let kept =
        |stats: &Value| (stats["adapters"]["generations"].clone(), stats["adapters"]["retired"].clone());
    assert_eq!((kept(&after), kept(&before)), ((json!(1), json!(0)), (json!(1), json!(0))));
    assert_eq!(after["passes"]["failures"], 0);
}

#[test]
fn a_thousand_loads_of_what_is_no_adapter_harm_nobody() {
    let (server, root) = with_root(|policy| policy.max_rank = 4);
    let addr = server.addr;
    publish(root.path(), "good", false, 91);
    assert_eq!(load(addr, "good", "good", false).status, 200);
    let expected = text(&ask(addr, "good", "hello"));
    let f = fixture();
    for (name, change) in [("cut", "tensors"), ("nan", "nan"), ("typo", "config"), ("full", "full")] {
        put(root.path(), name, f.lora.path());
        let (tensors, config) = (
            root.path().join(name).join("adapters.safetensors"),
            root.path().join(name).join("adapter_config.json"),
        );
        let mut bytes = std::fs::read(&tensors).unwrap();
        match change {
            "tensors" => bytes.truncate(bytes.len() / 2),
            "nan" => {
                let end = bytes.len();
                bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
            }
            _ => {
                let text = std::fs::read_to_string(&config).unwrap();
                let (from, to) = if change == "full" { ("\"lora\"", "\"full\"") } else { ("rank", "rnak") };
                std::fs::write(&config, text.replace(from, to)).unwrap();
            }
        }
        std::fs::write(&tensors, bytes).unwrap();
    }
    let before = settled(&server);
    let running = AtomicBool::new(true);
    std::thread::scope(|scope| {
        let client = || {
            let mut answers = 0;
            while running.load(Ordering::Relaxed) {
                assert_eq!(text(&ask(addr, "good", "hello")), expected);
                answers += 1;
            }
            answers
        };
        let clients: Vec<_> = (0..3).map(|_| scope.spawn(client)).collect();
        for n in 0..1000 {
            let path = ["cut", "nan", "typo", "full", "nothing", "../good", "wide"][n % 7];
            let reply = load(addr, ["good", "new"][n % 2], path, true);
            assert!([403, 404, 422].contains(&reply.status), "{path} {} {}", reply.status, reply.text());
        }
        running.store(false, Ordering::Relaxed);
        assert!(clients.into_iter().map(|client| client.join().unwrap()).sum::<u32>() > 0);
    });
    let after = settled(&server);
    assert_eq!(after["adapters"], before["adapters"]);
    assert_eq!(after["passes"]["failures"], 0);
}

#[test]
fn a_client_that_leaves_in_the_queue_while_its_prompt_is_read_or_while_it_is_answered_holds_nothing() {
    let server = start(|engine, _| engine.max_concurrent = 1);
    let begin = |prompt: String, max_tokens: usize| {
        let mut client = Client::new(server.addr);
        let tokenizer = graft_model::Tokenizer::load(fixture().model.path()).unwrap();
        let bias: serde_json::Map<_, _> =
            tokenizer.eos_ids().iter().map(|id| (id.to_string(), json!(-100))).collect();
        let body = json!({
            "model": "lora", "prompt": prompt, "max_tokens": max_tokens, "logit_bias": bias, "stream": true,
        });
        client.send("POST", "/v1/completions", &[JSON], Some(body.to_string().as_bytes()));
        client
    };
    for (prompt, chunks) in [("x".to_owned(), 3), ("a long text that goes on and on, ".repeat(600), 0)] {
        let mut first = begin(prompt, 20_000);
        if chunks > 0 {
            assert_eq!(first.head().0, 200);
            (0..chunks).for_each(|_| assert!(first.chunk().is_some()));
        }
        let queued = begin("y".into(), 20_000);
        std::thread::sleep(Duration::from_millis(30));
        let stats = get(server.addr, "/v1/stats").json();
        assert!(stats["adapters"]["leases"].as_u64().unwrap() >= 1, "{stats}");
        drop(queued);
        drop(first);
        settled(&server);
        let began = Instant::now();
        assert_eq!(
            post(server.addr, "/v1/completions", &json!({"prompt": "x", "max_tokens": 1})).status,
            200
        );
        assert!(began.elapsed() < Duration::from_secs(2));
    }
}
