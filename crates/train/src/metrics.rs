//! metrics.jsonl: one JSON object a line, cut back to the recorded length when a run is resumed.
//!
//! The file is touched when the run is known to go on: an earlier run's lines stay until then.

use std::fs::{File, OpenOptions};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use crate::Result;
use crate::error::io;
use crate::event::TrainReport;

/// What a line says.
#[derive(serde::Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub(crate) enum Line<'a> {
    Train(&'a TrainReport),
    Valid { iter: u64, loss: f64, tokens: u64, seconds: f64 },
}

/// The file; lines wait until it is begun.
#[derive(Debug)]
pub(crate) struct Metrics {
    path: PathBuf,
    file: Option<File>,
    waiting: String,
    length: u64,
}

impl Metrics {
    /// `<dir>/metrics.jsonl`, of which the first `length` bytes are this run's; nothing is opened yet.
    pub(crate) fn new(dir: &Path, length: u64) -> Self {
        Self { path: dir.join("metrics.jsonl"), file: None, waiting: String::new(), length }
    }

    /// Opens the file, cuts it to this run's bytes and writes the lines that waited.
    ///
    /// # Errors
    /// When the file cannot be opened or written.
    pub(crate) fn begin(&mut self) -> Result<()> {
        let path = &self.path;
        let mut file =
            OpenOptions::new().create(true).write(true).truncate(false).open(path).map_err(io(path))?;
        self.length = self.length.min(file.metadata().map_err(io(path))?.len());
        file.set_len(self.length).map_err(io(path))?;
        file.seek(SeekFrom::End(0)).map_err(io(path))?;
        self.file = Some(file);
        let lines = std::mem::take(&mut self.waiting);
        self.append(&lines)
    }

    /// Appends one line.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn write(&mut self, line: &Line) -> Result<()> {
        let json = serde_json::to_string(line).map_err(|e| io(&self.path)(e.into()))?;
        self.append(&format!("{json}\n"))
    }

    fn append(&mut self, lines: &str) -> Result<()> {
        match &mut self.file {
            None => self.waiting.push_str(lines),
            Some(file) => {
                file.write_all(lines.as_bytes()).map_err(io(&self.path))?;
                self.length += lines.len() as u64;
            }
        }
        Ok(())
    }

    /// The length so far, once it is on the disk.
    ///
    /// # Errors
    /// When the file cannot be synced.
    pub(crate) fn synced_length(&mut self) -> Result<u64> {
        if let Some(file) = &self.file {
            file.sync_data().map_err(io(&self.path))?;
        }
        Ok(self.length)
    }
}
