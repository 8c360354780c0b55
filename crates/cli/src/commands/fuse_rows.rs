//! The rows by which a fuse is judged, and those by which it rounds: what the adapter's config names, or `--data`.

use crate::args::FuseArgs;
use crate::commands::load;
use anyhow::{Result, bail};
use graft_adapters::{AdapterConfig, file_hash};
use graft_model::{Observer, Text};
use graft_train::{DataConfig, ModelEncoder, Row, Split, read_rows};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Targets of `--verify model`, at most: rows beyond them are left out.
const TARGETS: usize = 4096;
/// Tokens of a row, at most, where no recipe says it.
const LENGTH: usize = 2048;
/// Tokens of which the inputs of linears are observed, at most.
const OBSERVED: usize = 8192;

/// Rows of one file, as they were trained on.
pub(crate) struct Rows {
    pub(crate) file: PathBuf,
    pub(crate) rows: Vec<Row>,
    pub(crate) texts: Vec<Text>,
    /// How a row is read.
    pub(crate) form: DataConfig,
}

/// What there is to measure on; none with the reason why not.
pub(crate) struct Found {
    pub(crate) valid: std::result::Result<Rows, String>,
    /// Token ids of rows that are not measured on.
    pub(crate) observed: Vec<Vec<u32>>,
    /// The file that they are from.
    pub(crate) source: Option<PathBuf>,
}

/// Finds the rows. `model` is a directory with the tokenizer.
pub(crate) fn find(args: &FuseArgs, config: &AdapterConfig, model: &Path) -> Result<Found> {
    let (valid, train) = match &args.data {
        Some(given) => {
            let (valid, train) = named(given)?;
            (Ok(valid), train)
        }
        None => (recorded(config, "valid"), recorded(config, "train").ok()),
    };
    // Weights alone need no tokenizer, and a directory without one can be fused.
    let (valid, train) = match (valid, train) {
        (Err(why), None) => return Ok(Found { valid: Err(why), observed: Vec::new(), source: None }),
        found => found,
    };
    let form = form(config);
    let (tokenizer, template) = load::text(model)?;
    let encoder = load::encoder(&tokenizer, template.as_ref());
    let (mut observed, mut source) = (Vec::new(), None);
    let mut others = Vec::new();
    let valid = match valid {
        Err(why) => Err(why),
        Ok(file) => {
            let all = read_rows(&file)?;
            let (rows, rest) = spread(all, args.verify_rows);
            others = rest;
            let texts = texts(Split::from_rows(&file, &rows, &encoder, &form)?);
            if texts.is_empty() {
                Err(format!("{} has no row with a target", file.display()))
            } else {
                Ok(Rows { file, rows, texts, form: form.clone() })
            }
        }
    };
    if args.policy.as_deref() == Some("same") {
        let (file, rows) = match train {
            Some(file) => (file.clone(), spread(read_rows(&file)?, OBSERVED / 16).0),
            None => (valid.as_ref().map_or_else(|_| PathBuf::new(), |rows| rows.file.clone()), others),
        };
        let mut tokens = 0;
        for mut example in Split::from_rows(&file, &rows, &encoder, &form)?.examples {
            example.tokens.truncate(Observer::LENGTH);
            tokens += example.tokens.len();
            if tokens > OBSERVED {
                break;
            }
            observed.push(example.tokens);
        }
        source = Some(file);
    }
    Ok(Found { valid, observed, source })
}

/// The rows of a file or of a directory's valid.jsonl, `count` of them spread over it, as training reads them by default.
pub(crate) fn of_data(given: &str, count: usize, encoder: &ModelEncoder) -> Result<(PathBuf, Vec<Text>)> {
    let file = named(given)?.0;
    let rows = spread(read_rows(&file)?, count).0;
    let texts = texts(Split::from_rows(&file, &rows, encoder, &DataConfig::new(false, LENGTH))?);
    if texts.is_empty() {
        bail!("{} has no row with a target", file.display());
    }
    Ok((file, texts))
}

