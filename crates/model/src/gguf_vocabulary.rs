//! A model directory's tokenizer as GGUF metadata: the inverse of `gguf_tokenizer`, and as strict. llama.cpp knows a way to
//! split text by its name only, so a tokenizer.json that is none of the known ones, to the letter, is refused.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use graft_quant::gguf::Field;
use serde_json::{Map, Value, json};

use crate::chat::DEFAULT;
use crate::gguf_tokenizer::{
    BYTE, CONTROL, NORMAL, PRES, Pre, SPACE, UNKNOWN, UNUSED, USER_DEFINED, Vocabulary, merges_by_score,
};
use crate::tokenizer::{read_json_object, special_tokens, token_text};
use crate::{ChatTemplate, Error, Result, Tokenizer};

/// The metadata, and what the user should know of it.
pub(crate) struct Written {
    pub(crate) fields: Vec<(String, Field)>,
    pub(crate) warnings: Vec<String>,
}

/// The tokenizer and the chat template of `dir`, for a model whose embedding has `rows` rows.
///
/// # Errors
/// When there is no tokenizer.json, or llama.cpp has no tokenizer that is the same.
pub(crate) fn written(dir: &Path, rows: usize) -> Result<Written> {
    let tokenizer = Tokenizer::load(dir)?;
    let file = dir.join("tokenizer.json");
    let json = read_json_object(&file)?.unwrap_or_default();
    let mut source = Source { file, json, written: Written { fields: Vec::new(), warnings: Vec::new() } };
    source.whole(&tokenizer, rows)?;
    source.special(dir, &tokenizer)?;
    source.around(&tokenizer)?;
    source.template(dir)?;
    Ok(source.written)
}

/// tokenizer.json, and what is made of it.
struct Source {
    file: PathBuf,
    json: Map<String, Value>,
    written: Written,
}

impl Source {
    fn other(&self, what: &str, found: impl std::fmt::Display) -> Error {
        let message = format!(
            "{what} is {found}, for which llama.cpp has no tokenizer that graft knows; export with llama.cpp's own \
             convert_hf_to_gguf.py"
        );
        Error::Tokenizer { file: self.file.clone(), message }
    }

    fn put(&mut self, key: &str, value: Field) {
        self.written.fields.push((format!("tokenizer.{key}"), value));
    }

    fn part(&self, name: &str) -> &Value {
        self.json.get(name).unwrap_or(&Value::Null)
    }

    /// Kind of tokenizer, tokens, their kinds, and merges or scores.
    fn whole(&mut self, tokenizer: &Tokenizer, rows: usize) -> Result<()> {
        let model = self.part("model").clone();
        if model["type"] != "BPE" {
            return Err(self.other("model.type", &model["type"]));
        }
        for field in ["dropout", "continuing_subword_prefix", "end_of_word_suffix"] {
            if !(model[field].is_null() || model[field] == "") {
                return Err(self.other(&format!("model.{field}"), &model[field]));
            }
        }
        let pieces = model["byte_fallback"] == true;
        let (tokens, kinds) = self.tokens(tokenizer, &model, rows, pieces)?;
        let merges = self.merges(&model)?;
        if pieces {
            self.pieces(&tokens, &kinds, &merges)?;
        } else {
            let pre = self.pre(&model)?;
            self.put("ggml.model", Field::Str("gpt2".into()));
            self.put("ggml.pre", Field::Str(pre.names[0].into()));
            self.put("ggml.merges", Field::Strs(merges.iter().map(|[a, b]| format!("{a} {b}")).collect()));
        }
        self.put("ggml.tokens", Field::Strs(tokens));
        self.put("ggml.token_type", Field::I32s(kinds.iter().map(|kind| *kind as i32).collect()));
        Ok(())
    }

