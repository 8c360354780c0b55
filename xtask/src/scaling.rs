//! `cargo xtask bench --scaling`: what a training step costs as the sequence and the model grow, beside the arithmetic.
//!
//! The large models are random 4-bit checkpoints in the shape of known ones: cost does not depend on values.

use std::fmt::Write as _;
use std::fs;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use crate::bench::{metrics, train};
use crate::pipeline::Graft;
use crate::record::{bytes, table};
use crate::{model, sh};

/// Blocks that get an adapter, and its rank.
const BLOCKS: usize = 16;
const RANK: usize = 16;

/// Memory for which the longest sequence is told, in GB.
const MEMORY: [f64; 4] = [2.0, 4.0, 8.0, 16.0];

/// Weights of a group in the random checkpoints.
const GROUP: usize = 64;

/// The sizes of a model, all with the demo's vocabulary.
struct Shape {
    name: &'static str,
    blocks: usize,
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    head: usize,
    feed_forward: usize,
}

const VOCABULARY: usize = 49152;

/// The demo's base, and what its vocabulary makes of SmolLM2-360M, TinyLlama, Llama 3.2 3B and Llama 2 7B.
const SHAPES: [Shape; 5] = [
    Shape { name: "135M", blocks: 30, hidden: 576, heads: 9, kv_heads: 3, head: 64, feed_forward: 1536 },
    Shape { name: "360M", blocks: 32, hidden: 960, heads: 15, kv_heads: 5, head: 64, feed_forward: 2560 },
    Shape { name: "1.1B", blocks: 22, hidden: 2048, heads: 32, kv_heads: 4, head: 64, feed_forward: 5632 },
    Shape { name: "3B", blocks: 28, hidden: 3072, heads: 24, kv_heads: 8, head: 128, feed_forward: 8192 },
    Shape { name: "7B", blocks: 32, hidden: 4096, heads: 32, kv_heads: 32, head: 128, feed_forward: 11008 },
];

impl Shape {
    /// The linears of a block: name, outputs, inputs.
    fn linears(&self) -> [(&'static str, usize, usize); 7] {
        let (q, kv) = (self.heads * self.head, self.kv_heads * self.head);
        [
            ("self_attn.q_proj", q, self.hidden),
            ("self_attn.k_proj", kv, self.hidden),
            ("self_attn.v_proj", kv, self.hidden),
            ("self_attn.o_proj", self.hidden, q),
            ("mlp.gate_proj", self.feed_forward, self.hidden),
            ("mlp.up_proj", self.feed_forward, self.hidden),
            ("mlp.down_proj", self.hidden, self.feed_forward),
        ]
    }

    /// Operations of a training step per token, with a row of `length` tokens: 2 per weight forward, 2 backward in the
    /// blocks with an adapter and in the head; 6 per weight of the adapter; scores and mixture of the half of the
    /// tokens that causal attention sees, 2 products forward and 5 backward.
    fn operations(&self, length: usize, checkpoint: bool) -> f64 {
        let trained = BLOCKS.min(self.blocks);
        let weights: usize = self.linears().iter().map(|(_, outputs, inputs)| outputs * inputs).sum();
        let adapter: usize =
            self.linears().iter().map(|(_, outputs, inputs)| RANK * (outputs + inputs)).sum();
        let product = self.heads * self.head * length;
        // A checkpointed block runs forward twice.
        let forward = self.blocks + if checkpoint { trained } else { 0 };
        let linear = 2 * weights * (forward + trained) + 4 * self.hidden * VOCABULARY;
        (linear + 6 * adapter * trained + product * (2 * forward + 5 * trained)) as f64
    }

    /// Writes a random checkpoint with the demo's tokenizer. Zero-mean weights whose products keep their size.
    fn write(&self, base: &Path, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder)?;
        for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
            fs::copy(base.join(name), folder.join(name))?;
        }
        let mut config: Value = serde_json::from_str(&fs::read_to_string(base.join("config.json"))?)?;
        config["num_hidden_layers"] = self.blocks.into();
        config["hidden_size"] = self.hidden.into();
        config["num_attention_heads"] = self.heads.into();
        config["num_key_value_heads"] = self.kv_heads.into();
        config["head_dim"] = self.head.into();
        config["intermediate_size"] = self.feed_forward.into();
        config["torch_dtype"] = "bfloat16".into();
        for key in ["quantization", "quantization_config"] {
            config[key] = json!({"group_size": GROUP, "bits": 4, "mode": "affine"});
        }
        fs::write(folder.join("config.json"), config.to_string())?;

