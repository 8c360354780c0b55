//! PEFT's adapter directory, read into mlx-lm's terms; what has no exact counterpart is refused by name.
//!
//! | PEFT | here |
//! |---|---|
//! | `<prefix><path>.lora_A.weight` (R, in) | A = its transpose |
//! | `<prefix><path>.lora_B.weight` (out, R) | B = its transpose |
//! | `<prefix><path>.lora_embedding_A` (R, V), `_B` (E, R) | A (V, R), B (R, E) |
//! | `<prefix><path>.lora_magnitude_vector[.weight]` (out,) | m |
//! | alpha / R, or alpha / sqrt(R) with `use_rslora` | scale, by module where patterns say so |
//!
//! The prefix is `base_model.model.`. Source: PEFT's `tuners/lora` and `utils/save_and_load.py`.

use std::collections::BTreeMap;
use std::path::Path;

use graft_quant::Tensor;
use serde_json::{Map, Value};

use crate::stored::unusable;
use crate::{AdapterConfig, Error, FineTuneType, LoraParameters, Result, StoredAdapter, StoredSet};

const TENSORS: &str = "adapter_model.safetensors";

/// Options that change the maths in a way that W + s B A (and m) cannot express, with the reason.
const REFUSED: [(&str, &str); 12] = [
    ("fan_in_fan_out", "the base stores its weights transposed"),
    ("lora_bias", "the update has a bias of its own"),
    ("use_qalora", "A acts on pooled inputs"),
    ("alora_invocation_tokens", "the adapter acts only after its invocation tokens"),
    ("layer_replication", "the base is not the stored one"),
    ("trainable_token_indices", "single embedding rows were trained"),
    ("target_parameters", "expert weights were adapted"),
    ("modules_to_save", "whole weights are part of the adapter"),
    ("use_bdlora", "the update is block-diagonal"),
    ("kasa_config", "the update has singular values of its own"),
    ("arrow_config", "several adapters are routed per token"),
    ("monteclora_config", "the update is stochastic"),
];

/// Initialisations that rewrite the base: such an adapter means nothing on the original weights.
const REWRITES_BASE: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

/// Reads a PEFT directory.
pub(crate) fn load(dir: &Path, file: &Path, raw: Map<String, Value>) -> Result<StoredSet> {
    refuse(file, &raw)?;
    let tensors_file = dir.join(TENSORS);
    if !tensors_file.is_file() {
        return Err(Error::NotAnAdapter { dir: dir.to_path_buf(), missing: TENSORS.into() });
    }
    let (tensors, metadata) = graft_quant::read_safetensors(&tensors_file)?;
    let scaling = Scaling::read(file, &raw)?;
    let dora = raw.get("use_dora").and_then(Value::as_bool).unwrap_or(false);

    let (parts, mut problems) = sort_parts(&tensors);
    problems.extend(unusable(&tensors));
    let mut adapters = BTreeMap::new();
    let mut scales = BTreeMap::new();
    for (path, part) in parts {
        let (Some(a), Some(b)) = (part.a, part.b) else {
            problems.push(format!("{path}: lora_A and lora_B must come together"));
            continue;
        };
        let fits = a.shape.len() == 2 && b.shape.len() == 2 && a.shape[0] == b.shape[1];
        if !fits || a.shape.contains(&0) || b.shape.contains(&0) {
            problems.push(format!(
                "{path}: expected lora_A (r, in) and lora_B (out, r), at least 1 of each, found {:?} and {:?}",
                a.shape, b.shape
            ));
            continue;
        }
        if dora && part.m.is_none() {
            problems.push(format!("{path}: use_dora is set, but lora_magnitude_vector is missing"));
        }
        if part.embedding && part.m.is_some() {
            problems.push(format!("{path}: DoRA on an embedding has no counterpart in mlx-lm's form"));
        }
        let scale = scaling.of(&path, a.shape[0]);
        let (a, b, magnitude) = (a.clone(), b.clone(), part.m.cloned());
        adapters.insert(path.clone(), StoredAdapter { a, b, turned: true, scale, magnitude });
        scales.insert(path, scale);
    }
    if adapters.is_empty() && problems.is_empty() {
        problems.push("the file holds no lora_A / lora_B tensors".into());
    }
    if !problems.is_empty() {
        return Err(Error::Mismatch { file: tensors_file, problems });
    }

    let common = scaling.alpha_over(scaling.rank, scaling.alpha);
    scales.retain(|_, s| *s != common);
    let fine_tune_type = if dora { FineTuneType::Dora } else { FineTuneType::Lora };
    let parameters = Some(LoraParameters {
        rank: i32::try_from(scaling.rank).unwrap_or(i32::MAX),
        scale: common,
        dropout: raw.get("lora_dropout").and_then(Value::as_f64).unwrap_or(0.0) as f32,
        keys: Some(block_keys(adapters.keys())),
    });
    // What PEFT said is kept, but apart: with its keys at the top the directory would be taken for PEFT's again.
    let mut config = AdapterConfig { fine_tune_type, num_layers: -1, parameters, scales, raw: Map::new() };
    config.set_extra("peft", raw.into());
    Ok(StoredSet { adapters, weights: BTreeMap::new(), config, metadata })
}

/// The tensors of one module.
#[derive(Default)]
struct Parts<'a> {
    a: Option<&'a Tensor>,
    b: Option<&'a Tensor>,
    m: Option<&'a Tensor>,
    embedding: bool,
}

