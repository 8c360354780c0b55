//! GGUF files made byte by byte, and a tiny model as llama.cpp's converter would write it.

use serde_json::Value;

use crate::files::Tensor;
use crate::tokenizer::{CHAT_TEMPLATE, SPECIAL, tokenizer_json};
use crate::{Dtype, Family, Tiny, mlx};

/// Numbers of the types of values and tensors.
const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const BOOL: u32 = 7;
const TEXT: u32 = 8;
const ARRAY: u32 = 9;
const TENSOR_F32: u32 = 0;
const TENSOR_F16: u32 = 1;
const TENSOR_Q4_1: u32 = 3;
const TENSOR_BF16: u32 = 30;

/// A file in the making.
#[derive(Debug, Default, Clone)]
pub struct GgufMaker {
    values: Vec<(String, u32, Vec<u8>)>,
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

/// A text as the format has it: its length, then its bytes.
pub fn gguf_text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

impl GgufMaker {
    /// Appends a value of any type, also one that is wrong or stands there already.
    pub fn value(&mut self, key: &str, kind: u32, bytes: &[u8]) {
        self.values.push((key.to_owned(), kind, bytes.to_vec()));
    }

    /// Removes a value or a tensor.
    pub fn remove(&mut self, name: &str) {
        self.values.retain(|value| value.0 != name);
        self.tensors.retain(|tensor| tensor.0 != name);
    }

    fn set(&mut self, key: &str, kind: u32, bytes: &[u8]) {
        self.remove(key);
        self.value(key, kind, bytes);
    }

    fn array(&mut self, key: &str, kind: u32, items: impl ExactSizeIterator<Item = Vec<u8>>) {
        let mut bytes = [&kind.to_le_bytes()[..], &(items.len() as u64).to_le_bytes()].concat();
        bytes.extend(items.flatten());
        self.set(key, ARRAY, &bytes);
    }

    /// Sets a whole number.
    pub fn u32(&mut self, key: &str, value: u32) {
        self.set(key, U32, &value.to_le_bytes());
    }

    /// Sets a float.
    pub fn f32(&mut self, key: &str, value: f32) {
        self.set(key, F32, &value.to_le_bytes());
    }

    /// Sets a boolean.
    pub fn bool(&mut self, key: &str, value: bool) {
        self.set(key, BOOL, &[value.into()]);
    }

    /// Sets a text.
    pub fn text(&mut self, key: &str, value: &str) {
        self.set(key, TEXT, &gguf_text(value));
    }

    /// Sets an array of texts.
    pub fn texts(&mut self, key: &str, values: &[&str]) {
        self.array(key, TEXT, values.iter().map(|text| gguf_text(text)));
    }

    /// Sets an array of whole numbers.
    pub fn i32s(&mut self, key: &str, values: &[i32]) {
        self.array(key, I32, values.iter().map(|n| n.to_le_bytes().to_vec()));
    }

    /// Sets an array of floats.
    pub fn f32s(&mut self, key: &str, values: &[f32]) {
        self.array(key, F32, values.iter().map(|x| x.to_le_bytes().to_vec()));
    }

    /// Appends a tensor of the type with this number; `shape` row-major, as a reader shall return it.
    pub fn tensor(&mut self, name: &str, shape: &[u64], kind: u32, bytes: &[u8]) {
        self.tensors.push((name.to_owned(), shape.to_vec(), kind, bytes.to_vec()));
    }

