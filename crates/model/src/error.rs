//! What can be wrong with a model directory or with what a model is asked to do.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A model that cannot be loaded or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// config.json names an architecture that no family maps.
    #[error("{file}: model_type {found:?} is not supported; supported are {known}")]
    Family {
        /// The config file.
        file: PathBuf,
        /// What it says.
        found: String,
        /// The names we know.
        known: String,
    },
    /// A field of config.json (or of another JSON file) is missing or has another value than it may.
    #[error("{file}: field `{field}`: expected {expected}, found {found}")]
    Config {
        /// The file.
        file: PathBuf,
        /// Dotted name of the field.
        field: String,
        /// What it should have been.
        expected: String,
        /// What it was.
        found: String,
    },
    /// Tensors are missing, left over or misshapen: all of them, one a line.
    #[error("{dir}: the weights do not fit config.json:\n  {}", problems.join("\n  "))]
    Weights {
        /// The model directory.
        dir: PathBuf,
        /// One sentence each.
        problems: Vec<String>,
    },
    /// A tokenizer's file is missing or broken.
    #[error("{file}: {message}")]
    Tokenizer {
        /// The file.
        file: PathBuf,
        /// What is wrong with it, and what to do.
        message: String,
    },
    /// A chat template is missing, broken, or refuses the messages.
    #[error("chat template of {file}: {message}")]
    Template {
        /// The file it is from, or the directory that has none.
        file: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// Logits that are no numbers, of which nothing can be measured.
    #[error(
        "the logits of the {run} of two models are not finite at target {target}: its weights overflow or are damaged"
    )]
    NotFinite {
        /// `first` or `second`.
        run: &'static str,
        /// Which of all targets, from 0.
        target: usize,
    },
    /// A sampling setting is outside its range.
    #[error("`{field}`: expected {expected}, found {found}")]
    Sampling {
        /// The field of [`crate::Sampling`].
        field: &'static str,
        /// What it may be.
        expected: String,
        /// What it was.
        found: String,
    },
    /// A GGUF file's tensors are not those of its architecture: all of them, one a line.
    #[error("{file}: the tensors do not fit the metadata:\n  {}", problems.join("\n  "))]
    Tensors {
        /// The file.
        file: PathBuf,
        /// One sentence each.
        problems: Vec<String>,
    },
    /// GGUF metadata that is missing or that we cannot express.
    #[error("{file}: `{key}`: expected {expected}, found {found}")]
    Import {
        /// The file.
        file: PathBuf,
        /// The key.
        key: String,
        /// What it should have been.
        expected: String,
        /// What it was.
        found: String,
    },
    /// A request that the model cannot serve.
    #[error("{0}")]
    Request(String),
    /// Reading a file failed.
    #[error("{path}: {source}")]
    Io {
        /// Path of the file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A checkpoint could not be read.
    #[error(transparent)]
    Quant(#[from] graft_quant::Error),
    /// An adapter could not be used.
    #[error(transparent)]
    Adapter(#[from] graft_adapters::Error),
    /// An array operation failed.
    #[error("array operation failed: {0}")]
    Array(#[from] graft_ops::Exception),
}
