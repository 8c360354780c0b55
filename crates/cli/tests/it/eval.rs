//! `graft eval`: the planted truth is found, and neither the order of rows nor the batch size matters.

use serde_json::{Value, json};

use crate::setting::{Folder, row};

/// The report of a command, without what the clock decides.
fn report(folder: &Folder, flags: &str) -> Value {
    folder.ok(flags);
    let mut report = folder.json("eval.json");
    for model in report["models"].as_array_mut().unwrap() {
        model.as_object_mut().unwrap().remove("seconds");
    }
    report
}

/// A folder whose test.jsonl has 100 rows: the model's own answer is the reference of 60, the adapter's of 40.
fn planted() -> (Folder, Vec<Value>) {
    let folder = Folder::with_model();
    let questions: Vec<Value> =
        (0..100).map(|i| row(&format!("hello {i} the user {}", i * i), "x")).collect();
    folder.rows("data/test.jsonl", &questions);
    let flags = "eval --model model --adapter-path adapter --data data --max-tokens 12";
    let answers = report(&folder, flags);
    let (mut fixed, mut rows) = (0, Vec::new());
    for (question, example) in questions.iter().zip(answers["examples"].as_array().unwrap()) {
        let answer = |i: usize| example["results"][i]["answer"].as_str().unwrap().trim().to_owned();
        let of_adapter = answer(0) != answer(1) && fixed < 40;
        fixed += usize::from(of_adapter);
        let asked = question["messages"][0]["content"].as_str().unwrap();
        // What neither says is wrong for both; where both say the same, both are wrong.
        let reference = if of_adapter { answer(1) } else { "neither".to_owned() };
        rows.push(row(asked, &reference));
    }
    assert_eq!(fixed, 40, "the adapter changes too few answers");
    folder.rows("data/test.jsonl", &rows);
    (folder, rows)
}

#[test]
fn the_planted_truth_is_found_and_neither_order_nor_company_matters() {
    let (folder, mut rows) = planted();
    let flags = "eval --model model --adapter-path adapter --fused model --data data --max-tokens 12 --html eval.html";
    let found = report(&folder, flags);
    let adapter = &found["models"][1];
    let against = &adapter["against_base"];
    assert_eq!((&found["models"][0]["right"], &adapter["right"]), (&json!(0), &json!(40)));
    assert_eq!(
        (&against["fixed"], &against["broken"], &against["difference"]),
        (&json!(40), &json!(0), &json!(0.4))
    );
    let end = |i: usize| against["interval"][i].as_f64().unwrap();
    assert!(end(0) > 0.28 && end(0) < 0.4 && end(1) > 0.4 && end(1) < 0.52, "{against}");
    // The base beside itself is nothing new.
    let same = &found["models"][2]["against_base"];
    let nothing = json!({"difference": 0.0, "interval": null, "changed": 0, "fixed": 0, "broken": 0});
    assert_eq!(same, &nothing);
    let page = String::from_utf8(folder.read("eval.html")).unwrap();
    assert!(page.contains("@media print { details:not([open])"), "changed answers are not printed");
    assert!(page.contains("data-at=\"/models/1/score\">0.4000<") && !page.contains("http://"), "{page}");

    for size in [1, 7, 32] {
        assert_eq!(report(&folder, &format!("{flags} --batch-size {size}"))["examples"], found["examples"]);
    }
    rows.reverse();
    folder.rows("data/test.jsonl", &rows);
    let mut reversed = report(&folder, flags);
    assert_eq!(reversed["models"], found["models"]);
    // Sampled answers belong to their prompts, too.
    let sampled = format!("{flags} --temp 1 --seed 4 --batch-size 5");
    reversed = report(&folder, &sampled);
    rows.reverse();
    folder.rows("data/test.jsonl", &rows);
    let forward = report(&folder, &sampled);
    assert_eq!(reversed["models"], forward["models"]);
    assert_ne!(report(&folder, &sampled.replace("--seed 4", "--seed 5"))["examples"], forward["examples"]);
}

