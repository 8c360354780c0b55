//! `graft merge`: several adapters to one, and what that kept of each.

use super::eval;
use crate::args::{EvalArgs, MergeArgs};
use crate::errors::{Interrupted, Usage};
use crate::hub::{self, What};
use crate::report::As;
use crate::{host, ui};
use anyhow::{Context, Result, bail};
use graft_adapters::{AdapterConfig, AdapterSet, Origin};
use graft_merge::{
    Error, Event, InputParameters, MERGE_REPORT_FILE, MergeBase, MergeOptions, MergeRecipe, MergeReport,
    MergeSource, Method, RecipeInput, Setting, Size,
};
use graft_ops::Precision;
use graft_quant::Checkpoint;
use serde_json::{Value, json};
use std::path::Path;
use std::time::Instant;

/// Merges, says what it cost, and measures if asked to; answers are computed as `graft eval` does, in f32 if `exact`.
pub(crate) fn merge(args: &MergeArgs, exact: bool) -> Result<()> {
    let started = Instant::now();
    let recipe = recipe(args)?;
    let Some(method) = Method::from_name(&recipe.merge_method) else {
        let names = Method::NAMES.join(", ");
        bail!(Usage(format!("merge_method {}: expected one of {names}", recipe.merge_method)));
    };
    let (sources, data) = sources(args, &recipe)?;
    let parameters = recipe.parameters;
    let options = MergeOptions {
        method,
        size: size(parameters.rank, parameters.energy).unwrap_or(Size::Full),
        normalize: parameters.normalize,
        lambda: parameters.lambda.unwrap_or(1.0),
        t: parameters.t,
        seed: parameters.seed.unwrap_or(0),
        force: args.force,
    };
    let checkpoint = recipe
        .base_model
        .as_ref()
        .map(|model| Ok::<_, anyhow::Error>((Checkpoint::open(&hub::resolve(model, What::Model)?)?, model)))
        .transpose()?;
    let base = checkpoint
        .as_ref()
        .map(|(checkpoint, name)| {
            Ok::<_, anyhow::Error>(MergeBase { checkpoint, origin: Origin::of_model(checkpoint, name)? })
        })
        .transpose()?;
    let out = Path::new(&args.save_path);
    let report = progress("modules", |stop, on_event| {
        graft_merge::merge(&sources, base.as_ref(), &options, out, stop, on_event)
    })
    .with_context(|| format!("cannot merge {}", names(&sources).join(", ")))?;
    if !args.json {
        say(&report, &format!("Merged {} adapters", sources.len()), out);
    }
    let mut value = serde_json::to_value(&report)?;
    value["seconds"] = started.elapsed().as_secs_f64().into();
    value["peak_memory_bytes"] = host::peak_memory().into();
    if let (true, Some(model)) = (args.eval, &recipe.base_model) {
        let precision = if exact { Precision::F32 } else { Precision::Int16 };
        graft_ops::set_precision(precision);
        value["eval"] = scores(args, model, &names(&sources), &data)?;
        if !args.json {
            say_scores(&value["eval"]);
        }
    }
    graft_quant::write_atomic(&out.join(MERGE_REPORT_FILE), format!("{value:#}").as_bytes())?;
    if args.json {
        ui::out(&format!("{value:#}"));
    }
    Ok(())
}

/// A rank or an energy as a size.
pub(super) fn size(rank: Option<i32>, energy: Option<f64>) -> Option<Size> {
    rank.map(Size::Rank).or(energy.map(Size::Energy))
}

/// Runs with a line of progress and a stop flag.
pub(super) fn progress<T>(
    what: &str,
    run: impl FnOnce(&std::sync::atomic::AtomicBool, &mut dyn FnMut(Event)) -> graft_merge::Result<T>,
) -> Result<T> {
    let stop = host::stop_flag(|| ui::note("stopping; once more stops at once"));
    let progress = ui::Progress::new(0, what);
    let result = run(&stop, &mut |event| match event {
        Event::Tensor { done, total } => progress.of(done as u64, total as u64),
        Event::Warning(text) => progress.line(&format!("warning: {text}")),
    });
    progress.done();
    match result {
        Err(Error::Stopped) => bail!(Interrupted(
            "Interrupted: stopped before the adapter was complete; nothing was written".into()
        )),
        result => Ok(result?),
    }
}

