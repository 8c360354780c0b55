//! A new adapter directory in mlx-lm's form, written module by module, whole or not at all.

use std::path::Path;

use graft_quant::{DirWriter, Tensor, pretty};
use serde_json::Value;

use crate::{ADAPTER_FILE, Adapter, AdapterSet, CONFIG_FILE, Result};

/// An adapter directory in the making. Dropped before [`AdapterWriter::finish`], it leaves nothing behind.
#[derive(Debug)]
pub struct AdapterWriter(DirWriter);

impl AdapterWriter {
    /// Begins a directory that will stand at `target`.
    ///
    /// # Errors
    /// When the target exists and is not empty, or nothing can be written there.
    pub fn create(target: &Path) -> Result<Self> {
        Ok(Self(DirWriter::create(target, false)?.single(ADAPTER_FILE)))
    }

    /// Appends a module's tensors.
    ///
    /// # Errors
    /// When they cannot be evaluated or written.
    pub fn add(&mut self, path: &str, adapter: &Adapter) -> Result<()> {
        self.0.add(&format!("{path}.lora_a"), &Tensor::from_array(&adapter.a)?)?;
        self.0.add(&format!("{path}.lora_b"), &Tensor::from_array(&adapter.b)?)?;
        if let Some(m) = &adapter.magnitude {
            self.0.add(&format!("{path}.m"), &Tensor::from_array(m)?)?;
        }
        Ok(())
    }

    /// Writes a file beside the tensors.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn file(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        Ok(self.0.write_file(name, bytes)?)
    }

    /// Writes config and metadata of `set`, whose tensors are not looked at, and puts the directory in its place.
    ///
    /// # Errors
    /// When writing or renaming fails; nothing stands at the target then.
    pub fn finish(mut self, set: &AdapterSet) -> Result<()> {
        self.0.set_metadata(set.file_metadata());
        self.0.write_file(CONFIG_FILE, &pretty(&Value::Object(set.config.to_map()))?)?;
        Ok(self.0.finish()?)
    }

    /// Writes a whole set to a new directory.
    ///
    /// # Errors
    /// As the steps above.
    pub fn write(set: &AdapterSet, target: &Path) -> Result<()> {
        let dir = DirWriter::create(target, false)?;
        let mut writer = Self(dir);
        let bytes = graft_quant::safetensors_bytes(&set.tensors()?, &set.file_metadata())?;
        writer.file(ADAPTER_FILE, &bytes)?;
        writer.finish(set)
    }
}