/// The rows that have targets, until there are enough of them.
fn texts(split: Split) -> Vec<Text> {
    let (mut texts, mut targets) = (Vec::new(), 0);
    for example in split.examples {
        targets += example.targets();
        if targets > TARGETS && !texts.is_empty() {
            break;
        }
        texts.push(Text { targets: example.trained(), tokens: example.tokens });
    }
    texts
}

/// What `--data` names: valid.jsonl and train.jsonl of a directory; a file, which has both.
pub(crate) fn named(given: &str) -> Result<(PathBuf, Option<PathBuf>)> {
    let path = Path::new(given);
    if path.is_file() {
        return Ok((path.to_path_buf(), None));
    }
    let valid = path.join("valid.jsonl");
    if !valid.is_file() {
        let expected = "expected a .jsonl file, or a directory with valid.jsonl";
        bail!(crate::errors::Usage(format!("--data {given}: {expected}")));
    }
    let train = path.join("train.jsonl");
    Ok((valid, train.is_file().then_some(train)))
}

/// The file that training recorded, if it is there and still the same.
fn recorded(config: &AdapterConfig, split: &str) -> std::result::Result<PathBuf, String> {
    let entry = config.extra("rows").and_then(|rows| rows.get(split));
    let Some(entry) = entry else {
        return Err("the adapter does not say which rows it was validated on".into());
    };
    let file = PathBuf::from(entry["file"].as_str().unwrap_or_default());
    match file_hash(&file) {
        Err(_) => Err(format!("{}, on which the adapter was validated, is not there", file.display())),
        Ok(hash) if entry["sha256"] != hash.as_str() => {
            Err(format!("{} has changed since the adapter was trained", file.display()))
        }
        Ok(_) => Ok(file),
    }
}

/// How training read its rows.
fn form(config: &AdapterConfig) -> DataConfig {
    let get = |key: &str| config.raw.get(key);
    let limit = get("max_seq_length").and_then(Value::as_u64).map_or(LENGTH, |n| n as usize);
    let mut form = DataConfig::new(get("mask_prompt").and_then(Value::as_bool).unwrap_or(false), limit);
    // What training took is taken here, too.
    form.whole_texts = true;
    for (name, key) in [
        ("prompt_feature", &mut form.prompt_feature),
        ("completion_feature", &mut form.completion_feature),
        ("chat_feature", &mut form.chat_feature),
        ("text_feature", &mut form.text_feature),
    ] {
        if let Some(given) = get(name).and_then(Value::as_str) {
            given.clone_into(key);
        }
    }
    form
}

/// At most `count` rows, evenly spread, and the others.
fn spread(rows: Vec<Row>, count: usize) -> (Vec<Row>, Vec<Row>) {
    let (all, count) = (rows.len(), count.min(rows.len()));
    let taken = |index: usize| count > 0 && (index * count) / all != (index * count + count) / all;
    let (mut chosen, mut others) = (Vec::new(), Vec::new());
    for (index, row) in rows.into_iter().enumerate() {
        if taken(index) { chosen.push(row) } else { others.push(row) }
    }
    (chosen, others)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_spread_over_the_file() {
        let rows =
            |n: usize| (1..=n).map(|line| Row { line, value: serde_json::Map::new() }).collect::<Vec<_>>();
        for (all, count, wanted) in [(10, 4, 4), (3, 16, 3), (100, 16, 16), (5, 0, 0), (0, 4, 0)] {
            let (chosen, others) = spread(rows(all), count);
            assert_eq!((chosen.len(), others.len()), (wanted, all - wanted));
        }
        let lines: Vec<usize> = spread(rows(10), 5).0.iter().map(|row| row.line).collect();
        assert_eq!(lines, [2, 4, 6, 8, 10]);
    }
}
