//! The house rules that a compiler does not know, as tests. A rule that stands here is one; the reasons stand in
//! ARCHITECTURE.md and CONTRIBUTING.md.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::sh;

/// The arrows of ARCHITECTURE.md: a crate and the crates of ours that it uses.
const USES: &[(&str, &[&str])] = &[
    ("ops", &[]),
    ("quant", &["ops"]),
    ("adapters", &["ops", "quant"]),
    ("model", &["adapters", "ops", "quant"]),
    ("merge", &["adapters", "ops", "quant"]),
    ("train", &["adapters", "model", "ops", "quant"]),
    ("serve", &["adapters", "model", "ops"]),
    ("cli", &["adapters", "merge", "model", "ops", "quant", "serve", "train"]),
    ("testkit", &[]),
    ("xtask", &[]),
];

/// Where the code may ask which system it is built for.
const SYSTEM_KNOWN_IN: [&str; 3] =
    ["crates/cli/src/host.rs", "crates/quant/src/writer.rs", "crates/ops/build.rs"];

/// A file holds one idea; these may be longer, each with its reason.
const LONGEST: usize = 600;
const LONGER: &[(&str, &str)] =
    &[("crates/model/tests/gguf.rs", "one file format, made byte by byte and lied about")];

/// Folders that hold no source.
const SKIPPED: [&str; 2] = ["target", ".git"];

fn read(path: impl AsRef<Path>) -> String {
    let path = sh::root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All files below a folder of the root with one of the extensions, by their path from the root.
fn files(below: &str, extensions: &[&str]) -> Vec<String> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if !path.is_dir() {
                found.push(path);
            } else if !SKIPPED.iter().any(|name| path.ends_with(name)) {
                walk(&path, found);
            }
        }
    }
    let root = sh::root();
    let mut found = Vec::new();
    walk(&root.join(below), &mut found);
    let has = |path: &PathBuf| path.extension().is_some_and(|own| extensions.iter().any(|e| own == *e));
    let relative = |path: PathBuf| path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
    let mut names: Vec<String> = found.into_iter().filter(has).map(relative).collect();
    names.sort();
    assert!(!names.is_empty(), "no {extensions:?} below {below}");
    names
}

/// Where a crate's sources are.
fn sources(name: &str) -> String {
    if name == "xtask" { "xtask/src".to_owned() } else { format!("crates/{name}/src") }
}

/// What of a file is compiled without tests: no blank line, no item under `#[cfg(test)]`. The sources are formatted,
/// so an item ends with the first line that is indented as it is and closes it. Comments count: they are read, too.
fn without_tests(text: &str) -> Vec<&str> {
    let mut kept = Vec::new();
    let mut lines = text.lines().filter(|line| !line.trim().is_empty());
    while let Some(line) = lines.next() {
        if line.trim() != "#[cfg(test)]" {
            kept.push(line);
            continue;
        }
        let indent = &line[..line.len() - line.trim_start().len()];
        let ends = |line: &str| line.strip_prefix(indent).is_some_and(|own| own == "}" || own == "};");
        for line in lines.by_ref() {
            let own = line.strip_prefix(indent).is_some_and(|own| !own.starts_with(' '));
            if ends(line) || own && (line.ends_with(';') || line.ends_with('}')) {
                break;
            }
        }
    }
    kept
}

/// The lines of a crate without its tests, by file.
fn lines_of(name: &str) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    let mut only_tests = Vec::new();
    for file in files(&sources(name), &["rs"]) {
        let text = read(&file);
        let pairs = text.lines().zip(text.lines().skip(1));
        for (_, module) in pairs.filter(|(line, _)| line.trim() == "#[cfg(test)]") {
            let module = module.trim().strip_prefix("mod ").and_then(|rest| rest.strip_suffix(';'));
            only_tests.extend(module.map(|module| format!("/{module}.rs")));
        }
        counts.insert(file, without_tests(&text).len());
    }
    counts.retain(|file, _| !only_tests.iter().any(|module| file.ends_with(module)));
    counts
}

/// `ops 4000, quant 2500, ...` of ARCHITECTURE.md.
fn budgets() -> Vec<(String, usize)> {
    let text = read("ARCHITECTURE.md");
    let (_, rest) = text.split_once("Lines without tests, at most: ").expect("the budgets");
    let list = rest.split_once('.').expect("a full stop").0;
    let entry = |entry: &str| {
        let (name, lines) = entry.split_once(' ').expect("a crate and its lines");
        (name.to_owned(), lines.parse().expect("a number"))
    };
    list.split(", ").map(entry).collect()
}