/// What a merge, an extraction or a cut came to.
pub(super) fn say(report: &MergeReport, done: &str, out: &Path) {
    let totals = &report.totals;
    ui::out(&format!("{done} ({}, {}) in {} modules", report.method, report.fine_tune_type, totals.modules));
    let ranks = || report.layers.iter().map(|layer| layer.rank);
    let (least, most) = (ranks().min().unwrap_or(0), ranks().max().unwrap_or(0));
    ui::out(&if least == most { format!("Rank: {most}") } else { format!("Rank: {least} to {most}") });
    let worst = totals.worst.as_deref().map_or_else(String::new, |worst| format!(" (most in {worst})"));
    ui::out(&format!(
        "Norm of the update: {:.4}; cutting it to the rank cost {:.3} %{worst}",
        totals.norm,
        100.0 * totals.error
    ));
    if !report.left_out.is_empty() {
        ui::out(&format!("Left out: {}", report.left_out.join(", ")));
    }
    ui::out(&format!("Saved the adapter and its {MERGE_REPORT_FILE} to {}.", out.display()));
}

/// The recipe of the file or of the flags; flags go before the file.
fn recipe(args: &MergeArgs) -> Result<MergeRecipe> {
    let mut recipe = match (&args.recipe, &args.method) {
        (Some(file), _) => {
            let text =
                std::fs::read_to_string(file).with_context(|| format!("cannot read the recipe {file}"))?;
            serde_yaml_ng::from_str(&text).map_err(|e| Usage(format!("{file}: {e}")))?
        }
        (None, Some(method)) => MergeRecipe { merge_method: method.clone(), ..MergeRecipe::default() },
        (None, None) => bail!(Usage("give --method and --adapter, or --recipe FILE".into())),
    };
    for adapter in &args.adapter {
        recipe.models.push(input(adapter)?);
    }
    if recipe.models.is_empty() {
        bail!(Usage("there is nothing to merge: give --adapter DIR, several times".into()));
    }
    let parameters = &mut recipe.parameters;
    if let Some(density) = args.density {
        parameters.density = Some(Setting::Number(density));
        recipe.models.iter_mut().for_each(|model| model.parameters.density = None);
    }
    if args.rank.is_some() || args.energy.is_some() {
        (parameters.rank, parameters.energy) = (args.rank, args.energy);
    }
    if parameters.rank.is_some() && parameters.energy.is_some() {
        bail!(Usage("rank and energy: only one of them can be asked for".into()));
    }
    parameters.t = args.place.map(Setting::Number).or(parameters.t.take());
    parameters.lambda = args.lambda.or(parameters.lambda);
    parameters.normalize = args.normalize.or(parameters.normalize);
    parameters.seed = args.seed.or(parameters.seed);
    recipe.base_model = args.model.clone().or(recipe.base_model);
    if args.eval && recipe.base_model.is_none() {
        bail!(Usage("--eval needs the base: give --model".into()));
    }
    if !args.eval_data.is_empty() && args.eval_data.len() != recipe.models.len() {
        let (data, adapters) = (args.eval_data.len(), recipe.models.len());
        bail!(Usage(format!("--eval-data: expected one for each of the {adapters} adapters, found {data}")));
    }
    Ok(recipe)
}

/// `DIR` or `DIR=W`.
fn input(text: &str) -> Result<RecipeInput> {
    let plain = || (text, None);
    let (name, weight) = match text.rsplit_once('=') {
        Some((name, weight)) if !Path::new(text).is_dir() => (name, Some(weight)),
        _ => plain(),
    };
    let weight = weight
        .map(|w| match w.parse::<f64>() {
            Ok(w) if w.is_finite() => Ok(Setting::Number(w)),
            _ => Err(Usage(format!("--adapter {text}: expected a finite number after `=`, found `{w}`"))),
        })
        .transpose()?;
    Ok(RecipeInput { model: name.to_owned(), parameters: InputParameters { weight, density: None } })
}

