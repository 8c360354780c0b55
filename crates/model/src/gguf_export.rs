//! A model directory as a GGUF file: the inverse of `gguf`, whose table of names, places and pairs it shares.

use graft_quant::gguf::{ExportParts, Field, Placed};
use graft_quant::{Checkpoint, StoredDtype, Tensor};

use crate::families::{GgufFamily, gguf_names, gguf_of};
use crate::gguf::{ROPE_FACTORS, places};
use crate::load::checked_config;
use crate::{DecoderConfig, Error, Result, RopeScaling, gguf_vocabulary, rope};

/// A model directory in llama.cpp's terms.
#[derive(Debug)]
pub struct GgufExport {
    /// Metadata and tensors.
    pub parts: ExportParts,
    /// What differs in llama.cpp though the file is right.
    pub warnings: Vec<String>,
}

impl GgufExport {
    /// Reads config.json, the tokenizer and the names of the tensors; no weight is read. `name` is the model's, for people.
    ///
    /// # Errors
    /// When the directory is no model that we can run, or llama.cpp has no architecture, scaling of positions or tokenizer
    /// that is the same.
    pub fn new(checkpoint: &Checkpoint, name: &str) -> Result<Self> {
        let config = checked_config(checkpoint)?;
        let family = family(checkpoint, &config)?;
        let vocabulary = gguf_vocabulary::written(checkpoint.dir(), config.vocab as usize)?;
        let mut fields: Vec<(String, Field)> = vec![
            ("general.architecture".into(), Field::Str(family.architecture.into())),
            ("general.type".into(), Field::Str("model".into())),
            ("general.name".into(), Field::Str(name.into())),
        ];
        fields.extend(architecture(&config, family));
        fields.extend(vocabulary.fields);
        let tensors = places(&config, pairs(&config, family)).into_iter().map(|(tensor, place)| {
            let rows = place.paired.then(|| pairs_from_halves(place.shape[0], config.head_dim as usize));
            Placed { source: place.name, name: tensor, rows }
        });
        let tensors = tensors.collect();
        let parts = ExportParts { fields, tensors, extra: factors(&config).into_iter().collect() };
        Ok(Self { parts, warnings: vocabulary.warnings })
    }
}

/// llama.cpp's architecture for a model, if it computes the same.
pub(crate) fn family(checkpoint: &Checkpoint, config: &DecoderConfig) -> Result<GgufFamily> {
    let file = checkpoint.dir().join("config.json");
    let wrong = |field: &str, expected: String, found: String| Error::Config {
        file: file.clone(),
        field: field.into(),
        expected,
        found,
    };
    let family = gguf_of(&config.model_type).ok_or_else(|| {
        let expected = format!("a model that a GGUF file can hold (architectures {})", gguf_names());
        wrong("model_type", expected, config.model_type.clone())
    })?;
    let name = family.architecture;
    if family.square && config.heads * config.head_dim != config.hidden {
        let expected = format!("hidden_size / num_attention_heads, as llama.cpp's {name} has it");
        return Err(wrong("head_dim", expected, config.head_dim.to_string()));
    }
    if config.rope.traditional && !family.pairs {
        let expected = format!("false, as llama.cpp's {name} rotates halves");
        return Err(wrong("rope_traditional", expected, "true".into()));
    }
    if matches!(config.rope.scaling, RopeScaling::Llama3 { .. }) && !family.pairs {
        let expected = format!("default or linear, as llama.cpp's {name} knows no other");
        return Err(wrong("rope_scaling.rope_type", expected, "llama3".into()));
    }
    Ok(family)
}

/// Whether the rows of q and k must change their order. Where Hugging Face's are in pairs already, they stay.
pub(crate) fn pairs(config: &DecoderConfig, family: GgufFamily) -> bool {
    family.pairs && !config.rope.traditional
}

/// The keys of the architecture.
fn architecture(c: &DecoderConfig, family: GgufFamily) -> Vec<(String, Field)> {
    let mut fields: Vec<(&str, Field)> = [
        ("block_count", c.layers),
        ("context_length", c.max_positions),
        ("embedding_length", c.hidden),
        ("feed_forward_length", c.feed_forward),
        ("attention.head_count", c.heads),
        ("attention.head_count_kv", c.kv_heads),
        ("attention.key_length", c.head_dim),
        ("attention.value_length", c.head_dim),
        ("rope.dimension_count", c.head_dim),
        ("vocab_size", c.vocab),
    ]
    .map(|(key, n)| (key, Field::U32(n as u32)))
    .into();
    fields.push(("attention.layer_norm_rms_epsilon", Field::F32(c.norm_eps)));
    fields.push(("rope.freq_base", Field::F32(c.rope.base)));
    match c.rope.scaling {
        RopeScaling::Default => {}
        RopeScaling::Linear { factor } => {
            fields.push(("rope.scaling.type", Field::Str("linear".into())));
            fields.push(("rope.scaling.factor", Field::F32(factor)));
        }
        // The factors are a tensor; import needs this number to know their formula again.
        RopeScaling::Llama3 { original, .. } => {
            fields.push(("rope.scaling.original_context_length", Field::U32(original as u32)));
        }
    }
    fields.into_iter().map(|(key, value)| (format!("{}.{key}", family.architecture), value)).collect()
}

/// Llama 3's scaling as llama.cpp takes it: by how much each frequency is divided.
fn factors(config: &DecoderConfig) -> Option<(String, Tensor)> {
    if !matches!(config.rope.scaling, RopeScaling::Llama3 { .. }) {
        return None;
    }
    let mut plain = config.clone();
    plain.rope.scaling = RopeScaling::Default;
    let (before, after) = (rope::frequencies(&plain), rope::frequencies(config));
    let data = before.iter().zip(&after).flat_map(|(before, after)| (before / after).to_le_bytes());
    let tensor = Tensor { dtype: StoredDtype::F32, shape: vec![before.len()], data: data.collect() };
    Some((ROPE_FACTORS.to_owned(), tensor))
}

/// Row i of the file is row `[i]` of ours: `gguf::halves_from_pairs`, turned round.
pub(crate) fn pairs_from_halves(rows: usize, head_dim: usize) -> Vec<usize> {
    let from = |row: usize| {
        let (head, at) = (row / head_dim * head_dim, row % head_dim);
        head + at % 2 * (head_dim / 2) + at / 2
    };
    (0..rows).map(from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::halves_from_pairs;

    #[test]
    fn pairs_and_halves_undo_each_other() {
        for (rows, head_dim) in [(8, 4), (12, 6), (64, 16), (2, 2)] {
            let there = pairs_from_halves(rows, head_dim);
            let back = halves_from_pairs(rows, head_dim);
            assert!((0..rows).all(|row| there[back[row]] == row), "{rows} rows, heads of {head_dim}");
        }
    }
}