#[test]
fn a_loss_is_that_of_lora_test_and_each_metric_reads_its_rows() {
    let folder = Folder::with_model();
    let rows: Vec<Value> = (0..9).map(|i| row(&"hello ".repeat(i + 1), "the user")).collect();
    folder.rows("data/test.jsonl", &rows);
    let said =
        folder.ok("lora --model model --test --data data --adapter-path adapter --mask-prompt --exact").out;
    let flags = "eval --model model --adapter-path adapter --data data --metric loss --exact --json";
    let found: Value = serde_json::from_str(&folder.ok(flags).out).unwrap();
    assert_eq!(found, folder.json("eval.json"));
    let adapter = &found["models"][1];
    assert!(
        said.starts_with(&format!("Test loss {:.3},", adapter["score"].as_f64().unwrap())),
        "{said} {adapter}"
    );
    assert!(adapter["right"].is_null() && adapter["against_base"].get("changed").is_none());
    // Each row by its form; what has no target is counted, and what falsifies a loss is said once.
    let long = row(&"hello ".repeat(99), "the user");
    folder
        .rows("mixed.jsonl", &[json!({"text": "hello the user"}), row("a", "the user"), long, row("b", "")]);
    let run =
        folder.ok("eval --model model --fused model --data mixed.jsonl --metric loss --max-seq-length 80");
    let found = folder.json("eval.json");
    assert_eq!((&found["rows"], &found["skipped"]), (&json!(3), &json!(1)));
    assert!(found["models"][0]["cut"].is_null());
    assert!(run.out.contains("Skipped: 1 rows, of which no target is within --max-seq-length"), "{run:?}");
    let said: Vec<&str> = run.err.lines().filter(|line| line.starts_with("warning: ")).collect();
    assert!(said.len() == 2 && said[1].ends_with(')'), "{said:?}");
    assert!(
        said.iter().any(|line| line.contains("empty-answer")) && !run.err.contains("mask_prompt"),
        "{said:?}"
    );
    for (metric, reference) in
        [("contains", ""), ("regex", "."), ("json", "{\"a\": 1}"), ("regex --pattern (u)", "user")]
    {
        let reference = if metric == "contains" { "e" } else { reference };
        folder.rows("data/test.jsonl", &[row("hello", reference)]);
        folder.ok(&format!("eval --model model --data data --max-tokens 4 --metric {metric}"));
    }
}

#[test]
fn what_cannot_be_judged_is_named_by_file_and_line() {
    let folder = Folder::with_model();
    let flags = "eval --model model --data data/test.jsonl";
    folder.fails(2, &format!("{flags} --batch-size 33"), &["--batch-size must be from 1 to 32, not 33"]);
    folder.fails(2, &format!("{flags} --metric regex --pattern ("), &["--pattern is no regular expression"]);
    folder.fails(2, &format!("{flags} --pattern a"), &["--pattern belongs to --metric regex"]);
    folder.fails(2, &format!("{flags} --temp -1"), &["temperature"]);
    folder.fails(2, &format!("{flags} --max-tokens 0"), &["--max-tokens must be at least 1"]);
    folder.fails(2, &format!("{flags} --html gone/a.html"), &["--html gone/a.html", "directory that exists"]);
    folder.fails(
        2,
        &format!("{flags} --output a --html ./a"),
        &["--html ./a: another file is written there"],
    );
    // Run as root, it would take the device's place.
    folder.fails(2, &format!("{flags} --output /dev/null"), &["--output /dev/null", "no regular file"]);
    folder.fails(2, &format!("{flags} --output /proc/a"), &["--output /proc/a"]);
    folder.fails(1, &format!("{flags} --fused gone"), &["there is no model directory `gone`"]);
    folder.fails(
        1,
        &format!("{flags} --metric json"),
        &["data/test.jsonl:1: the answer \"the user\" is not JSON"],
    );
    folder.fails(1, "eval --model model --data adapter", &["adapter/test.jsonl: there is no such file"]);
    let gone = "gone.jsonl: there is no such file: give a .jsonl file or a directory with test.jsonl";
    folder.fails(1, "eval --model model --data gone.jsonl", &[gone]);
    folder.fails(
        2,
        &format!("{flags} --output data/test.jsonl"),
        &["--output data/test.jsonl: that is the data"],
    );
    folder.fails(2, &format!("{flags} --html ./data/test.jsonl"), &["that is the data"]);
    let call = json!({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "heat", "arguments": {}}}]});
    folder
        .rows("calls.jsonl", &[row("a", "b"), json!({"messages": [{"role": "user", "content": "a"}, call]})]);
    folder.fails(1, "eval --model model --data calls.jsonl", &["calls.jsonl:2: the answer calls a tool"]);
    folder.rows("data/test.jsonl", &[json!({"text": "hello"})]);
    folder.fails(1, flags, &["data/test.jsonl:1: ", "only its loss can be measured"]);
    folder.rows("data/test.jsonl", &[row(&"hello ".repeat(3000), "a")]);
    folder.fails(1, flags, &["data/test.jsonl:1: its prompt has", "the model takes", "drop the row"]);
    folder.write("data/test.jsonl", "\n");
    folder.fails(1, flags, &["data/test.jsonl: the file has no rows to measure"]);
}

