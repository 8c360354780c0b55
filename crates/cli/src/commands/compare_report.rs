//! The report of a comparison: what each leg took and reached, beside the one before it, and in sentences.

use super::compare_legs::{Base, Bench, Leg, Run};
use crate::args::CompareArgs;
use crate::hub::{self, What};
use crate::report::{self, As};
use crate::ui;
use anyhow::Result;
use graft_quant::Checkpoint;
use graft_train::{bootstrap, quantile, student};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Losses at the end of a run whose mean is its training loss: single batches are noisy.
const LAST: usize = 10;
/// Samples of the bootstrap over the rows of test.jsonl.
const RESAMPLES: usize = 10_000;
/// A share of memory or bytes that is worth naming.
const NAMED: f64 = 0.02;

/// What a leg has come to so far.
#[derive(Default)]
pub(super) struct Results {
    /// Learning rates that were tried, and the loss of each; none where it blew up.
    pub(super) sweep: Vec<(f64, Option<f64>)>,
    /// By seed.
    pub(super) runs: Vec<Run>,
    /// The eval.json of each run.
    pub(super) scores: Vec<Value>,
}

impl Results {
    /// Whether there is nothing to report.
    pub(super) fn is_empty(&self) -> bool {
        self.sweep.is_empty() && self.runs.is_empty()
    }
}

/// The last validation loss of a run, or its training loss where nothing validates it.
pub(super) fn last_loss(run: &Run) -> Option<f64> {
    if run.metrics.valid("loss").is_empty() { train_loss(run) } else { valid(run) }
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

/// compare.json. Legs are compared by the seeds that all of them have, as a run may have ended before its last.
pub(super) fn build(args: &CompareArgs, bench: &Bench, legs: &[Leg], results: &[Results]) -> Result<Value> {
    let least =
        |count: fn(&Results) -> usize| results.iter().map(count).filter(|n| *n > 0).min().unwrap_or(0);
    let (seeds, scored) = (least(|own| own.runs.len()), least(|own| own.scores.len()));
    let runs: Vec<&[Run]> = results.iter().map(|own| &own.runs[..own.runs.len().min(seeds)]).collect();
    let scores: Vec<&[Value]> =
        results.iter().map(|own| &own.scores[..own.scores.len().min(scored)]).collect();
    let mut values: Vec<Value> = Vec::new();
    for (index, leg) in legs.iter().enumerate().filter(|(index, _)| !results[*index].is_empty()) {
        let settings = bench.settings(leg, 0)?;
        let model = settings.text("model").unwrap_or_default();
        let checkpoint = Checkpoint::open(&hub::resolve(model, What::Model)?)?;
        let base_bytes: u64 = checkpoint.files().filter_map(|f| f.metadata().ok()).map(|m| m.len()).sum();
        let own = runs[index];
        let times: Vec<f64> = own.iter().flat_map(step_seconds).collect();
        let valids: Vec<f64> = own.iter().filter_map(valid).collect();
        let peak = |run: &Run| run.metrics.train("peak_memory_bytes").last().map_or(0.0, |p| p.1);
        let marks: Vec<f64> = scores[index].iter().filter_map(|s| s["models"][1]["score"].as_f64()).collect();
        let chance = match scores[index] {
            [one] => one["models"][1]["interval"].clone(),
            _ => json!(student(&marks).and_then(|e| e.range())),
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
            "valid_loss_interval": student(&valids).and_then(|e| e.range()), "valid_losses": valids,
            "step_seconds": {"median": quantile(0.5), "p10": quantile(0.1), "p90": quantile(0.9)},
            "peak_memory_bytes": own.iter().map(peak).reduce(f64::max).map(|bytes| bytes as u64),
            "base_bytes": base_bytes, "adapter_bytes": own.first().map(|run| run.adapter_bytes),
            "score": mean(marks.iter().copied()), "score_interval": chance,
            "base_score": scores[index].first().map(|s| &s["models"][0]["score"]),
            "curve": curve(own, |r| r.metrics.train("loss")),
            "step_curve": curve(own, |r| r.metrics.train("step_seconds")),
            "valid_curve": curve(own, |r| r.metrics.valid("loss")),
            "sweep": results[index].sweep.iter()
                .map(|(rate, loss)| json!({"learning_rate": rate, "loss": loss})).collect::<Vec<_>>(),
        });
        if let Some(other) = leg.against.filter(|other| !own.is_empty() && !runs[*other].is_empty()) {
            let sides = [(other, &values[other]), (index, &value)].map(|(at, value)| Side {
                name: &legs[at].name,
                runs: runs[at],
                scores: scores[at],
                value,
            });
            value["against"] = against(args, &sides);
        }
        values.push(value);
    }
    let measured: Vec<&[Run]> = runs.into_iter().filter(|own| !own.is_empty()).collect();
    let same = |a: &[Run], b: &[Run]| a.iter().zip(b).all(|(a, b)| a.batches == b.batches);
    let loss = args.metric.metric.as_deref() == Some("loss");
    let sentences: Vec<String> =
        values.iter().filter_map(|leg| sentence(&values, leg, (seeds, loss))).collect();
    let base = |made: &Option<super::compare_legs::Made>| {
        made.as_ref().map(|made| json!({"path": made.path, "from": made.from}))
    };
    let missing = missing(args, bench, legs, results);
    Ok(json!({
        "schema": 1, "kind": "compare", "version": env!("CARGO_PKG_VERSION"),
        "settings": bench.common, "seeds": seeds, "complete": missing.is_empty(), "missing": missing,
        "bases": {"dense": base(&bench.dense), "packed": base(&bench.packed)}, "metric": args.metric.metric,
        "same_batches": measured.iter().all(|own| same(own, measured[0])), "sentences": sentences, "legs": values,
    }))
}

