//! What several commands need: a model with its tokenizer and template, an adapter on it, the data of a run.

use crate::hub::{self, What};
use anyhow::{Context, Result, bail};
use graft_adapters::{AdapterSet, Fingerprint};
use graft_model::{ChatTemplate, Model, Tokenizer};
use graft_ops::Dtype;
use graft_quant::Checkpoint;
use graft_train::{ModelEncoder, OwnedRoute};
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// A model directory, open.
pub(crate) struct Loaded {
    pub(crate) dir: PathBuf,
    pub(crate) base: Fingerprint,
    pub(crate) model: Rc<Model>,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) template: Option<ChatTemplate>,
}

impl Loaded {
    /// Opens the model behind a command's argument.
    pub(crate) fn open(argument: &str) -> Result<Self> {
        let dir = hub::resolve(argument, What::Model)?;
        let checkpoint = Checkpoint::open(&dir)?;
        let base = Fingerprint::of(&checkpoint, argument);
        let model = Rc::new(Model::from_checkpoint(&checkpoint, compute_dtype(&checkpoint))?);
        let tokenizer = Tokenizer::load(&dir)?;
        let template = if ChatTemplate::exists(&dir)? { Some(ChatTemplate::load(&dir)?) } else { None };
        Ok(Self { dir, base, model, tokenizer, template })
    }

    /// The route of an adapter directory; none, or an empty path, is the base alone.
    pub(crate) fn route(&self, adapter: Option<&str>) -> Result<OwnedRoute> {
        let Some(argument) = adapter.filter(|a| !a.is_empty()) else { return Ok(OwnedRoute::Base) };
        let dir = hub::resolve(argument, What::Adapter)?;
        let set = AdapterSet::load(&dir)?;
        check_base(&set, &dir, &self.base)?;
        OwnedRoute::of(&set, &dir, &self.model).with_context(|| {
            format!("the adapter {} does not fit the model {}", dir.display(), self.dir.display())
        })
    }

    /// What turns rows of data into tokens.
    pub(crate) fn encoder(&self) -> ModelEncoder<'_> {
        ModelEncoder {
            tokenizer: &self.tokenizer,
            template: self.template.as_ref(),
            extra: self.tokenizer.template_variables(),
            eos: self.tokenizer.eos_id(),
        }
    }
}

/// f32 on a CPU; on a GPU config.json's type.
pub(crate) fn compute_dtype(checkpoint: &Checkpoint) -> Dtype {
    if graft_ops::info::info().cpu_operations {
        return Dtype::Float32;
    }
    let named = ["torch_dtype", "dtype"].iter().find_map(|key| checkpoint.config().get(*key)?.as_str());
    match named {
        Some("float16") => Dtype::Float16,
        Some("float32") => Dtype::Float32,
        _ => Dtype::Bfloat16,
    }
}

/// Refuses an adapter that says it was trained on another base.
pub(crate) fn check_base(set: &AdapterSet, dir: &Path, base: &Fingerprint) -> Result<()> {
    if let Some(why) = Fingerprint::read(&set.config).and_then(|own| own.foreign_to(base)) {
        bail!(
            "the adapter {} is for another base than {}: {why}; give the model it was trained on",
            dir.display(),
            base.lineage
        );
    }
    Ok(())
}
