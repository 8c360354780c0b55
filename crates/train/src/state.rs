//! The state of a run on the disk: everything that the rest of the run depends on, committed by one rename.
//!
//! `state/NNNNNNN/` is written under another name, synced and renamed; then `state/latest`, a file that holds the
//! directory's name, is replaced. Whatever is interrupted, `latest` names a whole state.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use graft_adapters::{ADAPTER_FILE, AdapterConfig, AdapterSet};
use graft_ops::Dtype;
use graft_quant::{Tensor, read_safetensors, safetensors_bytes, write_atomic};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::batch::Position;
use crate::error::io;
use crate::step::Trainer;
use crate::{Error, Result};

const OPTIMIZER_FILE: &str = "optimizer.safetensors";
const GRADIENT_FILE: &str = "gradients.safetensors";
const STATE_FILE: &str = "state.json";
const POINTER: &str = "latest";
/// States that are kept.
const KEPT: usize = 2;

/// The numbers of a state.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Version of this form.
    pub schema: u32,
    /// Iterations done.
    pub iter: u64,
    /// Updates done.
    pub updates: u64,
    /// Where the walk over the data is, with its generator.
    pub position: Position,
    /// Targets of the accumulated gradients.
    pub accumulated_tokens: u64,
    /// Targets trained on.
    pub tokens: u64,
    /// Sums since the last report.
    pub window: Window,
    /// The last update's rate.
    pub learning_rate: f64,
    /// The last gradient's norm.
    pub grad_norm: f64,
    /// Iteration of the last validation.
    pub last_valid: Option<u64>,
    /// Bytes of metrics.jsonl.
    pub metrics_bytes: u64,
    /// What must be the same for the run to go on.
    pub run: RunKey,
}

/// Sums since the last report.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Window {
    /// Sum of losses.
    pub loss: f64,
    /// Targets.
    pub tokens: u64,
    /// Iterations.
    pub steps: u64,
    /// Seconds of those iterations.
    pub seconds: f64,
}

/// What a run cannot change when it goes on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RunKey {
    /// lora, dora or full.
    pub fine_tune_type: String,
    /// Name of the optimizer.
    pub optimizer: String,
    /// Rows of a batch.
    pub batch_size: usize,
    /// Batches of an update.
    pub grad_accumulation_steps: u64,
    /// The seed.
    pub seed: u64,
    /// [`crate::Split::digest`] of the training data.
    pub training_data: u64,
    /// Scale of the adapter; none of `full`, and in states of before it was recorded.
    #[serde(default)]
    pub scale: Option<f32>,
    /// Dropout of the adapter; none as for `scale`.
    #[serde(default)]
    pub dropout: Option<f32>,
}

impl RunKey {
    /// The fields in which two runs differ, each a phrase.
    fn differences(&self, now: &Self) -> Vec<String> {
        // By way of text, since that is where an f32 keeps its short form.
        let text = |key: &Self| serde_json::to_string(key).unwrap_or_default();
        let fields = |key: &Self| serde_json::from_str::<Value>(&text(key)).unwrap_or_default();
        let (saved, now) = (fields(self), fields(now));
        let pairs = saved.as_object().into_iter().flatten();
        pairs
            .filter(|(name, value)| !value.is_null() && now[*name] != **value)
            .map(|(name, value)| format!("{name} was {value}, is {}", now[name]))
            .collect()
    }
}

/// The states of one adapter directory.
#[derive(Debug)]
pub struct States {
    dir: PathBuf,
    /// Names of this run's states, oldest first.
    kept: Vec<String>,
}

impl States {
    /// The states below an adapter directory.
    pub fn new(adapter_path: &Path) -> Self {
        Self { dir: adapter_path.join("state"), kept: vec![] }
    }

