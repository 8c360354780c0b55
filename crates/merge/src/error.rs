//! What can stand in the way of a fuse: one enum, each message names the file, tensor or module and what to do.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An adapter that cannot be fused into a base.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The adapter belongs to another base.
    #[error("{model}: the adapter does not belong to this base: {why}")]
    Foreign {
        /// The base that was given.
        model: PathBuf,
        /// What differs.
        why: String,
    },
    /// Weights are missing or misshapen: all of them, one a line.
    #[error("{model}: the adapter does not fit:\n  {}", problems.join("\n  "))]
    Mismatch {
        /// The base that was given.
        model: PathBuf,
        /// One sentence each.
        problems: Vec<String>,
    },
    /// The target is one of the inputs.
    #[error("{path} is the {what} itself, which the fused model would replace; choose another path")]
    IntoInput {
        /// The target.
        path: PathBuf,
        /// `base` or `adapter`.
        what: &'static str,
    },
    /// The fuse was asked to stop.
    #[error("stopped before the fused model was complete; nothing was written")]
    Stopped,
    /// A fused weight is not finite.
    #[error(
        "{path}: the fused weight holds values that are not finite; check the adapter and its scale ({scale})"
    )]
    NotFinite {
        /// The module.
        path: String,
        /// s of the adapter.
        scale: f32,
    },
    /// A merged or cut update is not finite.
    #[error(
        "{path}: the new update holds values that are not finite; check the adapters, their weights and lambda"
    )]
    UpdateNotFinite {
        /// The module.
        path: String,
    },
    /// The difference of two models is not finite.
    #[error(
        "{path}: the difference of the two models holds values that are not finite; one of the weights is damaged"
    )]
    DifferenceNotFinite {
        /// The module.
        path: String,
    },
    /// One of several inputs cannot be used.
    #[error("{name}: {source}")]
    Input {
        /// What it was called.
        name: String,
        /// What is wrong with it.
        source: Box<Error>,
    },
    /// The recipe asks for something that does not exist or has no meaning.
    #[error("{what}: expected {expected}, found {found}")]
    Recipe {
        /// The setting.
        what: String,
        /// What it may be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A DoRA adapter was given without the base that its factors depend on.
    #[error(
        "{name} is a DoRA adapter, and what it does to a weight depends on the weight: give the base (--model)"
    )]
    NeedsBase {
        /// The adapter.
        name: String,
    },
    /// An input holds what has no low-rank form.
    #[error("{name}: {what} cannot be {purpose}: {why}")]
    Unsuited {
        /// The adapter or model.
        name: String,
        /// What it holds.
        what: String,
        /// What was to be done with it, as a participle.
        purpose: &'static str,
        /// The reason, and what to do.
        why: String,
    },
    /// The factors of a row cancel in a sum of DoRA adapters.
    #[error(
        "{path}: the factors of row {row} add up to {value:e}, so that no magnitude stands for the row; choose other weights"
    )]
    Cancels {
        /// The module.
        path: String,
        /// The row of its weight.
        row: usize,
        /// 1 + sum w (c - 1).
        value: f32,
    },
    /// A policy that has nothing to do with this adapter.
    #[error("--policy fold moves DoRA's row factor into the scales, and this adapter is {kind}: {advice}")]
    NothingToFold {
        /// `lora` or `full`.
        kind: String,
        /// What to do.
        advice: String,
    },
    /// A policy that moves a factor into scales which cannot hold it.
    #[error(
        "--policy fold moves DoRA's row factor into the scales, and {path} is packed in {mode}, whose scales have eight bits \
         and cannot hold it: choose raise, same or dense"
    )]
    FloatScales {
        /// The module.
        path: String,
        /// Its mode.
        mode: String,
    },
    /// The inputs of a module could not be observed.
    #[error("{path}: its inputs could not be observed: {source}")]
    Inputs {
        /// The module.
        path: String,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// There is no room for the result.
    #[error(
        "{path}: {source}: the fused model takes about {bytes} bytes, more where weights fall back to floats; nothing was left \
         behind: make room, or choose another place with --save-path"
    )]
    Full {
        /// What was being written.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
        /// Bytes of the tensors.
        bytes: u64,
    },
    /// The report could not be written.
    #[error("cannot write the report: {0}")]
    Report(serde_json::Error),
    /// The base could not be read or the result not be written.
    #[error(transparent)]
    Quant(#[from] graft_quant::Error),
    /// The adapter could not be used.
    #[error(transparent)]
    Adapter(#[from] graft_adapters::Error),
    /// An array operation failed.
    #[error("array operation failed: {0}")]
    Array(#[from] graft_ops::Exception),
}

impl Error {
    /// The same, with the size that was asked for where there was no room for it.
    pub(crate) fn with_size(self, bytes: u64) -> Error {
        match self {
            Self::Quant(graft_quant::Error::Full { path, source, .. }) => Self::Full { path, source, bytes },
            other => other,
        }
    }
}
