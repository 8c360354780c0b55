//! What ties an adapter to the base it was trained on.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::Path;

use graft_quant::Checkpoint;
use graft_quant::convert::dtype_name;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::{AdapterConfig, Result};

/// Facts about a base, compared when an adapter is loaded or fused.
///
/// Two precisions of one model share `shapes` and `vocabulary` and differ in `precision`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// config.json's `model_type`.
    pub model_type: String,
    /// SHA-256 over the logical shape of every module, sorted by path.
    pub shapes: String,
    /// SHA-256 over the tokens and ids of tokenizer.json, added ones included, sorted by token; empty where there is no such
    /// file. Not over its bytes, since tools write the same tokenizer in different ways.
    #[serde(default)]
    pub vocabulary: String,
    /// What the norms hold, which tells models of the same shapes apart: rounding weights leaves norms alone, and so does a
    /// low-rank adapter that is fused. Two hashes of all of them, see [`Fingerprint::of`]; empty where it is not known.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub norms: String,
    /// The base's quantization block as JSON, or the floats' dtype.
    pub precision: String,
    /// What the base was called when the adapter was trained (a path or an id).
    pub lineage: String,
}

impl Fingerprint {
    /// Its key in graft's part of adapter_config.json, which mlx-lm ignores, and in the metadata of the tensors.
    pub const KEY: &str = "base";

    /// Takes the fingerprint of a checkpoint.
    ///
    /// Norms are hashed as bf16, in which most models are made, and as bf16 by way of f16: a cast of the whole model to another
    /// type leaves one of the two, except from f32 to f16 on one side and to bf16 on the other.
    pub fn of(checkpoint: &Checkpoint, lineage: &str) -> Self {
        let config = checkpoint.config();
        let text = |key: &str| config.get(key).and_then(|v| v.as_str()).unwrap_or_default().to_owned();
        let mut shapes = Sha256::new();
        for (path, (out, input)) in checkpoint.module_shapes() {
            shapes.update(format!("{path} {out} {input}\n"));
        }
        let dtype = || checkpoint.stored_dtype().and_then(dtype_name).unwrap_or_default().to_owned();
        let precision = config.get("quantization").map_or_else(dtype, ToString::to_string);
        Self {
            model_type: text("model_type"),
            shapes: hex(&shapes.finalize()),
            vocabulary: vocabulary(&checkpoint.dir().join("tokenizer.json")),
            norms: norms(checkpoint).unwrap_or_default(),
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
        if self.vocabulary != base.vocabulary && !self.vocabulary.is_empty() && !base.vocabulary.is_empty() {
            return Some(format!("it was trained on {}, whose tokenizer differs", self.lineage));
        }
        None
    }

    /// Why an adapter with this fingerprint belongs to another model of the shapes of `base`, or none if it does not or nothing
    /// says so: adapters of other tools and of before norms were recorded do not, nor do models whose norms are the same.
    pub fn other_model_than(&self, base: &Self) -> Option<String> {
        let mut hashes = self.norms.split('+');
        let known = !self.norms.is_empty() && !base.norms.is_empty();
        (known && !hashes.any(|own| base.norms.split('+').any(|other| own == other))).then(|| {
            format!(
                "it was trained on {}, another model of the same shapes: its norms hold other values",
                self.lineage
            )
        })
    }
}

/// Below this f16 has fewer bits than bf16; so small a weight counts as none.
const SMALLEST: f32 = 6.103_515_6e-5;

/// Two hashes with a `+` between, of all norms' weights by name; none where there are no norms or they cannot be read.
fn norms(checkpoint: &Checkpoint) -> Option<String> {
    let mut hashes = [Sha256::new(), Sha256::new()];
    let is_norm = |name: &&String| {
        name.ends_with("norm.weight") && checkpoint.info(name).is_some_and(|info| info.shape.len() == 1)
    };
    let mut found = false;
    for name in checkpoint.names().filter(is_norm) {
        let values = checkpoint.read(name).ok()?.to_f32().ok()?;
        found = true;
        let large = |x: f32| if x.abs() < SMALLEST { 0.0 } else { x };
        let by_f16 = |x: f32| half::f16::from_f32(x).to_f32();
        for (hash, by) in hashes.iter_mut().zip([&large as &dyn Fn(f32) -> f32, &|x| by_f16(large(x))]) {
            hash.update(format!("{} {name} {}\n", name.len(), values.len()));
            values.iter().for_each(|x| hash.update(half::bf16::from_f32(by(*x)).to_le_bytes()));
        }
    }
    found.then(|| hashes.map(|hash| hex(&hash.finalize()[..8])).join("+"))
}

/// SHA-256 of a file's bytes in hexadecimal, as `sha256sum` prints it. Takes a megabyte at a time.
///
/// # Errors
/// When the file cannot be read.
pub fn file_hash(file: &Path) -> Result<String> {
    let fail = |source| crate::Error::Io { path: file.to_path_buf(), source };
    let mut reader = std::fs::File::open(file).map_err(fail)?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match reader.read(&mut buffer).map_err(fail)? {
            0 => return Ok(hex(&hash.finalize())),
            n => hash.update(&buffer[..n]),
        }
    }
}

/// The hash of a tokenizer.json's vocabulary; of its bytes where it has another form; empty where there is none.
fn vocabulary(file: &Path) -> String {
    let Ok(bytes) = std::fs::read(file) else { return String::new() };
    let Ok(json) = serde_json::from_slice::<Value>(&bytes) else { return hex(&Sha256::digest(bytes)) };
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let mut ids: BTreeMap<String, u64> = match &json["model"]["vocab"] {
        Value::Object(map) => {
            map.iter().filter_map(|(token, id)| Some((token.clone(), id.as_u64()?))).collect()
        }
        // A unigram model's list of token and score, whose places are the ids.
        Value::Array(list) => list.iter().zip(0..).filter_map(|(e, id)| Some((text(&e[0])?, id))).collect(),
        _ => return hex(&Sha256::digest(bytes)),
    };
    let added = json["added_tokens"].as_array().into_iter().flatten();
    ids.extend(added.filter_map(|token| Some((text(&token["content"])?, token["id"].as_u64()?))));
    let mut hash = Sha256::new();
    for (token, id) in ids {
        // With the length, no two lists are the same bytes.
        hash.update(format!("{id} {} {token}\n", token.len()));
    }
    hex(&hash.finalize())
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_tokenizer_is_its_vocabulary_however_it_is_written() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let hash = |text: &str| {
            std::fs::write(file.path(), text).unwrap();
            super::vocabulary(file.path())
        };
        let one = hash(
            r#"{"version": "1.0", "model": {"vocab": {"a": 0, "b": 1}, "merges": ["a b"]},
                "added_tokens": [{"id": 2, "content": "<s>", "special": true}]}"#,
        );
        let again = hash(
            r#"{"added_tokens":[{"content":"<s>","id":2}],"model":{"merges":[["a","b"]],"vocab":{"b":1,"a":0}}}"#,
        );
        assert_eq!(one, again);
        // A unigram model lists its tokens; these are the same ones.
        let list = r#"{"model": {"vocab": [["a", -1.0], ["b", -2.5]]}, "added_tokens": [{"id": 2, "content": "<s>"}]}"#;
        assert_eq!(hash(list), one);
        assert_ne!(hash(&list.replace("\"b\"", "\"c\"")), one);
        assert_ne!(hash(&list.replace("\"id\": 2", "\"id\": 3")), one);
        assert!(hash("{}").len() == 64 && super::vocabulary("no/such/file".as_ref()).is_empty());
    }
}
