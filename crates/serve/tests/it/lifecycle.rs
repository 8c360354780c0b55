//! Adapters that come, change and go while the server answers: which version answers, what is refused, what is freed.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use graft_model::Sampling;
use graft_serve::AdapterPolicy;
use graft_testkit::{Family, Tiny, tiny_adapter};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::client::{Client, JSON, Reply, get, post, streamed_text};
use crate::server::{Server, direct, fixture, start};

pub(crate) const KEY: &str = "let me in";

/// Puts an adapter of that seed in the place of whatever is at `name` below `root`, as a trainer publishes: by a rename.
pub(crate) fn publish(root: &Path, name: &str, dora: bool, seed: u64) {
    let tiny = Tiny { packed: Some((4, 32)), ..Tiny::new(Family::Llama) };
    let made = tiny_adapter(fixture().model.path(), &tiny, dora, 4, seed);
    put(root, name, made.path());
}

pub(crate) fn put(root: &Path, name: &str, from: &Path) {
    let fresh = tempfile::tempdir_in(root).unwrap();
    for file in ["adapter_config.json", "adapters.safetensors"] {
        std::fs::copy(from.join(file), fresh.path().join(file)).unwrap();
    }
    let place = root.join(name);
    std::fs::create_dir_all(place.parent().unwrap()).unwrap();
    if place.exists() {
        std::fs::remove_dir_all(&place).unwrap();
    }
    std::fs::rename(fresh.keep(), place).unwrap();
}

/// A server of the base alone that takes adapters from a directory.
pub(crate) fn with_root(change: impl FnOnce(&mut AdapterPolicy)) -> (Server, TempDir) {
    let root = tempfile::tempdir().unwrap();
    let mut policy = AdapterPolicy {
        root: Some(root.path().to_path_buf()),
        admin_key: Some(KEY.into()),
        ..AdapterPolicy::default()
    };
    change(&mut policy);
    let server = start(|engine, serve| {
        engine.adapters.clear();
        serve.adapters = policy;
    });
    (server, root)
}

pub(crate) fn admin(addr: SocketAddr, path: &str, body: &Value) -> Reply {
    let mut client = Client::new(addr);
    client.send("POST", path, &[JSON, ("X-Admin-Key", KEY)], Some(body.to_string().as_bytes()));
    client.receive(false)
}

pub(crate) fn load(addr: SocketAddr, name: &str, path: &str, in_place: bool) -> Reply {
    let body = json!({"lora_name": name, "lora_path": path, "load_inplace": in_place});
    admin(addr, "/v1/load_lora_adapter", &body)
}

pub(crate) fn ask(addr: SocketAddr, model: &str, prompt: &str) -> Reply {
    post(addr, "/v1/completions", &json!({"model": model, "prompt": prompt, "max_tokens": 12}))
}

pub(crate) fn text(reply: &Reply) -> String {
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.json()["choices"][0]["text"].as_str().unwrap().to_owned()
}

/// What an adapter says without a server.
pub(crate) fn solo(adapter: Option<&Path>, prompt: &str) -> String {
    direct(adapter, prompt, true, Sampling::greedy(), 12).1
}

fn code(reply: &Reply) -> (u16, String) {
    let json = reply.json();
    (reply.status, json["error"]["code"].as_str().unwrap_or_default().to_owned())
}

