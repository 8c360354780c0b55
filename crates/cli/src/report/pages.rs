//! The pages of each kind of report.

use super::chart::{Chart, Series, bars, escape};
use super::{As, Doc, page, table};
use serde_json::Value;
use std::collections::BTreeMap;

/// Changed answers that a page shows; the JSON has all.
const SHOWN: usize = 100;

/// What compare's table has of each leg: its name, its place in the leg, how it is shown.
pub(crate) const COMPARED: &[(&str, &str, As)] = &[
    ("base", "/base", As::Plain),
    ("trained", "/fine_tune_type", As::Plain),
    ("learning rate", "/learning_rate", As::Rate),
    ("training loss at the end", "/train_loss", As::Decimal),
    ("validation loss", "/valid_loss", As::Decimal),
    ("score", "/score", As::Decimal),
    ("score of the base", "/base_score", As::Decimal),
    ("step, median", "/step_seconds/median", As::Milliseconds),
    ("step, 10th percentile", "/step_seconds/p10", As::Milliseconds),
    ("step, 90th percentile", "/step_seconds/p90", As::Milliseconds),
    ("peak memory", "/peak_memory_bytes", As::Bytes),
    ("base on the disk", "/base_bytes", As::Bytes),
    ("adapter on the disk", "/adapter_bytes", As::Bytes),
];

/// What compare's second table has of each leg beside another.
const DIFFERENCES: &[(&str, &str, As)] = &[
    ("time per step", "step_ratio", As::Times),
    ("peak memory", "peak_memory_ratio", As::Times),
    ("validation loss", "valid_loss", As::Signed),
    ("score", "score", As::Signed),
];

/// Paragraphs that stand out.
fn say<'a>(sentences: impl Iterator<Item = &'a str>) -> String {
    let all: String = sentences.map(|s| format!("<p>{}</p>", escape(s))).collect();
    format!("<div class=\"say\">{all}</div>")
}

fn head(title: &str, lead: &str) -> String {
    format!("<h1>{}</h1><p class=\"lead\">{lead}</p>", escape(title))
}

fn charts(charts: &[Chart]) -> String {
    let figures: String = charts.iter().map(Chart::figure).collect();
    format!("<div class=\"charts\">{figures}</div>")
}

