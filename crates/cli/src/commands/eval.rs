//! `graft eval`: what a model answers to held-out rows, with adapters and fused models beside the base.

use super::load::{self, Loaded};
use super::score::{Scored, Scorer};
use crate::args::{EvalArgs, MetricArgs};
use crate::errors::{Interrupted, Usage};
use crate::hub::{self, What};
use crate::{host, report, ui};
use anyhow::{Result, bail};
use graft_adapters::Route;
use graft_model::{MAX_TOGETHER, Sampling};
use graft_train::{
    DataConfig, Estimate, Example, Fault, Metric, Question, Row, Split, bootstrap, evaluate, mix, read_rows,
};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// What one model made of one row.
struct Outcome {
    /// None where the loss is measured.
    answer: Option<String>,
    /// 1 or 0, or the mean loss of the row's targets.
    score: f64,
    /// 1, or the number of targets.
    weight: f64,
    /// The answer was ended by a limit.
    cut: bool,
}

/// A model, or an adapter on one, and what it made of all rows.
struct Subject {
    name: String,
    model: String,
    adapter: Option<String>,
    outcomes: Vec<Outcome>,
    seconds: f64,
}

/// The rows and how they are judged; without a metric by the loss.
struct Task<'a> {
    args: &'a EvalArgs,
    file: PathBuf,
    rows: Vec<Row>,
    metric: Option<Metric>,
    stop: &'a AtomicBool,
}

/// Answers or measures every row with every subject, then reports.
pub(crate) fn eval(args: &EvalArgs) -> Result<()> {
    let html = args.html.iter().map(|file| ("--html", file));
    let files: Vec<_> = std::iter::once(("--output", &args.output)).chain(html).collect();
    report::check(&files, &[data_file(&args.data)?])?;
    let (report, measured) = measure(args)?;
    // Printed first: should a file not be written after all, the answers are still there.
    if args.json {
        ui::out(&format!("{report:#}"));
    } else {
        say(&report, args.show);
    }
    report::write_json(&args.output, &report)?;
    if let Some(file) = &args.html {
        report::write(file, &report::eval(&report))?;
    }
    measured
}

/// The report of what was measured, and why that is not all, if it is not.
pub(super) fn measure(args: &EvalArgs) -> Result<(Value, Result<()>)> {
    if !(1..=MAX_TOGETHER).contains(&args.batch_size) {
        bail!(Usage(format!("--batch-size must be from 1 to {MAX_TOGETHER}, not {}", args.batch_size)));
    }
    if args.resamples == 0 {
        bail!(Usage("--resamples must be at least 1".into()));
    }
    let metric = metric(&args.metric)?;
    sampling(args, &[]).check()?;
    let file = data_file(&args.data)?;
    let rows = read_rows(&file)?;
    if rows.is_empty() {
        bail!("{}: the file has no rows to measure", file.display());
    }
    if let Some(metric) = &metric {
        Question::check(&file, &rows, &DataConfig::new(false, usize::MAX), metric)?;
    }
    let mut fused_models = Vec::new();
    for fused in &args.fused {
        load::config(fused)?;
        let left = load::beside(&hub::resolve(fused, What::Model)?).map(|_| fused);
        fused_models.push((fused, left));
    }
    let stop = host::stop_flag(|| ui::note("stopping; once more stops at once"));
    let task = Task { args, file, rows, metric, stop: &stop };
    let subject = |name: &str, model: &String, adapter: Option<&String>| Subject {
        name: name.to_owned(),
        model: model.clone(),
        adapter: adapter.cloned(),
        outcomes: Vec::new(),
        seconds: 0.0,
    };
    let mut of_base = vec![subject("base", &args.model, None)];
    of_base.extend(args.adapter_path.iter().map(|a| subject(a, &args.model, Some(a))));
    let mut subjects = vec![of_base];
    subjects.extend(fused_models.into_iter().map(|(fused, left)| vec![subject(fused, fused, left)]));
    let mut questions = Vec::new();
    let measured =
        subjects.iter_mut().try_for_each(|own| task.run(&own[0].model.clone(), own, &mut questions));
    // What was finished before a failure is hours of work: it is reported all the same.
    let finished = |subject: &Subject| !questions.is_empty() && subject.outcomes.len() == questions.len();
    let finished: Vec<Subject> = subjects.into_iter().flatten().filter(finished).collect();
    if finished.is_empty() {
        measured?;
        bail!("{}: nothing was measured", task.file.display());
    }
    Ok((task.report(&finished, &questions), measured))
}

