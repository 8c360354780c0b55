//! `graft adapter`: PEFT's form and back, what an adapter holds, one with fewer columns.

use super::merge::{progress, say, size};
use crate::args::{AdapterInspectArgs, ExportArgs, ImportArgs, ResizeArgs};
use crate::hub::{self, What};
use crate::ui;
use anyhow::{Context, Result, bail};
use graft_adapters::{AdapterSet, AdapterWriter, FineTuneType, Fingerprint, Origin, Provenance};
use graft_merge::{Allowed, Event, Size};
use graft_quant::Checkpoint;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// PEFT to mlx-lm.
pub(crate) fn import(args: &ImportArgs) -> Result<()> {
    let dir = hub::resolve(&args.adapter, What::Adapter)?;
    if !dir.join("adapter_model.safetensors").is_file() {
        bail!("{}: adapter_model.safetensors is missing, so it is no adapter of PEFT", dir.display());
    }
    let mut set = AdapterSet::load(&dir)?;
    let mut base = None;
    if let Some(model) = &args.model {
        let checkpoint = Checkpoint::open(&hub::resolve(model, What::Model)?)?;
        graft_merge::check(&checkpoint, &set, Allowed::default(), &mut warn)
            .with_context(|| format!("cannot import {} for {model}", args.adapter))?;
        let fingerprint = serde_json::to_value(Fingerprint::of(&checkpoint, model))?;
        set.metadata.insert(Fingerprint::KEY.into(), fingerprint.to_string());
        set.config.set_extra(Fingerprint::KEY, fingerprint);
        base = Some(Origin::of_model(&checkpoint, model)?);
    }
    // One that we exported comes back as it was, and already says what it was made of.
    if set.metadata.contains_key("peft_config") || base.is_some() {
        provenance("adapter import", base, &dir, &args.adapter, &set)?.write(&mut set)?;
    }
    let out = Path::new(&args.save_path);
    AdapterWriter::write(&set, out)?;
    ui::out(&format!(
        "Saved the {} adapter of {} modules to {}.",
        kind(&set),
        set.adapters.len(),
        out.display()
    ));
    Ok(())
}

/// mlx-lm to PEFT.
pub(crate) fn export(args: &ExportArgs) -> Result<()> {
    let dir = hub::resolve(&args.adapter, What::Adapter)?;
    let set = AdapterSet::load(&dir)?;
    let made_of = provenance("adapter export", None, &dir, &args.adapter, &set)?;
    let out = Path::new(&args.save_path);
    graft_adapters::export(&set, &dir, &made_of, out)?;
    ui::out(&format!(
        "Saved the {} adapter of {} modules in PEFT's form to {}.",
        kind(&set),
        set.adapters.len(),
        out.display()
    ));
    Ok(())
}

fn kind(set: &AdapterSet) -> &'static str {
    set.config.fine_tune_type.name()
}

fn warn(event: Event) {
    if let Event::Warning(text) = event {
        ui::note(&format!("warning: {text}"));
    }
}

fn provenance(
    operation: &str,
    base: Option<Origin>,
    dir: &Path,
    name: &str,
    set: &AdapterSet,
) -> Result<Provenance> {
    Ok(Provenance {
        graft: env!("CARGO_PKG_VERSION").into(),
        operation: operation.into(),
        base,
        inputs: vec![Origin::of_adapter(dir, name)?],
        recipe: Value::Null,
        summary: json!({"modules": set.adapters.len(), "whole_weights": set.weights.len()}),
    })
}

