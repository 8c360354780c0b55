//! Messages to the text a model was trained on: chat templates, rendered as Hugging Face renders them.
//!
//! Templates are Jinja programs written for Python. Beyond the language they use: blocks that swallow the line they
//! stand on, Python's methods on strings, lists and dicts, `raise_exception`, `strftime_now`, a `tojson` that escapes
//! nothing for HTML, `break` and `continue`, and `{% generation %}`, which marks what a model said and prints nothing.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, StringInput, ValueKind};
use minijinja::{Environment, ErrorKind, State, Value as Jinja, escape_formatter, filters};
use serde_json::{Map, Value};

use crate::python::{self, invalid};
use crate::tokenizer::{read_json_object, special_tokens, token_text};
use crate::{Error, Result};

/// Name of the template in the environment.
pub(crate) const DEFAULT: &str = "default";
/// Name of the template that is used where tools are given and the model has a separate one for them.
const TOOL_USE: &str = "tool_use";
/// Templates come with models, so from anywhere: what one may compute and how wide it may indent has an end. A long
/// conversation takes about a hundred instructions a message.
const FUEL: u64 = 50_000_000;
const MAX_INDENT: usize = 64;
/// Names under which reasoning is passed; templates read the first.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// The chat template of a model.
#[derive(Debug)]
pub struct ChatTemplate {
    file: PathBuf,
    environment: Environment<'static>,
    tokens: Map<String, Value>,
    source: String,
    tool_use: Option<String>,
}

impl ChatTemplate {
    /// Reads the template of a model directory: chat_template.jinja, else chat_template.json, else tokenizer_config.json
    /// (one template, or a list of named ones of which `default` and `tool_use` are used).
    ///
    /// # Errors
    /// When there is none, or it is not a template.
    pub fn load(dir: &Path) -> Result<Self> {
        let config = special_tokens(dir)?;
        let found = Self::find(dir, &config)?;
        let Some((file, templates)) = found else {
            return Err(Error::Template {
                file: dir.to_path_buf(),
                message: "there is none: no chat_template.jinja, no chat_template.json, no `chat_template` in \
                          tokenizer_config.json; give a plain prompt, or put the template of the instruct model there"
                    .into(),
            });
        };
        let tokens = config.iter().filter(|(key, _)| key.ends_with("_token"));
        let tokens =
            tokens.filter_map(|(key, v)| Some((key.clone(), Value::String(token_text(v)?)))).collect();
        Self::new(file, &templates, tokens)
    }

    /// Whether a model directory has a template.
    ///
    /// # Errors
    /// When a file that may hold one cannot be read.
    pub fn exists(dir: &Path) -> Result<bool> {
        Ok(Self::find(dir, &special_tokens(dir)?)?.is_some())
    }

    /// A template from its text, with the special tokens (`bos_token`, `eos_token`, …) it may print; `templates` are
    /// (name, text), and `file` stands in messages.
    ///
    /// # Errors
    /// When the text is not a template, or none is called `default`.
    pub fn new(file: PathBuf, templates: &[(String, String)], tokens: Map<String, Value>) -> Result<Self> {
        let mut environment = environment();
        for (name, text) in templates {
            environment
                .add_template_owned(name.clone(), tolerate_generation(text))
                .map_err(|e| error(&file, &e))?;
        }
        let named = |wanted: &str| templates.iter().find(|(name, _)| name == wanted);
        let Some((_, source)) = named(DEFAULT) else {
            let names = templates.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
            let message = format!("expected a template named `default`, found {names:?}");
            return Err(Error::Template { file, message });
        };
        let (source, tool_use) = (source.clone(), named(TOOL_USE).map(|(_, text)| text.clone()));
        Ok(Self { file, environment, tokens, source, tool_use })
    }

    /// The text of the (default) template.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The text of the template that is used where tools are given.
    pub fn tool_source(&self) -> &str {
        self.tool_use.as_ref().unwrap_or(&self.source)
    }

    /// The text of `messages` (objects with `role` and `content`), with `tools` (a list of JSON schemas) where the
    /// template knows them; `add_generation_prompt` appends the beginning of an answer; `extra` are further variables,
    /// such as `enable_thinking`, and win over the special tokens.
    ///
    /// # Errors
    /// When the template fails, or refuses the messages by `raise_exception`.
    pub fn render(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        add_generation_prompt: bool,
        extra: &Map<String, Value>,
    ) -> Result<String> {
        let mut variables = self.tokens.clone();
        let messages = messages.iter().map(with_reasoning).collect();
        variables.insert("messages".into(), Value::Array(messages));
        variables.insert("tools".into(), tools.cloned().unwrap_or_default());
        variables.insert("documents".into(), Value::Null);
        variables.insert("add_generation_prompt".into(), add_generation_prompt.into());
        variables.extend(extra.iter().map(|(k, v)| (k.clone(), v.clone())));
        let name = if tools.is_some() && self.tool_use.is_some() { TOOL_USE } else { DEFAULT };
        let template = self.environment.get_template(name).map_err(|e| error(&self.file, &e))?;
        template.render(jinja(&Value::Object(variables))).map_err(|e| error(&self.file, &e))
    }

