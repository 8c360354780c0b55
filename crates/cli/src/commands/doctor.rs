//! `graft doctor`: what this machine will run on.

use crate::args::DoctorArgs;
use crate::{host, ui};
use anyhow::Result;
use graft_ops::Form;
use serde_json::json;

/// Prints the backend, the CPU features in use, the BLAS under MLX with its measured speed, memory and cores.
pub(crate) fn doctor(args: &DoctorArgs) -> Result<()> {
    let info = graft_ops::info::info();
    let blas = graft_ops::info::blas_test()?;
    let (total, free) = host::memory();
    let form = match info.form {
        Form::Cpu => "graft's CPU operations",
        Form::Mlx => "plain MLX operations",
    };
    if args.json {
        let report = json!({
            "graft": env!("CARGO_PKG_VERSION"), "mlx": info.mlx_version, "form": form,
            "cpu_operations": info.cpu_operations, "cpu_features": info.cpu_features, "threads": info.threads,
            "cores": host::cores(), "blas_gflops": blas.gflops, "blas_origin": blas.origin,
            "memory_bytes": total, "memory_available_bytes": free,
        });
        ui::out(&serde_json::to_string_pretty(&report)?);
        return Ok(());
    }
    let size = |n: Option<u64>| n.map_or_else(|| "unknown".into(), ui::bytes);
    let features = if info.cpu_features.is_empty() { "none".into() } else { info.cpu_features.join(" ") };
    let rows = [
        ("graft", env!("CARGO_PKG_VERSION").to_string()),
        ("MLX", info.mlx_version),
        (
            "operations",
            format!(
                "{form} (our CPU operations compiled in: {})",
                if info.cpu_operations { "yes" } else { "no" }
            ),
        ),
        ("CPU features", features),
        ("cores, threads", format!("{}, {}", host::cores(), info.threads)),
        ("BLAS under MLX", format!("{:.1} GFLOP/s", blas.gflops)),
        ("BLAS from", blas.origin.unwrap_or_else(|| "unknown".into())),
        ("memory", format!("{} ({} available)", size(total), size(free))),
    ];
    for (name, value) in rows {
        ui::out(&format!("{name:<16}{value}"));
    }
    Ok(())
}