#[test]
fn test_code_is_told_from_the_rest() {
    let text = "//! a\n\nuse b;\n#[cfg(test)]\nuse c;\nfn d() {\n    e();\n}\n#[cfg(test)]\nmod tests {\n    #[test]\n    \
        fn f() {\n    }\n}\nimpl G {\n    #[cfg(test)]\n    fn h() {\n        i();\n    }\n    fn j() {}\n}\n";
    let kept = ["//! a", "use b;", "fn d() {", "    e();", "}", "impl G {", "    fn j() {}", "}"];
    assert_eq!(without_tests(text), kept);
}

#[test]
fn crates_keep_within_their_lines() {
    let mut report = Vec::new();
    let budgets = budgets();
    for (name, budget) in &budgets {
        let count: usize = lines_of(name).values().sum();
        if count > *budget {
            report.push(format!("{name}: {count} lines, its budget is {budget}"));
        }
    }
    let named: BTreeSet<&str> = budgets.iter().map(|(name, _)| name.as_str()).collect();
    let all: BTreeSet<&str> = USES.iter().map(|(name, _)| *name).filter(|name| *name != "testkit").collect();
    assert_eq!(named, all, "every crate but testkit has a budget");
    assert!(
        report.is_empty(),
        "{}\nshorten, or raise it in ARCHITECTURE.md with the reason",
        report.join("\n")
    );
}

#[test]
fn arrows_are_those_of_the_manifests_and_of_the_architecture() {
    let metadata = sh::metadata().unwrap();
    let mut found = BTreeMap::new();
    for package in metadata["packages"].as_array().unwrap() {
        if !package["source"].is_null() {
            continue;
        }
        let name = package["name"].as_str().unwrap();
        let own = |dependency: &str| dependency.strip_prefix("graft-").unwrap_or(dependency).to_owned();
        let mut uses = BTreeSet::new();
        for dependency in package["dependencies"].as_array().unwrap() {
            let other = dependency["name"].as_str().unwrap();
            assert!(
                other != "mlx-sys" || name == "graft-ops",
                "{name} depends on mlx-sys, which only ops may call"
            );
            // Development dependencies are free: what a test needs makes no arrow.
            if dependency["kind"].is_null() && other.starts_with("graft-") {
                uses.insert(own(other));
            }
        }
        found.insert(own(name), uses);
    }
    let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<String>>();
    let table: BTreeMap<String, BTreeSet<String>> =
        USES.iter().map(|(name, uses)| ((*name).to_owned(), set(uses))).collect();
    assert_eq!(found, table, "the manifests (left) and the table in tidy.rs");

    let mut drawn = BTreeMap::new();
    let architecture = read("ARCHITECTURE.md");
    for section in architecture.split("\n### ").skip(1) {
        let (name, rest) = section.split_once('\n').unwrap();
        let uses = rest.lines().find_map(|line| line.strip_prefix("*Uses:* "));
        let uses =
            uses.unwrap_or_else(|| panic!("ARCHITECTURE.md: {name} has no line that begins with *Uses:*"));
        let uses = uses.strip_suffix('.').unwrap_or(uses);
        let names: Vec<&str> = uses.split(", ").filter(|name| *name != "no crate of ours").collect();
        drawn.insert(name.to_owned(), set(&names));
    }
    assert_eq!(
        drawn, table,
        "the *Uses:* lines under the headings of ARCHITECTURE.md (left) and the table in tidy.rs"
    );
}

#[test]
fn every_crate_inherits_the_lints_and_the_version() {
    for file in files(".", &["toml"]).iter().filter(|file| file.ends_with("/Cargo.toml")) {
        let text = read(file);
        for line in ["[lints]\nworkspace = true", "version.workspace = true", "rust-version.workspace = true"]
        {
            assert!(text.contains(line), "{file} lacks `{line}`");
        }
    }
}

#[test]
fn every_file_says_why_it_exists_and_is_short() {
    for file in files(".", &["rs"]) {
        let text = read(&file);
        assert!(text.starts_with("//! "), "{file} does not open with `//!` and why it exists");
        let (lines, longer) = (text.lines().count(), LONGER.iter().any(|(name, _)| *name == file));
        assert!(lines <= LONGEST || longer, "{file} has {lines} lines, {LONGEST} are the most");
        assert!(lines > LONGEST || !longer, "{file} is short again: take it out of LONGER");
    }
}

#[test]
fn only_the_named_places_ask_for_the_system() {
    for file in files("crates", &["rs"]).iter().filter(|file| !SYSTEM_KNOWN_IN.contains(&file.as_str())) {
        for line in read(file).lines() {
            let asks = ["target_os", "target_family", "cfg(unix", "cfg(windows", "TARGET_OS"];
            let asks = asks.iter().any(|word| line.contains(word)) && !line.trim_start().starts_with("//");
            assert!(!asks, "{file}: `{}`: only {SYSTEM_KNOWN_IN:?} may", line.trim());
        }
    }
}

