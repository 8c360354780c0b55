//! `graft fuse`: an adapter into its base, for good, and how much of it arrived there.

use super::fuse_rows::{self, Found};
use super::fuse_verify::Verify;
use super::{eval, export, load};
use crate::args::FuseArgs;
use crate::errors::{Interrupted, Usage};
use crate::hub::{self, What};
use crate::{host, report, ui};
use anyhow::{Context, Result, anyhow, bail};
use graft_adapters::{AdapterSet, FineTuneType};
use graft_merge::{
    Error, Event, FuseOptions, FuseReport, HARDLY, Inputs, ModelReport, Plan, Policy, REPORT_FILE, Sibling,
    Watch,
};
use graft_model::Observer;
use graft_quant::Checkpoint;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// Fuses, measures what became of the update, and keeps the result if enough of it is there.
pub(crate) fn fuse(args: &FuseArgs) -> Result<()> {
    let start = Instant::now();
    let named = args.policy.as_deref().and_then(Policy::from_name);
    if args.dequantize && named.is_some_and(|policy| policy != Policy::Dense) {
        bail!(Usage("--dequantize makes the whole model dense: leave out --policy".into()));
    }
    if args.verify_rows == 0 {
        bail!(Usage("--verify-rows must be at least 1; --verify layers measures no rows".into()));
    }
    let metric = metric(args)?;
    let gguf = export::Wanted::of_fuse(args)?;
    if gguf.is_some() && named == Some(Policy::Fold) {
        bail!(Usage(
            "--policy fold leaves the low-rank part to an adapter beside the model, and a GGUF file holds no adapter: with \
             --export-gguf choose --policy raise, same or dense"
                .into()
        ));
    }
    let splits = |data: &String| ["valid.jsonl", "train.jsonl"].map(|name| Path::new(data).join(name));
    let mut inputs: Vec<PathBuf> = args.data.iter().flat_map(splits).collect();
    inputs.extend(args.data.iter().map(PathBuf::from));
    report::check(&args.html.iter().map(|file| ("--html", file)).collect::<Vec<_>>(), &inputs)?;
    let base = args.base.as_ref().unwrap_or(&args.model);
    let model = hub::resolve(base, What::Model)?;
    if gguf.is_some() {
        // What stands in the way of the export is found out before the work.
        export::described(&model, base)?;
    }
    let adapter_dir = hub::resolve(&args.adapter_path, What::Adapter)?;
    if model.canonicalize().ok() != adapter_dir.canonicalize().ok() {
        load::refuse_beside(&model, base)?;
    }
    let adapter = AdapterSet::load(&adapter_dir)?;
    let named_both = || format!("cannot fuse {} into {base}", args.adapter_path);
    if args.base.is_some() {
        let trained = hub::resolve(&args.model, What::Model)?;
        let target = Path::new(&args.save_path).canonicalize();
        if target.is_ok_and(|target| trained.canonicalize().is_ok_and(|trained| trained == target)) {
            bail!(
                "--save-path {} is the model itself that the adapter was trained on (--model), which the fused one would \
                 replace; choose another path",
                args.save_path
            );
        }
        check_bases(&trained, &model, args, base).with_context(named_both)?;
    }
    let mut options = FuseOptions {
        policy: named.unwrap_or(Policy::Raise),
        dequantize: args.dequantize,
        // As mlx_lm does; a directory that is no model's is refused all the same.
        overwrite: true,
        force: args.force,
        other_precision: args.base.is_some(),
        base_name: base.clone(),
        adapter_name: args.adapter_path.clone(),
        adapter_dir,
        observed: Value::Null,
    };
    let checkpoint = Checkpoint::open(&model)?;
    let found = rows(args, &adapter, &checkpoint)?;
    if let Some(fused) = &args.measure {
        let stop = host::stop_flag(|| ui::note("stopping; once more stops at once"));
        let Some(found) = found else { bail!(Usage("--measure is what --verify model does".into())) };
        if let Err(why) = &found.valid {
            bail!("nothing was measured: {why}");
        }
        let left = load::beside(&hub::resolve(fused, What::Model)?).map(|_| fused.as_str());
        let model = measure(args, &found, metric, (fused.as_str(), left), &stop)?;
        let Some(model) = model else { bail!(Usage("--measure is what --verify model does".into())) };
        say_model(&model);
        return Ok(());
    }
    foresee(&checkpoint, &adapter, &options)?;
    let mut observer = observer(args, &adapter, checkpoint, found.as_ref())?;
    if let Some((observer, file)) =
        observer.as_ref().zip(found.as_ref().and_then(|found| found.source.as_ref()))
    {
        let hash = graft_adapters::file_hash(file)?;
        options.observed =
            json!({"file": file.display().to_string(), "sha256": hash, "tokens": observer.tokens()});
    }
    let mut ask = |path: &str| -> Result<_, Box<dyn std::error::Error + Send + Sync>> {
        Ok(observer.as_mut().map(|observer| observer.moments(path)).transpose()?.flatten())
    };
    let stop = host::stop_flag(|| ui::note("stopping; once more stops at once"));
    let out = Path::new(&args.save_path);
    let progress = ui::Progress::new(0, "tensors");
    let on_event = &mut |event| match event {
        Event::Tensor { done, total } => progress.of(done as u64, total as u64),
        Event::Warning(text) => progress.line(&format!("warning: {text}")),
    };
    let inputs: &mut Inputs = &mut ask;
    let result = graft_merge::fuse(
        &model,
        &adapter,
        out,
        &options,
        Watch { stop: &stop, on_event, inputs: Some(inputs) },
    );
    progress.done();
    let mut sibling = match result {
        Err(error @ Error::Stopped) => bail!(Interrupted(format!("Interrupted: {error}"))),
        other => other.with_context(named_both)?,
    };
    drop(observer);
    sibling.report.verify.clone_from(&args.verify);
    if let Some(found) = &found {
        verify(args, found, metric, &mut sibling, &stop)?;
    }
    sibling.report.seconds = start.elapsed().as_secs_f64();
    sibling.report.peak_memory_bytes = host::peak_memory();
    if let Some(why) = sibling.report.shortfall() {
        if !args.force {
            return Err(anyhow!("{why}")).with_context(|| format!("{}: nothing was written", named_both()));
        }
        ui::note(&format!("warning: {why}"));
    }
    let report = sibling.place().with_context(named_both)?;
    say(&report, out);
    if let Some(file) = &args.html {
        report::write(file, &report::fuse(&serde_json::to_value(&report)?))?;
    }
    if let Some(wanted) = gguf {
        let said = export::model(out, base, &wanted, &stop)?;
        said.iter().for_each(|line| ui::out(line));
    }
    Ok(())
}

