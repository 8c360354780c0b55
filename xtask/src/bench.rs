//! `cargo xtask bench`: tokens per second and peak memory of the `graft` program, used as a user would, in one table;
//! with `--peers` beside other kits that do the same job in turn with it, since machines are noisy.

use std::fmt::Write as _;
use std::fs;
use std::io::Read as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::children::Process;
use crate::peers::Peers;
use crate::pipeline::{Graft, words};
use crate::{data, figures, http, model, peers, scaling, setup, sh};

const USAGE: &str = "usage: cargo xtask bench [--quick] [--peers [--without KIT]] [--only NAME] [--data DIR] [--scaling] [--write]\n       \
    cargo xtask bench --criterion [FILTER]";

/// The reference job of training: blocks that get an adapter, its rank, rows of a batch. peers.py says the same.
const BLOCKS: &str = "16";
const RANK: &str = "8";
const ROWS: usize = 4;

/// Tokens of a prompt, of an answer, and of an answer by the server.
const PROMPT: usize = 512;
const ANSWER: usize = 64;
const SERVED: usize = 128;

/// A prompt that a base goes on with for as long as it may.
const STORY: &str = "Once upon a time, in a village by the sea,";

/// One token each, after a space or not.
const WORDS: [&str; 16] = [
    "red", "one", "the", "not", "time", "day", "new", "old", "man", "life", "way", "world", "school",
    "house", "night", "water",
];

/// What is measured.
#[derive(Clone, Copy)]
enum Job {
    Prefill,
    /// One answer, with an unfused adapter of this kind.
    Decode(Option<&'static str>),
    /// This many answers at once, from a server.
    Serve(usize),
    /// Training of this kind and rank, on a packed base or on a dense one.
    Train(&'static str, &'static str, bool),
}

const JOBS: [(&str, Job); 14] = [
    ("prefill 512", Job::Prefill),
    ("decode", Job::Decode(None)),
    ("decode, LoRA unfused", Job::Decode(Some("lora"))),
    ("decode, DoRA unfused", Job::Decode(Some("dora"))),
    ("server, 1 answer", Job::Serve(1)),
    ("server, 4 answers", Job::Serve(4)),
    ("server, 8 answers", Job::Serve(8)),
    ("server, 16 answers", Job::Serve(16)),
    ("train LoRA, 4-bit base", Job::Train("lora", RANK, false)),
    ("train DoRA, 4-bit base", Job::Train("dora", RANK, false)),
    ("train LoRA, dense base", Job::Train("lora", RANK, true)),
    ("train DoRA, dense base", Job::Train("dora", RANK, true)),
    // What DoRA's norm costs where it costs most.
    ("train LoRA rank 64, 4-bit base", Job::Train("lora", "64", false)),
    ("train DoRA rank 64, 4-bit base", Job::Train("dora", "64", false)),
];

/// Who does it.
#[derive(Clone, Copy, PartialEq)]
enum Program {
    Graft,
    Llama(&'static str),
    Peft,
    MlxLm,
}

impl Program {
    fn name(self) -> String {
        match self {
            Self::Graft => "graft".into(),
            Self::Llama(kind) => format!("llama.cpp {kind}"),
            Self::Peft => "PEFT".into(),
            Self::MlxLm => "mlx-lm".into(),
        }
    }
}

impl Job {
    /// Who can do it, graft first.
    fn programs(self) -> &'static [Program] {
        use Program::{Graft, Llama, MlxLm, Peft};
        match self {
            Self::Prefill | Self::Decode(None) => &[Graft, Llama("Q4_0"), Llama("Q4_K_M"), MlxLm],
            Self::Serve(_) => &[Graft, Llama("Q4_0"), Llama("Q4_K_M")],
            Self::Train(_, RANK, _) => &[Graft, Peft, MlxLm],
            Self::Decode(Some(_)) | Self::Train(..) => &[Graft],
        }
    }
}

/// What one run took.
struct Sample {
    tokens_per_second: f64,
    /// 0: unknown.
    peak_memory: u64,
    /// From a request to the first of its tokens, the median of those asked at once; of servers.
    first_token_seconds: Option<f64>,
}

impl Sample {
    fn new(tokens_per_second: f64, peak_memory: u64) -> Self {
        Self { tokens_per_second, peak_memory, first_token_seconds: None }
    }

