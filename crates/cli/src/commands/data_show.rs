//! `graft data show`: rows as training sees them, the tokens of the loss marked, and what is wrong with the data.
//!
//! What is shown are the examples that a run would be given, so there is no second reading of the data that could differ.

use super::{data, load};
use crate::args::DataShowArgs;
use crate::errors::Usage;
use crate::hub::{self, What};
use crate::report::{self, escape};
use crate::settings::{Defaults, Settings};
use crate::ui::{self, visible};
use anyhow::{Result, bail};
use graft_model::Tokenizer;
use graft_train::{Data, Example, Split, Warning};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::io::IsTerminal;

/// Format of the JSON report.
const SCHEMA: u32 = 1;

/// Shows rows, the splits' sizes and the warnings, as text, JSON or a page.
pub(crate) fn data_show(args: &DataShowArgs) -> Result<()> {
    let defaults = if args.defaults == "train" { Defaults::Recipe } else { Defaults::MlxLm };
    let mut lora = args.lora.clone();
    // All splits are read, so that rows in two of them are found.
    (lora.train, lora.test) = (true, true);
    let settings = Settings::new(&lora, defaults)?;
    let model = settings.text("model").unwrap_or_default();
    let dir = hub::resolve(model, What::Model)?;
    let vocab = load::config(model)?.vocab as usize;
    let (tokenizer, template) = load::text(&dir)?;
    let data = data::load(&settings, &load::encoder(&tokenizer, template.as_ref()))?;
    let splits = [("train", &data.train), ("valid", &data.valid), ("test", &data.test)];
    let page = args.html.as_ref().map(|file| file.display().to_string());
    let files = splits.map(|(_, split)| split.file.clone());
    report::check(&page.iter().map(|file| ("--html", file)).collect::<Vec<_>>(), &files)?;
    for (_, split) in splits {
        split.check_vocabulary(vocab)?;
    }
    let split = splits.into_iter().find(|(name, _)| *name == args.split).map_or(&data.train, |(_, s)| s);
    let special = tokenizer.special_tokens();
    let rows = chosen(split, args)?.into_iter().map(|example| Shown::new(example, &tokenizer, &special));
    let rows = rows.collect::<Result<Vec<_>>>()?;
    let batch_size = usize::try_from(settings.int("batch_size")).unwrap_or_default();
    let warnings = data.warnings(batch_size, settings.int("val_batches") != 0);
    let report = Report { split, rows, splits: sizes(&data), warnings };
    if let Some(file) = &page {
        report::write(file, &report.html(model))?;
    }
    if args.json {
        ui::out(&serde_json::to_string(&report.json())?);
    } else if args.html.is_none() {
        let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        ui::out(&report.text(colour));
    }
    Ok(())
}

/// The rows to show, skipped ones too, in the order of their lines.
fn chosen<'a>(split: &'a Split, args: &DataShowArgs) -> Result<Vec<&'a Example>> {
    let mut all: Vec<&Example> = split.examples.iter().chain(&split.skipped).collect();
    let (Some(first), Some(last)) = (all.iter().map(|e| e.line).min(), all.iter().map(|e| e.line).max())
    else {
        split.require()?;
        return Ok(all);
    };
    // Of several data sets each keeps its lines together.
    if split.skipped.iter().any(|e| e.line < last) {
        all.sort_by_key(|e| e.line);
    }
    match (args.row, usize::try_from(args.count)) {
        (None, Ok(count)) => all.truncate(count),
        (None, Err(_)) if args.count < -1 => {
            bail!(Usage(format!("--count must be at least 0, or -1 for all, not {}", args.count)))
        }
        (None, Err(_)) => {}
        (Some(row), _) => all.retain(|e| e.line == row),
    }
    if let Some(row) = args.row.filter(|_| all.is_empty()) {
        let file = split.file.display();
        bail!(Usage(format!(
            "--row {row}: {file} has no row at that line; its rows stand at lines {first} to {last}"
        )));
    }
    Ok(all)
}

/// A token as it is shown.
struct Piece {
    id: u32,
    /// Empty where a later token completes the character.
    text: String,
    trained: bool,
    special: bool,
}

