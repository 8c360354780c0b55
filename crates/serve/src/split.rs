//! An answer's text taken apart as it arrives: what was thought, what is said, and which tools are called.
//!
//! What cannot be told yet is held back; how the text was cut into pieces makes no difference to what comes out.

use crate::calls::{Call, Found, Object, head, read};
use crate::stop::open_prefix;
use crate::tools::CallStyle;

/// A part of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Part {
    /// Thought, between the family's marks.
    Thought(String),
    /// Said.
    Text(String),
    /// A call: whole, or as far as its name.
    Call(Call),
    /// More of the last call's arguments.
    Arguments(String),
}

/// What to look for in an answer.
#[derive(Debug, Clone, Default)]
pub(crate) struct Shape {
    /// The marks around a thought, where the model writes them.
    pub(crate) thought: Option<(&'static str, &'static str)>,
    /// The prompt has begun a thought already.
    pub(crate) thinks: bool,
    /// How calls are written, where tools may be called.
    pub(crate) calls: Option<CallStyle>,
    /// The names of the tools.
    pub(crate) names: Vec<String>,
    /// At most one call is reported.
    pub(crate) single: bool,
    /// A grammar makes the answer calls and nothing else, so that they can be handed out before they are complete.
    pub(crate) forced: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Nothing but space has come.
    Start,
    Thought,
    /// A thought has ended; space after it belongs to nobody.
    Between,
    Said,
}

/// Takes one answer apart.
#[derive(Debug, Clone)]
pub(crate) struct Splitter {
    shape: Shape,
    place: Place,
    held: String,
    /// Space that is said only if text follows it, not before a call.
    space: String,
    calls: usize,
    /// The arguments that a grammar is making.
    arguments: Option<Object>,
    /// Some of the thought, or of what is said, has been handed out.
    thought: bool,
    spoken: bool,
}

impl Splitter {
    pub(crate) fn new(shape: Shape) -> Self {
        let place = if shape.thinks { Place::Thought } else { Place::Start };
        let (held, space) = (String::new(), String::new());
        Self { shape, place, held, space, calls: 0, arguments: None, thought: false, spoken: false }
    }

    /// Takes the next piece; the parts that are certain now.
    pub(crate) fn push(&mut self, piece: &str) -> Vec<Part> {
        self.held.push_str(piece);
        self.run(false)
    }

    /// The answer has ended; the rest.
    pub(crate) fn finish(&mut self) -> Vec<Part> {
        let mut parts = self.run(true);
        if self.calls == 0 && !self.space.is_empty() {
            merge(&mut parts, Part::Text(std::mem::take(&mut self.space)));
        }
        parts
    }

    fn run(&mut self, ended: bool) -> Vec<Part> {
        let mut parts = Vec::new();
        loop {
            let before = (self.place, self.held.len());
            match self.place {
                Place::Start => self.start(ended),
                Place::Thought => self.thought(ended, &mut parts),
                Place::Between => {
                    let start = self.held.len() - self.held.trim_start().len();
                    self.held.drain(..start);
                    if !self.held.is_empty() {
                        self.place = Place::Said;
                    }
                }
                Place::Said => self.said(ended, &mut parts),
            }
            if before == (self.place, self.held.len()) {
                return parts;
            }
        }
    }

    /// A thought comes first or not at all.
    fn start(&mut self, ended: bool) {
        let text = self.held.trim_start();
        let Some((open, _)) = self.shape.thought else {
            self.place = Place::Said;
            return;
        };
        if let Some(rest) = text.strip_prefix(open) {
            self.held = rest.to_owned();
            self.place = Place::Thought;
        } else if ended || !open.starts_with(text) {
            self.place = Place::Said;
        }
    }

    fn thought(&mut self, ended: bool, parts: &mut Vec<Part>) {
        let close = self.shape.thought.map_or("", |(_, close)| close);
        if !self.thought {
            let start = self.held.len() - self.held.trim_start().len();
            self.held.drain(..start);
        }
        let (end, found) = match self.held.find(close) {
            Some(at) => (at, true),
            None if ended => (self.held.len(), false),
            None => (self.held.len() - open_prefix(&self.held, close), false),
        };
        // Space is said with what follows it, so that none is left at the end of a thought.
        let kept = self.held[..end].trim_end().len();
        if kept > 0 {
            self.thought = true;
            merge(parts, Part::Thought(self.held[..kept].to_owned()));
        }
        if found {
            self.held.drain(..end + close.len());
            self.place = Place::Between;
        } else if ended {
            self.held.clear();
        } else {
            self.held.drain(..kept);
        }
    }