    fn json(&self) -> Value {
        let (speed, memory) = (self.tokens_per_second, self.peak_memory);
        let mut sample = json!({"tokens_per_second": speed, "peak_memory_bytes": memory});
        if let Some(seconds) = self.first_token_seconds {
            sample["first_token_seconds"] = seconds.into();
        }
        sample
    }
}

#[derive(Default)]
struct Options {
    quick: bool,
    peers: bool,
    scaling: bool,
    write: bool,
    /// A kit that is not run: one of them takes longer than all others.
    without: Option<String>,
    only: Option<String>,
    data: Option<PathBuf>,
}

impl Options {
    fn of(args: &[String]) -> Result<Self> {
        let mut options = Self::default();
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let mut value = || args.next().cloned().with_context(|| format!("{arg} needs a value\n{USAGE}"));
            match arg.as_str() {
                "--quick" => options.quick = true,
                "--peers" => options.peers = true,
                "--scaling" => options.scaling = true,
                "--write" => options.write = true,
                "--without" => options.without = Some(value()?),
                "--only" => options.only = Some(value()?),
                "--data" => options.data = Some(value()?.into()),
                _ => bail!("unknown argument {arg}\n{USAGE}"),
            }
        }
        if let Some(kit) = &options.without {
            ensure!(
                peers::KITS.contains(&kit.as_str()),
                "--without {kit}: expected one of the kits {:?}",
                peers::KITS
            );
        }
        if let Some(only) = &options.only {
            let names = JOBS.map(|job| job.0);
            let known = names.iter().any(|name| name.contains(only.as_str()));
            ensure!(known, "--only {only}: expected a part of one of the names {names:?}");
        }
        Ok(options)
    }

    /// Each job is done this often by each program.
    fn rounds(&self) -> usize {
        if self.quick { 1 } else { 3 }
    }
}

/// Measures what the arguments name into `target/bench.json`; `--write` alone writes the document from that file.
pub(crate) fn task(args: &[String]) -> Result<()> {
    if let Some((first, rest)) = args.split_first()
        && first == "--criterion"
    {
        setup::run()?;
        let benches = ["bench", "--profile", "dev", "--workspace", "--bench", "*", "--"];
        return sh::run(sh::cargo().args(benches).args(rest));
    }
    let options = Options::of(args)?;
    let file = sh::target()?.join("bench.json");
    if args != ["--write"] {
        setup::run()?;
        let graft = Graft(sh::graft()?);
        let mut record = figures::load(&file)?;
        record["schema"] = 1.into();
        record["machine"] = figures::machine(&graft)?;
        // Kept after each part: what follows may take an hour, and be stopped.
        let keep = |record: &Value| Ok(fs::write(&file, serde_json::to_string_pretty(record)? + "\n")?);
        if options.scaling {
            record["scaling"] = scaling::measure(&graft, options.quick)?;
            keep(&record)?;
        } else {
            let steps = if options.quick { 5 } else { 12 };
            let bench = Bench::new(&graft, options.data.as_deref(), steps)?;
            bench.run(&options, &mut record, keep)?;
        }
        println!("{}", figures::render(&record));
        eprintln!("all samples: {}", file.display());
    }
    if options.write { figures::write(&file) } else { Ok(()) }
}

/// What the jobs need: programs, models, rows.
struct Bench<'a> {
    graft: &'a Graft,
    /// The demo's base, packed and dense.
    base: [PathBuf; 2],
    /// Scratch.
    folder: PathBuf,
    /// Which rows are trained on.
    rows: String,
    steps: usize,
}

impl<'a> Bench<'a> {
    fn new(graft: &'a Graft, data: Option<&Path>, steps: usize) -> Result<Self> {
        let folder = sh::target()?.join("bench");
        let (packed, dense) = (model::dir(&graft.0)?, folder.join("dense"));
        fs::create_dir_all(folder.join("data"))?;
        if !dense.exists() {
            let (from, to) = (packed.display().to_string(), dense.display().to_string());
            let convert = ["convert", "-d", "--dtype", "bfloat16", "--hf-path", &from, "--mlx-path", &to];
            graft.run(&words(&convert))?;
        }
        let source = data.map_or_else(data::dir, Path::to_path_buf).join("train.jsonl");
        let text =
            fs::read_to_string(&source).with_context(|| format!("cannot read {}", source.display()))?;
        let (rows, joined) = texts(&text, steps * ROWS).with_context(|| source.display().to_string())?;
        for name in ["train.jsonl", "valid.jsonl"] {
            let lines = rows.iter().map(|row| json!({"text": row}).to_string() + "\n");
            fs::write(folder.join("data").join(name), lines.collect::<String>())?;
        }
        let name = source.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
        let rows = format!("{} rows of {name}{joined}", rows.len());
        Ok(Self { graft, base: [packed, dense], folder, rows, steps })
    }

