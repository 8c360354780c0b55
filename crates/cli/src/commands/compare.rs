//! `graft compare`: the same training as LoRA on a dense base, QLoRA and QDoRA, and what each refinement costs and buys.

use super::compare_legs::{Base, Bench, Leg, Run, common, legs};
use super::eval;
use crate::args::CompareArgs;
use crate::errors::Usage;
use crate::hub::{self, What};
use crate::report::{self, As};
use crate::{host, ui};
use anyhow::{Context, Result, bail};
use graft_quant::Checkpoint;
use graft_train::{DataConfig, Metric, Question, bootstrap, quantile, read_rows, student};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// Losses at the end of a run whose mean is its training loss: single batches are noisy.
const LAST: usize = 10;
/// Samples of the bootstrap over the rows of test.jsonl.
const RESAMPLES: usize = 10_000;
/// A share of memory or bytes that is worth naming.
const NAMED: f64 = 0.02;

/// Trains every leg, scores it if a metric is given, and reports.
pub(crate) fn compare(args: &CompareArgs, threads: Option<usize>, exact: bool) -> Result<()> {
    let out = Path::new(&args.output);
    let mut legs = legs(args)?;
    let common = common(args, &legs)?;
    if args.seeds == 0 {
        bail!(Usage("--seeds must be at least 1".into()));
    }
    let metric = eval::metric(&args.metric)?;
    let scored = args.metric.metric.is_some();
    if scored {
        legs.iter().try_for_each(|leg| check_scoring(&common, leg, metric.as_ref()))?;
    }
    if out.exists() {
        bail!(Usage(format!("--output {} exists already; remove it or name another directory", args.output)));
    }
    let stop = host::stop_flag(|| ui::note("stopping; once more stops at once"));
    let mut globals: Vec<String> = threads.map(|n| format!("--threads={n}")).into_iter().collect();
    globals.extend(exact.then(|| "--exact".to_owned()));
    let mut bench = Bench { out: out.to_path_buf(), common, globals, stop: &stop, dense: None, packed: None };
    // All that the settings can be wrong about shows before anything is written.
    let first = bench.common.get("seed").and_then(Value::as_i64).unwrap_or_default();
    let rates = rates(args, &bench, &legs, first)?;
    bench.make_bases(args, &legs)?;
    let mut sweeps = Vec::new();
    for leg in &mut legs {
        let sweep =
            rates.iter().map(|rate| try_rate(&bench, leg, first, *rate)).collect::<Result<Vec<_>>>()?;
        let best = sweep.iter().filter_map(|(rate, loss)| Some((*rate, (*loss)?)));
        leg.rate = best.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(rate, _)| rate);
        if leg.rate.is_none() && !sweep.is_empty() {
            bail!("leg {}: no learning rate of --find-lr gave a finite loss: name smaller ones", leg.name);
        }
        sweeps.push(sweep);
    }
    let mut runs: Vec<Vec<Run>> = legs.iter().map(|_| Vec::new()).collect();
    let trained = train_all(&bench, &legs, (first..).take(args.seeds as usize), &mut runs);
    let mut scores: Vec<Vec<Value>> = legs.iter().map(|_| Vec::new()).collect();
    // What is measured is written before the next thing can fail; the legs that ran come first.
    let done = runs.iter().take_while(|runs| !runs.is_empty()).count();
    let save = |scores: &[Vec<Value>]| -> Result<Value> {
        let report = build(args, &bench, &legs[..done], &runs, &sweeps, scores)?;
        let file = |name: &str| out.join(name).display().to_string();
        report::write_json(&file("compare.json"), &report)?;
        report::write(&file("compare.html"), &report::compare(&report))?;
        Ok(report)
    };
    let saved = if done > 0 { save(&scores) } else { Ok(Value::Null) };
    trained?;
    let mut report = saved?;
    if scored {
        let marked = score_all(args, &bench, &legs, &runs, &mut scores);
        let saved = save(&scores);
        marked?;
        report = saved?;
    }
    if args.json {
        ui::out(&format!("{report:#}"));
    } else {
        say(&report);
    }
    Ok(())
}

