//! Flags of the commands that make adapters of adapters: merge, and adapter import, export, inspect, extract and resize.

use clap::{Args, Subcommand};

use super::MetricArgs;

/// `merge`.
#[derive(Args, Debug)]
pub(crate) struct MergeArgs {
    /// A merge as a YAML file, close to mergekit's; flags beside it go before what it says
    #[arg(long, value_name = "FILE", conflicts_with_all = ["method", "adapter"])]
    pub(crate) recipe: Option<String>,
    /// How updates are combined
    #[arg(long, value_parser = graft_merge::Method::NAMES)]
    pub(crate) method: Option<String>,
    /// Adapter directory or Hugging Face id, mlx-lm's or PEFT's, and its weight (1); may be repeated
    #[arg(long, value_name = "DIR[=W]")]
    pub(crate) adapter: Vec<String>,
    /// The base; needed where an adapter is DoRA, and for --eval
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// Share of each update's elements that stays (ties, dare_.., magnitude_prune)
    #[arg(long, value_parser = super::finite)]
    pub(crate) density: Option<f64>,
    /// Rank of the result (default: the sum of the ranks, with which a sum loses nothing)
    #[arg(long)]
    pub(crate) rank: Option<i32>,
    /// Instead of --rank: in each module the fewest columns that hold this share of its squared singular values
    #[arg(long, value_parser = super::finite, conflicts_with = "rank")]
    pub(crate) energy: Option<f64>,
    /// slerp's place on the arc, 0 the first adapter and 1 the second
    #[arg(long = "t", value_parser = super::finite)]
    pub(crate) place: Option<f64>,
    /// Factor of the result
    #[arg(long, value_parser = super::finite)]
    pub(crate) lambda: Option<f64>,
    /// Divide by the sum of the weights (default: with elected signs)
    #[arg(long)]
    pub(crate) normalize: Option<bool>,
    /// Seed of what is drawn
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// Take adapters of other models of the same shapes, too
    #[arg(long)]
    pub(crate) force: bool,
    /// Where the adapter is written; must not exist
    #[arg(long, default_value = "merged_adapter")]
    pub(crate) save_path: String,
    /// Score the base, the adapters and the merge on each adapter's task: the test rows of the data it was trained on
    #[arg(long)]
    pub(crate) eval: bool,
    /// With --eval: the data of each adapter, in order, in place of what its config names; may be repeated
    #[arg(long, value_name = "DATA", requires = "eval")]
    pub(crate) eval_data: Vec<String>,
    #[command(flatten)]
    pub(crate) metric: MetricArgs,
    /// Print the report as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `adapter`.
#[derive(Subcommand, Debug)]
pub(crate) enum AdapterCommand {
    /// PEFT's adapter directory into mlx-lm's form
    Import(ImportArgs),
    /// An adapter directory into PEFT's form
    Export(ExportArgs),
    /// Rank, scale, norm and singular values of each module, and the base it was trained on
    Inspect(AdapterInspectArgs),
    /// A LoRA adapter out of a fine-tuned model and its base
    Extract(ExtractArgs),
    /// The same adapter with fewer columns
    Resize(ResizeArgs),
}

/// `adapter import`.
#[derive(Args, Debug)]
pub(crate) struct ImportArgs {
    /// PEFT adapter directory or Hugging Face id
    pub(crate) adapter: String,
    /// The base it belongs to: it is checked against it, and remembers it
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// Where the adapter is written; must not exist
    #[arg(long)]
    pub(crate) save_path: String,
}

/// `adapter export`.
#[derive(Args, Debug)]
pub(crate) struct ExportArgs {
    /// Adapter directory or Hugging Face id
    pub(crate) adapter: String,
    /// Where PEFT's directory is written; must not exist
    #[arg(long)]
    pub(crate) save_path: String,
}

/// `adapter inspect`.
#[derive(Args, Debug)]
pub(crate) struct AdapterInspectArgs {
    /// Adapter directory or Hugging Face id
    pub(crate) adapter: String,
    /// Report as JSON, with all singular values
    #[arg(long)]
    pub(crate) json: bool,
}

/// `adapter extract`.
#[derive(Args, Debug)]
pub(crate) struct ExtractArgs {
    /// The base: model directory or Hugging Face id
    #[arg(long)]
    pub(crate) model: String,
    /// The fine-tuned model
    #[arg(long)]
    pub(crate) tuned: String,
    #[command(flatten)]
    pub(crate) size: SizeArgs,
    /// Do without tensors that changed and are no matrix (norms, biases), which are refused otherwise
    #[arg(long)]
    pub(crate) leave_out: bool,
    /// Seed of the search for the leading directions, and of the texts that are drawn
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// model: also measure how far the base with the adapter is from the fine-tuned model; layers: the weights alone
    #[arg(long, default_value = "model", value_parser = ["model", "layers"])]
    pub(crate) verify: String,
    /// Rows to measure on, as for training: a .jsonl file or a directory with valid.jsonl (default: texts drawn from the
    /// fine-tuned model)
    #[arg(long)]
    pub(crate) data: Option<String>,
    /// How many rows are measured
    #[arg(long, default_value_t = 16)]
    pub(crate) verify_rows: usize,
    /// Where the adapter is written; must not exist
    #[arg(long)]
    pub(crate) save_path: String,
    /// Print the report as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `adapter resize`.
#[derive(Args, Debug)]
pub(crate) struct ResizeArgs {
    /// Adapter directory or Hugging Face id
    pub(crate) adapter: String,
    #[command(flatten)]
    pub(crate) size: SizeArgs,
    /// Where the adapter is written; must not exist
    #[arg(long)]
    pub(crate) save_path: String,
    /// Print the report as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// How many columns are kept.
#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
pub(crate) struct SizeArgs {
    /// Rank of each module
    #[arg(long)]
    pub(crate) rank: Option<i32>,
    /// In each module the fewest columns that hold this share of its squared singular values
    #[arg(long, value_parser = super::finite)]
    pub(crate) energy: Option<f64>,
}
