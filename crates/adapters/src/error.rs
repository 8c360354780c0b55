//! What can be wrong with an adapter: one enum, each message names the file or tensor and what to do.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An adapter that cannot be read, does not fit, or cannot be represented.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The directory holds no adapter.
    #[error(
        "{dir}: not an adapter directory: {missing} is missing; expected mlx-lm's adapter_config.json and \
         adapters.safetensors, or PEFT's adapter_config.json and adapter_model.safetensors"
    )]
    NotAnAdapter {
        /// The directory that was given.
        dir: PathBuf,
        /// The file that is not there.
        missing: String,
    },
    /// A field of adapter_config.json is missing or has another type or value than it may.
    #[error("{file}: field `{field}`: expected {expected}, found {found}")]
    Config {
        /// Path of the config file.
        file: PathBuf,
        /// Dotted name of the field.
        field: String,
        /// What it should have been.
        expected: String,
        /// What it was.
        found: String,
    },
    /// The adapter uses something that cannot be represented exactly; it is refused rather than loaded in part.
    #[error("{file}: {what} cannot be represented: {why}")]
    Unsupported {
        /// Path of the file.
        file: PathBuf,
        /// The variant, tensor or option.
        what: String,
        /// The reason, and what to do.
        why: String,
    },
    /// Tensors are missing, left over or misshapen: all of them, one a line.
    #[error("{file}: the adapter does not fit:\n  {}", problems.join("\n  "))]
    Mismatch {
        /// The adapter's file or directory.
        file: PathBuf,
        /// One sentence each.
        problems: Vec<String>,
    },
    /// Reading or writing a file failed.
    #[error("{path}: {source}")]
    Io {
        /// Path of the file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A file is not the JSON it should be.
    #[error("{path}: not valid JSON: {source}")]
    Json {
        /// Path of the file.
        path: PathBuf,
        /// The parser's error, with line and column.
        source: serde_json::Error,
    },
    /// A file of tensors could not be read or written.
    #[error(transparent)]
    Quant(#[from] graft_quant::Error),
    /// An array operation failed.
    #[error("array operation failed: {0}")]
    Array(#[from] graft_ops::Exception),
}
