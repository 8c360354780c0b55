//! Running other programs: one sentence when one is missing, its own output when it fails.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::children::Process;

/// The workspace root.
pub(crate) fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// `cargo`, as the one that runs us, in the workspace root.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    // `cargo run` tells us who we are, and build scripts that look at it (ring's) would run again after a plain `cargo
    // build`, with all that depends on them.
    for (name, _) in std::env::vars_os() {
        if name
            .to_str()
            .is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_"))
        {
            command.env_remove(name);
        }
    }
    command
}

/// Where cargo puts what it builds.
pub(crate) fn target() -> Result<PathBuf> {
    let target = metadata()?["target_directory"].as_str().map(PathBuf::from);
    target.context("cargo metadata names no target directory")
}

/// Builds what `args` names in the profile that demo, test and bench share, and returns the directory of programs.
/// Examples go with `--workspace`: alone they would choose other features, and have dependencies compiled anew.
pub(crate) fn build(args: &[&str]) -> Result<PathBuf> {
    run(cargo().arg("build").args(args))?;
    Ok(target()?.join("debug"))
}

/// Builds graft and returns the program.
pub(crate) fn graft() -> Result<PathBuf> {
    Ok(build(&["--package", "graft-cli"])?.join("graft"))
}

/// The path, with nothing there.
pub(crate) fn fresh(path: PathBuf) -> Result<PathBuf> {
    if path.exists() {
        fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(path)
}

/// Runs to the end with this terminal's output.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = Process::start(command)?.0.wait()?;
    if !status.success() {
        bail!("{} failed with {status}", line(command));
    }
    Ok(())
}

/// Runs to the end and returns what it wrote to stdout; what it wrote to stderr is part of the error.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let out = command.stdin(Stdio::null()).output();
    let out = out.with_context(|| format!("cannot start {}", line(command)))?;
    if !out.status.success() {
        bail!(
            "{} failed with {}\n{}",
            line(command),
            out.status,
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Whether the program starts and succeeds at all.
pub(crate) fn works(command: &mut Command) -> bool {
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}

/// `cargo metadata` of the workspace.
pub(crate) fn metadata() -> Result<Value> {
    let text = output(cargo().args(["metadata", "--format-version", "1"]))?;
    serde_json::from_str(&text).context("cargo metadata printed something that is not JSON")
}

/// Refuses arguments of a task that takes none.
pub(crate) fn no_arguments(task: &str, args: &[String]) -> Result<()> {
    match args.first() {
        Some(arg) => bail!("{task} takes no arguments, found {arg}"),
        None => Ok(()),
    }
}

/// The command as it would be typed.
pub(crate) fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}
