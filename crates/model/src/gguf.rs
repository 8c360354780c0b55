//! A GGUF file as a model directory: config.json, and which tensor of the file is which of the checkpoint.
//!
//! The container is quant's; what llama.cpp's keys and names mean stands here, and the tokenizer in `gguf_tokenizer`.
//! Import is as strict as loading: every tensor of the network must be there, and none besides.

use std::collections::BTreeMap;
use std::path::Path;

use graft_quant::gguf::{Block, Gguf, Value as Meta};
use serde_json::{Map, Value, json};

use crate::families::{GgufFamily, gguf_family, gguf_names};
use crate::{DecoderConfig, Error, PartKind, Result, config_from_map, gguf_tokenizer, parts, rope};

/// llama.cpp's names of the modules outside the blocks, and of those within `blk.N`.
const MODULES: [(&str, &str); 3] =
    [("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];
const BLOCK_MODULES: [(&str, &str); 11] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];
/// Factors (D/2,) by which the rotary frequencies are divided; config.json says them by their formula.
pub(crate) const ROPE_FACTORS: &str = "rope_freqs.weight";
/// The factors are made in f32 by others; a wrong formula is off by far more.
const ROPE_TOLERANCE: f32 = 1e-4;

/// What a GGUF file becomes.
#[derive(Debug)]
pub struct GgufImport {
    /// config.json, but for the quantization and the type of the floats, which conversion decides.
    pub config: Map<String, Value>,
    /// tokenizer.json, tokenizer_config.json and generation_config.json.
    pub files: Vec<(String, Vec<u8>)>,
    /// For each tensor its name in a checkpoint and, where the file has its rows in another order, which row of the file
    /// each row is. A tensor that config.json speaks for is not among them.
    pub names: BTreeMap<String, (String, Option<Vec<usize>>)>,
}

/// Where a tensor of the file belongs.
pub(crate) struct Place {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    /// Its rows are in pairs in the file.
    pub(crate) paired: bool,
}

impl GgufImport {
    /// Reads what surrounds the tensors, and compares the tensors with it.
    ///
    /// # Errors
    /// When the architecture, its scaling of positions or the tokenizer is one that we do not know, metadata is missing
    /// or contradicts itself, or the tensors are not those of the architecture.
    pub fn new(gguf: &Gguf) -> Result<Self> {
        let keys = Keys::new(gguf)?;
        let family = gguf_family(keys.architecture).ok_or_else(|| {
            keys.wrong("general.architecture", &format!("one of {}", gguf_names()), keys.architecture)
        })?;
        let (config, decoder) = config(&keys, family)?;
        let places = places(&decoder, family.pairs);
        verify(gguf, &places)?;
        let files = gguf_tokenizer::files(&keys, decoder.vocab as usize)?;
        let rows = |place: &Place| halves_from_pairs(place.shape[0], decoder.head_dim as usize);
        let named = |(tensor, place): (String, Place)| {
            let rows = place.paired.then(|| rows(&place));
            (tensor, (place.name, rows))
        };
        Ok(Self { config, files, names: places.into_iter().map(named).collect() })
    }
}

/// The metadata, with errors that name the file and the key.
pub(crate) struct Keys<'a> {
    gguf: &'a Gguf,
    architecture: &'a str,
}

impl<'a> Keys<'a> {
    fn new(gguf: &'a Gguf) -> Result<Self> {
        let mut keys = Self { gguf, architecture: "" };
        if let Some(kind) = keys.get("general.type").and_then(Meta::as_str).filter(|kind| *kind != "model") {
            return Err(keys.wrong("general.type", "model", kind));
        }
        if let Some(count) = keys.whole("split.count")?.filter(|count| *count > 1) {
            let expected = "one file: join the parts first (llama-gguf-split --merge)";
            return Err(keys.wrong("split.count", expected, count));
        }
        keys.architecture = keys.text("general.architecture")?;
        Ok(keys)
    }

    pub(crate) fn file(&self) -> &Path {
        self.gguf.path()
    }

