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
//! | `<prefix><path>.weight`, `.bias` (`modules_to_save`) | whole weights beside the updates |
//!
//! A LoRA of the embedding, or a whole one, of a base whose head is the embedding means two things: PEFT leaves the head as it
//! was unless `ensure_weight_tying` is set, mlx-lm and we change it, too. Where PEFT leaves it, the set says so
//! ([`AdapterSet::leaves_head`](crate::AdapterSet::leaves_head)), and a base with a tied head is refused. Where PEFT changes it, the file has A and B of the
//! embedding once more, turned, as those of the head; here they stand once.
//!
//! The prefix is `base_model.model.`. Source: PEFT's `tuners/lora` and `utils/save_and_load.py`. What our form has no place
//! for goes into the metadata of the tensors, so that `peft_write` gives the same bytes again.

use std::collections::BTreeMap;
use std::path::Path;

use graft_quant::Tensor;
use serde_json::{Map, Value, json};

use crate::config::block_keys;
use crate::set::{EMBEDDING, UNTIED_HEAD, WHOLE, note_dtypes, updates_embedding};
use crate::stored::unusable;
use crate::{AdapterConfig, Error, FineTuneType, LoraParameters, Result, StoredAdapter, StoredSet};

/// PEFT's name of the tensors.
pub(crate) const TENSORS: &str = "adapter_model.safetensors";
/// What PEFT puts before a module's path.
pub(crate) const PREFIX: &str = "base_model.model.";
/// Keys in the metadata of our tensors: PEFT's config as text, and names of tensors that are not the usual ones, by ours.
pub(crate) const PEFT_CONFIG: &str = "peft_config";
pub(crate) const PEFT_NAMES: &str = "peft_names";
/// Keys in the metadata of PEFT's tensors, written by us: our config and metadata.
pub(crate) const GRAFT_CONFIG: &str = "graft_config";
pub(crate) const GRAFT_METADATA: &str = "graft_metadata";

/// Options that change the maths in a way that W + s B A (and m) cannot express, with the reason.
const REFUSED: [(&str, &str); 11] = [
    ("fan_in_fan_out", "the base stores its weights transposed"),
    ("lora_bias", "the update has a bias of its own"),
    ("use_qalora", "A acts on pooled inputs"),
    ("alora_invocation_tokens", "the adapter acts only after its invocation tokens"),
    ("layer_replication", "the base is not the stored one"),
    ("trainable_token_indices", "single embedding rows were trained"),
    ("target_parameters", "expert weights were adapted"),
    ("use_bdlora", "the update is block-diagonal"),
    ("kasa_config", "the update has singular values of its own"),
    ("arrow_config", "several adapters are routed per token"),
    ("monteclora_config", "the update is stochastic"),
];

/// Initialisations that rewrite the base: such an adapter means nothing on the original weights.
const REWRITES_BASE: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

