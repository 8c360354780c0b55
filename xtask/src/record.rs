//! What a run of the pipeline measured, as people read it; and the demo's, kept in docs/demo.json and in README.md.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Map, Value};

use crate::sh;

/// What holds the record.
const READMES: [&str; 2] = ["README.md", "README.ko.md"];

/// What stands around it.
const MARKERS: [&str; 2] = ["<!-- demo: written by `cargo xtask demo --record` -->", "<!-- end of demo -->"];

/// What is compared, as columns.
const MODELS: [&str; 3] = ["base", "adapter", "fused"];

/// Characters of an answer that are shown.
const ANSWER: usize = 60;

fn file() -> PathBuf {
    sh::root().join("docs/demo.json")
}

/// Puts the report of one kind into docs/demo.json, and the block that all of them make into README.md.
pub(crate) fn save(kind: &str, report: Value) -> Result<()> {
    let file = file();
    let mut reports = load(&file)?;
    reports.insert(kind.into(), report);
    fs::create_dir_all(sh::root().join("docs"))?;
    let text = serde_json::to_string_pretty(&reports)? + "\n";
    fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
    for name in READMES {
        let readme = sh::root().join(name);
        let text =
            fs::read_to_string(&readme).with_context(|| format!("cannot read {}", readme.display()))?;
        let text = replaced(&text, MARKERS, &block(&reports)).with_context(|| {
            format!("{name} has no place for the record: it needs the lines\n{}\n{}", MARKERS[0], MARKERS[1])
        })?;
        fs::write(&readme, text).with_context(|| format!("cannot write {}", readme.display()))?;
    }
    eprintln!("recorded: {}", file.display());
    Ok(())
}

fn load(file: &Path) -> Result<Map<String, Value>> {
    if !file.exists() {
        return Ok(Map::new());
    }
    let text = fs::read_to_string(file)?;
    serde_json::from_str(&text).with_context(|| format!("{} is not a record", file.display()))
}

/// The block of README.md: the figures of both kinds, and the answers of the first.
fn block(reports: &Map<String, Value>) -> String {
    let kinds = ["lora", "dora"].iter().filter_map(|kind| reports.get(*kind));
    let answers = kinds.clone().take(1).map(answers);
    kinds.map(figures).chain(answers).collect::<Vec<_>>().join("\n")
}

/// The text with another block between the markers.
pub(crate) fn replaced(text: &str, markers: [&str; 2], block: &str) -> Option<String> {
    let (before, rest) = text.split_once(markers[0])?;
    let (_, after) = rest.split_once(markers[1])?;
    Some(format!("{before}{}\n\n{block}\n{}{after}", markers[0], markers[1]))
}

/// One report as Markdown that is readable as it is.
pub(crate) fn render(report: &Value) -> String {
    format!("{}\n{}", figures(report), answers(report))
}

fn figures(report: &Value) -> String {
    let training = &report["training"];
    let number = |key: &str| training[key].as_f64().unwrap_or_default();
    let kind = report["fine_tune_type"].as_str().unwrap_or_default();
    let title = format!("{}, {}", text(&report["model"]), if kind == "dora" { "DoRA" } else { "LoRA" });
    let score = match report["rows"].as_u64() {
        Some(rows) => format!("exact answers to {rows} held-out requests"),
        None => "perplexity of held-out text".to_owned(),
    };
    let row = |name: String, cell: &dyn Fn(&str) -> String| {
        [vec![name], MODELS.iter().map(|model| cell(model)).collect()].concat()
    };
    let figures = table(&[
        row(title, &|model| model.to_owned()),
        row(score, &|model| text(&report["scores"][model])),
        row("weights".into(), &|model| bytes(&report["bytes"][model])),
    ]);
    let losses: Vec<f64> =
        training["losses"].as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
    let ends =
        losses.first().zip(losses.last()).map(|(first, last)| (format!("{first:.2}"), format!("{last:.2}")));
    let (first, last) = ends.unwrap_or_default();
    format!(
        "{figures}\nLoss {first} `{curve}` {last}: {iters} steps in {seconds:.0} s ({rows} rows/s, {tokens} trained \
         tokens/s), peak memory {memory}, on {machine}.\n",
        curve = curve(&losses),
        iters = text(&training["iters"]),
        seconds = number("seconds"),
        rows = number("rows_per_second"),
        tokens = number("tokens_per_second"),
        memory = bytes(&training["peak_memory_bytes"]),
        machine = text(&report["machine"]),
    )
}

