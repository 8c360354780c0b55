//! What `cargo xtask bench` measured: the record in target/bench.json, the table that it makes, and docs/benchmarks.md,
//! whose record, docs/benchmarks.json, holds one such record for each set of instructions, since each has its own kernels.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::pipeline::Graft;
use crate::record::{bytes, replaced, table};
use crate::{scaling, sh};

/// Of the record's form.
const SCHEMA: u64 = 1;

const DOCUMENT: &str = "docs/benchmarks.md";
const MARKERS: [&str; 2] =
    ["<!-- figures: written by `cargo xtask bench --write` -->", "<!-- end of figures -->"];

/// The record, or an empty one where there is none.
pub(crate) fn load(file: &Path) -> Result<Value> {
    if !file.exists() {
        return Ok(json!({"schema": SCHEMA}));
    }
    let record: Value = serde_json::from_str(&fs::read_to_string(file)?)
        .with_context(|| format!("{} is not JSON", file.display()))?;
    let found = &record["schema"];
    ensure!(found == SCHEMA, "{}: expected schema {SCHEMA}, found {found}: remove it", file.display());
    Ok(record)
}

/// Where figures are measured.
pub(crate) fn machine(graft: &Graft) -> Result<Value> {
    let facts = graft.json(&["doctor", "--json"])?;
    let field = |file: &str, name: &str| {
        let text = fs::read_to_string(file).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.trim_start_matches([' ', '\t', ':', '=']).trim_matches('"').to_owned())
    };
    // A Mac has no such files, and a program that says it.
    let brand =
        || sh::output(std::process::Command::new("sysctl").args(["-n", "machdep.cpu.brand_string"])).ok();
    let processor = field("/proc/cpuinfo", "model name").or_else(brand);
    Ok(json!({
        "processor": processor.map(|name| name.trim().to_owned()),
        "cores": facts["cores"],
        "features": facts["cpu_features"],
        "threads": facts["threads"],
        "memory_bytes": facts["memory_bytes"],
        "system": field("/etc/os-release", "PRETTY_NAME").unwrap_or_else(|| std::env::consts::OS.to_owned()),
        "form": facts["form"],
    }))
}

/// Puts what was measured into the document and its record, in the place of what was measured with the same instructions.
pub(crate) fn write(file: &Path) -> Result<()> {
    let record = load(file)?;
    if record["jobs"].is_null() && record["scaling"].is_null() {
        bail!("{} holds no figures: run `cargo xtask bench` first", file.display());
    }
    let document = sh::root().join(DOCUMENT);
    let kept = document.with_extension("json");
    let mut records = load(&kept)?;
    // Part by part: a run of the jobs alone leaves the figures of longer rows where they are.
    let own = &mut records["machines"][instructions(&record)];
    for (part, value) in record.as_object().into_iter().flatten() {
        own[part] = value.clone();
    }
    let text = fs::read_to_string(&document).with_context(|| format!("cannot read {DOCUMENT}"))?;
    let text = replaced(&text, MARKERS, &render_all(&records))
        .with_context(|| format!("{DOCUMENT} needs the lines\n{}\n{}", MARKERS[0], MARKERS[1]))?;
    fs::write(&document, text).with_context(|| format!("cannot write {DOCUMENT}"))?;
    fs::write(&kept, serde_json::to_string_pretty(&records)? + "\n")?;
    eprintln!("written: {DOCUMENT}");
    Ok(())
}

/// The widest instructions of a record's machine that graft has kernels for.
fn instructions(record: &Value) -> &'static str {
    let has =
        |name: &str| record["machine"]["features"].as_array().is_some_and(|all| all.contains(&name.into()));
    if has("avx512f") {
        "AVX-512"
    } else if has("avx2") {
        "AVX2"
    } else {
        "portable"
    }
}

