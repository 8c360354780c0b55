//! What can be wrong with a checkpoint: one enum, each message names the file or tensor and what to do.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A file that cannot be read or written, or does not hold what it should.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Reading or writing failed.
    #[error("{path}: {source}")]
    Io {
        /// Path of the file or directory.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// There is no room for what is written, or a file may not become so large.
    #[error(
        "{path}: {source}, after {written} bytes; nothing was left behind: make room, or choose another place"
    )]
    Full {
        /// The file or directory that was to be there.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
        /// Bytes that were written before.
        written: u64,
    },
    /// A file is not the JSON it should be.
    #[error("{path}: not valid JSON: {source}")]
    Json {
        /// Path of the file.
        path: PathBuf,
        /// The parser's error, with line and column.
        source: serde_json::Error,
    },
    /// A directory does not hold what it should.
    #[error("{dir}: {what} is missing; {hint}")]
    Missing {
        /// The directory that was given.
        dir: PathBuf,
        /// The file or files that are not there.
        what: String,
        /// What to do.
        hint: String,
    },
    /// A file is truncated, or its header does not describe it.
    #[error("{file}: damaged: {what}; get the file again")]
    Damaged {
        /// Path of the file.
        file: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A tensor is absent, or has a shape or type that it may not have.
    #[error("{file}: tensor {name}: expected {expected}, found {found}")]
    Tensor {
        /// The file or directory.
        file: PathBuf,
        /// The tensor.
        name: String,
        /// What it should have been.
        expected: String,
        /// What it was.
        found: String,
    },
    /// A field of config.json has another value than it may.
    #[error("{file}: field `{field}`: expected {expected}, found {found}")]
    Config {
        /// The config file.
        file: PathBuf,
        /// Dotted name of the field.
        field: String,
        /// What it should have been.
        expected: String,
        /// What it was.
        found: String,
    },
    /// Something well formed that we do not do.
    #[error("{file}: {what} is not supported; {hint}")]
    Unsupported {
        /// The file.
        file: PathBuf,
        /// The format, type or option.
        what: String,
        /// What is supported, or what to do.
        hint: String,
    },
    /// The output is there already.
    #[error("{path} exists already; {hint}")]
    Exists {
        /// The output.
        path: PathBuf,
        /// What to do.
        hint: String,
    },
    /// Numbers that fit no grid or no request.
    #[error("{0}")]
    Request(String),
    /// The conversion was asked to stop.
    #[error("stopped before the model was complete; nothing was written")]
    Stopped,
    /// An array operation failed.
    #[error("array operation failed: {0}")]
    Array(#[from] graft_ops::Exception),
}

impl Error {
    /// An I/O error at `path`, for `map_err`.
    pub fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_path_buf();
        move |source| Error::Io { path, source }
    }

    /// As [`Error::io`], while `path` is being written; `written` bytes of it are there.
    pub(crate) fn writing(path: &Path, written: u64) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_path_buf();
        move |source| match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
                Error::Full { path, source, written }
            }
            _ => Error::Io { path, source },
        }
    }
}
