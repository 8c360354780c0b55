//! A GGUF file's tokenizer as tokenizer.json, tokenizer_config.json and generation_config.json.
//!
//! Two kinds: byte-level BPE, which has its merges and names the way text is split before them, and sentencepiece,
//! whose merges follow from the scores of its pieces. What is not known for certain is refused by name: a tokenizer that
//! is nearly right makes a model nearly right.

use std::collections::{BTreeSet, HashMap};

use graft_quant::gguf::Value as Meta;
use serde_json::{Map, Value, json};

use crate::gguf::Keys;
use crate::{Result, Tokenizer};

/// Kinds of tokens, `tokenizer.ggml.token_type`.
pub(crate) const NORMAL: u64 = 1;
pub(crate) const UNKNOWN: u64 = 2;
pub(crate) const CONTROL: u64 = 3;
pub(crate) const USER_DEFINED: u64 = 4;
pub(crate) const UNUSED: u64 = 5;
pub(crate) const BYTE: u64 = 6;

/// sentencepiece's space.
pub(crate) const SPACE: &str = "\u{2581}";

/// How text is split before it is merged.
#[derive(Clone, Copy)]
pub(crate) enum Split {
    /// GPT-2's words.
    Words,
    /// The same, digits one by one.
    WordsAndDigits,
    /// The matches of an expression.
    Matches(&'static str),
}

/// A byte-level tokenizer, by the names that `tokenizer.ggml.pre` has for it.
pub(crate) struct Pre {
    pub(crate) names: &'static [&'static str],
    split: Split,
    /// Composes characters first.
    pub(crate) nfc: bool,
    /// A piece that is a token is not merged; and a text begins with the first token unless the file says otherwise.
    pub(crate) whole: bool,
}

pub(crate) const PRES: [Pre; 5] = [
    Pre { names: &["gpt-2", "default"], split: Split::Words, nfc: false, whole: false },
    Pre { names: &["smollm", "starcoder", "refact"], split: Split::WordsAndDigits, nfc: false, whole: false },
    Pre {
        names: &["llama-bpe", "llama3", "llama-v3"],
        split: Split::Matches(concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        )),
        nfc: false,
        whole: true,
    },
    Pre {
        names: &["tekken"],
        split: Split::Matches(concat!(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        )),
        nfc: false,
        whole: true,
    },
    Pre {
        names: &["qwen2"],
        split: Split::Matches(concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        )),
        nfc: true,
        whole: false,
    },
];

impl Pre {
    /// The pre-tokenizer in tokenizer.json.
    pub(crate) fn pre_tokenizer(&self) -> Value {
        let both =
            |first: Value, use_regex| json!({"type": "Sequence", "pretokenizers": [first, bytes(use_regex)]});
        match self.split {
            Split::Words => bytes(true),
            Split::WordsAndDigits => both(json!({"type": "Digits", "individual_digits": true}), true),
            Split::Matches(expression) => both(
                json!({"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": false}),
                false,
            ),
        }
    }
}

/// The files, for a model whose embedding has `rows` rows.
///
/// # Errors
/// When the tokenizer is of a kind that we do not know, or its parts do not fit together.
pub(crate) fn files(keys: &Keys, rows: usize) -> Result<Vec<(String, Vec<u8>)>> {
    let vocabulary = Vocabulary::read(keys, rows)?;
    let (mut tokenizer, bos_first) = match keys.text("tokenizer.ggml.model")? {
        "gpt2" => byte_level(keys, &vocabulary)?,
        "llama" => (sentencepiece(keys, &vocabulary)?, true),
        other => {
            let expected = "gpt2 (byte-level BPE) or llama (sentencepiece)";
            return Err(keys.wrong("tokenizer.ggml.model", expected, other));
        }
    };
    let around = Around::read(keys, &vocabulary, bos_first)?;
    if let Some(template) = around.post_processor() {
        tokenizer["post_processor"] = match tokenizer["post_processor"].take() {
            Value::Null => template,
            bytes => json!({"type": "Sequence", "processors": [bytes, template]}),
        };
    }
    let config = tokenizer_config(keys, &vocabulary, &around)?;
    let bytes = tokenizer.to_string().into_bytes();
    // What cannot be read back is found out before anything is written.
    Tokenizer::new(keys.file().to_path_buf(), &bytes, &config, BTreeSet::new())?;
    Ok(vec![
        ("tokenizer.json".into(), bytes),
        ("tokenizer_config.json".into(), pretty(config)),
        ("generation_config.json".into(), pretty(generation_config(keys, &vocabulary)?)),
    ])
}

