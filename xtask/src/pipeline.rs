//! `cargo xtask pipeline`: train, measure, fuse, serve and ask with a model and data of one's own, in one command.
//! `cargo xtask demo` is a preset of it.
//!
//! Everything goes through the `graft` program as a user would type it; what is measured comes over HTTP.

use std::fs;
use std::io::{BufRead as _, BufReader, IsTerminal as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::children::{Process, Temporary};
use crate::rows::{self, Held, Row};
use crate::{data, model, record, setup, sh};

/// The demo's steps and `graft train` flags: what gives most in a minute and a half on two cores.
const DEMO: (u64, &str) = (240, "--num-layers 16 --rank 16 --batch-size 4 --learning-rate 1e-3");

/// Rows whose answers are shown, and how many tokens of them.
const SHOWN: (usize, usize) = (3, 40);

/// Points of the loss curve.
const REPORTS: u64 = 20;

const USAGE: &str = "usage: cargo xtask pipeline --model M --data D [--dora] [--iters N] [--keep] [-- flags of graft \
    train]\n       cargo xtask demo [--dora] [--iters N] [--keep] [--record]";

/// What is to be done.
#[derive(Default)]
struct Plan {
    /// As `graft` takes it; none is the demo's.
    model: Option<String>,
    data: PathBuf,
    dora: bool,
    keep: bool,
    record: bool,
    iters: Option<u64>,
    /// More flags of `graft train`.
    flags: Vec<String>,
}

pub(crate) fn task(args: &[String]) -> Result<()> {
    let plan = Plan::default().with(args)?;
    let complete = plan.model.is_some() && !plan.data.as_os_str().is_empty();
    ensure!(complete, "--model and --data are required\n{USAGE}");
    ensure!(!plan.record, "--record is for the demo alone\n{USAGE}");
    plan.run().map(drop)
}

pub(crate) fn demo(args: &[String]) -> Result<()> {
    let flags = DEMO.1.split(' ').map(str::to_owned).collect();
    let plan = Plan { data: data::dir(), iters: Some(DEMO.0), flags, ..Plan::default() }.with(args)?;
    let report = plan.run()?;
    if plan.record { record::save(plan.kind(), report) } else { Ok(()) }
}

impl Plan {
    fn with(mut self, args: &[String]) -> Result<Self> {
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let mut value = || args.next().cloned().with_context(|| format!("{arg} needs a value\n{USAGE}"));
            match arg.as_str() {
                "--model" => self.model = Some(value()?),
                "--data" => self.data = value()?.into(),
                "--iters" => self.iters = Some(value()?.parse().context("--iters needs a whole number")?),
                "--dora" => self.dora = true,
                "--keep" => self.keep = true,
                "--record" => self.record = true,
                "--" => self.flags.extend(args.by_ref().cloned()),
                _ => bail!("unknown argument {arg}\n{USAGE}"),
            }
        }
        Ok(self)
    }

    fn kind(&self) -> &'static str {
        if self.dora { "dora" } else { "lora" }
    }

    /// Runs all of it and returns what was measured.
    fn run(&self) -> Result<Value> {
        let stages = Stages(Instant::now());
        let held = Held::load(&self.data)?;
        stages.begin("setting up and building graft");
        setup::run()?;
        let graft = Graft(sh::graft()?);
        let base = match &self.model {
            Some(model) => model.clone(),
            None => model::dir(&graft.0)?.display().to_string(),
        };
        let temporary = if self.keep { None } else { Some(Temporary::new()?) };
        let folder = match &temporary {
            Some(temporary) => temporary.0.clone(),
            None => {
                let name = self.data.file_name().unwrap_or_default().to_string_lossy();
                sh::fresh(sh::target()?.join("pipeline").join(format!("{name}-{}", self.kind())))?
            }
        };
        let place = |name| folder.join(name).display().to_string();
        let (adapter, fused) = (place("adapter"), place("fused"));

        stages.begin("training");
        let train = self.train(&base, &adapter);
        graft.run(&train)?;
        let training = training(Path::new(&adapter))?;

        stages.begin("asking base and adapter, served together");
        let mut report = json!({
            "model": Path::new(&base).file_name().map(|name| name.to_string_lossy()),
            "fine_tune_type": self.kind(),
            "rows": if let Held::Questions(rows) = &held { Some(rows.len()) } else { None },
            "training": training,
            "machine": graft.machine()?,
        });
        let named = format!("adapter={adapter}");
        let both = words(&["server", "--model", &base, "--model-id", "base", "--adapter", &named]);
        ask(&graft.serve(&both)?, &held, &["base", "adapter"], &mut report)?;

        stages.begin("fusing the adapter into the base");
        let fuse = words(&["fuse", "--model", &base, "--adapter-path", &adapter, "--save-path", &fused]);
        graft.run(&fuse)?;

        stages.begin("asking the fused model");
        let alone = words(&["server", "--model", &fused, "--model-id", "fused"]);
        ask(&graft.serve(&alone)?, &held, &["fused"], &mut report)?;

        if let Held::Text(_) = held {
            stages.begin("measuring the perplexity");
            // `graft lora --test` reads test.jsonl; the held-out rows may be those of valid.jsonl.
            let held = folder.join("held");
            fs::create_dir_all(&held)?;
            fs::copy(rows::held_file(&self.data)?, held.join("test.jsonl"))?;
            for (name, model, adapter) in
                [("base", &base, ""), ("adapter", &base, adapter.as_str()), ("fused", &fused, "")]
            {
                report["scores"][name] = graft.perplexity(model, adapter, &held)?.into();
            }
        }
        let adapter_file = fs::metadata(Path::new(&adapter).join("adapters.safetensors"))?;
        report["bytes"] = json!({
            "base": graft.weight_bytes(&base)?,
            "adapter": adapter_file.len(),
            "fused": graft.weight_bytes(&fused)?,
        });
        stages.begin("done");
        println!("{}", record::render(&report));
        if self.keep {
            let question = report["questions"][0].as_str().unwrap_or_default();
            let generate = words(&["generate", "--model", &fused, "--prompt", question]);
            println!("Adapter and fused model are kept in {}. What you can type next:\n", folder.display());
            println!("  {}\n  {}", graft.line(&generate), graft.line(&both));
        } else {
            println!("Nothing is kept without --keep. What ran, for you to change:\n");
            println!("  {}\n  {}\n  {}", graft.line(&train), graft.line(&both), graft.line(&fuse));
        }
        println!("  cargo xtask pipeline --model M --data D      (the same with yours)");
        Ok(report)
    }

    fn train(&self, base: &str, adapter: &str) -> Vec<String> {
        let data = self.data.display().to_string();
        let mut line = words(&["train", "--model", base, "--data", &data, "--adapter-path", adapter]);
        line.extend(words(&["--fine-tune-type", self.kind()]));
        if let Some(iters) = self.iters {
            let every = (iters / REPORTS).max(1).to_string();
            line.extend(words(&["--iters", &iters.to_string(), "--steps-per-report", &every]));
        }
        line.extend(self.flags.iter().cloned());
        line
    }
}