/// `graft compare`.
pub(crate) fn compare(report: &Value) -> String {
    let doc = Doc(report);
    let legs = doc.list("/legs");
    let names: Vec<String> =
        legs.iter().map(|leg| leg["name"].as_str().unwrap_or_default().to_owned()).collect();
    let mut body = head(
        &format!("{} compared", names.join(", ")),
        &format!(
            "{} on {}, {} steps, {} seed(s) each.",
            doc.text("/settings/model"),
            doc.text("/settings/data"),
            doc.span("/settings/iters", As::Plain),
            doc.span("/seeds", As::Plain)
        ),
    );
    body += &say(doc.list("/sentences").iter().filter_map(Value::as_str));
    if doc.at("/complete") == &Value::Bool(false) {
        body += &format!("<p class=\"note\">{}</p>", missing(&doc));
    }
    if doc.at("/same_batches") != &Value::Bool(true) {
        body += "<p class=\"note\">The legs did not see the same batches in the same order.</p>";
    }

    let mut rows =
        vec![std::iter::once(String::new()).chain(names.iter().map(|n| escape(n))).collect::<Vec<_>>()];
    for (name, pointer, form) in COMPARED {
        let known = |index: usize| doc.at(&format!("/legs/{index}{pointer}"));
        if (0..legs.len()).all(|index| known(index).is_null()) {
            continue;
        }
        let mut row = vec![(*name).to_owned()];
        for index in 0..legs.len() {
            let at = format!("/legs/{index}{pointer}");
            row.push(doc.estimate(&at, &format!("{at}_interval"), *form));
        }
        rows.push(row);
    }
    body += &format!("<h2>What each took and reached</h2>{}", table(&rows));

    let paired: Vec<usize> = (0..legs.len()).filter(|i| legs[*i].get("against").is_some()).collect();
    let title =
        |i: &usize| format!("{} / {}", escape(&names[*i]), doc.text(&format!("/legs/{i}/against/leg")));
    let mut rows = vec![std::iter::once(String::new()).chain(paired.iter().map(title)).collect::<Vec<_>>()];
    for (name, key, form) in DIFFERENCES {
        let at = |i: &usize| format!("/legs/{i}/against/{key}");
        if paired.iter().any(|i| !doc.at(&at(i)).is_null()) {
            let cells = paired.iter().map(|i| doc.estimate(&at(i), &format!("{}_interval", at(i)), *form));
            rows.push(std::iter::once((*name).to_owned()).chain(cells).collect());
        }
    }
    if rows.len() > 1 {
        body += &format!(
            "<h2>Beside each other</h2>{}<p class=\"note\">Paired: step by step, seed by seed, row by row. In brackets \
             95&nbsp;% intervals: of time per step, over pairs of steps (from 6 on); of the validation loss, Student's over \
             seeds, which knows the chance of a seed but not of the rows; of the score, the bootstrap over rows, which \
             knows the chance of the rows but not of a seed. The legs ran one after another: a machine that was busier \
             during one of them shows in the time per step, and in no interval.</p>",
            table(&rows)
        );
    }

    let of = |key: &str, scale: f64| -> Vec<Series> {
        let numbers = |index: usize, part: &str| {
            doc.list(&format!("/legs/{index}/{key}/{part}"))
                .iter()
                .map(|v| v.as_f64().unwrap_or(f64::NAN))
                .collect::<Vec<_>>()
        };
        let series = |(index, name): (usize, &String)| Series {
            name: name.clone(),
            points: numbers(index, "iter")
                .into_iter()
                .zip(numbers(index, "value").into_iter().map(|v| v * scale))
                .collect(),
        };
        names.iter().enumerate().map(series).filter(|s| !s.points.is_empty()).collect()
    };
    let chart = |title: &str, series| Chart { title: title.into(), x: "step", series, log_x: false };
    let mut all = vec![
        chart("Training loss", of("curve", 1.0)),
        chart("Validation loss", of("valid_curve", 1.0)),
        chart("Time per step, ms", of("step_curve", 1e3)),
    ];
    let sweeps = names.iter().enumerate().map(|(index, name)| Series {
        name: name.clone(),
        points: doc
            .list(&format!("/legs/{index}/sweep"))
            .iter()
            .filter_map(|p| Some((p["learning_rate"].as_f64()?, p["loss"].as_f64().unwrap_or(f64::NAN))))
            .collect(),
    });
    let sweeps: Vec<Series> = sweeps.filter(|s| !s.points.is_empty()).collect();
    if !sweeps.is_empty() {
        let title = "Loss by learning rate (--find-lr)".into();
        all.push(Chart { title, x: "learning rate", series: sweeps, log_x: true });
    }
    body += &format!("<h2>Curves</h2>{}", charts(&all));

    body += "<h2>Bases</h2><ul>";
    for name in ["dense", "packed"] {
        if !doc.at(&format!("/bases/{name}")).is_null() {
            body += &format!("<li>{name}: {}</li>", doc.text(&format!("/bases/{name}/from")));
        }
    }
    body += "</ul>";
    body += &curve_table(&doc, &names);
    page(&format!("graft compare: {}", names.join(", ")), &body)
}

/// What an incomplete comparison lacks.
fn missing(doc: &Doc) -> String {
    let seeds = |list: &Value| {
        let all = list.as_array().into_iter().flatten().map(Value::to_string).collect::<Vec<_>>();
        if all.is_empty() { "none".to_owned() } else { all.join(", ") }
    };
    let leg = |leg: &Value| {
        let name = escape(leg["leg"].as_str().unwrap_or_default());
        format!("{name} (not trained: {}; not scored: {})", seeds(&leg["runs"]), seeds(&leg["scores"]))
    };
    let legs: Vec<String> = doc.list("/missing").iter().map(leg).collect();
    format!(
        "<b>Not complete.</b> By seed, what is missing: {}. What is shown is of the seeds that all of its legs have.",
        legs.join("; ")
    )
}

