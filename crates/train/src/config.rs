//! The settings of a run. Every one of them has a value: defaults are the command line's.

use std::collections::BTreeMap;
use std::path::PathBuf;

use graft_adapters::{FineTuneType, LoraParameters};
use graft_model::GenerateOptions;
use serde_json::{Map, Value};

/// Settings of [`crate::run()`].
#[derive(Debug, Clone)]
pub struct TrainConfig {
    /// lora, dora or full.
    pub fine_tune_type: FineTuneType,
    /// How many of the last blocks are trained; -1 and 0 mean all.
    pub num_layers: i32,
    /// Rank, scale, dropout and keys; unused by `full`.
    pub lora: LoraParameters,
    /// adam, adamw, sgd, muon or adafactor.
    pub optimizer: String,
    /// That optimizer's settings.
    pub optimizer_config: Map<String, Value>,
    /// The rate where there is no schedule.
    pub learning_rate: f64,
    /// mlx-lm's `lr_schedule`: a map with name, arguments, warmup and warmup_init.
    pub lr_schedule: Option<Value>,
    /// Rows of a batch.
    pub batch_size: usize,
    /// Batches to train on.
    pub iters: u64,
    /// Validation batches; 0 = none, negative = all.
    pub val_batches: i64,
    /// Iterations between two reports.
    pub steps_per_report: u64,
    /// Iterations between two validations.
    pub steps_per_eval: u64,
    /// Iterations between two saves.
    pub save_every: u64,
    /// Batches whose gradients make one update, weighted by their targets.
    pub grad_accumulation_steps: u64,
    /// Greatest norm of all gradients together.
    pub max_grad_norm: Option<f64>,
    /// Compute each block again in the backward pass instead of keeping what its gradient needs.
    pub grad_checkpoint: bool,
    /// Seed of everything random.
    pub seed: u64,
    /// Where adapter, checkpoints, state and metrics are written.
    pub adapter_path: PathBuf,
    /// Continue from `<adapter_path>/state/latest`, exactly.
    pub resume: bool,
    /// Start from the tensors of this file (where `resume` finds no state).
    pub resume_adapter_file: Option<PathBuf>,
    /// Bytes of freed memory that MLX may keep between steps.
    pub clear_cache_threshold: usize,
    /// Prompts that are answered at each validation; none usually.
    pub samples: Vec<(Vec<u32>, GenerateOptions)>,
    /// What adapter_config.json says besides (the command's arguments).
    pub adapter_config: Map<String, Value>,
    /// Metadata of the tensor files (versions, base fingerprint).
    pub metadata: BTreeMap<String, String>,
    /// The process's peak memory in bytes, which libraries do not read themselves.
    pub peak_memory: fn() -> u64,
}
