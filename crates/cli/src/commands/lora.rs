//! `graft lora` and `graft train`: settings, a run, its report.

use super::data;
use super::load::{self, Loaded};
use crate::args::LoraArgs;
use crate::errors::{Interrupted, Usage};
use crate::settings::{self, Defaults, Settings};
use crate::{host, ui};
use anyhow::{Context, Result, bail};
use graft_adapters::{AdapterSet, CONFIG_FILE, FineTuneType, Fingerprint, LoraParameters};
use graft_model::{GenerateOptions, Sampling, Tokenizer};
use graft_train::{Data, DataConfig, Event, Outcome, Question, Row, TrainConfig, TrainReport, read_rows};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// Width of the loss curve in characters.
const CURVE: usize = 60;

/// Most tokens of an answer to a sample prompt.
const SAMPLE_TOKENS: usize = 100;

/// Trains, tests, or both.
pub(crate) fn lora(args: &LoraArgs, defaults: Defaults) -> Result<()> {
    let settings = Settings::new(args, defaults)?;
    let stop = host::stop_flag(|| ui::note("stopping after this step; once more stops at once"));
    let unless_stopped = || match stop.load(Ordering::Relaxed) {
        true => bail!(Interrupted("Interrupted while loading; nothing was written.".into())),
        false => Ok(()),
    };
    let model = settings.text("model").unwrap_or_default();
    let num_layers = settings.int("num_layers");
    if settings.flag("train") {
        let layers = load::config(model)?.layers;
        if num_layers > i64::from(layers) {
            bail!(Usage(format!("--num-layers {num_layers}: the model has {layers} blocks (-1 trains all)")));
        }
    }
    ui::note(&format!("Loading {model}"));
    let loaded = Loaded::open(model)?;
    unless_stopped()?;
    ui::note("Loading datasets");
    let data = data::load(&settings, &loaded.encoder())?;
    unless_stopped()?;
    if settings.flag("train") {
        train(&settings, &loaded, &data, &stop)?;
    }
    if settings.flag("test") {
        test(&settings, &loaded, &data, &stop)?;
    }
    Ok(())
}

fn train(settings: &Settings, loaded: &Loaded, data: &Data, stop: &AtomicBool) -> Result<()> {
    let mut config = config(settings, loaded)?;
    check_start(&config, loaded)?;
    record_rows(&mut config.adapter_config, settings, data)?;
    let asked = sample_prompts(settings, loaded)?;
    config.samples = asked.iter().map(|question| (question.prompt.clone(), sample_options(loaded))).collect();
    let mut report = Report::new(config.iters, &loaded.tokenizer, &asked);
    let result =
        graft_train::run(&config, loaded.model.clone(), data, stop, &mut |event| report.event(&event));
    report.progress.done();
    let summary = result?;
    report.curve();
    if summary.outcome == (Outcome::Interrupted { step: 0 }) {
        bail!(Interrupted("Interrupted before the first step; nothing was written.".into()));
    }
    if let Outcome::Interrupted { step } = summary.outcome {
        bail!(Interrupted(format!(
            "Interrupted after {step} of {} iterations; all of it is saved. Continue with: {}",
            config.iters,
            resume_command()
        )));
    }
    ui::out(&format!("Saved final weights to {}.", summary.adapter_file.display()));
    Ok(())
}

/// A run goes on with the base it began with: what it starts from must not be an adapter of another one.
fn check_start(config: &TrainConfig, loaded: &Loaded) -> Result<()> {
    let dir = &config.adapter_path;
    if config.resume && dir.join(CONFIG_FILE).is_file() {
        let trained = AdapterSet::trained_on(dir)?;
        let other = trained.as_ref().and_then(|own| own.other_model_than(&loaded.base));
        if let Some(why) = other {
            bail!(
                "--resume: the run in {} cannot go on with {}: {why}; give the model it began with, or start from its weights \
                 with --resume-adapter-file",
                dir.display(),
                loaded.base.lineage
            );
        }
        return load::check_base(trained, dir, &loaded.base);
    }
    if let Some(file) = config.resume_adapter_file.as_ref().filter(|_| !config.resume) {
        let metadata = graft_quant::read_safetensors(file)?.1;
        let trained = metadata.get(Fingerprint::KEY).and_then(|text| serde_json::from_str(text).ok());
        return load::check_base(trained, file, &loaded.base);
    }
    Ok(())
}

/// Which rows the adapter was trained and validated on, for whoever measures it later: files and their hashes.
fn record_rows(config: &mut Map<String, Value>, settings: &Settings, data: &Data) -> Result<()> {
    if settings.all.get("hf_dataset").is_some_and(|described| !described.is_null()) {
        return Ok(());
    }
    let mut rows = Map::new();
    for (name, split) in [("train", &data.train), ("valid", &data.valid)] {
        if split.found {
            let hash = graft_adapters::file_hash(&split.file)?;
            // Whoever measures the adapter may stand elsewhere. A link keeps its name and its neighbours.
            let file = std::path::absolute(&split.file)?;
            rows.insert(name.into(), json!({"file": file.display().to_string(), "sha256": hash}));
        }
    }
    if let Some(extra) = config.get_mut("graft").and_then(Value::as_object_mut) {
        extra.insert("rows".into(), rows.into());
    }
    Ok(())
}