        let norm = |name: String| (name, "BF16", vec![self.hidden], 1.0);
        let mut tensors = vec![norm("model.norm.weight".into())];
        let mut packed = |name: String, outputs: usize, inputs: usize| {
            // The deviation of the numbers 0 to 15 is 4.6, and their mean 7.5.
            let scale = 1.0 / 4.6 / (inputs as f32).sqrt();
            tensors.push((format!("{name}.weight"), "U32", vec![outputs, inputs / 8], 0.0));
            tensors.push((format!("{name}.scales"), "BF16", vec![outputs, inputs / GROUP], scale));
            tensors.push((format!("{name}.biases"), "BF16", vec![outputs, inputs / GROUP], -7.5 * scale));
        };
        packed("model.embed_tokens".into(), VOCABULARY, self.hidden);
        for block in 0..self.blocks {
            for (name, outputs, inputs) in self.linears() {
                packed(format!("model.layers.{block}.{name}"), outputs, inputs);
            }
        }
        for block in 0..self.blocks {
            for name in ["input_layernorm", "post_attention_layernorm"] {
                tensors.push(norm(format!("model.layers.{block}.{name}.weight")));
            }
        }
        safetensors(&folder.join("model.safetensors"), &tensors)
    }
}

/// Writes tensors of one value each, or of random words where the type is U32: the file format is a length, a JSON
/// header, and the bytes.
fn safetensors(file: &Path, tensors: &[(String, &'static str, Vec<usize>, f32)]) -> Result<()> {
    let (mut header, mut end) = (Map::new(), 0);
    let size =
        |kind: &str, shape: &[usize]| shape.iter().product::<usize>() * if kind == "U32" { 4 } else { 2 };
    for (name, kind, shape, _) in tensors {
        let begin = end;
        end += size(kind, shape);
        header.insert(name.clone(), json!({"dtype": kind, "shape": shape, "data_offsets": [begin, end]}));
    }
    let mut header = Value::from(header).to_string();
    header += &" ".repeat(header.len().next_multiple_of(8) - header.len());
    let mut out = BufWriter::new(fs::File::create(file)?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    let mut state = 1_u64;
    for (_, kind, shape, value) in tensors {
        // A bfloat16 is the upper half of an f32.
        let bf16 = ((value.to_bits() >> 16) as u16).to_le_bytes();
        for _ in 0..size(kind, shape) / bf16.len() {
            // Marsaglia's xorshift.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let random = ((state >> 32) as u16).to_le_bytes();
            out.write_all(if *kind == "U32" { &random } else { &bf16 })?;
        }
    }
    Ok(out.flush()?)
}

/// Trains a few steps with each length, then with each shape.
pub(crate) fn measure(graft: &Graft, quick: bool) -> Result<Value> {
    let folder = sh::target()?.join("bench/scaling");
    fs::create_dir_all(&folder)?;
    let base = model::dir(&graft.0)?;
    // One word, one token: a row that is longer than any measured, and cut.
    let text = ["red"; 5000].join(" ");
    let row = json!({"text": text}).to_string() + "\n";
    for name in ["train.jsonl", "valid.jsonl"] {
        fs::write(folder.join(name), row.repeat(4))?;
    }
    let (lengths, shapes): (&[usize], usize) =
        if quick { (&[128, 512, 2048], 2) } else { (&[128, 256, 512, 1024, 2048, 4096], SHAPES.len()) };
    let mut runs = Vec::new();
    let mut one = |shape: &Shape, place: &Path, length: usize, rows: usize, checkpoint: bool| -> Result<()> {
        let adapter = sh::fresh(folder.join("adapter"))?;
        let numbers = [BLOCKS, RANK, length, if quick { 2 } else { 3 }].map(|number| number.to_string());
        let names = ["--num-layers", "--rank", "--max-seq-length", "--iters"];
        let mut flags: Vec<&str> = names.iter().zip(&numbers).flat_map(|(name, n)| [*name, n]).collect();
        flags.extend(checkpoint.then_some("--grad-checkpoint"));
        eprintln!("{}, {rows} x {length} tokens{}", shape.name, if checkpoint { ", checkpoint" } else { "" });
        if let Err(error) = train(graft, place, &folder, &adapter, rows, &flags) {
            // The largest may not fit this machine: the others are worth having.
            eprintln!("not measured: {error:#}");
            return Ok(());
        }
        let (tokens_per_second, peak_memory) = metrics(&adapter)?;
        runs.push(json!({
            "shape": shape.name, "length": length, "rows": rows, "checkpoint": checkpoint,
            "tokens_per_second": tokens_per_second, "peak_memory_bytes": peak_memory,
            "operations_per_token": shape.operations(length, checkpoint),
        }));
        Ok(())
    };
    for &length in lengths {
        one(&SHAPES[0], &base, length, 1, false)?;
    }
    for shape in &SHAPES[1..shapes] {
        let place = folder.join(shape.name);
        shape.write(&base, &place).with_context(|| format!("cannot write {}", place.display()))?;
        for length in [128, 512] {
            one(shape, &place, length, 1, false)?;
        }
        // Gigabytes that are made anew in seconds.
        fs::remove_dir_all(&place)?;
    }
    for checkpoint in [false, true] {
        one(&SHAPES[0], &base, 2048, 4, checkpoint)?;
    }
    Ok(runs.into())
}

/// The runs as a table, and what they say of longer rows.
pub(crate) fn render(runs: &Value) -> String {
    let runs: Vec<&Value> = runs.as_array().into_iter().flatten().collect();
    let number = |run: &Value, key: &str| run[key].as_f64().unwrap_or_default();
    let heads = ["model", "rows x tokens", "ms/token", "GFLOP/token", "GFLOP/s", "peak memory"];
    let mut rows = vec![heads.map(str::to_owned).to_vec()];
    for run in &runs {
        let (speed, operations) =
            (number(run, "tokens_per_second"), number(run, "operations_per_token") / 1e9);
        rows.push(vec![
            run["shape"].as_str().unwrap_or_default().to_owned(),
            format!(
                "{} x {}{}",
                run["rows"],
                run["length"],
                if run["checkpoint"] == true { ", --grad-checkpoint" } else { "" }
            ),
            format!("{:.2}", 1e3 / speed),
            format!("{operations:.3}"),
            format!("{:.0}", operations * speed),
            bytes(&run["peak_memory_bytes"]),
        ]);
    }
    let mut text = format!("Rank {RANK} on the last {BLOCKS} blocks.\n\n{}\n", table(&rows));
    let heads = MEMORY.map(|gigabytes| format!("{gigabytes} GB"));
    let mut rows =
        vec![["model", "KB/token"].map(str::to_owned).into_iter().chain(heads).collect::<Vec<_>>()];
    for shape in &SHAPES {
        let points = runs
            .iter()
            .filter(|run| run["shape"] == shape.name && run["rows"] == 1 && run["checkpoint"] == false);
        let points: Vec<_> =
            points.map(|run| (number(run, "length"), number(run, "peak_memory_bytes"))).collect();
        if let [.., near, far] = points[..] {
            let longest = MEMORY.map(|gigabytes| match longest(near, far, gigabytes * 1e9) {
                Some(length) => format!("{length:.0}"),
                None => "does not fit".into(),
            });
            let slope = (far.1 - near.1) / (far.0 - near.0) / 1e3;
            rows.push([shape.name.to_owned(), format!("{slope:.0}")].into_iter().chain(longest).collect());
        }
    }
    if rows.len() > 1 {
        let _ = write!(
            text,
            "The longest row that trains in so much memory, on the line through the two longest runs:\n\n{}",
            table(&rows)
        );
    }
    text
}

/// Where the line through two runs (tokens, bytes) reaches `memory`, to full hundreds; `None` below one.
fn longest(near: (f64, f64), far: (f64, f64), memory: f64) -> Option<f64> {
    let slope = (far.1 - near.1) / (far.0 - near.0);
    let length = ((memory - far.1) / slope + far.0) / 100.0;
    (slope > 0.0 && length >= 1.0).then(|| length.floor() * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arithmetic_is_that_of_the_reference_job() {
        // 0.44 GFLOP a token, as counted by hand: 106 million weights in blocks and 28 million in the head forward, 16
        // of 30 blocks and the head backward.
        let operations = SHAPES[0].operations(0, false) / 1e9;
        assert!((operations - 0.44).abs() < 0.02, "{operations}");
        let attention = |length| SHAPES[0].operations(length, false) - SHAPES[0].operations(0, false);
        assert_eq!(attention(4096), 2.0 * attention(2048));
    }

    #[test]
    fn the_longest_row_is_on_the_line() {
        assert_eq!(longest((1000.0, 1e9), (2000.0, 1.5e9), 4e9), Some(7000.0));
        assert_eq!(longest((1000.0, 5e9), (2000.0, 6e9), 2e9), None);
    }

    #[test]
    fn a_random_file_is_read_back() {
        let file = std::env::temp_dir().join(format!("graft-scaling-{}.safetensors", std::process::id()));
        let tensors = [("w".to_owned(), "U32", vec![2, 3], 0.0), ("s".to_owned(), "BF16", vec![2], -2.0)];
        safetensors(&file, &tensors).unwrap();
        let read = fs::read(&file).unwrap();
        fs::remove_file(file).unwrap();
        let length = u64::from_le_bytes(read[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&read[8..8 + length]).unwrap();
        assert_eq!(header["s"], json!({"dtype": "BF16", "shape": [2], "data_offsets": [24, 28]}));
        assert_eq!(read.len(), 8 + length + 28);
        assert_eq!(read[8 + length + 24..], [0x00, 0xC0, 0x00, 0xC0]);
    }

    #[test]
    fn runs_are_a_table() {
        let run = |length: u64, peak: u64| {
            json!({"shape": "135M", "length": length, "rows": 1, "checkpoint": false, "tokens_per_second": 250.0,
                "operations_per_token": 0.5e9, "peak_memory_bytes": peak})
        };
        let text = render(&json!([run(1000, 1_000_000_000), run(2000, 1_500_000_000)]));
        assert!(
            text.contains("| 135M  | 1 x 1000      | 4.00     | 0.500       | 125     | 1.00 GB     |"),
            "{text}"
        );
        assert!(text.contains("| 135M  | 500      | 3000 | 7000 |"), "{text}");
    }
}
