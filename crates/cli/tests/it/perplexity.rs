//! `graft perplexity` on local text.

use serde_json::Value;

use crate::setting::Folder;

#[test]
fn base_and_adapter_differ_and_the_json_says_what_the_lines_do() {
    let folder = Folder::with_model();
    let flags = "perplexity --model model --data-path data --sequence-length 48 --batch-size 2";
    let base = folder.ok(flags).out;
    let json: Value = serde_json::from_str(&folder.ok(&format!("{flags} --json")).out).unwrap();
    let said = format!("Perplexity: {:.3} ± ", json["perplexity"].as_f64().unwrap());
    assert!(base.contains(&said), "{base}, {json}");
    assert_eq!(json["tokens"].as_u64().unwrap(), 47 * json["windows"].as_u64().unwrap());
    // A single file, and an adapter.
    let with = folder.ok(&flags.replace("data --seq", "data/test.jsonl --adapter-path adapter --seq")).out;
    assert!(with.contains("Adapter: adapter") && !with.contains(&said), "{with}");
}

#[test]
fn text_that_is_too_little_or_wrong_is_named() {
    let folder = Folder::with_model();
    let flags = "perplexity --model model --data-path";
    folder.fails(
        1,
        &format!("{flags} data"),
        &["data/test.jsonl: its 8 rows are shorter than one window of 512"],
    );
    folder.fails(1, &format!("{flags} gone"), &["there is no data directory `gone`"]);
    folder.fails(1, &format!("{flags} model"), &["model holds none of test.jsonl, valid.jsonl, train.jsonl"]);
    folder.fails(2, "perplexity --model model", &["--data-path is required", "parquet", "FILE.jsonl"]);
    folder.fails(2, &format!("{flags} data --sequence-length 1"), &["--sequence-length must be at least 2"]);
    folder.write("data/test.jsonl", "{\"text\": 1}\n");
    folder.fails(1, &format!("{flags} data"), &["data/test.jsonl:1: \"text\": expected a string"]);
}