/// A row as it is shown.
struct Shown<'a> {
    example: &'a Example,
    pieces: Vec<Piece>,
}

impl<'a> Shown<'a> {
    fn new(example: &'a Example, tokenizer: &Tokenizer, special: &BTreeMap<u32, String>) -> Result<Self> {
        let (mut stream, trained) = (tokenizer.stream(), example.trained());
        let mut pieces = Vec::with_capacity(example.tokens.len());
        for (at, id) in example.tokens.iter().copied().enumerate() {
            let (text, special) = (stream.push(id)?, special.contains_key(&id));
            pieces.push(Piece { id, text, trained: trained.contains(&at), special });
        }
        if let Some(last) = pieces.last_mut() {
            last.text += &stream.finish()?;
        }
        Ok(Self { example, pieces })
    }

    /// `31 tokens, 7 trained`, and what became of the row.
    fn counts(&self) -> String {
        let Example { tokens, full_length, .. } = self.example;
        let mut text = format!("{} tokens, {} trained", tokens.len(), self.example.targets());
        if self.example.is_cut() {
            let _ = write!(text, ", cut from {full_length}");
        }
        if self.example.targets() == 0 {
            text += ", skipped";
        }
        text
    }

    /// The text, trained tokens in brackets or bold green, special ones underlined where there is colour.
    fn marked(&self, colour: bool) -> String {
        let mut text = String::new();
        for (at, piece) in self.pieces.iter().enumerate() {
            let beside = |at: Option<usize>| at.and_then(|at| self.pieces.get(at)).is_some_and(|p| p.trained);
            let codes = match (piece.trained, piece.special) {
                _ if !colour => "",
                (true, true) => "\x1b[1;4;32m",
                (true, false) => "\x1b[1;32m",
                (false, true) => "\x1b[4m",
                (false, false) => "",
            };
            text += if piece.trained && !colour && !beside(at.checked_sub(1)) { "⟦" } else { "" };
            text += codes;
            text += &visible(&piece.text);
            text += if codes.is_empty() { "" } else { "\x1b[0m" };
            if piece.trained && !colour && !beside(at.checked_add(1)) {
                let line_ends = text.ends_with('\n');
                text.truncate(text.len() - usize::from(line_ends));
                text += if line_ends { "⟧\n" } else { "⟧" };
            }
        }
        text
    }
}

/// The size of a split.
struct Size<'a> {
    name: &'static str,
    split: &'a Split,
    tokens: usize,
    trained: usize,
    longest: usize,
}

fn sizes(data: &Data) -> Vec<Size<'_>> {
    let mut all = Vec::new();
    for (name, split) in [("train", &data.train), ("valid", &data.valid), ("test", &data.test)] {
        if split.rows() == 0 {
            continue;
        }
        let sum = |value: fn(&Example) -> usize| split.examples.iter().map(value).sum();
        let longest = split.examples.iter().chain(&split.skipped).map(|e| e.full_length).max();
        all.push(Size {
            name,
            split,
            tokens: sum(|e| e.tokens.len()),
            trained: sum(Example::targets),
            longest: longest.unwrap_or_default(),
        });
    }
    all
}

const COLUMNS: [&str; 6] = ["split", "rows", "skipped", "tokens", "trained", "longest row"];

impl Size<'_> {
    fn cells(&self) -> Vec<String> {
        let share = 100.0 * self.trained as f64 / self.tokens.max(1) as f64;
        let trained = format!("{} ({share:.1}%)", self.trained);
        let (rows, skipped) = (self.split.rows().to_string(), self.split.skipped.len().to_string());
        vec![self.name.into(), rows, skipped, self.tokens.to_string(), trained, self.longest.to_string()]
    }
}

/// All that is shown.
struct Report<'a> {
    split: &'a Split,
    rows: Vec<Shown<'a>>,
    splits: Vec<Size<'a>>,
    warnings: Vec<Warning>,
}

