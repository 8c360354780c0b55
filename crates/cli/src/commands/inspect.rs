//! `graft inspect`: what a model or adapter directory holds, without loading its weights into a network.

use crate::args::InspectArgs;
use crate::settings::object;
use crate::{hub, ui};
use anyhow::{Result, bail};
use graft_adapters::{AdapterSet, CONFIG_FILE, Fingerprint};
use graft_quant::Checkpoint;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// Prints the report of the directory, as JSON or for people.
pub(crate) fn inspect(args: &InspectArgs) -> Result<()> {
    let model = hub::resolve(&args.path, hub::What::Model);
    let dir = match model {
        Ok(dir) => dir,
        Err(error) => hub::resolve(&args.path, hub::What::Adapter).map_err(|_| error)?,
    };
    let report = if dir.join(CONFIG_FILE).is_file() {
        adapter(&dir)?
    } else if dir.join("config.json").is_file() {
        model_report(&dir)?
    } else {
        bail!("{} holds neither config.json (a model) nor {CONFIG_FILE} (an adapter)", dir.display());
    };
    if args.json {
        ui::out(&serde_json::to_string_pretty(&report)?);
        return Ok(());
    }
    for (key, value) in &report {
        match value {
            Value::Null => {}
            Value::Array(rows) => {
                ui::out(&format!("{key}:"));
                let cells =
                    |row: &Value| row.as_object().map(|r| r.values().map(text).collect()).unwrap_or_default();
                let table: Vec<Vec<String>> = rows.iter().map(cells).collect();
                ui::table(&table).lines().for_each(|l| ui::out(&format!("  {l}")));
            }
            Value::Object(map) => {
                let parts: Vec<String> = map.iter().map(|(k, v)| format!("{k} {}", text(v))).collect();
                ui::out(&format!("{:<16}{}", key, parts.join(", ")));
            }
            value => ui::out(&format!("{:<16}{}", key, text(value))),
        }
    }
    Ok(())
}

fn text(value: &Value) -> String {
    match value {
        Value::String(s) => s.clone(),
        Value::Null => "-".into(),
        other => other.to_string(),
    }
}

/// How a matrix is stored, as the histogram names it.
fn form(checkpoint: &Checkpoint, path: &str) -> Result<String> {
    let dense =
        || checkpoint.info(&format!("{path}.weight")).map(|info| format!("{:?}", info.dtype).to_lowercase());
    Ok(checkpoint.grid(path)?.map(|grid| grid.to_string()).or_else(dense).unwrap_or_default())
}

fn model_report(dir: &Path) -> Result<Map<String, Value>> {
    let checkpoint = Checkpoint::open(dir)?;
    let config = checkpoint.config();
    let supported = graft_model::config_from_map(&dir.join("config.json"), config);
    let mut histogram: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    let (mut parameters, mut matrices) = (0u64, 0u64);
    for (path, (out, input)) in checkpoint.module_shapes() {
        let count = out as u64 * input as u64;
        let entry = histogram.entry(form(&checkpoint, &path)?).or_default();
        *entry = (entry.0 + 1, entry.1 + count);
        parameters += count;
        matrices += 1;
    }
    let (mut bytes, mut others) = (0u64, 0u64);
    for info in checkpoint.names().filter_map(|n| checkpoint.info(n)) {
        bytes += info.range.end.saturating_sub(info.range.start);
        others += u64::from(info.shape.len() == 1) * info.shape.iter().product::<usize>() as u64;
    }
    let field = |key: &str| config.get(key).cloned().unwrap_or(Value::Null);
    let rows: Vec<Value> = histogram
        .into_iter()
        .map(|(bits, (tensors, count))| {
            json!({"bits": bits, "matrices": tensors, "parameters": count,
                "share": format!("{:.1} %", 100.0 * count as f64 / parameters.max(1) as f64)})
        })
        .collect();
    let report = json!({
        "kind": "model", "path": dir.display().to_string(), "model_type": field("model_type"),
        "runs": match &supported { Ok(_) => "yes".to_string(), Err(e) => format!("no: {e}") },
        "parameters": parameters + others, "matrices": matrices, "weight_bytes": bytes,
        "bits_per_weight": (8.0 * bytes as f64 / (parameters + others).max(1) as f64 * 100.0).round() / 100.0,
        "layers": field("num_hidden_layers"), "hidden_size": field("hidden_size"),
        "vocab_size": field("vocab_size"), "max_positions": field("max_position_embeddings"),
        "tied_head": field("tie_word_embeddings"), "files": checkpoint.files().count(), "bits": rows,
    });
    Ok(object(report))
}

fn adapter(dir: &Path) -> Result<Map<String, Value>> {
    let set = AdapterSet::load(dir)?;
    let mut targets: BTreeMap<String, (u64, i32)> = BTreeMap::new();
    let mut parameters = 0u64;
    for (path, adapter) in &set.adapters {
        // `model.layers.3.self_attn.q_proj` counts as `self_attn.q_proj`.
        let mut parts = path.split('.').skip_while(|p| p.parse::<u32>().is_err()).skip(1).peekable();
        let name = if parts.peek().is_some() { parts.collect::<Vec<_>>().join(".") } else { path.clone() };
        let entry = targets.entry(name).or_default();
        *entry = (entry.0 + 1, entry.1.max(adapter.rank()));
        parameters += adapter.arrays().map(|a| a.size() as u64).sum::<u64>();
    }
    parameters += set.weights.values().map(|t| t.len() as u64).sum::<u64>();
    let rows: Vec<Value> = targets
        .into_iter()
        .map(|(target, (modules, rank))| json!({"target": target, "modules": modules, "rank": rank}))
        .collect();
    let lora = set.config.parameters.as_ref();
    let base = set.config.extra(Fingerprint::KEY).cloned();
    let report = json!({
        "kind": "adapter", "path": dir.display().to_string(), "fine_tune_type": set.config.fine_tune_type.name(),
        "rank": lora.map(|l| l.rank), "scale": lora.map(|l| f64::from(l.scale)), "num_layers": set.config.num_layers,
        "parameters": parameters, "modules": set.adapters.len(),
        "base": base.or_else(|| set.config.raw.get("model").cloned()), "targets": rows,
    });
    Ok(object(report))
}
