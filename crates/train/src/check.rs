//! What is usually wrong with training data, found while its rows are encoded: plain values for the caller to show.
//!
//! Most fine-tunes that fail do so by a wrong mask, a missing end or a template that drops what it was given, and none
//! of that is visible in the loss. A row's own faults are looked for in its encoding; where that leaves a doubt the
//! template is asked again with a marked word in the place in question.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use graft_model::THINKING;
use serde_json::{Value, json};

use crate::data::{Data, DataConfig, Encoded, Encoder, Example, Form, Marks, Split};
use crate::fault::{Fault, Warning};
use crate::message::{is_from, is_invisible, unparsed};

/// Lines of the rows with a fault, and what of them is worth naming.
#[derive(Default)]
struct Found {
    lines: Vec<usize>,
    named: BTreeSet<String>,
}

/// The faults of a file's rows, one row after another.
pub(crate) struct Checks<'a> {
    encoder: &'a dyn Encoder,
    config: &'a DataConfig,
    marks: Marks,
    found: BTreeMap<Fault, Found>,
    forms: BTreeMap<Form, Vec<usize>>,
    /// Lines of rows with tools; none as soon as a tool was called.
    uncalled: Option<Vec<usize>>,
    /// Whether the template dropped a role, or a part of a row, when it was asked last.
    dropped: HashMap<String, bool>,
    rows: usize,
    longest: usize,
}

/// A word that no template and no row holds.
const MARKED: &str = "qXz7graftqXz7";
/// A key that only a template that prints a value whole lets through.
const PRINTED: &str = "qXz8graftqXz8";
/// Roles that some template or other knows.
const ROLES: [&str; 7] = ["system", "developer", "user", "assistant", "tool", "function", "ipython"];
/// After the token that ends an answer templates write a line's end at most.
const END_WITHIN: usize = 3;
/// Characters of a name that a message shows.
const LONGEST_NAME: usize = 60;
/// How many names a message lists.
const NAMED: usize = 4;

impl<'a> Checks<'a> {
    pub(crate) fn new(encoder: &'a dyn Encoder, config: &'a DataConfig) -> Self {
        Self {
            encoder,
            config,
            marks: encoder.marks(),
            found: BTreeMap::new(),
            forms: BTreeMap::new(),
            uncalled: Some(Vec::new()),
            dropped: HashMap::new(),
            rows: 0,
            longest: 0,
        }
    }

    /// `name` may be the data's: no more than a line of it is shown, and no control characters.
    fn add(&mut self, fault: Fault, line: usize, name: &str) {
        let found = self.found.entry(fault).or_default();
        if found.lines.last() != Some(&line) {
            found.lines.push(line);
        }
        if !name.is_empty() {
            let name: String = name.chars().take(LONGEST_NAME).collect();
            found.named.insert(name.escape_debug().to_string());
        }
    }

    pub(crate) fn row(&mut self, row: &Encoded) {
        let line = row.example.line;
        self.rows += 1;
        self.longest = self.longest.max(row.example.full_length);
        self.forms.entry(row.form).or_default().push(line);
        for (fault, is) in [
            (Fault::NothingToTrain, row.example.targets() == 0),
            (Fault::Truncated, row.example.is_cut()),
            (Fault::MaskShifted, row.shifted),
            (Fault::ThinkingTrained, trains_thoughts(row)),
            (Fault::BrokenCharacters, is_broken(&row.text)),
            (Fault::DoubleBos, self.doubles_bos(&row.example)),
        ] {
            if is {
                self.add(fault, line, "");
            }
        }
        if row.form == Form::Text {
            self.text(row, line);
        } else {
            self.conversation(row, line);
        }
    }

    fn doubles_bos(&self, example: &Example) -> bool {
        self.marks.bos.is_some_and(|bos| example.tokens.starts_with(&[bos, bos]))
    }