/// Reads a PEFT directory.
pub(crate) fn load(dir: &Path, file: &Path, raw: &Map<String, Value>) -> Result<StoredSet> {
    refuse(file, raw)?;
    let tensors_file = dir.join(TENSORS);
    if !tensors_file.is_file() {
        return Err(Error::NotAnAdapter { dir: dir.to_path_buf(), missing: TENSORS.into() });
    }
    let (tensors, theirs) = graft_quant::read_safetensors(&tensors_file)?;
    let scaling = Scaling::read(file, raw)?;
    let dora = uses_dora(raw);

    let mut sorted = sort(&tensors);
    let tying = ties_head(raw);
    if tying {
        sorted.leave_out_tied_head();
    }
    let Sorted { parts, whole, mut names, mut problems } = sorted;
    problems.extend(unusable(&tensors));
    problems.extend(not_saved(raw, &whole));
    let (mut adapters, mut dtypes) = (BTreeMap::new(), BTreeMap::new());
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
        if !dora && part.m.is_some() {
            problems.push(format!("{path}: lora_magnitude_vector is there, but use_dora is not set"));
        }
        if part.embedding && part.m.is_some() {
            problems.push(format!("{path}: DoRA on an embedding has no counterpart in mlx-lm's form"));
        }
        let scale = scaling.of(&path, a.shape[0]);
        for (tensor, own) in [(Some(a), "lora_a"), (Some(b), "lora_b"), (part.m, "m")] {
            dtypes.extend(tensor.map(|tensor| (format!("{path}.{own}"), tensor.dtype)));
        }
        let (a, b, magnitude) = (a.clone(), b.clone(), part.m.cloned());
        adapters.insert(path, StoredAdapter { a, b, turned: true, scale, magnitude });
    }
    if adapters.is_empty() && problems.is_empty() {
        problems.push("the file holds no lora_A / lora_B tensors".into());
    }
    if !problems.is_empty() {
        return Err(Error::Mismatch { file: tensors_file, problems });
    }
    if let Some(set) = ours(&theirs, &adapters, &whole, &dtypes) {
        return Ok(set);
    }

    let common = scaling.alpha_over(scaling.rank, scaling.alpha);
    let scales = adapters.iter().map(|(path, a)| (path.clone(), a.scale)).filter(|(_, s)| *s != common);
    let parameters = Some(LoraParameters {
        rank: i32::try_from(scaling.rank).unwrap_or(i32::MAX),
        scale: common,
        dropout: raw.get("lora_dropout").and_then(Value::as_f64).unwrap_or(0.0) as f32,
        keys: Some(block_keys(adapters.keys().map(String::as_str))),
    });
    let fine_tune_type = if dora { FineTuneType::Dora } else { FineTuneType::Lora };
    let scales = scales.collect();
    let mut config = AdapterConfig { fine_tune_type, num_layers: -1, parameters, scales, raw: Map::new() };
    if !whole.is_empty() {
        config.set_extra(WHOLE, whole.keys().cloned().collect::<Vec<_>>().into());
    }
    if !tying && updates_embedding(adapters.keys().chain(whole.keys())) {
        config.set_extra(UNTIED_HEAD, true.into());
    }
    let text =
        std::fs::read_to_string(file).map_err(|source| Error::Io { path: file.to_path_buf(), source })?;
    let mut metadata =
        BTreeMap::from([("format".to_owned(), "mlx".to_owned()), (PEFT_CONFIG.to_owned(), text)]);
    // The usual metadata of PEFT's file is written anew; another one is kept beside the names.
    if theirs != usual_metadata() {
        names.insert(String::new(), json!(theirs).to_string());
    }
    if !names.is_empty() {
        metadata.insert(PEFT_NAMES.into(), json!(names).to_string());
    }
    note_dtypes(&mut metadata, &dtypes);
    Ok(StoredSet { adapters, weights: whole, config, metadata })
}

/// What PEFT's own file says beside its tensors.
pub(crate) fn usual_metadata() -> BTreeMap<String, String> {
    BTreeMap::from([("format".to_owned(), "pt".to_owned())])
}

/// The set as we exported it, if the file still is that export: what it says fits the tensors.
fn ours(
    theirs: &BTreeMap<String, String>,
    adapters: &BTreeMap<String, StoredAdapter>,
    whole: &BTreeMap<String, Tensor>,
    dtypes: &BTreeMap<String, graft_quant::StoredDtype>,
) -> Option<StoredSet> {
    let raw = serde_json::from_str(theirs.get(GRAFT_CONFIG)?).ok()?;
    let config = AdapterConfig::from_map(Path::new(GRAFT_CONFIG), raw).ok()?;
    let mut metadata: BTreeMap<String, String> = serde_json::from_str(theirs.get(GRAFT_METADATA)?).ok()?;
    if adapters.iter().any(|(path, adapter)| config.scale_of(path) != adapter.scale) {
        return None;
    }
    note_dtypes(&mut metadata, dtypes);
    Some(StoredSet { adapters: adapters.clone(), weights: whole.clone(), config, metadata })
}