    /// The file.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3_u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.values.len() as u64).to_le_bytes());
        for (key, kind, bytes) in &self.values {
            out.extend(gguf_text(key));
            out.extend(kind.to_le_bytes());
            out.extend(bytes);
        }
        let mut data = Vec::new();
        for (name, shape, kind, bytes) in &self.tensors {
            data.resize(data.len().next_multiple_of(32), 0);
            out.extend(gguf_text(name));
            out.extend((shape.len() as u32).to_le_bytes());
            for dim in shape.iter().rev() {
                out.extend(dim.to_le_bytes());
            }
            out.extend(kind.to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        out
    }
}

/// A tiny model as a GGUF file: the weights of [`crate::tiny_model`], exactly. Packed ones must have 4 bits, groups of 32
/// and [`Dtype::F16`], which is Q4_1; vectors are f32, as llama.cpp keeps them.
pub fn tiny_gguf(tiny: &Tiny) -> GgufMaker {
    let mut maker = GgufMaker::default();
    let pairs = matches!(tiny.family, Family::Llama | Family::Mistral);
    let architecture = if pairs { "llama" } else { tiny.family.name() };
    maker.text("general.architecture", architecture);
    let key = |name: &str| format!("{architecture}.{name}");
    for (name, n) in [
        ("block_count", tiny.layers),
        ("context_length", 2048),
        ("embedding_length", tiny.hidden),
        ("feed_forward_length", tiny.ffn),
        ("attention.head_count", tiny.heads),
        ("attention.head_count_kv", tiny.kv_heads),
        ("attention.key_length", tiny.head_dim),
        ("attention.value_length", tiny.head_dim),
    ] {
        maker.u32(&key(name), n as u32);
    }
    maker.f32(&key("attention.layer_norm_rms_epsilon"), 1e-5);
    maker.f32(&key("rope.freq_base"), tiny.rope_theta);
    add_tokenizer(&mut maker);
    let tensors = mlx(|| tiny.tensors());
    for (name, tensor) in &tensors {
        let Some((path, part)) = name.rsplit_once('.').filter(|(_, part)| ["weight", "bias"].contains(part))
        else {
            continue;
        };
        let packed = ["scales", "biases"].map(|part| tensors.get(&format!("{path}.{part}")));
        let (kind, shape, mut data) = match packed {
            [Some(scales), Some(biases)] if part == "weight" => {
                (TENSOR_Q4_1, [scales.shape[0], tensor.shape[1] * 8].to_vec(), q4_1(tensor, scales, biases))
            }
            _ => plain(tensor, tiny.dtype),
        };
        if pairs && ["q_proj", "k_proj"].iter().any(|proj| path.ends_with(proj)) {
            data = halves_to_pairs(&data, shape[0], tiny.head_dim);
        }
        let shape: Vec<u64> = shape.iter().map(|n| *n as u64).collect();
        maker.tensor(&format!("{}.{part}", llama_cpp_name(path)), &shape, kind, &data);
    }
    maker
}

/// The tiny tokenizer's keys.
fn add_tokenizer(maker: &mut GgufMaker) {
    let json = tokenizer_json();
    let vocab = json["model"]["vocab"].as_object().expect("a map of tokens");
    let tokens: Vec<&str> = vocab.keys().map(String::as_str).chain(SPECIAL).collect();
    let kinds: Vec<i32> = (0..tokens.len()).map(|id| if id < vocab.len() { 1 } else { 3 }).collect();
    let merges = json["model"]["merges"].as_array().expect("a list of pairs").iter();
    let part = |pair: &Value, i: usize| pair[i].as_str().expect("a token").to_owned();
    let merges: Vec<String> = merges.map(|pair| format!("{} {}", part(pair, 0), part(pair, 1))).collect();
    maker.text("tokenizer.ggml.model", "gpt2");
    maker.text("tokenizer.ggml.pre", "gpt-2");
    maker.texts("tokenizer.ggml.tokens", &tokens);
    maker.i32s("tokenizer.ggml.token_type", &kinds);
    maker.texts("tokenizer.ggml.merges", &merges.iter().map(String::as_str).collect::<Vec<_>>());
    maker.u32("tokenizer.ggml.eos_token_id", tokens.len() as u32 - 1);
    maker.u32("tokenizer.ggml.padding_token_id", vocab.len() as u32);
    maker.text("tokenizer.chat_template", CHAT_TEMPLATE);
}

/// Type, shape and bytes of a tensor that is not packed.
fn plain(tensor: &Tensor, dtype: Dtype) -> (u32, Vec<usize>, Vec<u8>) {
    if tensor.shape.len() == 1 {
        let wide = Tensor::floats(&tensor.to_f32(), &tensor.shape, Dtype::F32);
        return (TENSOR_F32, wide.shape, wide.data);
    }
    let kind = match dtype {
        Dtype::F32 => TENSOR_F32,
        Dtype::F16 => TENSOR_F16,
        Dtype::Bf16 => TENSOR_BF16,
    };
    (kind, tensor.shape.clone(), tensor.data.clone())
}

/// MLX's words, eight codes each with the lowest first, as blocks: scale, minimum, and 16 bytes whose low halves are the
/// first 16 codes and whose high halves the others.
fn q4_1(words: &Tensor, scales: &Tensor, biases: &Tensor) -> Vec<u8> {
    let codes: Vec<u8> = words.data.iter().flat_map(|byte| [byte & 15, byte >> 4]).collect();
    let halves = scales.data.chunks_exact(2).zip(biases.data.chunks_exact(2));
    let block = |((scale, bias), codes): ((&[u8], &[u8]), &[u8])| {
        let (low, high) = codes.split_at(16);
        let codes = low.iter().zip(high).map(|(low, high)| low | high << 4);
        scale.iter().chain(bias).copied().chain(codes).collect::<Vec<u8>>()
    };
    halves.zip(codes.chunks_exact(32)).flat_map(block).collect()
}

/// llama.cpp's order of the rows of q and k: those that rotate together side by side.
fn halves_to_pairs(data: &[u8], rows: usize, head_dim: usize) -> Vec<u8> {
    let width = data.len() / rows;
    let mut out = Vec::with_capacity(data.len());
    for head in data.chunks_exact(head_dim * width) {
        let (first, second) = head.split_at(head.len() / 2);
        for (a, b) in first.chunks_exact(width).zip(second.chunks_exact(width)) {
            out.extend_from_slice(a);
            out.extend_from_slice(b);
        }
    }
    out
}

fn llama_cpp_name(path: &str) -> String {
    let mut name = path.to_owned();
    for (ours, theirs) in [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ] {
        name = name.replace(ours, theirs);
    }
    name
}