    fn text(&mut self, row: &Encoded, line: usize) {
        let tokens = &row.example.tokens;
        let typed = row.text.trim_end();
        if is_blank(typed) {
            self.add(Fault::EmptyText, line, "");
        }
        let Some(eos) = self.encoder.eos().filter(|_| !row.example.is_cut()) else { return };
        let ends_itself = |text: &str| self.marks.special.get(&eos).is_some_and(|eos| text.ends_with(eos));
        let followed = ends_itself(typed) && typed.len() < row.text.len();
        if followed || tokens.ends_with(&[eos, eos]) {
            self.add(Fault::DoubleEnd, line, "");
        }
    }

    fn conversation(&mut self, row: &Encoded, line: usize) {
        let Some((last, before)) = row.messages.split_last() else { return };
        if !is_from(last, "assistant") {
            self.add(Fault::NoAnswer, line, "");
        } else if !row.example.is_cut() {
            let answer = row.example.tokens.get(self.answer_at(row, before)..).unwrap_or_default();
            if !answer.iter().rev().take(END_WITHIN).any(|id| self.marks.ends.contains(id)) {
                self.add(Fault::NoEndOfTurn, line, "");
            }
        }
        // A special token that is written out is among the row's; a vocabulary has thousands.
        let tokens: BTreeSet<u32> = row.example.tokens.iter().copied().collect();
        let special = tokens.iter().filter_map(|id| self.marks.special.get(id).cloned());
        let special: Vec<String> = special.collect();
        // The tools would hold the names of calls, too.
        let bare = match row.tools {
            Some(_) => self.encoder.render(&row.messages, None, false).ok().map(Cow::Owned),
            None => Some(Cow::Borrowed(&*row.text)),
        };
        for (at, message) in row.messages.iter().enumerate() {
            self.message(row, at, message, &special, bare.as_deref());
        }
        if self.config.mask_prompt && before.iter().any(|m| !calls(m).is_empty()) {
            self.add(Fault::CallMasked, line, "");
        }
        self.tools(row, bare.as_deref());
    }

    /// The token at which the last message begins, as an end before it is another message's; 0 where the template does
    /// not tell.
    fn answer_at(&self, row: &Encoded, before: &[Value]) -> usize {
        if row.shifted || row.prompt.is_some() {
            return if row.shifted { 0 } else { row.example.offset };
        }
        let prompt = self.encoder.render(before, row.tools, true).ok();
        let answer = prompt.and_then(|prompt| row.text.strip_prefix(prompt.as_str()));
        let answer = answer.and_then(|answer| self.encoder.encode(answer, false).ok());
        answer.map_or(0, |answer| row.example.tokens.len().saturating_sub(answer.len()))
    }

    /// `special` are the special tokens of the row, `bare` its text without tools.
    fn message(&mut self, row: &Encoded, at: usize, message: &Value, special: &[String], bare: Option<&str>) {
        let line = row.example.line;
        let role = message.get("role").and_then(Value::as_str).unwrap_or_default();
        if !ROLES.contains(&role) {
            self.add(Fault::UnknownRole, line, role);
        }
        let content = message.get("content").unwrap_or(&Value::Null);
        let calls = calls(message);
        match content {
            Value::String(text) if !is_blank(text) => {
                if let Some(token) = special.iter().find(|token| text.contains(*token)) {
                    self.add(Fault::SpecialInContent, line, token);
                }
                let ask = |checks: &Self| checks.drops(row, at, "content", MARKED.into());
                if self.is_dropped(&format!("role {role}"), !holds(&row.text, text), ask) {
                    self.add(Fault::RoleDropped, line, role);
                }
            }
            Value::String(_) | Value::Null if calls.is_empty() => match role {
                "assistant" if unparsed(std::slice::from_ref(message), None).is_none() => {
                    self.add(Fault::EmptyAnswer, line, "");
                }
                "user" => self.add(Fault::EmptyText, line, ""),
                _ => {}
            },
            Value::Null if row.text.contains("None") && self.changes(row, at, "".into()) => {
                self.add(Fault::ContentNotText, line, "None");
            }
            Value::Array(_) | Value::Object(_) => self.parts(row, at, content, role),
            _ => {}
        }
        for name in &calls {
            let ask = |checks: &Self| {
                let marked = json!({"name": MARKED, "arguments": {}});
                let marked = json!([{"id": "callcall1", "type": "function", "function": marked}]);
                checks.drops(row, at, "tool_calls", marked)
            };
            let doubt = !bare.is_some_and(|text| text.contains(name.as_str()));
            if self.is_dropped("call", doubt, ask) {
                self.add(Fault::CallDropped, line, name);
            }
        }
    }

