//! Calls of tools in what a model has written: from text in a family's style to names and arguments.

use serde_json::{Deserializer, Value};

use crate::tools::{ARGS, CALLS, CallStyle, MAX_NAME, PYTHON_TAG, TAG_CLOSE, TAG_OPEN};

/// A call: a name, and the arguments as JSON text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) name: String,
    pub(crate) arguments: String,
}

/// What the beginning of a text with calls turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Calls, in the first so many bytes.
    Calls(Vec<Call>, usize),
    /// No call, in the first so many bytes.
    Text(usize),
    /// More text is needed to tell.
    Open,
}

/// What a text begins with, before it is known whether all of it is a call.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Lead {
    /// A call of this tool; its arguments, an object, begin behind the first so many bytes.
    Call(String, usize),
    /// No call in the usual order: its name first, then its arguments.
    Other,
    /// More text is needed to tell.
    Open,
}

/// Follows a JSON object that arrives in pieces to its end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Object {
    depth: usize,
    string: bool,
    escaped: bool,
}

impl Object {
    /// An object whose first brace has gone by.
    pub(crate) fn open() -> Self {
        Self { depth: 1, ..Self::default() }
    }

    /// The place behind the brace that ends the object, if it is in this piece.
    pub(crate) fn end(&mut self, piece: &str) -> Option<usize> {
        for (at, byte) in piece.bytes().enumerate() {
            match (self.string, byte) {
                (true, _) if self.escaped => self.escaped = false,
                (true, b'\\') => self.escaped = true,
                (_, b'"') => self.string = !self.string,
                (false, b'{' | b'[') => self.depth += 1,
                (false, b'}' | b']') => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
            if self.depth == 0 && !self.string && matches!(byte, b'}' | b']') {
                return Some(at + 1);
            }
        }
        None
    }
}

/// The next call in text that a grammar has made: its name, and where its arguments begin.
pub(crate) fn head(style: CallStyle, text: &str) -> Option<(String, usize)> {
    let (open, close) = match style {
        CallStyle::Tagged | CallStyle::List => ("{\"name\": \"", "\", \"arguments\": "),
        CallStyle::Bare => ("{\"name\": \"", "\", \"parameters\": "),
        CallStyle::Named => (CALLS, ARGS),
    };
    let start = text.find(open)? + open.len();
    let end = start + text[start..].find(close)?;
    Some((text[start..end].to_owned(), end + close.len()))
}

/// How `text` begins, which begins with the style's mark (or, for [`CallStyle::Bare`], with a brace). Who has seen the name of
/// a `known` tool and the brace of its arguments need not wait for the end.
pub(crate) fn lead(style: CallStyle, text: &str, known: impl Fn(&str) -> bool) -> Lead {
    let mut cursor = Cursor { text, at: 0 };
    let found = match style {
        CallStyle::Tagged => cursor.word(TAG_OPEN).and_then(|()| cursor.object(known)),
        CallStyle::Bare if text.starts_with('{') => cursor.object(known),
        CallStyle::Bare => cursor.word(PYTHON_TAG).and_then(|()| cursor.object(known)),
        CallStyle::List => cursor.word(CALLS).and_then(|()| cursor.listed(known)),
        CallStyle::Named => cursor.word(CALLS).and_then(|()| cursor.named(known)),
    };
    found.unwrap_or_else(|other| other)
}

/// As [`lead`], for what stands behind the object of a call: a further one, behind what the style puts between them.
pub(crate) fn next_lead(style: CallStyle, text: &str, known: impl Fn(&str) -> bool) -> Lead {
    let mut cursor = Cursor { text, at: 0 };
    let found = match style {
        CallStyle::List => cursor.word(",").and_then(|()| cursor.object(known)),
        CallStyle::Bare => {
            cursor.space();
            cursor.at += usize::from(cursor.rest().starts_with([';', ',']));
            cursor.object(known)
        }
        CallStyle::Tagged | CallStyle::Named => Err(Lead::Other),
    };
    found.unwrap_or_else(|other| other)
}

/// Reads a text that may not be complete; what it does not find is [`Lead::Open`] where more text could bring it.
struct Cursor<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Cursor<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn space(&mut self) {
        self.at = self.text.len() - self.rest().trim_start().len();
    }

    /// A word, behind space.
    fn word(&mut self, word: &str) -> Result<(), Lead> {
        self.space();
        if self.rest().starts_with(word) {
            self.at += word.len();
            return Ok(());
        }
        Err(if word.starts_with(self.rest()) { Lead::Open } else { Lead::Other })
    }