/// The training losses as numbers.
fn curve_table(doc: &Doc, names: &[String]) -> String {
    let mut rows =
        vec![std::iter::once("step".to_owned()).chain(names.iter().map(|n| escape(n))).collect::<Vec<_>>()];
    // A leg of your own may have fewer steps.
    let mut steps: BTreeMap<u64, BTreeMap<usize, usize>> = BTreeMap::new();
    for leg in 0..names.len() {
        for (place, step) in doc.list(&format!("/legs/{leg}/curve/iter")).iter().enumerate() {
            steps.entry(step.as_u64().unwrap_or_default()).or_default().insert(leg, place);
        }
    }
    for (step, places) in steps {
        let mut row = vec![step.to_string()];
        row.extend((0..names.len()).map(|leg| match places.get(&leg) {
            Some(place) => doc.span(&format!("/legs/{leg}/curve/value/{place}"), As::Decimal),
            None => As::Decimal.show(&Value::Null),
        }));
        rows.push(row);
    }
    format!("<details><summary>Training loss of every step</summary>{}</details>", table(&rows))
}

/// `graft eval`.
pub(crate) fn eval(report: &Value) -> String {
    let doc = Doc(report);
    let models = doc.list("/models");
    let answers = doc.at("/metric") != "loss";
    let metric = doc.text("/metric");
    let lead = format!("{} rows of {}, metric {metric}.", doc.span("/rows", As::Plain), doc.text("/data"));
    let mut body = head("What was learned", &lead);
    let name = |model: &Value| model["name"].as_str().unwrap_or_default().to_owned();
    let mut rows = vec![vec![String::new(), metric, "against base".into()]];
    if answers {
        rows[0].push("answers".into());
    }
    let mut items = Vec::new();
    for (index, model) in models.iter().enumerate() {
        let at = |key: &str| format!("/models/{index}/{key}");
        let mut row = vec![escape(&name(model)), doc.estimate(&at("score"), &at("interval"), As::Decimal)];
        if model.get("against_base").is_some() {
            row.push(doc.estimate(&at("against_base/difference"), &at("against_base/interval"), As::Signed));
            if answers {
                let count =
                    |key: &str| format!("{} {key}", doc.span(&at(&format!("against_base/{key}")), As::Plain));
                row.push(["changed", "fixed", "broken"].map(count).join("<br>"));
            }
        }
        rows.push(row);
        let ends = |i: usize| doc.at(&at("interval")).get(i).and_then(Value::as_f64);
        items.push((name(model), doc.number(&at("score")), ends(0).zip(ends(1)).map(|(a, b)| [a, b])));
    }
    body += &table(&rows);
    body += "<p class=\"note\">In brackets 95&nbsp;% intervals of the bootstrap over rows; those against the base are paired.</p>";
    for note in doc.list("/notes").iter().filter_map(Value::as_str) {
        body += &format!("<p class=\"note\">{}</p>", escape(note));
    }
    body += &format!(
        "<div class=\"charts\">{}</div>",
        if answers { bars("Score", &items, 1.0) } else { bars("Loss", &items, 0.0) }
    );
    if answers {
        body += &changed(&doc, models);
    }
    page("graft eval", &body)
}

/// The rows in which a model's answer is not the base's.
fn changed(doc: &Doc, models: &[Value]) -> String {
    let differs = |(_, example): &(usize, &Value)| {
        let results = example["results"].as_array().map_or(&[][..], Vec::as_slice);
        results.iter().any(|r| r["answer"] != results[0]["answer"])
    };
    let all: Vec<(usize, &Value)> = doc.list("/examples").iter().enumerate().filter(differs).collect();
    let mut out = format!("<h2>Changed answers: {}</h2>", all.len());
    if all.len() > SHOWN {
        out += &format!("<p class=\"note\">The first {SHOWN}; the report as JSON has all.</p>");
    }
    for (_, example) in all.into_iter().take(SHOWN) {
        let text = |value: &Value| escape(value.as_str().unwrap_or_default());
        let mut rows = format!(
            "<tr><td>asked</td><td class=\"text\">{}</td></tr><tr><td>expected</td><td class=\"text\">{}</td></tr>",
            text(&example["question"]),
            text(&example["reference"])
        );
        for (model, result) in models.iter().zip(example["results"].as_array().into_iter().flatten()) {
            let mark = if result["score"] == 1.0 { "✓" } else { "✗" };
            rows += &format!(
                "<tr><td>{mark} {}</td><td class=\"text\">{}</td></tr>",
                text(&model["name"]),
                text(&result["answer"])
            );
        }
        out += &format!(
            "<details open><summary>line {}</summary><table>{rows}</table></details>",
            example["line"]
        );
    }
    out
}

