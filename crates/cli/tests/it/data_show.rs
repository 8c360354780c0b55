//! `graft data show`: what it marks is what the loss is made of, in every style, form and mask; and its other faces.

use std::rc::Rc;

use graft_adapters::LoraParameters;
use graft_model::Model;
use graft_testkit::{CHAT_STYLES, mlx};
use graft_train::{Batch, Example, Graph, Params, Split};
use serde_json::{Value, json};

use crate::setting::{Folder, row};

fn call(name: &str) -> Value {
    json!({"role": "assistant", "content": "", "tool_calls":
           [{"id": "123456789", "type": "function", "function": {"name": name, "arguments": {"x": 1}}}]})
}

/// A row of each form, and the answer that a mask leaves (but for what a template adds).
fn forms() -> Vec<(&'static str, Value, &'static str)> {
    let tools = json!([{"type": "function", "function": {"name": "heat", "parameters": {}}}]);
    let asked = json!({"role": "user", "content": "Hi?"});
    let chat = json!([{"role": "system", "content": "Sys."}, asked, {"role": "assistant", "content": "Yo."}, asked,
                      {"role": "assistant", "content": "It is."}]);
    vec![
        ("text", json!({"text": "the user"}), ""),
        ("completion", json!({"prompt": "Hi?", "completion": "It is."}), "It is."),
        ("chat", json!({"messages": chat}), "It is."),
        ("tools", json!({"messages": [asked, call("heat")], "tools": tools}), "heat"),
    ]
}

/// Which tokens count in the loss as training computes it: a row cut after a token has another loss than one cut before.
fn in_the_loss(model: &Rc<Model>, ids: &[u32], offset: usize) -> Vec<bool> {
    let lora = LoraParameters { rank: 2, scale: 2.0, dropout: 0.0, keys: None };
    let params = Params::low_rank(model, &lora, -1, false, 5).unwrap();
    let graph = Graph::new(Rc::clone(model), &params, false, 0.0, 1);
    let norms = params.norms(&params.values, model).unwrap();
    let loss = |length: usize| {
        let example = Example::whole(1, ids[..length].to_vec(), offset);
        let split = Split { examples: vec![example], ..Split::default() };
        let batch = Batch::new(&split, &[0], graft_ops::form());
        // A row without a target is never in a batch.
        if batch.count == 0 {
            return 0.0;
        }
        let (loss, _) = graph.loss_and_gradients(&params, &norms, &batch, 1).unwrap();
        loss.try_item_cast::<f32>().unwrap()
    };
    let mut before = 0.0;
    let mut counts = |length| {
        let now = loss(length);
        let grown = (now - before).abs() > 1e-3;
        before = now;
        grown
    };
    (1..=ids.len()).map(&mut counts).collect()
}

#[test]
fn marked_tokens_are_those_of_the_loss() {
    for style in &CHAT_STYLES {
        let folder = Folder::new();
        std::fs::rename(style.model().keep(), folder.path("model")).unwrap();
        for (form, value, answer) in forms() {
            folder.rows("data/train.jsonl", &[value]);
            for mask in ["", "--mask-prompt"] {
                if form == "text" && !mask.is_empty() {
                    continue;
                }
                let case = format!("{}, {form} {mask}", style.name);
                let run = folder.ok(&format!("data show --model model --data data --json {mask}"));
                let report: Value = serde_json::from_str(&run.out).unwrap();
                let tokens = report["rows"][0]["tokens"].as_array().unwrap();
                let ids: Vec<u32> = tokens.iter().map(|t| t["id"].as_u64().unwrap() as u32).collect();
                let marked: Vec<bool> = tokens.iter().map(|t| t["trained"].as_bool().unwrap()).collect();
                // The row and its mask as a run is given them, read by the library.
                let dir = folder.path("data");
                let example = {
                    let tokenizer = graft_model::Tokenizer::load(&folder.path("model")).unwrap();
                    let template = graft_model::ChatTemplate::load(&folder.path("model")).unwrap();
                    let (extra, eos) = (tokenizer.template_variables(), tokenizer.eos_id());
                    let template = Some(&template);
                    let encoder = graft_train::ModelEncoder { tokenizer: &tokenizer, template, extra, eos };
                    let config = graft_train::DataConfig::new(!mask.is_empty(), 2048);
                    let split = Split::load(&dir.join("train.jsonl"), &encoder, &config).unwrap();
                    split.examples[0].clone()
                };
                assert_eq!(ids, example.tokens, "{case}");
                let model = folder.path("model");
                let counted = mlx(|| {
                    let model = Rc::new(Model::load(&model, graft_ops::Dtype::Float32).unwrap());
                    in_the_loss(&model, &ids, example.offset)
                });
                assert_eq!(marked, counted, "{case}");
                assert!(!marked[0] && marked.contains(&true), "{case}");

                let text: String = tokens.iter().filter_map(|t| t["text"].as_str()).collect();
                let trained = tokens.iter().filter(|t| t["trained"] == true);
                let trained: String = trained.filter_map(|t| t["text"].as_str()).collect();
                if mask.is_empty() {
                    assert!(
                        text.ends_with(&trained) && marked.iter().filter(|m| !**m).count() == 1,
                        "{case}"
                    );
                } else {
                    // Templates without tools write an empty answer.
                    let expected = if style.tools || form != "tools" { answer } else { "" };
                    assert!(trained.contains(expected) && !trained.contains("Hi?"), "{case}: {trained}");
                    assert!(trained.trim_end().ends_with(style.eos), "{case}: {trained}");
                    let spoken = trained.replace("<think>\n\n</think>\n\n", "");
                    assert!(
                        form == "tools" || spoken.trim_start().starts_with(expected),
                        "{case}: {trained}"
                    );
                }
            }
        }
    }
}

