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
    let nothing = json!({"difference": 0.0, "interval": [0.0, 0.0], "changed": 0, "fixed": 0, "broken": 0});
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
    folder.write("texts.jsonl", "{\"text\": \"hello the user\"}\n");
    folder.ok("eval --model model --data texts.jsonl --metric loss");
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
    folder.rows("data/test.jsonl", &[json!({"text": "hello"})]);
    folder.fails(1, flags, &["data/test.jsonl:1: ", "only its loss can be measured"]);
    folder.rows("data/test.jsonl", &[row(&"hello ".repeat(3000), "a")]);
    folder.fails(1, flags, &["data/test.jsonl:1: its prompt has", "the model takes"]);
    folder.write("data/test.jsonl", "\n");
    folder.fails(1, flags, &["data/test.jsonl: the file has no rows to measure"]);
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
