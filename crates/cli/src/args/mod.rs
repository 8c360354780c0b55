//! The command line as clap sees it: mlx_lm's flags with its names, short forms and defaults, and ours.
//!
//! A flag with a default that a YAML file may override is an `Option` here; `settings` joins the three sources.

mod adapters;
mod files;
mod measure;
mod refused;
mod run;
mod train;

pub(crate) use adapters::{
    AdapterCommand, AdapterInspectArgs, ExportArgs, ExtractArgs, ImportArgs, MergeArgs, ResizeArgs,
};
pub(crate) use files::{ConvertArgs, DoctorArgs, ExportCommand, ExportGgufArgs, FuseArgs, InspectArgs};
pub(crate) use measure::{CompareArgs, EvalArgs, MetricArgs, NOT_COMPARED, PlotArgs};
pub(crate) use refused::advice;
pub(crate) use run::{
    ChatArgs, DEFAULT_DATA, GenerateArgs, PerplexityArgs, SamplingArgs, ServerArgs, XTC_THRESHOLD,
};
pub(crate) use train::{DataCommand, DataShowArgs, LoraArgs};

use crate::errors::Usage;
use anyhow::Result;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

/// Trains low-rank adapters on (quantized) language models with MLX, fuses them into the base and serves them.
#[derive(Parser, Debug)]
#[command(
    name = "graft",
    version,
    infer_long_args = true,
    args_override_self = true,
    arg_required_else_help = true
)]
pub(crate) struct Cli {
    /// Threads of our CPU operations (default: the cores allowed; also GRAFT_THREADS). Their instructions:
    /// GRAFT_CPU=avx512|avx2|portable
    #[arg(long, global = true, value_name = "N")]
    pub(crate) threads: Option<usize>,
    /// Compute in f32 throughout, where on a CPU graft trains with bf16 products and answers with 16-bit ones
    #[arg(long, global = true)]
    pub(crate) exact: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// One variant per command.
#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Train an adapter with mlx_lm's flags and defaults (LoRA, DoRA, full; QLoRA on a packed base)
    Lora(LoraArgs),
    /// `lora --train` with graft's recipe as defaults
    Train(LoraArgs),
    /// Fuse an adapter into its base
    Fuse(FuseArgs),
    /// Merge several adapters into one
    Merge(MergeArgs),
    /// Convert, look at, extract or cut adapters
    #[command(subcommand)]
    Adapter(AdapterCommand),
    /// Generate text from a prompt
    Generate(GenerateArgs),
    /// Chat in the terminal
    Chat(ChatArgs),
    /// Serve an OpenAI-compatible endpoint
    #[command(visible_alias = "serve")]
    Server(ServerArgs),
    /// Convert, quantize or dequantize a model directory or a GGUF file
    Convert(ConvertArgs),
    /// `convert -q`
    Quantize(ConvertArgs),
    /// Write a model or an adapter for another program
    #[command(subcommand)]
    Export(ExportCommand),
    /// Perplexity of a model, with or without an adapter, on local text
    Perplexity(PerplexityArgs),
    /// What training will see of the data
    #[command(subcommand)]
    Data(DataCommand),
    /// Scores of a model's answers to held-out rows: the base, adapters and fused models side by side
    Eval(EvalArgs),
    /// The same training as LoRA, QLoRA and QDoRA: what each costs and buys
    Compare(Box<CompareArgs>),
    /// Curves of training runs as a page or a picture
    Plot(PlotArgs),
    /// What a model or adapter directory holds
    Inspect(InspectArgs),
    /// What this machine will run on
    Doctor(DoctorArgs),
    /// Every flag of every command as JSON, for tools that compare command lines
    #[command(hide = true)]
    Flags,
}