fn pretty(map: Map<String, Value>) -> Vec<u8> {
    format!("{:#}\n", Value::Object(map)).into_bytes()
}

/// The tokens by id.
pub(crate) struct Vocabulary<'a> {
    pub(crate) tokens: Vec<&'a str>,
    pub(crate) kinds: Vec<u64>,
    pub(crate) ids: HashMap<&'a str, usize>,
}

impl<'a> Vocabulary<'a> {
    fn read(keys: &Keys<'a>, rows: usize) -> Result<Self> {
        let key = "tokenizer.ggml.tokens";
        let read = |value: &'a Meta| value.as_array()?.iter().map(Meta::as_str).collect::<Option<Vec<_>>>();
        let tokens = keys.required(key, "an array of texts", read)?;
        if tokens.len() > rows {
            return Err(keys.wrong(key, &format!("at most the embedding's {rows} rows"), tokens.len()));
        }
        let kinds = per_token(keys, "tokenizer.ggml.token_type", tokens.len(), Meta::as_u64)?;
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, token) in tokens.iter().enumerate() {
            if let Some(other) = ids.insert(*token, id) {
                return Err(keys.wrong(key, "every token once", format!("{token:?} as {other} and {id}")));
            }
        }
        Ok(Self { tokens, kinds, ids })
    }

    /// Ids, tokens and kinds without those that only fill the embedding up.
    fn real(&self) -> impl Iterator<Item = (usize, &'a str, u64)> {
        let all =
            self.tokens.iter().zip(&self.kinds).enumerate().map(|(id, (token, kind))| (id, *token, *kind));
        all.filter(|(id, token, kind)| *kind != UNUSED || *token != format!("[PAD{id}]"))
    }

    /// tokenizer.json's map of tokens to ids.
    fn map(&self) -> Map<String, Value> {
        self.real().map(|(id, token, _)| (token.to_owned(), id.into())).collect()
    }

    /// Tokens that are found in a text before it is split; control tokens have no text of their own.
    fn added(&self) -> Vec<Value> {
        let added = self.real().filter(|(_, _, kind)| matches!(*kind, UNKNOWN | CONTROL | USER_DEFINED));
        let object = |(id, content, kind): (usize, &str, u64)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": kind != USER_DEFINED})
        };
        added.map(object).collect()
    }

    /// The id and token that a key names.
    fn named(&self, keys: &Keys, name: &str) -> Result<Option<(usize, &'a str)>> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(id) = keys.whole(&key)? else { return Ok(None) };
        let found = usize::try_from(id).ok().and_then(|id| Some((id, *self.tokens.get(id)?)));
        let expected = || format!("an id below {}", self.tokens.len());
        found.map(Some).ok_or_else(|| keys.wrong(&key, &expected(), id))
    }
}

/// An array that has a value for every token.
fn per_token<'a, T>(
    keys: &Keys<'a>,
    key: &str,
    count: usize,
    read: impl Fn(&'a Meta) -> Option<T> + Copy,
) -> Result<Vec<T>> {
    let expected = format!("an array of {count} numbers");
    keys.required(key, &expected, |value| {
        let all = value.as_array().filter(|all| all.len() == count)?;
        all.iter().map(read).collect()
    })
}

/// A tokenizer.json without what is put around a text.
fn tokenizer_json(vocabulary: &Vocabulary, parts: [Value; 4], model: Value) -> Value {
    let [normalizer, pre_tokenizer, post_processor, decoder] = parts;
    let mut bpe = json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
        "vocab": vocabulary.map(),
    });
    if let (Value::Object(all), Value::Object(own)) = (&mut bpe, model) {
        all.extend(own);
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": vocabulary.added(),
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": post_processor,
        "decoder": decoder, "model": bpe,
    })
}

