//! metrics.jsonl: one JSON object a line, cut back to the recorded length when a run is resumed.

use std::fs::{File, OpenOptions};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::Result;
use crate::error::io;
use crate::event::TrainReport;

/// The open file.
#[derive(Debug)]
pub(crate) struct Metrics {
    path: PathBuf,
    file: File,
    length: u64,
}

impl Metrics {
    /// Opens `<dir>/metrics.jsonl` and cuts it to `length` bytes.
    ///
    /// # Errors
    /// When the file cannot be opened or written.
    pub(crate) fn open(dir: &Path, length: u64) -> Result<Self> {
        let path = dir.join("metrics.jsonl");
        let mut file =
            OpenOptions::new().create(true).write(true).truncate(false).open(&path).map_err(io(&path))?;
        let length = length.min(file.metadata().map_err(io(&path))?.len());
        file.set_len(length).map_err(io(&path))?;
        file.seek(SeekFrom::End(0)).map_err(io(&path))?;
        Ok(Self { path, file, length })
    }

    /// Writes a training report.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn train(&mut self, r: &TrainReport) -> Result<()> {
        self.line(&json!({
            "kind": "train",
            "iter": r.iter,
            "loss": r.loss,
            "learning_rate": r.learning_rate,
            "grad_norm": r.grad_norm,
            "tokens": r.tokens,
            "tokens_per_second": r.tokens_per_second,
            "step_seconds": r.step_seconds,
            "peak_memory_bytes": r.peak_memory_bytes,
            "mlx_peak_bytes": r.mlx_peak_bytes,
        }))
    }

    /// Writes a validation.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn valid(&mut self, iter: u64, loss: f64, tokens: u64, seconds: f64) -> Result<()> {
        self.line(&json!({"kind": "valid", "iter": iter, "loss": loss, "tokens": tokens, "seconds": seconds}))
    }

    fn line(&mut self, value: &serde_json::Value) -> Result<()> {
        let line = format!("{value}\n");
        self.file.write_all(line.as_bytes()).map_err(io(&self.path))?;
        self.length += line.len() as u64;
        Ok(())
    }

    /// The length so far, once it is on the disk.
    ///
    /// # Errors
    /// When the file cannot be synced.
    pub(crate) fn synced_length(&mut self) -> Result<u64> {
        self.file.sync_data().map_err(io(&self.path))?;
        Ok(self.length)
    }
}
