//! Rows of text to rows of tokens, exactly as mlx-lm makes them, with errors that name file and line.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::error::io;
use crate::rng::mix;
use crate::{Error, Result};

/// A result whose error is a sentence about a row; file and line are added to it.
pub type RowResult<T> = std::result::Result<T, String>;

/// What turns text and messages into tokens.
pub trait Encoder {
    /// Tokens of a text, with the tokenizer's own special tokens (a leading BOS) if `special`.
    ///
    /// # Errors
    /// A sentence that says why the text cannot be encoded.
    fn encode(&self, text: &str, special: bool) -> RowResult<Vec<u32>>;

    /// The text that the chat template makes of messages.
    ///
    /// # Errors
    /// A sentence that says why the template refuses them.
    fn render(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> RowResult<String>;

    /// The token that ends a text.
    fn eos(&self) -> Option<u32>;
}

/// How rows are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataConfig {
    /// Train on the last message (or the completion) only.
    pub mask_prompt: bool,
    /// Tokens of a row that are kept, from its start.
    pub max_seq_length: usize,
    /// Key of the prompt; mlx-lm's default is `prompt`.
    pub prompt_feature: String,
    /// Key of the completion; `completion`.
    pub completion_feature: String,
    /// Key of the messages; `messages`.
    pub chat_feature: String,
    /// Key of the text; `text`.
    pub text_feature: String,
}

impl DataConfig {
    /// With mlx-lm's names of the keys.
    pub fn new(mask_prompt: bool, max_seq_length: usize) -> Self {
        let [prompt_feature, completion_feature, chat_feature, text_feature] =
            ["prompt", "completion", "messages", "text"].map(str::to_owned);
        Self { mask_prompt, max_seq_length, prompt_feature, completion_feature, chat_feature, text_feature }
    }
}

/// One row as read.
#[derive(Debug, Clone)]
pub struct Row {
    /// Line in its file, from 1.
    pub line: usize,
    /// The object.
    pub value: Map<String, Value>,
}

/// One row as trained on: `tokens[s]` is a target for `max(1, offset) <= s < tokens.len()`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Line in its file, from 1.
    pub line: usize,
    /// Tokens, cut to `max_seq_length`.
    pub tokens: Vec<u32>,
    /// First token that may be a target.
    pub offset: usize,
    /// Tokens before the cut.
    pub full_length: usize,
}

impl Example {
    /// The first target's position.
    pub fn first_target(&self) -> usize {
        self.offset.max(1)
    }

    /// How many tokens are targets.
    pub fn targets(&self) -> usize {
        self.tokens.len().saturating_sub(self.first_target())
    }
}

/// The rows of one file that can be trained or evaluated on.
#[derive(Debug, Clone, Default)]
pub struct Split {
    /// The file.
    pub file: PathBuf,
    /// Its rows that have a target.
    pub examples: Vec<Example>,
    /// Lines of rows without any target.
    pub skipped: Vec<usize>,
    /// How many rows were cut.
    pub truncated: usize,
    /// What the user should know.
    pub warnings: Vec<String>,
    /// Whether the file is there.
    pub found: bool,
}

/// All three splits; a missing file is a split without rows.
#[derive(Debug, Clone)]
pub struct Data {
    /// train.jsonl
    pub train: Split,
    /// valid.jsonl
    pub valid: Split,
    /// test.jsonl
    pub test: Split,
}

impl Data {
    /// Reads train.jsonl, valid.jsonl and test.jsonl of a directory, those that are there.
    ///
    /// # Errors
    /// When there is no such directory, or a row of a file is not what it should be.
    pub fn load(dir: &Path, encoder: &dyn Encoder, config: &DataConfig) -> Result<Self> {
        std::fs::read_dir(dir).map_err(io(dir))?;
        let split = |name: &str| Split::load(&dir.join(format!("{name}.jsonl")), encoder, config);
        Ok(Self { train: split("train")?, valid: split("valid")?, test: split("test")? })
    }
}

