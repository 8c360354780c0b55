//! `graft compare`: the same training as LoRA on a dense base, QLoRA and QDoRA, and what each refinement costs and buys.

use super::compare_legs::{Bench, Blown, Leg, Run, common, is_unfinished, legs};
use super::compare_report::{Results, build, last_loss, say};
use super::eval;
use crate::args::CompareArgs;
use crate::errors::Usage;
use crate::report;
use crate::{host, ui};
use anyhow::{Context, Result, bail};
use graft_train::{DataConfig, Metric, Question, read_rows};
use serde_json::{Map, Value};
use std::path::Path;

/// Trains every leg, scores it if a metric is given, and reports.
pub(crate) fn compare(args: &CompareArgs, threads: Option<usize>, exact: bool) -> Result<()> {
    let out = Path::new(&args.output);
    let mut legs = legs(args)?;
    let common = common(args, &legs)?;
    if args.seeds == 0 {
        bail!(Usage("--seeds must be at least 1".into()));
    }
    let metric = eval::metric(&args.metric)?;
    if args.metric.metric.is_some() {
        legs.iter().try_for_each(|leg| check_scoring(&common, leg, metric.as_ref()))?;
    }
    if out.exists() && !is_unfinished(out)? {
        bail!(Usage(format!("--output {} exists already; remove it or name another directory", args.output)));
    }
    let stop = host::stop_flag(|| ui::note("stopping; once more stops at once"));
    let mut globals: Vec<String> = threads.map(|n| format!("--threads={n}")).into_iter().collect();
    globals.extend(exact.then(|| "--exact".to_owned()));
    let mut bench = Bench::new(out, common, globals, &stop);
    // All that the settings and the rows can be wrong about shows before anything is written.
    let first = bench.first_seed();
    let rates = rates(args, &bench, &legs, first)?;
    bench.check_rows(&legs, first)?;
    bench.make_bases(args, &legs)?;
    let mut results: Vec<Results> = legs.iter().map(|_| Results::default()).collect();
    let save = |legs: &[Leg], results: &[Results]| -> Result<Value> {
        if results.iter().all(Results::is_empty) {
            return Ok(Value::Null);
        }
        let report = build(args, &bench, legs, results)?;
        let file = |name: &str| out.join(name).display().to_string();
        report::write_json(&file("compare.json"), &report)?;
        report::write(&file("compare.html"), &report::compare(&report))?;
        Ok(report)
    };
    let measured = measure(args, &bench, &mut legs, &rates, &mut results, &save);
    let saved = save(&legs, &results);
    measured?;
    let report = saved?;
    if args.json {
        ui::out(&format!("{report:#}"));
    } else {
        say(&report);
    }
    Ok(())
}

/// Writes what there is so far as the report.
type Save<'a> = &'a dyn Fn(&[Leg], &[Results]) -> Result<Value>;

/// Sweeps, trains and scores; what there is stays in `results` whatever fails.
fn measure(
    args: &CompareArgs,
    bench: &Bench,
    legs: &mut [Leg],
    rates: &[f64],
    results: &mut [Results],
    save: Save,
) -> Result<()> {
    sweep(bench, legs, rates, bench.first_seed(), results)?;
    train_all(bench, legs, &bench.seeds(args.seeds), results)?;
    if args.metric.metric.is_some() {
        // What is measured is written before the next thing can fail.
        save(legs, results)?;
        score_all(args, bench, legs, results)?;
    }
    Ok(())
}

/// Tries every rate with every leg and keeps each leg's best. The legs take turns within a rate, so each one's settings
/// are tried before the first sweep is done.
fn sweep(bench: &Bench, legs: &mut [Leg], rates: &[f64], seed: i64, results: &mut [Results]) -> Result<()> {
    let total = rates.len() * legs.len();
    let mut number = 0;
    for rate in rates {
        for (leg, result) in legs.iter().zip(&mut *results) {
            number += 1;
            ui::note(&format!("Trying {} at {rate:e} ({number} of {total})", leg.name));
            let loss = try_rate(bench, leg, seed, *rate)?;
            ui::note(&loss.map_or_else(|| "  it blew up".into(), |loss| format!("  loss {loss:.4}")));
            result.sweep.push((*rate, loss));
        }
    }
    for (leg, result) in legs.iter_mut().zip(results) {
        let best = result.sweep.iter().filter_map(|(rate, loss)| Some((*rate, (*loss)?)));
        leg.rate = best.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(rate, _)| rate);
        if leg.rate.is_none() && !rates.is_empty() {
            bail!("leg {}: no learning rate of --find-lr gave a finite loss: name smaller ones", leg.name);
        }
    }
    Ok(())
}

/// Trains the legs in turn within a seed, so that a slow minute of the machine is not one leg's alone.
fn train_all(bench: &Bench, legs: &[Leg], seeds: &[i64], results: &mut [Results]) -> Result<()> {
    let (total, mut number) = (seeds.len() * legs.len(), 0);
    for seed in seeds {
        for (leg, result) in legs.iter().zip(&mut *results) {
            number += 1;
            ui::note(&format!("Training {} seed-{seed} ({number} of {total})", leg.name));
            result.runs.push(bench.train(leg, *seed, leg.rate, &format!("seed-{seed}"))?);
        }
    }
    Ok(())
}