    pub(crate) fn wrong(&self, key: &str, expected: &str, found: impl std::fmt::Display) -> Error {
        Error::Import {
            file: self.file().to_path_buf(),
            key: self.full(key),
            expected: expected.to_owned(),
            found: found.to_string(),
        }
    }

    /// The value of a key; `~.x` is a key of the architecture.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Meta> {
        self.gguf.metadata.get(&self.full(key))
    }

    fn full(&self, key: &str) -> String {
        key.strip_prefix('~').map_or_else(|| key.to_owned(), |rest| format!("{}{rest}", self.architecture))
    }

    /// A key's value as what it should be; none where the file does not have it.
    pub(crate) fn optional<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Meta) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| {
            // An array may have a hundred thousand values.
            let found = value.as_array().map(|all| format!("an array of {} values", all.len()));
            self.wrong(key, expected, found.unwrap_or_else(|| format!("{value:?}")))
        })
    }

    /// A key's value, which must be there.
    pub(crate) fn required<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Meta) -> Option<T>,
    ) -> Result<T> {
        self.optional(key, expected, read)?.ok_or_else(|| self.wrong(key, expected, "nothing"))
    }

    pub(crate) fn text(&self, key: &str) -> Result<&'a str> {
        self.required(key, "a text", Meta::as_str)
    }

    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.optional(key, "true or false", Meta::as_bool)
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.optional(key, "a number", Meta::as_f64)
    }

    pub(crate) fn whole(&self, key: &str) -> Result<Option<u64>> {
        self.optional(key, "a whole number", Meta::as_u64)
    }

    /// A size, which must be there.
    fn size(&self, key: &str) -> Result<u64> {
        self.required(key, "a whole number", Meta::as_u64)
    }
}

/// config.json by the metadata and by which tensors there are.
fn config(keys: &Keys, family: GgufFamily) -> Result<(Map<String, Value>, DecoderConfig)> {
    let has = |tensor: &str| keys.gguf.tensors.contains_key(tensor);
    if let Some(experts) = keys.whole("~.expert_count")?.filter(|experts| *experts > 0) {
        return Err(keys.wrong("~.expert_count", "a model without experts", experts));
    }
    let (heads, context) = (keys.size("~.attention.head_count")?, keys.size("~.context_length")?);
    let hidden = keys.size("~.embedding_length")?;
    let head_dim = keys.whole("~.attention.key_length")?.or(hidden.checked_div(heads)).unwrap_or(0);
    for key in ["~.attention.value_length", "~.rope.dimension_count"] {
        if let Some(other) = keys.whole(key)?.filter(|other| *other != head_dim) {
            return Err(keys.wrong(key, &format!("the size of a head, {head_dim}"), other));
        }
    }
    let window = keys.whole("~.attention.sliding_window")?.filter(|window| (1..context).contains(window));
    if let Some(window) = window {
        let expected = format!("attention over the whole context of {context} tokens");
        return Err(keys.wrong("~.attention.sliding_window", &expected, window));
    }
    let embedding = keys.gguf.tensors.get("token_embd.weight").and_then(|info| info.shape.first());
    let vocab = *embedding.ok_or_else(|| {
        keys.wrong("token_embd.weight", "the embedding", "no such tensor: the file holds no model")
    })?;
    let blocks = keys.size("~.block_count")?;
    if blocks > keys.gguf.tensors.len() as u64 {
        let expected = format!("at most as many blocks as there are tensors ({})", keys.gguf.tensors.len());
        return Err(keys.wrong("~.block_count", &expected, blocks));
    }
    let fields = [
        ("architectures", json!([family.class])),
        ("model_type", family.architecture.into()),
        ("hidden_act", "silu".into()),
        ("hidden_size", hidden.into()),
        ("num_hidden_layers", blocks.into()),
        ("num_attention_heads", heads.into()),
        ("num_key_value_heads", keys.whole("~.attention.head_count_kv")?.unwrap_or(heads).into()),
        ("head_dim", head_dim.into()),
        ("intermediate_size", keys.size("~.feed_forward_length")?.into()),
        ("vocab_size", vocab.into()),
        ("max_position_embeddings", context.into()),
        (
            "rms_norm_eps",
            short(keys.required("~.attention.layer_norm_rms_epsilon", "a number", Meta::as_f64)?).into(),
        ),
        ("rope_theta", short(keys.number("~.rope.freq_base")?.unwrap_or(10_000.0)).into()),
        ("tie_word_embeddings", (!has("output.weight")).into()),
        ("attention_bias", has("blk.0.attn_output.bias").into()),
        ("mlp_bias", has("blk.0.ffn_up.bias").into()),
    ];
    let mut config = Map::from_iter(fields.map(|(field, value)| (field.to_owned(), value)));
    for (field, key) in [("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")] {
        if let Some(id) = keys.whole(&format!("tokenizer.ggml.{key}_token_id"))? {
            config.insert(field.into(), id.into());
        }
    }
    if let Some(factor) = linear_factor(keys)? {
        let scaling = json!({"rope_type": "linear", "type": "linear", "factor": factor});
        config.insert("rope_scaling".into(), scaling);
    }
    let plain = config_from_map(keys.file(), &config)?;
    if !has(ROPE_FACTORS) {
        return Ok((config, plain));
    }
    if config.contains_key("rope_scaling") {
        return Err(keys.wrong(ROPE_FACTORS, "one way to scale positions", "a linear factor as well"));
    }
    llama3(keys, config, &plain)
}

