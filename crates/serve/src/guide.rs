//! What an answer has to look like, token by token: a JSON schema, or a call of a tool in the family's own style.
//!
//! A grammar is compiled once per request beside the server's threads; on the engine's thread it says before each choice
//! which tokens keep the answer within it. The vocabulary is brought into the form that this takes at the first request
//! that needs it.

use std::fmt::Write as _;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, OnceLock};

use graft_model::Tokenizer;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory, panic_utils};
use serde_json::{Value, json};

use crate::ApiError;
use crate::engine::Info;
use crate::tools::{ARGS, CALLS, CallStyle, TAG_CLOSE, TAG_OPEN, Tool};

/// Space between JSON's tokens: one, or a line and its indent. Small models would go on with it for ever.
const SPACE: &str = " |\\n {0,16}";
/// States of a grammar's lexer, of up to 2 kB each: what one request may make the server hold.
const MAX_STATES: usize = 50_000;
/// Longest token that the vocabulary's tree holds, in bytes.
const LONGEST: usize = 1000;

/// How an answer is held to a grammar.
pub struct Guide {
    matcher: Matcher,
    /// The field that asked for it.
    param: &'static str,
}

impl std::fmt::Debug for Guide {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Guide({})", self.param)
    }
}

impl Clone for Guide {
    fn clone(&self) -> Self {
        Self { matcher: self.matcher.deep_clone(), param: self.param }
    }
}

impl Guide {
    /// The logits (V,), minus infinity for each token that would leave the grammar.
    ///
    /// # Errors
    /// 400 when nothing can follow, or to find out takes too long.
    pub(crate) fn allowed(&mut self, logits: &[f32]) -> Result<Vec<f32>, ApiError> {
        let mask = self.matcher.compute_mask_or_eos().map_err(|e| self.failed(&e.to_string()))?;
        if mask.is_zero() {
            return Err(self.failed("no token can follow"));
        }
        let mut masked = vec![f32::NEG_INFINITY; logits.len()];
        mask.iter_set_entries(|id| {
            if let (Some(to), Some(from)) = (masked.get_mut(id), logits.get(id)) {
                *to = *from;
            }
        });
        Ok(masked)
    }

    /// Goes on after the token `id`; true when the answer is complete and nothing may follow.
    ///
    /// # Errors
    /// 400 when the token leaves the grammar.
    pub(crate) fn take(&mut self, id: u32) -> Result<bool, ApiError> {
        self.matcher.consume_token(id).map_err(|e| self.failed(&e.to_string()))?;
        Ok(self.matcher.is_stopped())
    }

    fn failed(&self, why: &str) -> ApiError {
        refused(self.param, why)
    }
}

fn refused(param: &str, why: &str) -> ApiError {
    // What follows the first line shows the grammar.
    let why = why.lines().find(|line| !line.trim().is_empty()).unwrap_or("it cannot be followed");
    let why: String = why.chars().take(300).collect();
    ApiError::unsupported(param, format!("`{param}`: this schema cannot be followed: {why}"))
}

/// What an answer may be. At least one of `schema` and `calls` is there, or nothing is asked for.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wanted {
    /// JSON of this schema.
    pub(crate) schema: Option<Value>,
    /// Calls of these tools.
    pub(crate) calls: Option<(CallStyle, Vec<Tool>)>,
    /// More than one call.
    pub(crate) parallel: bool,
    /// The marks of a thought that may come first; without the first one where the prompt has begun it.
    pub(crate) thought: Option<(Option<&'static str>, &'static str)>,
}

/// The vocabulary in the form that grammars take.
#[derive(Default)]
pub(crate) struct Guides(OnceLock<Result<ParserFactory, String>>);

impl Guides {
    /// Compiles what is wanted. It takes milliseconds, at the first call up to a second.
    ///
    /// # Errors
    /// 400 naming `response_format` or `tools` when a schema cannot be followed.
    pub(crate) fn compile(&self, info: &Info, wanted: &Wanted) -> Result<Guide, ApiError> {
        let param = if wanted.calls.is_some() { "tools" } else { "response_format" };
        let factory = self.0.get_or_init(|| {
            let made = || ParserFactory::new_simple(&vocabulary(info));
            let mut factory = panic_utils::catch_unwind(AssertUnwindSafe(made)).map_err(|e| e.to_string())?;
            // It would write warnings to stderr, and the grammar and the text so far into errors.
            factory.quiet();
            factory.limits_mut().verbose_errors = false;
            factory.limits_mut().max_lexer_states = MAX_STATES;
            Ok(factory)
        });
        let factory = factory.as_ref().map_err(|why| {
            ApiError::unsupported(
                param,
                format!("`{param}`: this model's vocabulary cannot be guided: {why}"),
            )
        })?;
        let grammar = grammar(&info.tokenizer, wanted);
        let parser = panic_utils::catch_unwind(AssertUnwindSafe(|| factory.create_parser(grammar)));
        let matcher = Matcher::new(parser);
        match matcher.get_error() {
            Some(why) => Err(refused(param, &why)),
            None => Ok(Guide { matcher, param }),
        }
    }
}