    /// The directory that the pointer names, if there is one.
    ///
    /// # Errors
    /// When the pointer cannot be read or names nothing.
    pub fn latest(&self) -> Result<Option<PathBuf>> {
        let pointer = self.dir.join(POINTER);
        let name = match std::fs::read_to_string(&pointer) {
            Ok(name) => name.trim().to_owned(),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io(&pointer)(e)),
        };
        let dir = self.dir.join(&name);
        if name.len() != 7 || !name.bytes().all(|b| b.is_ascii_digit()) || !dir.is_dir() {
            let problem =
                format!("it names the state {name:?}, which is not there: train anew without --resume");
            return Err(Error::State { path: pointer, problem });
        }
        Ok(Some(dir))
    }

    /// Removes the pointer of an earlier run, whose metrics are about to go, so that nobody continues it by mistake.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn forget(&self) -> Result<()> {
        let pointer = self.dir.join(POINTER);
        match std::fs::remove_file(&pointer) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(io(&pointer)(e)),
            _ => Ok(()),
        }
    }

    /// Writes a state and makes it the latest; older ones but the newest of this run are removed.
    ///
    /// # Errors
    /// When a file cannot be written or a tensor is not finite.
    pub fn save(
        &mut self,
        trainer: &Trainer,
        progress: &Progress,
        config: &AdapterConfig,
        metadata: &BTreeMap<String, String>,
    ) -> Result<()> {
        let name = format!("{:07}", progress.iter);
        let temporary = self.dir.join(format!(".{name}.partial"));
        remove(&temporary)?;
        std::fs::create_dir_all(&temporary).map_err(io(&temporary))?;

        let weights = trainer.params.tensors(Dtype::Float32, progress.iter)?;
        let set = AdapterSet {
            adapters: BTreeMap::new(),
            weights,
            config: config.clone(),
            metadata: metadata.clone(),
        };
        set.save(&temporary)?;
        let mut memory = BTreeMap::new();
        for (tensor, slot) in trainer.params.names.iter().zip(&trainer.optimizer_state.slots) {
            for (key, value) in slot {
                memory.insert(format!("{tensor}/{key}"), Tensor::from_array(value)?);
            }
        }
        write_tensors(&temporary.join(OPTIMIZER_FILE), &memory)?;
        if let Some(gradients) = &trainer.accumulated {
            let mut sums = BTreeMap::new();
            for (tensor, sum) in trainer.params.names.iter().zip(gradients) {
                sums.insert(tensor.clone(), Tensor::from_array(sum)?);
            }
            write_tensors(&temporary.join(GRADIENT_FILE), &sums)?;
        }
        let file = temporary.join(STATE_FILE);
        let json = serde_json::to_vec_pretty(progress).map_err(|e| Error::State {
            path: file.clone(),
            problem: format!("cannot be written as JSON: {e}"),
        })?;
        write_atomic(&file, &json)?;
        sync_dir(&temporary)?;

        let target = self.dir.join(&name);
        let old = self.dir.join(format!(".{name}.old"));
        remove(&old)?;
        if target.exists() {
            std::fs::rename(&target, &old).map_err(io(&target))?;
        }
        std::fs::rename(&temporary, &target).map_err(io(&target))?;
        sync_dir(&self.dir)?;
        write_atomic(&self.dir.join(POINTER), format!("{name}\n").as_bytes())?;
        self.kept.retain(|n| *n != name);
        self.kept.push(name);
        let spare = self.kept.len().saturating_sub(KEPT);
        self.kept.drain(..spare);
        self.prune()
    }

    /// Removes every state that this run does not keep.
    fn prune(&self) -> Result<()> {
        for entry in std::fs::read_dir(&self.dir).map_err(io(&self.dir))? {
            let entry = entry.map_err(io(&self.dir))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name != POINTER && !self.kept.contains(&name) && entry.path().is_dir() {
                remove(&entry.path())?;
            }
        }
        Ok(())
    }

    /// Puts a saved state back: the trainer's tensors here, the rest in what is returned.
    ///
    /// # Errors
    /// When the state is damaged or belongs to another run.
    pub fn restore(&mut self, dir: &Path, trainer: &mut Trainer, run: &RunKey) -> Result<Progress> {
        let file = dir.join(STATE_FILE);
        let bytes = std::fs::read(&file).map_err(io(&file))?;
        let progress: Progress = serde_json::from_slice(&bytes).map_err(|e| Error::State {
            path: file.clone(),
            problem: format!("not a state of graft: {e}"),
        })?;
        if progress.schema != 1 {
            let problem = format!("its schema is {}, this graft reads 1", progress.schema);
            return Err(Error::State { path: file, problem });
        }
        let differences = progress.run.differences(run);
        if !differences.is_empty() {
            let problem = format!(
                "the saved run cannot go on, since {}; use the same settings and data, or start from its weights with \
                 --resume-adapter-file",
                differences.join(", ")
            );
            return Err(Error::State { path: dir.to_path_buf(), problem });
        }
        let file = dir.join(ADAPTER_FILE);
        trainer.params.assign(&file, &read_safetensors(&file)?.0)?;
        let file = dir.join(OPTIMIZER_FILE);
        let (mut memory, _) = read_safetensors(&file)?;
        trainer.optimizer_state.step = progress.updates;
        for (tensor, slot) in trainer.params.names.iter().zip(&mut trainer.optimizer_state.slots) {
            for (key, value) in slot.iter_mut() {
                let name = format!("{tensor}/{key}");
                let found = memory.remove(&name).map(|t| t.to_array()).transpose()?;
                let Some(found) = found.filter(|f| f.shape() == value.shape()) else {
                    let problem = format!("{name} is missing or has another shape than {:?}", value.shape());
                    return Err(Error::State { path: file, problem });
                };
                *value = found;
            }
        }
        let file = dir.join(GRADIENT_FILE);
        trainer.accumulated_tokens = progress.accumulated_tokens;
        trainer.accumulated = None;
        if file.exists() {
            let (mut sums, _) = read_safetensors(&file)?;
            let mut gradients = Vec::new();
            for name in &trainer.params.names {
                let Some(sum) = sums.remove(name) else {
                    return Err(Error::State { path: file, problem: format!("{name} is missing") });
                };
                gradients.push(sum.to_array()?);
            }
            trainer.accumulated = Some(gradients);
        }
        trainer.refresh()?;
        self.kept = dir.file_name().map(|n| n.to_string_lossy().into_owned()).into_iter().collect();
        Ok(progress)
    }
}

fn write_tensors(file: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let metadata = BTreeMap::from([("format".to_owned(), "mlx".to_owned())]);
    Ok(write_atomic(file, &safetensors_bytes(tensors, &metadata)?)?)
}

fn remove(dir: &Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(io(dir)(e)),
        _ => Ok(()),
    }
}

fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(io(dir))
}