    /// Whether the template drops what `ask` asks about; it is asked once, then where there is a doubt, and as long as
    /// the answer is yes.
    fn is_dropped(&mut self, what: &str, doubt: bool, ask: impl FnOnce(&Self) -> bool) -> bool {
        if !doubt && self.dropped.get(what) == Some(&false) {
            return false;
        }
        let dropped = ask(self);
        self.dropped.insert(what.to_owned(), dropped);
        dropped
    }

    /// Content that is no text: templates join the texts of its parts, print it, or know strings only and drop it.
    fn parts(&mut self, row: &Encoded, at: usize, content: &Value, role: &str) {
        let mut content = content.clone();
        let parts = match &mut content {
            Value::Array(list) => list.as_mut_slice(),
            one => std::slice::from_mut(one),
        };
        let mut has_text = false;
        for part in parts {
            let text = match part {
                Value::Object(part) => {
                    part.insert(PRINTED.into(), Value::Null);
                    part.get_mut("text")
                }
                other => Some(other),
            };
            if let Some(text) = text.filter(|text| text.is_string()) {
                (*text, has_text) = (MARKED.into(), true);
            }
        }
        let Some(text) = self.with(row, at, "content", content) else { return };
        if text.contains(PRINTED) {
            self.add(Fault::ContentNotText, row.example.line, "a list or an object");
        } else if has_text && !text.contains(MARKED) {
            self.add(Fault::RoleDropped, row.example.line, &format!("{role} with a list as content"));
        }
    }

    /// The row's text with another value in a message; none where the template refuses it.
    fn with(&self, row: &Encoded, at: usize, key: &str, value: Value) -> Option<String> {
        let mut messages = row.messages.to_vec();
        messages.get_mut(at)?.as_object_mut()?.insert(key.into(), value);
        self.encoder.render(&messages, row.tools, false).ok()
    }

    /// Whether a marked value in a message's place leaves no trace.
    fn drops(&self, row: &Encoded, at: usize, key: &str, marked: Value) -> bool {
        self.with(row, at, key, marked).is_some_and(|text| !text.contains(MARKED))
    }

    /// Whether other content makes another text.
    fn changes(&self, row: &Encoded, at: usize, content: Value) -> bool {
        self.with(row, at, "content", content).is_some_and(|text| text != row.text)
    }

    fn tools(&mut self, row: &Encoded, bare: Option<&str>) {
        let line = row.example.line;
        if let Some(key) = unparsed(&row.messages, row.tools) {
            return self.add(Fault::ToolsNotParsed, line, key);
        }
        let defined = row.tools.map(names).unwrap_or_default();
        let called: Vec<String> = row.messages.iter().flat_map(calls).collect();
        for name in called.iter().filter(|name| !defined.contains(name)) {
            self.add(Fault::UnknownTool, line, name);
        }
        // A call may stand in the answer's text, too.
        let says = |m: &Value| {
            let content = m.get("content").and_then(Value::as_str).unwrap_or_default();
            is_from(m, "assistant") && defined.iter().any(|name| content.contains(name.as_str()))
        };
        if !called.is_empty() || row.messages.iter().any(says) {
            self.uncalled = None;
        }
        if defined.is_empty() {
            return;
        }
        if let Some(uncalled) = &mut self.uncalled {
            uncalled.push(line);
        }
        if bare == Some(&*row.text) {
            self.add(Fault::ToolsDropped, line, "");
        }
    }