/// Characters for bytes, after a split into GPT-2's words or without one.
fn bytes(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

/// Byte-level BPE, and whether a text begins with the first token where the file does not say.
fn byte_level(keys: &Keys, vocabulary: &Vocabulary) -> Result<(Value, bool)> {
    let key = "tokenizer.ggml.pre";
    let expected = PRES.iter().flat_map(|pre| pre.names).copied().collect::<Vec<_>>().join(", ");
    let expected = format!("one of {expected}");
    let name = keys.required(key, &expected, Meta::as_str)?;
    let pre = PRES.iter().find(|pre| pre.names.contains(&name));
    let pre = pre.ok_or_else(|| keys.wrong(key, &expected, name))?;
    let normalizer = if pre.nfc { json!({"type": "NFC"}) } else { Value::Null };
    let key = "tokenizer.ggml.merges";
    let merges = keys.required(key, "an array of texts", Meta::as_array)?;
    let pair = |merge: &Meta| {
        let pair = merge.as_str().and_then(|text| text.split_once(' '));
        pair.map(|(a, b)| json!([a, b]))
            .ok_or_else(|| keys.wrong(key, "two tokens with a space between", format!("{merge:?}")))
    };
    let merges = merges.iter().map(pair).collect::<Result<Vec<_>>>()?;
    let model = json!({"ignore_merges": pre.whole, "merges": merges});
    let parts = [normalizer, pre.pre_tokenizer(), bytes(true), bytes(true)];
    Ok((tokenizer_json(vocabulary, parts, model), pre.whole))
}

/// sentencepiece as transformers converts it: BPE over characters, bytes for those that are no piece.
fn sentencepiece(keys: &Keys, vocabulary: &Vocabulary) -> Result<Value> {
    let scores = per_token(keys, "tokenizer.ggml.scores", vocabulary.tokens.len(), Meta::as_f64)?;
    let prefix = keys.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let unknown = vocabulary.named(keys, "unknown")?;
    let unknown = unknown.or_else(|| vocabulary.real().find(|t| t.2 == UNKNOWN).map(|t| (t.0, t.1)));
    let model = json!({
        "unk_token": unknown.map(|(_, token)| token), "fuse_unk": true, "byte_fallback": true,
        "merges": merges_by_score(vocabulary, &scores),
    });
    let normalizer = json!({"type": "Sequence", "normalizers": normalizers});
    let decoder = json!({"type": "Sequence", "decoders": decoders});
    Ok(tokenizer_json(vocabulary, [normalizer, Value::Null, Value::Null, decoder], model))
}

/// Every way to make a piece of two others, the piece with the highest score first. Of pieces with one score, runs of
/// spaces, the longer left part goes first: then they grow from the left, as sentencepiece has them grow.
pub(crate) fn merges_by_score<'a>(vocabulary: &Vocabulary<'a>, scores: &[f64]) -> Vec<[&'a str; 2]> {
    let is_normal = |id: usize| vocabulary.kinds[id] == NORMAL;
    let mut normal = (0..scores.len()).filter(|id| is_normal(*id));
    let first = normal.next().map(|id| scores[id]);
    // Some converters write one score for all; then the ids say in which order the pieces were learned.
    let flat = normal.all(|id| Some(scores[id]) == first);
    let known = |piece: &str| vocabulary.ids.get(piece).is_some_and(|id| is_normal(*id));
    let mut merges = Vec::new();
    for (id, piece, _) in vocabulary.real().filter(|(id, ..)| is_normal(*id)) {
        let score = if flat { -(id as f64) } else { scores[id] };
        let length = piece.chars().count();
        for (left, (at, _)) in piece.char_indices().enumerate().skip(1) {
            let (a, b) = piece.split_at(at);
            if known(a) && known(b) {
                merges.push((score, left, length - left, [a, b]));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((b.1, b.2).cmp(&(a.1, a.2))));
    merges.into_iter().map(|(.., pair)| pair).collect()
}

/// What stands around a text of its own.
struct Around<'a> {
    bos: Option<(usize, &'a str)>,
    eos: Option<(usize, &'a str)>,
}

impl<'a> Around<'a> {
    fn read(keys: &Keys, vocabulary: &Vocabulary<'a>, bos_first: bool) -> Result<Self> {
        let token = |name: &str, default: bool| -> Result<Option<(usize, &'a str)>> {
            let wanted = keys.flag(&format!("tokenizer.ggml.add_{name}_token"))?.unwrap_or(default);
            if wanted { vocabulary.named(keys, name) } else { Ok(None) }
        };
        Ok(Self { bos: token("bos", bos_first)?, eos: token("eos", false)? })
    }

    /// The post-processor that puts them there.
    fn post_processor(&self) -> Option<Value> {
        let tokens: Map<String, Value> = [self.bos, self.eos]
            .into_iter()
            .flatten()
            .map(|(id, token)| (token.to_owned(), json!({"id": token, "ids": [id], "tokens": [token]})))
            .collect();
        let around = |sequence: &str, type_id: usize| {
            let special = |token: Option<(usize, &str)>| {
                token.map(|(_, token)| json!({"SpecialToken": {"id": token, "type_id": type_id}}))
            };
            let text = json!({"Sequence": {"id": sequence, "type_id": type_id}});
            [special(self.bos), Some(text), special(self.eos)].into_iter().flatten().collect::<Vec<_>>()
        };
        let pair = [around("A", 0), around("B", 1)].concat();
        (!tokens.is_empty()).then(|| {
            json!({"type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": tokens})
        })
    }
}

fn tokenizer_config(keys: &Keys, vocabulary: &Vocabulary, around: &Around) -> Result<Map<String, Value>> {
    let mut config = Map::new();
    config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    for (field, name) in
        [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")]
    {
        let token = vocabulary.named(keys, name)?;
        config.insert(field.into(), json!(token.map(|(_, token)| token)));
    }
    config.insert("add_bos_token".into(), around.bos.is_some().into());
    config.insert("add_eos_token".into(), around.eos.is_some().into());
    config.insert("clean_up_tokenization_spaces".into(), false.into());
    if let Some(length) = keys.whole("~.context_length")? {
        config.insert("model_max_length".into(), length.into());
    }
    let template = |key: &str| keys.optional(key, "a text", Meta::as_str);
    if let Some(text) = template("tokenizer.chat_template")? {
        let mut all = vec![json!({"name": "default", "template": text})];
        let names =
            keys.optional("tokenizer.chat_templates", "an array", Meta::as_array)?.unwrap_or_default();
        for name in names.iter().filter_map(Meta::as_str) {
            if let Some(text) = template(&format!("tokenizer.chat_template.{name}"))? {
                all.push(json!({"name": name, "template": text}));
            }
        }
        let value = if all.len() == 1 { text.into() } else { Value::Array(all) };
        config.insert("chat_template".into(), value);
    }
    Ok(config)
}

/// What begins and ends an answer. A turn may end with another token than a text.
fn generation_config(keys: &Keys, vocabulary: &Vocabulary) -> Result<Map<String, Value>> {
    let mut ends = Vec::new();
    // Files from before the keys of turns and messages have the tokens all the same.
    for (name, token) in [("eos", ""), ("eot", "<|eot_id|>"), ("eot", "<|im_end|>"), ("eom", "<|eom_id|>")] {
        let control = vocabulary.ids.get(token).copied().filter(|id| vocabulary.kinds[*id] == CONTROL);
        let id = vocabulary.named(keys, name)?.map(|(id, _)| id).or(control);
        ends.extend(id.filter(|id| !ends.contains(id)));
    }
    let mut config = Map::new();
    for (field, name) in [("bos_token_id", "bos"), ("pad_token_id", "padding")] {
        if let Some((id, _)) = vocabulary.named(keys, name)? {
            config.insert(field.into(), id.into());
        }
    }
    config.insert("eos_token_id".into(), if let [one] = ends[..] { one.into() } else { json!(ends) });
    Ok(config)
}
