//! Flags and commands of mlx_lm that graft does not have: parsed all the same, so that they can be refused by name with graft's way to do it.

use crate::errors::Usage;
use anyhow::Result;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};

/// What becomes of a flag.
enum Fate {
    /// Exit 2 with this advice.
    Refused(&'static str),
    /// Accepted; the note is printed.
    Noted(&'static str),
}
use Fate::{Noted, Refused};

/// A flag by long name, how many values it takes (0, 1 or many = 2), and its fate, in the named commands.
struct Flag {
    commands: &'static [&'static str],
    long: &'static str,
    values: u8,
    fate: Fate,
}

const REMOTE: &str = "graft runs no code from a model directory, so --trust-remote-code changes nothing";
const UPLOAD: &str = "graft uploads nothing; push the finished directory with `huggingface-cli upload`";
const DRAFT: &str = "graft has no speculative decoding; leave the flag out";
const KV: &str = "graft keeps the KV cache in the compute dtype; bound it with --max-tokens";
const PREFILL: &str = "graft prefills in chunks of 512 tokens at fixed positions, so that an answer does not depend on it; \
     --prefill-step-size changes nothing";

const CACHE: &str = "graft keeps prompts in what running requests leave of --kv-memory, and reads them one chunk at a time; \
     --prompt-cache-size, --prompt-cache-bytes and --prompt-concurrency change nothing";

const FLAGS: &[Flag] = &[
    flag(&["server"], "prompt-concurrency", 1, Noted(CACHE)),
    flag(&["server"], "prompt-cache-size", 1, Noted(CACHE)),
    flag(&["server"], "prompt-cache-bytes", 1, Noted(CACHE)),
    flag(
        &["lora", "train", "fuse", "generate", "chat", "server", "convert", "quantize", "perplexity"],
        "trust-remote-code",
        0,
        Noted(REMOTE),
    ),
    flag(
        &["lora", "train"],
        "report-to",
        1,
        Refused("graft reports to no service; read metrics.jsonl in the adapter directory"),
    ),
    flag(
        &["lora", "train"],
        "project-name",
        1,
        Noted("--project-name only names a run for --report-to and changes nothing"),
    ),
    flag(&["fuse", "convert", "quantize"], "upload-repo", 1, Refused(UPLOAD)),
    flag(&["generate", "server"], "draft-model", 1, Refused(DRAFT)),
    flag(&["generate", "server"], "num-draft-tokens", 1, Refused(DRAFT)),
    flag(&["generate", "server"], "kv-bits", 1, Refused(KV)),
    flag(&["generate", "server"], "kv-group-size", 1, Refused(KV)),
    flag(&["generate", "server"], "quantized-kv-start", 1, Refused(KV)),
    flag(
        &["generate", "chat"],
        "max-kv-size",
        1,
        Refused(
            "graft has no rotating cache (mlx_lm ignores the flag for most models); bound the length with --max-tokens",
        ),
    ),
    flag(&["generate", "chat", "server"], "prefill-step-size", 1, Noted(PREFILL)),
    flag(
        &["generate", "server"],
        "use-default-chat-template",
        0,
        Noted("graft always uses the model's own chat template; --use-default-chat-template changes nothing"),
    ),
    flag(&["generate"], "image", 2, Refused("graft runs text models only")),
    flag(
        &["generate"],
        "prompt-cache-file",
        1,
        Refused("graft keeps no prompt cache files; put the whole prompt into --prompt"),
    ),
    flag(
        &["generate"],
        "quantize-activations",
        0,
        Refused("graft computes activations in the compute dtype; leave the flag out"),
    ),
    flag(&["chat", "server"], "pipeline", 0, Refused("graft runs on one machine; leave the flag out")),
];

/// mlx_lm's other commands.
const COMMANDS: &[(&str, &str)] = &[
    ("awq", "use `graft convert -q`"),
    ("dwq", "use `graft convert -q`"),
    ("gptq", "use `graft convert -q`"),
    ("dynamic_quant", "use `graft convert -q --quant-predicate mixed_3_6`"),
    ("evaluate", "use `graft perplexity`, or point lm-eval at `graft server`"),
    ("cache_prompt", "there is no counterpart; give `graft generate` the whole prompt"),
    ("benchmark", "`graft generate` prints prompt and generation speed"),
    ("manage", "there is no counterpart; use `huggingface-cli scan-cache` and `delete-cache`"),
    ("share", "there is no counterpart; copy the directory"),
    ("upload", "there is no counterpart; use `huggingface-cli upload`"),
];

const fn flag(commands: &'static [&'static str], long: &'static str, values: u8, fate: Fate) -> Flag {
    Flag { commands, long, values, fate }
}

/// Why mlx_lm's command `name` is not here, if it is one of those.
pub(crate) fn command(name: &str) -> Option<&'static str> {
    let name = name.strip_prefix("mlx_lm.").unwrap_or(name);
    COMMANDS.iter().find(|(n, _)| *n == name).map(|(_, advice)| *advice)
}

/// Adds every flag of the table as a hidden argument of its commands.
pub(crate) fn add(cli: Command) -> Command {
    cli.mut_subcommands(|mut sub| {
        let name = sub.get_name().to_string();
        for flag in FLAGS.iter().filter(|f| f.commands.contains(&name.as_str())) {
            let arg = Arg::new(flag.long).long(flag.long).hide(true);
            sub = sub.arg(match flag.values {
                0 => arg.action(ArgAction::SetTrue),
                1 => arg.action(ArgAction::Set),
                _ => arg.action(ArgAction::Append).num_args(1..),
            });
        }
        sub
    })
}

/// Refuses the first refused flag that was given; returns the notes of the others.
pub(crate) fn check(matches: &ArgMatches) -> Result<Vec<String>> {
    let Some((name, sub)) = matches.subcommand() else { return Ok(Vec::new()) };
    let mut notes = Vec::new();
    for flag in FLAGS.iter().filter(|f| f.commands.contains(&name)) {
        if sub.value_source(flag.long) != Some(ValueSource::CommandLine) {
            continue;
        }
        match flag.fate {
            Refused(advice) => {
                return Err(
                    Usage(format!("--{} is not supported by graft {name}: {advice}", flag.long)).into()
                );
            }
            Noted(note) => notes.push(note.to_string()),
        }
    }
    Ok(notes)
}

/// The advice of a refused flag of `command`, for the same key in a YAML file.
pub(crate) fn advice(command: &str, long: &str) -> Option<&'static str> {
    FLAGS.iter().find(|f| f.long == long && f.commands.contains(&command)).and_then(|f| match f.fate {
        Refused(advice) => Some(advice),
        Noted(_) => None,
    })
}

/// `supported`, `refused` or `noted`.
pub(crate) fn state(command: &str, id: &str) -> &'static str {
    match FLAGS.iter().find(|f| f.long == id && f.commands.contains(&command)).map(|f| &f.fate) {
        None => "supported",
        Some(Refused(_)) => "refused",
        Some(Noted(_)) => "noted",
    }
}