/// The metric of the flags; none is the loss.
pub(super) fn metric(args: &MetricArgs) -> Result<Option<Metric>> {
    let metric = match (args.metric.as_deref().unwrap_or("exact"), &args.pattern) {
        ("regex", Some(pattern)) => {
            let pattern = regex::Regex::new(pattern);
            Metric::Pattern(pattern.map_err(|e| Usage(format!("--pattern is no regular expression: {e}")))?)
        }
        (_, Some(_)) => bail!(Usage("--pattern belongs to --metric regex".into())),
        ("contains", None) => Metric::Contains,
        ("regex", None) => Metric::Regex,
        ("json", None) => Metric::Json,
        ("loss", None) => return Ok(None),
        (_, None) => Metric::Exact,
    };
    if args.max_tokens == 0 {
        bail!(Usage("--max-tokens must be at least 1".into()));
    }
    Ok(Some(metric))
}

/// The file itself, or test.jsonl of a directory.
pub(super) fn data_file(argument: &str) -> Result<PathBuf> {
    let path = Path::new(argument);
    if path.is_file() {
        return Ok(path.to_path_buf());
    }
    let file = match path.extension().is_some_and(|end| end == "jsonl") {
        true => path.to_path_buf(),
        false => hub::resolve(argument, What::Data)?.join("test.jsonl"),
    };
    if !file.is_file() {
        bail!("{}: there is no such file: give a .jsonl file or a directory with test.jsonl", file.display());
    }
    Ok(file)
}

/// How the answer to `prompt` is chosen. A row's seed comes from its prompt, so that its place in the file is nothing to it.
fn sampling(args: &EvalArgs, prompt: &[u32]) -> Sampling {
    let words: Vec<u64> = [args.seed].into_iter().chain(prompt.iter().map(|id| u64::from(*id))).collect();
    Sampling { temperature: args.temp, top_p: args.top_p, seed: Some(mix(&words)), ..Sampling::greedy() }
}

