//! A model with the shapes of a 3B one, in several files: what a fuse and a merge hold in memory, and how long they take.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::setting::Folder;

/// Letters: E hidden, F feed-forward, KV width of keys and values, V vocabulary, R rank.
const E: usize = 3072;
const F: usize = 8192;
const KV: usize = 1024;
const V: usize = 128_256;
const R: usize = 8;
const GROUP: usize = 64;

/// Writes tensors of (name, type, shape) whose bytes repeat a pattern.
fn write(file: &Path, tensors: &[(String, &str, Vec<usize>)], pattern: impl Fn(&str) -> Vec<u8>) {
    let (mut header, mut at) = (Map::new(), 0);
    for (name, dtype, shape) in tensors {
        let bytes = shape.iter().product::<usize>() * if *dtype == "F16" { 2 } else { 4 };
        header
            .insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [at, at + bytes]}));
        at += bytes;
    }
    let header = Value::Object(header).to_string();
    let mut out = BufWriter::with_capacity(1 << 20, File::create(file).unwrap());
    out.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    out.write_all(header.as_bytes()).unwrap();
    for (name, dtype, shape) in tensors {
        let pattern = pattern(name);
        let mut left = shape.iter().product::<usize>() * if *dtype == "F16" { 2 } else { 4 };
        while left > 0 {
            let part = left.min(pattern.len());
            out.write_all(&pattern[..part]).unwrap();
            left -= part;
        }
    }
    // What is left to write would take the disk's time from what is measured.
    out.into_inner().unwrap().sync_all().unwrap();
}

/// A packed weight's three tensors, of `rows` x `inputs` in 4 bits.
fn packed(path: &str, rows: usize, inputs: usize) -> [(String, &'static str, Vec<usize>); 3] {
    [
        (format!("{path}.weight"), "U32", vec![rows, inputs / 8]),
        (format!("{path}.scales"), "F16", vec![rows, inputs / GROUP]),
        (format!("{path}.biases"), "F16", vec![rows, inputs / GROUP]),
    ]
}

fn linears() -> [(&'static str, usize, usize); 7] {
    [
        ("self_attn.q_proj", E, E),
        ("self_attn.k_proj", E, KV),
        ("self_attn.v_proj", E, KV),
        ("self_attn.o_proj", E, E),
        ("mlp.gate_proj", E, F),
        ("mlp.up_proj", E, F),
        ("mlp.down_proj", F, E),
    ]
}

/// Numbers that no formula of a fuse makes: a generator's, the same each time.
fn noise(count: usize) -> impl Iterator<Item = u32> {
    let mut state = 0x2545_f491_u32;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state
    })
    .take(count)
}

/// The model in three files.
fn make(folder: &Folder, layers: usize) {
    let model = folder.path("large");
    std::fs::create_dir(&model).unwrap();
    let block = json!({"group_size": GROUP, "bits": 4, "mode": "affine"});
    let config = json!({
        "model_type": "llama", "hidden_size": E, "num_hidden_layers": layers, "num_attention_heads": 24,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": F, "vocab_size": V, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": true, "torch_dtype": "float16", "quantization": block,
    });
    std::fs::write(model.join("config.json"), config.to_string()).unwrap();
    let mut files = [Vec::new(), Vec::new(), Vec::new()];
    files[0].extend(packed("model.embed_tokens", V, E));
    files[2].push(("model.norm.weight".to_owned(), "F16", vec![E]));
    for layer in 0..layers {
        let at = |name: &str| format!("model.layers.{layer}.{name}");
        for (name, inputs, outputs) in linears() {
            files[layer % 3].extend(packed(&at(name), outputs, inputs));
        }
        for name in ["input_layernorm.weight", "post_attention_layernorm.weight"] {
            files[(layer + 1) % 3].push((at(name), "F16", vec![E]));
        }
    }
    let codes: Vec<u8> = noise(1 << 20).flat_map(u32::to_le_bytes).collect();
    // A step of 0.01 from -0.08 on, in f16.
    let scales = 0x211f_u16.to_le_bytes().repeat(1 << 16);
    let biases = 0xad1f_u16.to_le_bytes().repeat(1 << 16);
    for (index, tensors) in files.iter().enumerate() {
        let name = format!("model-0000{}-of-00003.safetensors", index + 1);
        write(&model.join(name), tensors, |name| match name.rsplit('.').next() {
            Some("scales") => scales.clone(),
            Some("biases") => biases.clone(),
            _ if name.contains("norm") => 0x3c00_u16.to_le_bytes().repeat(E),
            _ => codes.clone(),
        });
    }
}

