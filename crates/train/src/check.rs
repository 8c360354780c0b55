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

use crate::data::{Data, DataConfig, Encoded, Encoder, Example, Form, Marks, Split, is_from, unparsed};

/// A usual fault of training data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Fault {
    /// No token of the row is a target: it is skipped.
    NothingToTrain,
    /// The row's end is cut off.
    Truncated,
    /// A text or a question without words.
    EmptyText,
    /// An answer without words.
    EmptyAnswer,
    /// The last message is not the assistant's.
    NoAnswer,
    /// Nothing after the answer ends it.
    NoEndOfTurn,
    /// Two tokens that begin a text.
    DoubleBos,
    /// Two tokens that end a text.
    DoubleEnd,
    /// Masked: the prompt alone is not what the row begins with.
    MaskShifted,
    /// Thoughts are targets.
    ThinkingTrained,
    /// The template leaves a message out.
    RoleDropped,
    /// A role that no model knows.
    UnknownRole,
    /// Content that is no text, and printed as a program prints it.
    ContentNotText,
    /// Content that holds a special token's text.
    SpecialInContent,
    /// The template leaves the tools out.
    ToolsDropped,
    /// Tools or calls that were given as a string.
    ToolsNotParsed,
    /// Tools that no answer of the file calls.
    ToolsUnused,
    /// A call of a tool that the row does not define.
    UnknownTool,
    /// The template leaves a call out.
    CallDropped,
    /// Masked: a call before the last message is no target.
    CallMasked,
    /// Characters that an earlier conversion broke.
    BrokenCharacters,
    /// A file with rows of several forms.
    MixedForms,
    /// The same row twice in a file.
    Duplicate,
    /// The same row in two files.
    InTwoSplits,
    /// Fewer rows than a batch.
    TooFewRows,
    /// No rows to validate on.
    NoValidation,
}

impl Fault {
    /// The fault's name in messages and reports.
    pub fn name(self) -> &'static str {
        self.words().0
    }

    /// Name, what is the matter with the rows ("2 of 9 rows ..."), and what to do.
    fn words(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::NothingToTrain => (
                "nothing-to-train",
                "have no token to train on and are skipped",
                "the prompt fills max_seq_length, so raise that or shorten the prompt, or the row is empty",
            ),
            Self::Truncated => (
                "truncated",
                "are longer than max_seq_length and lose their end",
                "raise max_seq_length or split the rows",
            ),
            Self::EmptyText => {
                ("empty-text", "have a text or a question without words", "fill them in or drop the rows")
            }
            Self::EmptyAnswer => {
                ("empty-answer", "have an answer without words", "fill them in or drop the rows")
            }
            Self::NoAnswer => (
                "no-answer",
                "do not end with the assistant's message",
                "add the answer, or drop what follows the last one",
            ),
            Self::NoEndOfTurn => (
                "no-end-of-turn",
                "train no token that ends the answer, so the model will not learn to stop",
                "let the chat template write the end token after an answer, or name the token that it writes as \
                 eos_token_id in generation_config.json",
            ),
            Self::DoubleBos => (
                "double-bos",
                "begin with two begin tokens",
                "leave it out of the text: the tokenizer adds one of its own",
            ),
            Self::DoubleEnd => (
                "double-end",
                "end with two end tokens",
                "leave it (and what follows it) out of the text: one is added",
            ),
            Self::MaskShifted => (
                "mask-shifted",
                "do not begin with the tokens of their own prompt, so the mask ends at a wrong place",
                "look at one with graft data show; train such rows without mask_prompt, or change the template so that \
                 a prompt is rendered alike with and without its answer",
            ),
            Self::ThinkingTrained => (
                "thinking-trained",
                "train on thoughts",
                "take them out of the answers, unless the model shall learn to think so",
            ),
            Self::RoleDropped => (
                "role-dropped",
                "have messages that the chat template leaves out",
                "move their content into a message that it keeps",
            ),
            Self::UnknownRole => (
                "unknown-role",
                "have messages of a role that models do not know",
                "use system, user, assistant and tool",
            ),
            Self::ContentNotText => (
                "content-not-text",
                "have content that the template prints as a program's value",
                "write the content as one string",
            ),
            Self::SpecialInContent => (
                "special-token-in-content",
                "hold a special token's text in their content, which becomes that token",
                "take it out: the chat template writes such tokens itself",
            ),
            Self::ToolsDropped => (
                "tools-dropped",
                "define tools that the chat template leaves out",
                "describe them in the system message, or use a model whose template knows tools",
            ),
            Self::ToolsNotParsed => (
                "tools-not-parsed",
                "have a string where a list of tools or calls belongs",
                "parse the string, so that the row has the list itself",
            ),
            Self::ToolsUnused => (
                "tools-unused",
                "define tools, and no answer of the file calls one",
                "add rows with calls, or leave the tools out",
            ),
            Self::UnknownTool => (
                "unknown-tool",
                "call a tool that they do not define",
                "add it to the row's tools, or correct the name",
            ),
            Self::CallDropped => (
                "call-dropped",
                "have tool calls that the chat template leaves out",
                "write the call into the content, or use a model whose template knows calls",
            ),
            Self::CallMasked => (
                "call-masked",
                "have tool calls before the last message, which mask_prompt does not train on",
                "end a row of its own with each call, or train without mask_prompt",
            ),
            Self::BrokenCharacters => (
                "broken-characters",
                "hold characters that were broken when the text was converted",
                "make the file again from its source, read in the right encoding",
            ),
            Self::MixedForms => {
                ("mixed-forms", "have another form than most rows of the file", "write all rows in one form")
            }
            Self::Duplicate => ("duplicate", "repeat an earlier row of the file", "keep one of each"),
            Self::InTwoSplits => (
                "in-two-splits",
                "are in another split as well, so what is measured on them is memory",
                "take them out of one of the two",
            ),
            Self::TooFewRows => (
                "too-few-rows",
                "are fewer than one batch",
                "give more rows or a smaller batch_size: such a training set is refused, and a loss over so few says little",
            ),
            Self::NoValidation => (
                "no-validation",
                "",
                "no rows to validate on, so nothing shows when training begins to hurt: add valid.jsonl",
            ),
        }
    }
}