    /// Runs the jobs and puts them into the record, which is kept after each.
    fn run(&self, options: &Options, record: &mut Value, keep: impl Fn(&Value) -> Result<()>) -> Result<()> {
        let peers = if options.peers {
            Peers::install(&self.folder, options.without.as_deref())?
        } else {
            Peers::default()
        };
        let mut missing = peers.missing.clone();
        // A part of the jobs leaves the figures of the others.
        if options.only.is_none() || record["jobs"].is_null() {
            record["jobs"] = json!([]);
        }
        record["rounds"] = options.rounds().into();
        record["rows"] = self.rows.clone().into();
        record["versions"] = peers.versions();
        for (name, job) in JOBS {
            if options.only.as_ref().is_some_and(|only| !name.contains(only.as_str())) {
                continue;
            }
            let programs: Vec<Program> = job
                .programs()
                .iter()
                .copied()
                .filter(|&program| peers.has(program.name().as_str()))
                .collect();
            let mut samples = vec![Vec::new(); programs.len()];
            for round in 0..options.rounds() {
                for (&program, samples) in programs.iter().zip(&mut samples) {
                    // Minutes a step: once has to do.
                    let slow = program == Program::MlxLm;
                    if slow && (round > 0 || options.quick && matches!(job, Job::Train(..))) {
                        continue;
                    }
                    match self.measure(job, program, &peers) {
                        Ok(sample) => {
                            eprintln!("{name}: {} {:.1} tokens/s", program.name(), sample.tokens_per_second);
                            samples.push(sample.json());
                        }
                        Err(error) if program == Program::Graft => return Err(error.context(name)),
                        Err(error) => missing.push(format!("{name}, {}: {error:#}", program.name())),
                    }
                }
            }
            let of = |(program, samples): (&Program, Vec<Value>)| {
                (!samples.is_empty()).then(|| json!({"name": program.name(), "samples": samples}))
            };
            let programs: Vec<Value> = programs.iter().zip(samples).filter_map(of).collect();
            if let Some(jobs) = record["jobs"].as_array_mut() {
                jobs.retain(|job| job["name"] != name);
                jobs.push(json!({"name": name, "programs": programs}));
                jobs.sort_by_key(|job| JOBS.iter().position(|(name, _)| job["name"] == *name));
            }
            record["missing"] = missing.clone().into();
            keep(record)?;
        }
        missing.iter().for_each(|line| eprintln!("not measured: {line}"));
        Ok(())
    }