/// The metric of the answers, if one is asked for.
fn metric(args: &FuseArgs) -> Result<Option<graft_train::Metric>> {
    let asked = args.metric.metric.is_some() || args.metric.pattern.is_some();
    match (args.metric.metric.as_deref(), asked) {
        (_, false) => Ok(None),
        (Some("loss"), _) => bail!(Usage("--metric loss: the perplexity is measured without it".into())),
        _ if args.verify != "model" => bail!(Usage("--metric belongs to --verify model".into())),
        _ => eval::metric(&args.metric),
    }
}

/// Refuses `--base` that is another model than `--model`.
fn check_bases(trained: &Path, base: &Path, args: &FuseArgs, name: &str) -> Result<()> {
    use graft_adapters::Fingerprint;
    let of = |dir: &Path, name: &str| -> Result<Fingerprint> {
        Ok(Fingerprint::of(&Checkpoint::open(dir)?, name))
    };
    let (trained, base) = (of(trained, &args.model)?, of(base, name)?);
    let other = trained.other_model_than(&base).filter(|_| !args.force);
    if let Some(why) = trained.foreign_to(&base).or(other) {
        bail!("--base {name} is another model than --model {}: {why}", args.model);
    }
    ui::note(&format!(
        "Fusing into another precision ({}) than the adapter was trained on ({}): what that changes is measured, too",
        base.precision, trained.precision
    ));
    Ok(())
}

/// The rows of `--verify model` and `--policy same`; none if neither is asked for, or the answer is known without them.
fn rows(args: &FuseArgs, adapter: &AdapterSet, checkpoint: &Checkpoint) -> Result<Option<Found>> {
    if args.verify != "model" && args.policy.as_deref() != Some("same") {
        return Ok(None);
    }
    let mut found = fuse_rows::find(args, &adapter.config, checkpoint.dir())?;
    let remedy = match unmeasurable(adapter, checkpoint)? {
        None => "; --data DIR gives rows to measure it on",
        Some(why) => {
            found.valid = Err(why);
            ""
        }
    };
    if let (Err(why), "model") = (&found.valid, args.verify.as_str()) {
        ui::note(&format!("note: {why}: the result is judged by its weights{remedy}"));
    }
    Ok(Some(found))
}