fn answers(report: &Value) -> String {
    let mut rows = vec![vec!["request".to_owned(), "model".into(), "answer".into()]];
    for (i, question) in report["questions"].as_array().into_iter().flatten().enumerate() {
        for model in MODELS {
            let question = if model == MODELS[0] { short(&text(question), ANSWER) } else { String::new() };
            rows.push(vec![question, model.to_owned(), short(&text(&report["answers"][model][i]), ANSWER)]);
        }
    }
    table(&rows)
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// One line of at most `most` characters.
fn short(text: &str, most: usize) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "/");
    if line.chars().count() <= most {
        return line;
    }
    format!("{}…", line.chars().take(most - 1).collect::<String>())
}

/// 98346240 -> `98.3 MB`.
pub(crate) fn bytes(value: &Value) -> String {
    let n = value.as_f64().unwrap_or_default();
    if n >= 1e9 { format!("{:.2} GB", n / 1e9) } else { format!("{:.1} MB", n / 1e6) }
}

/// A Markdown table whose columns line up.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |i: usize| rows.iter().map(|row| row[i].chars().count()).max().unwrap_or_default().max(3);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &[String]| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!(" {cell:<width$} |"));
        format!("|{}\n", cells.collect::<String>())
    };
    let rule: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
    let mut lines: Vec<String> = rows.iter().map(|row| line(row)).collect();
    lines.insert(1, line(&rule));
    lines.concat()
}

/// A character for each value, the least lowest.
fn curve(values: &[f64]) -> String {
    const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let (low, high) = values.iter().fold((f64::MAX, f64::MIN), |(l, h), v| (v.min(l), v.max(h)));
    let block = |v: &f64| BLOCKS[((v - low) / (high - low).max(f64::MIN_POSITIVE) * 7.0).round() as usize];
    values.iter().map(block).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_readme_holds_what_the_record_says() {
        let reports = load(&file()).unwrap();
        assert!(!reports.is_empty(), "docs/demo.json is missing: run `cargo xtask demo --record`");
        for name in READMES {
            let text = fs::read_to_string(sh::root().join(name)).unwrap();
            let expected = replaced(&text, MARKERS, &block(&reports)).expect("the markers of the record");
            assert!(text == expected, "{name} differs from docs/demo.json: run `cargo xtask demo --record`");
        }
    }

    #[test]
    fn a_report_is_a_table_a_curve_and_answers() {
        let report = json!({
            "model": "M", "fine_tune_type": "dora", "rows": 60, "machine": "2 cores",
            "scores": {"base": 0, "adapter": 55, "fused": 54},
            "bytes": {"base": 98346240, "adapter": 9800000, "fused": 1500000000},
            "training": {"iters": 120, "seconds": 74.2, "rows_per_second": 6.5, "tokens_per_second": 76.0,
                "peak_memory_bytes": 800000000, "losses": [3.0, 1.0, 0.1]},
            "questions": ["a|b"], "answers": {"base": ["x\ny"], "adapter": ["c"], "fused": ["c"]},
        });
        let text = render(&report);
        for part in [
            "| M, DoRA ",
            "| 55      |",
            "| 98.3 MB |",
            "| 1.50 GB |",
            "Loss 3.00 `█▃▁` 0.10: 120 steps in 74 s",
            "| a/b     | base    | x y ",
        ] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
    }

    #[test]
    fn only_what_is_between_the_markers_changes() {
        let text = format!("a\n{}\nold\n{}\nb\n", MARKERS[0], MARKERS[1]);
        let new = replaced(&text, MARKERS, "new\n").unwrap();
        assert_eq!(new, format!("a\n{}\n\nnew\n\n{}\nb\n", MARKERS[0], MARKERS[1]));
        assert_eq!(replaced(&new, MARKERS, "new\n"), Some(new));
        assert_eq!(replaced("nothing", MARKERS, "new"), None);
    }
}
