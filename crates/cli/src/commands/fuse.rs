//! `graft fuse`: an adapter into its base, for good, and how much of it arrived there.

use super::export;
use crate::args::FuseArgs;
use crate::errors::{Interrupted, Usage};
use crate::hub::{self, What};
use crate::{host, report, ui};
use anyhow::{Context, Result, bail};
use graft_adapters::AdapterSet;
use graft_merge::{Error, Event, FuseOptions, FuseReport, Policy, REPORT_FILE};
use std::collections::BTreeMap;
use std::path::Path;

/// Fuses, then says what became of the weights and of the update.
pub(crate) fn fuse(args: &FuseArgs) -> Result<()> {
    let named = args.policy.as_deref().and_then(Policy::from_name);
    if args.dequantize && named.is_some_and(|policy| policy != Policy::Dense) {
        bail!(Usage("--dequantize makes the whole model dense: leave out --policy".into()));
    }
    let gguf = export::Wanted::of_fuse(args)?;
    report::check(&args.html.iter().map(|file| ("--html", file)).collect::<Vec<_>>())?;
    let model = hub::resolve(&args.model, What::Model)?;
    if gguf.is_some() {
        // What stands in the way of the export is found out before the work.
        export::described(&model, &args.model)?;
    }
    let adapter = AdapterSet::load(&hub::resolve(&args.adapter_path, What::Adapter)?)?;
    let options = FuseOptions {
        policy: named.unwrap_or(Policy::Raise),
        dequantize: args.dequantize,
        // As mlx_lm does; a directory that is no model's is refused all the same.
        overwrite: true,
        base_name: args.model.clone(),
        adapter_name: args.adapter_path.clone(),
    };
    let out = Path::new(&args.save_path);
    let stop = host::stop_flag(|| ui::note("stopping; once more stops at once"));
    let progress = ui::Progress::new(0, "tensors");
    let result = graft_merge::fuse(&model, &adapter, out, &options, &stop, &mut |event| match event {
        Event::Tensor { done, total } => progress.of(done as u64, total as u64),
        Event::Warning(text) => progress.line(&format!("warning: {text}")),
    });
    progress.done();
    match result {
        Ok(report) => {
            say(&report, out);
            if let Some(file) = &args.html {
                report::write(file, &report::fuse(&serde_json::to_value(&report)?))?;
            }
            if let Some(wanted) = gguf {
                let said = export::model(out, &args.model, &wanted, &stop)?;
                said.iter().for_each(|line| ui::out(line));
            }
        }
        Err(error @ Error::Stopped) => bail!(Interrupted(format!("Interrupted: {error}"))),
        Err(error) => {
            let (adapter, base) = (&args.adapter_path, &args.model);
            return Err(error).with_context(|| format!("cannot fuse {adapter} into {base}"));
        }
    }
    Ok(())
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
    if totals.unchanged > 0 {
        ui::out(&format!("  {} that the adapter leaves as they are", totals.unchanged));
    }
    ui::out(&format!("Size: {} -> {}", ui::bytes(totals.base_bytes), ui::bytes(totals.bytes)));
    if let Some(worst) = &totals.worst {
        let (kept, error) = (100.0 * totals.survival, 100.0 * totals.relative_error);
        ui::out(&format!("Update: {kept:.1} % of it kept, with an error of {error:.2} % (most in {worst})"));
    }
    ui::out(&format!("Saved the model and its {REPORT_FILE} to {}.", out.display()));
}
