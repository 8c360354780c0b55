//! The rows of a run: `--data`, or the settings' `hf_dataset` with its splits and slices.

use super::load::Loaded;
use crate::errors::Usage;
use crate::hub::{self, What};
use crate::settings::Settings;
use anyhow::{Result, bail};
use graft_train::{Data, DataConfig, Row, Split, read_rows};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// Reads the splits that the settings need; the others stay empty.
pub(crate) fn load(settings: &Settings, loaded: &Loaded) -> Result<Data> {
    let names = [
        ("train", settings.flag("train")),
        ("valid", settings.flag("train")),
        ("test", settings.flag("test")),
    ];
    let mut splits = Vec::new();
    match settings.all.get("hf_dataset").filter(|v| !v.is_null()) {
        Some(described) => {
            let parts: Vec<&Map<String, Value>> = match described {
                Value::Array(list) => list.iter().filter_map(Value::as_object).collect(),
                other => other.as_object().into_iter().collect(),
            };
            for (name, needed) in names {
                splits.push(if needed {
                    described_split(&parts, name, settings, loaded)?
                } else {
                    empty(name, loaded)?
                });
            }
        }
        None => {
            let dir = hub::resolve(settings.text("data").unwrap_or_default(), What::Data)?;
            let config = features(settings, &Map::new(), text_rows(settings, &dir)?);
            for (name, needed) in names {
                let file = dir.join(format!("{name}.jsonl"));
                splits.push(if needed {
                    Split::load(&file, &loaded.encoder(), &config)?
                } else {
                    empty(name, loaded)?
                });
            }
        }
    }
    let (test, valid, train) = (splits.pop(), splits.pop(), splits.pop());
    match (train, valid, test) {
        (Some(train), Some(valid), Some(test)) => Ok(Data { train, valid, test }),
        _ => bail!("no splits were read"),
    }
}

/// The recipe masks prompts where rows have prompts; rows of plain text have none.
fn text_rows(settings: &Settings, dir: &Path) -> Result<bool> {
    let file = dir.join("train.jsonl");
    if !settings.mask_is_default || !file.exists() {
        return Ok(false);
    }
    let first = read_rows(&file)?.into_iter().next();
    let key = |name: &str, default: &'static str| settings.text(name).unwrap_or(default).to_string();
    Ok(first.is_some_and(|row| {
        row.value.contains_key(&key("text_feature", "text"))
            && !row.value.contains_key(&key("chat_feature", "messages"))
            && !row.value.contains_key(&key("prompt_feature", "prompt"))
    }))
}

fn features(settings: &Settings, own: &Map<String, Value>, unmasked: bool) -> DataConfig {
    let key = |name: &str, default: &str| {
        let own = own.get(name).and_then(Value::as_str);
        own.or_else(|| settings.text(name)).unwrap_or(default).to_string()
    };
    let mask =
        own.get("mask_prompt").and_then(Value::as_bool).unwrap_or_else(|| settings.flag("mask_prompt"));
    DataConfig {
        mask_prompt: mask && !unmasked,
        max_seq_length: usize::try_from(settings.int("max_seq_length")).unwrap_or_default(),
        prompt_feature: key("prompt_feature", "prompt"),
        completion_feature: key("completion_feature", "completion"),
        chat_feature: key("chat_feature", "messages"),
        text_feature: key("text_feature", "text"),
    }
}

fn empty(name: &str, loaded: &Loaded) -> Result<Split> {
    let config = DataConfig {
        mask_prompt: false,
        max_seq_length: 2,
        prompt_feature: String::new(),
        completion_feature: String::new(),
        chat_feature: String::new(),
        text_feature: String::new(),
    };
    Ok(Split::from_rows(Path::new(name), &[], &loaded.encoder(), &config)?)
}

/// One split of all data sets that `hf_dataset` lists, one after another.
fn described_split(
    parts: &[&Map<String, Value>],
    name: &str,
    settings: &Settings,
    loaded: &Loaded,
) -> Result<Split> {
    let mut whole: Option<Split> = None;
    for part in parts {
        check_keys(part)?;
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
        let split = Split::from_rows(&file, &rows, &loaded.encoder(), &features(settings, part, false))?;
        whole = Some(match whole {
            None => split,
            Some(mut whole) => {
                whole.examples.extend(split.examples);
                whole.skipped.extend(split.skipped);
                whole.truncated += split.truncated;
                whole.warnings.extend(split.warnings);
                whole
            }
        });
    }
    whole.map_or_else(|| empty(name, loaded), Ok)
}

fn check_keys(part: &Map<String, Value>) -> Result<()> {
    const KNOWN: [&str; 9] = [
        "path",
        "train_split",
        "valid_split",
        "test_split",
        "mask_prompt",
        "prompt_feature",
        "completion_feature",
        "chat_feature",
        "text_feature",
    ];
    let unset = |v: &Value| v.is_null() || v.as_object().is_some_and(Map::is_empty);
    for (key, value) in part {
        if !KNOWN.contains(&key.as_str()) && !(key == "config" && unset(value)) {
            bail!(Usage(format!(
                "hf_dataset: `{key}` is not supported: graft reads JSON-lines files ({} are known)",
                KNOWN.join(", ")
            )));
        }
    }
    Ok(())
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
