//! What Python prints of a template's values: `str()`, `repr()` and `json.dumps()`.
//!
//! minijinja prints some values its own way (1e20, U+2028 in a list), and a model was trained on Python's.

use std::fmt::Write as _;

use minijinja::value::ValueKind;
use minijinja::{ErrorKind, Value as Jinja};

type Result<T> = std::result::Result<T, minijinja::Error>;

/// An operation that a template asked for and that cannot be.
pub(crate) fn invalid(message: String) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, message)
}

/// A template may nest a list in itself, or name the same one twice at every level: what it prints has an end.
const MAX_DEPTH: usize = 500;
const MAX_BYTES: usize = 16 << 20;

/// Whether minijinja may print the value otherwise than `str()`.
pub(crate) fn differs(x: &Jinja) -> bool {
    is_list(x) || matches!(x.kind(), ValueKind::Number | ValueKind::Map)
}

/// A list or tuple, or what minijinja has in its place: the sum of two lists, say.
fn is_list(x: &Jinja) -> bool {
    x.kind() == ValueKind::Seq || (x.kind() == ValueKind::Iterable && x.len().is_some())
}

/// `str(x)`.
///
/// # Errors
/// When it is too long or too deep.
pub(crate) fn str(x: &Jinja) -> Result<String> {
    let mut out = String::new();
    write_str(&mut out, x, 0)?;
    Ok(out)
}

fn write_str(out: &mut String, x: &Jinja, depth: usize) -> Result<()> {
    check(out, depth)?;
    match (x.kind(), float(x)) {
        (_, Some(value)) => write_float(out, value),
        _ if is_list(x) => {
            let (open, close) = if x.is_tuple() { ('(', ')') } else { ('[', ']') };
            out.push(open);
            for (i, item) in x.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                write_repr(out, &item, depth + 1)?;
            }
            // A comma tells a tuple of one from a value in parentheses.
            out.push_str(if x.is_tuple() && x.len() == Some(1) { "," } else { "" });
            out.push(close);
        }
        (ValueKind::Map, _) => {
            out.push('{');
            for (i, key) in x.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                write_repr(out, &key, depth + 1)?;
                out.push_str(": ");
                write_repr(out, &x.get_item(&key)?, depth + 1)?;
            }
            out.push('}');
        }
        _ => write!(out, "{x}")?,
    }
    Ok(())
}

fn write_repr(out: &mut String, x: &Jinja, depth: usize) -> Result<()> {
    if x.is_undefined() {
        out.push_str("Undefined");
    }
    let Some(text) = x.as_str() else { return write_str(out, x, depth) };
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if is_printable(c) => out.push(c),
            c => match c as u32 {
                code @ ..=0xff => write!(out, "\\x{code:02x}")?,
                code @ ..=0xffff => write!(out, "\\u{code:04x}")?,
                code => write!(out, "\\U{code:08x}")?,
            },
        }
    }
    out.push(quote);
    Ok(())
}

fn check(out: &str, depth: usize) -> Result<()> {
    let problem = match (depth > MAX_DEPTH, out.len() > MAX_BYTES) {
        (true, _) => format!("a value is nested deeper than {MAX_DEPTH} levels"),
        (_, true) => format!("a value prints as more than {} MB", MAX_BYTES >> 20),
        _ => return Ok(()),
    };
    Err(invalid(problem))
}

/// `str.isprintable`: neither a control, format or private character, nor unassigned, nor a separator but the space.
fn is_printable(c: char) -> bool {
    // Rust's `Debug` goes by the same categories, but inside a text only: a mark at its start is escaped.
    let mut text = [0; 5];
    text[0] = b'a';
    let length = 1 + c.encode_utf8(&mut text[1..]).len();
    let text = std::str::from_utf8(&text[..length]).unwrap_or_default();
    matches!(c, '\'' | '"') || text.escape_debug().nth(1) == Some(c)
}

