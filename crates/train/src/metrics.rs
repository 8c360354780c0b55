//! metrics.jsonl: one JSON object a line, cut back to the recorded length when a run is resumed.

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

    /// Appends one line.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn write(&mut self, line: &Line) -> Result<()> {
        let json = serde_json::to_string(line).map_err(|e| io(&self.path)(e.into()))?;
        self.file.write_all(format!("{json}\n").as_bytes()).map_err(io(&self.path))?;
        self.length += json.len() as u64 + 1;
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
