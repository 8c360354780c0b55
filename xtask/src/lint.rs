//! `cargo xtask lint`: format, clippy, docs and the house rules; what it accepts, the CI accepts.

use std::process::Command;

use anyhow::Result;

use crate::{setup, sh};

/// Makes the build script of ops leave our CPU operations out, as on macOS.
const NO_CPU_OPS: &str = "GRAFT_NO_CPU_OPS";

pub(crate) fn task(args: &[String]) -> Result<()> {
    sh::no_arguments("lint", args)?;
    step("format", sh::cargo().args(["fmt", "--all", "--check"]))?;
    setup::run()?;
    step("clippy", clippy().env_remove(NO_CPU_OPS).args(["--", "-D", "warnings"]))?;
    // Nobody here has a Mac: this is what of its build can be checked. A directory of its own, so that two kinds of
    // build do not undo each other's work every time.
    let directory = sh::target()?.join("no-cpu-ops");
    let mut without = clippy();
    without.env(NO_CPU_OPS, "1").arg("--target-dir").arg(directory);
    step("clippy without our CPU operations", without.args(["--", "-D", "warnings"]))?;
    let docs = ["doc", "--quiet", "--workspace", "--no-deps", "--document-private-items"];
    step("docs", sh::cargo().args(docs).env("RUSTDOCFLAGS", "-D warnings"))?;
    step("house rules", sh::cargo().args(["test", "--quiet", "--package", "xtask"]))
}

/// Warnings become errors behind `--`: in RUSTFLAGS they would have everything compiled once more.
fn clippy() -> Command {
    let mut command = sh::cargo();
    command.args(["clippy", "--quiet", "--workspace", "--all-targets"]);
    command
}

fn step(name: &str, command: &mut Command) -> Result<()> {
    eprintln!("lint: {name}");
    sh::run(command)
}