/// Scores every run.
fn score_all(args: &CompareArgs, bench: &Bench, legs: &[Leg], results: &mut [Results]) -> Result<()> {
    for (leg, result) in legs.iter().zip(results) {
        for run in &result.runs {
            let score = score(args, bench, leg, run)?;
            result.scores.push(score);
        }
    }
    Ok(())
}

/// Refuses before the training what would keep a leg from being scored after it.
fn check_scoring(common: &Map<String, Value>, leg: &Leg, metric: Option<&Metric>) -> Result<()> {
    let setting = |key: &str| leg.own.get(key).or_else(|| common.get(key)).and_then(Value::as_str);
    let form = DataConfig::new(false, usize::MAX);
    for (key, name) in [
        ("prompt_feature", &form.prompt_feature),
        ("completion_feature", &form.completion_feature),
        ("chat_feature", &form.chat_feature),
        ("text_feature", &form.text_feature),
    ] {
        if setting(key).is_some_and(|given| given != name) {
            bail!(Usage(format!("{key}: --metric reads test.jsonl with {name:?}; leave one of them out")));
        }
    }
    let Some(data) = setting("data") else {
        bail!(Usage("--metric needs --data with test.jsonl".into()));
    };
    let file = eval::data_file(data)?;
    let rows = read_rows(&file)?;
    if rows.is_empty() {
        bail!("{}: the file has no rows to measure", file.display());
    }
    if let Some(metric) = metric {
        Question::check(&file, &rows, &form, metric)?;
    }
    Ok(())
}

/// The learning rates of `--find-lr`; none without it. Checks each leg's settings.
fn rates(args: &CompareArgs, bench: &Bench, legs: &[Leg], seed: i64) -> Result<Vec<f64>> {
    let mut rates = args.find_lr.clone().unwrap_or_default();
    if let Some(rate) = rates.iter().find(|rate| **rate <= 0.0) {
        bail!(Usage(format!("--find-lr: a learning rate must be above 0, not {rate}")));
    }
    for leg in legs {
        let settings = bench.settings(leg, seed)?;
        if settings.int("iters") == 0 {
            bail!(Usage("--iters must be at least 1: without steps there is nothing to compare".into()));
        }
        if args.find_lr.is_some()
            && (bench.common.contains_key("lr_schedule") || leg.own.contains_key("lr_schedule"))
        {
            bail!(Usage("--find-lr: lr_schedule decides the learning rate; leave one of them out".into()));
        }
        if args.find_lr.as_ref().is_some_and(Vec::is_empty) && rates.is_empty() {
            rates = [0.25, 0.5, 1.0, 2.0, 4.0].map(|m| m * settings.float("learning_rate")).to_vec();
        }
    }
    rates.sort_by(f64::total_cmp);
    rates.dedup();
    Ok(rates)
}

/// What a leg comes to with a learning rate: its last validation loss, or its training loss where nothing validates it;
/// none where it blew up.
fn try_rate(bench: &Bench, leg: &Leg, seed: i64, rate: f64) -> Result<Option<f64>> {
    let place = format!("lr-{rate:e}");
    let tried = bench.train(leg, seed, Some(rate), &place);
    let _spare = std::fs::remove_dir_all(bench.out.join(&leg.name).join(&place));
    match tried {
        Ok(run) => Ok(last_loss(&run)),
        Err(error) if error.is::<Blown>() => Ok(None),
        Err(error) => Err(error),
    }
}

/// `graft eval` of a run's adapter beside its base.
fn score(args: &CompareArgs, bench: &Bench, leg: &Leg, run: &Run) -> Result<Value> {
    let settings = bench.settings(leg, run.seed)?;
    let text = |key: &str| settings.text(key).unwrap_or_default().to_owned();
    let output = run.dir.join("eval.json");
    let mut words: Vec<String> = ["eval", "--show", "0", "--model", &text("model"), "--data", &text("data")]
        .map(str::to_owned)
        .to_vec();
    for (flag, value) in [
        ("--adapter-path", run.dir.display().to_string()),
        ("--output", output.display().to_string()),
        ("--metric", args.metric.metric.clone().unwrap_or_default()),
        ("--max-tokens", args.metric.max_tokens.to_string()),
        ("--max-seq-length", settings.int("max_seq_length").to_string()),
        ("--seed", (run.seed as u64).to_string()),
    ] {
        words.extend([flag.to_owned(), value]);
    }
    words.extend(args.metric.pattern.iter().map(|pattern| format!("--pattern={pattern}")));
    ui::note(&format!("Scoring {} seed-{}", leg.name, run.seed));
    let mut on_line = |line: &str| {
        if bench.is_new_warning(line) {
            ui::note(line);
        }
    };
    bench
        .child(&words, &run.dir.join("eval.log"), &mut on_line)
        .with_context(|| format!("scoring leg {}", leg.name))?;
    let text =
        std::fs::read_to_string(&output).with_context(|| format!("cannot read {}", output.display()))?;
    Ok(serde_json::from_str(&text)?)
}