/// A number that the file has in 32 bits, by its shortest digits: 1e-5 instead of 9.999999747378752e-6.
fn short(x: f64) -> f64 {
    let narrow = x as f32;
    if f64::from(narrow) == x { narrow.to_string().parse().unwrap_or(x) } else { x }
}

/// The factor of linear scaling, where there is one.
fn linear_factor(keys: &Keys) -> Result<Option<f64>> {
    let kind = keys.optional("~.rope.scaling.type", "a text", Meta::as_str)?.unwrap_or("linear");
    let (new, old) = (keys.number("~.rope.scaling.factor")?, keys.number("~.rope.scale_linear")?);
    match (kind, new.or(old).map(short)) {
        // llama.cpp takes 0 for none.
        ("none", _) | ("linear", None | Some(0.0 | 1.0)) => Ok(None),
        ("linear", factor) => Ok(factor),
        (other, _) => {
            let expected = format!("none, linear, or Llama 3's scaling as the tensor {ROPE_FACTORS}");
            Err(keys.wrong("~.rope.scaling.type", &expected, other))
        }
    }
}

/// Llama 3's scaling, of which the file holds only what it comes to: one factor for each frequency.
fn llama3(
    keys: &Keys,
    mut config: Map<String, Value>,
    plain: &DecoderConfig,
) -> Result<(Map<String, Value>, DecoderConfig)> {
    let info = &keys.gguf.tensors[ROPE_FACTORS];
    let Block::Dense(tensor) = keys.gguf.read(info, None)? else {
        return Err(keys.wrong(ROPE_FACTORS, "floats", info.kind));
    };
    let factors = tensor.to_f32()?;
    if factors.iter().all(|factor| *factor == 1.0) && factors.len() == plain.head_dim as usize / 2 {
        return Ok((config, plain.clone()));
    }
    // The factor itself is that of the longest wave; the other numbers are the same in every model that has them.
    let factor = factors.iter().fold(1.0_f32, |a, b| a.max(*b));
    let original = keys.whole("~.rope.scaling.original_context_length")?.unwrap_or(8192);
    let scaling = json!({
        "rope_type": "llama3", "factor": short(factor.into()), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    });
    config.insert("rope_scaling".into(), scaling);
    let scaled = config_from_map(keys.file(), &config)?;
    let (before, after) = (rope::frequencies(plain), rope::frequencies(&scaled));
    let fits = |((before, after), factor): ((&f32, &f32), &f32)| {
        (before / after - factor).abs() <= ROPE_TOLERANCE * factor.abs()
    };
    if factors.len() != before.len() || !before.iter().zip(&after).zip(&factors).all(fits) {
        let expected = format!(
            "{} factors of Llama 3's formula (low 1, high 4, original context {original})",
            before.len()
        );
        return Err(keys.wrong(ROPE_FACTORS, &expected, format!("{} others, up to {factor}", factors.len())));
    }
    Ok((config, scaled))
}

