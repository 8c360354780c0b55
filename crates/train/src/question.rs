//! Rows as questions: what a model is asked, and the answer that the row gives to it.

use std::borrow::Cow;
use std::path::Path;

use serde_json::{Value, json};

use crate::data::{DataConfig, Encoder, Form, Row, RowResult, form};
use crate::message::{messages, render, text};
use crate::{Error, Metric, Result};

/// A row without its last answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Question {
    /// Line in its file, from 1.
    pub line: usize,
    /// What comes before the answer, as the chat template writes it, with the tokens that open the answer.
    pub prompt: Vec<u32>,
    /// The message that is answered, for people.
    pub asked: String,
    /// The row's own answer.
    pub answer: String,
}

impl Question {
    /// The questions of rows that were read from `file`.
    ///
    /// # Errors
    /// [`Error::Row`] of the first row that has no question and answer.
    pub fn from_rows(
        file: &Path,
        rows: &[Row],
        encoder: &dyn Encoder,
        config: &DataConfig,
    ) -> Result<Vec<Self>> {
        let fail = |line, problem| Error::Row { file: file.to_path_buf(), line, problem };
        rows.iter().map(|row| question(row, encoder, config).map_err(|why| fail(row.line, why))).collect()
    }

    /// Refuses rows that have no question and answer, and answers with which `metric` can compare nothing; no model is
    /// needed for that.
    ///
    /// # Errors
    /// [`Error::Row`] of the first such row.
    pub fn check(file: &Path, rows: &[Row], config: &DataConfig, metric: &Metric) -> Result<()> {
        rows.iter().try_for_each(|row| {
            let checked = parts(row, config).and_then(|(_, answer)| match calls(row, config) {
                true => {
                    Err("the answer calls a tool, and only texts are compared: only its loss can be measured"
                        .into())
                }
                false => metric.check(answer),
            });
            checked.map_err(|problem| Error::Row { file: file.to_path_buf(), line: row.line, problem })
        })
    }
}

/// What comes before a row's last answer, and that answer.
fn parts<'a>(row: &'a Row, config: &DataConfig) -> RowResult<(Cow<'a, [Value]>, &'a str)> {
    let has = |key: &String| row.value.contains_key(key);
    let user = |text: &str| Cow::Owned(vec![json!({"role": "user", "content": text})]);
    Ok(if has(&config.prompt_feature) && has(&config.completion_feature) {
        (user(text(row, &config.prompt_feature)?), text(row, &config.completion_feature)?)
    } else if has(&config.chat_feature) {
        let Some((last, before)) = messages(row, &config.chat_feature)?.split_last() else {
            return Err("the list of messages is empty".into());
        };
        if last.get("role").and_then(Value::as_str) != Some("assistant") {
            return Err("the last message must be the assistant's: it is the answer to compare with".into());
        }
        if before.is_empty() {
            return Err("there is no message before the answer".into());
        }
        let content = last.get("content").and_then(Value::as_str);
        let silent = Some("").filter(|_| calls(row, config));
        let content =
            content.or(silent).ok_or("the last message has no text as \"content\" to compare with")?;
        (Cow::Borrowed(before), content)
    } else {
        return Err(format!(
            "expected {:?} and {:?}, or {:?}: another row has no question, and only its loss can be measured",
            config.prompt_feature, config.completion_feature, config.chat_feature
        ));
    })
}

/// Whether a row's last message calls a tool.
fn calls(row: &Row, config: &DataConfig) -> bool {
    let last = row.value.get(&config.chat_feature).and_then(Value::as_array).and_then(|all| all.last());
    let calls =
        last.filter(|_| form(row, config) == Some(Form::Chat)).and_then(|last| last.get("tool_calls"));
    calls.is_some_and(|calls| !calls.is_null() && calls.as_array().is_none_or(|all| !all.is_empty()))
}

fn question(row: &Row, encoder: &dyn Encoder, config: &DataConfig) -> RowResult<Question> {
    let (mut before, answer) = parts(row, config)?;
    let asked = before.last().and_then(|last| last.get("content")).and_then(Value::as_str);
    let asked = asked.unwrap_or_default().to_owned();
    let tools = row.value.get("tools").filter(|v| !v.is_null());
    // The template writes the special tokens itself.
    let prompt =
        encoder.encode(&render(&mut before, tools, encoder, (&config.chat_feature, true))?, false)?;
    Ok(Question { line: row.line, prompt, asked, answer: answer.to_owned() })
}
