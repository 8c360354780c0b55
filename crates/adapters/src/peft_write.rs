//! PEFT's adapter directory, written: the reverse of `peft`, so that a directory that went through both is the same again.
//!
//! An adapter that was read from PEFT's form gets back PEFT's config as it was and the names and types of its tensors. One
//! that was not carries our config in the metadata of the file, where PEFT does not look and from where `peft` takes it.

use std::collections::BTreeMap;
use std::path::Path;

use graft_quant::{DirWriter, Tensor};
use serde_json::{Map, Value, json};

use crate::peft::{
    GRAFT_CONFIG, GRAFT_METADATA, PEFT_CONFIG, PEFT_NAMES, PREFIX, Scaling, TENSORS, TIED_HEAD, tensor_name,
    uses_dora, usual_metadata,
};
use crate::set::{EMBEDDING, HEAD};
use crate::{AdapterSet, CONFIG_FILE, Error, FineTuneType, Fingerprint, Provenance, Result};

/// Writes `set` as PEFT's adapter directory at `target`, whole or not at all; `origin` is what errors call the set, and
/// `made_of` goes into the metadata of the tensors where they are not PEFT's own ones again.
///
/// # Errors
/// When PEFT has no form for it, or the target exists.
pub fn export(set: &AdapterSet, origin: &Path, made_of: &Provenance, target: &Path) -> Result<()> {
    refuse(set, origin)?;
    let kept = kept(set);
    let ties = kept.is_none() && ties_head(set);
    let names = kept.as_ref().map(|kept| kept.names.clone()).unwrap_or_default();
    let mut tensors = BTreeMap::new();
    let own_tensors = set.tensors()?;
    for (head, part) in TIED_HEAD {
        // The head's copy lies as the embedding's own part does in our form.
        let name = names.get(head).cloned().or_else(|| ties.then(|| tensor_name(head, false)));
        let source = own_tensors.iter().find(|(own, _)| own.ends_with(&format!("{EMBEDDING}.{part}")));
        if let (Some(name), Some((_, tensor)), false) = (name, source, own_tensors.contains_key(head)) {
            tensors.insert(name, tensor.clone());
        }
    }
    for (own, tensor) in own_tensors {
        let (path, _) = own.rsplit_once('.').unwrap_or(("", &own));
        let turned = !set.weights.contains_key(&own) && !own.ends_with(".m");
        let usual = if set.weights.contains_key(&own) {
            format!("{PREFIX}{own}")
        } else {
            tensor_name(&own, is_embedding(path))
        };
        let tensor = if turned { transposed(&tensor)? } else { tensor };
        tensors.insert(names.get(&own).cloned().unwrap_or(usual), tensor);
    }
    let (text, metadata) = match kept {
        Some(kept) => (kept.text, kept.metadata),
        None => {
            let mut metadata = usual_metadata();
            metadata.insert(GRAFT_CONFIG.into(), Value::Object(set.config.to_map()).to_string());
            metadata.insert(GRAFT_METADATA.into(), json!(set.file_metadata()).to_string());
            metadata.insert(format!("graft_{}", Provenance::KEY), json!(made_of).to_string());
            (config(set), metadata)
        }
    };
    let mut dir = DirWriter::create(target, false)?;
    dir.write_file(TENSORS, &graft_quant::safetensors_bytes(&tensors, &metadata)?)?;
    dir.write_file(CONFIG_FILE, text.as_bytes())?;
    Ok(dir.finish()?)
}

/// Embeddings have names of their own in PEFT; the base's names decide, as no network is built here.
fn is_embedding(path: &str) -> bool {
    path.ends_with(EMBEDDING)
}

/// Whether PEFT must change a tied head with the embedding, as we do. One that has an update of its own is not tied.
fn ties_head(set: &AdapterSet) -> bool {
    set.adapters.keys().any(|path| is_embedding(path))
        && !set.leaves_head()
        && !set.adapters.contains_key(HEAD)
}

