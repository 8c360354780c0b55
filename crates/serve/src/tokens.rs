//! The text and the bytes of a single token, for log-probabilities. A stream of tokens is decoded elsewhere: a token
//! alone may be a part of a character, or lose its space.

use std::collections::HashMap;

use graft_model::Tokenizer;

use crate::TokenText;

/// What turns a sequence's ids into text.
pub(crate) struct Vocabulary<'a> {
    pub(crate) tokenizer: &'a Tokenizer,
    pub(crate) texts: TokenTexts,
    /// V: a pass gives so many logits for each row.
    pub(crate) size: usize,
}

impl<'a> Vocabulary<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer, size: usize) -> Self {
        Self { tokenizer, texts: TokenTexts::new(tokenizer), size }
    }
}

/// Knows how a vocabulary spells bytes.
#[derive(Debug)]
pub(crate) struct TokenTexts {
    /// Of byte-level vocabularies: the byte that each character stands for.
    bytes: Option<HashMap<char, u8>>,
}

impl TokenTexts {
    pub(crate) fn new(tokenizer: &Tokenizer) -> Self {
        // Every byte-level vocabulary has the space as a token, and no other has this one.
        Self { bytes: tokenizer.token_to_id("\u{120}").map(|_| byte_level()) }
    }

    /// What `id` reads as.
    pub(crate) fn get(&self, tokenizer: &Tokenizer, id: u32) -> TokenText {
        let Some(token) = tokenizer.id_to_token(id) else {
            return TokenText { text: String::new(), bytes: None };
        };
        let bytes = match &self.bytes {
            // An added token is written as it is, and may have characters that stand for no byte.
            Some(map) => token.chars().map(|c| map.get(&c).copied()).collect(),
            None => byte_fallback(&token),
        };
        match bytes {
            Some(bytes) => {
                TokenText { text: String::from_utf8_lossy(&bytes).into_owned(), bytes: Some(bytes) }
            }
            None => {
                let text = if self.bytes.is_some() { token } else { token.replace('\u{2581}', " ") };
                TokenText { bytes: Some(text.clone().into_bytes()), text }
            }
        }
    }
}

/// `<0x0A>` of sentencepiece vocabularies.
fn byte_fallback(token: &str) -> Option<Vec<u8>> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok().map(|byte| vec![byte]))?
}

/// GPT-2's alphabet: a byte that prints stands for itself, the others follow from U+0100 on.
fn byte_level() -> HashMap<char, u8> {
    let prints = |b: u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 0x100;
    (0..=u8::MAX)
        .filter_map(|byte| {
            let code = if prints(byte) {
                u32::from(byte)
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).map(|c| (c, byte))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_spelled_as_gpt2_spells_them() {
        let map = byte_level();
        assert_eq!(map.len(), 256);
        for (c, byte) in [('Ġ', b' '), ('Ċ', b'\n'), ('a', b'a'), ('ÿ', 0xff), ('Ń', 0xad)] {
            assert_eq!(map.get(&c), Some(&byte), "{c}");
        }
        assert_eq!(byte_fallback("<0x0A>"), Some(vec![10]));
        assert_eq!(byte_fallback("<0xZZ>"), None);
        assert_eq!(byte_fallback("x"), None);
    }
}