/// The seeds that each leg has not been trained or scored with yet.
fn missing(args: &CompareArgs, bench: &Bench, legs: &[Leg], results: &[Results]) -> Vec<Value> {
    let seeds = bench.seeds(args.seeds);
    let rest = |done: usize| seeds.get(done..).unwrap_or_default();
    let leg = |(leg, own): (&Leg, &Results)| {
        let runs = rest(own.runs.len());
        let scores = if args.metric.metric.is_some() { rest(own.scores.len()) } else { &[] };
        let missing = !runs.is_empty() || !scores.is_empty();
        missing.then(|| json!({"leg": leg.name, "runs": runs, "scores": scores}))
    };
    legs.iter().zip(results).filter_map(leg).collect()
}

/// Seconds of a run's steps but the first, which also warms up.
fn step_seconds(run: &Run) -> Vec<f64> {
    run.metrics.train("step_seconds").into_iter().skip(1).map(|point| point.1).collect()
}

/// The mean over seeds of a quantity, by iteration; none where one is not finite.
fn curve(runs: &[Run], of: fn(&Run) -> Vec<(f64, f64)>) -> Value {
    let mut all: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
    for (iter, value) in runs.iter().flat_map(of) {
        all.entry(iter as u64).or_default().push(value);
    }
    json!({
        "iter": all.keys().collect::<Vec<_>>(),
        "value": all.values().map(|values| mean(values.iter().copied())).collect::<Vec<_>>(),
    })
}

/// One of two legs beside each other.
struct Side<'a> {
    name: &'a str,
    runs: &'a [Run],
    scores: &'a [Value],
    value: &'a Value,
}