#[test]
fn unsafe_code_stands_in_ops_alone() {
    for file in files(".", &["rs"]).iter().filter(|file| !file.starts_with("crates/ops/")) {
        // The workspace denies it; what is looked for is somebody allowing it.
        assert!(
            *file == "xtask/src/tidy.rs" || !read(file).contains("unsafe_code"),
            "{file} allows unsafe code"
        );
    }
    assert!(read("Cargo.toml").contains("unsafe_code = \"deny\""));
}

#[test]
fn libraries_print_nothing_and_read_no_environment() {
    for (name, _) in USES.iter().filter(|(name, _)| !["cli", "testkit", "xtask"].contains(name)) {
        for file in files(&sources(name), &["rs"]) {
            for line in without_tests(&read(&file)) {
                let code = line.split("//").next().unwrap_or_default();
                for word in ["env::var", "env::args", "print!(", "println!(", "dbg!("] {
                    assert!(
                        !code.contains(word),
                        "{file}: `{}`: report through events, take values",
                        line.trim()
                    );
                }
            }
        }
    }
}

#[test]
fn golden_values_have_a_script() {
    let scripts: Vec<String> = files("crates", &["py"]).iter().map(read).collect();
    let tasks = read("xtask/src/reference.rs");
    // What lies beside the sources is written by hand.
    let made = files("crates", &["json", "safetensors", "gguf"]);
    for file in made.iter().filter(|file| file.contains("/tests/")) {
        let name = file.rsplit('/').next().unwrap();
        let made = tasks.contains(file.as_str()) || scripts.iter().any(|script| script.contains(name));
        assert!(made, "{file}: no script beside it and no task in xtask/src/reference.rs writes it");
    }
}

#[test]
fn documents_name_tasks_that_exist() {
    for file in files(".", &["md", "yml"]) {
        for rest in read(&file).split("cargo xtask ").skip(1) {
            let name: String = rest.chars().take_while(|c| c.is_ascii_lowercase() || *c == '-').collect();
            let known = name.is_empty() || crate::TASKS.iter().any(|task| task.0 == name);
            assert!(known, "{file}: there is no `cargo xtask {name}`");
        }
    }
}

/// ops' ffi counts evaluations, and can only count what passes through it: docs/proxies.md.
#[test]
fn arrays_are_evaluated_and_read_through_one_door() {
    let around =
        ["transforms::eval", "transforms::async_eval", ".eval()", ".async_eval()", ".try_item", ".item"];
    let reads = [".try_as_slice", ".to_vec_exact", ".to_vec_cast"];
    let others = USES.iter().filter(|(name, _)| !["ops", "testkit", "xtask"].contains(name));
    for file in others.flat_map(|(name, _)| files(&sources(name), &["rs"])) {
        let text = read(&file);
        for line in without_tests(&text) {
            let found = around.iter().chain(&reads).find(|call| match **call {
                ".item" => ["_exact::<", "_cast::<", "::<", "()"]
                    .iter()
                    .any(|end| line.contains(&format!(".item{end}"))),
                call => line.contains(call),
            });
            assert!(found.is_none(), "{file}: use graft_ops::ffi::{{eval, async_eval, read}}: {line}");
        }
    }
}

#[test]
fn the_ci_runs_what_a_contributor_runs() {
    let (own, hosted) = (read(".ci/run"), read(".github/workflows/ci.yml"));
    for task in ["cargo xtask lint", "cargo xtask test"] {
        assert!(own.contains(task) && hosted.contains(task), "{task}");
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        let mode = fs::metadata(sh::root().join(".ci/run")).unwrap().permissions().mode();
        assert!(mode & 0o111 != 0, ".ci/run is not executable");
    }
}

#[test]
fn documents_name_the_rust_that_is_needed() {
    let manifest = read("Cargo.toml");
    let version = manifest.split("rust-version = \"").nth(1).and_then(|rest| rest.split('"').next()).unwrap();
    for file in files(".", &["md", "yml"]) {
        for rest in read(&file).split("Rust 1.").skip(1) {
            let minor: String = rest.chars().take_while(char::is_ascii_digit).collect();
            assert_eq!(format!("1.{minor}"), version, "{file} names another Rust than Cargo.toml");
        }
    }
}

#[test]
fn no_file_knows_a_machine() {
    for file in files(
        ".",
        &["rs", "md", "toml", "py", "yml", "cpp", "h", "json", "jsonl", "txt", "log", "html", "mjs", "yaml"],
    ) {
        if file == "xtask/src/tidy.rs" || file == ".cargo/native.toml" {
            continue;
        }
        for place in ["/home/", "/root/", "/Users/"] {
            assert!(!read(&file).contains(place), "{file} holds a path below {place}");
        }
    }
}
