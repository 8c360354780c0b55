//! Stop strings in text that arrives in pieces: a match may begin in one token and end in another.
//!
//! Text that could still turn out to be the beginning of a stop string is held back; it is released when it cannot be
//! one any more, or when the answer ends.

/// Looks for stop strings in a growing text.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
}

/// What a piece of text led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Matched {
    /// Text that is certain to belong to the answer.
    pub text: String,
    /// The stop string that was met, by its place in the list; it and what followed are not part of the text.
    pub stop: Option<usize>,
}

impl StopMatcher {
    /// A matcher for `stops`; an empty string never matches.
    pub fn new(stops: &[String]) -> Self {
        Self { stops: stops.to_vec(), held: String::new() }
    }

    /// Takes the next piece. The stop string that is complete first wins, so that the pieces' borders do not matter.
    pub fn push(&mut self, piece: &str) -> Matched {
        self.held.push_str(piece);
        let found = |(index, stop): (usize, &String)| {
            let at = if stop.is_empty() { None } else { self.held.find(stop.as_str()) };
            at.map(|at| (at + stop.len(), at, index))
        };
        if let Some((_, at, index)) = self.stops.iter().enumerate().filter_map(found).min() {
            self.held.truncate(at);
            return Matched { text: std::mem::take(&mut self.held), stop: Some(index) };
        }
        let keep = self.stops.iter().map(|stop| open_prefix(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Matched { text: std::mem::replace(&mut self.held, rest), stop: None }
    }

    /// The answer has ended: what was held back belongs to it.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Length of the longest end of `text` with which `stop` begins, shorter than `stop`.
pub(crate) fn open_prefix(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len().saturating_sub(1));
    let (text, stop) = (text.as_bytes(), stop.as_bytes());
    // Both are UTF-8 and a prefix of `stop` begins with a leading byte, so an equal end of `text` that ends with it
    // begins at a character of `text`.
    (1..=longest).rev().find(|n| text[text.len() - n..] == stop[..*n]).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let stops: Vec<String> = stops.iter().map(|s| (*s).to_owned()).collect();
        let mut matcher = StopMatcher::new(&stops);
        let mut out = String::new();
        for piece in pieces {
            let matched = matcher.push(piece);
            out.push_str(&matched.text);
            if matched.stop.is_some() {
                return (out, true);
            }
        }
        out.push_str(&matcher.finish());
        (out, false)
    }

    #[test]
    fn finds_a_stop_across_pieces() {
        assert_eq!(run(&["Human:"], &["abc ", "Hu", "man", ": hello"]), ("abc ".into(), true));
        assert_eq!(run(&["aab"], &["a", "a", "a", "b"]), ("a".into(), true));
        assert_eq!(run(&["bc", "abcd"], &["abcd"]), ("a".into(), true));
    }

    #[test]
    fn releases_what_was_held() {
        assert_eq!(run(&["Human:"], &["answer ", "H"]), ("answer H".into(), false));
        assert_eq!(run(&["Human:"], &["Hu", "go"]), ("Hugo".into(), false));
        assert_eq!(run(&[], &["a", "b"]), ("ab".into(), false));
        assert_eq!(run(&[""], &["a"]), ("a".into(), false));
    }

    #[test]
    fn every_split_gives_the_whole_texts_answer() {
        let text = "끝까지 «stop»말고 끝 aaab 👋🏽 끝.";
        for stops in [&["끝."][..], &["aab", "👋🏽"], &["»말", "없음"], &["👋🏼"], &["top»", "stop", "«stop»말"]]
        {
            let whole = run(stops, &[text]);
            let chars: Vec<String> = text.chars().map(String::from).collect();
            let pieces: Vec<&str> = chars.iter().map(String::as_str).collect();
            assert_eq!(run(stops, &pieces), whole, "{stops:?}");
            for (at, _) in text.char_indices() {
                assert_eq!(run(stops, &[&text[..at], &text[at..]]), whole, "{stops:?} at {at}");
            }
        }
    }
}
