//! graft: trains low-rank adapters on (quantized) language models with MLX, fuses them into the base and serves them.
//!
//! This file decides exit statuses: 0 done, 1 failed, 2 usage, 130 interrupted after saving. The command itself runs on
//! one thread with a large stack, because one thread owns all arrays and evaluating a deep graph recurses.

mod args;
mod commands;
mod errors;
mod host;
mod hub;
mod report;
mod settings;
mod ui;

use anyhow::{Result, anyhow, bail};
use args::{AdapterCommand, Command, DataCommand, ExportCommand};
use graft_ops::{Form, Precision};
use std::sync::{Arc, Mutex, PoisonError};

/// Stack of the array thread in bytes.
const STACK: usize = 256 << 20;

fn main() {
    // Our own report replaces the panic message and its trace.
    let place = Arc::new(Mutex::new(String::new()));
    let seen = place.clone();
    std::panic::set_hook(Box::new(move |info| {
        *seen.lock().unwrap_or_else(PoisonError::into_inner) = info.to_string();
    }));
    let worker = std::thread::Builder::new()
        .name("arrays".into())
        .stack_size(STACK)
        .spawn(|| run(std::env::args().collect()));
    let result = match worker.map(std::thread::JoinHandle::join) {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => {
            let what = place.lock().unwrap_or_else(PoisonError::into_inner);
            let what = what.split_whitespace().collect::<Vec<_>>().join(" ");
            Err(anyhow!(
                "graft failed in a way it should not: {what}; please report this with the command line"
            ))
        }
        Err(error) => Err(anyhow::Error::from(error).context("cannot start the array thread")),
    };
    let status = result.as_ref().err().map_or(0, errors::status);
    if let Err(error) = &result {
        let line = errors::line(error);
        ui::note(&if status == 130 { line } else { format!("error: {line}") });
    }
    host::exit(status);
}

fn run(arguments: Vec<String>) -> Result<()> {
    let (cli, notes) = args::parse(arguments)?;
    for note in notes {
        ui::note(&format!("note: {note}"));
    }
    graft_ops::set_allocator();
    choose_form(cli.threads)?;
    graft_ops::set_precision(match &cli.command {
        _ if cli.exact => Precision::F32,
        Command::Lora(_) | Command::Train(_) => Precision::Bf16,
        Command::Generate(_)
        | Command::Chat(_)
        | Command::Server(_)
        | Command::Perplexity(_)
        | Command::Eval(_) => Precision::Int16,
        _ => Precision::F32,
    });
    match cli.command {
        Command::Lora(args) => commands::lora(&args, settings::Defaults::MlxLm),
        Command::Train(args) => commands::lora(&args, settings::Defaults::Recipe),
        Command::Fuse(args) => commands::fuse(&args),
        Command::Merge(args) => commands::merge(&args, cli.exact),
        Command::Adapter(AdapterCommand::Import(args)) => commands::adapter::import(&args),
        Command::Adapter(AdapterCommand::Export(args)) => commands::adapter::export(&args),
        Command::Adapter(AdapterCommand::Inspect(args)) => commands::adapter::inspect(&args),
        Command::Adapter(AdapterCommand::Extract(args)) => commands::extract(&args),
        Command::Adapter(AdapterCommand::Resize(args)) => commands::adapter::resize(&args),
        Command::Generate(args) => commands::generate(&args),
        Command::Chat(args) => commands::chat(&args),
        Command::Server(args) => commands::server(&args),
        Command::Convert(args) => commands::convert(&args, args.quantize),
        Command::Quantize(args) => commands::convert(&args, true),
        Command::Export(ExportCommand::Gguf(args)) => commands::export_gguf(&args),
        Command::Perplexity(args) => commands::perplexity(&args),
        Command::Eval(args) => commands::eval(&args),
        Command::Compare(args) => commands::compare(&args, cli.threads, cli.exact),
        Command::Plot(args) => commands::plot(&args),
        Command::Inspect(args) => commands::inspect(&args),
        Command::Data(DataCommand::Show(args)) => commands::data_show(&args),
        Command::Doctor(args) => commands::doctor(&args),
        Command::Flags => {
            ui::out(&serde_json::to_string_pretty(&args::flags())?);
            Ok(())
        }
    }
}

/// The form of the operations (`GRAFT_OPS=mlx`), their instructions (`GRAFT_CPU=avx2`) and their threads (`--threads`, else `GRAFT_THREADS`).
fn choose_form(threads: Option<usize>) -> Result<()> {
    match std::env::var("GRAFT_OPS").as_deref() {
        Ok("mlx") => graft_ops::set_form(Form::Mlx),
        Ok("cpu") if graft_ops::form() != Form::Cpu => {
            bail!(errors::Usage("GRAFT_OPS=cpu: this build has no CPU operations of graft's own".into()))
        }
        Ok("" | "cpu") | Err(_) => {}
        Ok(other) => bail!(errors::Usage(format!("GRAFT_OPS must be `mlx` or `cpu`, not `{other}`"))),
    }
    if let Some(level) = std::env::var("GRAFT_CPU").ok().filter(|text| !text.is_empty()) {
        match level.parse() {
            Ok(level) => graft_ops::set_cpu_level(level),
            Err(problem) => bail!(errors::Usage(format!("GRAFT_CPU: {problem}"))),
        }
    }
    let threads = match (threads, std::env::var("GRAFT_THREADS")) {
        (None, Ok(text)) if !text.is_empty() => match text.parse() {
            Ok(n) => Some(n),
            Err(_) => bail!(errors::Usage(format!("GRAFT_THREADS must be a whole number, not `{text}`"))),
        },
        (given, _) => given,
    };
    match threads {
        Some(0) => bail!(errors::Usage("--threads must be at least 1".into())),
        Some(n) => graft_ops::set_threads(n),
        None => {}
    }
    Ok(())
}