#[test]
fn rows_are_shown_as_text_json_and_a_page() {
    let folder = Folder::with_model();
    let mut strange = row("a", "b");
    strange["messages"][0]["role"] = format!("\u{1b}[2J{}", "o".repeat(99)).into();
    folder.rows(
        "data/train.jsonl",
        &[row("hi <b>", "a\u{1b}[31m"), row("hi <b>", ""), row(&"x".repeat(90), "y"), strange],
    );
    let flags = "data show --model model --data data --mask-prompt --max-seq-length 80";
    let text = folder.ok(flags).out;
    for part in [
        "data/train.jsonl:1  ",
        "<|im_start|>user↵\nhi <b><|im_end|>↵\n<|im_start|>assistant↵\n⟦a\\u{1b}[31m<|im_end|>↵",
        "data/train.jsonl:3  80 tokens, 0 trained, cut from",
        "warning: data/train.jsonl: empty-answer: 1 of 4 rows have an answer without words (line 2): fill",
        "nothing-to-train: 2 of 4 rows",
        &format!("(\\u{{1b}}[2J{}; line 4)", "o".repeat(56)),
    ] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    assert!(!text.contains('\u{1b}'), "{text}");
    let one: Value = serde_json::from_str(&folder.ok(&format!("{flags} --row 3 --json")).out).unwrap();
    assert_eq!((one["rows"].as_array().unwrap().len(), &one["rows"][0]["line"]), (1, &json!(3)));
    assert_eq!((&one["schema"], &one["splits"][0]["rows"]), (&json!(1), &json!(4)));
    let run = folder.ok(&format!("{flags} --html page.html"));
    assert!(run.out.is_empty() && run.err.contains("written: page.html"), "{run:?}");
    let page = String::from_utf8(folder.read("page.html")).unwrap();
    assert!(!page.contains("hi <") && page.contains("&lt;|im_end|&gt;") && page.contains("empty-answer"));
    for outside in ["http:", "https:", "src=", "<script"] {
        assert!(!page.contains(outside), "{outside}");
    }
    let all: Value =
        serde_json::from_str(&folder.ok(&format!("{flags} --split valid --count -1 --json")).out).unwrap();
    assert_eq!(all["rows"].as_array().unwrap().len(), 8);
}

#[test]
fn a_run_says_before_its_first_step_what_data_show_says() {
    let folder = Folder::with_model();
    folder.rows("data/train.jsonl", &[row("a", "b"), row("a", "b"), row("c", ""), row("d", "<|im_end|>")]);
    folder.rows("data/valid.jsonl", &[row("a", "b"), row("e", "f")]);
    std::fs::remove_file(folder.path("data/test.jsonl")).unwrap();
    let said = |text: &str| -> Vec<String> {
        text.lines().filter(|line| line.starts_with("warning: ")).map(str::to_owned).collect()
    };
    for (run, shown) in [
        ("lora --train --num-layers 1", "data show"),
        ("train", "data show --as train"),
        // The whole command line of a run is taken.
        (
            "lora --train --num-layers 1 --mask-prompt --val-batches -1",
            "data show --train --mask-prompt --val-batches -1 --iters 1",
        ),
    ] {
        let run = folder
            .ok(&format!("{run} --model model --data data --batch-size 2 --iters 1 --adapter-path new"));
        let shown = folder.ok(&format!("{shown} --model model --data data --batch-size 2"));
        let (before, _) = run.err.split_once("Starting training").unwrap();
        assert_eq!(said(before), said(&shown.out), "{run:?}");
        let names = ["duplicate", "empty-answer", "special-token-in-content", "in-two-splits"];
        for name in names {
            assert!(shown.out.contains(&format!(": {name}: ")), "{name}: {}", shown.out);
        }
    }
    folder.rows("data/test.jsonl", &[row("a", ""), row("b", "c")]);
    let run = folder.ok("lora --model model --test --data data --adapter-path adapter");
    assert!(run.err.contains("warning: data/test.jsonl: empty-answer"), "{run:?}");
}

