//! How servers begin and end, and clients that leave.

use std::sync::Arc;
use std::time::{Duration, Instant};

use graft_model::Sampling;
use graft_serve::{Engine, Error, Event, Job, Params, serve_blocking};
use serde_json::{Value, json};

use crate::client::{Client, JSON, get, post};
use crate::server::{configs, fixture, start};

/// An answer that takes far longer than any test.
fn endless(stream: bool) -> Value {
    let tokenizer = graft_model::Tokenizer::load(fixture().model.path()).unwrap();
    let bias: serde_json::Map<_, _> =
        tokenizer.eos_ids().iter().map(|id| (id.to_string(), json!(-100))).collect();
    json!({"prompt": "x", "max_tokens": 40_000, "logit_bias": bias, "stream": stream})
}

/// Starts an endless answer and reads the beginning of it.
fn begin(client: &mut Client) {
    client.send("POST", "/v1/completions", &[JSON], Some(endless(true).to_string().as_bytes()));
    assert_eq!(client.head().0, 200);
    for _ in 0..3 {
        assert!(client.chunk().is_some());
    }
}

#[test]
fn a_full_queue_says_so_and_a_client_that_leaves_makes_room() {
    let server = start(|engine, _| (engine.max_concurrent, engine.max_queue) = (1, 0));
    let short = json!({"prompt": "x", "max_tokens": 2});
    for stream in [true, false] {
        // Nothing says when an answer that is not streamed has begun, so it is given longer and longer.
        let mut patience = Duration::from_millis(50);
        let (client, reply) = loop {
            let mut client = Client::new(server.addr);
            if stream {
                begin(&mut client);
            } else {
                client.send("POST", "/v1/completions", &[JSON], Some(endless(false).to_string().as_bytes()));
                std::thread::sleep(patience);
            }
            let reply = post(server.addr, "/v1/completions", &short);
            if reply.status == 429 || stream || patience > Duration::from_secs(4) {
                break (client, reply);
            }
            patience *= 2;
        };
        assert_eq!((reply.status, reply.header("retry-after")), (429, Some("1")));
        assert_eq!(reply.json()["error"]["code"], "queue_full");
        assert_eq!(get(server.addr, "/health").status, 200);
        drop(client);
        let left = Instant::now();
        while post(server.addr, "/v1/completions", &short).status == 429 {
            assert!(left.elapsed() < Duration::from_secs(2), "the slot is not freed, stream: {stream}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    let requests = server.requests();
    assert!(requests.iter().filter(|r| r.canceled).count() >= 2, "{requests:?}");
    assert!(requests.iter().any(|r| r.canceled && r.status == 499));
    assert!(requests.iter().any(|r| r.status == 429 && r.error.is_some()));
}

#[test]
fn tokens_of_a_client_that_left_are_counted_and_versions_are_logged() {
    let server = start(|engine, _| (engine.max_concurrent, engine.max_queue) = (1, 4));
    let card = get(server.addr, "/v1/models/lora").json();
    let mut body = endless(true);
    body["model"] = "lora".into();
    let mut client = Client::new(server.addr);
    client.send("POST", "/v1/completions", &[JSON], Some(body.to_string().as_bytes()));
    assert_eq!(client.head().0, 200);
    for _ in 0..5 {
        assert!(client.chunk().is_some());
    }
    // One that waits has taken nothing.
    let mut other = Client::new(server.addr);
    other.send("POST", "/v1/completions", &[JSON], Some(endless(true).to_string().as_bytes()));
    let stats = || get(server.addr, "/v1/stats").json();
    while stats()["sequences"]["waiting"] != 1 {
        std::thread::sleep(Duration::from_millis(5));
    }
    drop((client, other));
    let left = Instant::now();
    while stats()["sequences"]["canceled"] != 2 {
        assert!(left.elapsed() < Duration::from_secs(5), "{}", stats());
        std::thread::sleep(Duration::from_millis(5));
    }
    let logged = server.requests();
    let find = |model: &str| {
        logged
            .iter()
            .find(|r| r.canceled && r.model.as_deref() == Some(model))
            .unwrap_or_else(|| panic!("{logged:?}"))
    };
    let (ran, waited) = (find("lora"), find("org/tiny"));
    assert_eq!(ran.generation.as_deref(), card["adapter_generation"].as_str());
    assert!(ran.usage.prompt > 0 && ran.usage.completion >= 4, "{ran:?}");
    assert_eq!((waited.usage, &waited.generation), (graft_serve::Usage::ZERO, &None));
    let made = stats()["tokens"]["canceled"].as_u64().unwrap() as usize;
    // The pass that runs when the client is seen to leave may end after that.
    assert!((ran.usage.completion..=ran.usage.completion + 2).contains(&made), "{made} {ran:?}");
    let metrics = get(server.addr, "/metrics").text();
    for line in [
        format!("vllm:generation_tokens_total{{model_name=\"lora\"}} {}", ran.usage.completion),
        format!("vllm:prompt_tokens_total{{model_name=\"lora\"}} {}", ran.usage.prompt),
        format!("graft_canceled_tokens {made}"),
        "graft_sequences_canceled 2".to_owned(),
    ] {
        assert!(metrics.lines().any(|own| own == line), "{line} in\n{metrics}");
    }
    assert!(
        !metrics.contains("vllm:e2e_request_latency_seconds_count{model_name=\"lora\"}"),
        "it was not answered"
    );
}

#[test]
fn waiting_requests_run_in_turn_and_those_whose_client_left_do_not() {
    let server = start(|engine, _| (engine.max_concurrent, engine.max_queue) = (1, 8));
    let mut first = Client::new(server.addr);
    begin(&mut first);
    let mut gone = Client::new(server.addr);
    gone.send("POST", "/v1/completions", &[JSON], Some(endless(true).to_string().as_bytes()));
    let waiting = std::thread::spawn({
        let addr = server.addr;
        move || post(addr, "/v1/completions", &json!({"prompt": "x", "max_tokens": 2})).status
    });
    std::thread::sleep(Duration::from_millis(100));
    drop(gone);
    drop(first);
    assert_eq!(waiting.join().unwrap(), 200);
}

#[test]
fn a_silent_stream_is_kept_alive() {
    let server = start(|engine, serve| {
        engine.max_concurrent = 1;
        serve.ping_interval = Duration::from_millis(50);
    });
    let mut first = Client::new(server.addr);
    begin(&mut first);
    let mut second = Client::new(server.addr);
    let body = json!({"prompt": "x", "max_tokens": 2, "stream": true}).to_string();
    second.send("POST", "/v1/completions", &[JSON], Some(body.as_bytes()));
    assert_eq!(second.head().0, 200);
    assert_eq!(second.chunk().as_deref(), Some(&b": ping\n\n"[..]));
    drop(first);
    let mut text = Vec::new();
    while let Some(chunk) = second.chunk() {
        text.extend(chunk);
    }
    assert!(text.ends_with(b"data: [DONE]\n\n"));
}

#[test]
fn shutdown_ends_what_does_not_finish_in_time_with_a_word() {
    let mut server = start(|_, serve| serve.drain_timeout = Duration::from_millis(300));
    let mut client = Client::new(server.addr);
    begin(&mut client);
    let mut idle = Client::new(server.addr);
    idle.send("GET", "/health", &[], None);
    assert_eq!(idle.receive(false).status, 200);
    let began = Instant::now();
    server.stop();
    let mut text = Vec::new();
    while let Some(chunk) = client.chunk() {
        text.extend(chunk);
    }
    let text = String::from_utf8(text).unwrap();
    let (_, end) = text.split_at(text.find("data: {\"error\"").expect("an error in the stream"));
    assert!(end.contains("\"code\":\"draining\"") && end.ends_with("data: [DONE]\n\n"), "{end}");
    server.wait();
    assert!(began.elapsed() < Duration::from_secs(5));
    assert!(std::net::TcpStream::connect(server.addr).is_err());
}

#[test]
fn shutdown_lets_running_answers_finish() {
    let mut server = start(|_, _| {});
    let mut client = Client::new(server.addr);
    let mut body = endless(true);
    body["max_tokens"] = json!(300);
    client.send("POST", "/v1/completions", &[JSON], Some(body.to_string().as_bytes()));
    assert_eq!(client.head().0, 200);
    server.stop();
    let mut text = Vec::new();
    while let Some(chunk) = client.chunk() {
        text.extend(chunk);
    }
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("\"finish_reason\":\"length\"") && text.ends_with("data: [DONE]\n\n"));
    server.wait();
}

#[test]
fn what_cannot_start_says_why() {
    let server = start(|_, _| {});
    let (mut engine, mut serve, _logs) = configs();
    engine.adapters.truncate(1);
    serve.addr = server.addr;
    let error = serve_blocking(serve.clone(), Engine::start(engine.clone()).unwrap(), |_| {}, async {});
    let error = error.unwrap_err();
    assert!(matches!(error, Error::PortInUse { .. }), "{error}");
    assert!(error.to_string().contains("in use"));
    serve.addr = "127.0.0.1:0".parse().unwrap();
    serve.model_id = "lora".into();
    let error = serve_blocking(serve, Engine::start(engine.clone()).unwrap(), |_| {}, async {}).unwrap_err();
    assert!(matches!(error, Error::Name { .. }), "{error}");

    let empty = tempfile::tempdir().unwrap();
    engine.adapters[0].1 = empty.path().to_path_buf();
    let error = Engine::start(engine.clone()).unwrap_err();
    assert!(matches!(&error, Error::Adapter { name, .. } if name == "lora"), "{error}");
    engine.adapters.clear();
    engine.model_dir = empty.path().to_path_buf();
    let error = Engine::start(engine).unwrap_err();
    assert!(matches!(error, Error::Model(_)), "{error}");
}

#[test]
fn the_adapter_the_server_was_started_with_is_the_default() {
    let server = start(|_, serve| serve.default_adapter = Some("lora".into()));
    let ask = |model: Option<&str>| {
        let reply = post(server.addr, "/v1/completions", &json!({"prompt": "hello there", "model": model}));
        let json = reply.json();
        (json["choices"][0]["text"].clone(), json["model"].clone())
    };
    let (lora, name) = ask(None);
    assert_eq!(name, "lora");
    assert_eq!(ask(Some("default_model")), (lora.clone(), json!("default_model")));
    assert_eq!(ask(Some("lora")).0, lora);
    assert_ne!(ask(Some("org/tiny")).0, lora);
}

#[test]
fn a_reader_that_is_stuck_holds_nobody_up_and_is_ended() {
    let (mut engine, _, _logs) = configs();
    (engine.max_concurrent, engine.max_queue) = (2, 0);
    engine.stall_timeout = Duration::from_secs(1);
    let engine = Engine::start(engine).unwrap();
    let job = |events, max_tokens| Job {
        prompt: vec![1, 2, 3],
        params: Params { max_tokens, sampling: Sampling::greedy(), stop: Vec::new(), stop_ids: [].into() },
        guide: None,
        adapter: None,
        index: 0,
        events,
        tally: Arc::default(),
        permit: engine.admit(1).unwrap().remove(0),
    };
    let (sender, mut stuck) = tokio::sync::mpsc::channel(1);
    engine.submit(job(sender, 1000)).unwrap();
    let (sender, mut events) = tokio::sync::mpsc::channel(64);
    let began = Instant::now();
    engine.submit(job(sender, 20)).unwrap();
    assert_eq!(engine.admit(1).unwrap_err().status, 429);
    let mut last = None;
    while let Some((_, event)) = events.blocking_recv() {
        last = Some(event);
    }
    assert!(matches!(last, Some(Event::Done { .. })), "{last:?}");
    assert!(began.elapsed() < Duration::from_secs(1), "nobody waits for a stuck reader");
    while engine.occupied() > 0 {
        assert!(began.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(stuck.blocking_recv(), Some((0, Event::Accepted)));
    assert_eq!(stuck.blocking_recv(), None);
}