#[test]
fn what_a_table_does_not_tell_is_said_below_it() {
    let folder = Folder::with_model();
    let asked = |i: i32| format!("hello {i} the\u{202e} user\u{200b}");
    folder.rows("data/test.jsonl", &(0..20).map(|i| row(&asked(i), "the\u{61c} user")).collect::<Vec<_>>());
    let flags = "eval --model model --adapter-path adapter --data data --max-tokens 12 --html eval.html";
    let run = folder.ok(flags);
    let report = folder.json("eval.json");
    let base = &report["models"][0];
    // All are wrong, which says little of other rows; and twelve tokens are no whole answer.
    assert!(base["interval"].is_null() && base["score"] == 0.0 && base["cut"].as_u64() > Some(0), "{report}");
    let notes = report["notes"].as_array().unwrap();
    assert!(notes.iter().any(|note| note.as_str().unwrap().contains("were cut, at --max-tokens 12")));
    assert!(notes.iter().any(|note| note.as_str().unwrap().starts_with("No interval: ")));
    let page = String::from_utf8(folder.read("eval.html")).unwrap();
    for note in notes {
        assert!(run.out.contains(note.as_str().unwrap()) && page.contains(note.as_str().unwrap()), "{note}");
    }
    let changed = report["examples"].as_array().unwrap().iter().any(|e| e["results"][0] != e["results"][1]);
    assert!(changed, "the adapter changes nothing");
    assert!(!run.out.contains(['\u{202e}', '\u{200b}', '\u{61c}']), "{run:?}");
    let right = report["examples"][1]["results"][0]["answer"].as_str().unwrap();
    folder.rows("data/test.jsonl", &[row(&asked(1), right), row("hello", "neither")]);
    folder.ok("eval --model model --data data --max-tokens 12");
    assert_eq!(folder.json("eval.json")["models"][0]["interval"], json!([0.0, 1.0]));
}

#[test]
fn what_is_finished_is_reported_though_a_later_model_fails() {
    let folder = Folder::with_model();
    folder.copy("model", "broken");
    // Seen only when it is its turn.
    std::fs::remove_file(folder.path("broken/tokenizer.json")).unwrap();
    for metric in ["exact --max-tokens 2", "loss"] {
        let flags = "eval --model model --adapter-path adapter --fused broken --data data --metric";
        let run = folder.run(&format!("{flags} {metric}"));
        assert!(
            run.status == Some(1) && run.err.contains("error: ") && run.out.contains("adapter"),
            "{run:?}"
        );
        let report = folder.json("eval.json");
        assert_eq!(report["models"].as_array().unwrap().len(), 2, "{report}");
        assert_eq!(report["examples"][7]["results"].as_array().unwrap().len(), 2);
        std::fs::remove_file(folder.path("eval.json")).unwrap();
    }
}
