//! From config.json to [`DecoderConfig`]: one short function a family. A difference between families is a value here.

mod llama;
mod qwen;

use std::path::Path;

use serde_json::{Map, Value};

use crate::{DecoderConfig, Error, Result, RopeConfig, RopeScaling};

/// A family: the `model_type` names it answers to and the function that reads its config.
#[derive(Debug, Clone, Copy)]
pub struct Family {
    /// Values of `model_type`.
    pub names: &'static [&'static str],
    /// Reads config.json.
    pub config: fn(&Fields) -> Result<DecoderConfig>,
    /// What its GGUF files are; none if they are not read.
    pub gguf: Option<GgufFamily>,
}

/// A family as llama.cpp knows it.
#[derive(Debug, Clone, Copy)]
pub struct GgufFamily {
    /// `general.architecture`, and our `model_type`.
    pub architecture: &'static str,
    /// Its class in transformers, which config.json names.
    pub class: &'static str,
    /// The two rows of q and k that rotate together stand side by side in the file.
    pub pairs: bool,
    /// All heads together are as wide as the model: llama.cpp knows no others of this architecture.
    pub square: bool,
}

const FAMILIES: [Family; 3] = [llama::FAMILY, qwen::QWEN2, qwen::QWEN3];

/// Every `model_type` that can be run.
pub fn family_names() -> Vec<&'static str> {
    FAMILIES.iter().flat_map(|f| f.names).copied().collect()
}

/// The family of a `general.architecture`.
pub(crate) fn gguf_family(architecture: &str) -> Option<GgufFamily> {
    FAMILIES.iter().filter_map(|f| f.gguf).find(|gguf| gguf.architecture == architecture)
}

/// What llama.cpp calls the family of a `model_type`.
pub(crate) fn gguf_of(model_type: &str) -> Option<GgufFamily> {
    FAMILIES.iter().find(|f| f.names.contains(&model_type)).and_then(|f| f.gguf)
}

/// Every `general.architecture` that can be imported.
pub(crate) fn gguf_names() -> String {
    FAMILIES.iter().filter_map(|f| Some(f.gguf?.architecture)).collect::<Vec<_>>().join(", ")
}

/// Reads a config.json, whose path is `file`.
///
/// # Errors
/// When the family is unknown or a field is missing or wrong.
pub fn config_from_map(file: &Path, map: &Map<String, Value>) -> Result<DecoderConfig> {
    let fields = Fields { file, map };
    let name = fields.text("model_type")?;
    let family = FAMILIES.iter().find(|f| f.names.contains(&name.as_str())).ok_or_else(|| Error::Family {
        file: file.to_path_buf(),
        found: name,
        known: family_names().join(", "),
    })?;
    let config = (family.config)(&fields)?;
    check(&fields, &config)?;
    Ok(config)
}

/// Sizes that do not go together are caught here, before a tensor is read.
fn check(fields: &Fields, c: &DecoderConfig) -> Result<()> {
    for (field, value) in [
        ("hidden_size", c.hidden),
        ("num_hidden_layers", c.layers),
        ("num_attention_heads", c.heads),
        ("num_key_value_heads", c.kv_heads),
        ("head_dim", c.head_dim),
        ("intermediate_size", c.feed_forward),
        ("vocab_size", c.vocab),
    ] {
        if value <= 0 {
            return Err(fields.wrong(field, "a number above 0", &value.to_string()));
        }
    }
    if c.heads % c.kv_heads != 0 {
        let expected = format!("a divisor of num_attention_heads ({})", c.heads);
        return Err(fields.wrong("num_key_value_heads", &expected, &c.kv_heads.to_string()));
    }
    if c.heads.checked_mul(c.head_dim).is_none() {
        let expected = format!("a size with which {} heads can be", c.heads);
        return Err(fields.wrong("head_dim", &expected, &c.head_dim.to_string()));
    }
    if c.head_dim % 2 != 0 {
        return Err(fields.wrong("head_dim", "an even number (rotary pairs)", &c.head_dim.to_string()));
    }
    Ok(())
}

/// config.json with errors that name the file and the field.
#[derive(Debug)]
pub struct Fields<'a> {
    file: &'a Path,
    map: &'a Map<String, Value>,
}

