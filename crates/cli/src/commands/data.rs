//! The rows of a run: `--data`, or the settings' `hf_dataset` with its splits and slices.

use crate::errors::Usage;
use crate::hub::{self, What};
use crate::settings::Settings;
use anyhow::{Result, bail};
use graft_train::{Data, DataConfig, Encoder, Row, Split, read_rows};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// Reads the splits that the settings need; the others stay empty.
pub(crate) fn load(settings: &Settings, encoder: &dyn Encoder) -> Result<Data> {
    let described: Option<Vec<&Map<String, Value>>> = match settings.all.get("hf_dataset") {
        Some(Value::Array(list)) => Some(list.iter().filter_map(Value::as_object).collect()),
        other => other.and_then(Value::as_object).map(|one| vec![one]),
    };
    let (train, test) = (settings.flag("train"), settings.flag("test"));
    if let Some(parts) = described {
        let split = |name: &str, needed: bool| {
            if needed { described_split(&parts, name, settings, encoder) } else { Ok(empty(name)) }
        };
        return Ok(Data {
            train: split("train", train)?,
            valid: split("valid", train)?,
            test: split("test", test)?,
        });
    }
    let dir = hub::resolve(settings.text("data").unwrap_or_default(), What::Data)?;
    let config = features(settings, &Map::new());
    let split = |name: &str, needed: bool| {
        let file = dir.join(format!("{name}.jsonl"));
        if needed { Split::load(&file, encoder, &config) } else { Ok(empty(name)) }
    };
    Ok(Data { train: split("train", train)?, valid: split("valid", train)?, test: split("test", test)? })
}

/// How rows are read, as a data set's `own` settings say, else those of the run.
pub(super) fn features(settings: &Settings, own: &Map<String, Value>) -> DataConfig {
    let mask = own.get("mask_prompt").and_then(Value::as_bool);
    let limit = usize::try_from(settings.int("max_seq_length")).unwrap_or_default();
    let mut config = DataConfig::new(mask.unwrap_or_else(|| settings.flag("mask_prompt")), limit);
    // The recipe's own mask is for rows that have a prompt.
    config.whole_texts = settings.mask_is_default && mask.is_none();
    for (name, key) in [
        ("prompt_feature", &mut config.prompt_feature),
        ("completion_feature", &mut config.completion_feature),
        ("chat_feature", &mut config.chat_feature),
        ("text_feature", &mut config.text_feature),
    ] {
        if let Some(given) = own.get(name).and_then(Value::as_str).or_else(|| settings.text(name)) {
            given.clone_into(key);
        }
    }
    config
}

fn empty(name: &str) -> Split {
    Split { file: name.into(), ..Split::default() }
}

/// One split of all data sets that `hf_dataset` lists, one after another.
fn described_split(
    parts: &[&Map<String, Value>],
    name: &str,
    settings: &Settings,
    encoder: &dyn Encoder,
) -> Result<Split> {
    let mut whole: Option<Split> = None;
    for part in parts {
        let Some(path) = part.get("path").and_then(Value::as_str) else {
            bail!(Usage(
                "hf_dataset: `path` is required and must be a directory or a Hugging Face data set id".into()
            ));
        };
        let default = match name {
            "train" => Some("train[:80%]"),
            "valid" => Some("train[-10%:]"),
            _ => None,
        };
        let spec = part.get(&format!("{name}_split")).and_then(Value::as_str).or(default);
        let Some(spec) = spec else { continue };
        let (file, rows) = slice(&hub::resolve(path, What::Data)?, spec)?;
        let split = Split::from_rows(&file, &rows, encoder, &features(settings, part))?;
        match &mut whole {
            None => whole = Some(split),
            Some(whole) => {
                whole.examples.extend(split.examples);
                whole.skipped.extend(split.skipped);
                whole.warnings.extend(split.warnings);
            }
        }
    }
    Ok(whole.unwrap_or_else(|| empty(name)))
}

/// `train[:80%]`: the file train.jsonl and the rows of the slice.
fn slice(dir: &Path, spec: &str) -> Result<(PathBuf, Vec<Row>)> {
    let (name, range) = match spec.split_once('[') {
        Some((name, rest)) => (name, rest.strip_suffix(']').unwrap_or("?")),
        None => (spec, ":"),
    };
    let file = [name, if name == "validation" { "valid" } else { name }]
        .iter()
        .map(|n| dir.join(format!("{n}.jsonl")))
        .find(|f| f.exists())
        .unwrap_or_else(|| dir.join(format!("{name}.jsonl")));
    let rows = read_rows(&file)?;
    let bound = |text: &str, default: usize| -> Option<usize> {
        if text.is_empty() {
            return Some(default);
        }
        let (number, share) = text.strip_suffix('%').map_or((text, false), |n| (n, true));
        let number = number.parse::<i64>().ok()?;
        let n = rows.len() as i64;
        let at = if share { (number as f64 / 100.0 * n as f64).round() as i64 } else { number };
        usize::try_from(if at < 0 { (n + at).max(0) } else { at.min(n) }).ok()
    };
    let bounds = range.split_once(':').and_then(|(a, b)| Some((bound(a, 0)?, bound(b, rows.len())?)));
    let Some((from, to)) = bounds else {
        bail!(Usage(format!(
            "hf_dataset: the split `{spec}` is not of the form `train`, `train[:80%]` or `train[100:200]`"
        )));
    };
    let rows = rows.get(from..to.max(from)).unwrap_or_default().to_vec();
    Ok((file, rows))
}

#[cfg(test)]
mod tests {
    #[test]
    fn slices_are_those_of_the_datasets_library() {
        let dir = tempfile::tempdir().unwrap();
        let lines: Vec<String> = (0..10).map(|i| format!("{{\"text\": \"{i}\"}}")).collect();
        std::fs::write(dir.path().join("train.jsonl"), lines.join("\n")).unwrap();
        let of = |spec: &str| {
            super::slice(dir.path(), spec).map(|(_, r)| r.iter().map(|r| r.line).collect::<Vec<_>>())
        };
        assert_eq!(of("train[:80%]").unwrap(), (1..=8).collect::<Vec<_>>());
        assert_eq!(of("train[-10%:]").unwrap(), [10]);
        assert_eq!(of("train[2:4]").unwrap(), [3, 4]);
        assert_eq!(of("train").unwrap().len(), 10);
        assert!(of("train[x]").is_err());
    }
}
