//! `cargo xtask test [args]`: all tests, then those of the array crates with plain MLX operations and with fewer of the
//! processor's instructions.
//!
//! Its last line is `N passed, N failed`, over everything that ran.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::children::Process;
use crate::{setup, sh};

/// Crates whose tests mean something else when `GRAFT_OPS=mlx` replaces our CPU operations, which is what a GPU runs;
/// and cli, with which cargo chooses the features of the whole workspace and compiles no dependency anew.
const ARRAYS: [&str; 4] = ["graft-adapters", "graft-model", "graft-train", "graft-cli"];

/// Crates whose tests reach our CPU operations, and cli as above.
const KERNELS: [&str; 5] = ["graft-ops", "graft-adapters", "graft-model", "graft-train", "graft-cli"];

/// What the tests run with again: a variable, its value, whose tests, and whether this machine has a use for it.
const AGAIN: [(&str, &str, &[&str], bool); 3] = [
    ("GRAFT_OPS", "mlx", &ARRAYS, true),
    ("GRAFT_CPU", "avx2", &KERNELS, cfg!(all(target_os = "linux", target_arch = "x86_64"))),
    ("GRAFT_CPU", "portable", &KERNELS, cfg!(target_os = "linux")),
];

/// Arguments go to `cargo test`; with `-p` among them only that runs, once.
pub(crate) fn task(args: &[String]) -> Result<()> {
    setup::run()?;
    let chosen = args.iter().any(|arg| arg.starts_with("-p") || arg.starts_with("--package"));
    let mut counts = Counts::default();
    if chosen {
        counts.run(sh::cargo().args(["test", "--no-fail-fast"]).args(args))?;
    } else {
        counts.run(sh::cargo().args(["test", "--no-fail-fast", "--workspace"]).args(args))?;
        for (variable, value, crates, _) in AGAIN.iter().filter(|again| again.3) {
            eprintln!("\nagain with {variable}={value}");
            let mut again = sh::cargo();
            again.args(["test", "--no-fail-fast"]).env(variable, value);
            again.args(crates.iter().flat_map(|name| ["--package", name])).args(args);
            counts.run(&mut again)?;
        }
    }
    println!("{} passed, {} failed", counts.passed, counts.failed);
    if counts.failed > 0 {
        bail!("{} tests failed", counts.failed);
    }
    Ok(())
}

#[derive(Default)]
struct Counts {
    passed: u64,
    failed: u64,
}

impl Counts {
    /// Runs `cargo test`, shows its output and adds what its programs report.
    fn run(&mut self, command: &mut Command) -> Result<()> {
        let failed = self.failed;
        let (cargo, output) = Process::start(command.stdout(Stdio::piped()))?;
        for line in BufReader::new(output.context("cargo test has no output")?).lines() {
            let line = line?;
            println!("{line}");
            self.add(&line);
        }
        let status = cargo.wait()?;
        // A test that fails is counted; what ends cargo without one (a build that fails, a crash) is an error.
        if !status.success() && self.failed == failed {
            bail!("cargo test failed with {status} and not because of a test");
        }
        Ok(())
    }

    /// `test result: ok. 12 passed; 0 failed; ...`
    fn add(&mut self, line: &str) {
        let Some((_, result)) = line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". "))
        else {
            return;
        };
        for part in result.split("; ") {
            match part.split_once(' ').map(|(count, what)| (count.parse::<u64>(), what)) {
                Some((Ok(count), "passed")) => self.passed += count,
                Some((Ok(count), "failed")) => self.failed += count,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Counts;

    #[test]
    fn results_add_up() {
        let mut counts = Counts::default();
        counts.add(
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.1s",
        );
        counts.add("test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out");
        counts.add("test forest ... ok");
        assert_eq!((counts.passed, counts.failed), (15, 2));
    }
}
