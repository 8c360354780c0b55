//! Rows to tokens, batches and their order.

use std::path::Path;

use graft_ops::Form;
use graft_train::{
    Batch, Data, DataConfig, Encoder, Example, Fault, Marks, Metric, Question, Rng, Row, Split, Walk,
    fixed_groups, groups,
};
use serde_json::Value;

use crate::support::{arrays, split};

/// Bytes as tokens, and a template that can be read.
struct Bytes;

impl Encoder for Bytes {
    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, String> {
        let start = special.then_some(256);
        Ok(start.into_iter().chain(text.bytes().map(u32::from)).collect())
    }

    fn render(&self, messages: &[Value], tools: Option<&Value>, prompt: bool) -> Result<String, String> {
        let mut text = tools.map(|t| format!("[{}]", t.as_array().map_or(0, Vec::len))).unwrap_or_default();
        for message in messages {
            let content = message["content"].as_str().ok_or("a message without content")?;
            text += &format!("<{}>{content}.", message["role"].as_str().unwrap_or_default());
        }
        if prompt {
            text += "<assistant>";
        }
        Ok(text)
    }

    fn eos(&self) -> Option<u32> {
        Some(257)
    }

    fn marks(&self) -> Marks {
        Marks { bos: Some(256), ends: [257].into(), ..Marks::default() }
    }
}

fn settings(mask_prompt: bool, max_seq_length: usize) -> DataConfig {
    DataConfig::new(mask_prompt, max_seq_length)
}

fn load(train: &str, config: &DataConfig) -> Result<Split, String> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("train.jsonl"), train).unwrap();
    let loaded = Data::load(dir.path(), &Bytes, config).map(|d| {
        assert!(
            !d.valid.found
                && d.valid.require().unwrap_err().to_string().contains("valid.jsonl: there is no such file")
        );
        d.train
    });
    loaded.map_err(|e| e.to_string())
}

fn text(split: &Split, row: usize) -> String {
    split.examples[row].tokens.iter().map(|t| char::from_u32(*t).unwrap()).collect()
}

#[test]
fn all_forms_become_the_tokens_that_mlx_lm_makes() {
    let rows = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]}

{"messages": [{"role": "user", "content": "a"}], "tools": [1, 2]}
{"prompt": "p", "completion": "q", "tools": null}
"#;
    let plain = load(rows, &settings(false, 100)).unwrap();
    assert_eq!(text(&plain, 0), "<user>a.<assistant>bc.");
    assert_eq!(text(&plain, 1), "[2]<user>a.");
    assert_eq!(text(&plain, 2), "<user>p.<assistant>q.");
    assert_eq!(
        plain.examples.iter().map(|e| (e.line, e.offset)).collect::<Vec<_>>(),
        [(1, 0), (3, 0), (4, 0)]
    );

    // The prompt is what comes before the last message, with the answer's opening if an assistant gives it.
    let masked = load(rows, &settings(true, 100)).unwrap();
    assert_eq!(masked.examples[0].offset, "<user>a.<assistant>".len());
    assert_eq!(masked.examples[0].targets(), "bc.".len());
    assert_eq!(masked.examples[1].offset, "[2]".len());

    let texts = load("{\"text\": \"hi\"}\n", &settings(false, 100)).unwrap();
    assert_eq!(texts.examples[0].tokens, [256, 104, 105, 257]);
    let renamed =
        DataConfig { text_feature: "body".into(), prompt_feature: "q".into(), ..settings(false, 100) };
    assert_eq!(load("{\"body\": \"hi\"}", &renamed).unwrap().examples[0].tokens.len(), 4);
    assert_eq!(
        text(&load("{\"q\": \"1\", \"completion\": \"2\"}", &renamed).unwrap(), 0),
        "<user>1.<assistant>2."
    );
}