    pub(crate) fn finish(mut self, file: &Path) -> Vec<Warning> {
        for line in self.uncalled.take().unwrap_or_default() {
            self.add(Fault::ToolsUnused, line, "");
        }
        let most = self.forms.values().map(Vec::len).max().unwrap_or_default();
        let main = self.forms.iter().find(|(_, lines)| lines.len() == most).map(|(form, _)| *form);
        let mut others: Vec<usize> =
            self.forms.iter().filter(|(form, _)| Some(**form) != main).flat_map(|(_, l)| l.clone()).collect();
        others.sort_unstable();
        for line in others {
            self.add(Fault::MixedForms, line, "");
        }
        let (rows, limit, longest) = (self.rows, self.config.max_seq_length, self.longest);
        let warning = |(fault, found): (Fault, Found)| {
            let mut named: Vec<String> = found.named.into_iter().take(NAMED).collect();
            if fault == Fault::Truncated {
                named.push(format!("{limit} tokens are kept, the longest has {longest}"));
            }
            Warning::new(fault, file, rows, found.lines, &named.join(", "))
        };
        self.found.into_iter().map(warning).collect()
    }
}

impl Data {
    /// All that is wrong with the rows: each split's own faults, rows that occur twice, and splits that are too small
    /// for `batch_size`. `validates` says whether the validation set will be used.
    pub fn warnings(&self, batch_size: usize, validates: bool) -> Vec<Warning> {
        let splits = [&self.train, &self.valid, &self.test];
        let mut all: Vec<Warning> = splits.iter().flat_map(|split| split.warnings.clone()).collect();
        // Each with split, number and line.
        let mut seen: HashMap<u64, (usize, usize, usize)> = HashMap::new();
        for (at, split) in splits.into_iter().enumerate() {
            // Lines that repeat a row of each split up to this one, and the first row they repeat.
            let mut repeated: [(Vec<usize>, usize); 3] = Default::default();
            // A split of several data sets has a line more than once.
            for (number, example) in split.examples.iter().enumerate() {
                let (other, first, line) = *seen.entry(example.hash).or_insert((at, number, example.line));
                if (other, first) != (at, number) {
                    let (lines, first) = &mut repeated[other];
                    *first = if lines.is_empty() { line } else { *first };
                    lines.push(example.line);
                }
            }
            for (other, (lines, first)) in repeated.into_iter().enumerate().filter(|(_, r)| !r.0.is_empty()) {
                let fault = if other == at { Fault::Duplicate } else { Fault::InTwoSplits };
                let detail = format!("the first repeats line {first} of {}", splits[other].file.display());
                all.push(Warning::new(fault, &split.file, split.rows(), lines, &detail));
            }
        }
        let few = |split: &Split| split.examples.len() < batch_size && !split.examples.is_empty();
        if validates && self.valid.examples.is_empty() {
            all.push(Warning::new(Fault::NoValidation, &self.valid.file, 0, vec![], ""));
        }
        for split in [Some(&self.train), Some(&self.valid).filter(|_| validates)].into_iter().flatten() {
            if few(split) {
                let lines = split.examples.iter().map(|example| example.line).collect();
                let detail = format!("batch_size {batch_size}");
                all.push(Warning::new(Fault::TooFewRows, &split.file, split.rows(), lines, &detail));
            }
        }
        all
    }
}

/// Whether nothing of a text can be seen.
fn is_blank(text: &str) -> bool {
    text.chars().all(|c| c.is_whitespace() || is_invisible(c))
}

/// The names of tools, or of calls: in `function`, or by themselves.
fn names(list: &Value) -> Vec<String> {
    let name = |one: &Value| {
        let own = one.get("function").unwrap_or(one).get("name")?;
        own.as_str().map(str::to_owned)
    };
    list.as_array().into_iter().flatten().filter_map(name).collect()
}

/// The names of the tools that a message calls.
fn calls(message: &Value) -> Vec<String> {
    message.get("tool_calls").map(names).unwrap_or_default()
}