    fn measure(&self, job: Job, program: Program, peers: &Peers) -> Result<Sample> {
        let red = [WORDS[0]; PROMPT].join(" ");
        match (job, program) {
            (Job::Prefill, Program::Graft) => self.generate(&red, 1, None, "Prompt: "),
            (Job::Decode(kind), Program::Graft) => self.generate(STORY, ANSWER, kind, "Generation: "),
            (Job::Prefill, Program::Llama(kind)) => peers.llama_bench(kind, PROMPT, 0).and_then(llama),
            (Job::Decode(_), Program::Llama(kind)) => peers.llama_bench(kind, 0, ANSWER).and_then(llama),
            (Job::Prefill, Program::MlxLm) => {
                script(peers.generate(&self.base[0], &red, 1)?, "prompt_tokens_per_second")
            }
            (Job::Decode(_), Program::MlxLm) => {
                script(peers.generate(&self.base[0], STORY, ANSWER / 4)?, "tokens_per_second")
            }
            (Job::Serve(count), Program::Graft) => {
                let base = self.base[0].display().to_string();
                let server = self.graft.serve(&words(&["server", "--model", &base, "--model-id", "base"]))?;
                answers(&server.address, count, &server.process)
            }
            (Job::Serve(count), Program::Llama(kind)) => {
                // A port that was free a moment ago: llama-server cannot choose one and say which.
                let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
                let log = fs::File::create(self.folder.join("llama-server.log"))?;
                let mut command = peers.llama_server(kind, address.port(), count)?;
                let (process, _) =
                    Process::start(command.stdout(Stdio::null()).stderr(log).stdin(Stdio::null()))?;
                answers(&address.to_string(), count, &process)
            }
            (Job::Train(kind, rank, dense), Program::Graft) => {
                let adapter = sh::fresh(self.folder.join("adapter"))?;
                self.train(
                    kind,
                    &self.base[usize::from(dense)],
                    &adapter,
                    [BLOCKS, rank, &self.steps.to_string()],
                )?;
                let (tokens_per_second, peak_memory) = metrics(&adapter)?;
                Ok(Sample::new(tokens_per_second, peak_memory))
            }
            (Job::Train(kind, _, dense), _) => {
                let kit = if program == Program::Peft { "peft" } else { "mlx" };
                let steps = if program == Program::Peft { self.steps } else { 2 };
                let base = &self.base[usize::from(dense || program == Program::Peft)];
                let mut command = peers.train(kit, base, &self.folder.join("data/train.jsonl"), steps)?;
                command.args((kind == "dora").then_some("--dora"));
                command.args((program == Program::Peft && !dense).then_some("--nf4"));
                script(command, "tokens_per_second")
            }
            (_, Program::Peft | Program::MlxLm) => bail!("{} is not asked for this", program.name()),
        }
    }

    /// The speed that `graft generate` prints in the line with this beginning.
    fn generate(&self, prompt: &str, tokens: usize, kind: Option<&str>, line: &str) -> Result<Sample> {
        let base = self.base[0].display().to_string();
        let mut words = words(&["generate", "--model", &base, "--ignore-chat-template", "--prompt", prompt]);
        words.extend(["--max-tokens".to_owned(), tokens.to_string()]);
        if let Some(kind) = kind {
            let adapter = self.folder.join(format!("all-{kind}"));
            if !adapter.exists() {
                self.train(kind, &self.base[0], &adapter, ["-1", RANK, "1"])?;
            }
            words.extend(["--adapter-path".to_owned(), adapter.display().to_string()]);
        }
        let (text, peak_memory) = measured(&mut self.graft.command(&words))?;
        let tokens_per_second = speed(&text, line)
            .with_context(|| format!("graft generate printed no line that begins with {line}: {text}"))?;
        Ok(Sample::new(tokens_per_second, peak_memory))
    }

    fn train(&self, kind: &str, base: &Path, adapter: &Path, counts: [&str; 3]) -> Result<()> {
        let [blocks, rank, steps] = counts;
        let flags = [
            ["--fine-tune-type", kind],
            ["--num-layers", blocks],
            ["--rank", rank],
            ["--iters", steps],
            ["--scale", "20"],
            ["--learning-rate", "1e-5"],
        ];
        let flags: Vec<&str> = flags.concat();
        train(self.graft, base, &self.folder.join("data"), adapter, ROWS, &flags)
    }
}

/// Trains as a user would, with a report of every step.
pub(crate) fn train(
    graft: &Graft,
    model: &Path,
    data: &Path,
    adapter: &Path,
    rows: usize,
    flags: &[&str],
) -> Result<()> {
    let mut command = graft.command(&words(&["train", "--steps-per-report", "1", "--val-batches", "0"]));
    command.arg("--model").arg(model).arg("--data").arg(data).arg("--adapter-path").arg(adapter);
    measured(command.args(["--batch-size", &rows.to_string()]).args(flags)).map(drop)
}

/// Targets per second over all steps but the first, which warms up, and the peak memory, from a run's metrics.jsonl.
pub(crate) fn metrics(adapter: &Path) -> Result<(f64, u64)> {
    let file = adapter.join("metrics.jsonl");
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let lines = text.lines().map(serde_json::from_str::<Value>).collect::<Result<Vec<_>, _>>()?;
    let steps: Vec<&Value> = lines.iter().filter(|line| line["kind"] == "train").collect();
    let ([first, rest @ ..], Some(last)) = (&steps[..], steps.last()) else {
        bail!("{} holds no step", file.display());
    };
    let number = |step: &Value, key: &str| step[key].as_f64().unwrap_or_default();
    let seconds: f64 = rest.iter().map(|step| number(step, "step_seconds")).sum();
    ensure!(seconds > 0.0, "{} holds only the step that warms up", file.display());
    let tokens = number(last, "tokens") - number(first, "tokens");
    Ok((tokens / seconds, last["peak_memory_bytes"].as_u64().unwrap_or_default()))
}