/// Whether a PEFT config says DoRA.
pub(crate) fn uses_dora(raw: &Map<String, Value>) -> bool {
    raw.get("use_dora").and_then(Value::as_bool).unwrap_or(false)
}

/// Whether a PEFT config says that what is tied to the embedding gets its update, too.
pub(crate) fn ties_head(raw: &Map<String, Value>) -> bool {
    raw.get("ensure_weight_tying").and_then(Value::as_bool).unwrap_or(false)
}

/// A sentence on each module of `modules_to_save` of which the file has no weight.
fn not_saved(raw: &Map<String, Value>, whole: &BTreeMap<String, Tensor>) -> Vec<String> {
    let is = |module: &str, name: &String| {
        let path = name.rsplit_once('.').map_or("", |(path, _)| path);
        path.strip_suffix(module).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    };
    let named = raw.get("modules_to_save").and_then(Value::as_array).into_iter().flatten();
    let missing = named.filter_map(Value::as_str).filter(|module| !whole.keys().any(|name| is(module, name)));
    missing
        .map(|module| format!("{module}: modules_to_save names it, but the file has no weight of it"))
        .collect()
}

/// The tensors of one module.
#[derive(Default)]
struct Parts<'a> {
    a: Option<&'a Tensor>,
    b: Option<&'a Tensor>,
    m: Option<&'a Tensor>,
    embedding: bool,
}

/// The tensors of a file by what they are.
#[derive(Default)]
struct Sorted<'a> {
    /// By module path.
    parts: BTreeMap<String, Parts<'a>>,
    /// Whole weights by name, without the prefix.
    whole: BTreeMap<String, Tensor>,
    /// Names that are not as PEFT writes them today, by ours.
    names: BTreeMap<String, String>,
    /// A sentence on each tensor that is none of these.
    problems: Vec<String>,
}

/// Our names of what PEFT has of a head that is tied to the embedding, and of which part of the embedding each is the same.
pub(crate) const TIED_HEAD: [(&str, &str); 3] =
    [("lm_head.lora_a", "lora_b"), ("lm_head.lora_b", "lora_a"), ("lm_head.weight", "weight")];

impl Sorted<'_> {
    /// Takes out the head's copies of the embedding's update or whole weight; their names stay, for the way back.
    fn leave_out_tied_head(&mut self) {
        let embedding = self.parts.iter().find(|(path, _)| path.ends_with(EMBEDDING));
        let turned =
            |a: Option<&Tensor>, b: Option<&Tensor>| matches!((a, b), (Some(a), Some(b)) if are_turned(a, b));
        let same = match (embedding, self.parts.get("lm_head")) {
            (Some((_, own)), Some(head)) => turned(head.a, own.b) && turned(head.b, own.a),
            _ => false,
        };
        if same {
            self.parts.remove("lm_head");
            for (name, _) in &TIED_HEAD[..2] {
                self.names.entry((*name).into()).or_insert_with(|| tensor_name(name, false));
            }
        }
        let whole = self.whole.iter().find(|(name, _)| name.ends_with(&format!("{EMBEDDING}.weight")));
        if whole.is_some_and(|(_, own)| self.whole.get("lm_head.weight") == Some(own)) {
            self.whole.remove("lm_head.weight");
            self.names.entry("lm_head.weight".into()).or_insert_with(|| format!("{PREFIX}lm_head.weight"));
        }
    }
}

/// Whether two matrices are each other's transposes, bit for bit.
fn are_turned(a: &Tensor, b: &Tensor) -> bool {
    let (&[rows, columns], &[other_rows, other_columns]) = (&a.shape[..], &b.shape[..]) else { return false };
    if (rows, columns) != (other_columns, other_rows) || a.dtype != b.dtype {
        return false;
    }
    let size = a.data.len().checked_div(rows * columns).unwrap_or(0);
    let at = |i: usize| i * size..(i + 1) * size;
    (0..rows * columns).all(|i| a.data[at(i)] == b.data[at(i % columns * rows + i / columns)])
}

