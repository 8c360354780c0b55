//! An adapter as llama.cpp's LoRA file: `<tensor>.lora_a` (R, in) and `.lora_b` (out, R), with the rows of B in the order that
//! the file of the base has them, and one alpha for all.
//!
//! llama.cpp takes alpha / R as the scale. alpha is that of most modules; where another scale is needed, B takes the rest of
//! it: exactly where the rest is a power of two, else rounded once in f32. An embedding keeps A (V, R) as it is and has B as
//! (E, R).

use std::collections::BTreeMap;
use std::path::Path;

use graft_adapters::{Adapter, AdapterSet, Error as AdapterError, FineTuneType, Kind};
use graft_ops::Array;
use graft_quant::gguf::{Field, GgufWriter, Kind as Stored, Planned};
use graft_quant::{Checkpoint, Tensor};

use crate::gguf::module;
use crate::gguf_export::{family, pairs, pairs_from_halves};
use crate::load::checked_config;
use crate::{PartKind, Result, parts};

/// An adapter in llama.cpp's terms.
#[derive(Debug)]
pub struct GgufAdapter {
    /// Metadata; whoever writes the file may add to it.
    pub fields: Vec<(String, Field)>,
    tensors: Vec<(String, Tensor)>,
    /// llama.cpp's alpha.
    pub alpha: f32,
    /// Modules whose scale alpha does not give, so that B has been multiplied by what is missing.
    pub folded: usize,
}

impl GgufAdapter {
    /// The adapter of `dir` for a base; `name` is its own, for people.
    ///
    /// # Errors
    /// When it does not fit the base, or llama.cpp's form cannot hold it: DoRA, whole weights, a tied embedding.
    pub fn new(checkpoint: &Checkpoint, set: &AdapterSet, dir: &Path, name: &str) -> Result<Self> {
        let config = checked_config(checkpoint)?;
        let family = family(checkpoint, &config)?;
        refuse(set, dir, config.tied)?;
        let modules: BTreeMap<String, ((i32, i32), Kind)> = parts(&config)
            .into_iter()
            .filter_map(|part| match part.kind {
                PartKind::Linear { .. } => Some((part.path, (part.shape, Kind::Linear))),
                PartKind::Embedding => Some((part.path, (part.shape, Kind::Embedding))),
                PartKind::Norm => None,
            })
            .collect();
        set.check(dir, |path| modules.get(path).copied())?;
        let alpha = alpha(set.adapters.values());
        let (mut tensors, mut folded) = (Vec::new(), 0);
        for (path, adapter) in &set.adapters {
            let Some((shape, kind)) = modules.get(path) else { continue };
            let rest = rest(adapter, alpha);
            folded += usize::from(rest != 1.0);
            let b =
                if rest == 1.0 { adapter.b.clone() } else { adapter.b.multiply(Array::from_f32(rest))? };
            let turned = |array: &Array| -> Result<Array> { Ok(array.transpose()?.contiguous()?) };
            let (a, mut b) = match kind {
                Kind::Linear => (turned(&adapter.a)?, turned(&b)?),
                Kind::Embedding => (adapter.a.clone(), turned(&b)?),
            };
            let module = module(path);
            if pairs(&config, family) && (module.ends_with("attn_q") || module.ends_with("attn_k")) {
                let rows = pairs_from_halves(shape.0 as usize, config.head_dim as usize);
                let rows: Vec<i32> = rows.into_iter().map(|row| row as i32).collect();
                b = b.take_axis(Array::from_slice(&rows, &[shape.0]), 0)?;
            }
            tensors.push((format!("{module}.weight.lora_a"), Tensor::from_array(&a)?));
            tensors.push((format!("{module}.weight.lora_b"), Tensor::from_array(&b)?));
        }
        let text = |text: &str| Field::Str(text.into());
        let fields = [
            ("general.architecture", text(family.architecture)),
            ("general.type", text("adapter")),
            ("general.name", text(name)),
            ("general.file_type", Field::U32(0)),
            ("adapter.type", text("lora")),
            ("adapter.lora.alpha", Field::F32(alpha)),
        ];
        let fields = fields.map(|(key, value)| (key.to_owned(), value)).into();
        Ok(Self { fields, tensors, alpha, folded })
    }

    /// Modules that it acts on.
    pub fn modules(&self) -> usize {
        self.tensors.len() / 2
    }

    /// Writes the file, whole or not at all, with f32 tensors, as adapters are trained. Its bytes.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &Path) -> Result<u64> {
        let planned = |(name, tensor): &(String, Tensor)| (name.clone(), tensor.shape.clone(), Stored::F32);
        let plan: Vec<Planned> = self.tensors.iter().map(planned).collect();
        let mut writer = GgufWriter::create(path, &self.fields, &plan)?;
        for (_, tensor) in &self.tensors {
            writer.add(&tensor.data)?;
        }
        Ok(writer.finish()?)
    }
}

/// What llama.cpp's form has no place for.
fn refuse(set: &AdapterSet, dir: &Path, tied: bool) -> Result<()> {
    let cannot = |what: &str, why: &str| {
        let (file, what) = (dir.to_path_buf(), what.to_owned());
        let why = format!("{why}; export the fused model instead (graft fuse --export-gguf)");
        Err(AdapterError::Unsupported { file, what, why }.into())
    };
    if set.config.fine_tune_type == FineTuneType::Full {
        return cannot(
            "a full fine-tune",
            "it holds whole weights, and llama.cpp's adapters low-rank updates",
        );
    }
    if set.adapters.values().any(|adapter| adapter.magnitude.is_some()) {
        return cannot("DoRA's magnitude", "llama.cpp's adapters are LoRA, without a magnitude of rows");
    }
    if tied && set.adapters.contains_key("model.embed_tokens") {
        let why = "llama.cpp cannot apply an update to an embedding that is the output head, too";
        return cannot("the update of model.embed_tokens", why);
    }
    Ok(())
}

/// The alpha that gives most modules their scale.
fn alpha<'a>(adapters: impl Iterator<Item = &'a Adapter>) -> f32 {
    let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
    for product in adapters.map(|adapter| adapter.scale * adapter.rank() as f32) {
        // llama.cpp takes 0 for none.
        if product != 0.0 {
            *counts.entry(product.to_bits()).or_default() += 1;
        }
    }
    counts.into_iter().max_by_key(|(_, count)| *count).map_or(1.0, |(bits, _)| f32::from_bits(bits))
}

/// What B must be multiplied by so that alpha / R gives the adapter's scale; 1 where it does up to f32's rounding.
fn rest(adapter: &Adapter, alpha: f32) -> f32 {
    let given = f64::from(alpha / adapter.rank() as f32);
    let rest = f64::from(adapter.scale) / given;
    if (rest - 1.0).abs() < f64::from(f32::EPSILON) { 1.0 } else { rest as f32 }
}