#[test]
fn keys_and_data_sets_of_a_settings_file_count() {
    let folder = Folder::with_model();
    let clean: Vec<Value> = (0..8).map(|i| json!({"q": format!("ask {i}"), "a": "the user"})).collect();
    folder.rows("set/train.jsonl", &clean);
    folder.write(
        "run.yaml",
        "model: model\nmask_prompt: true\nbatch_size: 1\n\
         hf_dataset: {path: set, prompt_feature: q, completion_feature: a, train_split: 'train[:4]', valid_split: 'train[4:]'}\n",
    );
    let out = folder.ok("data show -c run.yaml --count 1").out;
    assert!(out.contains("⟦the user<|im_end|>↵⟧") && out.contains("train     4"), "{out}");
    assert!(out.ends_with("No warnings.\n"), "{out}");
    // Two data sets with the same row at the same line.
    let set = "{path: set, prompt_feature: q, completion_feature: a, train_split: 'train[:4]', valid_split: 'train[4:4]'}";
    folder.write(
        "run.yaml",
        &format!("model: model\nmask_prompt: true\nbatch_size: 1\nhf_dataset: [{set}, {set}]\n"),
    );
    let out = folder.ok("data show -c run.yaml --count 1").out;
    assert!(out.contains("duplicate: 4 of 8 rows"), "{out}");
}

#[test]
fn a_row_with_several_forms_has_the_one_that_it_is_trained_in() {
    let folder = Folder::with_model();
    for (both, is_masked) in [
        (json!({"text": "the user", "prompt": "ask"}), false),
        (json!({"text": "the user", "prompt": "ask", "completion": "So."}), true),
    ] {
        folder.rows("data/train.jsonl", &[both]);
        folder.rows("data/valid.jsonl", &[]);
        folder.rows("data/test.jsonl", &[]);
        let out = folder.ok("data show --as train --model model --data data").out;
        assert_eq!(out.contains("assistant↵\n⟦So."), is_masked, "{out}");
        assert_eq!(out.contains("im_start"), is_masked, "{out}");
    }
}

#[test]
fn the_recipes_mask_is_for_rows_with_a_prompt_wherever_they_stand() {
    let folder = Folder::with_model();
    let (chat, text) = (row("Hi?", "the user"), json!({"text": "hello the user"}));
    for rows in [[chat.clone(), text.clone()], [text, chat]] {
        folder.rows("data/train.jsonl", &rows);
        let show = "data show --model model --data data --json";
        let report: Value = serde_json::from_str(&folder.ok(&format!("{show} --as train")).out).unwrap();
        for (row, shown) in rows.iter().zip(report["rows"].as_array().unwrap()) {
            let tokens = shown["tokens"].as_array().unwrap();
            let first = tokens.iter().position(|token| token["trained"] == true).unwrap();
            assert_eq!(first > 1, row.get("text").is_none(), "{shown}");
        }
        assert!(report["warnings"].to_string().contains("mixed-forms"));
        let train =
            "train --model model --data data --batch-size 2 --iters 1 --val-batches 0 --adapter-path new";
        folder.ok(train);
        // One that was asked for is another thing.
        folder.fails(1, &format!("{show} --as train --mask-prompt"), &["a text row has no prompt to mask"]);
    }
}

#[test]
fn what_cannot_be_shown_is_named() {
    let folder = Folder::with_model();
    let show = "data show --model model --data data";
    folder.fails(
        2,
        &format!("{show} --row 0"),
        &["--row 0: data/train.jsonl has no row at that line", "1 to 8"],
    );
    folder.fails(2, &format!("{show} --count -2"), &["--count must be at least 0, or -1 for all, not -2"]);
    folder.fails(1, "data show --model gone --data data", &["there is no model directory `gone`"]);
    folder.fails(1, "data show --model model --data gone", &["there is no data directory `gone`"]);
    folder.fails(
        2,
        &format!("{show} --html gone/page.html"),
        &["--html gone/page.html", "directory that exists"],
    );
    // A page in the place of the rows would be the end of them.
    std::os::unix::fs::symlink(folder.path("data"), folder.path("again")).unwrap();
    for file in ["data/train.jsonl", "./data/../data/valid.jsonl", "again/test.jsonl"] {
        folder.fails(2, &format!("{show} --html {file}"), &[&format!("--html {file}: that is the data")]);
        assert_eq!(folder.read(file).iter().filter(|byte| **byte == b'\n').count(), 8);
    }
    folder.write("data/train.jsonl", "{\"text\": 5}\n");
    folder.fails(1, show, &["data/train.jsonl:1: \"text\": expected a string, found a number"]);
    folder.write("data/train.jsonl", "{\"text\": \"a\"}\n");
    folder.fails(1, &format!("{show} --mask-prompt"), &["a text row has no prompt to mask"]);
    std::fs::remove_file(folder.path("data/test.jsonl")).unwrap();
    folder.fails(1, &format!("{show} --split test"), &["data/test.jsonl: there is no such file"]);
    assert_eq!(folder.run("data").status, Some(2));
}