#[test]
fn errors_name_file_line_keys_and_forms() {
    let fails = |rows: &str, mask: bool| load(rows, &settings(mask, 100)).unwrap_err();
    let e = fails("{\"text\": \"a\"}\n\n{\"instruction\": 1, \"output\": 2}\n", false);
    assert!(e.contains("train.jsonl:3: found the keys \"instruction\", \"output\"; expected \"prompt\" and \"completion\""), "{e}");
    assert!(e.contains("\"messages\"") && e.contains("\"text\"") && e.contains("chat_feature"), "{e}");
    // The line is the file's, the column that of the line.
    let e = fails("{\"text\": \"a\"}\n{\"text\"", false);
    assert!(
        e.contains("train.jsonl:2: not valid JSON: EOF while parsing") && e.ends_with("at column 7"),
        "{e}"
    );
    for list in ["[1]", "[\n  {\"text\": \"a\"}\n]"] {
        let e = fails(list, false);
        assert!(e.contains("train.jsonl:1: ") && e.contains("one JSON list: write one object a line"), "{e}");
    }
    assert!(fails("{\"text\": \"a\"}\n3", false).contains("train.jsonl:2: expected a JSON object"));
    assert!(fails("{\"text\": 3}", false).contains("\"text\": expected a string, found a number"));
    assert!(fails("{\"messages\": []}", false).contains("empty"));
    assert!(fails("{\"messages\": [{\"content\": \"x\"}]}", false).contains("\"messages\"[0]"));
    assert!(fails("{\"messages\": [{\"role\": \"user\"}]}", false).contains("a message without content"));
    for (content, found) in [
        ("", "found nothing: write \"\""),
        (", \"content\": null", "found null: write \"\""),
        (", \"content\": 4", "found a number: write the content as one string"),
        (", \"content\": [{}]", "found a list: write the content as one string"),
    ] {
        let row = format!("{{\"messages\": [{{\"role\": \"user\"{content}}}]}}");
        let expected =
            format!("\"messages\"[0]: \"content\": expected a string, {found} (a message without content)");
        let e = fails(&row, false);
        assert!(e.ends_with(&expected), "{e}");
    }
    let unparsed = fails("{\"messages\": [{\"role\": \"user\"}], \"tools\": \"[]\"}", false);
    assert!(unparsed.contains("\"tools\": expected a list, found a string: parse it"), "{unparsed}");
    assert!(fails("{\"text\": \"a\"}", true).contains("no prompt to mask"));
    assert!(fails("{\"messages\": [{}]}", false).contains("found an object without them"));
    assert!(fails("{\"text\": {}}", false).ends_with("expected a string, found an object"));
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("train.jsonl");
    std::fs::write(&file, b"{\"text\": \"a\"}\n{\"text\": \"caf\xe9\"}\n").unwrap();
    let e = Data::load(dir.path(), &Bytes, &settings(false, 9)).unwrap_err().to_string();
    assert!(e.contains("train.jsonl:2: not UTF-8"), "{e}");
    std::fs::write(&file, "\u{feff}{\"text\": \"a\"}").unwrap();
    assert_eq!(Data::load(dir.path(), &Bytes, &settings(false, 9)).unwrap().train.examples.len(), 1);
    let missing =
        Data::load(Path::new("/nonexistent/data"), &Bytes, &settings(false, 9)).unwrap_err().to_string();
    assert!(missing.contains("/nonexistent/data"));
    let empty = load("\n\n", &settings(false, 100)).unwrap();
    assert!(empty.require().unwrap_err().to_string().contains("train.jsonl: the file has no rows"));
}

#[test]
fn a_call_without_content_has_an_empty_one() {
    let row = |content: &str| {
        let call = format!("{{\"role\": \"assistant\"{content}, \"tool_calls\": [{{}}]}}");
        format!("{{\"messages\": [{{\"role\": \"user\", \"content\": \"q\"}}, {call}]}}")
    };
    for content in ["", ", \"content\": null", ", \"content\": \"\""] {
        let split = load(&row(content), &settings(true, 99)).unwrap();
        assert_eq!((text(&split, 0).as_str(), split.examples[0].offset), ("<user>q.<assistant>.", 19));
    }
}

#[test]
fn a_mask_that_is_only_a_default_masks_the_rows_that_have_a_prompt() {
    let (chat, plain) = ("{\"prompt\": \"q\", \"completion\": \"a\"}", "{\"text\": \"a text\"}");
    let config = DataConfig { whole_texts: true, ..settings(true, 99) };
    for (rows, offsets) in [([chat, plain], [19, 0]), ([plain, chat], [0, 19])] {
        let split = load(&rows.join("\n"), &config).unwrap();
        assert_eq!(split.examples.iter().map(|e| e.offset).collect::<Vec<_>>(), offsets);
        let error = load(&rows.join("\n"), &settings(true, 99)).unwrap_err();
        assert!(error.contains("no prompt to mask"), "{error}");
    }
}