/// A fault of a file's rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// What is wrong.
    pub fault: Fault,
    /// The lines of the rows it is wrong with.
    pub lines: Vec<usize>,
    /// One sentence: file, name of the fault, how many rows, which, and what to do.
    pub text: String,
}

impl Warning {
    /// `detail` is what the sentence says in brackets before the lines.
    fn new(fault: Fault, file: &Path, rows: usize, lines: Vec<usize>, detail: &str) -> Self {
        let (name, what, advice) = fault.words();
        let file = file.display();
        let text = if what.is_empty() {
            format!("{file}: {name}: {advice}")
        } else {
            let detail = if detail.is_empty() { String::new() } else { format!("{detail}; ") };
            let (count, named) = (lines.len(), self::lines(&lines));
            format!("{file}: {name}: {count} of {rows} rows {what} ({detail}{named}): {advice}")
        };
        Self { fault, lines, text }
    }
}

/// `line 3`, or the first few of several.
pub(crate) fn lines(all: &[usize]) -> String {
    const SHOWN: usize = 8;
    let shown: Vec<String> = all.iter().take(SHOWN).map(ToString::to_string).collect();
    let rest = all.len().saturating_sub(SHOWN);
    let more = if rest > 0 { format!(" and {rest} more") } else { String::new() };
    format!("line{} {}{more}", if all.len() == 1 { "" } else { "s" }, shown.join(", "))
}

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
        if typed.trim_start().is_empty() {
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
            let tail = row.example.tokens.iter().rev().take(END_WITHIN);
            if !tail.into_iter().any(|id| self.marks.ends.contains(id)) {
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
            Value::String(text) if !text.trim().is_empty() => {
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
        // By tokens and length, as what is cut off may differ, each with split, number and line.
        let mut seen: HashMap<(&[u32], usize), (usize, usize, usize)> = HashMap::new();
        for (at, split) in splits.into_iter().enumerate() {
            // Lines that repeat a row of each split up to this one, and the first row they repeat.
            let mut repeated: [(Vec<usize>, usize); 3] = Default::default();
            // A split of several data sets has a line more than once.
            for (number, example) in split.examples.iter().enumerate() {
                let key = (example.tokens.as_slice(), example.full_length);
                let (other, first, line) = *seen.entry(key).or_insert((at, number, example.line));
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
