//! `graft convert` and `graft quantize`: a model directory or a GGUF file to a model directory.

use super::load;
use crate::args::ConvertArgs;
use crate::errors::{Interrupted, Usage};
use crate::{host, hub, ui};
use anyhow::{Context, Result, bail};
use graft_model::GgufImport;
use graft_quant::convert::{ConvertOptions, Event, GgufParts, Packing, Report, convert_gguf};
use graft_quant::{Checkpoint, Error, Grid, Mode, Recipe, gguf::Gguf};
use std::path::{Path, PathBuf};

/// Converts, then says what the result holds. `quantize` is `-q` or the command's name.
pub(crate) fn convert(args: &ConvertArgs, quantize: bool) -> Result<()> {
    let Some(source) = &args.hf_path else {
        bail!(Usage(
            "--hf-path (or --model) is required: a model directory, a Hugging Face id or a .gguf file".into()
        ));
    };
    let options = options(args, quantize)?;
    let target = Path::new(&args.mlx_path);
    if target.exists() {
        bail!(Usage(format!(
            "--mlx-path {} exists already; remove it or name another directory",
            args.mlx_path
        )));
    }
    let stop = host::stop_flag(|| ui::note("stopping; once more stops at once"));
    let progress = ui::Progress::new(0, "tensors");
    let mut on_event = |event: Event| match event {
        Event::Tensor { done, total } => progress.of(done as u64, total as u64),
        Event::Warning(text) => progress.line(&format!("warning: {text}")),
    };
    let report = match gguf_file(source)? {
        Some(file) => {
            let gguf = Gguf::open(&file)?;
            let GgufImport { config, files, names } = GgufImport::new(&gguf)?;
            let parts = GgufParts { config, files, names: &|tensor| names.get(tensor).cloned() };
            convert_gguf(&gguf, &parts, target, &options, &stop, &mut on_event)
        }
        None => {
            let dir = hub::resolve(source, hub::What::Model)?;
            load::refuse_beside(&dir, source)?;
            if quantize {
                // Packing what graft cannot run would show only when the result is used.
                load::config_of(&Checkpoint::open(&dir)?)?;
            }
            graft_quant::convert::convert(&dir, target, &options, &stop, &mut on_event)
        }
    };
    progress.done();
    match report {
        Ok(report) => say(&report, &args.mlx_path),
        Err(error @ Error::Stopped) => bail!(Interrupted(format!("Interrupted: {error}"))),
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

fn say(report: &Report, target: &str) {
    if report.packed > 0 {
        ui::note(&format!(
            "packed {} modules, {:.3} bits per weight",
            report.packed,
            report.bits_per_weight()
        ));
    }
    if report.dequantized > 0 {
        ui::note(&format!("made {} modules dense", report.dequantized));
    }
    ui::out(&format!("{target}: {} parameters, {}", report.parameters, ui::bytes(report.bytes)));
}

fn options(args: &ConvertArgs, quantize: bool) -> Result<ConvertOptions> {
    if quantize && args.dequantize {
        bail!(Usage("--quantize and --dequantize exclude each other; choose one".into()));
    }
    let flags = [
        ("--q-mode", args.q_mode != Mode::Affine.name()),
        ("--q-bits", args.q_bits.is_some()),
        ("--q-group-size", args.q_group_size.is_some()),
        ("--quant-predicate", args.quant_predicate.is_some()),
    ];
    if let Some((flag, _)) = flags.iter().find(|(_, given)| *given && !quantize) {
        ui::note(&format!("note: {flag} has no effect without -q"));
    }
    let mode = Mode::from_name(&args.q_mode).unwrap_or(Mode::Affine);
    let packed = || packing(mode, args.q_bits, args.q_group_size, args.quant_predicate.as_deref());
    Ok(ConvertOptions {
        pack: quantize.then(packed).transpose()?,
        dequantize: args.dequantize,
        dtype: args.dtype.as_deref().and_then(graft_quant::convert::dtype_from_name),
    })
}

/// How `--q-mode`, `--q-bits`, `--q-group-size` and `--quant-predicate` pack; what is not given is the mode's own.
pub(super) fn packing(
    mode: Mode,
    bits: Option<i32>,
    group_size: Option<i32>,
    recipe: Option<&str>,
) -> Result<Packing> {
    let usual = Grid::of(mode);
    let grid =
        Grid { bits: bits.unwrap_or(usual.bits), group_size: group_size.unwrap_or(usual.group_size), mode };
    if let Err(error) = grid.check() {
        bail!(Usage(format!("--q-bits {}, --q-group-size {}: {error}", grid.bits, grid.group_size)));
    }
    if let Some(recipe) = recipe.filter(|_| grid.is_float()) {
        bail!(Usage(format!(
            "--quant-predicate {recipe} mixes affine widths, and --q-mode {} has one: leave either out",
            mode.name()
        )));
    }
    Ok(Packing { grid, recipe: recipe.and_then(Recipe::from_name) })
}

/// The GGUF file that the argument is or, as the only one and without safetensors beside it, holds.
fn gguf_file(source: &str) -> Result<Option<PathBuf>> {
    let path = Path::new(source);
    let is = |p: &Path, form: &str| p.extension().is_some_and(|e| e.eq_ignore_ascii_case(form));
    if path.is_file() {
        // Some stores keep models under names without an extension; what the file is, its first bytes say.
        return Ok(Some(path.to_path_buf()));
    }
    if !path.exists() && is(path, "gguf") {
        bail!("there is no file {source}; give a .gguf file, a model directory or a Hugging Face id");
    }
    if !path.is_dir() {
        return Ok(None);
    }
    let all = std::fs::read_dir(path).with_context(|| format!("cannot read {source}"))?;
    let all: Vec<PathBuf> = all.flatten().map(|entry| entry.path()).collect();
    if all.iter().any(|p| is(p, "safetensors")) {
        return Ok(None);
    }
    let mut files: Vec<PathBuf> = all.into_iter().filter(|p| is(p, "gguf") && p.is_file()).collect();
    match files.len() {
        0 | 1 => Ok(files.pop()),
        n => bail!(Usage(format!("{source} holds {n} .gguf files; name one of them"))),
    }
}