    fn said(&mut self, ended: bool, parts: &mut Vec<Part>) {
        let Some(style) = self.shape.calls else {
            self.say(self.held.len(), parts);
            return;
        };
        if self.shape.forced {
            self.forced(style, ended, parts);
            return;
        }
        if self.shape.single && self.calls > 0 {
            self.held.clear();
            return;
        }
        let Some(at) = self.begin(style) else {
            let keep = if ended { 0 } else { open_prefix(&self.held, style.mark()) };
            self.say(self.held.len() - keep, parts);
            return;
        };
        self.say(at, parts);
        let names = &self.shape.names;
        match read(style, &self.held, ended, |name| names.iter().any(|known| known == name)) {
            Found::Calls(calls, end) => {
                self.held.drain(..end);
                self.space.clear();
                let most = if self.shape.single { 1 } else { calls.len() };
                for call in calls.into_iter().take(most) {
                    self.calls += 1;
                    parts.push(Part::Call(call));
                }
            }
            Found::Text(end) => {
                let text: String = self.held.drain(..end).collect();
                let text = std::mem::take(&mut self.space) + &text;
                self.spoken = true;
                merge(parts, Part::Text(text));
            }
            Found::Open => {}
        }
    }

    /// What a grammar makes is a call as soon as its name is there; between two there is nothing to be said.
    fn forced(&mut self, style: CallStyle, ended: bool, parts: &mut Vec<Part>) {
        if let Some(object) = &mut self.arguments {
            let end = object.end(&self.held);
            let text: String = self.held.drain(..end.unwrap_or(self.held.len())).collect();
            if end.is_some() {
                self.arguments = None;
            }
            if !text.is_empty() {
                merge(parts, Part::Arguments(text));
            }
        } else if let Some((name, end)) = head(style, &self.held) {
            self.held.drain(..end);
            self.calls += 1;
            self.arguments = Some(Object::default());
            parts.push(Part::Call(Call { name, arguments: String::new() }));
        } else if ended {
            // Cut before there was a name.
            let rest = std::mem::take(&mut self.held);
            if self.calls == 0 && !rest.is_empty() {
                merge(parts, Part::Text(rest));
            }
        }
    }

    /// Where calls begin.
    fn begin(&self, style: CallStyle) -> Option<usize> {
        let mark = self.held.find(style.mark());
        // An object alone is a call only if nothing was said before.
        let brace = self.held.len() - self.held.trim_start().len();
        let bare = style == CallStyle::Bare
            && !self.spoken
            && self.calls == 0
            && self.held[brace..].starts_with('{');
        if bare { Some(brace) } else { mark }
    }

    /// Says the first `end` bytes; space at their end waits, since before a call it would be nobody's.
    fn say(&mut self, end: usize, parts: &mut Vec<Part>) {
        let text: String = self.held.drain(..end).collect();
        if self.shape.calls.is_none() {
            if !text.is_empty() {
                merge(parts, Part::Text(text));
            }
            return;
        }
        let said = text.trim_end().len();
        if said > 0 {
            let whole = std::mem::take(&mut self.space) + &text[..said];
            self.spoken = true;
            merge(parts, Part::Text(whole));
        }
        self.space.push_str(&text[said..]);
    }
}

