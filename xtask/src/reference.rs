//! `cargo xtask golden` and `cargo xtask conformance`: what mlx-lm, PEFT and llama.cpp compute, written down or compared live.
//!
//! The Python side lives in xtask/reference; mlx-lm and its MLX are pinned, because a golden value is one of a version.

use std::process::Command;

use anyhow::{Context, Result};

use crate::{cache, model, peers, setup, sh};

pub(crate) const MLX_LM: &str = "0.32.2";
pub(crate) const MLX: &str = "0.32.4";
pub(crate) const TRANSFORMERS: &str = "5.24.0";

/// Writes the golden files of the tests anew.
pub(crate) fn golden(args: &[String]) -> Result<()> {
    sh::no_arguments("golden", args)?;
    setup::run()?;
    let root = sh::root();
    let cases = sh::fresh(sh::target()?.join("golden-cases"))?;
    sh::run(
        Command::new(sh::build(&["--workspace", "--example", "tiny"])?.join("examples/tiny")).arg(&cases),
    )?;
    let mut values = python()?;
    values.arg(root.join("xtask/reference/golden.py")).arg(&cases);
    values.arg(root.join("crates/model/tests/golden/logits.json"));
    sh::run(values.arg(root.join("crates/train/tests/golden/losses.json")))?;
    sh::run(python()?.arg(root.join("crates/model/tests/data/text.py")))
}

/// Compares graft with mlx-lm and llama.cpp on the demo's base, and with PEFT on a small model; arguments (`--only NAME ...`) go to the
/// script of mlx-lm, but for `peft`, which is a script of its own as the two share no environment.
pub(crate) fn conformance(args: &[String]) -> Result<()> {
    setup::run()?;
    let graft = sh::graft()?;
    let examples =
        sh::build(&["--workspace", "--example", "logits", "--example", "proxies", "--example", "tiny"])?
            .join("examples");
    let (peft, others): (Vec<&String>, Vec<&String>) = args.iter().partition(|name| *name == "peft");
    if args.is_empty() || !peft.is_empty() {
        let mut script = peers::peft()?;
        script.arg(sh::root().join("xtask/reference/peft_check.py")).arg("--graft").arg(&graft);
        script.arg("--logits").arg(examples.join("logits")).arg("--work");
        sh::run(script.arg(sh::target()?.join("conformance-peft")))?;
    }
    if !peft.is_empty() && others.iter().all(|name| *name == "--only") {
        return Ok(());
    }
    let mut script = python()?;
    script.arg(sh::root().join("xtask/reference/conformance.py"));
    script.arg("--graft").arg(&graft).arg("--logits").arg(examples.join("logits"));
    script.arg("--proxies").arg(examples.join("proxies")).arg("--tiny").arg(examples.join("tiny"));
    if args.is_empty() || args.iter().any(|arg| arg.starts_with("gguf")) {
        script.arg("--llama").arg(peers::llama()?);
    }
    script.arg("--model").arg(model::dir(&graft)?).arg("--work").arg(sh::target()?.join("conformance"));
    sh::run(script.args(others))
}

/// A Python with mlx-lm, in a virtual environment of its own in the cache.
pub(crate) fn python() -> Result<Command> {
    // The extra exists on Linux only; a Mac's package runs on the CPU as it is.
    let extra = if cfg!(target_os = "macos") { "" } else { "[cpu]" };
    environment(
        &format!("mlx-lm-{MLX_LM}-mlx-{MLX}"),
        &[
            &format!("mlx-lm=={MLX_LM}"),
            &format!("mlx{extra}=={MLX}"),
            &format!("transformers=={TRANSFORMERS}"),
        ],
    )
}

/// A Python with the packages, in the virtual environment `name` of the cache.
pub(crate) fn environment(name: &str, packages: &[&str]) -> Result<Command> {
    let environment = cache::dir(name, |temporary| {
        eprintln!("installing {} from PyPI", packages.join(", "));
        sh::output(Command::new(cache::python()?).args(["-m", "venv"]).arg(temporary)).context(
            "cannot make a virtual environment: install it with `sudo apt-get install python3-venv` (Debian, Ubuntu)",
        )?;
        let mut install = Command::new(temporary.join("bin/python"));
        sh::run(install.args(["-m", "pip", "install", "--quiet"]).args(packages))
    })?;
    // The environment was filled under another name: its interpreter works all the same, its scripts would not.
    let mut python = Command::new(environment.join("bin/python"));
    python.env("HF_HUB_OFFLINE", "1");
    Ok(python)
}
