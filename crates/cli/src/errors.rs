//! How a command fails: which exit status an error has, and its one line.

use anyhow::Error;
use std::fmt;

/// The command line or a settings file is wrong: exit 2.
#[derive(Debug)]
pub(crate) struct Usage(pub(crate) String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl std::error::Error for Usage {}

/// The user stopped the run, which has saved what it has: exit 130. Empty when all has been said.
#[derive(Debug)]
pub(crate) struct Interrupted(pub(crate) String);

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl std::error::Error for Interrupted {}

/// The status of a run whose loss stopped being a number: `graft compare --find-lr` tells it from other failures.
pub(crate) const NOT_FINITE: u8 = 3;

/// 1, 2, 3 or 130.
pub(crate) fn status(error: &Error) -> u8 {
    let sampling = matches!(error.downcast_ref(), Some(graft_model::Error::Sampling { .. }));
    let setting = matches!(error.downcast_ref(), Some(graft_train::Error::Setting { .. }));
    if error.is::<Usage>() || sampling || setting {
        2
    } else if matches!(error.downcast_ref(), Some(graft_train::Error::NonFinite { .. })) {
        NOT_FINITE
    } else if error.is::<Interrupted>() {
        130
    } else {
        1
    }
}

/// Problems of a list that one message names; the rest are counted.
const LISTED: usize = 6;

/// The chain of causes in one line; a cause that its parent already repeats is left out, a long list is cut.
pub(crate) fn line(error: &Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.contains(&cause) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&cause);
    }
    let mut lines = text.lines().map(str::trim).filter(|l| !l.is_empty());
    let mut line = lines.next().unwrap_or_default().to_string();
    let problems: Vec<&str> = lines.collect();
    for (i, problem) in problems.iter().take(LISTED).enumerate() {
        line.push_str(if i == 0 { " " } else { "; " });
        line.push_str(problem);
    }
    if problems.len() > LISTED {
        line.push_str(&format!("; and {} more", problems.len() - LISTED));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeated_cause_is_said_once() {
        let error = Error::msg("no such file").context("a.json: no such file").context("cannot load x");
        assert_eq!(line(&error), "cannot load x: a.json: no such file");
        assert_eq!(
            line(&Error::msg("a:\n  1\n  2\n  3\n  4\n  5\n  6\n  7")),
            "a: 1; 2; 3; 4; 5; 6; and 1 more"
        );
        assert_eq!(status(&error), 1);
        assert_eq!(status(&Usage("x".into()).into()), 2);
    }
}