/// Refuses what PEFT has no form for, by name.
fn refuse(set: &AdapterSet, origin: &Path) -> Result<()> {
    let refuse = |what: &str, why: String| {
        Err(Error::Unsupported { file: origin.to_path_buf(), what: what.into(), why })
    };
    if set.config.fine_tune_type == FineTuneType::Full || set.adapters.is_empty() {
        return refuse("a full fine-tune", "PEFT's LoRA is a low-rank update: fuse it into the base".into());
    }
    let dora = |wanted: bool| set.adapters.iter().find(|(_, a)| a.magnitude.is_some() == wanted);
    if let (Some((with, _)), Some((without, _))) = (dora(true), dora(false)) {
        let why =
            format!("{with} has a magnitude and {without} has none, and PEFT's use_dora is for all modules");
        return refuse("DoRA on some modules only", why);
    }
    if let Some((path, _)) = dora(true).filter(|(path, _)| is_embedding(path)) {
        return refuse(
            &format!("{path} with a magnitude"),
            "PEFT norms an embedding's columns, not its rows".into(),
        );
    }
    Ok(())
}

/// What a set remembers of the PEFT directory it was read from.
struct Kept {
    text: String,
    names: BTreeMap<String, String>,
    metadata: BTreeMap<String, String>,
}

/// What is remembered, if it still describes the set: another scale or kind since then makes it another adapter.
fn kept(set: &AdapterSet) -> Option<Kept> {
    let text = set.metadata.get(PEFT_CONFIG)?;
    let raw: Map<String, Value> = serde_json::from_str(text).ok()?;
    let scaling = Scaling::read(Path::new(PEFT_CONFIG), &raw).ok()?;
    let dora = uses_dora(&raw);
    let same = set.adapters.iter().all(|(path, adapter)| {
        scaling.of(path, adapter.rank() as usize) == adapter.scale && adapter.magnitude.is_some() == dora
    });
    let names = set.metadata.get(PEFT_NAMES).map(|names| serde_json::from_str(names)).transpose().ok()?;
    let mut names: BTreeMap<String, String> = names.unwrap_or_default();
    let metadata = names.remove("").and_then(|text| serde_json::from_str(&text).ok());
    let metadata = metadata.unwrap_or_else(usual_metadata);
    same.then(|| Kept { text: text.clone(), names, metadata })
}

/// adapter_config.json as PEFT writes it: keys sorted, two spaces.
fn config(set: &AdapterSet) -> String {
    let ranks: BTreeMap<&String, i32> = set.adapters.iter().map(|(path, a)| (path, a.rank())).collect();
    let common = set.config.parameters.as_ref();
    let rank = common.map(|p| p.rank).filter(|r| ranks.values().any(|own| own == r));
    let rank = rank.or_else(|| ranks.values().max().copied()).unwrap_or(1);
    // In f64 the product is exact, and so is its quotient by the rank.
    let alpha = |scale: f32, rank: i32| f64::from(scale) * f64::from(rank);
    let scale = common.map_or(1.0, |p| p.scale);
    let (mut rank_pattern, mut alpha_pattern) = (Map::new(), Map::new());
    for (path, adapter) in &set.adapters {
        if ranks[path] != rank {
            rank_pattern.insert(path.clone(), ranks[path].into());
        }
        let own = alpha(adapter.scale, ranks[path]);
        if own != alpha(scale, rank) {
            alpha_pattern.insert(path.clone(), number(own));
        }
    }
    let mut whole: Vec<&str> = set.weights.keys().filter_map(|name| Some(name.rsplit_once('.')?.0)).collect();
    whole.dedup();
    let base = Fingerprint::read(&set.config).map(|base| base.lineage);
    let base = base.or_else(|| set.config.raw.get("model").and_then(Value::as_str).map(str::to_owned));
    let dropout = common.map_or(0.0, |p| p.dropout);
    let fields = json!({
        "alpha_pattern": alpha_pattern,
        "base_model_name_or_path": base,
        "bias": "none",
        "ensure_weight_tying": ties_head(set),
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "lora_alpha": number(alpha(scale, rank)),
        "lora_dropout": number(dropout.to_string().parse().unwrap_or(0.0)),
        "modules_to_save": if whole.is_empty() { Value::Null } else { json!(whole) },
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "target_modules": set.adapters.keys().collect::<Vec<_>>(),
        "task_type": "CAUSAL_LM",
        "use_dora": set.adapters.values().any(|adapter| adapter.magnitude.is_some()),
        "use_rslora": false,
    });
    format!("{fields:#}")
}

/// A whole number without a point, as Python's integers are.
fn number(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { (x as i64).into() } else { json!(x) }
}

/// A matrix turned, in its own type.
fn transposed(tensor: &Tensor) -> Result<Tensor> {
    Ok(Tensor::from_array(&tensor.to_array()?.transpose()?)?)
}