/// Tensors by module path, and a sentence on each that is none of ours.
fn sort_parts(tensors: &BTreeMap<String, Tensor>) -> (BTreeMap<String, Parts<'_>>, Vec<String>) {
    let mut parts: BTreeMap<String, Parts> = BTreeMap::new();
    let mut problems = Vec::new();
    for (name, tensor) in tensors {
        let bare = name.strip_prefix("base_model.model.").unwrap_or(name);
        let bare = bare.strip_suffix(".weight").unwrap_or(bare);
        match bare.rsplit_once('.') {
            Some((path, "lora_A")) => parts.entry(path.into()).or_default().a = Some(tensor),
            Some((path, "lora_B")) => parts.entry(path.into()).or_default().b = Some(tensor),
            Some((path, "lora_magnitude_vector")) => parts.entry(path.into()).or_default().m = Some(tensor),
            Some((path, side @ ("lora_embedding_A" | "lora_embedding_B"))) => {
                let entry = parts.entry(path.into()).or_default();
                entry.embedding = true;
                if side.ends_with('A') { entry.a = Some(tensor) } else { entry.b = Some(tensor) }
            }
            _ => problems.push(format!(
                "{name}: not a LoRA or DoRA tensor (whole weights beside an adapter are not supported)"
            )),
        }
    }
    (parts, problems)
}

/// alpha, rank and their patterns: s of each module.
struct Scaling {
    rank: usize,
    alpha: f64,
    rslora: bool,
    alphas: Vec<(regex::Regex, f64)>,
}

impl Scaling {
    fn read(file: &Path, raw: &Map<String, Value>) -> Result<Self> {
        let number = |field: &str, default: f64| match raw.get(field) {
            None | Some(Value::Null) => Ok(default),
            Some(v) => v.as_f64().filter(|x| *x > 0.0).ok_or_else(|| Error::Config {
                file: file.to_path_buf(),
                field: field.to_owned(),
                expected: "a number above 0".into(),
                found: v.to_string(),
            }),
        };
        let mut alphas = Vec::new();
        if let Some(patterns) = raw.get("alpha_pattern").and_then(Value::as_object) {
            for (pattern, v) in patterns {
                let regex = regex::Regex::new(&format!(r"^(?:.*\.)?(?:{pattern})$"));
                let (Ok(regex), Some(alpha)) = (regex, v.as_f64()) else {
                    return Err(Error::Config {
                        file: file.to_path_buf(),
                        field: format!("alpha_pattern.{pattern}"),
                        expected: "a pattern of module names and a number".into(),
                        found: v.to_string(),
                    });
                };
                alphas.push((regex, alpha));
            }
        }
        Ok(Self {
            rank: number("r", 8.0)? as usize,
            alpha: number("lora_alpha", 8.0)?,
            rslora: raw.get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
            alphas,
        })
    }

    /// s of a module; its rank is read off the tensor, which a rank pattern must agree with anyway.
    fn of(&self, path: &str, rank: usize) -> f32 {
        let alpha =
            self.alphas.iter().find(|(regex, _)| regex.is_match(path)).map_or(self.alpha, |(_, a)| *a);
        self.alpha_over(rank, alpha)
    }

    fn alpha_over(&self, rank: usize, alpha: f64) -> f32 {
        let rank = rank as f64;
        (if self.rslora { alpha / rank.sqrt() } else { alpha / rank }) as f32
    }
}

/// Refuses every option that would be silently wrong.
fn refuse(file: &Path, raw: &Map<String, Value>) -> Result<()> {
    let unsupported = |what: String, why: &str| Error::Unsupported {
        file: file.to_path_buf(),
        what,
        why: format!("{why}; merge it with PEFT and convert the result"),
    };
    let kind = raw.get("peft_type").and_then(Value::as_str).unwrap_or("?");
    if kind != "LORA" {
        return Err(unsupported(format!("peft_type {kind}"), "only LORA (with or without use_dora) is read"));
    }
    for (option, why) in REFUSED {
        let unset = match raw.get(option) {
            None | Some(Value::Null | Value::Bool(false)) => true,
            Some(Value::Array(list)) => list.is_empty(),
            Some(Value::Object(map)) => map.is_empty(),
            Some(_) => false,
        };
        if !unset {
            return Err(unsupported(format!("option `{option}`"), why));
        }
    }
    if raw.get("bias").and_then(Value::as_str).is_some_and(|b| b != "none") {
        return Err(unsupported("option `bias`".into(), "biases of the base were trained"));
    }
    let init = raw.get("init_lora_weights").and_then(Value::as_str).unwrap_or_default();
    if REWRITES_BASE.iter().any(|name| init.to_lowercase().starts_with(name)) {
        return Err(unsupported(
            format!("init_lora_weights {init:?}"),
            "it rewrites the base, so the adapter means nothing on the original weights",
        ));
    }
    Ok(())
}

/// Block-relative keys (`self_attn.q_proj`), each once, as mlx-lm's `keys` wants them.
fn block_keys<'a>(paths: impl Iterator<Item = &'a String>) -> Vec<String> {
    let mut keys: Vec<String> = paths
        .map(|path| {
            let inner = path.split_once(".layers.").and_then(|(_, rest)| rest.split_once('.'));
            inner.map_or_else(|| path.clone(), |(_, key)| key.to_owned())
        })
        .collect();
    keys.sort();
    keys.dedup();
    keys
}
