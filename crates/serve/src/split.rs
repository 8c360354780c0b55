//! An answer's text taken apart as it arrives: what was thought, what is said, and which tools are called.
//!
//! What cannot be told yet is held back; how the text was cut into pieces makes no difference to what comes out.

use crate::calls::{Call, Found, Lead, Object, head, lead, next_lead, read};
use crate::stop::open_prefix;
use crate::tools::{CallStyle, TAG_CLOSE};

/// A part of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Part {
    /// Thought, between the family's marks.
    Thought(String),
    /// Said.
    Text(String),
    /// A call: as far as its name, or whole where it is written in another order than usual.
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
    /// A grammar makes the answer calls and nothing else.
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

/// Where in a call that is handed out as it comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Inside {
    /// In none.
    Nothing,
    /// In its arguments.
    Arguments(Object),
    /// Behind them, in the object around them; true when something of that has come.
    Around(Object, bool),
    /// Behind that object, where the style puts an end or another call.
    Behind,
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
    inside: Inside,
    /// Some of the thought, or of what is said, has been handed out.
    thought: bool,
    spoken: bool,
}

impl Splitter {
    pub(crate) fn new(shape: Shape) -> Self {
        let place = if shape.thinks { Place::Thought } else { Place::Start };
        let (held, space) = (String::new(), String::new());
        let inside = Inside::Nothing;
        Self { shape, place, held, space, calls: 0, inside, thought: false, spoken: false }
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
            let before = (self.place, self.inside, self.held.len());
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
            if before == (self.place, self.inside, self.held.len()) {
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
        match self.inside {
            Inside::Nothing if self.shape.forced => return self.forced(style, ended, parts),
            Inside::Nothing => {}
            Inside::Arguments(object) => return self.arguments(style, object, parts),
            Inside::Around(object, begun) => return self.around(object, begun, ended),
            Inside::Behind => return self.behind(style, ended, parts),
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
        match lead(style, &self.held, |name| self.knows(name)) {
            Lead::Call(name, end) => return self.call(name, end, parts),
            Lead::Open if !ended => return,
            Lead::Open | Lead::Other => {}
        }
        match read(style, &self.held, ended, |name| self.knows(name)) {
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

    fn knows(&self, name: &str) -> bool {
        self.shape.names.iter().any(|known| known == name)
    }

    /// A call begins; its arguments stand behind the first `end` bytes.
    fn call(&mut self, name: String, end: usize, parts: &mut Vec<Part>) {
        self.held.drain(..end);
        self.space.clear();
        self.calls += 1;
        self.inside = Inside::Arguments(Object::default());
        parts.push(Part::Call(Call { name, arguments: String::new() }));
    }

    fn arguments(&mut self, style: CallStyle, mut object: Object, parts: &mut Vec<Part>) {
        let end = object.end(&self.held);
        let text: String = self.held.drain(..end.unwrap_or(self.held.len())).collect();
        self.inside = match end {
            None => Inside::Arguments(object),
            Some(_) if self.shape.forced || style == CallStyle::Named => Inside::Nothing,
            Some(_) => Inside::Around(Object::open(), false),
        };
        if !text.is_empty() {
            merge(parts, Part::Arguments(text));
        }
    }

    /// What else the object of a call holds is nobody's; what cannot belong to it is said.
    fn around(&mut self, mut object: Object, begun: bool, ended: bool) {
        let text = self.held.trim_start();
        if !begun && !text.is_empty() && !text.starts_with(['}', ',']) {
            self.inside = Inside::Nothing;
            return;
        }
        let begun = begun || !text.is_empty();
        if !begun && !ended {
            return;
        }
        let end = object.end(&self.held);
        self.held.drain(..end.unwrap_or(self.held.len()));
        self.inside = if end.is_some() { Inside::Behind } else { Inside::Around(object, begun) };
    }

    /// The end of a call, or of a list of them, is nobody's, too.
    fn behind(&mut self, style: CallStyle, ended: bool, parts: &mut Vec<Part>) {
        let single = self.shape.single;
        match next_lead(style, &self.held, |name| self.knows(name)) {
            // A further one that is not wanted goes with all that follows.
            Lead::Call(name, end) if !single => return self.call(name, end, parts),
            Lead::Open if !ended => return,
            Lead::Call(..) | Lead::Open | Lead::Other => {}
        }
        let close = match style {
            CallStyle::Tagged => TAG_CLOSE,
            CallStyle::List => "]",
            CallStyle::Bare | CallStyle::Named => "",
        };
        let text = self.held.trim_start();
        let space = self.held.len() - text.len();
        if text.starts_with(close) && !close.is_empty() {
            self.held.drain(..space + close.len());
        } else if close.starts_with(text) {
            if !ended {
                return;
            }
            self.held.clear();
        }
        self.inside = Inside::Nothing;
    }

    /// What a grammar makes is a call as soon as its name is there; between two there is nothing to be said.
    fn forced(&mut self, style: CallStyle, ended: bool, parts: &mut Vec<Part>) {
        if let Some((name, end)) = head(style, &self.held) {
            self.call(name, end, parts);
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

    /// A call that was handed out as it came.
    fn streamed(arguments: &str) -> [Part; 2] {
        [call(""), Part::Arguments(arguments.into())]
    }

    fn letters(whole: &str) -> Vec<&str> {
        whole.char_indices().map(|(at, c)| &whole[at..at + c.len_utf8()]).collect()
    }

    #[test]
    fn thoughts_and_calls_are_told_from_what_is_said() {
        let tagged = shape(Some(CallStyle::Tagged));
        let thought = Part::Thought("so so".into());
        let whole = "\n<think>\nso so\n</think>\n\nHere:\n<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>\n";
        assert_eq!(
            split(&tagged, &[whole]),
            [&[thought.clone(), text("Here:")][..], &streamed("{}")].concat()
        );
        assert_eq!(split(&shape(None), &["<think>so so"]), std::slice::from_ref(&thought));
        let begun = Shape { thinks: true, ..shape(None) };
        assert_eq!(split(&begun, &["so so</think>yes"]), [thought, text("yes")]);
        // A thought comes first or it is text.
        assert_eq!(split(&shape(None), &[" a <think>b"]), [text(" a <think>b")]);
        let twice = "<tool_call>{\"name\":\"f\",\"arguments\":{\"a\":1}}</tool_call>".repeat(2);
        assert_eq!(split(&tagged, &[&twice]), [streamed("{\"a\":1}"), streamed("{\"a\":1}")].concat());
        let single = Shape { single: true, ..shape(Some(CallStyle::Tagged)) };
        assert_eq!(split(&single, &[&twice]), streamed("{\"a\":1}"));
        let bare = shape(Some(CallStyle::Bare));
        assert_eq!(split(&bare, &[" ", "{\"name\": \"f\", \"parameters\": {}}"]), streamed("{}"));
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
            assert_eq!(split(&forced(style), &[&whole]), streamed(arguments), "{whole}");
            assert_eq!(split(&forced(style), &letters(&whole)), streamed(arguments), "{whole}");
            assert_eq!(split(&forced(style), &[&whole.repeat(2)]).len(), 4, "{whole}");
        }
        assert_eq!(split(&forced(CallStyle::Tagged), &["<tool_call>\n{\"na"]), [text("<tool_call>\n{\"na")]);
        let cut = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a";
        assert_eq!(split(&forced(CallStyle::Tagged), &[cut]), streamed("{\"a"));
    }

    #[test]
    fn a_call_that_need_not_have_come_is_handed_out_as_it_comes_too() {
        let arguments = "{\"a\": [\"}\\\"</tool_call>{\", {}]}";
        let object = |key: &str| format!("{{ \"name\" : \"f\", \"{key}\": {arguments}}}");
        for (style, whole, two) in [
            (CallStyle::Tagged, format!("<tool_call>\n{}\n</tool_call>", object("arguments")), ""),
            (CallStyle::Bare, object("parameters"), "; "),
            (CallStyle::Bare, format!("<|python_tag|>{}", object("parameters")), ""),
            (CallStyle::Bare, object("parameters").replacen('{', "{\"type\": \"function\", ", 1), "\n"),
            (CallStyle::List, format!("[TOOL_CALLS] [{}]", object("arguments")), ""),
            (CallStyle::Named, format!("[TOOL_CALLS]f[ARGS]{arguments}"), ""),
        ] {
            let shape = shape(Some(style));
            assert_eq!(split(&shape, &[&whole]), streamed(arguments), "{whole}");
            let mut splitter = Splitter::new(shape.clone());
            let parts: Vec<Part> = letters(&whole).iter().flat_map(|c| splitter.push(c)).collect();
            assert_eq!(parts[0], call(""), "{whole}");
            assert_eq!(parts.len(), 1 + arguments.len(), "each letter comes at once: {whole}");
            assert_eq!(splitter.finish(), []);
            let again = format!("{whole}{two}{whole}");
            assert_eq!(split(&shape, &[&again]), [streamed(arguments), streamed(arguments)].concat());
            assert_eq!(split(&shape, &letters(&again)), [streamed(arguments), streamed(arguments)].concat());
            let single = Shape { single: true, ..shape };
            assert_eq!(split(&single, &letters(&again)), streamed(arguments), "{again}");
        }
        let list = format!("[TOOL_CALLS][{0}, {0}] b", object("arguments"));
        let both = [streamed(arguments), streamed(arguments)].concat();
        let listed = shape(Some(CallStyle::List));
        assert_eq!(split(&listed, &letters(&list)), [&both[..], &[text(" b")]].concat());
        let single = Shape { single: true, ..listed };
        assert_eq!(split(&single, &letters(&list)), streamed(arguments));
    }

    #[test]
    fn around_a_call_nothing_is_lost_and_another_order_is_read_whole() {
        let tagged = shape(Some(CallStyle::Tagged));
        let head = "<tool_call>{\"name\": \"f\", \"arguments\": {}";
        for (rest, said) in [
            (", \"id\": \"}\"}</tool_call> b", " b"),
            ("} b", " b"),
            ("}</tool_", ""),
            ("", ""),
            ("] b", "] b"),
            ("}}</tool_call>", "}</tool_call>"),
        ] {
            let whole = format!("{head}{rest}");
            let mut expected = streamed("{}").to_vec();
            expected.extend((!said.is_empty()).then(|| text(said)));
            assert_eq!(split(&tagged, &[&whole]), expected, "{whole}");
            assert_eq!(split(&tagged, &letters(&whole)), expected, "{whole}");
        }
        for whole in [
            "<tool_call>{\"arguments\": {}, \"name\": \"f\"}</tool_call>",
            "<tool_call>[{\"name\": \"f\", \"arguments\": {}}]</tool_call>",
            "<tool_call>{\"name\": \"f\", \"arguments\": \"{}\"}</tool_call>",
        ] {
            assert_eq!(split(&tagged, &letters(whole)), [call("{}")], "{whole}");
        }
        let other = "<tool_call>{\"name\": \"g\", \"arguments\": {}}</tool_call>";
        let unknown = Part::Call(Call { name: "g".into(), arguments: "{}".into() });
        assert_eq!(split(&tagged, &letters(other)), [unknown]);
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
            assert_eq!(split(&shape, &letters(whole)), expected, "{calls:?}");
        }
    }
}