/// What one of our Python scripts prints last: a line of JSON.
fn script(mut command: Command, key: &str) -> Result<Sample> {
    let (text, peak_memory) = measured(&mut command)?;
    let result: Option<Value> = text.lines().last().and_then(|line| serde_json::from_str(line).ok());
    let speed = result.and_then(|result| result[key].as_f64());
    let tokens_per_second = speed.with_context(|| format!("peers.py printed no {key}: {text}"))?;
    Ok(Sample::new(tokens_per_second, peak_memory))
}

/// What llama-bench prints: one test as JSON.
fn llama(mut command: Command) -> Result<Sample> {
    let (text, peak_memory) = measured(&mut command)?;
    let tests: Value = serde_json::from_str(&text).with_context(|| format!("llama-bench printed {text}"))?;
    let speed = tests[0]["avg_ts"].as_f64();
    let tokens_per_second = speed.with_context(|| format!("llama-bench printed no avg_ts: {text}"))?;
    Ok(Sample::new(tokens_per_second, peak_memory))
}

/// Lets a server give `count` answers at once, after a short one that warms it up.
fn answers(address: &str, count: usize, process: &Process) -> Result<Sample> {
    // Tokens, and seconds to the first.
    let ask = |word: &str, tokens: usize| -> Result<(u64, f64)> {
        let begin = Instant::now();
        let prompt = [word; 10].join(" ");
        let body = json!({
            "model": "base", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": true,
            "stream_options": {"include_usage": true},
        });
        let (mut used, mut first) = (None, None);
        http::events(address, "/v1/completions", &body, |event| {
            first = first.or_else(|| {
                event["choices"][0]["text"].as_str().filter(|text| !text.is_empty())?;
                Some(begin.elapsed().as_secs_f64())
            });
            used = event["usage"]["completion_tokens"].as_u64().or(used);
            true
        })?;
        used.zip(first).context("the server sent no text or no usage")
    };
    let patience = Instant::now() + Duration::from_secs(60);
    while let Err(error) = ask("hello", 8) {
        ensure!(Instant::now() < patience, "the server does not become ready: {error:#}");
        std::thread::sleep(Duration::from_millis(200));
    }
    let begin = Instant::now();
    let answers = std::thread::scope(|scope| {
        let threads: Vec<_> = WORDS[..count].iter().map(|word| scope.spawn(|| ask(word, SERVED))).collect();
        let joined = threads.into_iter().map(|thread| match thread.join() {
            Ok(answer) => answer,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        joined.collect::<Result<Vec<_>>>()
    })?;
    let seconds = begin.elapsed().as_secs_f64();
    let tokens: u64 = answers.iter().map(|(tokens, _)| tokens).sum();
    let firsts: Vec<f64> = answers.iter().map(|(_, first)| *first).collect();
    Ok(Sample {
        tokens_per_second: tokens as f64 / seconds,
        peak_memory: process.peak_memory(),
        first_token_seconds: Some(figures::median(&firsts)),
    })
}

/// Runs a program quietly; what it wrote to stdout, and its peak memory in bytes. What it wrote to stderr is part of
/// an error.
fn measured(command: &mut Command) -> Result<(String, u64)> {
    let log = sh::target()?.join("bench/stderr.txt");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(fs::File::create(&log)?);
    let (process, stdout) = Process::start(command)?;
    let mut stdout = stdout.context("a program has no output")?;
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        stdout.read_to_end(&mut bytes).map(|_| String::from_utf8_lossy(&bytes).into_owned())
    });
    let status = process.wait()?;
    let text =
        reader.join().map_err(|_| anyhow::anyhow!("the reader of a program's output has failed"))??;
    if !status.success() {
        let said = fs::read(&log).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        let lines: Vec<&str> = said.lines().collect();
        bail!(
            "{} failed with {status}\n{}",
            sh::line(command),
            lines[lines.len().saturating_sub(8)..].join("\n")
        );
    }
    Ok((text, process.peak_memory()))
}

