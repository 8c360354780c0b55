//! Model directories of a few hundred kilobytes, of every family, packed or not.

use std::path::Path;

use mlx_rs::{Array, ops};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::compare::host;
use crate::files::{Tensor, Tensors, read_json, read_safetensors, write_json, write_safetensors};
use crate::floats;
use crate::mlx;
use crate::random::Random;
use crate::tokenizer::{SPECIAL, TOKENS, tokenizer_config, tokenizer_json};

/// What the decoder looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// No biases, no norms on q and k.
    Llama,
    /// As [`Family::Llama`], under its own `model_type`.
    Mistral,
    /// Biases on q, k and v.
    Qwen2,
    /// Norms on q and k, a head dim of its own.
    Qwen3,
}

impl Family {
    /// All of them.
    pub const ALL: [Family; 4] = [Family::Llama, Family::Mistral, Family::Qwen2, Family::Qwen3];

    /// `model_type` in config.json.
    pub fn name(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
        }
    }

    fn architecture(self) -> &'static str {
        match self {
            Family::Llama => "LlamaForCausalLM",
            Family::Mistral => "MistralForCausalLM",
            Family::Qwen2 => "Qwen2ForCausalLM",
            Family::Qwen3 => "Qwen3ForCausalLM",
        }
    }
}

/// Stored type of the float tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// 32 bits.
    F32,
    /// 16 bits, IEEE.
    F16,
    /// 16 bits, brain float.
    Bf16,
}

impl Dtype {
    fn config_name(self) -> &'static str {
        match self {
            Dtype::F32 => "float32",
            Dtype::F16 => "float16",
            Dtype::Bf16 => "bfloat16",
        }
    }

    fn mlx(self) -> mlx_rs::Dtype {
        match self {
            Dtype::F32 => mlx_rs::Dtype::Float32,
            Dtype::F16 => mlx_rs::Dtype::Float16,
            Dtype::Bf16 => mlx_rs::Dtype::Bfloat16,
        }
    }
}

/// A model to be written. Letters: E hidden, H heads, K kv heads, D head dim, F feed-forward, V vocabulary.
#[derive(Debug, Clone, PartialEq)]
pub struct Tiny {
    /// Family.
    pub family: Family,
    /// Bits (2, 3, 4, 5, 6 or 8) and group size (32, 64 or 128) of linears and embedding; `None` leaves them dense.
    pub packed: Option<(i32, i32)>,
    /// `affine`, or a mode of floats, see [`Tiny::in_mode`].
    pub mode: &'static str,
    /// The head is the embedding.
    pub tied: bool,
    /// Stored type of everything that is not packed, and of scales and biases.
    pub dtype: Dtype,
    /// Weights with other seeds are independent.
    pub seed: u64,
    /// Layers.
    pub layers: usize,
    /// E.
    pub hidden: usize,
    /// H.
    pub heads: usize,
    /// K.
    pub kv_heads: usize,
    /// D.
    pub head_dim: usize,
    /// F.
    pub ffn: usize,
    /// V, at least the tokenizer's 288.
    pub vocab: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Further keys of config.json, such as `rope_scaling`; they replace ours.
    pub extra: serde_json::Map<String, Value>,
}

impl Tiny {
    /// A dense f32 model of `family`, tied: 2 layers, E 64, H 4, K 2, D 16, F 128, V 288.
    pub fn new(family: Family) -> Self {
        Self {
            family,
            packed: None,
            mode: "affine",
            tied: true,
            dtype: Dtype::F32,
            seed: 1,
            layers: 2,
            hidden: 64,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            ffn: 128,
            vocab: TOKENS,
            rope_theta: 10_000.0,
            extra: serde_json::Map::new(),
        }
    }

    /// The same model packed in `mxfp4`, `nvfp4` or `mxfp8`.
    pub fn in_mode(self, mode: &'static str) -> Self {
        let packed = match mode {
            "mxfp4" => (4, 32),
            "nvfp4" => (4, 16),
            "mxfp8" => (8, 32),
            other => panic!("{other} is no mode of floats"),
        };
        Self { packed: Some(packed), mode, ..self }
    }

    /// The linears of one layer: name, inputs, outputs.
    pub fn linears(&self) -> [(&'static str, usize, usize); 7] {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        [
            ("self_attn.q_proj", self.hidden, q),
            ("self_attn.k_proj", self.hidden, kv),
            ("self_attn.v_proj", self.hidden, kv),
            ("self_attn.o_proj", q, self.hidden),
            ("mlp.gate_proj", self.hidden, self.ffn),
            ("mlp.up_proj", self.hidden, self.ffn),
            ("mlp.down_proj", self.ffn, self.hidden),
        ]
    }