/// Every tensor that the file should have, by llama.cpp's name. `pairs`: the rows of q and k are in pairs.
pub(crate) fn places(config: &DecoderConfig, pairs: bool) -> BTreeMap<String, Place> {
    let mut places = BTreeMap::new();
    for part in parts(config) {
        let module = module(&part.path);
        let (out, inputs) = (part.shape.0 as usize, part.shape.1 as usize);
        let paired = pairs && (module.ends_with("attn_q") || module.ends_with("attn_k"));
        let mut add = |suffix: &str, shape: Vec<usize>| {
            let place = Place { name: format!("{}.{suffix}", part.path), shape, paired };
            places.insert(format!("{module}.{suffix}"), place);
        };
        let vector = part.kind == PartKind::Norm;
        add("weight", if vector { vec![out] } else { vec![out, inputs] });
        if part.kind == (PartKind::Linear { bias: true }) {
            add("bias", vec![out]);
        }
    }
    places
}

/// llama.cpp's name of a module. One that has none keeps its own, and is then missed in the file.
pub(crate) fn module(path: &str) -> String {
    let theirs = |table: &[(&str, &'static str)], ours: &str| {
        table.iter().find(|(name, _)| *name == ours).map(|(_, theirs)| *theirs)
    };
    let in_block = || {
        let (layer, rest) = path.strip_prefix("model.layers.")?.split_once('.')?;
        Some(format!("blk.{layer}.{}", theirs(&BLOCK_MODULES, rest)?))
    };
    theirs(&MODULES, path).map(str::to_owned).or_else(in_block).unwrap_or_else(|| path.to_owned())
}

/// For rows that rotate in pairs (i, i + d/2) of each head of d: Hugging Face has all first members, then all second
/// ones; llama.cpp has the members of a pair side by side. Row i of ours is row `[i]` of the file.
pub(crate) fn halves_from_pairs(rows: usize, head_dim: usize) -> Vec<usize> {
    let from = |row: usize| {
        let (head, at) = (row / head_dim * head_dim, row % head_dim);
        let (half, pair) = (at / (head_dim / 2), at % (head_dim / 2));
        head + 2 * pair + half
    };
    (0..rows).map(from).collect()
}

/// Compares what the file should have with what it has.
fn verify(gguf: &Gguf, places: &BTreeMap<String, Place>) -> Result<()> {
    let mut problems = Vec::new();
    for (name, place) in places {
        match gguf.tensors.get(name) {
            None => problems.push(format!("{name}: missing")),
            Some(info) if info.shape != place.shape => {
                problems.push(format!("{name}: expected shape {:?}, found {:?}", place.shape, info.shape));
            }
            Some(_) => {}
        }
    }
    for name in gguf.tensors.keys() {
        if !places.contains_key(name) && name != ROPE_FACTORS {
            problems.push(format!("{name}: the architecture has no such tensor"));
        }
    }
    if problems.is_empty() {
        Ok(())
    } else {
        Err(Error::Tensors { file: gguf.path().to_path_buf(), problems })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_come_apart_into_halves() {
        assert_eq!(halves_from_pairs(8, 4), [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(halves_from_pairs(6, 6), [0, 2, 4, 1, 3, 5]);
    }

    #[test]
    fn numbers_of_32_bits_have_their_own_digits() {
        assert_eq!(short(f64::from(1e-5_f32)), 1e-5);
        assert_eq!(short(1e6), 1e6);
        assert_eq!(short(0.1), 0.1);
    }
}
