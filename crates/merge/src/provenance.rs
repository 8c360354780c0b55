//! From what an output was made: the files of its sources by hash, the recipe, the version, and what came of it.
//!
//! It stands in config.json under `graft` and, as one text of JSON, in the metadata of the tensors, so that a directory that
//! was copied or renamed still says it.

use std::collections::BTreeMap;
use std::path::Path;

use graft_adapters::{ADAPTER_FILE, CONFIG_FILE, file_hash};
use serde::Serialize;
use serde_json::Value;

use crate::Result;

/// Its key in config.json and in the metadata.
pub(crate) const KEY: &str = "graft";

/// A model or adapter that something was made of.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Source {
    /// As it was given.
    pub name: String,
    /// SHA-256 of its files.
    pub sha256: BTreeMap<String, String>,
    /// What it says of its own making, if anything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub made_from: Option<Value>,
}

impl Source {
    /// A model directory: config.json and every file of weights.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn model(name: &str, files: &[&Path], config: &serde_json::Map<String, Value>) -> Result<Source> {
        let made_from = config.get(KEY).cloned();
        Ok(Source { name: name.to_owned(), sha256: hashes(files)?, made_from })
    }

    /// An adapter directory, in mlx-lm's or PEFT's form.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn adapter(name: &str, dir: &Path) -> Result<Source> {
        let files = [CONFIG_FILE, ADAPTER_FILE, "adapter_model.safetensors"].map(|file| dir.join(file));
        let files: Vec<&Path> =
            files.iter().map(|file| file.as_path()).filter(|file| file.is_file()).collect();
        Ok(Source { name: name.to_owned(), sha256: hashes(&files)?, made_from: None })
    }
}

fn hashes(files: &[&Path]) -> Result<BTreeMap<String, String>> {
    let name =
        |file: &Path| file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    files.iter().map(|file| Ok((name(file), file_hash(file)?))).collect()
}

/// What a fused model says of its making.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Provenance {
    /// The command: `fuse`.
    pub made_by: String,
    /// Version of graft.
    pub version: String,
    /// The base.
    pub base: Source,
    /// The adapters.
    pub adapters: Vec<Source>,
    /// Everything that decided how.
    pub recipe: Value,
    /// What was kept, in short; the report has the whole.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub summary: Option<Value>,
}
