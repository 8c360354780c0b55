//! `cargo xtask setup`: leaves a tree in which plain `cargo build`, `cargo test` and rust-analyzer work.
//!
//! mlx-sys declares `links = "mlx"`, and Cargo lets a configuration file answer for the build script of such a package.
//! `.cargo/config.toml` includes `.cargo/native.toml` if it is there; this writes it.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::native::{self, Native};
use crate::sh;

pub(crate) fn task(args: &[String]) -> Result<()> {
    sh::no_arguments("setup", args)?;
    run()
}

/// Brings the machine to where the workspace builds; a second call finds everything done.
pub(crate) fn run() -> Result<()> {
    if cfg!(target_os = "macos") {
        return check_mac();
    }
    let triple = host()?;
    if !matches!(triple.as_str(), "x86_64-unknown-linux-gnu" | "aarch64-unknown-linux-gnu") {
        bail!("MLX has no package for {triple}: use macOS, or Linux with glibc on x86_64 or aarch64");
    }
    let native = native::get()?;
    let path = sh::root().join(".cargo/native.toml");
    let text = config(&triple, &native)?;
    if fs::read_to_string(&path).is_ok_and(|found| found == text) {
        return Ok(());
    }
    let temporary = path.with_extension(format!("toml.{}", std::process::id()));
    fs::write(&temporary, text).with_context(|| format!("cannot write {}", temporary.display()))?;
    fs::rename(&temporary, &path).with_context(|| format!("cannot write {}", path.display()))?;
    eprintln!("MLX {} is set up: .cargo/native.toml written", native::MLX.version);
    Ok(())
}

/// The triple that cargo builds for here.
fn host() -> Result<String> {
    let text = sh::output(Command::new("rustc").arg("-vV").current_dir(sh::root()))?;
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc -vV names no host")?.to_owned())
}

/// What mlx-sys' build script would have printed, metadata included: dependents read `DEP_MLX_INCLUDE` (a path list,
/// as upstream) and `DEP_MLX_VERSION`.
fn config(triple: &str, native: &Native) -> Result<String> {
    let text = |path: &Path| path.to_str().map(str::to_owned).context("the cache's path is not UTF-8");
    let lib = text(&native.lib)?;
    let include = std::env::join_paths(&native.include).context("the cache's path holds a colon")?;
    let include = include.into_string().ok().context("the cache's path is not UTF-8")?;
    Ok(format!(
        "# Written by `cargo xtask setup`.\n\
         [target.{triple}.mlx]\n\
         rustc-link-search = [{search:?}]\n\
         rustc-link-lib = [\"static=mlxc\", \"dylib=mlx\", \"dylib=stdc++\"]\n\
         include = {include:?}\n\
         version = {version:?}\n\n\
         [target.{triple}.mlx.rustc-env]\n\
         OUT_DIR = {lib:?}\n",
        search = format!("native={lib}"),
        version = native::MLX.version,
    ))
}

/// macOS builds MLX from source through mlx-sys' own build script; only its tools are looked for.
fn check_mac() -> Result<()> {
    if !sh::works(Command::new("cmake").arg("--version")) {
        bail!("CMake is missing, and mlx-sys builds MLX with it: install it with `brew install cmake`");
    }
    if !sh::works(Command::new("xcrun").args(["-sdk", "macosx", "metal", "--version"])) {
        bail!(
            "the Metal compiler is missing: install Xcode from the App Store, then run \
             `sudo xcode-select -s /Applications/Xcode.app` and `xcodebuild -downloadComponent MetalToolchain`"
        );
    }
    Ok(())
}
