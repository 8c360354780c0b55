//! Rows of text to rows of tokens, exactly as mlx-lm makes them, with errors that name file and line.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::check::Checks;
use crate::error::io;
use crate::fault::{Warning, lines};
use crate::message::{is_from, messages, render, text};
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

    /// The tokens that mean something, for the checks of the rows.
    fn marks(&self) -> Marks;
}

/// Tokens that mean something.
#[derive(Debug, Clone, Default)]
pub struct Marks {
    /// Begins a text.
    pub bos: Option<u32>,
    /// Those at which an answer is over.
    pub ends: BTreeSet<u32>,
    /// The special tokens: their text becomes the token wherever it stands.
    pub special: BTreeMap<u32, String>,
}

/// How rows are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataConfig {
    /// Train on the last message (or the completion) only.
    pub mask_prompt: bool,
    /// With `mask_prompt`: a row of plain text, which has no prompt, is trained on whole instead of being refused.
    pub whole_texts: bool,
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
        Self {
            mask_prompt,
            whole_texts: false,
            max_seq_length,
            prompt_feature,
            completion_feature,
            chat_feature,
            text_feature,
        }
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

/// One row as trained on: `tokens[s]` is a target for `s` in [`Example::trained`].
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
    /// Of all tokens before the cut: equal for equal rows.
    pub hash: u64,
}

impl Example {
    /// A row before it is cut.
    pub fn whole(line: usize, tokens: Vec<u32>, offset: usize) -> Self {
        let words: Vec<u64> = tokens.iter().map(|id| u64::from(*id)).collect();
        Self { line, full_length: tokens.len(), hash: mix(&words), tokens, offset }
    }

    /// The positions of the targets: from `max(1, offset)` on, since nothing comes before the first token.
    pub fn trained(&self) -> Range<usize> {
        self.offset.max(1)..self.tokens.len()
    }

    /// How many tokens are targets.
    pub fn targets(&self) -> usize {
        self.trained().len()
    }

    /// Whether its end was cut off.
    pub fn is_cut(&self) -> bool {
        self.full_length > self.tokens.len()
    }
}

/// The rows of one file that can be trained or evaluated on.
#[derive(Debug, Clone, Default)]
pub struct Split {
    /// The file.
    pub file: PathBuf,
    /// Its rows that have a target.
    pub examples: Vec<Example>,
    /// Its rows without any target.
    pub skipped: Vec<Example>,
    /// What is wrong with single rows; [`Data::warnings`] has all.
    pub warnings: Vec<Warning>,
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
    let bytes = std::fs::read(file).map_err(io(file))?;
    let text = std::str::from_utf8(&bytes).map_err(|e| {
        let line = bytes[..e.valid_up_to()].iter().filter(|b| **b == b'\n').count() + 1;
        let problem = "not UTF-8: save the file in that encoding".to_owned();
        Error::Row { file: file.to_path_buf(), line, problem }
    })?;
    // Some editors write a byte order mark.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut rows = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let problem = match serde_json::from_str(line) {
            Ok(Value::Object(value)) => {
                rows.push(Row { line: index + 1, value });
                continue;
            }
            _ if rows.is_empty() && line.trim_start().starts_with('[') => {
                "expected a JSON object on each line; this is one JSON list: write one object a line"
                    .to_owned()
            }
            Ok(_) => "expected a JSON object on each line, found another JSON value".to_owned(),
            // Its line is always 1, as it sees one line.
            Err(e) => {
                let place = format!(" at line {} column {}", e.line(), e.column());
                let what = e.to_string().replace(&place, "");
                format!("not valid JSON: {what} at column {}", e.column())
            }
        };
        return Err(Error::Row { file: file.to_path_buf(), line: index + 1, problem });
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
        let mut split = Self { file: file.to_path_buf(), found: true, ..Self::default() };
        let mut checks = Checks::new(encoder, config);
        for row in rows {
            let encoded = encode(row, encoder, config).map_err(|problem| Error::Row {
                file: file.to_path_buf(),
                line: row.line,
                problem,
            })?;
            checks.row(&encoded);
            if encoded.example.targets() == 0 {
                split.skipped.push(encoded.example);
            } else {
                split.examples.push(encoded.example);
            }
        }
        split.warnings = checks.finish(file);
        Ok(split)
    }

    /// How many rows the file has.
    pub fn rows(&self) -> usize {
        self.examples.len() + self.skipped.len()
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
        format!("{} {}", self.file.display(), lines(&at))
    }
}

