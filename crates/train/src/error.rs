//! What can stop a training run: each message names the file, row or setting, and what to do.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What every [`Error::NonFinite`] says, for whoever reads the words of a run in another process.
pub const NOT_FINITE: &str = "is not finite";

/// A run that cannot start, or must not go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A row of a data file is not what it should be.
    #[error("{file}:{line}: {problem}")]
    Row {
        /// The data file.
        file: PathBuf,
        /// Line number, from 1.
        line: usize,
        /// What is wrong and what was expected.
        problem: String,
    },
    /// A split that is needed has no rows to train or evaluate on.
    #[error(
        "{file}: {problem}; expected at least one row such as {{\"messages\": [...]}}, {{\"prompt\": ..., \"completion\": ...}} or {{\"text\": ...}}"
    )]
    EmptySplit {
        /// The data file.
        file: PathBuf,
        /// Missing, empty, or all rows skipped.
        problem: String,
    },
    /// There are fewer rows than one batch takes.
    #[error(
        "{file}: {rows} usable rows, but batch_size is {batch_size}: give more rows or a batch_size of at most {rows}"
    )]
    BatchTooLarge {
        /// The data file.
        file: PathBuf,
        /// Rows that can be trained on.
        rows: usize,
        /// Rows of a batch.
        batch_size: usize,
    },
    /// A setting has a value that it may not have.
    #[error("{field}: expected {expected}, found {found}")]
    Setting {
        /// Name of the setting.
        field: String,
        /// What it may be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// The loss, a gradient or an updated tensor is infinite or not a number.
    #[error(
        "the {what} {NOT_FINITE} at iteration {iter}; the batch held {rows}; nothing after the last save was written: \
         lower the learning rate, set --max-grad-norm, or look at those rows"
    )]
    NonFinite {
        /// Loss, gradient or update.
        what: String,
        /// The iteration, from 1.
        iter: u64,
        /// File and line numbers of the batch.
        rows: String,
    },
    /// The saved state cannot be continued with these settings, or is damaged.
    #[error("{path}: {problem}")]
    State {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// Reading or writing a file failed.
    #[error("{path}: {source}")]
    Io {
        /// Path of the file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The model failed.
    #[error(transparent)]
    Model(#[from] graft_model::Error),
    /// An adapter could not be read, written or applied.
    #[error(transparent)]
    Adapter(#[from] graft_adapters::Error),
    /// A file of tensors could not be read or written.
    #[error(transparent)]
    Quant(#[from] graft_quant::Error),
    /// An array operation failed.
    #[error("array operation failed: {0}")]
    Array(#[from] graft_ops::Exception),
}

/// A setting with the wrong value.
pub(crate) fn setting(field: &str, expected: &str, found: impl std::fmt::Display) -> Error {
    Error::Setting { field: field.to_owned(), expected: expected.to_owned(), found: found.to_string() }
}

/// For `map_err` of file operations.
pub(crate) fn io(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_path_buf();
    move |source| Error::Io { path, source }
}
