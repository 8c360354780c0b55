//! Text of ids that arrive one at a time.
//!
//! An id alone has no text: a character may be spread over several ids, and sentencepiece tokenizers drop a space at
//! the beginning of whatever they decode. So a window is decoded that begins one emission early, and what it adds to
//! the text of that earlier emission is new. The window is bounded, so the time is linear in the ids.

use crate::{Result, Tokenizer};

/// Ids after which a window that yields no whole character is taken as it is: four bytes make a character, so garbage.
const PATIENCE: usize = 8;

/// What a tokenizer writes for bytes that are no character, or not yet one.
const REPLACEMENT: char = '\u{FFFD}';

/// A decoder that returns each character once, when it is whole.
#[derive(Debug, Clone)]
pub struct TextStream {
    tokenizer: Tokenizer,
    /// The ids of the last emission, then those that are not emitted.
    window: Vec<u32>,
    /// How many ids of the window are emitted.
    emitted: usize,
}

impl TextStream {
    /// A stream at the beginning of a text.
    pub(crate) fn new(tokenizer: Tokenizer) -> Self {
        Self { tokenizer, window: Vec::new(), emitted: 0 }
    }

    /// The text that `id` completes, often empty, never half a character.
    ///
    /// # Errors
    /// When the tokenizer fails on the ids.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.window.push(id);
        let old = self.decode(0, self.emitted)?;
        let new = self.decode(0, self.window.len())?;
        let patient = self.window.len() - self.emitted < PATIENCE;
        match new.strip_prefix(old.as_str()) {
            Some(added) if !added.is_empty() && !added.ends_with(REPLACEMENT) => {
                let added = added.to_owned();
                self.advance(self.window.len());
                Ok(added)
            }
            Some("") if !patient => {
                // Ids without text would make the window grow for ever; without them it decodes to the same.
                self.window.truncate(self.emitted);
                Ok(String::new())
            }
            _ if patient => Ok(String::new()),
            _ => self.give_up(&old, &new),
        }
    }

    /// What is left at the end: bytes that never became a character, as U+FFFD.
    ///
    /// # Errors
    /// When the tokenizer fails on the ids.
    pub fn finish(&mut self) -> Result<String> {
        let old = self.decode(0, self.emitted)?;
        let new = self.decode(0, self.window.len())?;
        let rest = match new.strip_prefix(old.as_str()) {
            Some(added) => added.to_owned(),
            None => self.decode(self.emitted, self.window.len())?,
        };
        self.window.clear();
        self.emitted = 0;
        Ok(rest)
    }

    /// Emits what cannot become another character any more: all but the last ids, of which three at most may wait for a
    /// fourth byte. A border is right where both sides decode to what the whole decodes to.
    fn give_up(&mut self, old: &str, new: &str) -> Result<String> {
        let len = self.window.len();
        for end in len - 3..len {
            let text = self.decode(0, end)?;
            let rest = self.decode(end, len)?;
            if let Some(added) = text.strip_prefix(old)
                && new.strip_prefix(text.as_str()) == Some(rest.as_str())
            {
                let added = added.to_owned();
                self.advance(end);
                return Ok(added);
            }
        }
        let added = self.decode(self.emitted, self.window.len())?;
        self.advance(self.window.len());
        Ok(added)
    }

    fn advance(&mut self, end: usize) {
        self.window.drain(..self.emitted);
        self.emitted = end - self.emitted;
    }

    fn decode(&self, from: usize, to: usize) -> Result<String> {
        self.tokenizer.decode(&self.window[from..to], false)
    }
}