/// The adapters, and the data that each was trained on.
fn sources(args: &MergeArgs, recipe: &MergeRecipe) -> Result<(Vec<MergeSource>, Vec<String>)> {
    let (mut sources, mut data) = (Vec::new(), Vec::new());
    let common = &recipe.parameters;
    for (index, model) in recipe.models.iter().enumerate() {
        let dir = hub::resolve(&model.model, What::Adapter)?;
        let set = AdapterSet::load(&dir)?;
        if args.eval {
            let named = || named_data(&set.config);
            let Some(own) = args.eval_data.get(index).cloned().or_else(named) else {
                bail!(Usage(format!(
                    "--eval: {} does not say which data it was trained on: give --eval-data for each adapter",
                    model.model
                )));
            };
            // A wrong one is found before the work.
            eval::data_file(&own)?;
            data.push(own);
        }
        let setting = |own: &Option<Setting>, common: &Option<Setting>| {
            own.clone().or_else(|| common.clone()).unwrap_or(Setting::Number(1.0))
        };
        sources.push(MergeSource {
            origin: Origin::of_adapter(&dir, &model.model)?,
            set,
            weight: setting(&model.parameters.weight, &common.weight),
            density: setting(&model.parameters.density, &common.density),
        });
    }
    Ok((sources, data))
}

/// The data that an adapter names: the folder of the rows that training recorded, which another folder's `data` is not, or
/// what was given.
fn named_data(config: &AdapterConfig) -> Option<String> {
    let given = || config.raw.get("data").and_then(Value::as_str);
    let valid = config.extra("rows").and_then(|rows| rows["valid"]["file"].as_str());
    let folder = valid.and_then(|file| Path::new(file).parent()).filter(|folder| folder.is_dir());
    folder.and_then(Path::to_str).or_else(given).map(str::to_owned)
}

fn names(sources: &[MergeSource]) -> Vec<String> {
    sources.iter().map(|source| source.origin.name.clone()).collect()
}

/// Scores of the base, the parents and the merge on each parent's task.
fn scores(args: &MergeArgs, model: &str, parents: &[String], data: &[String]) -> Result<Value> {
    let mut tasks: Vec<Value> = Vec::new();
    for (parent, file) in parents.iter().zip(data) {
        let mut adapters = parents.to_vec();
        adapters.push(args.save_path.clone());
        let args = EvalArgs::greedy(model.to_owned(), adapters, file.clone(), args.metric.clone());
        let (report, measured) = eval::measure(&args)?;
        measured?;
        let score = |i: usize| report["models"][i]["score"].as_f64().unwrap_or(f64::NAN);
        let own = parents.iter().position(|name| name == parent).map_or(0, |i| i + 1);
        let merged = score(parents.len() + 1);
        let scores: Vec<Value> = (0..parents.len() + 2)
            .map(|i| json!({"name": report["models"][i]["name"], "score": score(i)}))
            .collect();
        // With a loss less is better, and a share of it says nothing.
        let kept = if report["metric"] == "loss" { Value::Null } else { json!(merged / score(own)) };
        tasks.push(json!({
            "task": file, "parent": parent, "metric": report["metric"], "rows": report["rows"], "scores": scores, "kept": kept,
        }));
    }
    Ok(tasks.into())
}

fn say_scores(tasks: &Value) {
    let tasks = tasks.as_array().map_or(&[][..], Vec::as_slice);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut rows = vec![vec![String::new()]];
    for score in tasks.first().and_then(|t| t["scores"].as_array()).into_iter().flatten() {
        rows[0].push(text(&score["name"]));
    }
    rows[0].push("kept of its parent".into());
    for task in tasks {
        let mut row = vec![format!("{} ({})", text(&task["task"]), text(&task["metric"]))];
        row.extend(task["scores"].as_array().into_iter().flatten().map(|s| As::Decimal.show(&s["score"])));
        row.push(task["kept"].as_f64().map_or_else(|| "-".into(), |kept| format!("{:.1} %", 100.0 * kept)));
        rows.push(row);
    }
    ui::out(&ui::table(&rows));
}