/// Which of the forms a row has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Form {
    /// A text by itself.
    Text,
    /// A prompt and its completion.
    Completion,
    /// Messages.
    Chat,
}

/// A row's form by its keys; none where they are those of no form. Of several forms the first counts: prompt and
/// completion, messages, text.
pub(crate) fn form(row: &Row, config: &DataConfig) -> Option<Form> {
    let has = |key: &String| row.value.contains_key(key);
    if has(&config.prompt_feature) && has(&config.completion_feature) {
        Some(Form::Completion)
    } else if has(&config.chat_feature) {
        Some(Form::Chat)
    } else {
        has(&config.text_feature).then_some(Form::Text)
    }
}

/// A row as an example, with what the checks look at besides.
pub(crate) struct Encoded<'a> {
    pub(crate) form: Form,
    /// The conversation; empty for a text.
    pub(crate) messages: Cow<'a, [Value]>,
    pub(crate) tools: Option<&'a Value>,
    /// What was encoded.
    pub(crate) text: Cow<'a, str>,
    /// The rendered prompt, where it is masked.
    pub(crate) prompt: Option<String>,
    /// The prompt's tokens are not those that the row begins with.
    pub(crate) shifted: bool,
    pub(crate) example: Example,
}

/// Tokenizes one row.
fn encode<'a>(row: &'a Row, encoder: &dyn Encoder, config: &DataConfig) -> RowResult<Encoded<'a>> {
    let tools = row.value.get("tools").filter(|v| !v.is_null());
    let form = form(row, config);
    let mut encoded = if form == Some(Form::Completion) {
        let messages = vec![
            json!({"role": "user", "content": text(row, &config.prompt_feature)?}),
            json!({"role": "assistant", "content": text(row, &config.completion_feature)?}),
        ];
        Encoded { form: Form::Completion, ..chat(messages.into(), tools, encoder, config)? }
    } else if form == Some(Form::Chat) {
        chat(messages(row, &config.chat_feature)?.into(), tools, encoder, config)?
    } else if form == Some(Form::Text) {
        if config.mask_prompt && !config.whole_texts {
            return Err(
                "a text row has no prompt to mask: use messages or prompt and completion, or no mask_prompt"
                    .into(),
            );
        }
        let text = text(row, &config.text_feature)?;
        let mut tokens = encoder.encode(text, true)?;
        let eos = encoder
            .eos()
            .ok_or("the tokenizer has no end-of-text token, which a text row needs at its end")?;
        if tokens.last() != Some(&eos) {
            tokens.push(eos);
        }
        Encoded {
            form: Form::Text,
            messages: Cow::default(),
            tools: None,
            text: text.into(),
            prompt: None,
            shifted: false,
            example: Example::whole(row.line, tokens, 0),
        }
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
    encoded.example.line = row.line;
    encoded.example.tokens.truncate(config.max_seq_length);
    Ok(encoded)
}

/// A conversation, with `mask_prompt` trained on the last message alone.
fn chat<'a>(
    mut messages: Cow<'a, [Value]>,
    tools: Option<&'a Value>,
    encoder: &dyn Encoder,
    config: &DataConfig,
) -> RowResult<Encoded<'a>> {
    let text = render(&mut messages, tools, encoder, (&config.chat_feature, false))?;
    // The template writes the special tokens itself.
    let tokens = encoder.encode(&text, false)?;
    let (mut prompt, mut shifted, mut offset) = (None, false, 0);
    if let Some((last, before)) = messages.split_last().filter(|_| config.mask_prompt) {
        let rendered = encoder.render(before, tools, is_from(last, "assistant"))?;
        let start = encoder.encode(&rendered, false)?;
        (offset, shifted, prompt) = (start.len(), !tokens.starts_with(&start), Some(rendered));
    }
    let example = Example::whole(0, tokens, offset);
    Ok(Encoded { form: Form::Chat, messages, tools, text: text.into(), prompt, shifted, example })
}