#[test]
fn long_rows_are_cut_and_rows_without_targets_skipped() {
    let rows =
        "{\"prompt\": \"pppppppppppp\", \"completion\": \"q\"}\n{\"prompt\": \"p\", \"completion\": \"q\"}\n";
    // 32 and 21 tokens; the long prompt ends at 30.
    let cut = load(rows, &settings(true, 31)).unwrap();
    assert_eq!((cut.examples[0].tokens.len(), cut.examples[0].targets()), (31, 1));
    assert_eq!(cut.examples.iter().map(Example::is_cut).collect::<Vec<_>>(), [true, false]);
    let skipped = load(rows, &settings(true, 30)).unwrap();
    assert_eq!((skipped.skipped[0].line, skipped.examples.len(), skipped.rows()), (1, 1, 2));
    let said = |fault: Fault| &skipped.warnings.iter().find(|w| w.fault == fault).unwrap().text;
    assert!(
        said(Fault::Truncated).contains(
            "train.jsonl: truncated: 1 of 2 rows are longer than max_seq_length and lose their end (30 tokens are kept, \
             the longest has 32; line 1): raise"
        ),
        "{skipped:?}"
    );
    assert!(said(Fault::NothingToTrain).contains("1 of 2 rows have no token to train on"), "{skipped:?}");
    let none = load(rows, &settings(true, 10)).unwrap();
    assert!(none.require().unwrap_err().to_string().contains("all 2 rows were skipped"));
}

#[test]
fn batches_are_of_neighbours_in_length_and_cover_every_row() {
    let lengths = [9, 3, 30, 4, 8, 31, 5];
    let split = split(&lengths, 0, 1);
    assert_eq!(groups(&split, 2), [vec![1, 3], vec![6, 4], vec![0, 2], vec![5]]);
    let mut walk = Walk::new(&split, 2, 42).unwrap();
    let mut passes = Vec::new();
    for pass in 0..4 {
        let mut seen: Vec<Vec<usize>> = (0..walk.batches()).map(|_| walk.next_group().to_vec()).collect();
        assert_eq!(walk.position().pass, pass);
        passes.push(seen.clone());
        seen.sort();
        assert_eq!(seen, [vec![0, 2], vec![1, 3], vec![5], vec![6, 4]]);
    }
    assert!(passes.iter().any(|p| *p != passes[0]), "passes are permuted anew");

    // A walk goes on from any position as it would have gone.
    let mut walk = Walk::new(&split, 2, 42).unwrap();
    for _ in 0..6 {
        walk.next_group();
    }
    let mut again = Walk::new(&split, 2, 0).unwrap().resume(walk.position().clone());
    for _ in 0..9 {
        assert_eq!(walk.next_group(), again.next_group());
    }
    assert_eq!(fixed_groups(&split, 2, 3, 5), fixed_groups(&split, 2, 3, 5));
    assert_eq!((fixed_groups(&split, 2, -1, 5).len(), fixed_groups(&split, 2, 0, 5).len()), (4, 0));
    let e = Walk::new(&split, 8, 0).unwrap_err().to_string();
    assert!(e.contains("train.jsonl: 7 usable rows, but batch_size is 8"), "{e}");
}

#[test]
fn padding_is_never_a_target() {
    arrays(|| {
        let split = split(&[5, 33], 2, 1);
        for form in [Form::Cpu, Form::Mlx] {
            let batch = Batch::new(&split, &[0, 1], form);
            let tokens = crate::support::values(&batch.tokens);
            let targets = crate::support::values(&batch.targets);
            let positions = crate::support::values(batch.positions.as_ref().unwrap());
            assert_eq!(batch.count, 3 + 31);
            // What stands at a target's position is the token before it.
            let (mut k, mut start) = (0, 0);
            for (example, length) in split.examples.iter().zip(&batch.rows.lengths) {
                for s in 2..example.tokens.len() {
                    assert_eq!(targets[k], example.tokens[s] as f32);
                    assert_eq!(tokens[positions[k] as usize], example.tokens[s - 1] as f32);
                    assert_eq!(positions[k] as i32, start + s as i32 - 1);
                    k += 1;
                }
                start += length;
            }
            assert_eq!(tokens.len(), if form == Form::Cpu { 4 + 32 } else { 64 });
        }
    });
}

