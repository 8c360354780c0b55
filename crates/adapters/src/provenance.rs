//! What an output was made of: its inputs by hash, what was asked for, and by which version.

use std::collections::BTreeMap;
use std::path::Path;

use graft_quant::Checkpoint;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{ADAPTER_FILE, AdapterSet, CONFIG_FILE, Error, Result, file_hash, peft};

/// An input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// What it was called: a path or an id, as given.
    pub name: String,
    /// SHA-256 of each of its files that decide the numbers, by name; what `sha256sum` prints.
    pub sha256: BTreeMap<String, String>,
    /// What a model says of its own making, if anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made_from: Option<Value>,
}

impl Origin {
    /// An adapter directory: its config and its tensors.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn of_adapter(dir: &Path, name: &str) -> Result<Self> {
        // An adapter that was never written has no files.
        let files = [CONFIG_FILE, ADAPTER_FILE, peft::TENSORS].map(|file| dir.join(file));
        Self::of_files(name, files.into_iter().filter(|file| file.is_file()))
    }

    /// A model directory: its config and all its weights, which are read from the first byte to the last.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn of_model(checkpoint: &Checkpoint, name: &str) -> Result<Self> {
        let weights = checkpoint.files().map(Path::to_path_buf);
        let origin =
            Self::of_files(name, std::iter::once(checkpoint.dir().join("config.json")).chain(weights))?;
        let made = checkpoint.config().get(GRAFT).and_then(|graft| graft.get(Provenance::KEY));
        Ok(Self { made_from: made.cloned(), ..origin })
    }

    fn of_files(name: &str, files: impl Iterator<Item = std::path::PathBuf>) -> Result<Self> {
        let mut sha256 = BTreeMap::new();
        for path in files {
            let file = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            sha256.insert(file.to_owned(), file_hash(&path)?);
        }
        Ok(Self { name: name.to_owned(), sha256, made_from: None })
    }
}

/// graft's part of a model's config.json.
const GRAFT: &str = "graft";

/// What an adapter or model directory was made of. It stands in adapter_config.json or config.json and in the metadata of the
/// tensors, since either file may travel alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// Version of graft.
    pub graft: String,
    /// `fuse`, `merge`, `adapter extract` and so on.
    pub operation: String,
    /// The base, where one was read.
    pub base: Option<Origin>,
    /// What went in, in order.
    pub inputs: Vec<Origin>,
    /// What was asked for.
    pub recipe: Value,
    /// What came of it, in a few numbers.
    pub summary: Value,
}

impl Provenance {
    /// Its key in graft's part of a config.
    pub const KEY: &str = "provenance";
    /// Its key in the metadata of tensors.
    pub const METADATA: &str = "graft_provenance";

    /// As graft's part of a model's config.json: the key and its value.
    ///
    /// # Errors
    /// When it is no JSON.
    pub fn entry(&self) -> Result<(String, Value)> {
        let value = serde_json::to_value(self)
            .map_err(|source| Error::Json { path: "config.json".into(), source })?;
        Ok((GRAFT.to_owned(), serde_json::json!({ Self::KEY: value })))
    }

    /// Writes it into a set's config and metadata.
    ///
    /// # Errors
    /// When it is no JSON.
    pub fn write(&self, set: &mut AdapterSet) -> Result<()> {
        let value =
            serde_json::to_value(self).map_err(|source| Error::Json { path: CONFIG_FILE.into(), source })?;
        set.metadata.insert(Self::METADATA.to_owned(), value.to_string());
        set.config.set_extra(Self::KEY, value);
        Ok(())
    }

    /// What a set says of itself.
    pub fn read(set: &AdapterSet) -> Option<Self> {
        set.config.extra(Self::KEY).and_then(|value| serde_json::from_value(value.clone()).ok())
    }
}
