//! A tokenizer small enough to write in place: every byte is a token, so every text can be encoded and comes back.

use serde_json::{Map, Value, json};

/// Merges of the tiny tokenizer, in order of rank.
const MERGES: [(&str, &str); 29] = [
    ("Ġ", "t"),
    ("h", "e"),
    ("Ġ", "a"),
    ("i", "n"),
    ("r", "e"),
    ("o", "n"),
    ("Ġt", "he"),
    ("e", "r"),
    ("Ġ", "s"),
    ("a", "t"),
    ("Ġ", "w"),
    ("o", "r"),
    ("e", "n"),
    ("Ġ", "o"),
    ("i", "s"),
    ("Ġ", "c"),
    ("e", "s"),
    ("l", "l"),
    ("a", "n"),
    ("in", "g"),
    ("o", "u"),
    ("u", "s"),
    ("e", "d"),
    ("Ġa", "n"),
    ("s", "er"),
    ("u", "ser"),
    ("Ã", "¼"),
    ("Ġo", "f"),
    ("he", "ll"),
];

/// The special tokens, in the order of their ids, after the bytes and the merges.
pub(crate) const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// How many ids the tiny tokenizer knows.
pub(crate) const TOKENS: usize = 256 + MERGES.len() + SPECIAL.len();

/// A ChatML template.
pub const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// The printable character that stands for a byte in byte-level BPE: itself if it is printable Latin-1, else the next
/// free one from U+0100 on.
fn byte_characters() -> Vec<char> {
    let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let mut free = 0x100;
    (0..256)
        .map(|b| {
            let code = if printable(b) {
                b
            } else {
                free += 1;
                free - 1
            };
            char::from_u32(code).expect("a code point below U+0200")
        })
        .collect()
}

/// The tiny tokenizer.json: byte-level BPE, 256 bytes, a few merges and three special tokens.
pub fn tokenizer_json() -> Value {
    tokenizer_with(&SPECIAL, &[], None)
}

/// As [`tokenizer_json`] with other added tokens, `plain` ones not special; `bos` is put before a text of its own.
pub(crate) fn tokenizer_with(special: &[&str], plain: &[&str], bos: Option<&str>) -> Value {
    let mut vocab = Map::new();
    for c in byte_characters() {
        let id = vocab.len();
        vocab.insert(c.to_string(), id.into());
    }
    let mut merges = Vec::new();
    for (a, b) in MERGES {
        let id = vocab.len();
        vocab.insert(format!("{a}{b}"), id.into());
        merges.push(json!([a, b]));
    }
    let first = vocab.len();
    let names: Vec<&str> = special.iter().chain(plain).copied().collect();
    let added: Vec<Value> = names
        .iter()
        .enumerate()
        .map(|(i, content)| {
            json!({"id": first + i, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": i < special.len()})
        })
        .collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let after = bos.map_or(byte_level.clone(), |bos| {
        let id = names.iter().position(|name| *name == bos).map(|at| first + at);
        let (one, text) = (
            json!({"SpecialToken": {"id": bos, "type_id": 0}}),
            json!({"Sequence": {"id": "A", "type_id": 0}}),
        );
        json!({"type": "TemplateProcessing", "single": [one, text], "pair": [one, text],
               "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}}})
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": after, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": merges}
    })
}

/// tokenizer_config.json with the template.
pub(crate) fn tokenizer_config() -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": null, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "unk_token": null, "clean_up_tokenization_spaces": false,
        "model_max_length": 2048, "chat_template": CHAT_TEMPLATE
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_text_comes_back() {
        let text = serde_json::to_string(&tokenizer_json()).unwrap();
        let tokenizer: tokenizers::Tokenizer = text.parse().unwrap();
        assert_eq!(tokenizer.get_vocab_size(true), TOKENS);
        for text in ["hello the user", " über 😀\n\t", "<|im_start|>user\nhi<|im_end|>", ""] {
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(tokenizer.decode(ids.get_ids(), false).unwrap(), text);
        }
        assert_eq!(tokenizer.encode("<|im_end|>", false).unwrap().get_ids(), [TOKENS as u32 - 1]);
        assert_eq!(tokenizer.encode(" the", false).unwrap().len(), 1);
    }
}
