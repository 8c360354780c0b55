//! Reports as pages: one template for all of them, made of the JSON that a report also is, so that both say the same.
//!
//! A page is one file: HTML with inline SVG, light or dark as the reader's system is, on a phone or a desk, asking for
//! nothing from elsewhere. A cell that shows a number of the JSON names its place there (`data-at`).

mod chart;
mod pages;

pub(crate) use chart::{Chart, Series, escape, picture};

pub(crate) use pages::{COMPARED, compare, eval, fuse, runs};

use crate::errors::Usage;
use crate::ui;
use anyhow::{Context, Result, bail};
use graft_quant::{check_writable, write_atomic};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Refuses files that could not be written, or that would replace one another or one of `inputs`, before the work that
/// they are to hold. Each comes with its flag.
pub(crate) fn check(files: &[(&str, &String)], inputs: &[PathBuf]) -> Result<()> {
    let mut places: Vec<PathBuf> = Vec::new();
    for (flag, file) in files {
        let path = Path::new(file.as_str());
        let parent = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if path.is_dir() || path.file_name().is_none() || !parent.is_dir() {
            bail!(Usage(format!("{flag} {file}: expected a file in a directory that exists")));
        }
        check_writable(path).map_err(|error| Usage(format!("{flag} {error}")))?;
        let place = parent.canonicalize()?.join(path.file_name().unwrap_or_default());
        if places.contains(&place) {
            bail!(Usage(format!(
                "{flag} {file}: another file is written there: give each a place of its own"
            )));
        }
        let is_there = |input: &PathBuf| {
            let own = input.parent().and_then(|dir| Some(dir.canonicalize().ok()?.join(input.file_name()?)));
            own.as_ref() == Some(&place)
                || path.canonicalize().is_ok_and(|p| input.canonicalize().ok() == Some(p))
        };
        if inputs.iter().any(is_there) {
            bail!(Usage(format!("{flag} {file}: that is the data: give the report a place of its own")));
        }
        places.push(place);
    }
    Ok(())
}

/// Writes a report's file and says so.
pub(crate) fn write(file: &str, text: &str) -> Result<()> {
    write_bytes(file, text.as_bytes())
}

/// As for text, for what is none.
pub(crate) fn write_bytes(file: &str, bytes: &[u8]) -> Result<()> {
    write_atomic(Path::new(file), bytes).with_context(|| format!("cannot write the report {file}"))?;
    ui::note(&format!("written: {file}"));
    Ok(())
}

/// Writes a report as JSON.
pub(crate) fn write_json(file: &str, report: &Value) -> Result<()> {
    write(file, &format!("{report:#}\n"))
}

/// `[from, to]` of an interval; a dash where there is none.
pub(crate) fn range(interval: &Value, form: As) -> String {
    match interval {
        Value::Array(ends) if ends.len() == 2 => {
            format!("[{}, {}]", form.show(&ends[0]), form.show(&ends[1]))
        }
        _ => form.show(&Value::Null),
    }
}

/// The whole page around a body.
fn page(title: &str, body: &str) -> String {
    let version = env!("CARGO_PKG_VERSION");
    let template = include_str!("page.html").replace("{{version}}", version);
    template.replace("{{title}}", &escape(title)).replace("{{body}}", body)
}

/// How a number is shown.
#[derive(Clone, Copy)]
pub(crate) enum As {
    /// Four decimals: a loss, a score.
    Decimal,
    /// The same with its sign.
    Signed,
    /// Seconds as milliseconds.
    Milliseconds,
    /// Bytes with a unit.
    Bytes,
    /// A whole number, or a text.
    Plain,
    /// Two decimals and `x`: how many times as much.
    Times,
    /// A learning rate.
    Rate,
    /// A share as a percentage.
    Percent,
}

impl As {
    /// The value as text; a dash where there is none.
    pub(crate) fn show(self, value: &Value) -> String {
        let Some(number) = value.as_f64() else {
            return value.as_str().map_or_else(|| "–".into(), str::to_owned);
        };
        match self {
            // What blew up has digits that say nothing.
            Self::Decimal if number.abs() >= 1e6 => format!("{number:.4e}"),
            Self::Signed if number.abs() >= 1e6 => format!("{number:+.4e}"),
            Self::Decimal => format!("{number:.4}"),
            Self::Signed => format!("{number:+.4}"),
            Self::Milliseconds => format!("{:.1} ms", number * 1e3),
            Self::Bytes => ui::bytes(number as u64),
            Self::Plain => value.to_string(),
            Self::Times => format!("{number:.2}x"),
            Self::Rate => format!("{number:.2e}"),
            Self::Percent => format!("{:.1} %", number * 100.0),
        }
    }
}

/// A JSON report, read by pointers such as `/legs/0/step_seconds/median`.
struct Doc<'a>(&'a Value);

impl Doc<'_> {
    fn at(&self, pointer: &str) -> &Value {
        self.0.pointer(pointer).unwrap_or(&Value::Null)
    }

    fn text(&self, pointer: &str) -> String {
        escape(self.at(pointer).as_str().unwrap_or_default())
    }

    fn number(&self, pointer: &str) -> f64 {
        self.at(pointer).as_f64().unwrap_or(f64::NAN)
    }

    fn list(&self, pointer: &str) -> &[Value] {
        self.at(pointer).as_array().map_or(&[], Vec::as_slice)
    }

    /// What shows the number at a place of the JSON.
    fn span(&self, pointer: &str, form: As) -> String {
        format!("<span data-at=\"{}\">{}</span>", escape(pointer), escape(&form.show(self.at(pointer))))
    }

    /// The same with an interval, where there is one beside it.
    fn estimate(&self, value: &str, interval: &str, form: As) -> String {
        let shown = self.span(value, form);
        if self.at(interval).is_null() {
            return shown;
        }
        let ends = [0, 1].map(|i| self.span(&format!("{interval}/{i}"), form));
        format!("{shown}<br><span class=\"note\">[{}, {}]</span>", ends[0], ends[1])
    }
}

/// A table whose cells are HTML; the first row is its head.
fn table(rows: &[Vec<String>]) -> String {
    let mut out = String::from("<div class=\"wide\"><table>");
    for (index, row) in rows.iter().enumerate() {
        let cell = if index == 0 { "th scope=\"col\"" } else { "td" };
        let close = if index == 0 { "th" } else { "td" };
        out += "<tr>";
        for text in row {
            out += &format!("<{cell}>{text}</{close}>");
        }
        out += "</tr>";
    }
    out + "</table></div>"
}