impl Task<'_> {
    /// Loads a model and lets all of its subjects do the rows. The first model leaves the questions as it reads them; with
    /// the loss their prompts are whole rows, and a later model must read the same tokens.
    fn run(&self, model: &str, subjects: &mut [Subject], asked: &mut Vec<Question>) -> Result<()> {
        ui::note(&format!("Loading {model}"));
        let loaded = Loaded::open(model)?;
        let mut routes = Vec::new();
        for subject in subjects.iter() {
            routes.push(loaded.route(subject.adapter.as_deref())?);
        }
        let Some(metric) = &self.metric else {
            let split = self.split(&loaded, asked.is_empty())?;
            let whole =
                |e: &Example| Question { line: e.line, prompt: e.tokens.clone(), ..Question::default() };
            let questions: Vec<Question> = split.examples.iter().map(whole).collect();
            if !asked.is_empty() && *asked != questions {
                bail!(
                    "{model} reads the rows as other tokens than {}: their losses cannot be compared",
                    self.args.model
                );
            }
            *asked = questions;
            for (subject, route) in subjects.iter_mut().zip(&routes) {
                self.losses(&loaded, &split, &route.route(), subject)?;
            }
            return Ok(());
        };
        let form = DataConfig::new(false, usize::MAX);
        let questions = Question::from_rows(&self.file, &self.rows, &loaded.encoder(), &form)?;
        let context = loaded.model.config().max_positions as usize;
        if let Some(long) = questions.iter().find(|question| question.prompt.len() >= context) {
            let (at, tokens) = (format!("{}:{}", self.file.display(), long.line), long.prompt.len());
            bail!("{at}: its prompt has {tokens} tokens, the model takes {context}: shorten or drop the row");
        }
        if asked.is_empty() {
            asked.clone_from(&questions);
        }
        for (subject, route) in subjects.iter_mut().zip(&routes) {
            self.answers(&loaded, metric, &questions, route.route(), subject)?;
        }
        Ok(())
    }

    fn answers(
        &self,
        loaded: &Loaded,
        metric: &Metric,
        questions: &[Question],
        route: Route,
        subject: &mut Subject,
    ) -> Result<()> {
        let start = Instant::now();
        let scorer = Scorer {
            metric,
            max_tokens: self.args.metric.max_tokens,
            together: self.args.batch_size,
            sampling: &|prompt| sampling(self.args, prompt),
            stop: self.stop,
        };
        let Some(found) = scorer.score(loaded, route, questions, &subject.name)? else { bail!(stopped()) };
        let outcome = |found: Scored| Outcome {
            answer: Some(found.answer),
            score: found.score,
            weight: 1.0,
            cut: found.cut,
        };
        subject.outcomes.extend(found.into_iter().map(outcome));
        subject.seconds = start.elapsed().as_secs_f64();
        Ok(())
    }

    /// The rows with their answers as targets; all of a row of plain text. What falsifies their loss is said if `warn`.
    fn split(&self, loaded: &Loaded, warn: bool) -> Result<Split> {
        let form = DataConfig { whole_texts: true, ..DataConfig::new(true, self.args.max_seq_length) };
        let split = Split::from_rows(&self.file, &self.rows, &loaded.encoder(), &form)?;
        split.check_vocabulary(loaded.model.config().vocab as usize)?;
        let tells = [Fault::Truncated, Fault::MaskShifted, Fault::EmptyAnswer, Fault::BrokenCharacters];
        for warning in split.warnings.iter().filter(|w| warn && tells.contains(&w.fault)) {
            ui::note(&format!("warning: {}", warning.finding()));
        }
        split.require()?;
        Ok(split)
    }

    /// Each row by itself, so that its loss does not depend on which rows are beside it.
    fn losses(&self, loaded: &Loaded, split: &Split, route: &Route, subject: &mut Subject) -> Result<()> {
        let start = Instant::now();
        let progress = ui::Progress::new(split.examples.len() as u64, &subject.name);
        let go_on = &mut |_| !self.stop.load(Ordering::Relaxed);
        for index in 0..split.examples.len() {
            let Some(found) = evaluate(&loaded.model, route, split, &[vec![index]], go_on)? else {
                bail!(stopped())
            };
            let (score, weight) = (found.loss, found.tokens as f64);
            subject.outcomes.push(Outcome { answer: None, score, weight, cut: false });
            progress.at(index as u64 + 1, String::new());
        }
        progress.done();
        subject.seconds = start.elapsed().as_secs_f64();
        Ok(())
    }

    fn report(&self, subjects: &[Subject], questions: &[Question]) -> Value {
        let args = self.args;
        let base = &subjects[0].outcomes;
        let estimate = |pairs: &[(f64, f64)]| bootstrap(pairs, args.resamples, args.seed);
        let answers = self.metric.is_some();
        let models: Vec<Value> = subjects
            .iter()
            .enumerate()
            .map(|(index, subject)| {
                let own = &subject.outcomes;
                let pairs: Vec<_> = own.iter().map(|o| (o.score, o.weight)).collect();
                let score = estimate(&pairs);
                let mut value = json!({
                    "name": subject.name, "model": subject.model, "adapter": subject.adapter,
                    "score": score.value, "interval": score.range(), "seconds": subject.seconds,
                    "cut": answers.then(|| own.iter().filter(|o| o.cut).count()),
                    "right": answers.then(|| own.iter().filter(|o| o.score > 0.0).count()),
                });
                if index > 0 {
                    value["against_base"] = against(base, own, estimate, answers);
                }
                value
            })
            .collect();
        let row = |(index, question): (usize, &Question)| {
            let results: Vec<Value> = subjects
                .iter()
                .map(|s| &s.outcomes[index])
                .map(|o| match &o.answer {
                    Some(answer) => json!({"answer": answer, "score": o.score}),
                    None => json!({"loss": o.score, "tokens": o.weight}),
                })
                .collect();
            match &self.metric {
                None => json!({"line": question.line, "results": results}),
                Some(_) => json!({
                    "line": question.line, "question": question.asked, "reference": question.answer, "results": results,
                }),
            }
        };
        json!({
            "schema": 1, "kind": "eval", "version": env!("CARGO_PKG_VERSION"),
            "data": self.file.display().to_string(), "rows": questions.len(),
            "skipped": self.rows.len() - questions.len(), "notes": self.notes(&models, questions.len()),
            "metric": args.metric.metric.as_deref().unwrap_or("exact"), "pattern": args.metric.pattern,
            "max_tokens": args.metric.max_tokens, "temperature": args.temp, "top_p": args.top_p, "seed": args.seed,
            "resamples": args.resamples, "models": models,
            "examples": questions.iter().enumerate().map(row).collect::<Vec<_>>(),
        })
    }
}