/// Whether a rendered text holds a message's content: its longest line, as templates trim and drop thoughts, or that as
/// JSON.
fn holds(rendered: &str, content: &str) -> bool {
    let spoken = THINKING.iter().fold(content, |text, (_, end)| text.rsplit(end).next().unwrap_or(text));
    let line = spoken.lines().map(str::trim).max_by_key(|line| line.len()).unwrap_or_default();
    rendered.contains(line) || rendered.contains(Value::from(line).to_string().trim_matches('"'))
}

/// Whether thoughts that are not empty are targets. In a conversation only the assistant thinks: others may speak of
/// the marks.
fn trains_thoughts(row: &Encoded) -> bool {
    let answer = row.prompt.as_ref().and_then(|prompt| row.text.strip_prefix(prompt.as_str()));
    if row.form == Form::Text || answer.is_some() {
        return !thoughts(answer.unwrap_or(&row.text), answer.is_some()).is_empty();
    }
    row.messages.iter().filter(|m| is_from(m, "assistant")).any(|message| {
        let said = |key: &str| message.get(key).and_then(Value::as_str).unwrap_or_default();
        let mut all = thoughts(said("content"), false);
        all.extend(["reasoning_content", "reasoning"].map(said));
        all.into_iter().any(|thought| !thought.trim().is_empty() && holds(&row.text, thought))
    })
}

/// The thoughts of a text that are not empty; `opened`: the first may have begun before it.
fn thoughts(text: &str, opened: bool) -> Vec<&str> {
    let mut all = Vec::new();
    for (begin, end) in THINKING {
        all.extend(text.split(end).enumerate().filter_map(|(at, part)| match part.rsplit_once(begin) {
            Some((_, thought)) => Some(thought),
            None => (opened && at == 0 && text.contains(end)).then_some(part),
        }));
    }
    all.retain(|thought| !thought.trim().is_empty());
    all
}

/// Whether a text holds U+FFFD, or UTF-8 that was read as Windows-1252 or Latin-1.
fn is_broken(text: &str) -> bool {
    let is_misread = |(at, first): (usize, char)| {
        // A word in capitals may end with such a letter and be followed by a quotation mark.
        let capitals = || text[..at].chars().rev().take(2).filter(|c| c.is_uppercase()).count() == 2;
        ('\u{c2}'..='\u{f4}').contains(&first) && begins_misread(&text[at..]) && !capitals()
    };
    text.contains('\u{fffd}') || text.contains("â€") || text.char_indices().any(is_misread)
}

/// Whether a text begins with characters whose bytes in Windows-1252 are one of UTF-8. Where a letter with the marks
/// after it may make such a sequence ("ß“", "é\u{a0}»"), a second must follow.
fn begins_misread(text: &str) -> bool {
    let bytes: Vec<u8> = text.chars().map_while(misread_byte).take(8).collect();
    let length = |bytes: &[u8]| {
        let valid = bytes.utf8_chunks().next().and_then(|chunk| chunk.valid().chars().next());
        valid.map_or(0, char::len_utf8)
    };
    let first = length(&bytes);
    let is_sure = matches!(bytes[..], [0xc2..=0xc5 | 0xf0, ..] | [0xe2, 0x80 | 0x82 | 0x84, ..]);
    first > 0 && (is_sure || length(&bytes[first..]) > 0)
}

/// The byte of a character in Windows-1252, in Latin-1 where that has none; none for ASCII.
fn misread_byte(c: char) -> Option<u8> {
    const FROM_80: &str = "€\u{81}‚ƒ„…†‡ˆ‰Š‹Œ\u{8d}Ž\u{8f}\u{90}‘’“”•–—˜™š›œ\u{9d}žŸ";
    match c {
        '\u{80}'..='\u{ff}' => u8::try_from(c).ok(),
        _ => (0x80..).zip(FROM_80.chars()).find(|(_, own)| *own == c).map(|(byte, _)| byte),
    }
}