/// What each module holds.
pub(crate) fn inspect(args: &AdapterInspectArgs) -> Result<()> {
    let dir = hub::resolve(&args.adapter, What::Adapter)?;
    let set = AdapterSet::load(&dir)?;
    let (mut layers, mut squared, mut parameters) = (Vec::new(), 0.0, 0u64);
    for (path, adapter) in &set.adapters {
        let spectrum: Vec<f64> = adapter.spectrum()?.into_iter().map(f64::from).collect();
        let own: f64 = spectrum.iter().map(|s| s * s).sum();
        squared += own;
        parameters += adapter.arrays().map(|a| a.size() as u64).sum::<u64>();
        let mut layer = json!({
            "path": path, "rank": adapter.rank(), "scale": adapter.scale, "norm": own.sqrt(),
            "largest": spectrum.first(), "effective_rank": effective_rank(&spectrum), "spectrum": spectrum,
        });
        if let Some(m) = &adapter.magnitude {
            let m = graft_quant::Tensor::from_array(m)?.to_f32()?;
            layer["mean_magnitude"] = (m.iter().map(|m| f64::from(*m)).sum::<f64>() / m.len() as f64).into();
        }
        layers.push(layer);
    }
    let base = Fingerprint::read(&set.config);
    let whole: Vec<&String> = set.weights.keys().collect();
    let report = json!({
        "kind": "adapter", "path": dir.display().to_string(), "fine_tune_type": kind(&set), "modules": set.adapters.len(),
        "parameters": parameters, "norm": f64::sqrt(squared), "base": base, "whole_weights": whole,
        "provenance": Provenance::read(&set), "layers": layers,
    });
    if args.json {
        ui::out(&format!("{report:#}"));
        return Ok(());
    }
    ui::out(&format!("{} adapter of {} modules, {parameters} parameters", kind(&set), set.adapters.len()));
    match &base {
        Some(base) => ui::out(&format!(
            "trained on {} ({}, {}; shapes {}, vocabulary {})",
            base.lineage,
            base.model_type,
            base.precision,
            short(&base.shapes),
            short(&base.vocabulary)
        )),
        None => ui::out("it does not say which base it was trained on"),
    }
    if let Some(made) = Provenance::read(&set) {
        let inputs: Vec<&str> = made.inputs.iter().map(|input| input.name.as_str()).collect();
        ui::out(&format!("made by {} of {} (graft {})", made.operation, inputs.join(", "), made.graft));
    }
    if !whole.is_empty() {
        ui::out(&format!("whole weights: {whole:?}"));
    }
    ui::out(&format!("norm of all updates {:.4}", squared.sqrt()));
    let mut rows =
        vec![["module", "rank", "scale", "norm", "largest", "effective rank"].map(str::to_owned).to_vec()];
    for layer in &layers {
        let number = |key: &str| layer[key].as_f64().map_or_else(|| "-".into(), |x| format!("{x:.4}"));
        let path = layer["path"].as_str().unwrap_or_default().to_owned();
        let mut row = vec![path, layer["rank"].to_string(), layer["scale"].to_string()];
        row.extend(["norm", "largest", "effective_rank"].map(number));
        rows.push(row);
    }
    ui::out(&ui::table(&rows));
    Ok(())
}

/// exp of the entropy of the shares s / sum s: how many directions an update really has; 0 where it is nothing.
fn effective_rank(spectrum: &[f64]) -> f64 {
    let sum: f64 = spectrum.iter().sum();
    if sum == 0.0 {
        return 0.0;
    }
    let shares = spectrum.iter().map(|s| s / sum).filter(|p| *p > 0.0);
    shares.map(|p| -p * p.ln()).sum::<f64>().exp()
}

fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or("unknown")
}

/// The same adapter with fewer columns.
pub(crate) fn resize(args: &ResizeArgs) -> Result<()> {
    let dir = hub::resolve(&args.adapter, What::Adapter)?;
    let set = AdapterSet::load(&dir)?;
    if set.config.fine_tune_type == FineTuneType::Full {
        bail!(
            "{}: a full fine-tune has no rank; graft adapter extract makes a low-rank adapter of one",
            dir.display()
        );
    }
    let size = size(args.size.rank, args.size.energy).unwrap_or(Size::Full);
    let out = PathBuf::from(&args.save_path);
    let origin = Origin::of_adapter(&dir, &args.adapter)?;
    let report = progress("modules", |stop, on_event| {
        graft_merge::resize((&set, &origin), size, &out, stop, on_event)
    })
    .with_context(|| format!("cannot resize {}", args.adapter))?;
    if args.json {
        ui::out(&serde_json::to_string_pretty(&report)?);
    } else {
        say(&report, &format!("Resized {}", args.adapter), &out);
    }
    Ok(())
}