impl Task<'_> {
    /// What a reader of the table must know, in sentences.
    fn notes(&self, models: &[Value], rows: usize) -> Vec<String> {
        let mut notes = Vec::new();
        if self.rows.len() > rows {
            let skipped = self.rows.len() - rows;
            notes.push(format!("Skipped: {skipped} rows, of which no target is within --max-seq-length."));
        }
        for model in models.iter().filter(|model| model["cut"].as_u64() > Some(0)) {
            let (name, limit) = (model["name"].as_str().unwrap_or_default(), self.args.metric.max_tokens);
            notes.push(format!("{name}: {} answers were cut, at --max-tokens {limit} or where the model's context ends, and judged as they stood.", model["cut"]));
        }
        if models.iter().any(|m| {
            m["interval"].is_null()
                || m["against_base"]["interval"].is_null() && m.get("against_base").is_some()
        }) {
            notes.push(
                "No interval: all rows say the same, which does not tell what others would say.".to_owned(),
            );
        }
        notes
    }
}

/// The paired difference of two models on the same rows, and the rows that tell them apart.
fn against(
    base: &[Outcome],
    own: &[Outcome],
    estimate: impl Fn(&[(f64, f64)]) -> Estimate,
    answers: bool,
) -> Value {
    let both = || base.iter().zip(own);
    let differences: Vec<_> = both().map(|(b, o)| (o.score - b.score, o.weight)).collect();
    let found = estimate(&differences);
    let mut value = json!({"difference": found.value, "interval": found.range()});
    if answers {
        let count = |test: fn(&Outcome, &Outcome) -> bool| both().filter(|(b, o)| test(b, o)).count();
        value["changed"] = count(|b, o| b.answer != o.answer).into();
        value["fixed"] = count(|b, o| b.score < o.score).into();
        value["broken"] = count(|b, o| b.score > o.score).into();
    }
    value
}

fn stopped() -> Interrupted {
    Interrupted("Interrupted before the model had done all rows.".into())
}

/// The table, and some of the answers that changed.
fn say(report: &Value, show: usize) {
    let answers = report["metric"] != "loss";
    let (number, signed) = (report::As::Decimal, report::As::Signed);
    let range = report::range;
    let head = [
        "",
        report["metric"].as_str().unwrap_or_default(),
        "95 %",
        "against base",
        "95 %",
        "changed",
        "fixed",
        "broken",
    ];
    let mut rows = vec![head.map(str::to_owned)[..if answers { 8 } else { 5 }].to_vec()];
    let models = report["models"].as_array().map_or(&[][..], Vec::as_slice);
    for model in models {
        let name = model["name"].as_str().unwrap_or_default().to_owned();
        let mut row = vec![name, number.show(&model["score"]), range(&model["interval"], number)];
        if let Some(against) = model.get("against_base") {
            row.extend([signed.show(&against["difference"]), range(&against["interval"], signed)]);
            let counts = ["changed", "fixed", "broken"].map(|key| against[key].to_string());
            row.extend(if answers { counts.to_vec() } else { Vec::new() });
        }
        rows.push(row);
    }
    ui::out(&format!("{} rows of {}", report["rows"], report["data"].as_str().unwrap_or_default()));
    ui::out(&ui::table(&rows));
    report["notes"].as_array().into_iter().flatten().filter_map(Value::as_str).for_each(ui::out);
    let shown = |value: &Value| ui::visible(&value.to_string());
    let changed = |example: &&Value| {
        let results = example["results"].as_array().map_or(&[][..], Vec::as_slice);
        results.iter().any(|r| r["answer"] != results[0]["answer"])
    };
    let examples = report["examples"].as_array().map_or(&[][..], Vec::as_slice);
    for example in examples.iter().filter(changed).take(show) {
        ui::out(&format!("\nline {}: {}", example["line"], shown(&example["question"])));
        ui::out(&format!("  expected  {}", shown(&example["reference"])));
        for (model, result) in models.iter().zip(example["results"].as_array().into_iter().flatten()) {
            let right = if result["score"] == 1.0 { "right" } else { "wrong" };
            let name = model["name"].as_str().unwrap_or_default();
            ui::out(&format!("  {right:<8}  {}  ({name})", shown(&result["answer"])));
        }
    }
}