/// The whole command, the refused flags of mlx_lm included as hidden ones.
pub(crate) fn command() -> clap::Command {
    let all = refused::add(Cli::command()).mut_subcommands(negative_numbers).mut_subcommand("data", |data| {
        // All of `lora`'s flags are taken, so that its command line can be looked at; help names those that matter.
        data.mut_subcommands(|show| {
            show.mut_args(|arg| if train::is_idle(&arg) { arg.hide(true) } else { arg })
        })
    });
    // `compare` takes `lora`'s flags, too, and refuses these by name, with the reason.
    let hidden = |arg: clap::Arg| {
        let refused = measure::NOT_COMPARED.iter().any(|(id, _)| *id == arg.get_id().as_str());
        if refused || arg.get_id() == "fine_tune_type" { arg.hide(true) } else { arg }
    };
    all.mut_subcommand("compare", |compare| compare.mut_args(hidden))
}

/// argparse reads `--num-layers -1` as a value.
fn negative_numbers(command: clap::Command) -> clap::Command {
    let each = |arg: clap::Arg| {
        if arg.get_action().takes_values() { arg.allow_negative_numbers(true) } else { arg }
    };
    command.mut_args(each).mut_subcommands(negative_numbers)
}

/// Parses the process' arguments; notes about flags that have no effect come back for the caller to print.
pub(crate) fn parse(args: Vec<String>) -> Result<(Cli, Vec<String>)> {
    if let Some(name) = args.get(1)
        && let Some(advice) = refused::command(name)
    {
        return Err(Usage(format!("graft has no command `{name}` of mlx_lm: {advice}")).into());
    }
    // `-qa` is a short form of two letters, which clap does not know.
    let args = args.into_iter().map(|a| if a == "-qa" { "--quantize-activations".into() } else { a });
    let matches = match command().try_get_matches_from(args) {
        Ok(matches) => matches,
        Err(error) => error.exit(),
    };
    let notes = refused::check(&matches)?;
    let cli = Cli::from_arg_matches(&matches).map_err(|e| Usage(e.to_string()))?;
    Ok((cli, notes))
}

/// Bytes as mlx_lm writes them: a number, then nothing, M, MB, G or GB.
fn size(text: &str) -> Result<u64, String> {
    let at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let unit = match text[at..].trim().to_uppercase().as_str() {
        "" => 1.0,
        "M" | "MB" => 1e6,
        "G" | "GB" => 1e9,
        _ => return Err("expected a size such as 1000000, 500MB or 2GB".into()),
    };
    let number: f64 =
        text[..at].parse().map_err(|_| "expected a size such as 1000000, 500MB or 2GB".to_string())?;
    Ok((number * unit) as u64)
}

/// A number that is one: `nan` and `inf` are refused here, as JSON has no place for them.
fn finite(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|x: &f64| x.is_finite()).ok_or_else(|| "expected a finite number".into())
}

/// Flags by command: `{"lora": {"--model": "supported", "--report-to": "refused"}, "data show": ..}`.
pub(crate) fn flags() -> serde_json::Value {
    let mut all = serde_json::Map::new();
    list("", &command(), &mut all);
    all.into()
}

fn list(above: &str, command: &clap::Command, all: &mut serde_json::Map<String, serde_json::Value>) {
    for sub in command.get_subcommands().filter(|c| !c.is_hide_set()) {
        let name = format!("{above}{}", sub.get_name());
        if sub.has_subcommands() {
            list(&format!("{name} "), sub, all);
            continue;
        }
        let mut flags = serde_json::Map::new();
        for arg in sub.get_arguments() {
            let state = refused::state(&name, arg.get_id().as_str());
            for long in arg.get_long_and_visible_aliases().unwrap_or_default() {
                flags.insert(format!("--{long}"), state.into());
            }
            for short in arg.get_short_and_visible_aliases().unwrap_or_default() {
                flags.insert(format!("-{short}"), state.into());
            }
        }
        all.insert(name, flags.into());
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_command_line_is_consistent() {
        super::command().debug_assert();
    }
}