/// Scores the served models, and lets them answer some of the held-out rows, taken evenly.
fn ask(server: &Server, held: &Held, names: &[&str], report: &mut Value) -> Result<()> {
    let rows = match held {
        Held::Questions(rows) => rows.as_slice(),
        Held::Text(row) => std::slice::from_ref(row),
    };
    let (total, live) = (rows.len(), std::io::stderr().is_terminal());
    let count = SHOWN.0.min(total);
    let shown: Vec<&Row> = (0..count).map(|i| &rows[i * total / count]).collect();
    for name in names {
        if let Held::Questions(_) = held {
            let right = rows::score(rows, &server.address, name, |done, right| {
                if live || done == total {
                    let end = if done == total { "\n" } else { "" };
                    eprint!("\r{name:<8} {right:>3} right of {done}{end}");
                }
            })?;
            report["scores"][name] = right.into();
        }
        let answers = shown.iter().map(|row| row.answer(&server.address, name, SHOWN.1));
        report["answers"][name] = answers.collect::<Result<Value>>()?;
    }
    report["questions"] = shown.iter().map(|row| row.question()).collect();
    Ok(())
}

pub(crate) fn words(line: &[&str]) -> Vec<String> {
    line.iter().map(|word| (*word).to_owned()).collect()
}

/// Says what goes on, with the time since the start.
struct Stages(Instant);

impl Stages {
    fn begin(&self, what: &str) {
        let seconds = self.0.elapsed().as_secs();
        eprintln!("\n[{:>2}:{:02}] {what}", seconds / 60, seconds % 60);
    }
}

/// The program.
pub(crate) struct Graft(pub(crate) PathBuf);

