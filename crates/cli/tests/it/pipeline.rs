//! The whole path: convert, train, generate, fuse, generate, serve. What was learned arrives at the end.

use std::io::{BufRead as _, BufReader};

use serde_json::{Value, json};

use crate::http::{json, streamed};
use crate::setting::{Folder, llama, row};

const QUESTION: &str = "hello?";
const ANSWER: &str = "the user said on and on";

#[test]
fn what_lora_learns_on_a_packed_base_is_answered_by_the_fused_model() {
    whole_path("lora");
}

#[test]
fn what_dora_learns_on_a_packed_base_is_answered_by_the_fused_model() {
    whole_path("dora");
}

fn whole_path(kind: &str) {
    let folder = Folder::new();
    folder.model("original", &llama(None));
    folder.ok("convert --hf-path original --mlx-path base -q --q-bits 4 --q-group-size 32");
    assert_eq!(folder.json("base/config.json")["quantization"]["bits"], 4);

    let rows: Vec<Value> = (0..8).map(|_| row(QUESTION, ANSWER)).collect();
    folder.rows("data/train.jsonl", &rows);
    let trained = folder.ok(&format!(
        "train --model base --data data --adapter-path adapter --fine-tune-type {kind} --iters 60 --learning-rate 5e-3 \
         --val-batches 1 --steps-per-eval 60 --save-every 30"
    ));
    assert!(trained.out.contains("Saved final weights to adapter/adapters.safetensors."), "{trained:?}");
    assert!(folder.names("adapter").contains(&"0000030_adapters.safetensors".to_owned()));
    let config = folder.json("adapter/adapter_config.json");
    assert_eq!((&config["fine_tune_type"], &config["model"]), (&json!(kind), &json!("base")));

    let ask = |model: &str, more: &str| {
        let all =
            format!("generate --model {model} {more} --prompt {QUESTION} --max-tokens 40 --verbose false");
        folder.ok(&all).out
    };
    let answer = format!("{ANSWER}\n");
    assert_ne!(ask("base", ""), answer);
    assert_eq!(ask("base", "--adapter-path adapter"), answer);

    let fused = folder.ok("fuse --model base --adapter-path adapter --save-path fused");
    assert!(fused.out.contains("14 of 4 bits, groups of 32 -> 8 bits, groups of 32"), "{fused:?}");
    let report = folder.json("fused/fuse_report.json");
    assert_eq!((&report["base"], &report["adapter"]), (&json!("base"), &json!("adapter")));
    assert_eq!(ask("fused", ""), answer);
    folder.ok("fuse --model base --adapter-path adapter --save-path dense --dequantize");
    assert_eq!(ask("dense", ""), answer);

    let (mut server, address) = serve(&folder, "server --model fused --port 0");
    let messages = json!([{"role": "user", "content": QUESTION}]);
    let body = json!({"model": "fused", "messages": messages, "max_tokens": 40});
    let whole = json(&address, "/v1/chat/completions", Some(&body));
    assert_eq!(whole["choices"][0]["message"]["content"], ANSWER);
    assert_eq!(whole["choices"][0]["finish_reason"], "stop");
    let body = json!({"model": "fused", "messages": messages, "max_tokens": 40, "stream": true});
    assert_eq!(streamed(&address, &body), ANSWER);
    server.interrupt();
    assert_eq!(server.0.wait().unwrap().code(), Some(0));

    // The same from the base with the adapter beside it, which has a name of its own.
    let (_server, address) = serve(&folder, "serve --model base --adapter mine=adapter --port 0");
    let body = json!({"model": "mine", "messages": messages, "max_tokens": 40});
    let with = json(&address, "/v1/chat/completions", Some(&body));
    assert_eq!(with["choices"][0]["message"]["content"], ANSWER);
    let body = json!({"model": "base", "messages": messages, "max_tokens": 40});
    let without = json(&address, "/v1/chat/completions", Some(&body));
    assert_ne!(without["choices"][0]["message"]["content"], ANSWER);
}

/// Starts a server; the address is what it prints on stdout when it is ready.
pub(crate) fn serve(folder: &Folder, arguments: &str) -> (crate::setting::Running, String) {
    let mut server = folder.start(arguments);
    let mut line = String::new();
    BufReader::new(server.0.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    let address = line.trim().rsplit_once("http://").unwrap_or_else(|| panic!("{line:?}")).1.to_owned();
    (server, address)
}