/// `graft fuse`.
pub(crate) fn fuse(report: &Value) -> String {
    let doc = Doc(report);
    let lead = format!(
        "{} of {} fused into {}, --policy {}.",
        doc.text("/fine_tune_type"),
        doc.text("/adapter"),
        doc.text("/base"),
        doc.text("/policy")
    );
    let mut body = head("What became of the update", &lead);
    let rows = [
        ("weights written anew", "/totals/changed", As::Plain),
        ("update kept", "/totals/kept", As::Percent),
        ("update kept, at the outputs", "/totals/effect_kept", As::Percent),
        ("update in steps of the base's grid", "/totals/delta_steps", As::Decimal),
        ("answers: effect kept", "/model/kept/value", As::Percent),
        ("answers: KL(adapter || fused)", "/model/fused/kl/value", As::Rate),
        ("answers: its 99th percentile", "/model/fused/kl_p99", As::Rate),
        ("answers: KL(adapter || base)", "/model/base/kl/value", As::Rate),
        ("answers: same best token", "/model/fused/agreement", As::Percent),
        ("perplexity of the base", "/model/perplexity/base", As::Decimal),
        ("perplexity with the adapter", "/model/perplexity/adapter", As::Decimal),
        ("perplexity of the fused model", "/model/perplexity/fused", As::Decimal),
        ("score of the adapter", "/model/scores/score/adapter", As::Decimal),
        ("score of the fused model", "/model/scores/score/fused", As::Decimal),
        ("base on the disk", "/totals/base_bytes", As::Bytes),
        ("fused model on the disk", "/totals/bytes", As::Bytes),
    ];
    let mut all = vec![vec![String::new(), "all weights".to_owned()]];
    let known = rows.into_iter().filter(|(_, pointer, _)| !doc.at(pointer).is_null());
    all.extend(known.map(|(name, pointer, form)| {
        let interval =
            pointer.strip_suffix("/value").map_or_else(|| "/none".into(), |at| format!("{at}/interval"));
        vec![name.to_owned(), doc.estimate(pointer, &interval, form)]
    }));
    body += &table(&all);
    let layers = doc.list("/layers");
    let of = |key: &str| -> Vec<(f64, f64)> {
        let value = |(i, layer): (usize, &Value)| (i as f64, layer[key].as_f64().unwrap_or(f64::NAN) * 100.0);
        layers.iter().enumerate().map(value).collect()
    };
    let chart = |title: &str, key: &str| Chart {
        title: title.into(),
        x: "weight, in the order of their paths",
        series: vec![Series { name: title.to_lowercase(), points: of(key) }],
        log_x: false,
    };
    body += &charts(&[chart("Update kept, %", "kept"), chart("Elements changed, %", "codes_changed")]);
    let mut rows = vec![
        ["weight", "from", "to", "update", "in steps", "kept", "cosine", "changed", "error"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for index in 0..layers.len() {
        let at = |key: &str| format!("/layers/{index}/{key}");
        let cells = [
            ("from", As::Plain),
            ("to", As::Plain),
            ("delta_norm", As::Decimal),
            ("delta_steps", As::Decimal),
            ("kept", As::Percent),
            ("cosine", As::Decimal),
            ("codes_changed", As::Percent),
            ("relative_error", As::Percent),
        ];
        let mut row = vec![doc.text(&at("path"))];
        row.extend(cells.map(|(key, form)| doc.span(&at(key), form)));
        rows.push(row);
    }
    body += &format!("<details><summary>Every weight</summary>{}</details>", table(&rows));
    page("graft fuse", &body)
}

/// `graft plot`; `rows` are texts.
pub(crate) fn runs(all: &[Chart], rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|cell| escape(cell)).collect()).collect();
    let body =
        format!("{}{}{}", head("Training runs", "From their metrics.jsonl."), table(&rows), charts(all));
    page("graft plot", &body)
}
