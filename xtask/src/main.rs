//! Project tasks, run as `cargo xtask <task>`: everything a contributor or the CI does beyond plain `cargo`.
//!
//! Only this crate and `.cargo/` know how MLX gets onto Linux. It must build and run before that has happened, so it
//! depends on no crate of the workspace. One file per task; a new task is a file and a line in [`TASKS`].
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a terminal program")]

mod bench;
mod cache;
mod children;
mod clients;
mod data;
mod elf;
mod figures;
mod http;
mod lint;
mod live;
mod model;
mod native;
mod peers;
mod pipeline;
mod record;
mod reference;
mod rows;
mod scaling;
mod serve_bench;
mod setup;
mod sh;
mod soak;
mod swap;
mod test;
#[cfg(test)]
mod tidy;

use std::process::ExitCode;

use anyhow::{Result, bail};

/// A task: its name, what `--help` says of it, and the function that gets the remaining arguments.
type Task = (&'static str, &'static str, fn(&[String]) -> Result<()>);

const TASKS: &[Task] = &[
    ("setup", "get MLX onto this machine, so that plain cargo build and test work", setup::task),
    ("demo", "train, measure, fuse, serve and ask, from nothing [--dora] [--keep]", pipeline::demo),
    ("pipeline", "the same with a model and data of one's own: --model M --data D", pipeline::task),
    ("test", "run all tests; arguments go to cargo test", test::task),
    ("lint", "format, clippy, docs and the house rules", lint::task),
    ("bench", "speed and memory in one table [--quick] [--peers] [--scaling]", bench::task),
    (
        "swap-proof",
        "train, publish and swap an adapter under load, and check each answer [--swaps N]",
        swap::task,
    ),
    ("soak", "a server under clients of all kinds for a while, and what leaks [--minutes N]", soak::task),
    ("serve-bench", "what many adapters, HTTP and scheduling cost a server [--rounds N]", serve_bench::task),
    ("model", "print the directory of the demo's base model, made at the first call", model::task),
    ("data", "write the rows of the demo's data set from its grammar", data::task),
    ("golden", "write the golden values of the tests anew with mlx-lm", reference::golden),
    (
        "clients",
        "run OpenAI's and Anthropic's packages and schemathesis against graft server [--only NAME ...]",
        clients::task,
    ),
    (
        "conformance",
        "compare with mlx-lm and llama.cpp on the demo's base and with PEFT [--only NAME ...]",
        reference::conformance,
    ),
];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match children::end_at_signals().and_then(|()| run(&args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String]) -> Result<()> {
    let Some(name) = args.first() else {
        bail!("which task?\n{}", usage());
    };
    if name == native::BINDINGS_TASK {
        return native::bindings_task(&args[1..]);
    }
    if matches!(name.as_str(), "help" | "--help" | "-h") {
        println!("{}", usage());
        return Ok(());
    }
    match TASKS.iter().find(|task| task.0 == name) {
        Some((_, _, task)) => task(&args[1..]),
        None => bail!("there is no task {name}\n{}", usage()),
    }
}

fn usage() -> String {
    let lines = TASKS.iter().map(|(name, about, _)| format!("  {name:<12} {about}\n"));
    format!("usage: cargo xtask <task> [options]\n\n{}", lines.collect::<String>())
}