/// The bytes of each token, as a tree.
fn vocabulary(info: &Info) -> TokEnv {
    let tokenizer = &info.tokenizer;
    let added = tokenizer.added_tokens();
    let word = |id: u32| match added.get(&id) {
        // Such a token is never a part of a text: a grammar names it by its id.
        Some(content) => [&[TokTrie::SPECIAL_TOKEN_MARKER], content.as_bytes()].concat(),
        None => info.texts.get(tokenizer, id).bytes.unwrap_or_default(),
    };
    let words: Vec<Vec<u8>> = (0..info.vocab as u32)
        .map(word)
        .map(|word| if word.len() > LONGEST { Vec::new() } else { word })
        .collect();
    let ends: Vec<u32> =
        tokenizer.eos_ids().iter().copied().filter(|id| (*id as usize) < info.vocab).collect();
    let first = ends.first().copied().unwrap_or(INVALID_TOKEN);
    let mut trie = TokTrie::from(&TokRxInfo::new(info.vocab as u32, first), &words);
    if !ends.is_empty() {
        trie = trie.with_eos_tokens(&ends);
    }
    Arc::new(ApproximateTokEnv::new(trie))
}

/// The schema as the grammar takes it.
fn json_of(schema: &Value) -> Value {
    let mut schema = schema.clone();
    if let Some(map) = schema.as_object_mut() {
        map.insert("x-guidance".into(), json!({"whitespace_pattern": SPACE}));
    }
    schema
}

fn grammar(tokenizer: &Tokenizer, wanted: &Wanted) -> TopLevelGrammar {
    if let (Some(schema), None, None) = (&wanted.schema, &wanted.calls, &wanted.thought) {
        return TopLevelGrammar::from_json_schema(json_of(schema));
    }
    TopLevelGrammar::from_lark(lark(tokenizer, wanted))
}

/// The grammar in Lark's form. Tokens that stand alone in the vocabulary are named by their ids.
fn lark(tokenizer: &Tokenizer, wanted: &Wanted) -> String {
    let added = tokenizer.added_tokens();
    let mark = |text: &str| match added.iter().find(|(_, content)| *content == text) {
        Some((id, _)) => format!("<[{id}]>"),
        None => quoted(text),
    };
    let bodies = [wanted.schema.as_ref().map(|_| "answer"), wanted.calls.as_ref().map(|_| "calls")];
    let bodies: Vec<&str> = bodies.into_iter().flatten().collect();
    let mut out = format!("body: {}\n", bodies.join(" | "));
    let _ = match wanted.thought {
        None => writeln!(out, "start: body"),
        Some((open, close)) => {
            let (first, again) = match open {
                Some(open) => (mark(open), "?"),
                None => (String::new(), ""),
            };
            let close = mark(close);
            write!(
                out,
                "start: thought{again} body\nthought: {first} THOUGHT {close} GAP?\nTHOUGHT: /(.|\\n)*/\n"
            )
        }
    };
    out.push_str("GAP: /[ \\n]{1,4}/\n");
    if let Some(schema) = &wanted.schema {
        let _ = writeln!(out, "answer: %json {}", json_of(schema));
    }
    let Some((style, tools)) = &wanted.calls else { return out };
    let calls: Vec<String> = (0..tools.len()).map(|i| format!("call_{i}")).collect();
    let any = calls.join(" | ");
    let more = |between: &str| {
        if wanted.parallel { format!("one ({between} one)*") } else { "one".to_owned() }
    };
    let (all, key) = match style {
        CallStyle::Tagged => (more("GAP?"), "arguments"),
        CallStyle::Bare => ("one".to_owned(), "parameters"),
        CallStyle::List => (format!("{} \" \"? \"[\" {} \"]\"", mark(CALLS), more("\", \"")), "arguments"),
        CallStyle::Named => (more(""), ""),
    };
    let one = match style {
        CallStyle::Tagged => {
            format!("{} {} ({any}) {} {}", mark(TAG_OPEN), quoted("\n"), quoted("\n"), mark(TAG_CLOSE))
        }
        CallStyle::Named => format!("{} ({any})", mark(CALLS)),
        CallStyle::Bare | CallStyle::List => any,
    };
    let _ = write!(out, "calls: {all}\none: {one}\n");
    for (i, tool) in tools.iter().enumerate() {
        let _ = match style {
            CallStyle::Named => writeln!(out, "call_{i}: {} {} args_{i}", quoted(&tool.name), mark(ARGS)),
            _ => {
                let begin = quoted(&format!("{{\"name\": \"{}\", \"{key}\": ", tool.name));
                writeln!(out, "call_{i}: {begin} args_{i} \"}}\"")
            }
        };
        let _ = writeln!(out, "args_{i}: %json {}", json_of(&tool.parameters));
    }
    out
}

/// A string of a grammar: written as JSON's are.
fn quoted(text: &str) -> String {
    Value::String(text.to_owned()).to_string()
}
