//! What sequences share, and what they must not: prefixes of prompts, memory for keys and values, passes, the queue.

use std::time::{Duration, Instant};

use graft_model::Sampling;
use serde_json::{Value, json};

use crate::client::{Client, JSON, get, post};
use crate::lifecycle::{admin, ask, load, publish, solo, text, with_root};
use crate::server::{direct, fixture, start};

/// A text of some `n` tokens of the tiny vocabulary.
fn long(n: usize) -> String {
    let words = ["the quick brown fox ", "jumps over ", "the lazy dog, ", "again and again; "];
    let mut text = String::new();
    let tokenizer = graft_model::Tokenizer::load(fixture().model.path()).unwrap();
    for i in 0.. {
        if tokenizer.encode(&text, true).unwrap().len() >= n {
            break;
        }
        text += words[(i * i + i / 3) % words.len()];
    }
    text
}

fn cached(reply: &crate::client::Reply) -> u64 {
    reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

#[test]
fn a_prompt_that_begins_like_another_is_not_read_again_and_says_the_same() {
    let server = start(|_, _| {});
    let common = long(700);
    let mut hits = Vec::new();
    for tail in
        ["", "one", "and a much longer ending that goes on for more than a few tokens, so that many are left"]
    {
        let prompt = format!("{common}{tail}");
        for model in ["org/tiny", "lora", "org/dora"] {
            let f = fixture();
            let dir = match model {
                "lora" => Some(f.lora.path()),
                "org/dora" => Some(f.dora.path()),
                _ => None,
            };
            let reply = ask(server.addr, model, &prompt);
            assert_eq!(text(&reply), solo(dir, &prompt), "{model} {tail:?}");
            hits.push(cached(&reply));
        }
    }
    assert_eq!(hits[..3], [0; 3], "each adapter has prefixes of its own");
    assert!(hits[3..].iter().all(|hit| *hit >= 512), "{hits:?}");
    let again = ask(server.addr, "org/tiny", &long(700));
    assert!(cached(&again) < again.json()["usage"]["prompt_tokens"].as_u64().unwrap());
}

#[test]
fn a_version_under_an_old_name_finds_no_prefix_of_the_old_one() {
    let (server, root) = with_root(|_| {});
    let (addr, prompt) = (server.addr, long(600));
    for (seed, dora) in [(61, false), (62, false), (63, true)] {
        publish(root.path(), "a", dora, seed);
        assert_eq!(load(addr, "a", "a", true).status, 200);
        let cold = ask(addr, "a", &prompt);
        let warm = ask(addr, "a", &prompt);
        assert_eq!((cached(&cold), cached(&warm) >= 512), (0, true), "version {seed}");
        let expected = solo(Some(&root.path().join("a")), &prompt);
        assert_eq!((text(&cold), text(&warm)), (expected.clone(), expected));
    }
    // Another scale has other keys and values, too.
    let half = post(
        addr,
        "/v1/completions",
        &json!({"model": "a", "prompt": prompt, "max_tokens": 4, "adapter_scale": 0.5}),
    );
    assert_eq!(cached(&half), 0);
}

#[test]
fn eight_at_a_time_with_different_adapters_and_scales_say_what_each_says_alone() {
    let server = start(|_, _| {});
    let f = fixture();
    let halved = |name: &str, scale: &str| {
        let dir = tempfile::tempdir().unwrap();
        let from = if name == "lora" { &f.lora } else { &f.dora };
        let config = std::fs::read_to_string(from.path().join("adapter_config.json")).unwrap();
        let changed = config.replace("\"scale\": 2.0", &format!("\"scale\": {scale}"));
        assert_ne!(changed, config);
        std::fs::write(dir.path().join("adapter_config.json"), changed).unwrap();
        std::fs::copy(from.path().join("adapters.safetensors"), dir.path().join("adapters.safetensors"))
            .unwrap();
        dir
    };
    let (lora_half, dora_half, lora_more) =
        (halved("lora", "1.0"), halved("org/dora", "1.0"), halved("lora", "3.0"));
    let all = [
        ("org/tiny", 1.0, None),
        ("lora", 1.0, Some(f.lora.path())),
        ("lora", 0.5, Some(lora_half.path())),
        ("org/dora", 1.0, Some(f.dora.path())),
        ("org/dora", 0.5, Some(dora_half.path())),
        ("lora", 0.0, None),
        ("org/dora", 0.0, None),
        ("lora", 1.5, Some(lora_more.path())),
    ];
    let expected: Vec<String> = all
        .iter()
        .map(|(_, _, dir)| direct(*dir, "once upon a time", true, Sampling::greedy(), 40).1)
        .collect();
    for _ in 0..3 {
        std::thread::scope(|scope| {
            let threads: Vec<_> = all
                .iter()
                .map(|(model, scale, _)| {
                    scope.spawn(move || {
                        let body = json!({
                            "model": model, "prompt": "once upon a time", "max_tokens": 40, "adapter_scale": scale,
                        });
                        text(&post(server.addr, "/v1/completions", &body))
                    })
                })
                .collect();
            for ((thread, expected), of) in threads.into_iter().zip(&expected).zip(&all) {
                assert_eq!(&thread.join().unwrap(), expected, "{:?}", (of.0, of.1));
            }
        });
    }
    for (body, param) in [
        (json!({"prompt": "a", "adapter_scale": 0.5}), "adapter_scale"),
        (json!({"prompt": "a", "model": "lora", "adapter_scale": 17}), "adapter_scale"),
        (json!({"prompt": "a", "model": "lora", "adapter_scale": "1"}), "adapter_scale"),
        (json!({"prompt": "a", "lora": [{"id": 0, "scale": 1}]}), "lora"),
    ] {
        let reply = post(server.addr, "/v1/completions", &body);
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &json!(param)), "{body}");
    }
}

