//! An adapter out of what there is: of the difference of two models, or of an adapter with more columns.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use graft_adapters::{AdapterSet, AdapterWriter, FineTuneType, Fingerprint, Origin, Provenance};
use graft_ops::linalg::HostMatrix;
use graft_ops::{Array, Dtype, ffi};
use graft_quant::{Checkpoint, Weight};
use serde_json::{Value, json};

use crate::fuse::kind_of;
use crate::module::{check_finite, cut, padded};
use crate::output::{described, last_layers, layers_of};
use crate::{Error, Event, MERGE_REPORT_FILE, MergeLayer, MergeReport, MergeTotals, Result, Size, dense};

/// How to take an adapter out of a fine-tuned model.
#[derive(Debug, Clone)]
pub struct ExtractOptions {
    /// Its rank.
    pub size: Size,
    /// Leave out what changed and has no low-rank form (norms, biases), where it is refused otherwise.
    pub leave_out: bool,
    /// Seed of the search for the leading directions.
    pub seed: u64,
    /// What the base is called, and its hashes.
    pub base: Origin,
    /// What the fine-tuned model is called, and its hashes.
    pub tuned: Origin,
}

/// Takes the difference of two models apart, weight by weight, into a LoRA adapter at `out` that makes the first nearly the
/// second; whole or not at all. Weights that are the same get no update.
///
/// # Errors
/// When the two have other weights, something else than matrices differs, nothing does, or `stop` was set.
pub fn extract(
    (base, tuned): (&Checkpoint, &Checkpoint),
    options: &ExtractOptions,
    out: &Path,
    stop: &AtomicBool,
    on_event: &mut dyn FnMut(Event),
) -> Result<MergeReport> {
    options.size.check()?;
    let paths = common_modules(base, tuned)?;
    let others = changed_others(base, tuned, &paths)?;
    if !others.is_empty() && !options.leave_out {
        return Err(Error::Unsuited {
            purpose: "extracted",
            name: options.tuned.name.clone(),
            what: format!("{} tensors that are no matrix and changed", others.len()),
            why: format!(
                "low-rank updates have no place for them; --leave-out does without\n  {}",
                others.join("\n  ")
            ),
        });
    }
    if base.quantization() != tuned.quantization() {
        on_event(Event::Warning(format!(
            "{} and {} are stored in other precisions: the update holds that rounding too",
            options.base.name, options.tuned.name
        )));
    }
    let mut writer = AdapterWriter::create(out)?;
    let mut layers = Vec::new();
    for (done, path) in paths.iter().enumerate() {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Stopped);
        }
        let weights = (base.weight(path)?, tuned.weight(path)?);
        if let Some(values) = difference(&weights.0, &weights.1, path)? {
            let difference = HostMatrix { values: &values, columns: weights.0.in_features() };
            let most = difference.columns.min(difference.shape().0);
            let cut = dense::factored(kind_of(path), difference, options.size, None, options.seed)?;
            let adapter = graft_adapters::Adapter { a: cut.a, b: cut.b, scale: 1.0, magnitude: None };
            let adapter = match options.size {
                Size::Rank(rank) if rank > most => padded(adapter, rank)?,
                _ => adapter,
            };
            check_finite(path, &adapter, &[cut.norm, cut.error])?;
            writer.add(path, &adapter)?;
            layers.push(layer(path, adapter.rank(), cut.norm, cut.error));
        }
        mlx_rs::memory::clear_cache()?;
        on_event(Event::Tensor { done: done + 1, total: paths.len() });
    }
    if layers.is_empty() {
        return Err(Error::Unsuited {
            purpose: "extracted",
            name: options.tuned.name.clone(),
            what: "a model without a changed matrix".into(),
            why: format!("each of its weights is that of {}", options.base.name),
        });
    }
    let report = MergeReport {
        left_out: others,
        base: Some(options.base.name.clone()),
        ..report("extract", FineTuneType::Lora, &options.tuned.name, layers)
    };
    let rank = report.layers.iter().map(|l| l.rank).max().unwrap_or(1);
    let named = || report.layers.iter().map(|l| l.path.as_str());
    let num_layers = layers_of(base).map_or(-1, |layers| last_layers(layers, named()));
    let fingerprint = Fingerprint::of(base, &options.base.name);
    let mut set = described(FineTuneType::Lora, num_layers, rank, named(), Some(fingerprint))?;
    let provenance = Provenance {
        graft: env!("CARGO_PKG_VERSION").into(),
        operation: "adapter extract".into(),
        base: Some(options.base.clone()),
        inputs: vec![options.tuned.clone()],
        recipe: json!({"size": options.size.to_json(), "leave_out": options.leave_out, "seed": options.seed}),
        summary: summary(&report),
    };
    provenance.write(&mut set)?;
    finish(writer, &set, &report)?;
    Ok(report)
}