impl Report<'_> {
    fn text(&self, colour: bool) -> String {
        let mut text = String::new();
        for row in &self.rows {
            let place = format!("{}:{}", self.split.file.display(), row.example.line);
            let body = row.marked(colour);
            let _ = write!(text, "{place}  {}\n{}\n\n", row.counts(), body.trim_end_matches('\n'));
        }
        let head = COLUMNS.map(str::to_owned).to_vec();
        let table: Vec<Vec<String>> =
            std::iter::once(head).chain(self.splits.iter().map(Size::cells)).collect();
        text += &ui::table(&table);
        text += "\n\n";
        let lines: Vec<String> = self.warnings.iter().map(|w| format!("warning: {}", w.text)).collect();
        text + &if lines.is_empty() { "No warnings.".to_owned() } else { lines.join("\n") }
    }

    fn json(&self) -> Value {
        let row = |row: &Shown| {
            let token =
                |p: &Piece| json!({"id": p.id, "text": p.text, "trained": p.trained, "special": p.special});
            json!({
                "line": row.example.line, "full_length": row.example.full_length,
                "trained": row.example.targets(), "tokens": row.pieces.iter().map(token).collect::<Vec<_>>(),
            })
        };
        let size = |s: &Size| {
            json!({
                "split": s.name, "file": s.split.file, "rows": s.split.rows(), "skipped": s.split.skipped.len(),
                "tokens": s.tokens, "trained": s.trained, "longest": s.longest,
            })
        };
        let warning = |w: &Warning| json!({"name": w.fault.name(), "lines": w.lines, "text": w.text});
        json!({
            "schema": SCHEMA,
            "file": self.split.file,
            "rows": self.rows.iter().map(row).collect::<Vec<_>>(),
            "splits": self.splits.iter().map(size).collect::<Vec<_>>(),
            "warnings": self.warnings.iter().map(warning).collect::<Vec<_>>(),
        })
    }

    fn html(&self, model: &str) -> String {
        let mut page = String::from(HEAD);
        let file = self.split.file.display().to_string();
        let _ = write!(page, "<h1>What is trained on</h1>\n<p>{} for {}</p>\n", escape(&file), escape(model));
        page += "<div class=wide><table>\n<tr>";
        page.extend(COLUMNS.map(|name| format!("<th>{name}")));
        for size in &self.splits {
            page += "\n<tr>";
            page.extend(size.cells().iter().map(|cell| format!("<td>{}", escape(cell))));
        }
        page += "\n</table></div>\n<h2>Warnings</h2>\n<ul>\n";
        for warning in &self.warnings {
            let _ = writeln!(page, "<li>{}", escape(&warning.text));
        }
        page += if self.warnings.is_empty() { "<li>None.\n</ul>\n" } else { "</ul>\n" };
        page += "<h2>Rows</h2>\n<p><b>Underlined and shaded</b> tokens are trained on; <i>framed</i> ones are special. \
                 A token's id is shown where the pointer rests.</p>\n";
        for row in &self.rows {
            let _ = write!(page, "<h3>Line {}: {}</h3>\n<pre>", row.example.line, row.counts());
            for (at, piece) in row.pieces.iter().enumerate() {
                let name = if piece.trained { "b" } else { "span" };
                let class = if piece.special { " class=s" } else { "" };
                let text = escape(&visible(&piece.text));
                let _ = write!(page, "<{name}{class} title=\"token {at}, id {}\">{text}</{name}>", piece.id);
            }
            page += "</pre>\n";
        }
        page + "</main>\n"
    }
}

/// The page's beginning: all that it looks like.
const HEAD: &str = r#"<!doctype html>
<html lang=en>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<title>graft data show</title>
<style>
:root { color-scheme: light dark; --ink: #1b1d21; --paper: #fff; --soft: #f3f4f6; --line: #c9ccd2; --mark: #d3f0d9; --rule: #1d7a3a }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e7ea; --paper: #16181c; --soft: #1f2228; --line: #464b55; --mark: #1d4028; --rule: #6fd08c }
}
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2rem } h3 { font-size: 1rem; margin-bottom: .3rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
li { margin: .4rem 0 }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 6px; padding: .8rem; margin: 0;
  font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
b { font-weight: 600; background: var(--mark); border-bottom: 2px solid var(--rule) }
p b { padding: 0 .2rem } .s, i { border: 1px solid var(--line); border-radius: 4px; padding: 0 .1rem; font-style: normal }
b.s { border: 1px solid var(--rule); border-bottom-width: 2px }
</style>
<main>
"#;