/// The questions of `--sample-prompts`.
fn sample_prompts(settings: &Settings, loaded: &Loaded) -> Result<Vec<Question>> {
    let Some(name) = settings.text("sample_prompts") else { return Ok(Vec::new()) };
    let file = Path::new(name);
    let (mut rows, form) = if file.extension().is_some_and(|e| e == "jsonl") {
        (read_rows(file)?, data::features(settings, &Map::new()))
    } else {
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("cannot read the sample prompts {}", file.display()))?;
        let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
        let row = |text: &str| settings::object(json!({"prompt": text, "completion": ""}));
        let rows = lines.map(|(line, text)| Row { line, value: row(text) }).collect();
        (rows, DataConfig::new(false, usize::MAX))
    };
    if rows.is_empty() {
        bail!("{}: there are no prompts: write one a line", file.display());
    }
    rows.iter_mut().for_each(|row| answerable(row, &form));
    let questions = Question::from_rows(file, &rows, &loaded.encoder(), &form)?;
    let context = loaded.model.config().max_positions as usize;
    if let Some(long) = questions.iter().find(|q| q.prompt.len() + SAMPLE_TOKENS > context) {
        bail!("{}:{}: the prompt is too long for the model's {context} tokens", file.display(), long.line);
    }
    Ok(questions)
}

/// Adds an empty answer to a row that has none: here nothing is compared with it.
fn answerable(row: &mut Row, form: &DataConfig) {
    let has = |key: &String| row.value.contains_key(key);
    if has(&form.prompt_feature) && !has(&form.completion_feature) && !has(&form.chat_feature) {
        row.value.insert(form.completion_feature.clone(), "".into());
    } else if let Some(Value::Array(messages)) = row.value.get_mut(&form.chat_feature)
        && messages.last().is_some_and(|last| last["role"] == "user")
    {
        messages.push(json!({"role": "assistant", "content": ""}));
    }
}

fn sample_options(loaded: &Loaded) -> GenerateOptions {
    let stop_ids = loaded.tokenizer.eos_ids().clone();
    GenerateOptions { max_tokens: SAMPLE_TOKENS, stop_ids, sampling: Sampling::greedy() }
}

/// The command line that goes on where this one stopped.
fn resume_command() -> String {
    let quoted = |a: String| {
        let plain = !a.is_empty() && a.chars().all(|c| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c));
        if plain { a } else { format!("'{}'", a.replace('\'', r"'\''")) }
    };
    let mut words: Vec<String> = std::env::args().skip(1).map(quoted).collect();
    if !words.iter().any(|w| w == "--resume") {
        words.push("--resume".into());
    }
    format!("graft {}", words.join(" "))
}

fn test(settings: &Settings, loaded: &Loaded, data: &Data, stop: &AtomicBool) -> Result<()> {
    ui::note("Testing");
    let route = loaded.route(settings.text("adapter_path"))?;
    if !settings.flag("train") {
        for warning in data.warnings(count(settings, "batch_size"), false) {
            ui::note(&format!("warning: {}", warning.text));
        }
    }
    let found = graft_train::test(
        &loaded.model,
        &route.route(),
        &data.test,
        count(settings, "batch_size"),
        settings.int("test_batches"),
        settings.int("seed") as u64,
        stop,
    )?;
    let Some(found) = found else {
        let saved = if settings.flag("train") { "; the trained adapter is saved" } else { "" };
        bail!(Interrupted(format!("Interrupted before the test was done, so it has no result{saved}.")));
    };
    ui::out(&format!("Test loss {:.3}, Test ppl {:.3}.", found.loss, found.perplexity));
    Ok(())
}

fn count(settings: &Settings, key: &str) -> usize {
    usize::try_from(settings.int(key)).unwrap_or_default()
}