#[test]
fn an_adapter_comes_is_replaced_and_goes_and_each_answer_says_which_version_it_is() {
    let (server, root) = with_root(|_| {});
    let addr = server.addr;
    publish(root.path(), "a", false, 21);
    let first = solo(Some(&root.path().join("a")), "hello");
    assert_eq!(
        code(&admin(addr, "/v1/unload_lora_adapter", &json!({"lora_name": "a"}))).1,
        "lora_adapter_not_found"
    );
    let loaded = load(addr, "mine", "a", false);
    assert_eq!(loaded.status, 200, "{}", loaded.text());
    let one = loaded.json()["adapter_generation"].clone();
    assert_eq!(loaded.json()["message"], "Success: LoRA adapter 'mine' added successfully.");
    assert_eq!(one.as_str().unwrap().len(), 64);
    let reply = ask(addr, "mine", "hello");
    assert_eq!((text(&reply), &reply.json()["adapter_generation"]), (first.clone(), &one));
    assert!(ask(addr, "org/tiny", "hello").json().get("adapter_generation").is_none());
    let body = json!({"model": "mine", "prompt": "hello", "max_tokens": 12, "stream": true});
    let chunks = post(addr, "/v1/completions", &body).chunks();
    assert_eq!(streamed_text(&chunks), first);
    assert!(chunks.iter().all(|chunk| chunk["adapter_generation"] == one));
    let card = get(addr, "/v1/models/mine").json();
    assert_eq!(
        (&card["adapter_generation"], &card["root"], &card["parent"]),
        (&one, &json!("a"), &json!("org/tiny"))
    );

    // The same name again is refused unless it is said so; the same bytes are the same version.
    assert_eq!(code(&load(addr, "mine", "a", false)), (400, "lora_adapter_already_loaded".into()));
    let again = load(addr, "mine", "a", true).json();
    assert_eq!((&again["adapter_generation"], &again["replaced_generation"]), (&one, &one));
    assert_eq!(load(addr, "other", "a", false).json()["adapter_generation"], one);

    publish(root.path(), "a", true, 22);
    let expected = |generation: &Value| {
        json!({
            "lora_name": "mine", "lora_path": "a", "load_inplace": true, "expected_generation": generation,
        })
    };
    let stale = admin(addr, "/v1/load_lora_adapter", &expected(&json!("0".repeat(64))));
    assert_eq!(code(&stale), (409, "lora_generation_mismatch".into()));
    assert_eq!(stale.header("x-should-retry"), Some("false"));
    let replaced = admin(addr, "/v1/load_lora_adapter", &expected(&one)).json();
    let two = replaced["adapter_generation"].clone();
    assert_eq!((&replaced["replaced_generation"], two != one), (&one, true), "{replaced}");
    let reply = ask(addr, "mine", "hello");
    let second = solo(Some(&root.path().join("a")), "hello");
    assert_eq!((text(&reply), &reply.json()["adapter_generation"]), (second, &two));
    assert_eq!(text(&ask(addr, "other", "hello")), first);

    // A lease goes when the engine has done with its answer, which may be a moment after the answer is here.
    let mut list = get(addr, "/v1/lora_adapters").json();
    for _ in 0..200 {
        if list["data"].as_array().unwrap().iter().all(|adapter| adapter["active_leases"] == 0) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
        list = get(addr, "/v1/lora_adapters").json();
    }
    let of = |key: &str| list["data"].as_array().unwrap().iter().map(|a| a[key].clone()).collect::<Vec<_>>();
    assert_eq!(of("id"), ["mine", "other"]);
    assert_eq!(of("kind"), ["dora", "lora"]);
    assert_eq!((of("rank"), of("active_leases")), (vec![json!(4); 2], vec![json!(0); 2]));
    for name in ["mine", "other"] {
        let gone = admin(addr, "/v1/unload_lora_adapter", &json!({"lora_name": name, "lora_int_id": null}));
        assert_eq!(gone.status, 200, "{}", gone.text());
    }
    let list = get(addr, "/v1/lora_adapters").json();
    assert_eq!(
        (&list["data"], &list["retired"], &list["resident_bytes"]),
        (&json!([]), &json!([]), &json!(0))
    );
    assert_eq!(code(&ask(addr, "mine", "hello")), (404, "model_not_found".into()));
}

