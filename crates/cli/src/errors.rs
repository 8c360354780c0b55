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

/// 1, 2 or 130.
pub(crate) fn status(error: &Error) -> u8 {
    if error.is::<Usage>() {
        2
    } else if error.is::<Interrupted>() {
        130
    } else {
        1
    }
}

/// The chain of causes in one line; a cause that its parent already repeats is left out.
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
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeated_cause_is_said_once() {
        let error = Error::msg("no such file").context("a.json: no such file").context("cannot load x");
        assert_eq!(line(&error), "cannot load x: a.json: no such file");
        assert_eq!(status(&error), 1);
        assert_eq!(status(&Usage("x".into()).into()), 2);
    }
}