/// The records of all machines, each under the name of its instructions.
fn render_all(records: &Value) -> String {
    let machines = records["machines"].as_object().into_iter().flatten();
    machines.map(|(name, record)| format!("### {name}\n\n{}", render(record))).collect::<Vec<_>>().join("\n")
}

/// All of a record as Markdown that is readable as it is.
pub(crate) fn render(record: &Value) -> String {
    let machine = &record["machine"];
    let list = |value: &Value| {
        let items = value.as_array().into_iter().flatten().filter_map(Value::as_str);
        items.collect::<Vec<_>>().join(", ")
    };
    let mut text = format!(
        "{}, {} cores, {} threads ({}), {} of memory, {}.\n",
        machine["processor"].as_str().unwrap_or("unknown processor"),
        machine["cores"],
        machine["threads"],
        list(&machine["features"]),
        bytes(&machine["memory_bytes"]),
        machine["system"].as_str().unwrap_or_default(),
    );
    if let Some(jobs) = record["jobs"].as_array() {
        let versions = record["versions"].as_object().into_iter().flatten();
        let versions = versions.map(|(name, text)| format!("{name} {}", text.as_str().unwrap_or_default()));
        text += &format!(
            "{}. Training: {}. Rounds: {}.\n\n{}",
            versions.collect::<Vec<_>>().join("; "),
            record["rows"].as_str().unwrap_or_default(),
            record["rounds"],
            compared(jobs),
        );
        text += &first_tokens(jobs);
        for line in record["missing"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            text += &format!("\nNot measured: {}\n", line.lines().next().unwrap_or_default());
        }
    }
    if !record["scaling"].is_null() {
        text += &format!("\n{}", scaling::render(&record["scaling"]));
    }
    text
}

/// One line for each program of each job.
fn compared(jobs: &[Value]) -> String {
    let heads = ["job", "program", "tokens/s (least–most)", "peak memory", "graft is"];
    let mut rows = vec![heads.map(str::to_owned).to_vec()];
    for job in jobs {
        let programs: Vec<&Value> = job["programs"].as_array().into_iter().flatten().collect();
        let speeds = |program: &Value| samples(program, "tokens_per_second");
        for (i, program) in programs.iter().enumerate() {
            let own = speeds(program);
            let memory = median(&samples(program, "peak_memory_bytes"));
            rows.push(vec![
                if i == 0 { job["name"].as_str().unwrap_or_default().to_owned() } else { String::new() },
                program["name"].as_str().unwrap_or_default().to_owned(),
                spread(&own, median(&own), ""),
                if memory > 0.0 { bytes(&memory.into()) } else { "unknown".into() },
                if i == 0 { String::new() } else { ratio(&speeds(programs[0]), &own) },
            ]);
        }
    }
    table(&rows)
}

/// How long clients wait for the first token, where that was measured.
fn first_tokens(jobs: &[Value]) -> String {
    let heads = ["job", "program", "to the first token, ms (least–most)"];
    let mut rows = vec![heads.map(str::to_owned).to_vec()];
    for job in jobs {
        for program in job["programs"].as_array().into_iter().flatten() {
            let times = samples(program, "first_token_seconds").iter().map(|s| 1e3 * s).collect::<Vec<_>>();
            if !times.is_empty() {
                let name = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                rows.push(vec![
                    name(&job["name"]),
                    name(&program["name"]),
                    spread(&times, median(&times), ""),
                ]);
            }
        }
    }
    if rows.len() > 1 { format!("\n{}", table(&rows)) } else { String::new() }
}

fn samples(program: &Value, key: &str) -> Vec<f64> {
    program["samples"].as_array().into_iter().flatten().filter_map(|sample| sample[key].as_f64()).collect()
}

/// The middle value, or the mean of the two in the middle; 0 of nothing.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match (sorted.len(), sorted.len() / 2) {
        (0, _) => 0.0,
        (n, middle) if n % 2 == 1 => sorted[middle],
        (_, middle) => (sorted[middle - 1] + sorted[middle]) / 2.0,
    }
}