/// `Prompt: 12 tokens, 150.250 tokens-per-sec` -> 150.25.
fn speed(text: &str, line: &str) -> Option<f64> {
    let rest = text.lines().rev().find_map(|own| own.strip_prefix(line))?;
    rest.split(", ").nth(1)?.split(' ').next()?.parse().ok()
}

/// `count` texts, taken evenly from rows of text or of messages, and how they were made. Every kit shall see the same
/// tokens, so chats become plain text; four of their short rows are joined, to be as long as rows of the reference job.
fn texts(lines: &str, count: usize) -> Result<(Vec<String>, &'static str)> {
    let mut texts = Vec::new();
    let mut chats = false;
    for (i, line) in lines.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let row: Value = serde_json::from_str(line).with_context(|| format!("line {}", i + 1))?;
        if let Some(text) = row["text"].as_str() {
            texts.push(text.to_owned());
            continue;
        }
        let messages = row["messages"].as_array();
        let messages = messages.with_context(|| format!("line {}: expected text or messages", i + 1))?;
        let mut text = String::new();
        for content in messages.iter().filter_map(|message| message["content"].as_str()) {
            writeln!(text, "{content}")?;
        }
        (chats, texts) = (true, {
            texts.push(text);
            texts
        });
    }
    if chats {
        texts = texts.chunks(4).map(<[String]>::concat).collect();
    }
    let found = texts.len();
    ensure!(found >= count, "expected {count} texts at least, found {found}");
    let chosen = (0..count).map(|i| texts[i * found / count].clone()).collect();
    Ok((chosen, if chats { ", four joined to one text" } else { "" }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_printed_speed_is_read() {
        let text = "Prompt: a word\n==========\nPrompt: 12 tokens, 150.250 tokens-per-sec\nGeneration: 1 tokens, \
            16.000 tokens-per-sec\n";
        assert_eq!(speed(text, "Prompt: "), Some(150.25));
        assert_eq!(speed(text, "Generation: "), Some(16.0));
        assert_eq!(speed("nothing", "Prompt: "), None);
    }

    #[test]
    fn the_first_step_is_not_counted() {
        let folder = std::env::temp_dir().join(format!("graft-bench-test-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let step = |tokens, seconds| {
            json!({"kind": "train", "tokens": tokens, "step_seconds": seconds, "peak_memory_bytes": tokens})
                .to_string()
        };
        let text = [step(100, 9.0), step(150, 1.0), "{\"kind\":\"valid\"}".into(), step(250, 2.0)].join("\n");
        fs::write(folder.join("metrics.jsonl"), &text).unwrap();
        assert_eq!(metrics(&folder).unwrap(), (50.0, 250));
        fs::write(folder.join("metrics.jsonl"), text.lines().next().unwrap()).unwrap();
        assert!(metrics(&folder).unwrap_err().to_string().contains("only the step that warms up"));
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn rows_become_texts() {
        let plain: String = (0..8).map(|i| format!("{{\"text\": \"{i}\"}}\n")).collect();
        assert_eq!(texts(&plain, 4).unwrap(), (vec!["0".into(), "2".into(), "4".into(), "6".into()], ""));
        let chat = "{\"messages\": [{\"content\": \"q\"}, {\"content\": \"a\"}]}\n".repeat(8);
        assert_eq!(texts(&chat, 2).unwrap().0, vec!["q\na\n".repeat(4); 2]);
        assert!(texts(&plain, 9).unwrap_err().to_string().contains("expected 9 texts at least, found 8"));
        assert!(texts("{}", 1).unwrap_err().to_string().contains("line 1: expected text or messages"));
    }

    #[test]
    fn arguments_are_checked() {
        let options = |line: &str| Options::of(&words(&line.split(' ').collect::<Vec<_>>()));
        assert_eq!(options("--quick --only DoRA").unwrap().rounds(), 1);
        for (line, part) in [
            ("--fast", "--fast"),
            ("--data", "--data needs a value"),
            ("--only x9", "prefill 512"),
            ("--without x9", "llama.cpp"),
        ] {
            assert!(format!("{:#}", options(line).err().unwrap()).contains(part), "{line}");
        }
    }
}