/// Why a model with the adapter unfused, to which the fused one would be compared, cannot be run.
fn unmeasurable(adapter: &AdapterSet, checkpoint: &Checkpoint) -> Result<Option<String>> {
    let full = adapter.config.fine_tune_type == FineTuneType::Full;
    for name in adapter.weights.keys() {
        if !full {
            return Ok(Some(format!(
                "{name} is a whole weight beside low-rank updates, which run only fused"
            )));
        }
        let path = name.strip_suffix(".weight").unwrap_or(name);
        if let Some(grid) = checkpoint.grid(path)? {
            return Ok(Some(format!(
                "{path} is packed ({grid}), and a full fine-tune runs unfused on floats alone"
            )));
        }
    }
    Ok(None)
}

/// What `same` rounds by; none, with a note, where there are no rows.
fn observer(
    args: &FuseArgs,
    adapter: &AdapterSet,
    checkpoint: Checkpoint,
    found: Option<&Found>,
) -> Result<Option<Observer>> {
    let full = adapter.config.fine_tune_type == FineTuneType::Full;
    if args.policy.as_deref() != Some("same") || full || checkpoint.quantization().default.is_none() {
        return Ok(None);
    }
    let texts = found.map_or(&[][..], |found| &found.observed);
    if texts.is_empty() {
        ui::note(
            "note: there are no rows to observe inputs on, so each weight is rounded by itself; give --data DIR",
        );
        return Ok(None);
    }
    let dtype = load::compute_dtype(&checkpoint);
    let observer = Observer::new(checkpoint, dtype, adapter, texts)?;
    ui::note(&format!("Rounding by the inputs of {} tokens of {} rows", observer.tokens(), texts.len()));
    Ok(Some(observer))
}

/// Says what the result will weigh and how fast it will be, and what else there is.
fn foresee(checkpoint: &Checkpoint, adapter: &AdapterSet, options: &FuseOptions) -> Result<()> {
    let before = Plan::of_base(checkpoint)?;
    let of = |policy, dequantize| Plan::of_fused(checkpoint, adapter, policy, dequantize);
    let policy = if options.dequantize { Policy::Dense } else { options.policy };
    let plan = of(policy, options.dequantize)?;
    let mut line = format!("Weights: {} -> about {}", ui::bytes(before.bytes), ui::bytes(plan.bytes));
    let slower = plan.read as f64 / before.read.max(1) as f64;
    if (slower - 1.0).abs() > 0.02 {
        line += &format!(
            "; a token reads {slower:.1}x the bytes, so decoding takes roughly {slower:.1}x the time"
        );
    }
    let mut others = Vec::new();
    for other in [Policy::Raise, Policy::Same, Policy::Dense].into_iter().filter(|other| *other != policy) {
        let bytes = of(other, false)?.bytes;
        if bytes != plan.bytes {
            others.push(format!("--policy {} {}", other.name(), ui::bytes(bytes)));
        }
    }
    if !others.is_empty() {
        line += &format!(" ({})", others.join(", "));
    }
    ui::note(&line);
    Ok(())
}

/// Measures the whole model, where there are rows.
fn verify(
    args: &FuseArgs,
    found: &Found,
    metric: Option<graft_train::Metric>,
    sibling: &mut Sibling,
    stop: &AtomicBool,
) -> Result<()> {
    if sibling.report.totals.changed == 0 && sibling.report.low_rank_left == 0 {
        return Ok(());
    }
    let dir: PathBuf = sibling.path().to_path_buf();
    let fused = dir.display().to_string();
    let left = (sibling.report.low_rank_left > 0).then_some(fused.as_str());
    sibling.report.model = measure(args, found, metric, (fused.as_str(), left), stop)
        .context("the fused model could not be verified (--verify layers does without)")?;
    Ok(())
}

