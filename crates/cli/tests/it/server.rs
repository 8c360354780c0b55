//! `graft server`: where it listens, which names it knows, and what stops it from starting.

use serde_json::json;

use crate::http::{json, request};
use crate::pipeline::serve;
use crate::setting::Folder;

#[test]
fn it_serves_a_base_and_its_adapters_by_name_until_it_is_interrupted() {
    let folder = Folder::with_model();
    let flags = "server --model model --adapter-path adapter --adapter other=adapter --model-id mine --port 0 \
                 --decode-concurrency 64";
    let (server, address) = serve(&folder, flags);
    let models = json(&address, "/v1/models", None);
    let ids: Vec<&str> =
        models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    for id in ["mine", "adapter", "other"] {
        assert!(ids.contains(&id), "{models}");
    }
    let ask = |model: &str| {
        let body = json!({"model": model, "prompt": "hello", "max_tokens": 3, "logprobs": 1});
        json(&address, "/v1/completions", Some(&body))["choices"][0].clone()
    };
    // Without a name the adapter of --adapter-path answers; the base's name is the base.
    assert_eq!(ask("default_model"), ask("adapter"));
    assert_ne!(ask("mine"), ask("adapter"));
    let (status, text) = request(&address, "/v1/completions", Some(&json!({"model": "nix", "prompt": "a"})));
    assert!(status == 404 && text.contains("nix"), "{status} {text}");
    assert_eq!(request(&address, "/health", None).0, 200);
    server.interrupt();
    let run = server.end();
    assert_eq!(run.status, Some(0), "{run:?}");
    assert!(run.err.contains("--decode-concurrency 64 is more than 32"), "{run:?}");
    assert!(run.err.contains("POST /v1/completions 200") && run.err.ends_with("Stopped.\n"), "{run:?}");
}

#[test]
fn adapters_come_by_name_from_their_directory_and_by_key_only_into_it() {
    let folder = Folder::with_model();
    let flags = "server --model model --model-id mine --adapter-root . --admin-key secret --max-adapters 1 \
                 --adapter-memory 1G --kv-memory 64M --port 0";
    let (_server, address) = serve(&folder, flags);
    let ask =
        |model: &str| json(&address, "/v1/completions", Some(&json!({"model": model, "prompt": "hello"})));
    let answer = ask("adapter");
    assert_eq!(answer["adapter_generation"].as_str().map(str::len), Some(64), "{answer}");
    assert_ne!(answer["choices"][0]["text"], ask("mine")["choices"][0]["text"]);
    assert_eq!(json(&address, "/v1/models", None)["data"][1]["id"], "adapter");
    let body = json!({"lora_name": "a", "lora_path": "adapter"});
    let (status, text) = request(&address, "/v1/load_lora_adapter", Some(&body));
    assert!(status == 401 && text.contains("invalid_api_key"), "{status} {text}");
}

#[test]
fn keys_come_from_a_file_and_requests_are_logged_as_json() {
    let folder = Folder::with_model();
    folder.write("keys", "# mine\n\n  one-key \n");
    let (server, address) =
        serve(&folder, "server --model model --port 0 --api-key-file keys --log-format json");
    assert_eq!(request(&address, "/ready", None).0, 200);
    let (status, text) = request(&address, "/v1/models", None);
    assert!(status == 401 && text.contains("invalid_api_key"), "{status} {text}");
    server.interrupt();
    let run = server.end();
    let lines: Vec<serde_json::Value> =
        run.err.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let of = |path: &str| lines.iter().find(|line| line["path"] == path).unwrap_or_else(|| panic!("{run:?}"));
    assert_eq!((&of("/ready")["status"], &of("/v1/models")["status"]), (&json!(200), &json!(401)));
    assert!(of("/v1/models")["total_seconds"].is_number() && !run.err.contains("one-key"), "{run:?}");
}

#[test]
fn messages_are_read_as_generate_reads_them() {
    let folder = Folder::with_model();
    let mut config = folder.json("model/tokenizer_config.json");
    config["chat_template"] =
        "{% if enable_thinking is defined %}{{ 'thinks ' ~ enable_thinking }}{% endif %}{{ messages[0].content }}".into();
    folder.write("model/tokenizer_config.json", &config.to_string());
    let said = folder.ok("generate --model model --prompt hello --max-tokens 1").out;
    let (_server, address) = serve(&folder, "server --model model --port 0");
    let body = json!({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1});
    let tokens = json(&address, "/v1/chat/completions", Some(&body))["usage"]["prompt_tokens"].clone();
    assert!(said.contains(&format!("Prompt: {tokens} tokens")), "{tokens}, {said}");
}

#[test]
fn what_stops_it_is_said_at_once() {
    let folder = Folder::with_model();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let flags = format!("server --model model --port {port}");
    folder.fails(1, &flags, &[&format!("cannot listen on 127.0.0.1:{port}"), "Choose another --port"]);
    for (status, flags, part) in [
        (2, "", "--model is required"),
        (2, "--model model --api-key=", "--api-key and GRAFT_API_KEY"),
        (1, "--model model --api-key-file nowhere", "--api-key-file nowhere"),
        (2, "--model model --decode-concurrency 0", "--decode-concurrency must be at least 1"),
        (2, "--model model --adapter adapter", "--adapter adapter: expected NAME=DIR"),
        (2, "--model model --temp -2", "`temperature`"),
        (2, "--model model --admin-key secret", "--admin-key needs --adapter-root DIR"),
        (2, "--model model --kv-memory 5X", "expected a whole number of bytes"),
        (1, "--model model --adapter-root gone", "--adapter-root gone: there is no such directory"),
        (1, "--model model --port 0 --kv-memory 9K", "9216 bytes for keys and values hold no sequence"),
        (1, "--model model --port 0 --adapter a=adapter --max-adapter-rank 1", "at most 1 is served"),
        (2, "--model model --chat-template-args [1]", "--chat-template-args must be a JSON object"),
        (2, "--model model --kv-bits 4", "--kv-bits is not supported by graft server"),
        (2, "--model model --port 99999", "invalid value '99999' for '--port"),
        (1, "--model model --adapter x=gone", "there is no adapter directory `gone`"),
        (1, "--model gone", "there is no model directory `gone`"),
        (1, "--model data --port 0", "data: config.json is missing"),
        (1, "--model model --port 0 --adapter a=adapter --adapter a=adapter", "two adapters have this name"),
    ] {
        folder.fails(status, &format!("server {flags}"), &[part]);
    }
}
