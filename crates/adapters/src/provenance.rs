//! What an output was made of: its inputs by hash, what was asked for, and by which version.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use graft_quant::Checkpoint;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::{ADAPTER_FILE, AdapterSet, CONFIG_FILE, Error, Result, peft};

/// An input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// What it was called: a path or an id, as given.
    pub name: String,
    /// SHA-256 of each of its files that decide the numbers, by name; what `sha256sum` prints.
    pub sha256: BTreeMap<String, String>,
}

impl Origin {
    /// An adapter directory: its config and its tensors.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn of_adapter(dir: &Path, name: &str) -> Result<Self> {
        let tensors = [ADAPTER_FILE, peft::TENSORS].into_iter().filter(|file| dir.join(file).is_file());
        Self::of_files(name, std::iter::once(CONFIG_FILE).chain(tensors).map(|file| dir.join(file)))
    }

    /// A model directory: its config and all its weights, which are read from the first byte to the last.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn of_model(checkpoint: &Checkpoint, name: &str) -> Result<Self> {
        let weights = checkpoint.files().map(Path::to_path_buf);
        Self::of_files(name, std::iter::once(checkpoint.dir().join("config.json")).chain(weights))
    }

    fn of_files(name: &str, files: impl Iterator<Item = std::path::PathBuf>) -> Result<Self> {
        let mut sha256 = BTreeMap::new();
        for path in files {
            let file = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            sha256.insert(file.to_owned(), hash(&path)?);
        }
        Ok(Self { name: name.to_owned(), sha256 })
    }
}

/// What an adapter directory was made of. It stands in adapter_config.json and in the metadata of the tensors, since either
/// file may travel alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// Version of graft.
    pub graft: String,
    /// `merge`, `adapter extract` and so on.
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
    /// Its key in graft's part of adapter_config.json and, after `graft_`, in the metadata of the tensors.
    pub const KEY: &str = "provenance";

    /// Writes it into a set's config and metadata.
    ///
    /// # Errors
    /// When it is no JSON.
    pub fn write(&self, set: &mut AdapterSet) -> Result<()> {
        let value =
            serde_json::to_value(self).map_err(|source| Error::Json { path: CONFIG_FILE.into(), source })?;
        set.metadata.insert(format!("graft_{}", Self::KEY), value.to_string());
        set.config.set_extra(Self::KEY, value);
        Ok(())
    }

    /// What a set says of itself.
    pub fn read(set: &AdapterSet) -> Option<Self> {
        set.config.extra(Self::KEY).and_then(|value| serde_json::from_value(value.clone()).ok())
    }
}

/// SHA-256 of a file, a block of it in memory at a time.
fn hash(path: &Path) -> Result<String> {
    let io = |source| Error::Io { path: path.to_path_buf(), source };
    let mut file = File::open(path).map_err(io)?;
    let (mut sha, mut block) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        let read = file.read(&mut block).map_err(io)?;
        if read == 0 {
            return Ok(crate::fingerprint::hex(&sha.finalize()));
        }
        sha.update(&block[..read]);
    }
}