/// The report of a fused model, and of an adapter beside it, if one was left; none where nothing is to be measured.
fn measure(
    args: &FuseArgs,
    found: &Found,
    metric: Option<graft_train::Metric>,
    fused: (&str, Option<&str>),
    stop: &AtomicBool,
) -> Result<Option<ModelReport>> {
    let (Ok(rows), "model") = (&found.valid, args.verify.as_str()) else { return Ok(None) };
    let name = args.metric.metric.as_deref().unwrap_or("exact");
    let verify = Verify {
        base: args.base.as_ref().unwrap_or(&args.model),
        trained: args.base.as_ref().map(|_| args.model.as_str()),
        adapter: &args.adapter_path,
        fused,
        rows,
        metric: metric.map(|metric| (name, metric, args.metric.max_tokens)),
        stop,
    };
    verify.run().map(Some)
}

fn say(report: &FuseReport, out: &Path) {
    let totals = &report.totals;
    ui::out(&format!(
        "Fused {} weights of {} ({}, --policy {})",
        totals.changed, report.base, report.fine_tune_type, report.policy
    ));
    let mut forms: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for layer in report.layers.iter().filter(|layer| layer.changed()) {
        *forms.entry((&layer.from, &layer.to)).or_default() += 1;
    }
    for ((from, to), count) in forms {
        ui::out(&format!("  {count} of {from} -> {to}"));
    }
    for layer in report.layers.iter().filter(|layer| layer.reason.is_some()).take(3) {
        ui::out(&format!("  {}: {}: {}", layer.path, layer.to, layer.reason.as_deref().unwrap_or_default()));
    }
    if totals.fallen_back > 3 {
        ui::out(&format!("  and {} more ({REPORT_FILE} has all)", totals.fallen_back - 3));
    }
    if totals.unchanged > 0 {
        ui::out(&format!("  {} that the adapter leaves as they are", totals.unchanged));
    }
    ui::out(&format!("Size: {} -> {}", ui::bytes(totals.base_bytes), ui::bytes(totals.bytes)));
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    if let Some(worst) = &totals.worst {
        let least = report.layers.iter().find(|l| l.path == *worst).map_or(totals.kept, |l| l.kept);
        let steps =
            totals.delta_steps.map_or(String::new(), |s| format!("; it is {s:.2} steps of the base's grid"));
        let effect = totals.effect_kept.map_or(String::new(), |e| format!(", {} at the outputs", percent(e)));
        ui::out(&format!(
            "Update: {} of it kept{effect} (least in {worst}: {}){steps}",
            percent(totals.kept),
            percent(least)
        ));
    }
    if let Some(model) = &report.model {
        say_model(model);
    }
    ui::out(&format!("Saved the model and its {REPORT_FILE} to {}.", out.display()));
    if report.low_rank_left > 0 {
        ui::out(&format!(
            "The low-rank part of {} weights stays an adapter in the same directory: use it with --adapter-path {}.",
            report.low_rank_left,
            out.display()
        ));
    }
}

/// What a model does beside the adapter on its base.
fn say_model(model: &ModelReport) {
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let (kl, base, kept) = (&model.fused, &model.base, &model.kept);
    if base.kl.value < HARDLY {
        ui::out("Answers: the adapter hardly changes them, so the weights decide");
    } else {
        ui::out(&format!(
            "Answers: {} [{}, {}] of the effect kept; KL(adapter || fused) {:.2e} (99 %: {:.2e}), KL(adapter || base) \
             {:.2e}; same best token {}",
            percent(kept.value),
            percent(kept.interval[0]),
            percent(kept.interval[1]),
            kl.kl.value,
            kl.kl_p99,
            base.kl.value,
            percent(kl.agreement)
        ));
    }
    let p = &model.perplexity;
    ui::out(&format!(
        "Perplexity: base {:.3}, adapter {:.3}, fused {:.3} ({} tokens of {} rows of {})",
        p.base, p.adapter, p.fused, model.tokens, model.rows, model.data
    ));
    if let Some(trained) = &model.trained {
        ui::out(&format!(
            "Beside the adapter on the base it was trained on: KL {:.2e}, same best token {}",
            trained.kl.value,
            percent(trained.agreement)
        ));
    }
    if let Some(scores) = &model.scores {
        let s = &scores.score;
        ui::out(&format!(
            "Score ({}): base {:.3}, adapter {:.3}, fused {:.3}; difference {:+.3} [{:+.3}, {:+.3}]",
            scores.metric,
            s.base,
            s.adapter,
            s.fused,
            scores.difference.value,
            scores.difference.interval[0],
            scores.difference.interval[1]
        ));
    }
}