/// The value of a float, which is not a whole number's.
fn float(x: &Jinja) -> Option<f64> {
    if x.kind() != ValueKind::Number || x.is_integer() { None } else { f64::try_from(x.clone()).ok() }
}

/// The shortest digits that come back, with an exponent from 1e16 up and below 1e-4.
fn write_float(out: &mut String, value: f64) {
    let text = format!("{value:e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let _ = if value.is_nan() {
        write!(out, "nan")
    } else if value != 0.0 && value.is_finite() && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        write!(out, "{digits}e{sign}{:02}", exponent.abs())
    } else {
        write!(out, "{value:?}")
    };
}

/// How JSON is laid out; the defaults are those of Python's `json.dumps`.
pub(crate) struct Layout {
    /// What one level is indented by; none keeps all on one line.
    pub(crate) indent: Option<String>,
    /// Between two items.
    pub(crate) item: String,
    /// Between a key and its value.
    pub(crate) key: String,
    /// Escapes what is not ASCII.
    pub(crate) ascii: bool,
    /// Sorts the keys.
    pub(crate) sort: bool,
}

/// `json.dumps(x)`.
///
/// # Errors
/// When a value is none that JSON has.
pub(crate) fn json(x: &Jinja, layout: &Layout) -> Result<String> {
    let mut out = String::new();
    write_json(&mut out, x, layout, 0)?;
    Ok(out)
}

fn write_json(out: &mut String, x: &Jinja, layout: &Layout, depth: usize) -> Result<()> {
    check(out, depth)?;
    match x.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if x.is_true() { "true" } else { "false" }),
        ValueKind::Number => write_number(out, x)?,
        ValueKind::String => write_string(out, x.as_str().unwrap_or_default(), layout.ascii),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Jinja> = x.try_iter()?.collect();
            write_items(out, ['[', ']'], &items, layout, depth, |out, item| {
                write_json(out, item, layout, depth + 1)
            })?;
        }
        ValueKind::Map => {
            let mut keys: Vec<Jinja> = x.try_iter()?.collect();
            if layout.sort {
                keys.sort();
            }
            write_items(out, ['{', '}'], &keys, layout, depth, |out, key| {
                write_string(out, &key_text(key), layout.ascii);
                out.push_str(&layout.key);
                write_json(out, &x.get_item(key)?, layout, depth + 1)
            })?;
        }
        kind => return Err(invalid(format!("tojson: a value that is {kind} is not JSON"))),
    }
    Ok(())
}

/// Keys that are not strings are written as JSON writes their values.
fn key_text(key: &Jinja) -> String {
    match key.kind() {
        ValueKind::None => "null".into(),
        ValueKind::Bool => key.is_true().to_string(),
        _ => key.to_string(),
    }
}

fn write_items(
    out: &mut String,
    [open, close]: [char; 2],
    items: &[Jinja],
    layout: &Layout,
    depth: usize,
    mut write: impl FnMut(&mut String, &Jinja) -> Result<()>,
) -> Result<()> {
    let line = |out: &mut String, depth: usize| {
        if let Some(indent) = &layout.indent {
            out.push('\n');
            out.push_str(&indent.repeat(depth));
        }
    };
    out.push(open);
    for (i, item) in items.iter().enumerate() {
        if i > 0 {
            out.push_str(&layout.item);
        }
        line(out, depth + 1);
        write(out, item)?;
    }
    if !items.is_empty() {
        line(out, depth);
    }
    out.push(close);
    Ok(())
}

fn write_number(out: &mut String, x: &Jinja) -> Result<()> {
    match float(x) {
        Some(value) if value.is_nan() => out.push_str("NaN"),
        Some(value) if value.is_infinite() => {
            out.push_str(if value > 0.0 { "Infinity" } else { "-Infinity" })
        }
        _ => write_str(out, x, 0)?,
    }
    Ok(())
}

fn write_string(out: &mut String, text: &str, ascii: bool) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if (c as u32) < 0x20 || (ascii && !(' '..='~').contains(&c)) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}