    fn config(&self) -> Value {
        let mut config = json!({
            "architectures": [self.family.architecture()],
            "model_type": self.family.name(),
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.ffn,
            "vocab_size": self.vocab,
            "rms_norm_eps": 1e-5,
            "rope_theta": self.rope_theta,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "eos_token_id": TOKENS - 1,
            "torch_dtype": self.dtype.config_name(),
        });
        // Families differ in whether they write the head dim; where it is E / H, leaving it out is the usual form.
        if self.family == Family::Qwen3 || self.head_dim * self.heads != self.hidden {
            config["head_dim"] = self.head_dim.into();
        }
        if let Some((bits, group_size)) = self.packed {
            let block = json!({"group_size": group_size, "bits": bits, "mode": self.mode});
            config["quantization"] = block.clone();
            config["quantization_config"] = block;
        }
        for (key, value) in &self.extra {
            config[key] = value.clone();
        }
        config
    }

    pub(crate) fn tensors(&self) -> Tensors {
        let mut all = Tensors::new();
        let vector = |all: &mut Tensors, name: String, n: usize, mean: f32| {
            let values = Random::new(self.seed, &name).normal(n, mean, 0.1);
            all.insert(name, Tensor::floats(&values, &[n], self.dtype));
        };
        // Unit variance is kept through a linear by std 1/sqrt(in); logits then have a spread of about 2.
        self.matrix(&mut all, "model.embed_tokens", self.vocab, self.hidden, 0.25);
        for layer in 0..self.layers {
            let at = |name: &str| format!("model.layers.{layer}.{name}");
            for (name, inputs, outputs) in self.linears() {
                self.matrix(&mut all, &at(name), outputs, inputs, 1.0 / (inputs as f32).sqrt());
            }
            for name in ["input_layernorm", "post_attention_layernorm"] {
                vector(&mut all, at(&format!("{name}.weight")), self.hidden, 1.0);
            }
            if self.family == Family::Qwen2 {
                for (name, _, outputs) in &self.linears()[..3] {
                    vector(&mut all, at(&format!("{name}.bias")), *outputs, 0.0);
                }
            }
            if self.family == Family::Qwen3 {
                for name in ["self_attn.q_norm.weight", "self_attn.k_norm.weight"] {
                    vector(&mut all, at(name), self.head_dim, 1.0);
                }
            }
        }
        vector(&mut all, "model.norm.weight".to_owned(), self.hidden, 1.0);
        if !self.tied {
            self.matrix(&mut all, "lm_head", self.vocab, self.hidden, 0.25);
        }
        all
    }

    /// A weight (out, in), packed if the model is.
    fn matrix(&self, all: &mut Tensors, path: &str, outputs: usize, inputs: usize, std: f32) {
        let name = format!("{path}.weight");
        let values = Random::new(self.seed, &name).normal(outputs * inputs, 0.0, std);
        let Some((bits, group)) = self.packed else {
            all.insert(name, Tensor::floats(&values, &[outputs, inputs], self.dtype));
            return;
        };
        if self.mode != "affine" {
            let (words, scales) = floats::pack(&values, self.mode);
            all.insert(name, Tensor::words(&words, &[outputs, inputs * bits as usize / 32]));
            all.insert(format!("{path}.scales"), Tensor::bytes(scales, &[outputs, inputs / group as usize]));
            return;
        }
        let dense = Array::from_slice(&values, &[outputs as i32, inputs as i32]);
        let dense = dense.as_dtype(self.dtype.mlx()).expect("a cast");
        let (codes, scales, biases) = ops::quantize(&dense, group, bits)
            .unwrap_or_else(|e| panic!("{path}: {bits} bits, groups of {group}: {e}"));
        let shape = |a: &Array| a.shape().iter().map(|n| *n as usize).collect::<Vec<_>>();
        let words = codes.to_vec_cast::<u32>().expect("packed words");
        all.insert(name, Tensor::words(&words, &shape(&codes)));
        for (kind, array) in [("scales", &scales), ("biases", &biases)] {
            all.insert(format!("{path}.{kind}"), Tensor::floats(&host(array), &shape(array), self.dtype));
        }
    }
}