    /// The named texts of a model directory; none where it has no template.
    pub(crate) fn texts(dir: &Path) -> Result<Option<Vec<(String, String)>>> {
        Ok(Self::find(dir, &special_tokens(dir)?)?.map(|(_, texts)| texts))
    }

    /// Where the template is, and its named texts.
    #[allow(clippy::type_complexity, reason = "a private pair")]
    fn find(dir: &Path, config: &Map<String, Value>) -> Result<Option<(PathBuf, Vec<(String, String)>)>> {
        let file = dir.join("chat_template.jinja");
        match std::fs::read_to_string(&file) {
            Ok(text) => {
                let mut all = vec![(DEFAULT.to_owned(), text)];
                let other = dir.join("additional_chat_templates").join("tool_use.jinja");
                if let Ok(text) = std::fs::read_to_string(other) {
                    all.push((TOOL_USE.to_owned(), text));
                }
                return Ok(Some((file, all)));
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(Error::Io { path: file, source }),
        }
        let file = dir.join("chat_template.json");
        let map = read_json_object(&file)?.unwrap_or_default();
        if let Some(value) = map.get("chat_template").filter(|v| !v.is_null()) {
            return Ok(Some((file.clone(), named(&file, value)?)));
        }
        let file = dir.join("tokenizer_config.json");
        match config.get("chat_template").filter(|v| !v.is_null()) {
            Some(value) => Ok(Some((file.clone(), named(&file, value)?))),
            None => Ok(None),
        }
    }
}

/// One template, or a list of objects with `name` and `template`, or an object of templates by name.
fn named(file: &Path, value: &Value) -> Result<Vec<(String, String)>> {
    let pair = |name: &Value, text: &Value| Some((name.as_str()?.to_owned(), text.as_str()?.to_owned()));
    let all = match value {
        Value::String(text) => Some(vec![(DEFAULT.to_owned(), text.clone())]),
        Value::Array(list) => list.iter().map(|one| pair(one.get("name")?, one.get("template")?)).collect(),
        Value::Object(map) => map.iter().map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned()))).collect(),
        _ => None,
    };
    let message = || "expected a text, or a list of objects with `name` and `template`".to_owned();
    all.ok_or_else(|| Error::Template { file: file.to_path_buf(), message: message() })
}

/// A message whose reasoning has the names that templates read.
fn with_reasoning(message: &Value) -> Value {
    let Some(map) = message.as_object() else { return message.clone() };
    let Some(reasoning) = REASONING.iter().find_map(|key| map.get(*key).filter(|v| !v.is_null())) else {
        return message.clone();
    };
    let mut map = map.clone();
    let reasoning = reasoning.clone();
    map.entry("thinking").or_insert_with(|| reasoning.clone());
    map.insert("reasoning_content".into(), reasoning);
    Value::Object(map)
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    // Only custom delimiters can be wrong; with the usual ones the default is never taken.
    environment.set_syntax(
        SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().unwrap_or_default(),
    );
    environment.set_fuel(Some(FUEL));
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function(
        "raise_exception",
        |message: String| -> std::result::Result<(), minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        },
    );
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", tojson);
    environment.add_filter("string", string);
    environment.add_filter("join", join);
    environment.set_formatter(|out, state, value| {
        if python::differs(value) {
            return Ok(out.write_str(&python::str(value)?)?);
        }
        escape_formatter(out, state, value)
    });
    environment
}

fn strftime_now(format: &str) -> std::result::Result<String, minijinja::Error> {
    let mut text = String::new();
    // Writing fails on an unknown specifier, where turning it into a string would panic.
    match write!(text, "{}", chrono::Local::now().format(format)) {
        Ok(()) => Ok(text),
        Err(_) => Err(invalid(format!("strftime_now: {format:?} is not a date format"))),
    }
}

