//! `graft export gguf`, and what `graft fuse --export-gguf` shares with it: a model or an adapter as a file of llama.cpp.

use super::load;
use crate::args::{ExportGgufArgs, FuseArgs};
use crate::errors::{Interrupted, Usage};
use crate::hub::{self, What};
use crate::{host, ui};
use anyhow::{Context, Result, bail};
use graft_adapters::{AdapterSet, Fingerprint, Origin, Provenance};
use graft_model::{GgufAdapter, GgufExport};
use graft_quant::convert::Event;
use graft_quant::gguf::{ExportReport, Exported, Field, Kind, export_gguf as write_gguf};
use graft_quant::{Checkpoint, Error, check_writable};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// The file that is wanted.
pub(super) struct Wanted {
    path: PathBuf,
    /// One type for all matrices; none keeps each.
    kind: Option<Kind>,
}

impl Wanted {
    /// What `fuse` was asked for; none if nothing.
    pub(super) fn of_fuse(args: &FuseArgs) -> Result<Option<Self>> {
        if !args.export_gguf {
            if args.gguf_type.is_some() {
                bail!(Usage(
                    "--gguf-type has a meaning with --export-gguf only: add it or leave this out".into()
                ));
            }
            return Ok(None);
        }
        // The fused directory replaces what stands there; another place is looked at before the work.
        let path = Path::new(&args.save_path).join(&args.gguf_path);
        if path.extension().is_none_or(|end| !end.eq_ignore_ascii_case("gguf")) {
            bail!(Usage(format!(
                "--gguf-path {}: expected a name that ends in .gguf, so that it is none of the model's files",
                args.gguf_path
            )));
        }
        if Path::new(&args.gguf_path).components().count() != 1 {
            check_target(&path, "--gguf-path")?;
        }
        Ok(Some(Self { path, kind: kind(args.gguf_type.as_deref().unwrap_or("f16")) }))
    }
}

/// The type of that name; none for `auto`.
fn kind(name: &str) -> Option<Kind> {
    Kind::from_name(name)
}

/// Refuses a file that is there already, or that cannot be written.
fn check_target(path: &Path, flag: &str) -> Result<()> {
    if path.exists() {
        bail!(Usage(format!("{flag} {} exists already; remove it or name another file", path.display())));
    }
    check_writable(path).with_context(|| format!("{flag} cannot be written"))
}

/// Exports the model, or with --adapter-path the adapter.
pub(crate) fn export_gguf(args: &ExportGgufArgs) -> Result<()> {
    let path = PathBuf::from(&args.out);
    check_target(&path, "--out")?;
    if let Some(adapter) = &args.adapter_path {
        return self::adapter(args, adapter, &path);
    }
    let dir = hub::resolve(&args.model, What::Model)?;
    load::refuse_beside(&dir, &args.model)?;
    let stop = host::stop_flag(|| ui::note("stopping; once more stops at once"));
    let wanted = Wanted { path, kind: kind(&args.kind) };
    if !args.json {
        model(&dir, &args.model, &wanted, &stop)?.iter().for_each(|line| ui::out(line));
        return Ok(());
    }
    let report = write(&dir, &args.model, &wanted, &stop)?;
    let matrix = |m: &Exported| json!({"name": m.source, "from": m.from, "to": m.to.to_string(), "relative_error": m.relative_error});
    let matrices: Vec<Value> = report.matrices.iter().map(matrix).collect();
    let all =
        json!({"schema": 1, "kind": "export", "file": args.out, "bytes": report.bytes, "matrices": matrices});
    ui::out(&serde_json::to_string_pretty(&all)?);
    Ok(())
}

/// What the directory is to llama.cpp; its name is that of the argument without what stands before it.
pub(super) fn described(dir: &Path, argument: &str) -> Result<(Checkpoint, GgufExport)> {
    let checkpoint = Checkpoint::open(dir)?;
    let export = GgufExport::new(&checkpoint, &name(argument))
        .with_context(|| format!("{argument} cannot be written as GGUF"))?;
    Ok((checkpoint, export))
}

fn name(argument: &str) -> String {
    let name = Path::new(argument).file_name().and_then(|name| name.to_str());
    name.unwrap_or(argument).to_owned()
}