fn config(settings: &Settings, loaded: &Loaded) -> Result<TrainConfig> {
    let empty = Map::new();
    let lora = settings.map("lora_parameters").unwrap_or(&empty);
    let number = |key: &str| lora.get(key).and_then(Value::as_f64).unwrap_or_default();
    let keys = lora.get("keys").and_then(Value::as_array);
    let keys = keys.map(|k| k.iter().filter_map(Value::as_str).map(str::to_string).collect());
    let name = settings.text("optimizer").unwrap_or_default();
    let Some(fine_tune_type) = settings.text("fine_tune_type").and_then(FineTuneType::from_name) else {
        bail!(Usage("fine_tune_type must be lora, dora or full".into()));
    };
    let base = serde_json::to_value(&loaded.base)?;
    let version = env!("CARGO_PKG_VERSION");
    let mut adapter_config = settings.all.clone();
    adapter_config.insert("graft".into(), json!({"version": version, Fingerprint::KEY: base}));
    let metadata = [("graft", version.to_string()), (Fingerprint::KEY, base.to_string())];
    Ok(TrainConfig {
        fine_tune_type,
        num_layers: i32::try_from(settings.int("num_layers")).unwrap_or(i32::MAX),
        lora: LoraParameters {
            rank: number("rank") as i32,
            scale: number("scale") as f32,
            dropout: number("dropout") as f32,
            keys,
        },
        optimizer: name.to_string(),
        optimizer_config: settings.optimizer_config(),
        learning_rate: settings.float("learning_rate"),
        lr_schedule: settings.map("lr_schedule").map(|m| m.clone().into()),
        batch_size: count(settings, "batch_size"),
        iters: count(settings, "iters") as u64,
        val_batches: settings.int("val_batches"),
        steps_per_report: count(settings, "steps_per_report") as u64,
        steps_per_eval: count(settings, "steps_per_eval") as u64,
        save_every: count(settings, "save_every") as u64,
        grad_accumulation_steps: count(settings, "grad_accumulation_steps") as u64,
        max_grad_norm: Some(settings.float("max_grad_norm")).filter(|n| *n > 0.0),
        grad_checkpoint: settings.flag("grad_checkpoint"),
        seed: settings.int("seed") as u64,
        adapter_path: PathBuf::from(settings.text("adapter_path").unwrap_or_default()),
        resume: settings.flag("resume"),
        resume_adapter_file: settings.text("resume_adapter_file").map(PathBuf::from),
        clear_cache_threshold: count(settings, "clear_cache_threshold"),
        samples: Vec::new(),
        adapter_config,
        metadata: metadata.into_iter().map(|(k, v)| (k.to_string(), v)).collect(),
        peak_memory: host::peak_memory,
    })
}

/// Turns events into lines and remembers the losses.
struct Report<'a> {
    tokenizer: &'a Tokenizer,
    asked: &'a [Question],
    progress: ui::Progress,
    losses: Vec<f64>,
    last: String,
}

impl<'a> Report<'a> {
    fn new(iters: u64, tokenizer: &'a Tokenizer, asked: &'a [Question]) -> Self {
        let progress = ui::Progress::new(iters, "training");
        Self { tokenizer, asked, progress, losses: Vec::new(), last: String::new() }
    }

    fn samples(&self, iter: u64, answers: &[Vec<u32>]) {
        for (question, ids) in self.asked.iter().zip(answers) {
            let answer = self.tokenizer.decode(ids, false).unwrap_or_else(|e| e.to_string());
            self.progress.line(&format!("Iter {iter}: {:?} -> {answer:?}", question.asked));
        }
    }

    fn event(&mut self, event: &Event) {
        match event {
            Event::Started { trainable, total, modules, iter, iters, batches_per_pass } => {
                let share = 100.0 * *trainable as f64 / (*total).max(1) as f64;
                let (part, all) = (*trainable as f64 / 1e6, *total as f64 / 1e6);
                self.progress.line(&format!(
                    "Trainable parameters: {share:.3}% ({part:.3}M/{all:.3}M), {modules} modules"
                ));
                let start = if *iter > 0 {
                    format!("Resuming after iteration {iter}")
                } else {
                    "Starting training".into()
                };
                self.progress.line(&format!("{start}, iters: {iters}, {batches_per_pass} batches per pass"));
                self.progress.start(*iter);
            }
            Event::Warning { text } => self.progress.line(&format!("warning: {text}")),
            Event::Step { iter } => self.progress.at(*iter, self.last.clone()),
            Event::Train(report) => self.train(report),
            Event::ValidProgress { .. } => {}
            Event::Valid { iter, loss, seconds, .. } => {
                self.progress.line(&format!("Iter {iter}: Val loss {loss:.3}, Val took {seconds:.3}s"));
            }
            Event::Samples { iter, answers } => self.samples(*iter, answers),
            Event::Saved { iter, file } => {
                self.progress.line(&format!("Iter {iter}: Saved adapter weights to {}", file.display()));
            }
        }
    }

    fn train(&mut self, r: &TrainReport) {
        self.losses.push(r.loss);
        self.last = format!("loss {:.3} {:.1} tok/s", r.loss, r.tokens_per_second);
        self.progress.line(&format!(
            "Iter {}: Train loss {:.3}, Learning Rate {:.3e}, It/sec {:.3}, Tokens/sec {:.3}, Trained Tokens {}, \
             Peak mem {:.3} GB",
            r.iter,
            r.loss,
            r.learning_rate,
            1.0 / r.step_seconds.max(1e-9),
            r.tokens_per_second,
            r.tokens,
            r.peak_memory_bytes as f64 / 1e9
        ));
    }

    fn curve(&self) {
        if self.losses.len() > 1 {
            ui::note(&format!("loss {}", ui::sparkline(&self.losses, CURVE)));
        }
    }
}
