//! What several commands need: a model with its tokenizer and template, an adapter on it, the data of a run.

use crate::hub::{self, What};
use crate::ui;
use anyhow::{Context, Result, bail};
use graft_adapters::{ADAPTER_FILE, AdapterSet, Fingerprint};
use graft_model::{ChatTemplate, DecoderConfig, Model, Tokenizer, config_from_map};
use graft_ops::Dtype;
use graft_quant::{Checkpoint, StoredDtype};
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
        let (tokenizer, template) = text(&dir)?;
        Ok(Self { dir, base, model, tokenizer, template })
    }

    /// The route of an adapter directory; none, or an empty path, is the base alone.
    pub(crate) fn route(&self, adapter: Option<&str>) -> Result<OwnedRoute> {
        let Some(argument) = adapter.filter(|a| !a.is_empty()) else { return Ok(OwnedRoute::Base) };
        let dir = hub::resolve(argument, What::Adapter)?;
        let set = AdapterSet::load(&dir)?;
        check_base(Fingerprint::read(&set.config), &dir, &self.base)?;
        OwnedRoute::of(&set, &dir, &self.model).with_context(|| {
            format!("the adapter {} does not fit the model {}", dir.display(), self.dir.display())
        })
    }

    /// What turns rows of data into tokens.
    pub(crate) fn encoder(&self) -> ModelEncoder<'_> {
        encoder(&self.tokenizer, self.template.as_ref())
    }
}

/// The tokenizer of a model directory, and its chat template if it has one.
pub(crate) fn text(dir: &Path) -> Result<(Tokenizer, Option<ChatTemplate>)> {
    let template = if ChatTemplate::exists(dir)? { Some(ChatTemplate::load(dir)?) } else { None };
    Ok((Tokenizer::load(dir)?, template))
}

/// What turns rows of data into tokens.
pub(crate) fn encoder<'a>(tokenizer: &'a Tokenizer, template: Option<&'a ChatTemplate>) -> ModelEncoder<'a> {
    ModelEncoder { tokenizer, template, extra: tokenizer.template_variables(), eos: tokenizer.eos_id() }
}

/// What config.json says of the model behind a command's argument, before its weights are read.
pub(crate) fn config(argument: &str) -> Result<DecoderConfig> {
    config_of(&Checkpoint::open(&hub::resolve(argument, What::Model)?)?)
}

/// As [`config`], of a checkpoint that is open. Errors: a family that graft cannot run, or fields that it cannot use.
pub(crate) fn config_of(checkpoint: &Checkpoint) -> Result<DecoderConfig> {
    Ok(config_from_map(&checkpoint.dir().join("config.json"), checkpoint.config())?)
}

/// f32 on a CPU; on a GPU config.json's type, else that of the scales, else that of the floats.
pub(crate) fn compute_dtype(checkpoint: &Checkpoint) -> Dtype {
    if graft_ops::info::info().cpu_operations { Dtype::Float32 } else { stored_dtype(checkpoint) }
}

fn stored_dtype(checkpoint: &Checkpoint) -> Dtype {
    match checkpoint.stored_dtype() {
        Some(StoredDtype::F16) => Dtype::Float16,
        Some(StoredDtype::F32 | StoredDtype::F64) => Dtype::Float32,
        _ => Dtype::Bfloat16,
    }
}

/// The adapter that stands beside a model: what `fuse --policy fold` makes is the two together.
pub(crate) fn beside(dir: &Path) -> Option<PathBuf> {
    let file = dir.join(ADAPTER_FILE);
    // What has no config.json is no model, which whoever opens it says.
    (file.is_file() && dir.join("config.json").is_file()).then_some(file)
}

/// Refuses a model beside which an adapter stands, where only the model would be taken.
pub(crate) fn refuse_beside(dir: &Path, argument: &str) -> Result<()> {
    if let Some(file) = beside(dir) {
        bail!(
            "{}: an adapter beside the model, which would be left out though the model may be half of what was fused: fuse \
             it first (graft fuse --model {argument} --adapter-path {argument} --save-path NEW), or move it elsewhere if the \
             model is meant without it",
            file.display()
        );
    }
    Ok(())
}

/// Refuses an adapter that says it was trained on another base; warns of one of another model of the same shapes.
pub(crate) fn check_base(own: Option<Fingerprint>, dir: &Path, base: &Fingerprint) -> Result<()> {
    let Some(own) = own else { return Ok(()) };
    if let Some(why) = own.other_model_than(base).filter(|_| own.foreign_to(base).is_none()) {
        ui::note(&format!(
            "warning: the adapter {} is not for {}: {why}; answers may be poor",
            dir.display(),
            base.lineage
        ));
    }
    if let Some(why) = own.foreign_to(base) {
        bail!(
            "the adapter {} is for another base than {}: {why}; give the model it was trained on",
            dir.display(),
            base.lineage
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use graft_testkit::{Dtype as Stored, Family, Tiny, tiny_model};

    #[test]
    fn the_dtype_is_that_of_the_config_or_of_what_is_stored() {
        for (stored, wanted) in
            [(Stored::F16, Dtype::Float16), (Stored::Bf16, Dtype::Bfloat16), (Stored::F32, Dtype::Float32)]
        {
            for packed in [None, Some((4, 32))] {
                let dir = tiny_model(&Tiny { dtype: stored, packed, ..Tiny::new(Family::Llama) });
                let file = dir.path().join("config.json");
                let mut config: serde_json::Value =
                    serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
                for key in ["torch_dtype", "dtype"] {
                    config.as_object_mut().unwrap().remove(key);
                }
                std::fs::write(&file, config.to_string()).unwrap();
                assert_eq!(stored_dtype(&Checkpoint::open(dir.path()).unwrap()), wanted, "{packed:?}");
                config["torch_dtype"] = "float32".into();
                std::fs::write(&file, config.to_string()).unwrap();
                assert_eq!(stored_dtype(&Checkpoint::open(dir.path()).unwrap()), Dtype::Float32);
            }
        }
    }
}