/// What the file was made of, in its metadata; other tools pass over it.
fn made_of(base: Option<Origin>, inputs: Vec<Origin>, kind: Option<Kind>) -> Result<(String, Field)> {
    let made_of = Provenance {
        graft: env!("CARGO_PKG_VERSION").into(),
        operation: "export gguf".into(),
        base,
        inputs,
        recipe: json!({"type": kind.map_or("auto".into(), |kind| kind.to_string())}),
        summary: Value::Null,
    };
    Ok((format!("graft.{}", Provenance::KEY), Field::Str(serde_json::to_string(&made_of)?)))
}

fn write(dir: &Path, argument: &str, wanted: &Wanted, stop: &AtomicBool) -> Result<ExportReport> {
    let (checkpoint, mut export) = described(dir, argument)?;
    let origin = Origin::of_model(&checkpoint, argument)?;
    export.parts.fields.push(made_of(None, vec![origin], wanted.kind)?);
    export.warnings.iter().for_each(|text| ui::note(&format!("warning: {text}")));
    let progress = ui::Progress::new(0, "tensors");
    let report =
        write_gguf(&checkpoint, &export.parts, &wanted.path, wanted.kind, stop, &mut |event| match event {
            Event::Tensor { done, total } => progress.of(done as u64, total as u64),
            Event::Warning(text) => progress.line(&format!("warning: {text}")),
        });
    progress.done();
    match report {
        Err(error @ Error::Stopped) => bail!(Interrupted(format!("Interrupted: {error}"))),
        other => Ok(other?),
    }
}

/// Writes a model's file; the lines that say what became of its weights.
pub(super) fn model(dir: &Path, argument: &str, wanted: &Wanted, stop: &AtomicBool) -> Result<Vec<String>> {
    let report = write(dir, argument, wanted, stop)?;
    let mut groups: BTreeMap<(&str, String), Vec<&Exported>> = BTreeMap::new();
    for matrix in &report.matrices {
        groups.entry((&matrix.from, matrix.to.to_string())).or_default().push(matrix);
    }
    let mut lines = vec![format!("Saved {} ({}).", wanted.path.display(), ui::bytes(report.bytes))];
    for ((from, to), matrices) in groups {
        let rounded: Vec<&&Exported> = matrices.iter().filter(|m| m.relative_error > 0.0).collect();
        let worst = rounded.iter().max_by(|a, b| a.relative_error.total_cmp(&b.relative_error));
        let cost = worst.map_or("exactly".to_owned(), |worst| {
            let (count, percent) = (rounded.len(), 100.0 * worst.relative_error);
            format!("{count} of them rounded, by up to {percent:.2} % ({})", worst.source)
        });
        lines.push(format!("  {} of {from} -> {to}, {cost}", matrices.len()));
    }
    Ok(lines)
}

fn adapter(args: &ExportGgufArgs, adapter: &str, path: &Path) -> Result<()> {
    if args.kind != "auto" && args.kind != "f32" {
        bail!(Usage(format!(
            "--type {}: an adapter is written as f32, as it was trained; leave it out",
            args.kind
        )));
    }
    let checkpoint = Checkpoint::open(&hub::resolve(&args.model, What::Model)?)?;
    let dir = hub::resolve(adapter, What::Adapter)?;
    let set = AdapterSet::load(&dir)?;
    let base = Fingerprint::of(&checkpoint, &args.model);
    load::check_base(Fingerprint::read(&set.config), &dir, &base)?;
    let mut written = GgufAdapter::new(&checkpoint, &set, &dir, &name(adapter))?;
    let base = Origin::of_model(&checkpoint, &args.model)?;
    written.fields.push(made_of(Some(base), vec![Origin::of_adapter(&dir, adapter)?], Some(Kind::F32))?);
    let bytes = written.write(path)?;
    if args.json {
        let all = json!({"schema": 1, "kind": "export", "file": args.out, "bytes": bytes, "modules": written.modules(),
            "alpha": f64::from(written.alpha), "folded": written.folded});
        ui::out(&serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    ui::out(&format!("Saved {} ({}).", path.display(), ui::bytes(bytes)));
    let folded = if written.folded > 0 {
        format!(", and {} whose scale is partly in B", written.folded)
    } else {
        String::new()
    };
    ui::out(&format!("  LoRA of {} modules, alpha {}{folded}", written.modules(), written.alpha));
    Ok(())
}