    /// A string without escapes, behind space, that is no longer than a name: so it does not matter how much of it has come.
    fn string(&mut self) -> Result<&'a str, Lead> {
        self.word("\"")?;
        let rest = self.rest();
        match rest.find(['"', '\\']) {
            Some(end) if end <= MAX_NAME && rest[end..].starts_with('"') => {
                self.at += end + 1;
                Ok(&rest[..end])
            }
            None if rest.len() <= MAX_NAME => Err(Lead::Open),
            _ => Err(Lead::Other),
        }
    }

    /// `{"name": ..., "arguments": {` without the last brace; Llama writes `"type": "function"` before it now and then.
    fn object(&mut self, known: impl Fn(&str) -> bool) -> Result<Lead, Lead> {
        self.word("{")?;
        let mut key = self.string()?;
        if key == "type" {
            self.word(":")?;
            self.string()?;
            self.word(",")?;
            key = self.string()?;
        }
        if key != "name" {
            return Err(Lead::Other);
        }
        self.word(":")?;
        let name = self.string()?;
        self.word(",")?;
        if !known(name) || !matches!(self.string()?, "arguments" | "parameters") {
            return Err(Lead::Other);
        }
        self.word(":")?;
        self.arguments(name)
    }

    /// An object, or a list that begins with one.
    fn listed(&mut self, known: impl Fn(&str) -> bool) -> Result<Lead, Lead> {
        self.space();
        self.at += usize::from(self.rest().starts_with('['));
        self.object(known)
    }

    /// `name[ARGS]`, before a brace.
    fn named(&mut self, known: impl Fn(&str) -> bool) -> Result<Lead, Lead> {
        let rest = self.rest();
        let most = MAX_NAME + ARGS.len();
        let brace = match rest.find('{') {
            Some(brace) if brace <= most => brace,
            None if rest.len() <= most => return Err(Lead::Open),
            _ => return Err(Lead::Other),
        };
        let name = rest[..brace].trim().trim_end_matches(ARGS).trim();
        if !known(name) {
            return Err(Lead::Other);
        }
        self.at += brace;
        self.arguments(name)
    }

    fn arguments(&mut self, name: &str) -> Result<Lead, Lead> {
        self.word("{")?;
        Ok(Lead::Call(name.to_owned(), self.at - 1))
    }
}

/// Reads the beginning of `text`, which begins with the style's mark (or, for [`CallStyle::Bare`], with a brace); `ended`
/// says that nothing follows; `known` whether a tool has this name.
pub(crate) fn read(style: CallStyle, text: &str, ended: bool, known: impl Fn(&str) -> bool) -> Found {
    let found = match style {
        CallStyle::Tagged => tagged(text, ended),
        // One value after another, of which the last may go on: the whole is read when it has ended.
        _ if !ended => Found::Open,
        CallStyle::Bare => whole(text, bare(text, known)),
        CallStyle::List | CallStyle::Named => whole(text, marked(text)),
    };
    match found {
        Found::Open if ended => Found::Text(text.len()),
        found => found,
    }
}

fn whole(text: &str, calls: Option<Vec<Call>>) -> Found {
    calls.map_or(Found::Text(text.len()), |calls| Found::Calls(calls, text.len()))
}

/// `<tool_call>{...}</tool_call>`, where the braces may hold a list of calls.
fn tagged(text: &str, ended: bool) -> Found {
    let Some(inner) = text.strip_prefix(TAG_OPEN) else { return Found::Text(text.len()) };
    let mut from = 0;
    while let Some(at) = inner[from..].find(TAG_CLOSE).map(|at| from + at) {
        let end = TAG_OPEN.len() + at + TAG_CLOSE.len();
        match serde_json::from_str::<Value>(&inner[..at]) {
            Ok(value) => return calls_of(&value).map_or(Found::Text(end), |calls| Found::Calls(calls, end)),
            // The mark stands within a string that goes on.
            Err(e) if e.is_eof() => from = at + TAG_CLOSE.len(),
            Err(_) => return Found::Text(end),
        }
    }
    if !ended {
        return Found::Open;
    }
    // Some models end the answer in place of the call.
    whole(text, serde_json::from_str(inner.trim()).ok().as_ref().and_then(calls_of))
}

/// JSON objects side by side, perhaps with `;` or `,` between them. An answer may be JSON without being a call, so names
/// must be known.
fn bare(text: &str, known: impl Fn(&str) -> bool) -> Option<Vec<Call>> {
    let text = text.strip_prefix(CallStyle::Bare.mark()).unwrap_or(text);
    let mut calls = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let mut values = Deserializer::from_str(rest).into_iter::<Value>();
        let value = values.next()?.ok()?;
        calls.extend(calls_of(&value)?);
        rest =
            rest[values.byte_offset()..].trim_start_matches(|c: char| c.is_whitespace() || ";,".contains(c));
    }
    (!calls.is_empty() && calls.iter().all(|call| known(&call.name))).then_some(calls)
}