/// JSON as the template sees it.
fn jinja(value: &Value) -> Jinja {
    match value {
        Value::Null => Jinja::from(()),
        Value::Bool(b) => Jinja::from(*b),
        Value::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(n), _) => Jinja::from(n),
            (None, Some(n)) => Jinja::from(n),
            (None, None) => Jinja::from(n.as_f64().unwrap_or(f64::NAN)),
        },
        Value::String(text) => Jinja::from(text.as_str()),
        Value::Array(items) => items.iter().map(jinja).collect(),
        Value::Object(map) => Jinja::from_pairs(map.iter().map(|(k, v)| (k.as_str(), jinja(v)))),
    }
}

/// The template's own words first, then where it stopped.
fn error(file: &Path, e: &minijinja::Error) -> Error {
    let mut message = e.detail().map_or_else(|| e.kind().to_string(), str::to_owned);
    if let Some(line) = e.line() {
        let _ = write!(message, " (line {line} of the template)");
    }
    Error::Template { file: file.to_path_buf(), message }
}

/// `{% generation %}` … `{% endgeneration %}` as a scope of its own, which is what it is to the text; line and space
/// control of the tags stay.
fn tolerate_generation(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        // Not of the tag's own beginning, as in `{%}`.
        let Some(end) = tag[2..].find("%}").map(|at| at + 2) else {
            out.push_str(tag);
            return out;
        };
        let inner = &tag[2..end];
        let word = inner.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        match word {
            "generation" => out.push_str(&format!("{{%{}%}}", inner.replace("generation", "with"))),
            "endgeneration" => out.push_str(&format!("{{%{}%}}", inner.replace("endgeneration", "endwith"))),
            _ => out.push_str(&tag[..end + 2]),
        }
        rest = &tag[end + 2..];
    }
    out.push_str(rest);
    out
}

/// `str(x)`.
#[allow(clippy::needless_pass_by_value, reason = "the signature of a filter")]
fn string(state: &State, x: Jinja) -> std::result::Result<Jinja, minijinja::Error> {
    if python::differs(&x) { Ok(python::str(&x)?.into()) } else { filters::string(state, &x) }
}

/// minijinja's `join`, its items printed as Python prints them.
#[allow(clippy::needless_pass_by_value, reason = "the signature of a filter")]
fn join(
    state: &mut State,
    x: Jinja,
    joiner: Option<StringInput<'_>>,
    attribute: Option<&str>,
    kwargs: Kwargs,
) -> std::result::Result<Jinja, minijinja::Error> {
    if attribute.is_some() || kwargs.has("attribute") || x.kind() != ValueKind::Seq {
        return filters::join(state, &x, joiner, attribute, kwargs);
    }
    let printed =
        |item: Jinja| if python::differs(&item) { python::str(&item).map(Jinja::from) } else { Ok(item) };
    let items = x.try_iter()?.map(printed).collect::<std::result::Result<Vec<_>, _>>()?;
    filters::join(state, &items.into(), joiner, attribute, kwargs)
}

/// `json.dumps(x, ensure_ascii=False, indent, separators, sort_keys)`.
#[allow(clippy::needless_pass_by_value, reason = "the signature of a filter")]
fn tojson(
    x: &Jinja,
    args: minijinja::value::Rest<Jinja>,
    kwargs: Kwargs,
) -> std::result::Result<String, minijinja::Error> {
    // Positional: ensure_ascii, indent, separators, sort_keys, as in the function that templates were written for.
    let option = |name: &str, position: usize| -> std::result::Result<Jinja, minijinja::Error> {
        let named = kwargs.get::<Option<Jinja>>(name)?;
        Ok(named.or_else(|| args.get(position).cloned()).unwrap_or_else(|| Jinja::from(())))
    };
    let (ascii, indent, separators, sort) =
        (option("ensure_ascii", 0)?, option("indent", 1)?, option("separators", 2)?, option("sort_keys", 3)?);
    kwargs.assert_all_used()?;
    let indent = match indent.kind() {
        ValueKind::None | ValueKind::Undefined => None,
        ValueKind::String => Some(indent.to_string()),
        _ => match usize::try_from(indent)? {
            width @ 0..=MAX_INDENT => Some(" ".repeat(width)),
            width => return Err(invalid(format!("tojson: an indent of {width} is more than {MAX_INDENT}"))),
        },
    };
    let (mut item, mut key) = (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned());
    if !separators.is_none() {
        let two: Vec<Jinja> = separators.try_iter()?.collect();
        let [a, b] = two.as_slice() else { return Err(invalid("tojson: separators are two strings".into())) };
        (item, key) = (a.to_string(), b.to_string());
    }
    let layout = python::Layout { indent, item, key, ascii: ascii.is_true(), sort: sort.is_true() };
    python::json(x, &layout)
}
