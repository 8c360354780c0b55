//! Text to ids and back, from the files beside a model.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::{Error, Result, TextStream};

/// A tokenizer. Copies share their tables.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    file: PathBuf,
    tokenizer: tokenizers::Tokenizer,
    eos: Option<u32>,
    eos_ids: BTreeSet<u32>,
    bos: Option<u32>,
}

/// Files of tokenizers that we do not read; they explain a missing tokenizer.json.
const OTHER_FORMS: [&str; 5] = ["tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model"];

/// What begins and ends a thought, in the models that write them.
pub const THINKING: [(&str, &str); 3] =
    [("<think>", "</think>"), ("<longcat_think>", "</longcat_think>"), ("<|think:start|>", "<|think:end|>")];

impl Tokenizer {
    /// Reads tokenizer.json of a model directory, and where they exist tokenizer_config.json, special_tokens_map.json,
    /// generation_config.json and config.json for what the special tokens mean.
    ///
    /// # Errors
    /// When tokenizer.json is missing or broken, or another of the files is not JSON.
    pub fn load(dir: &Path) -> Result<Self> {
        let file = dir.join("tokenizer.json");
        let bytes = match std::fs::read(&file) {
            Ok(bytes) => bytes,
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => return Err(missing(dir, file)),
            Err(source) => return Err(Error::Io { path: file, source }),
        };
        let config = special_tokens(dir)?;
        let mut eos_ids = BTreeSet::new();
        for name in ["generation_config.json", "config.json"] {
            let path = dir.join(name);
            if let Some(map) = read_json_object(&path)? {
                eos_ids.extend(eos_of(&path, &map)?);
            }
        }
        Self::new(file, &bytes, &config, eos_ids)
    }

    /// A tokenizer from the bytes of a tokenizer.json; `config` has `bos_token` and `eos_token`, `eos_ids` are further
    /// ids that end an answer, and `file` stands in messages.
    ///
    /// # Errors
    /// When the bytes are not a tokenizer, or a special token is not in it.
    pub fn new(
        file: PathBuf,
        bytes: &[u8],
        config: &Map<String, Value>,
        mut eos_ids: BTreeSet<u32>,
    ) -> Result<Self> {
        let broken = |message: String| Error::Tokenizer { file: file.clone(), message };
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(bytes)
            .map_err(|e| broken(format!("not a tokenizer that can be read: {e}")))?;
        // Some files carry the truncation and padding of their training; neither belongs into a prompt.
        tokenizer.with_truncation(None).map_err(|e| broken(e.to_string()))?;
        tokenizer.with_padding(None);
        let id = |field: &str| -> Option<u32> { tokenizer.token_to_id(&token_text(config.get(field)?)?) };
        let (bos, eos) = (id("bos_token"), id("eos_token"));
        eos_ids.extend(eos);
        Ok(Self { shared: Arc::new(Shared { file, tokenizer, eos, eos_ids, bos }) })
    }