/// `1.52x (1.48–1.60)`: the ratio of the medians, and the least and the most of the ratios of a round.
fn ratio(ours: &[f64], theirs: &[f64]) -> String {
    let rounds: Vec<f64> = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect();
    spread(&rounds, median(ours) / median(theirs), "x")
}

/// A value, then the least and the most if there are several.
fn spread(values: &[f64], middle: f64, unit: &str) -> String {
    let digits = |x: f64| if x < 10.0 { format!("{x:.2}") } else { format!("{x:.0}") };
    let (least, most) = values.iter().fold((f64::MAX, f64::MIN), |(l, m), v| (l.min(*v), m.max(*v)));
    let range =
        if values.len() > 1 { format!(" ({}–{})", digits(least), digits(most)) } else { String::new() };
    format!("{}{unit}{range}", digits(middle))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_and_the_ends() {
        assert_eq!((median(&[]), median(&[3.0, 1.0, 2.0]), median(&[4.0, 1.0])), (0.0, 2.0, 2.5));
        assert_eq!(spread(&[90.0, 120.0], 100.0, ""), "100 (90–120)");
        assert_eq!(ratio(&[10.0, 30.0, 20.0], &[10.0, 10.0, 5.0]), "2.00x (1.00–4.00)");
        // A peer that ran once is compared with the median.
        assert_eq!(ratio(&[10.0, 30.0, 20.0], &[5.0]), "4.00x");
    }

    #[test]
    fn a_record_is_a_table() {
        let sample = |speed: f64, peak: u64| json!({"tokens_per_second": speed, "peak_memory_bytes": peak});
        let served = json!({"tokens_per_second": 9.0, "peak_memory_bytes": 1, "first_token_seconds": 0.025});
        let record = json!({
            "schema": 1, "rounds": 2, "rows": "48 rows of d", "versions": {"graft": "0.1.0", "PEFT": "0.2"},
            "machine": {"processor": "P", "cores": 2, "threads": 2, "features": ["avx2", "fma"],
                "memory_bytes": 8_000_000_000_u64, "system": "S"},
            "jobs": [{"name": "train", "programs": [
                {"name": "graft", "samples": [sample(400.0, 400_000_000), sample(380.0, 410_000_000)]},
                {"name": "PEFT", "samples": [sample(200.0, 0), sample(190.0, 0)]},
            ]}, {"name": "server", "programs": [{"name": "graft", "samples": [served]}]}],
            "missing": ["mlx-lm: no network\nmore"],
        });
        let text = render(&record);
        for part in [
            "P, 2 cores, 2 threads (avx2, fma), 8.00 GB of memory, S.",
            "graft 0.1.0; PEFT 0.2. Training: 48 rows of d. Rounds: 2.",
            "| train  | graft   | 390 (380–400)         | 405.0 MB    |                   |",
            "|        | PEFT    | 195 (190–200)         | unknown     | 2.00x (2.00–2.00) |",
            "| server | graft   | 25 ",
            "Not measured: mlx-lm: no network\n",
        ] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
    }

    #[test]
    fn instructions_name_a_record() {
        let record = |features: &[&str]| json!({"machine": {"features": features}});
        let names =
            [&["avx2", "avx512f"][..], &["avx2", "fma"], &["neon"]].map(|all| instructions(&record(all)));
        assert_eq!(names, ["AVX-512", "AVX2", "portable"]);
    }

    #[test]
    fn the_document_holds_what_the_record_says() {
        let document = sh::root().join(DOCUMENT);
        let text = fs::read_to_string(&document).unwrap();
        let records = load(&document.with_extension("json")).unwrap();
        let expected = replaced(&text, MARKERS, &render_all(&records)).expect("the markers");
        assert!(text == expected, "{DOCUMENT} differs from its record: run `cargo xtask bench --write`");
    }
}