/// `[TOOL_CALLS]` before a list of calls, before each call, or before `name[ARGS]{...}`.
fn marked(text: &str) -> Option<Vec<Call>> {
    let mut calls = Vec::new();
    for part in text.strip_prefix(CALLS)?.split(CALLS) {
        let part = part.trim();
        if part.starts_with(['[', '{']) {
            for value in Deserializer::from_str(part).into_iter::<Value>() {
                calls.extend(calls_of(&value.ok()?)?);
            }
            continue;
        }
        let brace = part.find('{')?;
        let name = part[..brace].trim().trim_end_matches(ARGS).trim();
        let arguments: Value = serde_json::from_str(&part[brace..]).ok()?;
        calls.extend(call(name, &arguments));
    }
    (!calls.is_empty()).then_some(calls)
}

/// A call, or a list of at least one.
fn calls_of(value: &Value) -> Option<Vec<Call>> {
    match value {
        Value::Array(items) if !items.is_empty() => items.iter().map(one).collect(),
        other => Some(vec![one(other)?]),
    }
}

fn one(value: &Value) -> Option<Call> {
    let arguments = value.get("arguments").or_else(|| value.get("parameters"))?;
    call(value.get("name")?.as_str()?, arguments)
}

fn call(name: &str, arguments: &Value) -> Option<Call> {
    let arguments = match arguments {
        Value::Object(_) => arguments.to_string(),
        // Written as OpenAI's clients get them: JSON in a string.
        Value::String(text) => serde_json::from_str::<Value>(text).ok().filter(Value::is_object)?.to_string(),
        _ => return None,
    };
    (!name.is_empty()).then(|| Call { name: name.to_owned(), arguments })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(found: Found) -> Vec<(String, String)> {
        match found {
            Found::Calls(calls, _) => calls.into_iter().map(|call| (call.name, call.arguments)).collect(),
            other => panic!("{other:?}"),
        }
    }

    fn read_all(style: CallStyle, text: &str) -> Found {
        read(style, text, true, |name| name == "f" || name == "g")
    }

    #[test]
    fn each_style_is_read() {
        let f = ("f".to_owned(), "{\"a\":1}".to_owned());
        let g = ("g".to_owned(), "{}".to_owned());
        for (style, text) in [
            (CallStyle::Tagged, "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>"),
            (CallStyle::Tagged, "<tool_call>[{\"name\": \"f\", \"arguments\": \"{\\\"a\\\": 1}\"}]"),
            (CallStyle::Bare, "{\"name\": \"f\", \"parameters\": {\"a\": 1}}"),
            (CallStyle::Bare, "<|python_tag|> {\"name\": \"f\", \"parameters\": {\"a\": 1}} "),
            (CallStyle::List, "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"a\": 1}}]"),
            (CallStyle::Named, "[TOOL_CALLS]f[ARGS]{\"a\": 1}"),
        ] {
            assert_eq!(names(read_all(style, text)), std::slice::from_ref(&f), "{text}");
        }
        for (style, text) in [
            (
                CallStyle::Bare,
                "{\"name\": \"f\", \"parameters\": {\"a\": 1}}; {\"name\":\"g\",\"parameters\":{}}",
            ),
            (
                CallStyle::List,
                "[TOOL_CALLS] [{\"name\":\"f\",\"arguments\":{\"a\":1}},{\"name\":\"g\",\"arguments\":{}}]",
            ),
            (CallStyle::Named, "[TOOL_CALLS]f[ARGS]{\"a\": 1}[TOOL_CALLS]g[ARGS]{}"),
        ] {
            assert_eq!(names(read_all(style, text)), [f.clone(), g.clone()], "{text}");
        }
    }

    #[test]
    fn what_is_no_call_is_text() {
        for (style, text) in [
            (CallStyle::Tagged, "<tool_call>{\"name\": \"f\"}</tool_call>"),
            (CallStyle::Tagged, "<tool_call>{\"name\": \"f\", \"arguments\": [}</tool_call>"),
            (CallStyle::Tagged, "<tool_call>{\"name\": \"f\", \"arg"),
            (CallStyle::Tagged, "<tool_call>[]</tool_call>"),
            (CallStyle::Bare, "{\"name\": \"Bob\", \"parameters\": {}}"),
            (CallStyle::Bare, "{\"name\": \"f\", \"parameters\": 1}"),
            (CallStyle::Bare, "<|python_tag|>f.call(a=1)"),
            (CallStyle::List, "[TOOL_CALLS]"),
            (CallStyle::Named, "[TOOL_CALLS]f"),
        ] {
            assert_eq!(read_all(style, text), Found::Text(text.len()), "{text}");
        }
    }

    #[test]
    fn a_mark_within_a_string_does_not_end_the_call() {
        let text = "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"</tool_call>\"}}</tool_call> more";
        let Found::Calls(calls, end) = read(CallStyle::Tagged, text, false, |_| true) else { panic!() };
        assert_eq!((calls[0].arguments.as_str(), &text[end..]), ("{\"a\":\"</tool_call>\"}", " more"));
    }
}
