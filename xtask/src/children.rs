//! Programs and folders that must not outlive us, whether a task ends well, fails or is interrupted.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, ExitStatus};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::sh;

struct Ours {
    children: Vec<Child>,
    folders: Vec<PathBuf>,
}

static OURS: Mutex<Ours> = Mutex::new(Ours { children: Vec::new(), folders: Vec::new() });

fn ours() -> MutexGuard<'static, Ours> {
    OURS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From here on an interrupt or termination signal ends what is ours, then us with status 130.
pub(crate) fn end_at_signals() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot watch for signals")?;
    std::thread::spawn(move || {
        if signals.forever().next().is_none() {
            return;
        }
        // The lock is kept to the end: nothing new starts meanwhile.
        let mut ours = ours();
        for child in &mut ours.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        for folder in &ours.folders {
            let _ = fs::remove_dir_all(folder);
        }
        std::process::exit(130);
    });
    Ok(())
}

/// A program that runs; it is ended when this is dropped.
pub(crate) struct Process {
    id: u32,
    line: String,
    peak: AtomicU64,
}

impl Process {
    /// Starts it; its stdout comes back where `command` asks for a pipe.
    pub(crate) fn start(command: &mut Command) -> Result<(Self, Option<ChildStdout>)> {
        let line = sh::line(command);
        let mut ours = ours();
        let mut child = command.spawn().with_context(|| format!("cannot start {line}"))?;
        let stdout = child.stdout.take();
        let process = Self { id: child.id(), line, peak: AtomicU64::new(0) };
        ours.children.push(child);
        Ok((process, stdout))
    }

    /// Waits for its end. It is looked at now and then, because who waits in it would keep a signal from ending it.
    pub(crate) fn wait(&self) -> Result<ExitStatus> {
        loop {
            self.peak_memory();
            let mut ours = ours();
            let child = ours.children.iter_mut().find(|child| child.id() == self.id);
            let child = child.with_context(|| format!("{} has gone", self.line))?;
            if let Some(status) = child.try_wait()? {
                return Ok(status);
            }
            drop(ours);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Its peak resident memory in bytes, as last seen while it ran; 0 where the system does not say (only Linux does).
    pub(crate) fn peak_memory(&self) -> u64 {
        let now = self.fact("VmHWM:") * 1024;
        self.peak.fetch_max(now, Ordering::Relaxed).max(now)
    }

    /// Its resident memory in bytes at present; 0 as above.
    pub(crate) fn memory(&self) -> u64 {
        self.fact("VmRSS:") * 1024
    }

    /// Its threads; 0 as above.
    pub(crate) fn threads(&self) -> u64 {
        self.fact("Threads:")
    }

    /// Its open files; 0 as above.
    pub(crate) fn files(&self) -> u64 {
        fs::read_dir(format!("/proc/{}/fd", self.id)).map_or(0, |files| files.count() as u64)
    }

    /// Processor time of its threads in seconds, by name; nothing as above.
    pub(crate) fn cpu_seconds(&self) -> BTreeMap<String, f64> {
        let mut seconds = BTreeMap::new();
        for task in fs::read_dir(format!("/proc/{}/task", self.id)).into_iter().flatten().flatten() {
            let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            // `1 (name) S ...`: user and system time are the fields 14 and 15, in hundredths.
            let Some((name, rest)) = stat.split_once('(').and_then(|(_, rest)| rest.rsplit_once(") ")) else {
                continue;
            };
            let ticks = rest.split(' ').skip(11).take(2).filter_map(|field| field.parse::<f64>().ok());
            *seconds.entry(name.to_owned()).or_default() += ticks.sum::<f64>() / 100.0;
        }
        seconds
    }

    /// A number of /proc/ID/status.
    fn fact(&self, name: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id)).unwrap_or_default();
        let field = status.lines().find_map(|line| line.strip_prefix(name));
        field.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let mut ours = ours();
        if let Some(at) = ours.children.iter().position(|child| child.id() == self.id) {
            let mut child = ours.children.swap_remove(at);
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A new temporary folder, removed when this is dropped.
pub(crate) struct Temporary(pub(crate) PathBuf);

impl Temporary {
    pub(crate) fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("graft-{}", std::process::id()));
        let mut ours = ours();
        fs::create_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
        ours.folders.push(path.clone());
        Ok(Self(path))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