/// What tells the second leg from the first, paired: step by step, seed by seed, row by row.
fn against(args: &CompareArgs, [other, own]: &[Side; 2]) -> Value {
    let pairs = || other.runs.iter().zip(own.runs);
    let ratio = |(a, b): (&f64, &f64)| b / a;
    let ratios: Vec<f64> = pairs()
        .flat_map(|(a, b)| step_seconds(a).iter().zip(&step_seconds(b)).map(ratio).collect::<Vec<_>>())
        .collect();
    let differences: Vec<f64> = pairs().filter_map(|(a, b)| Some(valid(b)? - valid(a)?)).collect();
    let times = |key: &str| Some(own.value[key].as_f64()? / other.value[key].as_f64()?);
    let mut value = json!({
        "leg": other.name,
        "step_ratio": quantile(&ratios, 0.5),
        "step_ratio_interval": median_interval(&ratios),
        "peak_memory_ratio": times("peak_memory_bytes"),
        "valid_loss": mean(differences.iter().copied()),
        "valid_loss_interval": student(&differences).and_then(|e| e.range()),
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
    let (a, b) = (rows(other.scores), rows(own.scores));
    if !a.is_empty() && a.len() == b.len() && other.scores.len() == own.scores.len() {
        let rows: Vec<(f64, f64)> = a.iter().zip(&b).map(|(a, b)| (b.0 - a.0, b.1)).collect();
        let found = bootstrap(&rows, RESAMPLES, args.run.seed.unwrap_or_default() as u64);
        (value["score"], value["score_interval"]) = (found.value.into(), json!(found.range()));
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
/// `loss`: the score is one.
fn sentence(legs: &[Value], leg: &Value, (seeds, loss): (usize, bool)) -> Option<String> {
    let against = leg.get("against")?;
    let name = against["leg"].as_str()?;
    let other = legs.iter().find(|leg| leg["name"] == name)?;
    let (mut bought, mut cost) = (Vec::new(), Vec::new());
    let (mut same, mut equal, mut open) = (Vec::new(), Vec::new(), Vec::new());
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
        let text = format!("{ratio:.2} times the time per step");
        match zero(interval, 1.0) {
            None => open.push(format!("{text} (too few steps for an interval)")),
            Some(is_one) => {
                let text = format!("{text} (95 %: {})", range(interval, As::Times));
                if is_one { same.push(text) } else { put(ratio < 1.0, text) }
            }
        }
    }
    let mut chance = "";
    for (key, what, lower) in [("valid_loss", "validation loss", true), ("score", "score", loss)] {
        let Some(difference) = against[key].as_f64() else { continue };
        let interval = &against[format!("{key}_interval")];
        let (there, here) = (As::Decimal.show(&other[key]), As::Decimal.show(&leg[key]));
        if difference == 0.0 && interval.is_null() {
            equal.push(format!("the {what} ({here})"));
            continue;
        }
        let mut text = format!("a {what} of {here} instead of {there} ({difference:+.4}");
        if interval.is_null() {
            if key == "valid_loss" {
                chance = " How much of the loss is chance one seed cannot say: --seeds 3 would.";
            }
        } else {
            text += &format!(", 95 %: {}", range(interval, As::Signed));
        }
        text.push(')');
        if zero(interval, 0.0) == Some(true) {
            same.push(text);
        } else {
            put((difference < 0.0) == lower, text);
        }
    }
    let list =
        |all: Vec<String>| if all.is_empty() { "nothing measurable".to_owned() } else { all.join(", ") };
    let mut rest = String::new();
    for (what, all) in [("within chance", same), ("not known to be more than chance", open), ("equal", equal)]
    {
        if !all.is_empty() {
            rest += &format!("; {what}: {}", all.join(", "));
        }
    }
    let seeds = if seeds > 1 { format!(" ({seeds} seeds)") } else { String::new() };
    let own = leg["name"].as_str()?;
    Some(format!(
        "{own} instead of {name}{seeds} buys {}; it costs {}{rest}.{chance}",
        list(bought),
        list(cost)
    ))
}

/// The table and the sentences.
pub(super) fn say(report: &Value) {
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

    /// A leg of which all is the same but what is given.
    fn leg(against: Value) -> Vec<Value> {
        let bytes = json!({"peak_memory_bytes": 10, "base_bytes": 10, "adapter_bytes": 10, "score": 0.0, "valid_loss": 2.0});
        let named = |name: &str| {
            let mut leg = bytes.clone();
            leg["name"] = name.into();
            leg
        };
        let mut own = named("b");
        own["against"] = against;
        vec![named("a"), own]
    }

    #[test]
    fn what_has_no_interval_is_neither_bought_nor_within_chance() {
        let legs = leg(json!({"leg": "a", "step_ratio": 0.9, "score": 0.0, "valid_loss": 0.0}));
        let said = sentence(&legs, &legs[1], (1, false)).unwrap_or_default();
        assert_eq!(
            said,
            "b instead of a buys nothing measurable; it costs nothing measurable; not known to be more than chance: \
             0.90 times the time per step (too few steps for an interval); equal: the validation loss (2.0000), the score \
             (0.0000)."
        );
        let legs =
            leg(json!({"leg": "a", "step_ratio": 0.9, "step_ratio_interval": [0.8, 0.95], "score": -0.1,
                              "score_interval": [-0.2, 0.1]}));
        let said = sentence(&legs, &legs[1], (2, false)).unwrap_or_default();
        assert!(
            said.starts_with("b instead of a (2 seeds) buys 0.90 times the time per step (95 %: "),
            "{said}"
        );
        assert!(
            said.contains("; within chance: a score of 0.0000 instead of 0.0000 (-0.1000, 95 %: "),
            "{said}"
        );
    }

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