/// The rows of a JSON-lines file; blank lines are skipped.
///
/// # Errors
/// When the file cannot be read or a line is not a JSON object.
pub fn read_rows(file: &Path) -> Result<Vec<Row>> {
    let text = std::fs::read_to_string(file).map_err(io(file))?;
    let mut rows = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let fail = |problem: String| Error::Row { file: file.to_path_buf(), line: index + 1, problem };
        match serde_json::from_str(line) {
            Ok(Value::Object(value)) => rows.push(Row { line: index + 1, value }),
            Ok(_) => {
                return Err(fail("expected a JSON object on each line, found another JSON value".into()));
            }
            Err(e) => return Err(fail(format!("not valid JSON: {e}"))),
        }
    }
    Ok(rows)
}

impl Split {
    /// Reads a file; one that is not there is a split without rows.
    ///
    /// # Errors
    /// When it cannot be read or a row is not what it should be.
    pub fn load(file: &Path, encoder: &dyn Encoder, config: &DataConfig) -> Result<Self> {
        let rows = if file.exists() { read_rows(file)? } else { vec![] };
        Ok(Self { found: file.exists(), ..Self::from_rows(file, &rows, encoder, config)? })
    }

    /// Makes a split of rows that were read already; `file` names them in messages.
    ///
    /// # Errors
    /// When a row is not what it should be.
    pub fn from_rows(file: &Path, rows: &[Row], encoder: &dyn Encoder, config: &DataConfig) -> Result<Self> {
        let mut split = Self {
            file: file.to_path_buf(),
            examples: vec![],
            skipped: vec![],
            truncated: 0,
            warnings: vec![],
            found: true,
        };
        let mut longest = 0;
        for row in rows {
            let example = example(row, encoder, config).map_err(|problem| Error::Row {
                file: file.to_path_buf(),
                line: row.line,
                problem,
            })?;
            if example.full_length > example.tokens.len() {
                split.truncated += 1;
                longest = longest.max(example.full_length);
            }
            if example.targets() == 0 {
                split.skipped.push(row.line);
            } else {
                split.examples.push(example);
            }
        }
        let name = file.display();
        if split.truncated > 0 {
            split.warnings.push(format!(
                "{name}: {} of {} rows are longer than max_seq_length {} (the longest has {longest} tokens) and were cut",
                split.truncated,
                rows.len(),
                config.max_seq_length
            ));
        }
        if !split.skipped.is_empty() {
            split.warnings.push(format!(
                "{name}: skipped {} of {} rows that have nothing to train on (the prompt fills max_seq_length, or the \
                 row has fewer than two tokens): lines {}",
                split.skipped.len(),
                rows.len(),
                lines(&split.skipped)
            ));
        }
        Ok(split)
    }

    /// The split itself if it has rows to train or evaluate on.
    ///
    /// # Errors
    /// [`Error::EmptySplit`] if it has none.
    pub fn require(&self) -> Result<&Self> {
        if !self.examples.is_empty() {
            return Ok(self);
        }
        let problem = match (self.found, self.skipped.len()) {
            (false, _) => "there is no such file".to_owned(),
            (true, 0) => "the file has no rows".to_owned(),
            (true, n) => {
                format!("all {n} rows were skipped, since none has a target within max_seq_length: raise it")
            }
        };
        Err(Error::EmptySplit { file: self.file.clone(), problem })
    }

    /// Refuses tokens that the model has no row for: the tokenizer is then not the model's.
    ///
    /// # Errors
    /// [`Error::Row`] of the first such row.
    pub fn check_vocabulary(&self, vocab: usize) -> Result<()> {
        for example in &self.examples {
            if let Some(id) = example.tokens.iter().find(|id| **id as usize >= vocab) {
                let problem = format!(
                    "the tokenizer makes the token id {id} of it, but the model's vocab_size is {vocab}: use the \
                     tokenizer that belongs to the model"
                );
                return Err(Error::Row { file: self.file.clone(), line: example.line, problem });
            }
        }
        Ok(())
    }

    /// A number that changes with any token, for noticing that a run continues on other data.
    pub fn digest(&self) -> u64 {
        self.examples.iter().fold(0, |h, e| {
            let tokens = e.tokens.iter().map(|t| u64::from(*t));
            let words: Vec<u64> = [h, e.offset as u64].into_iter().chain(tokens).collect();
            mix(&words)
        })
    }

    /// `file:lines` of some examples.
    pub fn name_rows(&self, examples: &[usize]) -> String {
        let at: Vec<usize> = examples.iter().filter_map(|i| self.examples.get(*i)).map(|e| e.line).collect();
        format!("{} lines {}", self.file.display(), lines(&at))
    }
}