/// Trains the legs in turn within a seed, so that a slow minute of the machine is not one leg's alone.
fn train_all(
    bench: &Bench,
    legs: &[Leg],
    seeds: impl Iterator<Item = i64>,
    runs: &mut [Vec<Run>],
) -> Result<()> {
    for seed in seeds {
        for (leg, runs) in legs.iter().zip(&mut *runs) {
            runs.push(bench.train(leg, seed, leg.rate, &format!("seed-{seed}"))?);
        }
    }
    Ok(())
}

/// Scores every run.
fn score_all(
    args: &CompareArgs,
    bench: &Bench,
    legs: &[Leg],
    runs: &[Vec<Run>],
    scores: &mut [Vec<Value>],
) -> Result<()> {
    for ((leg, runs), scores) in legs.iter().zip(runs).zip(scores) {
        for run in runs {
            scores.push(score(args, bench, leg, run)?);
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
    ] {
        if setting(key).is_some_and(|given| given != name) {
            bail!(Usage(format!("{key}: --metric reads test.jsonl with {name:?}; leave one of them out")));
        }
    }
    let Some(data) = setting("data") else {
        bail!(Usage("--metric needs --data with test.jsonl".into()));
    };
    let file = eval::data_file(data)?;
    if let Some(metric) = metric {
        Question::check(&file, &read_rows(&file)?, &form, metric)?;
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
        if let (Some(data), None) = (settings.text("data"), settings.all.get("hf_dataset")) {
            hub::resolve(data, What::Data)?;
        }
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
fn try_rate(bench: &Bench, leg: &Leg, seed: i64, rate: f64) -> Result<(f64, Option<f64>)> {
    let place = format!("lr-{rate:e}");
    match bench.train(leg, seed, Some(rate), &place) {
        Ok(run) => {
            let _spare = std::fs::remove_dir_all(&run.dir);
            let validated = !run.metrics.valid("loss").is_empty();
            Ok((rate, if validated { valid(&run) } else { train_loss(&run) }))
        }
        Err(error) if format!("{error:#}").contains("is not finite") => Ok((rate, None)),
        Err(error) => Err(error),
    }
}

/// The last validation loss; none where it is not finite.
fn valid(run: &Run) -> Option<f64> {
    run.metrics.valid("loss").last().map(|point| point.1).filter(|loss| loss.is_finite())
}

/// The mean of the last training losses; none where one is not finite.
fn train_loss(run: &Run) -> Option<f64> {
    let losses = run.metrics.train("loss");
    let last = &losses[losses.len().saturating_sub(LAST)..];
    mean(last.iter().map(|point| point.1)).filter(|loss| loss.is_finite())
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0.0), |(sum, count), value| (sum + value, count + 1.0));
    (count > 0.0).then(|| sum / count)
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
    bench
        .child(&words, &run.dir.join("eval.log"), &mut |_| {})
        .with_context(|| format!("scoring leg {}", leg.name))?;
    let text =
        std::fs::read_to_string(&output).with_context(|| format!("cannot read {}", output.display()))?;
    Ok(serde_json::from_str(&text)?)
}

/// compare.json.
fn build(
    args: &CompareArgs,
    bench: &Bench,
    legs: &[Leg],
    runs: &[Vec<Run>],
    sweeps: &[Vec<(f64, Option<f64>)>],
    scores: &[Vec<Value>],
) -> Result<Value> {
    let mut values: Vec<Value> = Vec::new();
    for (index, leg) in legs.iter().enumerate() {
        let settings = bench.settings(leg, 0)?;
        let model = settings.text("model").unwrap_or_default();
        let checkpoint = Checkpoint::open(&hub::resolve(model, What::Model)?)?;
        let base_bytes: u64 = checkpoint.files().filter_map(|f| f.metadata().ok()).map(|m| m.len()).sum();
        let own = &runs[index];
        let times: Vec<f64> = own.iter().flat_map(step_seconds).collect();
        let valids: Vec<f64> = own.iter().filter_map(valid).collect();
        let peak = |run: &Run| run.metrics.train("peak_memory_bytes").last().map_or(0.0, |p| p.1);
        let marks: Vec<f64> = scores[index].iter().filter_map(|s| s["models"][1]["score"].as_f64()).collect();
        let chance = match scores[index].as_slice() {
            [one] => one["models"][1]["interval"].clone(),
            _ => json!(student(&marks).map(|e| e.interval)),
        };
        let quantile = |q| quantile(&times, q);
        let scheduled = [&bench.common, &leg.own].iter().any(|all| all.contains_key("lr_schedule"));
        let mut value = json!({
            "name": leg.name, "model": model, "fine_tune_type": leg.kind(&settings),
            "base": match leg.base { Base::Dense => "dense", Base::Packed => "packed", Base::Own => "own" },
            "own_settings": leg.own, "learning_rate": (!scheduled).then(|| settings.float("learning_rate")),
            "lora_parameters": settings.map("lora_parameters"),
            "seeds": own.iter().map(|run| run.seed).collect::<Vec<_>>(),
            "adapters": own.iter().map(|run| run.dir.display().to_string()).collect::<Vec<_>>(),
            "train_loss": mean(own.iter().filter_map(train_loss)),
            "valid_loss": mean(valids.iter().copied()),
            "valid_loss_interval": student(&valids).map(|e| e.interval), "valid_losses": valids,
            "step_seconds": {"median": quantile(0.5), "p10": quantile(0.1), "p90": quantile(0.9)},
            "peak_memory_bytes": own.iter().map(peak).fold(0.0, f64::max) as u64,
            "base_bytes": base_bytes, "adapter_bytes": own.first().map(|run| run.adapter_bytes),
            "score": mean(marks.iter().copied()), "score_interval": chance,
            "base_score": scores[index].first().map(|s| &s["models"][0]["score"]),
            "curve": curve(own, |r| r.metrics.train("loss")),
            "step_curve": curve(own, |r| r.metrics.train("step_seconds")),
            "valid_curve": curve(own, |r| r.metrics.valid("loss")),
            "sweep": sweeps[index].iter().map(|(rate, loss)| json!({"learning_rate": rate, "loss": loss}))
                .collect::<Vec<_>>(),
        });
        if let Some(other) = leg.against {
            value["against"] = against(args, (other, index), legs, runs, scores, &values[other], &value);
        }
        values.push(value);
    }
    let same = |a: &[Run], b: &[Run]| a.iter().zip(b).all(|(a, b)| a.batches == b.batches);
    let sentences: Vec<String> = values.iter().filter_map(|leg| sentence(&values, leg, args)).collect();
    let base = |made: &Option<super::compare_legs::Made>| {
        made.as_ref().map(|made| json!({"path": made.path, "from": made.from}))
    };
    Ok(json!({
        "schema": 1, "kind": "compare", "version": env!("CARGO_PKG_VERSION"),
        "settings": bench.common, "seeds": args.seeds, "bases": {"dense": base(&bench.dense), "packed": base(&bench.packed)},
        "metric": args.metric.metric,
        "same_batches": runs.iter().all(|own| same(own, &runs[0])), "sentences": sentences, "legs": values,
    }))
}

/// Seconds of a run's steps but the first, which also warms up.
fn step_seconds(run: &Run) -> Vec<f64> {
    run.metrics.train("step_seconds").into_iter().skip(1).map(|point| point.1).collect()
}

/// The mean over seeds of a quantity, by iteration; what is not finite is left out.
fn curve(runs: &[Run], of: fn(&Run) -> Vec<(f64, f64)>) -> Value {
    let mut all: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
    for (iter, value) in runs.iter().flat_map(of).filter(|point| point.1.is_finite()) {
        all.entry(iter as u64).or_default().push(value);
    }
    json!({
        "iter": all.keys().collect::<Vec<_>>(),
        "value": all.values().map(|values| mean(values.iter().copied())).collect::<Vec<_>>(),
    })
}

/// What tells leg `own` from leg `other`, paired: step by step, seed by seed, row by row.
fn against(
    args: &CompareArgs,
    (other, own): (usize, usize),
    legs: &[Leg],
    runs: &[Vec<Run>],
    scores: &[Vec<Value>],
    there: &Value,
    here: &Value,
) -> Value {
    let pairs = || runs[other].iter().zip(&runs[own]);
    let ratio = |(a, b): (&f64, &f64)| b / a;
    let ratios: Vec<f64> = pairs()
        .flat_map(|(a, b)| step_seconds(a).iter().zip(&step_seconds(b)).map(ratio).collect::<Vec<_>>())
        .collect();
    let differences: Vec<f64> = pairs().filter_map(|(a, b)| Some(valid(b)? - valid(a)?)).collect();
    let times = |key: &str| Some(here[key].as_f64()? / there[key].as_f64()?);
    let mut value = json!({
        "leg": legs[other].name,
        "step_ratio": quantile(&ratios, 0.5),
        "step_ratio_interval": median_interval(&ratios),
        "peak_memory_ratio": times("peak_memory_bytes"),
        "valid_loss": mean(differences.iter().copied()),
        "valid_loss_interval": student(&differences).map(|e| e.interval),
    });
    let rows = |evals: &[Value]| -> Vec<(f64, f64)> {
        let examples = |eval: &Value| eval["examples"].as_array().map_or(0, Vec::len);
        let result = |eval: &Value, row: usize| {
            let result = &eval["examples"][row]["results"][1];
            (
                result.get("score").unwrap_or(&result["loss"]).as_f64(),
                result["tokens"].as_f64().unwrap_or(1.0),
            )
        };
        let row = |row| {
            let of_row = evals.iter().map(|eval| result(eval, row));
            Some((mean(of_row.clone().filter_map(|r| r.0))?, of_row.map(|r| r.1).next()?))
        };
        (0..evals.first().map_or(0, examples)).filter_map(row).collect()
    };
    // As many seeds of each, should the scoring have been interrupted.
    let seeds = scores[other].len().min(scores[own].len());
    let (a, b) = (rows(&scores[other][..seeds]), rows(&scores[own][..seeds]));
    if !a.is_empty() && a.len() == b.len() {
        let rows: Vec<(f64, f64)> = a.iter().zip(&b).map(|(a, b)| (b.0 - a.0, b.1)).collect();
        let found = bootstrap(&rows, RESAMPLES, args.run.seed.unwrap_or_default() as u64);
        (value["score"], value["score_interval"]) = (found.value.into(), json!(found.interval));
    }
    value
}

/// The 95 % interval of the median of the values; none for fewer than 6, which allow none.
fn median_interval(values: &[f64]) -> Option<[f64; 2]> {
    // Its ends are the k-th least and the k-th greatest of n, k = (n + 1) / 2 - 0.98 sqrt(n), whatever the distribution.
    let count = values.len() as f64;
    let below = (((count + 1.0) / 2.0 - 0.98 * count.sqrt()).floor() as usize).checked_sub(1)?;
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    Some([*sorted.get(below)?, *sorted.iter().nth_back(below)?])
}

/// What a leg bought and cost beside the one before it, in one sentence; none for a leg without one.
fn sentence(legs: &[Value], leg: &Value, args: &CompareArgs) -> Option<String> {
    // The score may be a loss, too.
    let (seeds, loss) = (args.seeds, args.metric.metric.as_deref() == Some("loss"));
    let against = leg.get("against")?;
    let name = against["leg"].as_str()?;
    let other = legs.iter().find(|leg| leg["name"] == name)?;
    let (mut bought, mut cost, mut same) = (Vec::new(), Vec::new(), Vec::new());
    let mut put = |better: bool, phrase: String| if better { bought.push(phrase) } else { cost.push(phrase) };
    for (key, what) in
        [("peak_memory_bytes", "peak memory"), ("base_bytes", "a base"), ("adapter_bytes", "an adapter")]
    {
        let (there, here) = (other[key].as_f64()?, leg[key].as_f64()?);
        if (here / there - 1.0).abs() >= NAMED {
            let [there, here] = [there, here].map(|n| ui::bytes(n as u64));
            let better = leg[key].as_f64() < other[key].as_f64();
            put(better, format!("{what} of {here} instead of {there}"));
        }
    }
    let zero = |interval: &Value, at: f64| Some(interval[0].as_f64()? <= at && interval[1].as_f64()? >= at);
    let range =
        |interval: &Value, form: As| format!("{} to {}", form.show(&interval[0]), form.show(&interval[1]));
    if let Some(ratio) = against["step_ratio"].as_f64() {
        let interval = &against["step_ratio_interval"];
        let chance = match interval.is_null() {
            true => "too few steps for an interval".to_owned(),
            false => format!("95 %: {}", range(interval, As::Times)),
        };
        let text = format!("{ratio:.2} times the time per step ({chance})");
        let equal = ratio == 1.0 || zero(interval, 1.0) == Some(true);
        if equal { same.push(text) } else { put(ratio < 1.0, text) }
    }
    let mut chance = "";
    for (key, what, lower) in [("valid_loss", "validation loss", true), ("score", "score", loss)] {
        let Some(difference) = against[key].as_f64() else { continue };
        let interval = &against[format!("{key}_interval")];
        let (there, here) = (As::Decimal.show(&other[key]), As::Decimal.show(&leg[key]));
        let mut text = format!("a {what} of {here} instead of {there} ({difference:+.4}");
        if interval.is_null() {
            chance = " How much of the loss is chance one seed cannot say: --seeds 3 would.";
        } else {
            text += &format!(", 95 %: {}", range(interval, As::Signed));
        }
        text.push(')');
        if difference == 0.0 || zero(interval, 0.0) == Some(true) {
            same.push(text);
        } else {
            put((difference < 0.0) == lower, text);
        }
    }
    let list =
        |all: Vec<String>| if all.is_empty() { "nothing measurable".to_owned() } else { all.join(", ") };
    let same =
        if same.is_empty() { String::new() } else { format!("; within chance are {}", same.join(", ")) };
    let seeds = if seeds > 1 { format!(" ({seeds} seeds)") } else { String::new() };
    let own = leg["name"].as_str()?;
    Some(format!(
        "{own} instead of {name}{seeds} buys {}; it costs {}{same}.{chance}",
        list(bought),
        list(cost)
    ))
}

/// The table and the sentences.
fn say(report: &Value) {
    let legs = report["legs"].as_array().map_or(&[][..], Vec::as_slice);
    let mut rows = vec![vec![String::new()]];
    rows[0].extend(legs.iter().map(|leg| leg["name"].as_str().unwrap_or_default().to_owned()));
    for (name, pointer, form) in report::COMPARED {
        let cells: Vec<&Value> =
            legs.iter().map(|leg| leg.pointer(pointer).unwrap_or(&Value::Null)).collect();
        if cells.iter().any(|cell| !cell.is_null()) {
            rows.push(
                std::iter::once((*name).to_owned()).chain(cells.into_iter().map(|c| form.show(c))).collect(),
            );
        }
    }
    ui::out(&ui::table(&rows));
    for sentence in report["sentences"].as_array().into_iter().flatten() {
        ui::out(&format!("\n{}", sentence.as_str().unwrap_or_default()));
    }
    if report["same_batches"] != true {
        ui::note(
            "note: the legs did not see the same batches in the same order, so steps are not comparable one by one",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_pairs_have_no_interval() {
        assert_eq!(median_interval(&[1.0, 2.0, 3.0, 4.0, 5.0]), None);
        // The least and the greatest of six hold the median in 97 % of cases, the second of each in 78 %.
        assert_eq!(median_interval(&[6.0, 2.0, 3.0, 4.0, 5.0, 1.0]), Some([1.0, 6.0]));
        // 1 - 2 (1 + 9) / 2^9 = 96 %.
        let nine: Vec<f64> = (1..10).map(f64::from).collect();
        assert_eq!(median_interval(&nine), Some([2.0, 8.0]));
    }
}