#[test]
fn answers_that_are_not_streamed_hold_their_version_once_each() {
    let (server, root) = with_root(|_| {});
    let addr = server.addr;
    publish(root.path(), "a", false, 31);
    assert_eq!(load(addr, "a", "a", false).status, 200);
    let body = json!({"model": "a", "prompt": "once", "max_tokens": 20_000, "ignore_eos": true, "n": 2});
    let mut client = Client::new(addr);
    client.send("POST", "/v1/completions", &[JSON], Some(body.to_string().as_bytes()));
    let began = Instant::now();
    while get(addr, "/v1/stats").json()["sequences"]["running"] != 2 {
        assert!(began.elapsed() < Duration::from_secs(5));
        std::thread::sleep(Duration::from_millis(5));
    }
    // The share of the queue that an adapter may fill is counted in these.
    assert_eq!(get(addr, "/v1/lora_adapters").json()["data"][0]["active_leases"], 2);
    drop(client);
    while get(addr, "/v1/lora_adapters").json()["data"][0]["active_leases"] != 0 {
        assert!(began.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn what_can_be_asked_can_be_counted() {
    let (server, root) = with_root(|_| {});
    publish(root.path(), "a", false, 31);
    for (model, status) in [("a", 200), ("org/tiny", 200), ("nobody", 404)] {
        let body = json!({"model": model, "messages": [{"role": "user", "content": "hello"}]});
        let reply = post(server.addr, "/v1/messages/count_tokens", &body);
        assert_eq!(reply.status, status, "{model}: {}", reply.text());
    }
}

#[test]
fn the_administrators_key_is_read_as_other_keys_are() {
    let (server, root) = with_root(|_| {});
    publish(root.path(), "a", false, 31);
    let body = json!({"lora_name": "a", "lora_path": "a", "load_inplace": true}).to_string();
    for (name, value, status) in [
        ("Authorization", "Bearer let me in", 200),
        ("Authorization", "bearer let me in", 200),
        ("Authorization", "Basic let me in", 401),
        ("Authorization", "Bearer let me", 401),
        ("X-Admin-Key", "let me in", 200),
        ("X-Admin-Key", "", 401),
    ] {
        let mut client = Client::new(server.addr);
        client.send("POST", "/v1/load_lora_adapter", &[JSON, (name, value)], Some(body.as_bytes()));
        assert_eq!(client.receive(false).status, status, "{name}: {value}");
    }
}

#[test]
fn a_stream_keeps_the_version_it_began_with() {
    let (server, root) = with_root(|_| {});
    let addr = server.addr;
    // Both are there before the stream begins, so that it runs for longer than the swap takes.
    publish(root.path(), "a", false, 31);
    publish(root.path(), "b", false, 32);
    assert_eq!(load(addr, "a", "a", false).status, 200);
    let eos: serde_json::Map<_, _> = {
        let tokenizer = graft_model::Tokenizer::load(fixture().model.path()).unwrap();
        tokenizer.eos_ids().iter().map(|id| (id.to_string(), json!(-100))).collect()
    };
    let body = json!({"model": "a", "prompt": "once", "max_tokens": 3000, "logit_bias": eos, "stream": true});
    let alone = streamed_text(&post(addr, "/v1/completions", &body).chunks());
    let mut client = Client::new(addr);
    client.send("POST", "/v1/completions", &[JSON], Some(body.to_string().as_bytes()));
    assert_eq!(client.head().0, 200);
    let mut bytes = client.chunk().unwrap();
    assert_eq!(load(addr, "a", "b", true).status, 200);
    let list = get(addr, "/v1/lora_adapters").json();
    assert_eq!(list["retired"][0]["active_leases"], 1, "{list}");
    assert_eq!(admin(addr, "/v1/unload_lora_adapter", &json!({"lora_name": "a"})).status, 200);
    while let Some(chunk) = client.chunk() {
        bytes.extend(chunk);
    }
    let reply = Reply { status: 200, headers: Vec::new(), body: bytes };
    assert_eq!(streamed_text(&reply.chunks()), alone);
    let ended = Instant::now();
    while get(addr, "/v1/lora_adapters").json()["resident_bytes"] != 0 {
        assert!(ended.elapsed() < Duration::from_secs(5), "the last lease frees the version");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn what_may_not_be_loaded_is_refused_and_nothing_changes() {
    let (server, root) = with_root(|policy| (policy.max_adapters, policy.max_rank) = (2, 4));
    let addr = server.addr;
    publish(root.path(), "good", false, 41);
    assert_eq!(load(addr, "good", "good", false).status, 200);
    let answer = text(&ask(addr, "good", "hello"));
    let f = fixture();
    put(root.path(), "wrong", f.lora.path());
    let config = root.path().join("wrong/adapter_config.json");
    std::fs::write(&config, "{").unwrap();
    let mut big = AdapterFiles::of(f.lora.path());
    big.rename("model.layers.0", "model.layers.9");
    big.write(root.path(), "alien");
    let tiny = Tiny { packed: Some((4, 32)), ..Tiny::new(Family::Llama) };
    put(root.path(), "wide", tiny_adapter(f.model.path(), &tiny, false, 5, 1).path());
    let huge = format!("{}x", "n".repeat(256));
    for (name, path, status, expected) in [
        ("x", "wrong", 422, "invalid_lora_adapter"),
        ("x", "alien", 422, "invalid_lora_adapter"),
        ("x", "wide", 409, "lora_rank_limit_exceeded"),
        ("x", "nobody", 404, "adapter_path_not_found"),
        ("x", "../good", 403, "adapter_path_forbidden"),
        ("x", "/etc", 403, "adapter_path_forbidden"),
        ("", "good", 400, "invalid_lora_name"),
        ("org/tiny", "good", 400, "invalid_lora_name"),
        (huge.as_str(), "good", 400, "invalid_lora_name"),
    ] {
        for in_place in [false, true] {
            let reply = load(addr, name, path, in_place);
            assert_eq!(code(&reply), (status, expected.into()), "{name} {path} {}", reply.text());
            assert!(!reply.text().contains(root.path().to_str().unwrap()), "{}", reply.text());
        }
    }
    assert_eq!(load(addr, "second", "good", false).status, 200);
    assert_eq!(code(&load(addr, "third", "good", false)), (409, "lora_adapter_limit_exceeded".into()));
    for (body, status, expected) in [
        (json!({"lora_name": "a"}), 400, "invalid_value"),
        (json!({"lora_name": "a", "lora_path": 3}), 400, "invalid_value"),
        (json!({"lora_name": "a", "lora_path": "good", "load_in_place": true}), 400, "unknown_field"),
        (
            json!({"lora_name": "a", "lora_path": "good", "expected_generation": "b"}),
            400,
            "invalid_lora_load_policy",
        ),
    ] {
        assert_eq!(code(&admin(addr, "/v1/load_lora_adapter", &body)), (status, expected.into()), "{body}");
    }
    let body = json!({"lora_name": "a", "lora_path": "good"});
    let reply = post(addr, "/v1/load_lora_adapter", &body);
    assert_eq!(code(&reply), (401, "invalid_api_key".into()));
    assert_eq!(reply.header("www-authenticate"), Some("Bearer"));
    let mut client = Client::new(addr);
    let bearer = format!("Bearer {KEY}");
    let unload = json!({"lora_name": "second"}).to_string();
    client.send(
        "POST",
        "/v1/unload_lora_adapter",
        &[JSON, ("Authorization", &bearer)],
        Some(unload.as_bytes()),
    );
    assert_eq!(client.receive(false).status, 200);
    assert_eq!(get(addr, "/v1/load_lora_adapter").status, 405);
    let list = get(addr, "/v1/lora_adapters").json();
    assert_eq!((list["data"].as_array().unwrap().len(), &list["retired"]), (1, &json!([])), "{list}");
    assert_eq!(text(&ask(addr, "good", "hello")), answer);

    let (closed, _root) = with_root(|policy| policy.admin_key = None);
    assert_eq!(code(&load(closed.addr, "a", "a", false)), (403, "lora_updates_disabled".into()));
}

/// An adapter's files, to be changed.
struct AdapterFiles {
    tensors: Vec<u8>,
    config: Vec<u8>,
}

impl AdapterFiles {
    fn of(dir: &Path) -> Self {
        let read = |name: &str| std::fs::read(dir.join(name)).unwrap();
        Self { tensors: read("adapters.safetensors"), config: read("adapter_config.json") }
    }

    /// Renames in the header, to a name of the same length.
    fn rename(&mut self, from: &str, to: &str) {
        assert_eq!(from.len(), to.len());
        let length = u64::from_le_bytes(self.tensors[..8].try_into().unwrap()) as usize;
        let header = String::from_utf8(self.tensors[8..8 + length].to_vec()).unwrap();
        self.tensors[8..8 + length].copy_from_slice(header.replace(from, to).as_bytes());
    }

    fn write(&self, root: &Path, name: &str) {
        let dir = root.join(name);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("adapters.safetensors"), &self.tensors).unwrap();
        std::fs::write(dir.join("adapter_config.json"), &self.config).unwrap();
    }
}

#[test]
fn a_name_below_the_root_is_loaded_at_its_first_use_and_makes_room_for_others() {
    let (server, root) = with_root(|policy| policy.max_adapters = 2);
    let addr = server.addr;
    for (name, seed) in [("org/a", 51), ("b", 52), ("c", 53)] {
        publish(root.path(), name, seed == 52, seed);
    }
    let expected = |name: &str| solo(Some(&root.path().join(name)), "hello");
    // Those who ask together wait for one load.
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..4).map(|_| scope.spawn(|| text(&ask(addr, "org/a", "hello")))).collect();
        let wanted = expected("org/a");
        all.into_iter().for_each(|thread| assert_eq!(thread.join().unwrap(), wanted));
    });
    let ids = || -> Vec<Value> {
        let models = get(addr, "/v1/models").json();
        models["data"].as_array().unwrap().iter().map(|card| card["id"].clone()).collect()
    };
    assert_eq!(text(&ask(addr, "b", "hello")), expected("b"));
    assert_eq!(ids(), ["org/tiny", "org/a", "b"]);
    assert_eq!(text(&ask(addr, "c", "hello")), expected("c"));
    assert_eq!(ids(), ["org/tiny", "b", "c"], "the least recently used one has gone");
    // What an administrator has loaded stays.
    assert_eq!(load(addr, "kept", "b", false).status, 200);
    assert_eq!(text(&ask(addr, "org/a", "hello")), expected("org/a"));
    assert_eq!(ids(), ["org/tiny", "kept", "org/a"]);
    for name in ["nobody", "../b", "org", "/b", "b/"] {
        assert_eq!(code(&ask(addr, name, "hello")), (404, "model_not_found".into()), "{name}");
    }
}
