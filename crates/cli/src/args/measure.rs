//! Flags of the commands that measure and show: eval, compare, plot.

use super::LoraArgs;
use clap::Args;

/// `eval`.
#[derive(Args, Debug)]
pub(crate) struct EvalArgs {
    /// Model directory or Hugging Face id
    #[arg(long)]
    pub(crate) model: String,
    /// Adapter directory, applied unfused; may be repeated
    #[arg(long)]
    pub(crate) adapter_path: Vec<String>,
    /// Model directory to measure beside the base, such as a fused one; may be repeated
    #[arg(long, value_name = "DIR")]
    pub(crate) fused: Vec<String>,
    /// A .jsonl file, or a directory or Hugging Face data set with test.jsonl
    #[arg(long)]
    pub(crate) data: String,
    #[command(flatten)]
    pub(crate) metric: MetricArgs,
    /// Temperature; 0: the best token
    #[arg(long, default_value_t = 0.0)]
    pub(crate) temp: f32,
    /// Nucleus
    #[arg(long, default_value_t = 1.0)]
    pub(crate) top_p: f32,
    /// Seed of sampled answers and of the bootstrap
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Rows answered together, 1 to 32; changes no answer
    #[arg(long, default_value_t = 16)]
    pub(crate) batch_size: usize,
    /// Samples of the bootstrap
    #[arg(long, default_value_t = 10_000)]
    pub(crate) resamples: usize,
    /// Longest row in tokens, for --metric loss; longer ones are cut
    #[arg(long, default_value_t = 2048)]
    pub(crate) max_seq_length: usize,
    /// Changed answers to print
    #[arg(long, default_value_t = 5)]
    pub(crate) show: usize,
    /// Where the report is written
    #[arg(long, default_value = "eval.json")]
    pub(crate) output: String,
    /// Write the report as a page, too
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<String>,
    /// Print the report as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

impl EvalArgs {
    /// The best tokens of a base and of adapters on it, for a command that measures on the way.
    pub(crate) fn greedy(model: String, adapter_path: Vec<String>, data: String, metric: MetricArgs) -> Self {
        Self {
            model,
            adapter_path,
            fused: Vec::new(),
            data,
            metric,
            temp: 0.0,
            top_p: 1.0,
            seed: 0,
            batch_size: 16,
            resamples: 1000,
            max_seq_length: 2048,
            show: 0,
            output: String::new(),
            html: None,
            json: false,
        }
    }
}

/// How answers are judged.
#[derive(Args, Debug, Clone)]
pub(crate) struct MetricArgs {
    /// What is right: the row's answer itself, a text that contains it, one that it matches as a regular expression, the
    /// same JSON value; or the loss of the row's answer
    #[arg(long, value_parser = ["exact", "contains", "regex", "json", "loss"])]
    pub(crate) metric: Option<String>,
    /// With --metric regex: what this finds (its first group) in both answers must be the same
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) pattern: Option<String>,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 256)]
    pub(crate) max_tokens: usize,
}

/// Settings of `lora` that `compare` decides itself, and why.
pub(crate) const NOT_COMPARED: [(&str, &str); 4] = [
    ("test", "--metric scores the legs on test.jsonl"),
    ("resume", "each leg is trained from its start"),
    ("adapter_path", "the adapters are written to --output"),
    ("steps_per_report", "every step is reported"),
];

/// `compare`.
#[derive(Args, Debug)]
pub(crate) struct CompareArgs {
    #[command(flatten)]
    pub(crate) run: LoraArgs,
    /// Legs: lora and dora on the dense base, qlora and qdora on the packed one (default: lora,qlora,qdora)
    #[arg(long, value_delimiter = ',', value_parser = ["lora", "dora", "qlora", "qdora"], help_heading = "The comparison")]
    pub(crate) legs: Vec<String>,
    /// A leg of your own: a YAML file with what it has instead of the common settings; may be repeated
    #[arg(long, value_name = "FILE", help_heading = "The comparison")]
    pub(crate) leg: Vec<String>,
    /// Bits of the packed base that is made of a dense --model: 2, 3, 4 (default), 5, 6 or 8
    #[arg(long, help_heading = "The comparison")]
    pub(crate) q_bits: Option<i32>,
    /// Its group size: 32, 64 (default) or 128
    #[arg(long, help_heading = "The comparison")]
    pub(crate) q_group_size: Option<i32>,
    /// Its mixed-bit recipe
    #[arg(long, value_parser = ["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"], help_heading = "The comparison")]
    pub(crate) quant_predicate: Option<String>,
    /// Runs of each leg, with seeds that follow --seed
    #[arg(long, default_value_t = 1, help_heading = "The comparison")]
    pub(crate) seeds: u32,
    /// Find each leg's learning rate first: the rates to try (default: --learning-rate times 1/4, 1/2, 1, 2 and 4)
    #[arg(long, num_args = 0.., value_delimiter = ',', value_parser = super::finite, value_name = "RATE", help_heading = "The comparison")]
    pub(crate) find_lr: Option<Vec<f64>>,
    #[command(flatten)]
    pub(crate) metric: MetricArgs,
    /// Where bases, adapters, compare.json and compare.html are written; must not exist, but for a try that came to nothing
    #[arg(long, default_value = "compare", help_heading = "The comparison")]
    pub(crate) output: String,
    /// Print the report as JSON
    #[arg(long, help_heading = "The comparison")]
    pub(crate) json: bool,
}

/// `plot`.
#[derive(Args, Debug)]
pub(crate) struct PlotArgs {
    /// Adapter directories, or metrics.jsonl files
    #[arg(required = true, value_name = "RUN")]
    pub(crate) runs: Vec<String>,
    /// Picture or page to write: .html, .svg or .png; may be repeated
    #[arg(short, long, value_name = "FILE", default_value = "plot.html")]
    pub(crate) output: Vec<String>,
}