impl Fields<'_> {
    fn wrong(&self, field: &str, expected: &str, found: &str) -> Error {
        Error::Config {
            file: self.file.to_path_buf(),
            field: field.to_owned(),
            expected: expected.to_owned(),
            found: found.to_owned(),
        }
    }

    fn get(&self, field: &str) -> Option<&Value> {
        self.map.get(field).filter(|v| !v.is_null())
    }

    fn read<T>(&self, field: &str, expected: &str, read: impl Fn(&Value) -> Option<T>) -> Result<T> {
        let value = self.get(field);
        value.and_then(read).ok_or_else(|| {
            self.wrong(field, expected, &value.map_or_else(|| "nothing".to_owned(), Value::to_string))
        })
    }

    fn text(&self, field: &str) -> Result<String> {
        self.read(field, "a string", |v| v.as_str().map(str::to_owned))
    }

    fn int(&self, field: &str) -> Result<i32> {
        self.read(field, "a whole number", |v| v.as_i64().and_then(|n| i32::try_from(n).ok()))
    }

    fn int_or(&self, field: &str, default: i32) -> Result<i32> {
        if self.get(field).is_none() { Ok(default) } else { self.int(field) }
    }

    fn float_or(&self, field: &str, default: f32) -> Result<f32> {
        if self.get(field).is_none() {
            return Ok(default);
        }
        self.read(field, "a number", |v| v.as_f64().map(|x| x as f32))
    }

    fn bool_or(&self, field: &str, default: bool) -> Result<bool> {
        if self.get(field).is_none() {
            return Ok(default);
        }
        self.read(field, "true or false", Value::as_bool)
    }

    /// What all families read alike; each then sets what is its own.
    fn common(&self) -> Result<DecoderConfig> {
        let (hidden, heads) = (self.int("hidden_size")?, self.int("num_attention_heads")?);
        let head_dim = self.int_or("head_dim", if heads > 0 { hidden / heads } else { 0 })?;
        if let Some(act) = self.get("hidden_act").and_then(Value::as_str).filter(|a| *a != "silu") {
            return Err(self.wrong("hidden_act", "\"silu\"", act));
        }
        self.check_windows()?;
        Ok(DecoderConfig {
            model_type: self.text("model_type")?,
            hidden,
            layers: self.int("num_hidden_layers")?,
            heads,
            kv_heads: self.int_or("num_key_value_heads", heads)?,
            head_dim,
            feed_forward: self.int("intermediate_size")?,
            vocab: self.int("vocab_size")?,
            norm_eps: self.float_or("rms_norm_eps", 1e-6)?,
            rope: self.rope()?,
            tied: self.bool_or("tie_word_embeddings", false)?,
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            qk_norm: false,
            max_positions: self.int_or("max_position_embeddings", 2048)?,
        })
    }

    /// Every block sees all tokens before it. A block with a window would answer as if it had none, so it is refused;
    /// `sliding_window` alone is not, as mlx-lm reads it only where `layer_types` names a block with one.
    fn check_windows(&self) -> Result<()> {
        let types = self.get("layer_types").and_then(Value::as_array).into_iter().flatten();
        if let Some(other) = types.filter_map(Value::as_str).find(|kind| *kind != "full_attention") {
            return Err(self.wrong("layer_types", "\"full_attention\" of every block", other));
        }
        let windows = self.bool_or("use_sliding_window", false)? && self.get("sliding_window").is_some();
        let first = self.int_or("max_window_layers", 0)?;
        if windows && first < self.int("num_hidden_layers")? {
            return Err(self.wrong("use_sliding_window", "false, as no block may have a window", "true"));
        }
        Ok(())
    }

    fn rope(&self) -> Result<RopeConfig> {
        // Newer configs keep theta and scaling in `rope_parameters`, older ones in `rope_theta` and `rope_scaling`.
        let parameters = self.get("rope_parameters").and_then(Value::as_object);
        let theta = parameters.and_then(|p| p.get("rope_theta")).and_then(Value::as_f64);
        let base = match theta {
            Some(theta) => theta as f32,
            None => self.float_or("rope_theta", 10_000.0)?,
        };
        let traditional = self.bool_or("rope_traditional", false)?;
        let scaling = self.get("rope_scaling").and_then(Value::as_object).or(parameters);
        let scaling = scaling.map_or(Ok(RopeScaling::Default), |map| self.scaling(map))?;
        Ok(RopeConfig { base, traditional, scaling })
    }

    fn scaling(&self, map: &Map<String, Value>) -> Result<RopeScaling> {
        let number = |key: &str| {
            map.get(key).and_then(Value::as_f64).map(|x| x as f32).ok_or_else(|| {
                self.wrong(&format!("rope_scaling.{key}"), "a number", &format!("{:?}", map.get(key)))
            })
        };
        let kind =
            map.get("rope_type").or_else(|| map.get("type")).and_then(Value::as_str).unwrap_or("default");
        match kind {
            "default" => Ok(RopeScaling::Default),
            "linear" => Ok(RopeScaling::Linear { factor: number("factor")? }),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: number("factor")?,
                low: number("low_freq_factor")?,
                high: number("high_freq_factor")?,
                original: number("original_max_position_embeddings")?,
            }),
            other => Err(self.wrong("rope_scaling.rope_type", "default, linear or llama3", other)),
        }
    }
}