/// An adapter on all linears, whose numbers begin with the `from`-th.
fn adapter(folder: &Folder, name: &str, layers: usize, (dora, from): (bool, usize)) {
    let dir = folder.path(name);
    std::fs::create_dir(&dir).unwrap();
    let kind = if dora { "dora" } else { "lora" };
    let config = json!({"fine_tune_type": kind, "num_layers": -1, "lora_parameters": {"rank": R, "scale": 2.0, "dropout": 0.0}});
    std::fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    let mut tensors = Vec::new();
    for layer in 0..layers {
        for (name, inputs, outputs) in linears() {
            let at = format!("model.layers.{layer}.{name}");
            tensors.push((format!("{at}.lora_a"), "F32", vec![inputs, R]));
            tensors.push((format!("{at}.lora_b"), "F32", vec![R, outputs]));
            if dora {
                tensors.push((format!("{at}.m"), "F32", vec![outputs]));
            }
        }
    }
    let float = |n: u32| ((n as f32 / u32::MAX as f32 - 0.5) * 0.02).to_le_bytes();
    let floats: Vec<u8> = noise(from + (1 << 18)).skip(from).flat_map(float).collect();
    // About the norm of the base's rows.
    let magnitudes = 3.0f32.to_le_bytes().repeat(1 << 10);
    write(&dir.join("adapters.safetensors"), &tensors, |name| {
        if name.ends_with(".m") { magnitudes.clone() } else { floats.clone() }
    });
}

/// Holds the peak memory that a report tells to thrice the largest tensor on the disk and 200 MB.
fn check_memory(report: &Value) {
    let largest = V * E / 2;
    let peak = report["peak_memory_bytes"].as_u64().unwrap() as usize;
    assert!(peak > 0 && peak < 3 * largest + 200_000_000, "{peak} bytes, the largest tensor has {largest}");
}

/// Fuses within the bound of memory.
fn fuse(layers: usize) -> Value {
    let folder = Folder::new();
    make(&folder, layers);
    adapter(&folder, "large-adapter", layers, (false, 0));
    folder.ok("fuse --model large --adapter-path large-adapter --save-path fused --verify layers");
    let report = folder.json("fused/fuse_report.json");
    check_memory(&report);
    assert_eq!(report["totals"]["changed"], 7 * layers);
    assert!(report["totals"]["kept"].as_f64().unwrap() > 0.9, "{}", report["totals"]);
    report
}

#[test]
fn a_merge_has_one_dense_matrix_at_a_time() {
    let folder = Folder::new();
    make(&folder, 1);
    adapter(&folder, "lora", 1, (false, 0));
    adapter(&folder, "dora", 1, (true, 99));
    for (method, adapters, error) in [
        ("ties --density 0.5 --rank 16", "--adapter lora=0.6 --adapter dora=0.4", 0.1..1.0),
        // Nothing is dropped, so that a search of the leading vectors must find all there is.
        ("magnitude_prune --density 1", "--adapter lora --adapter dora=0.5", 0.0..1e-4),
        ("slerp", "--adapter lora --adapter dora", 0.0..1e-4),
    ] {
        folder.ok(&format!("merge --method {method} --model large {adapters} --save-path merged"));
        let report = folder.json("merged/merge_report.json");
        check_memory(&report);
        assert_eq!(report["totals"]["modules"], 7);
        let found = report["totals"]["error"].as_f64().unwrap();
        assert!(error.contains(&found), "{method}: {found} is not in {error:?}");
        std::fs::remove_dir_all(folder.path("merged")).unwrap();
    }
}

#[test]
fn memory_is_that_of_the_largest_tensor() {
    fuse(2);
}

#[test]
#[ignore = "8 GB of disk and a minute: cargo test -p graft-cli --test it fuse_large -- --ignored"]
fn a_whole_3b_model_takes_less_than_a_minute() {
    let report = fuse(28);
    let seconds = report["seconds"].as_f64().unwrap();
    assert!(seconds < 60.0, "{seconds} s");
}
