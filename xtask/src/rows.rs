//! The held-out rows of a data set, and what a served model answers to them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

use crate::http;

/// A data set of any size is scored on this many rows at most, so that the time stays in proportion.
const MOST: usize = 100;

/// Requests in flight.
const TOGETHER: usize = 8;

/// A question with the answer that the data gives.
pub(crate) struct Row {
    /// Messages of a chat, or a text to be continued.
    prompt: Value,
    expected: String,
}

/// test.jsonl of a data directory, or valid.jsonl where there is none.
pub(crate) fn held_file(data: &Path) -> Result<PathBuf> {
    let mut names = ["test.jsonl", "valid.jsonl"].map(|name| data.join(name)).into_iter();
    names.find(|file| file.exists()).with_context(|| {
        format!("{} holds neither test.jsonl nor valid.jsonl, so nothing can be measured", data.display())
    })
}

/// What a model's score can be.
pub(crate) enum Held {
    /// Exact answers.
    Questions(Vec<Row>),
    /// Rows of bare text have no answer to compare: the perplexity is measured instead, and this start continued.
    Text(Row),
}

impl Held {
    /// Reads the rows of [`held_file`].
    pub(crate) fn load(data: &Path) -> Result<Self> {
        let file = &held_file(data)?;
        let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        let mut rows = Vec::new();
        for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let place = || format!("{}:{}", file.display(), i + 1);
            let row: Map<String, Value> = serde_json::from_str(line).with_context(place)?;
            if let Some(row) = Row::of(&row) {
                rows.push(row);
            } else if let Some(text) = row.get("text").and_then(Value::as_str) {
                let words: Vec<&str> = text.split_whitespace().take(8).collect();
                return Ok(Self::Text(Row { prompt: words.join(" ").into(), expected: String::new() }));
            } else {
                bail!(
                    "{}: expected messages that end with the assistant's, prompt and completion, or text",
                    place()
                );
            }
        }
        ensure!(!rows.is_empty(), "{} holds no rows", file.display());
        rows.truncate(MOST);
        Ok(Self::Questions(rows))
    }
}

impl Row {
    fn of(row: &Map<String, Value>) -> Option<Self> {
        if let Some(messages) = row.get("messages").and_then(Value::as_array) {
            let (last, before) = messages.split_last()?;
            let answers = last["role"] == "assistant" && !before.is_empty();
            let expected = answers.then(|| last["content"].as_str()).flatten()?.trim().to_owned();
            return Some(Self { prompt: before.into(), expected });
        }
        let text = |key: &str| row.get(key).and_then(Value::as_str);
        let prompt = json!([{"role": "user", "content": text("prompt")?}]);
        Some(Self { prompt, expected: text("completion")?.trim().to_owned() })
    }

    /// The last message that is not the answer, or the text.
    pub(crate) fn question(&self) -> &str {
        let last = self.prompt.as_array().and_then(|messages| messages.last());
        last.map_or(&self.prompt, |message| &message["content"]).as_str().unwrap_or_default()
    }

    /// What a served model answers, greedily.
    pub(crate) fn answer(&self, address: &str, model: &str, max_tokens: usize) -> Result<String> {
        Ok(self.stream(address, model, max_tokens, |_| true)?.trim().to_owned())
    }

    /// Whether it answers exactly what is expected. A token has a byte at least, so the limit cuts no right answer off;
    /// a wrong one is given up at its first wrong character.
    fn is_right(&self, address: &str, model: &str) -> Result<bool> {
        let answer = self
            .stream(address, model, self.expected.len() + 8, |text| self.expected.starts_with(text.trim()))?;
        Ok(answer.trim() == self.expected)
    }

    fn stream(
        &self,
        address: &str,
        model: &str,
        max_tokens: usize,
        go_on: impl Fn(&str) -> bool,
    ) -> Result<String> {
        let (path, field) = match self.prompt {
            Value::String(_) => ("/v1/completions", "prompt"),
            _ => ("/v1/chat/completions", "messages"),
        };
        let body = json!({
            "model": model, field: self.prompt, "max_tokens": max_tokens, "temperature": 0, "stream": true
        });
        http::stream(address, path, &body, go_on)
    }
}

/// How many rows a served model answers exactly. `progress` gets the number of rows done and right.
pub(crate) fn score(
    rows: &[Row],
    address: &str,
    model: &str,
    progress: impl Fn(usize, usize) + Sync,
) -> Result<usize> {
    let (next, done, right) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    let work = || -> Result<()> {
        while let Some(row) = rows.get(next.fetch_add(1, Ordering::Relaxed)) {
            let is_right = usize::from(row.is_right(address, model)?);
            let right = right.fetch_add(is_right, Ordering::Relaxed) + is_right;
            progress(done.fetch_add(1, Ordering::Relaxed) + 1, right);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..TOGETHER).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })?;
    Ok(right.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(text: &str) -> Option<Row> {
        Row::of(&serde_json::from_str(text).unwrap())
    }

    #[test]
    fn both_kinds_of_rows_are_questions() {
        let chat =
            row(r#"{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
            {"role": "assistant", "content": " a\n"}]}"#)
            .unwrap();
        assert_eq!((chat.question(), chat.expected.as_str()), ("q", "a"));
        assert_eq!(chat.prompt.as_array().unwrap().len(), 2);
        let pair = row(r#"{"prompt": "q", "completion": "a"}"#).unwrap();
        assert_eq!((pair.question(), pair.expected.as_str()), ("q", "a"));
        assert!(row(r#"{"messages": [{"role": "user", "content": "q"}]}"#).is_none());
        assert!(row(r#"{"prompt": "q"}"#).is_none());
    }
}