/// Cuts each update of `set` to a lower rank, into a directory at `out`. Magnitudes stay: each row keeps its norm, in the
/// direction that the cut leaves it.
///
/// # Errors
/// When it has no low-rank form or is not finite, the size means nothing, the target exists, or `stop` was set, which is looked
/// at between modules.
pub fn resize(
    (set, origin): (&AdapterSet, &Origin),
    size: Size,
    out: &Path,
    stop: &AtomicBool,
    on_event: &mut dyn FnMut(Event),
) -> Result<MergeReport> {
    size.check()?;
    if set.config.fine_tune_type == FineTuneType::Full || !set.weights.is_empty() {
        return Err(Error::Unsuited {
            purpose: "resized",
            name: origin.name.clone(),
            what: "an adapter with whole weights".into(),
            why:
                "they have no rank: fuse it (graft fuse), then extract the difference (graft adapter extract)"
                    .into(),
        });
    }
    let mut writer = AdapterWriter::create(out)?;
    let most = set.adapters.values().map(graft_adapters::Adapter::rank).max().unwrap_or(1);
    let pad = if let Size::Rank(rank) = size { Some(rank.min(most)) } else { None };
    let mut layers = Vec::new();
    for (done, (path, adapter)) in set.adapters.iter().enumerate() {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Stopped);
        }
        let scaled = adapter.b.multiply(Array::from_f32(adapter.scale))?;
        let cut = cut(&adapter.a, &scaled, size)?;
        let (norm, error) = (cut.norm, cut.error);
        let own =
            graft_adapters::Adapter { a: cut.a, b: cut.b, scale: 1.0, magnitude: adapter.magnitude.clone() };
        let own = pad.map_or_else(|| Ok(own.clone()), |rank| padded(own.clone(), rank))?;
        check_finite(path, &own, &[norm, error])?;
        writer.add(path, &own)?;
        layers.push(layer(path, own.rank(), norm, error));
        on_event(Event::Tensor { done: done + 1, total: set.adapters.len() });
    }
    let report = report("resize", set.config.fine_tune_type, &origin.name, layers);
    let rank = report.layers.iter().map(|l| l.rank).max().unwrap_or(1);
    let named = report.layers.iter().map(|l| l.path.as_str());
    let config = &set.config;
    let mut done =
        described(config.fine_tune_type, config.num_layers, rank, named, Fingerprint::read(config))?;
    if set.leaves_head() {
        done.leave_head();
    }
    let provenance = Provenance {
        graft: env!("CARGO_PKG_VERSION").into(),
        operation: "adapter resize".into(),
        base: None,
        inputs: vec![origin.clone()],
        recipe: json!({"size": size.to_json()}),
        summary: summary(&report),
    };
    provenance.write(&mut done)?;
    finish(writer, &done, &report)?;
    Ok(report)
}

fn finish(mut writer: AdapterWriter, set: &AdapterSet, report: &MergeReport) -> Result<()> {
    writer.file(MERGE_REPORT_FILE, &serde_json::to_vec_pretty(report).map_err(Error::Report)?)?;
    Ok(writer.finish(set)?)
}

fn layer(path: &str, rank: i32, norm: f64, error: f64) -> MergeLayer {
    MergeLayer { path: path.to_owned(), rank, adapters: Vec::new(), norm, error }
}