/// The first few line numbers.
fn lines(all: &[usize]) -> String {
    const SHOWN: usize = 8;
    let shown: Vec<String> = all.iter().take(SHOWN).map(ToString::to_string).collect();
    let rest = all.len().saturating_sub(SHOWN);
    let more = if rest > 0 { format!(" and {rest} more") } else { String::new() };
    format!("{}{more}", shown.join(", "))
}

/// Tokenizes one row.
fn example(row: &Row, encoder: &dyn Encoder, config: &DataConfig) -> RowResult<Example> {
    let has = |key: &String| row.value.contains_key(key);
    let tools = row.value.get("tools").filter(|v| !v.is_null());
    let (mut tokens, offset) = if has(&config.prompt_feature) && has(&config.completion_feature) {
        let messages = [
            json!({"role": "user", "content": text(row, &config.prompt_feature)?}),
            json!({"role": "assistant", "content": text(row, &config.completion_feature)?}),
        ];
        chat(&messages, tools, encoder, config.mask_prompt)?
    } else if has(&config.chat_feature) {
        let messages = messages(row, &config.chat_feature)?;
        chat(messages, tools, encoder, config.mask_prompt)?
    } else if has(&config.text_feature) {
        if config.mask_prompt {
            return Err(
                "a text row has no prompt to mask: use messages or prompt and completion, or no mask_prompt"
                    .into(),
            );
        }
        let mut tokens = encoder.encode(text(row, &config.text_feature)?, true)?;
        let eos = encoder
            .eos()
            .ok_or("the tokenizer has no end-of-text token, which a text row needs at its end")?;
        if tokens.last() != Some(&eos) {
            tokens.push(eos);
        }
        (tokens, 0)
    } else {
        let keys: Vec<String> = row.value.keys().map(|k| format!("{k:?}")).collect();
        let found =
            if keys.is_empty() { "no keys".to_owned() } else { format!("the keys {}", keys.join(", ")) };
        return Err(format!(
            "found {found}; expected {:?} and {:?}, or {:?} (perhaps with \"tools\"), or {:?}; other names are given by \
             prompt_feature, completion_feature, chat_feature and text_feature",
            config.prompt_feature, config.completion_feature, config.chat_feature, config.text_feature
        ));
    };
    let full_length = tokens.len();
    tokens.truncate(config.max_seq_length);
    Ok(Example { line: row.line, tokens, offset, full_length })
}

pub(crate) fn text<'a>(row: &'a Row, key: &str) -> RowResult<&'a str> {
    let value = row.value.get(key).unwrap_or(&Value::Null);
    value.as_str().ok_or_else(|| format!("{key:?}: expected a string, found {}", kind(value)))
}

pub(crate) fn messages<'a>(row: &'a Row, key: &str) -> RowResult<&'a [Value]> {
    let value = row.value.get(key).unwrap_or(&Value::Null);
    let list = value
        .as_array()
        .ok_or_else(|| format!("{key:?}: expected a list of messages, found {}", kind(value)))?;
    if list.is_empty() {
        return Err(format!("{key:?}: the list of messages is empty"));
    }
    for (i, message) in list.iter().enumerate() {
        if message.get("role").and_then(Value::as_str).is_none() {
            return Err(format!(
                "{key:?}[{i}]: expected an object with \"role\" and \"content\", found {}",
                kind(message)
            ));
        }
    }
    Ok(list)
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object without them",
    }
}

/// Tokens of a conversation, and with `mask` how many of them come before the last message's own.
fn chat(
    messages: &[Value],
    tools: Option<&Value>,
    encoder: &dyn Encoder,
    mask: bool,
) -> RowResult<(Vec<u32>, usize)> {
    let encode = |messages: &[Value], prompt: bool| {
        // The template writes the special tokens itself.
        encoder.encode(&encoder.render(messages, tools, prompt)?, false)
    };
    let tokens = encode(messages, false)?;
    let Some((last, before)) = messages.split_last() else { return Ok((tokens, 0)) };
    if !mask {
        return Ok((tokens, 0));
    }
    let answered = last.get("role").and_then(Value::as_str) == Some("assistant");
    let offset = encode(before, answered)?.len();
    Ok((tokens, offset))
}