/// Writes the model: config.json, model.safetensors, tokenizer.json, tokenizer_config.json, generation_config.json.
pub fn tiny_model(tiny: &Tiny) -> TempDir {
    assert!(tiny.vocab >= TOKENS, "the tokenizer alone has {TOKENS} tokens");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let tensors = mlx(|| tiny.tensors());
    write_safetensors(&dir.path().join("model.safetensors"), &tensors);
    write_json(&dir.path().join("config.json"), &tiny.config());
    write_json(&dir.path().join("tokenizer.json"), &tokenizer_json());
    write_json(&dir.path().join("tokenizer_config.json"), &tokenizer_config());
    let eos: Vec<usize> = [TOKENS - 1, TOKENS - SPECIAL.len()].to_vec();
    write_json(&dir.path().join("generation_config.json"), &json!({"eos_token_id": eos}));
    dir
}

/// The same model with every packed weight dequantized, all in f32: what the packed one must compute.
pub fn tiny_dense_of(dir: &Path) -> TempDir {
    let out = tempfile::tempdir().expect("a temporary directory");
    let mut config = read_json(&dir.join("config.json"));
    let map = config.as_object_mut().expect("an object");
    map.remove("quantization");
    map.remove("quantization_config");
    map.insert("torch_dtype".into(), Dtype::F32.config_name().into());
    write_json(&out.path().join("config.json"), &config);
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        std::fs::copy(dir.join(name), out.path().join(name)).expect("a copied file");
    }
    write_safetensors(&out.path().join("model.safetensors"), &mlx(|| dense_tensors(dir)));
    out
}

/// The tensors of a tiny model as f32, packed ones dequantized.
pub(crate) fn dense_tensors(dir: &Path) -> Tensors {
    let config = read_json(&dir.join("config.json"));
    let stored = read_safetensors(&dir.join("model.safetensors"));
    let mut all = Tensors::new();
    for (name, tensor) in &stored {
        if name.ends_with(".scales") || name.ends_with(".biases") {
            continue;
        }
        let path = name.strip_suffix(".weight").unwrap_or(name);
        let values = match stored.get(&format!("{path}.scales")) {
            None => (tensor.to_f32(), tensor.shape.clone()),
            Some(scales) => {
                let block = &config["quantization"];
                let number = |key: &str| block[key].as_i64().expect("a quantization block") as i32;
                let mode = block["mode"].as_str().expect("a mode");
                if mode != "affine" {
                    let values = floats::unpack(&tensor.to_words(), &scales.data, mode);
                    let shape = [tensor.shape[0], values.len() / tensor.shape[0]];
                    all.insert(name.clone(), Tensor::floats(&values, &shape, Dtype::F32));
                    continue;
                }
                let biases = stored[&format!("{path}.biases")].to_array();
                let (group, bits) = (number("group_size"), number("bits"));
                let dense = ops::dequantize(tensor.to_array(), scales.to_array(), Some(&biases), group, bits);
                let dense = dense.expect("packed weights of the block's width");
                (host(&dense), dense.shape().iter().map(|n| *n as usize).collect())
            }
        };
        all.insert(name.clone(), Tensor::floats(&values.0, &values.1, Dtype::F32));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_models_are_near_their_dense_form_at_every_width() {
        let dense = mlx(|| Tiny::new(Family::Llama).tensors());
        let mut last = f32::INFINITY;
        for bits in [2, 3, 4, 5, 6, 8] {
            let packed = Tiny { packed: Some((bits, 32)), dtype: Dtype::F16, ..Tiny::new(Family::Llama) };
            let dir = tiny_model(&packed);
            let twin = tiny_dense_of(dir.path());
            let back = read_safetensors(&twin.path().join("model.safetensors"));
            assert_eq!(back.keys().collect::<Vec<_>>(), dense.keys().collect::<Vec<_>>());
            let name = "model.layers.1.mlp.down_proj.weight";
            let gap = |(a, b): (&f32, &f32)| (a - b).abs();
            let (a, b) = (dense[name].to_f32(), back[name].to_f32());
            let mean = a.iter().zip(&b).map(gap).sum::<f32>() / a.len() as f32;
            assert!(mean < last, "{bits} bits: mean error {mean}, narrower had {last}");
            last = mean;
        }
        assert!(last < 1e-3);
    }

    #[test]
    fn families_have_their_own_tensors() {
        for family in Family::ALL {
            let tiny = Tiny { tied: false, head_dim: 32, ..Tiny::new(family) };
            let dir = tiny_model(&tiny);
            let names = read_safetensors(&dir.path().join("model.safetensors"));
            assert_eq!(names.contains_key("model.layers.0.self_attn.q_proj.bias"), family == Family::Qwen2);
            assert_eq!(names.contains_key("model.layers.1.self_attn.k_norm.weight"), family == Family::Qwen3);
            assert_eq!(names["lm_head.weight"].shape, [288, 64]);
            assert_eq!(names["model.layers.0.self_attn.q_proj.weight"].shape, [128, 64]);
        }
    }
}