fn report(kind: &str, of: FineTuneType, from: &str, layers: Vec<MergeLayer>) -> MergeReport {
    MergeReport {
        schema: 1,
        kind: kind.into(),
        version: env!("CARGO_PKG_VERSION").into(),
        method: "svd".into(),
        fine_tune_type: of.name().into(),
        base: None,
        adapters: vec![from.to_owned()],
        left_out: Vec::new(),
        totals: MergeTotals::of(&layers),
        layers,
    }
}

fn summary(report: &MergeReport) -> Value {
    serde_json::to_value(&report.totals).unwrap_or_default()
}

/// The matrices of both models, which must be the same ones.
fn common_modules(base: &Checkpoint, tuned: &Checkpoint) -> Result<BTreeSet<String>> {
    let (ours, theirs) = (modules(base), modules(tuned));
    let mut problems = Vec::new();
    for (path, shape) in &ours {
        match theirs.get(path) {
            None => problems.push(format!("{path}: only the base has it")),
            Some(other) if other != shape => {
                problems.push(format!("{path}: {shape:?} in the base, {other:?} in the fine-tuned model"));
            }
            Some(_) => {}
        }
    }
    let more = theirs.keys().filter(|path| !ours.contains_key(*path));
    problems.extend(more.map(|path| format!("{path}: only the fine-tuned model has it")));
    if problems.is_empty() {
        return Ok(ours.into_keys().collect());
    }
    Err(Error::Mismatch { model: tuned.dir().to_path_buf(), problems })
}

/// The matrices of a model that something reads: a tied one may carry a copy of its embedding as head.
fn modules(model: &Checkpoint) -> std::collections::BTreeMap<String, (usize, usize)> {
    let mut shapes = model.module_shapes();
    if model.config().get("tie_word_embeddings").and_then(Value::as_bool) == Some(true) {
        shapes.remove("lm_head");
    }
    shapes
}

/// The tensors that are no part of a matrix and differ, by name.
fn changed_others(base: &Checkpoint, tuned: &Checkpoint, paths: &BTreeSet<String>) -> Result<Vec<String>> {
    let is_part = |name: &str| {
        let (path, part) = name.rsplit_once('.').unwrap_or((name, ""));
        path == "lm_head" || paths.contains(path) && ["weight", "scales", "biases"].contains(&part)
    };
    let names: BTreeSet<&String> = base.names().chain(tuned.names()).filter(|name| !is_part(name)).collect();
    let mut changed = Vec::new();
    for name in names {
        let same = match (base.info(name), tuned.info(name)) {
            (Some(a), Some(b)) => {
                a.shape == b.shape && {
                    let (a, b) = (base.read(name)?, tuned.read(name)?);
                    a == b || a.to_f32().is_ok_and(|a| b.to_f32().is_ok_and(|b| a == b))
                }
            }
            _ => false,
        };
        if !same {
            changed.push(name.clone());
        }
    }
    Ok(changed)
}

/// W' - W, dense in f32, row by row; none if they are the same. A block of rows of each is dense at a time, and then the difference.
fn difference(base: &Weight, tuned: &Weight, path: &str) -> Result<Option<Vec<f32>>> {
    let columns = base.in_features();
    let mut values = Vec::new();
    let mut changed = false;
    for ids in base.row_blocks() {
        let [w, own] = [base, tuned].map(|weight| weight.slice(&ids)?.dequantize(Dtype::Float32));
        let rows = own?.subtract(w?)?;
        let rows = ffi::read::<f32>(&rows)?;
        if rows.iter().any(|x| !x.is_finite()) {
            return Err(Error::DifferenceNotFinite { path: path.to_owned() });
        }
        let any = rows.iter().any(|x| *x != 0.0);
        // Nothing is held for the many weights that are the same.
        if any && !changed {
            values.resize(columns as usize * ffi::read::<i32>(&ids)?[0] as usize, 0.0);
            changed = true;
        }
        if changed {
            values.extend_from_slice(rows);
        }
    }
    Ok(changed.then_some(values))
}