    /// As many tokens as the embedding has rows; those of no token are filled up as llama.cpp's converter does.
    fn tokens(
        &self,
        tokenizer: &Tokenizer,
        model: &Value,
        rows: usize,
        pieces: bool,
    ) -> Result<(Vec<String>, Vec<u64>)> {
        let mut all: Vec<Option<(String, u64)>> = vec![None; rows];
        let mut place = |id: Option<u64>, token: &str, kind: u64| -> Result<()> {
            let slot = id.and_then(|id| all.get_mut(usize::try_from(id).ok()?));
            *slot.ok_or_else(|| {
                let found = id.map_or_else(|| "no id".to_owned(), |id| format!("the id {id}"));
                self.other(&format!("the token {token:?}"), format!("{found} of a model of {rows}"))
            })? = Some((token.to_owned(), kind));
            Ok(())
        };
        for (token, id) in model["vocab"].as_object().into_iter().flatten() {
            let byte = pieces && token.len() == 6 && token.starts_with("<0x") && token.ends_with('>');
            place(id.as_u64(), token, if byte { BYTE } else { NORMAL })?;
        }
        for added in self.part("added_tokens").as_array().into_iter().flatten() {
            let content = added["content"].as_str().unwrap_or_default();
            for side in ["lstrip", "rstrip", "single_word"] {
                if added[side] == true {
                    return Err(self.other(&format!("{side} of the token {content:?}"), "true"));
                }
            }
            // A token that is looked for in changed text is another one where the change touches it.
            let plain = self.part("normalizer").is_null() || content.is_ascii() && !pieces;
            if added["normalized"] == true && !plain {
                return Err(self.other(&format!("normalized of the token {content:?}"), "true"));
            }
            let unknown = pieces && model["unk_token"] == content;
            let kind = match added["special"] == true {
                _ if unknown => UNKNOWN,
                true => CONTROL,
                false => USER_DEFINED,
            };
            place(added["id"].as_u64(), content, kind)?;
        }
        let fill = |(id, token): (usize, Option<(String, u64)>)| {
            token.unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED))
        };
        let (tokens, kinds): (Vec<String>, Vec<u64>) = all.into_iter().enumerate().map(fill).unzip();
        let mut seen = HashMap::new();
        for (id, token) in tokens.iter().enumerate() {
            if let Some(first) = seen.insert(token, id) {
                return Err(self.other(&format!("the token {token:?}"), format!("both {first} and {id}")));
            }
        }
        match tokenizer.vocab_size() {
            count if count > rows => Err(self.other("the number of tokens", count)),
            _ => Ok((tokens, kinds)),
        }
    }

    /// The merges as pairs; older files have them as texts.
    fn merges(&self, model: &Value) -> Result<Vec<[String; 2]>> {
        let pair = |merge: &Value| {
            let pair = match merge {
                Value::String(text) => text.split_once(' '),
                other => other[0].as_str().zip(other[1].as_str()),
            };
            pair.map(|(a, b)| [a.to_owned(), b.to_owned()]).ok_or_else(|| self.other("a merge", merge))
        };
        model["merges"].as_array().into_iter().flatten().map(pair).collect()
    }

    /// The known way to split that this file has, to the letter.
    fn pre(&self, model: &Value) -> Result<&'static Pre> {
        let (normalizer, split) = (self.part("normalizer"), usual(self.part("pre_tokenizer")));
        let nfc = match normalizer {
            Value::Null => false,
            other if other["type"] == "NFC" => true,
            other => return Err(self.other("normalizer", other)),
        };
        let fits = |pre: &&Pre| usual(&pre.pre_tokenizer()) == split;
        let pre = PRES.iter().find(fits).ok_or_else(|| self.other("pre_tokenizer", &split))?;
        if pre.nfc != nfc {
            return Err(self.other(&format!("normalizer of a {} tokenizer", pre.names[0]), normalizer));
        }
        let whole = model["ignore_merges"] == true;
        if pre.whole == whole {
            return Ok(pre);
        }
        Err(self.other(&format!("model.ignore_merges of a {} tokenizer", pre.names[0]), whole))
    }

    /// sentencepiece: scores from which the merges follow.
    fn pieces(&mut self, tokens: &[String], kinds: &[u64], merges: &[[String; 2]]) -> Result<()> {
        let prefix = self.prefix()?;
        let ids = tokens.iter().enumerate().map(|(id, token)| (token.as_str(), id)).collect();
        let tokens = tokens.iter().map(String::as_str).collect();
        let vocabulary = Vocabulary { tokens, kinds: kinds.to_vec(), ids };
        let scores = scores(&vocabulary, merges);
        let same = |(ours, theirs): ([&str; 2], &[String; 2])| ours == [&theirs[0], &theirs[1]];
        let wide: Vec<f64> = scores.iter().map(|score| f64::from(*score)).collect();
        let ours = merges_by_score(&vocabulary, &wide);
        if ours.len() != merges.len() || !ours.into_iter().zip(merges).all(same) {
            return Err(
                self.other("the order of model.merges", "none that follows from scores of the tokens")
            );
        }
        self.put("ggml.model", Field::Str("llama".into()));
        self.put("ggml.pre", Field::Str("default".into()));
        self.put("ggml.add_space_prefix", Field::Bool(prefix));
        self.put("ggml.scores", Field::F32s(scores));
        Ok(())
    }

    /// Whether a text begins with a space that it does not have.
    fn prefix(&mut self) -> Result<bool> {
        let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
        let prepend = json!({"type": "Prepend", "prepend": SPACE});
        let (normalizer, split) = (self.part("normalizer"), self.part("pre_tokenizer"));
        let parts = match (normalizer["type"].as_str(), &normalizer["normalizers"]) {
            (Some("Sequence"), Value::Array(parts)) => parts.clone(),
            (Some(_), _) => vec![normalizer.clone()],
            _ => Vec::new(),
        };
        match (&parts[..], split["type"].as_str()) {
            ([first, second], None) if *first == prepend && *second == replace => Ok(true),
            ([only], None) if *only == replace => Ok(false),
            ([], Some("Metaspace")) if split["replacement"] == SPACE && split["split"] == false => {
                let scheme = split["prepend_scheme"].as_str().unwrap_or("always").to_owned();
                if scheme == "first" {
                    self.written.warnings.push(format!(
                        "{}: text after a special token begins without a space here, and with one in llama.cpp",
                        self.file.display()
                    ));
                }
                Ok(scheme != "never")
            }
            _ => Err(self.other("normalizer and pre_tokenizer", format!("{normalizer} and {split}"))),
        }
    }

    /// The ids of special tokens. What ends an answer beside the end of a text is the end of a turn, then of a message.
    fn special(&mut self, dir: &Path, tokenizer: &Tokenizer) -> Result<()> {
        let config = special_tokens(dir)?;
        let named = |field: &str| tokenizer.token_to_id(&token_text(config.get(field)?)?);
        let mut ends: BTreeSet<u32> = tokenizer.eos_ids().clone();
        let eos = tokenizer.eos_id().or_else(|| ends.first().copied());
        ends.retain(|id| Some(*id) != eos);
        let mut ends = ends.into_iter();
        let all = [
            ("bos", tokenizer.bos_id()),
            ("eos", eos),
            ("eot", ends.next()),
            ("eom", ends.next()),
            ("unknown", named("unk_token")),
            ("padding", named("pad_token")),
        ];
        for (name, id) in all {
            if let Some(id) = id {
                self.put(&format!("ggml.{name}_token_id"), Field::U32(id));
            }
        }
        let more: Vec<u32> = ends.collect();
        if !more.is_empty() {
            let text = format!("a GGUF file names three tokens that end an answer; left out: {more:?}");
            self.written.warnings.push(text);
        }
        Ok(())
    }

    /// What the tokenizer puts around a text of its own.
    fn around(&mut self, tokenizer: &Tokenizer) -> Result<()> {
        let text = "a";
        let (bare, all) = (tokenizer.encode(text, false)?, tokenizer.encode(text, true)?);
        let at = all.windows(bare.len().max(1)).position(|window| *window == bare[..]);
        let parts = at.map(|at| (&all[..at], &all[at + bare.len()..]));
        let (bos, eos) = (tokenizer.bos_id(), tokenizer.eos_id());
        let is = |ids: &[u32], token: Option<u32>| ids.is_empty() || token.is_some_and(|id| ids == [id]);
        let Some((before, after)) = parts.filter(|(before, after)| is(before, bos) && is(after, eos)) else {
            let found = format!("{bare:?}, and {all:?} as a text of its own");
            return Err(self.other(&format!("{text:?}"), found));
        };
        self.put("ggml.add_bos_token", Field::Bool(!before.is_empty()));
        self.put("ggml.add_eos_token", Field::Bool(!after.is_empty()));
        Ok(())
    }

    fn template(&mut self, dir: &Path) -> Result<()> {
        let texts = ChatTemplate::texts(dir)?.unwrap_or_default();
        let names: Vec<String> =
            texts.iter().map(|(name, _)| name.clone()).filter(|name| name != DEFAULT).collect();
        if !names.is_empty() {
            self.put("chat_templates", Field::Strs(names));
        }
        for (name, text) in texts {
            let key = if name == DEFAULT { "chat_template".into() } else { format!("chat_template.{name}") };
            self.put(&key, Field::Str(text));
        }
        Ok(())
    }
}

