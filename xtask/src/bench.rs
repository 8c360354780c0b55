//! `cargo xtask bench [filter]`: every criterion benchmark of the workspace, in the profile that demo and test build.

use anyhow::Result;

use crate::{setup, sh};

/// Arguments go to criterion.
pub(crate) fn task(args: &[String]) -> Result<()> {
    setup::run()?;
    let benches = ["bench", "--profile", "dev", "--workspace", "--bench", "*", "--"];
    sh::run(sh::cargo().args(benches).args(args))
}