    /// The ids of `text`. `add_special` adds what the tokenizer puts around a text of its own (such as a first `<s>`);
    /// a rendered chat template has it already.
    ///
    /// # Errors
    /// When the tokenizer fails on the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding =
            self.shared.tokenizer.encode_fast(text, add_special).map_err(|e| self.failed("encoding", &e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`, without special tokens if `skip_special`. Bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// When the tokenizer fails on the ids.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.shared.tokenizer.decode(ids, skip_special).map_err(|e| self.failed("decoding", &e))
    }

    /// Decodes ids that arrive one at a time. Special tokens are text, as in mlx-lm: what ends an answer is kept away by
    /// the caller, and others, such as the marks around a tool call, mean something.
    pub fn stream(&self) -> TextStream {
        TextStream::new(self.clone())
    }

    /// The ids that XTC spares, as in mlx-lm: those of a line's end and of an answer's end.
    ///
    /// # Errors
    /// When the tokenizer fails on a line's end.
    pub fn xtc_special_tokens(&self) -> Result<Vec<u32>> {
        let mut ids = self.encode("\n", true)?;
        ids.extend(self.eos_ids());
        Ok(ids)
    }

    /// Every id that ends an answer: of generation_config.json, config.json and the tokenizer itself.
    pub fn eos_ids(&self) -> &BTreeSet<u32> {
        &self.shared.eos_ids
    }

    /// The tokenizer's own end token.
    pub fn eos_id(&self) -> Option<u32> {
        self.shared.eos
    }

    /// The token that begins a text, where there is one.
    pub fn bos_id(&self) -> Option<u32> {
        self.shared.bos
    }

    /// The special tokens by id: their text is encoded as that one token wherever it stands.
    pub fn special_tokens(&self) -> BTreeMap<u32, String> {
        let added = self.shared.tokenizer.get_added_tokens_decoder();
        added.into_iter().filter(|(_, token)| token.special).map(|(id, token)| (id, token.content)).collect()
    }

    /// The added tokens by id, special or not.
    pub fn added_tokens(&self) -> BTreeMap<u32, String> {
        let added = self.shared.tokenizer.get_added_tokens_decoder();
        added.into_iter().map(|(id, token)| (id, token.content)).collect()
    }

    /// The id of a token as it stands in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.shared.tokenizer.token_to_id(token)
    }

    /// Variables that mlx-lm gives every chat template: `enable_thinking`, true where the vocabulary has the tokens that
    /// begin and end a thought.
    pub fn template_variables(&self) -> Map<String, Value> {
        let has = |token: &str| self.token_to_id(token).is_some();
        let thinks = THINKING.iter().any(|(open, close)| has(open) && has(close));
        Map::from_iter([("enable_thinking".to_owned(), thinks.into())])
    }

    /// The token of an id as it stands in the vocabulary, which is not its text.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.shared.tokenizer.id_to_token(id)
    }

    /// How many tokens there are, added ones included. A model may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.shared.tokenizer.get_vocab_size(true)
    }

    fn failed(&self, what: &str, error: &tokenizers::Error) -> Error {
        Error::Tokenizer { file: self.shared.file.clone(), message: format!("{what} failed: {error}") }
    }
}

fn missing(dir: &Path, file: PathBuf) -> Error {
    let message = match OTHER_FORMS.iter().find(|name| dir.join(name).is_file()) {
        Some(name) => format!(
            "missing; {name} alone cannot be read: convert it once with Hugging Face transformers \
             (AutoTokenizer.from_pretrained(dir).save_pretrained(dir))"
        ),
        None => "missing; a model directory needs it: get it from where the weights are from".to_owned(),
    };
    Error::Tokenizer { file, message }
}

/// A JSON file's object; none where the file does not exist.
pub(crate) fn read_json_object(path: &Path) -> Result<Option<Map<String, Value>>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(Error::Io { path: path.to_path_buf(), source }),
    };
    let broken = |message: String| Error::Tokenizer { file: path.to_path_buf(), message };
    // Some tools write a byte order mark.
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(map)) => Ok(Some(map)),
        Ok(_) => Err(broken("expected a JSON object".into())),
        Err(e) => Err(broken(format!("not JSON: {e}"))),
    }
}

/// tokenizer_config.json, completed by special_tokens_map.json.
pub(crate) fn special_tokens(dir: &Path) -> Result<Map<String, Value>> {
    let mut config = read_json_object(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
    for (key, value) in read_json_object(&dir.join("special_tokens_map.json"))?.unwrap_or_default() {
        config.entry(key).or_insert(value);
    }
    Ok(config)
}

/// The text of a token that is written as a string or as an added token's object.
pub(crate) fn token_text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

/// `eos_token_id`: a number, a list of numbers, or nothing.
fn eos_of(path: &Path, map: &Map<String, Value>) -> Result<Vec<u32>> {
    let wrong = |found: &Value| Error::Config {
        file: path.to_path_buf(),
        field: "eos_token_id".into(),
        expected: "a token id or a list of them".into(),
        found: found.to_string(),
    };
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| wrong(v));
    match map.get("eos_token_id") {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(ids)) => ids.iter().map(id).collect(),
        Some(one) => Ok(vec![id(one)?]),
    }
}
