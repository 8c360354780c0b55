//! Flags of `graft lora`, `graft train` and `graft data show`. None of the first two has a default here: settings.rs lays
//! them over the YAML file and the defaults.

use clap::{Arg, Args, Subcommand};
use serde::Serialize;
use serde_json::{Map, Value};
use std::path::PathBuf;

/// `lora` and `train`; a field's name is its YAML key.
#[derive(Args, Clone, Debug, Default, Serialize)]
pub(crate) struct LoraArgs {
    /// Model directory or Hugging Face id
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// Train
    #[arg(long)]
    pub(crate) train: bool,
    /// Directory with {train,valid,test}.jsonl, or a Hugging Face data set id
    #[arg(long)]
    pub(crate) data: Option<String>,
    /// What is trained
    #[arg(long, value_parser = ["lora", "dora", "full"])]
    pub(crate) fine_tune_type: Option<String>,
    /// Optimizer
    #[arg(long, value_parser = ["adam", "adamw", "muon", "sgd", "adafactor"])]
    pub(crate) optimizer: Option<String>,
    /// Only the answer counts in the loss
    #[arg(long)]
    pub(crate) mask_prompt: bool,
    /// Last N blocks are trained; -1: all
    #[arg(long)]
    pub(crate) num_layers: Option<i64>,
    /// Rows per batch
    #[arg(long)]
    pub(crate) batch_size: Option<i64>,
    /// Steps
    #[arg(long)]
    pub(crate) iters: Option<i64>,
    /// Validation batches; -1: all, 0: no validation
    #[arg(long)]
    pub(crate) val_batches: Option<i64>,
    /// Learning rate
    #[arg(long, value_parser = super::finite)]
    pub(crate) learning_rate: Option<f64>,
    /// Steps between reports
    #[arg(long)]
    pub(crate) steps_per_report: Option<i64>,
    /// Steps between validations
    #[arg(long)]
    pub(crate) steps_per_eval: Option<i64>,
    /// Steps whose gradients are summed before an update
    #[arg(long)]
    pub(crate) grad_accumulation_steps: Option<i64>,
    /// Adapter file whose weights training starts from
    #[arg(long)]
    pub(crate) resume_adapter_file: Option<String>,
    /// Where the adapter is written (with --test alone: read; "" tests the base)
    #[arg(long)]
    pub(crate) adapter_path: Option<String>,
    /// Steps between saves
    #[arg(long)]
    pub(crate) save_every: Option<i64>,
    /// Evaluate on test.jsonl
    #[arg(long)]
    pub(crate) test: bool,
    /// Test batches; -1: all
    #[arg(long)]
    pub(crate) test_batches: Option<i64>,
    /// Longest row in tokens; longer ones are cut
    #[arg(long)]
    pub(crate) max_seq_length: Option<i64>,
    /// YAML file with these settings and lora_parameters, lr_schedule, optimizer_config
    #[arg(short = 'c', long)]
    pub(crate) config: Option<String>,
    /// Recompute a block's forward in its backward: less memory, more time
    #[arg(long)]
    pub(crate) grad_checkpoint: bool,
    /// Freed memory that MLX may keep between steps, e.g. 500MB
    #[arg(long, value_parser = super::size)]
    pub(crate) clear_cache_threshold: Option<u64>,
    /// Seed
    #[arg(long)]
    pub(crate) seed: Option<i64>,

    /// Rank of the adapter (lora_parameters.rank)
    #[arg(long, help_heading = "graft's own")]
    #[serde(skip)]
    pub(crate) rank: Option<i64>,
    /// Scale of the adapter's output (lora_parameters.scale)
    #[arg(long, value_parser = super::finite, help_heading = "graft's own")]
    #[serde(skip)]
    pub(crate) scale: Option<f64>,
    /// The scale as alpha / rank
    #[arg(long, value_parser = super::finite, conflicts_with = "scale", help_heading = "graft's own")]
    #[serde(skip)]
    pub(crate) alpha: Option<f64>,
    /// Answer the prompts of this file at each validation: one a line, or rows of a .jsonl file
    #[arg(long, value_name = "FILE", help_heading = "graft's own")]
    pub(crate) sample_prompts: Option<String>,
    /// Continue the interrupted run in --adapter-path exactly where it stood
    #[arg(long, help_heading = "graft's own")]
    pub(crate) resume: bool,
    /// Clip the gradient to this norm; 0: no clipping
    #[arg(long, value_parser = super::finite, help_heading = "graft's own")]
    pub(crate) max_grad_norm: Option<f64>,
}

impl LoraArgs {
    /// The flags that were given, as a settings file would have them.
    pub(crate) fn as_file(&self) -> Map<String, Value> {
        let mut all = self.given();
        all.remove("config");
        let rank = self.rank.map(Value::from);
        let (scale, alpha) = (self.scale.map(Value::from), self.alpha.map(Value::from));
        let lora = [("rank", rank), ("scale", scale), ("alpha", alpha)];
        let lora: Map<String, Value> =
            lora.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect();
        if !lora.is_empty() {
            all.insert("lora_parameters".into(), lora.into());
        }
        all
    }

    /// The flags that were given, by YAML key.
    pub(crate) fn given(&self) -> Map<String, Value> {
        let Ok(Value::Object(map)) = serde_json::to_value(self) else { return Map::new() };
        map.into_iter().filter(|(_, v)| !matches!(v, Value::Null | Value::Bool(false))).collect()
    }
}

/// `data`.
#[derive(Subcommand, Debug)]
pub(crate) enum DataCommand {
    /// Rows as they are trained on, the tokens in the loss marked, and what is wrong with the data
    Show(DataShowArgs),
}

/// `data show`.
#[derive(Args, Debug)]
pub(crate) struct DataShowArgs {
    #[command(flatten)]
    pub(crate) lora: LoraArgs,
    /// Whose defaults count: `train` masks prompts
    #[arg(long = "as", default_value = "lora", value_parser = ["lora", "train"], help_heading = "graft's own")]
    pub(crate) defaults: String,
    /// Which rows
    #[arg(long, default_value = "train", value_parser = ["train", "valid", "test"], help_heading = "graft's own")]
    pub(crate) split: String,
    /// The row at this line of its file
    #[arg(long, value_name = "LINE", help_heading = "graft's own")]
    pub(crate) row: Option<usize>,
    /// How many rows, from the first; -1: all
    #[arg(long, default_value_t = 3, conflicts_with = "row", help_heading = "graft's own")]
    pub(crate) count: i64,
    /// Report as JSON
    #[arg(long, help_heading = "graft's own")]
    pub(crate) json: bool,
    /// Write the report as a web page
    #[arg(long, value_name = "FILE", help_heading = "graft's own")]
    pub(crate) html: Option<PathBuf>,
}

/// Whether a flag of `lora` changes nothing in what `data show` shows.
pub(super) fn is_idle(arg: &Arg) -> bool {
    const READ: [&str; 7] =
        ["model", "data", "mask_prompt", "max_seq_length", "config", "batch_size", "val_batches"];
    const OWN: [&str; 6] = ["defaults", "split", "row", "count", "json", "html"];
    !READ.iter().chain(&OWN).any(|id| *id == arg.get_id().as_str())
}