/// A pre-tokenizer without what has no effect on the tokens, and with what is understood where it is left out.
fn usual(value: &Value) -> Value {
    let Value::Object(map) = value else { return value.clone() };
    let mut map = map.clone();
    if let Some(Value::Array(parts)) = map.get_mut("pretokenizers") {
        parts.iter_mut().for_each(|part| *part = usual(part));
    }
    map.remove("trim_offsets");
    match map.get("type").and_then(Value::as_str) {
        Some("ByteLevel") => map.entry("use_regex").or_insert(Value::Bool(true)),
        Some("Split") => map.entry("invert").or_insert(Value::Bool(false)),
        _ => return map.into(),
    };
    map.into()
}

/// A score for each token: pieces in the order of their first merges, those whose merges are mixed with each other alike;
/// then, by id, the pieces that nothing is merged to. 0 for what is no piece.
fn scores(vocabulary: &Vocabulary, merges: &[[String; 2]]) -> Vec<f32> {
    // First and last merge of a piece, in the order of the first.
    let (mut spans, mut at): (Vec<(usize, usize)>, HashMap<usize, usize>) = (Vec::new(), HashMap::new());
    let mut pieces = Vec::new();
    for (index, [a, b]) in merges.iter().enumerate() {
        let Some(id) = vocabulary.ids.get(format!("{a}{b}").as_str()) else { continue };
        match at.get(id) {
            Some(span) => {
                let (_, last) = &mut spans[*span];
                *last = index;
            }
            None => {
                at.insert(*id, spans.len());
                spans.push((index, index));
                pieces.push(*id);
            }
        }
    }
    let mut scores = vec![0.0; vocabulary.tokens.len()];
    let (mut rank, mut end) = (0_u32, 0);
    for (id, (first, last)) in pieces.into_iter().zip(spans) {
        rank += u32::from(first > end);
        end = end.max(last);
        scores[id] = -(rank as f32);
    }
    for (id, score) in scores.iter_mut().enumerate() {
        if vocabulary.kinds[id] == NORMAL && !at.contains_key(&id) {
            rank += 1;
            *score = -(rank as f32);
        }
    }
    scores
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_give_the_merges_back() {
        let tokens = [
            "<unk>",
            "a",
            "b",
            "c",
            "bc",
            "ab",
            "abc",
            "\u{2581}",
            "\u{2581}\u{2581}",
            "\u{2581}\u{2581}\u{2581}",
        ];
        let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(id, token)| (*token, id)).collect();
        let kinds = tokens.iter().map(|token| if *token == "<unk>" { UNKNOWN } else { NORMAL }).collect();
        let vocabulary = Vocabulary { tokens: tokens.to_vec(), kinds, ids };
        // Two runs of spaces have one score; what counts is that the merges come back in their order.
        let learned = [0.0, -9.0, -9.0, -9.0, -1.0, -3.0, -2.0, -9.0, -0.5, -0.5];
        let merges: Vec<[String; 2]> =
            merges_by_score(&vocabulary, &learned).into_iter().map(|pair| pair.map(str::to_owned)).collect();
        let back: Vec<f64> = scores(&vocabulary, &merges).into_iter().map(f64::from).collect();
        assert_eq!(merges_by_score(&vocabulary, &back), merges);
        assert!(back[4] > back[6] && back[6] > back[5]);
    }
}