/// An answer of exactly `tokens` tokens.
fn body(model: &str, tokens: usize, stream: bool) -> Value {
    let tokenizer = graft_model::Tokenizer::load(fixture().model.path()).unwrap();
    let bias: serde_json::Map<_, _> =
        tokenizer.eos_ids().iter().map(|id| (id.to_string(), json!(-100))).collect();
    json!({"model": model, "prompt": "x", "max_tokens": tokens, "logit_bias": bias, "stream": stream})
}

#[test]
fn what_does_not_fit_into_memory_now_waits_and_what_never_will_is_refused() {
    // Keys and values of a token take 1 KiB (2 layers, 2 heads of 16 that are held as 32, twice, f32), so 2048 tokens fit;
    // MLX holds heads of 16 as they are.
    let bytes = if graft_testkit::wanted_form_is_mlx() { 1 << 20 } else { 2 << 20 };
    let server = start(|engine, _| engine.kv_memory = bytes);
    let addr = server.addr;
    let mut first = Client::new(addr);
    first.send("POST", "/v1/completions", &[JSON], Some(body("org/tiny", 1900, true).to_string().as_bytes()));
    assert_eq!(first.head().0, 200);
    assert!(first.chunk().is_some());
    let began = Instant::now();
    // It must wait for the first one's memory, though there are seven free places.
    let waited = std::thread::spawn(move || {
        let reply = post(addr, "/v1/completions", &body("org/tiny", 600, false));
        (reply.status, reply.json()["usage"]["completion_tokens"].clone(), Instant::now())
    });
    let mut last = Instant::now();
    while first.chunk().is_some() {
        last = Instant::now();
    }
    let (status, tokens, done) = waited.join().unwrap();
    assert_eq!((status, tokens), (200, json!(600)));
    assert!(done > last && last > began, "the second one ran beside the first");
    let reply = post(addr, "/v1/completions", &json!({"prompt": long(2100), "max_tokens": 1}));
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (400, &json!("context_length_exceeded")));
    // What is asked for beyond it ends there.
    let most = post(addr, "/v1/completions", &body("org/tiny", 40_000, false)).json();
    let sum = most["usage"]["total_tokens"].as_u64().unwrap();
    assert!((1900..=2048).contains(&sum), "{sum}");
}

#[test]
fn one_adapter_does_not_take_the_whole_queue() {
    let server = start(|engine, _| (engine.max_concurrent, engine.max_queue) = (1, 8));
    let hot: Vec<Client> = (0..9)
        .map(|_| {
            let mut client = Client::new(server.addr);
            let body = body("lora", 20_000, true).to_string();
            client.send("POST", "/v1/completions", &[JSON], Some(body.as_bytes()));
            std::thread::sleep(Duration::from_millis(30));
            client
        })
        .collect();
    // Seven of nine places are as many as one adapter gets; two of the requests were refused.
    let reply = ask(server.addr, "lora", "x");
    assert_eq!((reply.status, reply.header("retry-after")), (429, Some("1")));
    let addr = server.addr;
    let other = std::thread::spawn(move || ask(addr, "org/dora", "x").status);
    std::thread::sleep(Duration::from_millis(100));
    assert!(!other.is_finished(), "it waits for the one place");
    let mut hot = hot.into_iter();
    drop(hot.next());
    // Six of the hot one are before it in the queue, but its own adapter had no turn yet.
    let left = Instant::now();
    let second: Vec<Client> = hot.collect();
    while !other.is_finished() && left.elapsed() < Duration::from_secs(3) {
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(second);
    assert_eq!(other.join().unwrap(), 200);
}

#[test]
fn adapters_that_go_while_requests_for_them_come_end_in_200_or_404() {
    let (server, root) = with_root(|_| {});
    let addr = server.addr;
    publish(root.path(), "v/a", false, 71);
    let expected = solo(Some(&root.path().join("v/a")), "hello");
    std::thread::scope(|scope| {
        let askers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let replies = (0..25).map(|_| ask(addr, "a", "hello"));
                    replies.fold((0, 0), |(ok, gone), reply| match reply.status {
                        200 => {
                            assert_eq!(text(&reply), expected);
                            (ok + 1, gone)
                        }
                        404 => (ok, gone + 1),
                        other => panic!("{other} {}", reply.text()),
                    })
                })
            })
            .collect();
        while !askers.iter().all(|asker| asker.is_finished()) {
            load(addr, "a", "v/a", false);
            std::thread::sleep(Duration::from_millis(3));
            admin(addr, "/v1/unload_lora_adapter", &json!({"lora_name": "a"}));
        }
        let sums: Vec<(u32, u32)> = askers.into_iter().map(|asker| asker.join().unwrap()).collect();
        assert!(sums.iter().map(|sum| sum.0).sum::<u32>() > 0, "{sums:?}");
    });
    let list = get(addr, "/v1/lora_adapters").json();
    assert_eq!((&list["resident_bytes"], get(addr, "/health").status), (&json!(0), 200), "{list}");
}