#[test]
fn the_generator_is_the_documented_one() {
    // xoshiro256++ from the state 1, 2, 3, 4: the first outputs of the published reference code.
    let mut rng = Rng { state: [1, 2, 3, 4] };
    let first: Vec<u64> = (0..3).map(|_| rng.next_u64()).collect();
    assert_eq!(first, [41_943_041, 58_720_359, 3_588_806_011_781_223]);
    let mut order = Rng::new(3).permutation(50);
    assert_ne!(order, (0..50).collect::<Vec<_>>());
    order.sort_unstable();
    assert_eq!(order, (0..50).collect::<Vec<_>>());
}

#[test]
fn a_question_is_a_row_without_its_last_answer() {
    let questions = |line: &str| {
        let Ok(Value::Object(value)) = serde_json::from_str(line) else { panic!("{line}") };
        let found = Question::from_rows(
            Path::new("test.jsonl"),
            &[Row { line: 4, value }],
            &Bytes,
            &settings(false, 9),
        );
        found.map(|mut all| all.remove(0)).map_err(|e| e.to_string())
    };
    for (row, prompt, asked, answer) in [
        (r#"{"prompt": "p", "completion": "q", "text": "t"}"#, "<user>p.<assistant>", "p", "q"),
        (
            r#"{"tools": [1], "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"},
                {"role": "assistant", "content": "a"}, {"role": "user", "content": "v"},
                {"role": "assistant", "content": "b"}]}"#,
            "[1]<system>s.<user>u.<assistant>a.<user>v.<assistant>",
            "v",
            "b",
        ),
    ] {
        let found = questions(row).unwrap();
        let text: String = found.prompt.iter().map(|t| char::from_u32(*t).unwrap()).collect();
        assert_eq!((text.as_str(), found.asked.as_str(), found.answer.as_str()), (prompt, asked, answer));
    }
    for (row, why) in [
        (r#"{"text": "t"}"#, "only its loss can be measured"),
        (r#"{"messages": [{"role": "user", "content": "u"}]}"#, "must be the assistant's"),
        (r#"{"messages": [{"role": "assistant", "content": "a"}]}"#, "no message before the answer"),
        (
            r#"{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": null}]}"#,
            "no text as \"content\"",
        ),
        (r#"{"prompt": "p", "completion": 3}"#, "\"completion\": expected a string, found a number"),
    ] {
        let error = questions(row).unwrap_err();
        assert!(error.starts_with("test.jsonl:4: ") && error.contains(why), "{error}");
    }
    // What is asked may be a call's result, and a call may be asked for; but no metric compares it.
    let call = r#"{"messages": [{"role": "user", "content": "u"},
                   {"role": "assistant", "content": null, "tool_calls": [{}]}, {"role": "tool", "content": "r"},
                   {"role": "assistant", "content": "a"}]}"#;
    let found = questions(call).unwrap();
    assert_eq!(
        (found.asked.as_str(), found.prompt.len()),
        ("r", "<user>u.<assistant>.<tool>r.<assistant>".len())
    );
    let checked = |line: &str| {
        let Ok(Value::Object(value)) = serde_json::from_str(line) else { panic!("{line}") };
        let (file, rows) = (Path::new("test.jsonl"), [Row { line: 4, value }]);
        Question::check(file, &rows, &settings(false, 9), &Metric::Exact).map_err(|e| e.to_string())
    };
    checked(call).unwrap();
    for content in ["null", "\"\"", "\"so\""] {
        let row = format!(
            "{{\"messages\": [{{\"role\": \"user\", \"content\": \"u\"}},
               {{\"role\": \"assistant\", \"content\": {content}, \"tool_calls\": [{{}}]}}]}}"
        );
        let error = checked(&row).unwrap_err();
        assert!(error.contains("test.jsonl:4: the answer calls a tool"), "{error}");
    }
    let alone = r#"{"messages": [{"role": "assistant", "content": "a"}]}"#;
    assert!(checked(alone).unwrap_err().contains("no message before the answer"));
}