/// Adds a part, to the one before it if it is of the same kind.
fn merge(parts: &mut Vec<Part>, part: Part) {
    match (parts.last_mut(), part) {
        (Some(Part::Text(before)), Part::Text(text))
        | (Some(Part::Thought(before)), Part::Thought(text))
        | (Some(Part::Arguments(before)), Part::Arguments(text)) => before.push_str(&text),
        (_, part) => parts.push(part),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(calls: Option<CallStyle>) -> Shape {
        let names = vec!["f".to_owned()];
        Shape { thought: Some(("<think>", "</think>")), thinks: false, calls, names, ..Shape::default() }
    }

    fn split(shape: &Shape, pieces: &[&str]) -> Vec<Part> {
        let mut splitter = Splitter::new(shape.clone());
        let mut parts = Vec::new();
        for piece in pieces {
            splitter.push(piece).into_iter().for_each(|part| merge(&mut parts, part));
        }
        splitter.finish().into_iter().for_each(|part| merge(&mut parts, part));
        parts
    }

    fn text(text: &str) -> Part {
        Part::Text(text.into())
    }

    fn call(arguments: &str) -> Part {
        Part::Call(Call { name: "f".into(), arguments: arguments.into() })
    }

    #[test]
    fn thoughts_and_calls_are_told_from_what_is_said() {
        let tagged = shape(Some(CallStyle::Tagged));
        let thought = Part::Thought("so so".into());
        let whole = "\n<think>\nso so\n</think>\n\nHere:\n<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>\n";
        assert_eq!(split(&tagged, &[whole]), [thought.clone(), text("Here:"), call("{}")]);
        assert_eq!(split(&shape(None), &["<think>so so"]), std::slice::from_ref(&thought));
        let begun = Shape { thinks: true, ..shape(None) };
        assert_eq!(split(&begun, &["so so</think>yes"]), [thought, text("yes")]);
        // A thought comes first or it is text.
        assert_eq!(split(&shape(None), &[" a <think>b"]), [text(" a <think>b")]);
        let twice = "<tool_call>{\"name\":\"f\",\"arguments\":{\"a\":1}}</tool_call>".repeat(2);
        assert_eq!(split(&tagged, &[&twice]), [call("{\"a\":1}"), call("{\"a\":1}")]);
        let single = Shape { single: true, ..shape(Some(CallStyle::Tagged)) };
        assert_eq!(split(&single, &[&twice]), [call("{\"a\":1}")]);
        let bare = shape(Some(CallStyle::Bare));
        assert_eq!(split(&bare, &[" ", "{\"name\": \"f\", \"parameters\": {}}"]), [call("{}")]);
        assert_eq!(split(&bare, &[" {\"name\": \"g\"} "]), [text(" {\"name\": \"g\"} ")]);
    }

    #[test]
    fn a_broken_call_is_text_and_nothing_is_lost() {
        let tagged = shape(Some(CallStyle::Tagged));
        for whole in
            ["a <tool_call>{]</tool_call> b ", "a <tool_call>{\"name\"", "a <tool_ca", " ", "<think", "a\n\n"]
        {
            assert_eq!(split(&tagged, &[whole]), [text(whole)], "{whole:?}");
        }
    }

    #[test]
    fn a_forced_call_is_handed_out_as_it_comes() {
        let forced = |style| Shape { forced: true, ..shape(Some(style)) };
        let call = |arguments: &str| [call(""), Part::Arguments(arguments.into())];
        let arguments = "{\"a\": [\"}\\\"{\", {}]}";
        for (style, whole) in [
            (
                CallStyle::Tagged,
                format!("<tool_call>\n{{\"name\": \"f\", \"arguments\": {arguments}}}\n</tool_call>"),
            ),
            (CallStyle::Bare, format!("{{\"name\": \"f\", \"parameters\": {arguments}}}")),
            (CallStyle::List, format!("[TOOL_CALLS] [{{\"name\": \"f\", \"arguments\": {arguments}}}]")),
            (CallStyle::Named, format!("[TOOL_CALLS]f[ARGS]{arguments}")),
        ] {
            assert_eq!(split(&forced(style), &[&whole]), call(arguments), "{whole}");
            let chars: Vec<String> = whole.chars().map(String::from).collect();
            let chars: Vec<&str> = chars.iter().map(String::as_str).collect();
            assert_eq!(split(&forced(style), &chars), call(arguments), "{whole}");
            assert_eq!(split(&forced(style), &[&whole.repeat(2)]).len(), 4, "{whole}");
        }
        assert_eq!(split(&forced(CallStyle::Tagged), &["<tool_call>\n{\"na"]), [text("<tool_call>\n{\"na")]);
        let cut = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a";
        assert_eq!(split(&forced(CallStyle::Tagged), &[cut]), call("{\"a"));
    }

    #[test]
    fn where_the_text_is_cut_makes_no_difference() {
        let whole = "<think> 가 </think> \n b <tool_call>{\"name\": \"f\", \"arguments\": {\"x\": \"é\"}}</tool_call> <tool_call>{</tool_call> c ";
        for calls in [None, Some(CallStyle::Tagged), Some(CallStyle::Bare), Some(CallStyle::List)] {
            let shape = shape(calls);
            let expected = split(&shape, &[whole]);
            for (at, _) in whole.char_indices() {
                assert_eq!(split(&shape, &[&whole[..at], &whole[at..]]), expected, "{calls:?} at {at}");
            }
            let chars: Vec<String> = whole.chars().map(String::from).collect();
            let chars: Vec<&str> = chars.iter().map(String::as_str).collect();
            assert_eq!(split(&shape, &chars), expected, "{calls:?}");
        }
    }
}