impl Graft {
    /// The line as it would be typed, its program relative to where we are if it is below.
    fn line(&self, words: &[String]) -> String {
        let here = std::env::current_dir().unwrap_or_default();
        let program = self.0.strip_prefix(here).unwrap_or(&self.0).display().to_string();
        let quoted = |word: &String| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+".contains(c);
            if !word.is_empty() && word.chars().all(plain) {
                word.clone()
            } else {
                format!("'{}'", word.replace('\'', r"'\''"))
            }
        };
        [&program].into_iter().chain(words).map(quoted).collect::<Vec<_>>().join(" ")
    }

    pub(crate) fn command(&self, words: &[String]) -> Command {
        let mut command = Command::new(&self.0);
        command.args(words).stdin(Stdio::null());
        command
    }

    pub(crate) fn run(&self, words: &[String]) -> Result<()> {
        eprintln!("$ {}", self.line(words));
        sh::run(&mut self.command(words))
    }

    /// Starts a server on a free port and waits until it is ready.
    pub(crate) fn serve(&self, line: &[String]) -> Result<Server> {
        let line = [line, &words(&["--port", "0", "--log-level", "ERROR"])].concat();
        eprintln!("$ {}", self.line(&line));
        let (process, stdout) = Process::start(self.command(&line).stdout(Stdio::piped()))?;
        let mut stdout = BufReader::new(stdout.context("graft server has no output")?);
        let mut ready = String::new();
        stdout.read_line(&mut ready)?;
        let Some((_, address)) = ready.trim().split_once("http://") else {
            bail!("graft server ended with {} before it was ready", process.wait()?);
        };
        Ok(Server { address: address.to_owned(), _stdout: stdout, process })
    }

    /// Perplexity on the data's test rows.
    fn perplexity(&self, model: &str, adapter: &str, data: &Path) -> Result<f64> {
        let line = words(&["lora", "--test", "--model", model, "--adapter-path", adapter, "--data"]);
        let text = sh::output(self.command(&line).arg(data))?;
        // `Test loss 1.234, Test ppl 3.435.`
        let value = text.split("Test ppl ").nth(1).map(|rest| rest.trim().trim_end_matches('.'));
        let value = value.with_context(|| format!("graft lora --test printed no perplexity: {text}"))?;
        Ok(value.parse()?)
    }

    pub(crate) fn json(&self, line: &[&str]) -> Result<Value> {
        let text = sh::output(&mut self.command(&words(line)))?;
        serde_json::from_str(&text).with_context(|| format!("graft {} printed {text}", line.join(" ")))
    }

    fn weight_bytes(&self, model: &str) -> Result<Value> {
        Ok(self.json(&["inspect", model, "--json"])?["weight_bytes"].take())
    }

    /// Where figures were measured.
    fn machine(&self) -> Result<String> {
        let facts = self.json(&["doctor", "--json"])?;
        let mut features = facts["cpu_features"].as_array().into_iter().flatten().filter_map(Value::as_str);
        // f16c and the like come after the vectors that they belong to.
        let widest = features.rfind(|name| name.starts_with("avx")).unwrap_or(std::env::consts::ARCH);
        Ok(format!("{} cores with {widest}", facts["cores"]))
    }
}

/// A server that runs; it ends when this is dropped.
pub(crate) struct Server {
    pub(crate) address: String,
    /// Held open, since a program that cannot print ends.
    _stdout: BufReader<std::process::ChildStdout>,
    pub(crate) process: Process,
}

/// What a finished run says of itself, from its metrics.jsonl and adapter_config.json.
fn training(adapter: &Path) -> Result<Value> {
    let read = |name: &str| {
        let file = adapter.join(name);
        fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))
    };
    let config: Value = serde_json::from_str(&read("adapter_config.json")?)?;
    let lines = read("metrics.jsonl")?;
    let lines = lines.lines().map(serde_json::from_str::<Value>).collect::<Result<Vec<_>, _>>()?;
    let reports: Vec<&Value> = lines.iter().filter(|line| line["kind"] == "train").collect();
    let last = reports.last().context("metrics.jsonl holds no training report")?;
    let (mut seconds, mut done) = (0.0, 0);
    for report in &reports {
        let iter = report["iter"].as_u64().unwrap_or_default();
        seconds += (iter - done) as f64 * report["step_seconds"].as_f64().unwrap_or_default();
        done = iter;
    }
    let rows = done as f64 * config["batch_size"].as_f64().unwrap_or_default();
    let losses: Vec<&Value> = reports.iter().map(|report| &report["loss"]).collect();
    let rounded = |x: f64| (x * 10.0).round() / 10.0;
    Ok(json!({
        "iters": done,
        "seconds": rounded(seconds),
        "rows_per_second": rounded(rows / seconds),
        "tokens_per_second": rounded(last["tokens"].as_f64().unwrap_or_default() / seconds),
        "peak_memory_bytes": last["peak_memory_bytes"],
        "losses": losses,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_change_the_plan() {
        let preset = Plan { iters: Some(120), flags: words(&["--rank", "16"]), ..Plan::default() };
        let plan = preset.with(&words(&["--dora", "--iters", "7", "--", "--seed", "3"])).unwrap();
        let line = plan.train("M", "A").join(" ");
        assert!(
            line.contains("--fine-tune-type dora --iters 7 --steps-per-report 1 --rank 16 --seed 3"),
            "{line}"
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        let message = |args: &[&str]| format!("{:#}", Plan::default().with(&words(args)).err().unwrap());
        assert!(message(&["--modle", "M"]).contains("--modle"));
        assert!(message(&["--model"]).contains("--model needs a value"));
        assert!(message(&["--iters", "many"]).contains("--iters needs a whole number"));
    }

    #[test]
    fn words_with_spaces_are_quoted() {
        let line = Graft("/bin/graft".into()).line(&words(&["-p", "it's dark"]));
        assert_eq!(line, r"/bin/graft -p 'it'\''s dark'");
    }
}