fn sort(tensors: &BTreeMap<String, Tensor>) -> Sorted<'_> {
    let mut sorted = Sorted::default();
    for (name, tensor) in tensors {
        let bare = name.strip_prefix(PREFIX).unwrap_or(name);
        let stem = bare.strip_suffix(".weight").unwrap_or(bare);
        let (path, part) = stem.rsplit_once('.').unwrap_or(("", stem));
        let own = match part {
            "lora_A" | "lora_embedding_A" => format!("{path}.lora_a"),
            "lora_B" | "lora_embedding_B" => format!("{path}.lora_b"),
            "lora_magnitude_vector" => format!("{path}.m"),
            _ if bare.ends_with(".base_layer.weight") => {
                sorted.problems.push(format!(
                    "{name}: a copy of the base's own weight beside its update; save the adapter with \
                     save_embedding_layers=False"
                ));
                continue;
            }
            _ if !bare.contains(".lora_") && (bare.ends_with(".weight") || bare.ends_with(".bias")) => {
                sorted.whole.insert(bare.to_owned(), tensor.clone());
                if *name != format!("{PREFIX}{bare}") {
                    sorted.names.insert(bare.to_owned(), name.clone());
                }
                continue;
            }
            _ => {
                sorted
                    .problems
                    .push(format!("{name}: not a LoRA or DoRA tensor, nor a whole weight or bias"));
                continue;
            }
        };
        let embedding = part.starts_with("lora_embedding");
        let parts = sorted.parts.entry(path.to_owned()).or_default();
        parts.embedding |= embedding;
        match part.strip_prefix("lora_embedding_").or(part.strip_prefix("lora_")) {
            Some("A") => parts.a = Some(tensor),
            Some("B") => parts.b = Some(tensor),
            _ => parts.m = Some(tensor),
        }
        if *name != tensor_name(&own, embedding) {
            sorted.names.insert(own, name.clone());
        }
    }
    sorted
}

/// PEFT's name of one of our tensors; A and B of an embedding have names of their own.
pub(crate) fn tensor_name(own: &str, embedding: bool) -> String {
    let (path, part) = own.rsplit_once('.').unwrap_or(("", own));
    let part = match (part, embedding) {
        ("lora_a", false) => "lora_A.weight",
        ("lora_b", false) => "lora_B.weight",
        ("lora_a", true) => "lora_embedding_A",
        ("lora_b", true) => "lora_embedding_B",
        ("m", _) => "lora_magnitude_vector",
        (other, _) => other,
    };
    format!("{PREFIX}{path}.{part}")
}

/// alpha, rank and their patterns: s of each module.
pub(crate) struct Scaling {
    rank: usize,
    alpha: f64,
    rslora: bool,
    alphas: Vec<(regex::Regex, f64)>,
}

impl Scaling {
    pub(crate) fn read(file: &Path, raw: &Map<String, Value>) -> Result<Self> {
        let number =
            |field: &str, default: f64, (allowed, expected): (fn(f64) -> bool, &str)| match raw.get(field) {
                None | Some(Value::Null) => Ok(default),
                Some(v) => v.as_f64().filter(|x| allowed(*x)).ok_or_else(|| Error::Config {
                    file: file.to_path_buf(),
                    field: field.to_owned(),
                    expected: expected.into(),
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
            rank: number("r", 8.0, (|r| r > 0.0, "a number above 0"))? as usize,
            alpha: number("lora_alpha", 8.0, (f64::is_finite, "a number"))?,
            rslora: raw.get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
            alphas,
        })
    }

    /// s of a module; its rank is read off the tensor, which a rank pattern must agree with anyway.
    pub(crate) fn of(&self, path: &str, rank: usize) -> f32 {
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
