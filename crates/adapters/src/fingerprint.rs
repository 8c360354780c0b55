//! What ties an adapter to the base it was trained on.

use graft_quant::Checkpoint;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::AdapterConfig;

/// Facts about a base, compared when an adapter is loaded or fused.
///
/// Two precisions of one model share `shapes` and `tokenizer` and differ in `precision`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// config.json's `model_type`.
    pub model_type: String,
    /// SHA-256 over the logical shape of every module, sorted by path.
    pub shapes: String,
    /// SHA-256 of tokenizer.json, empty where there is none.
    pub tokenizer: String,
    /// The base's quantization block as JSON, or the floats' dtype.
    pub precision: String,
    /// What the base was called when the adapter was trained (a path or an id).
    pub lineage: String,
}

impl Fingerprint {
    /// Its key in graft's part of adapter_config.json, which mlx-lm ignores, and in the metadata of the tensors.
    pub const KEY: &str = "base";

    /// Takes the fingerprint of a checkpoint.
    pub fn of(checkpoint: &Checkpoint, lineage: &str) -> Self {
        let config = checkpoint.config();
        let text = |key: &str| config.get(key).and_then(|v| v.as_str()).unwrap_or_default().to_owned();
        let mut shapes = Sha256::new();
        for (path, (out, input)) in checkpoint.module_shapes() {
            shapes.update(format!("{path} {out} {input}\n"));
        }
        let tokenizer =
            std::fs::read(checkpoint.dir().join("tokenizer.json")).map(|b| hex(&Sha256::digest(b)));
        let precision = config.get("quantization").map_or_else(|| text("torch_dtype"), ToString::to_string);
        Self {
            model_type: text("model_type"),
            shapes: hex(&shapes.finalize()),
            tokenizer: tokenizer.unwrap_or_default(),
            precision,
            lineage: lineage.to_owned(),
        }
    }

    /// The base on which an adapter was trained, where its config says so.
    pub fn read(config: &AdapterConfig) -> Option<Self> {
        config.extra(Self::KEY).and_then(|value| serde_json::from_value(value.clone()).ok())
    }

    /// Why an adapter with this fingerprint does not belong to `base`, or none if it does (whatever the precision).
    pub fn foreign_to(&self, base: &Self) -> Option<String> {
        if self.model_type != base.model_type {
            return Some(format!(
                "it was trained on a {} model, this is a {}",
                self.model_type, base.model_type
            ));
        }
        if self.shapes != base.shapes {
            return Some(format!("it was trained on {}, whose weights have other shapes", self.lineage));
        }
        if self.tokenizer != base.tokenizer && !self.tokenizer.is_empty() && !base.tokenizer.is_empty() {
            return Some(format!("it was trained on {}, whose tokenizer differs", self.lineage));
        }
        None
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
