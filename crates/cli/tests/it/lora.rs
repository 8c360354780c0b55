//! `graft lora`: settings, interruption and resumption, and data that is not what it should be.

use std::io::{BufRead as _, BufReader};

use serde_json::{Value, json};

use crate::setting::{Folder, Run, llama, row, truncate};

/// Flags of a short run on the folder's model and data.
const SHORT: &str = "lora --model model --train --data data --num-layers 2 --batch-size 2 --val-batches 1";

/// metrics.jsonl without what depends on the clock and the machine.
fn timeless(folder: &Folder, adapter: &str) -> Vec<Value> {
    let text = String::from_utf8(folder.read(&format!("{adapter}/metrics.jsonl"))).unwrap();
    let mut lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for line in &mut lines {
        for key in ["tokens_per_second", "step_seconds", "peak_memory_bytes", "mlx_peak_bytes", "seconds"] {
            line.as_object_mut().unwrap().remove(key);
        }
    }
    lines
}

#[test]
fn an_interrupted_run_says_how_to_go_on_and_ends_as_if_it_had_not_been() {
    let folder = Folder::with_model();
    let flags = format!("{SHORT} --iters 60 --steps-per-report 1 --steps-per-eval 20 --learning-rate 1e-3");
    folder.ok(&format!("{flags} --adapter-path whole"));

    let mut running = folder.start(&format!("{flags} --adapter-path parts"));
    let mut lines = BufReader::new(running.0.stderr.take().unwrap());
    let mut seen = String::new();
    while !seen.contains("Iter 3: Train loss") {
        assert_ne!(lines.read_line(&mut seen).unwrap(), 0, "{seen}");
    }
    running.interrupt();
    std::io::Read::read_to_string(&mut lines, &mut seen).unwrap();
    let end = running.end();
    assert_eq!(end.status, Some(130), "{seen}");
    assert_eq!(end.out, "");
    assert!(seen.contains("stopping after this step") && !seen.contains("error:"), "{seen}");
    let (_, said) =
        seen.split_once("all of it is saved. Continue with: graft ").unwrap_or_else(|| panic!("{seen}"));
    assert!(folder.json("parts/adapter_config.json").is_object());
    folder.ok("generate --model model --adapter-path parts --max-tokens 1");

    let resumed = folder.ok(said.trim());
    assert!(resumed.err.contains("Resuming after iteration"), "{resumed:?}");
    assert_eq!(folder.read("whole/adapters.safetensors"), folder.read("parts/adapters.safetensors"));
    assert_eq!(timeless(&folder, "whole"), timeless(&folder, "parts"));
    assert!(!folder.names("parts").iter().any(|name| name.starts_with('.')));
}

#[test]
fn a_run_that_is_stopped_before_its_first_step_writes_nothing() {
    let folder = Folder::with_model();
    let adapter = folder.read("adapter/adapters.safetensors");
    let names = folder.names("adapter");
    // Rows enough that they are still being read when the signal comes.
    let rows: Vec<Value> = (0..40_000).map(|i| row(&format!("hello {i}"), "the user")).collect();
    folder.rows("data/train.jsonl", &rows);
    folder.rows("data/test.jsonl", &rows);
    for command in [
        format!("{SHORT} --iters 60 --adapter-path adapter"),
        "lora --model model --test --data data --adapter-path adapter".to_owned(),
    ] {
        let mut running = folder.start(&command);
        let mut lines = BufReader::new(running.0.stderr.take().unwrap());
        let mut seen = String::new();
        while !seen.contains("Loading datasets") {
            assert_ne!(lines.read_line(&mut seen).unwrap(), 0, "{seen}");
        }
        running.interrupt();
        std::io::Read::read_to_string(&mut lines, &mut seen).unwrap();
        let end = running.end();
        assert_eq!((end.status, end.out.as_str()), (Some(130), ""), "{seen}");
        let said = ["nothing was written", "has no result"].iter().any(|part| seen.contains(part));
        assert!(said && !seen.contains("error:"), "{seen}");
        assert!(folder.read("adapter/adapters.safetensors") == adapter);
        assert_eq!(folder.names("adapter"), names);
    }
}

#[test]
fn sample_prompts_are_answered_at_each_validation() {
    let folder = Folder::with_model();
    folder.write("prompts.txt", "hello\n\nthe user\n");
    let flags = format!("{SHORT} --iters 4 --steps-per-eval 2 --adapter-path new --sample-prompts");
    let run = folder.ok(&format!("{flags} prompts.txt"));
    for iter in [0, 2, 4] {
        for prompt in ["hello", "the user"] {
            assert!(run.err.contains(&format!("Iter {iter}: {prompt:?} -> \"")), "{run:?}");
        }
    }
    folder.ok(&format!("{flags} data/test.jsonl"));
    // Nothing is compared with an answer, so none is needed.
    let asked = json!({"messages": [{"role": "user", "content": "the user"}]});
    folder.rows("prompts.jsonl", &[json!({"prompt": "hello"}), asked]);
    let open = folder.ok(&format!("{flags} prompts.jsonl"));
    let answers = |run: &Run| {
        let lines = run.err.lines().filter(|line| line.contains("-> \""));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!((answers(&open).len(), answers(&open)), (6, answers(&run)));
    folder.fails(1, &format!("{flags} gone.txt"), &["cannot read the sample prompts gone.txt"]);
    folder.write("prompts.txt", "\n");
    folder.fails(1, &format!("{flags} prompts.txt"), &["prompts.txt: there are no prompts"]);
}

#[test]
fn no_iterations_save_the_adapter_as_it_starts() {
    let folder = Folder::with_model();
    let run = folder.ok(&format!("{SHORT} --iters 0 --adapter-path new"));
    assert!(run.out.starts_with("Saved final weights to new/adapters.safetensors"), "{run:?}");
    assert!(folder.names("new").contains(&"0000000_adapters.safetensors".to_owned()));
    folder.ok("train --model model --data data --iters 0 --adapter-path recipe");
}

#[test]
fn weights_alone_start_another_run() {
    let folder = Folder::with_model();
    folder.ok(&format!("{SHORT} --iters 4 --adapter-path first --learning-rate 1e-3"));
    let more = "--resume-adapter-file first/adapters.safetensors --learning-rate 0";
    folder.ok(&format!("{SHORT} --iters 1 --adapter-path second {more}"));
    assert_eq!(folder.read("first/adapters.safetensors"), folder.read("second/adapters.safetensors"));
    folder.fails(
        1,
        &format!("{SHORT} --resume-adapter-file gone.safetensors"),
        &["gone.safetensors: No such file"],
    );
    folder.fails(
        1,
        &format!("{SHORT} --resume-adapter-file model/model.safetensors"),
        &["model/model.safetensors: the adapter does not fit", "q_proj.lora_a: missing"],
    );
    folder.fails(
        1,
        &format!("{SHORT} --adapter-path third --resume"),
        &["third/state: there is no saved state"],
    );
}

#[test]
fn a_test_is_of_the_adapter_or_the_base() {
    let folder = Folder::with_model();
    let loss = |run: &Run| {
        let line = run.out.trim().strip_prefix("Test loss ").unwrap_or_else(|| panic!("{run:?}"));
        line.split(',').next().unwrap().parse::<f64>().unwrap()
    };
    let test = |more: &str| loss(&folder.ok(&format!("lora --model model --test --data data {more}")));
    let (base, with) = (test("--adapter-path ''"), test("--adapter-path adapter"));
    assert_ne!(base, with);
    let both = folder.ok(&format!("{SHORT} --test --iters 30 --learning-rate 1e-2 --adapter-path new"));
    let line = both.out.lines().nth(1).unwrap();
    assert!(line.starts_with("Test loss ") && line.contains(", Test ppl "), "{both:?}");
    let found = test("--adapter-path new");
    assert!(found < base - 1.0 && line.contains(&format!("{found:.3}")), "{base}, {found}, {line}");
}

#[test]
fn a_settings_file_holds_what_flags_do_and_more() {
    let folder = Folder::with_model();
    folder.write(
        "run.yaml",
        "model: model\ntrain: true\ndata: data\nfine_tune_type: dora\nnum_layers: 1\nbatch_size: 2\niters: 90\n\
         val_batches: 0\nadapter_path: of-file\nlearning_rate: 1e-3\n\
         lora_parameters: {rank: 3, scale: 4.0, dropout: 0.0, keys: [self_attn.q_proj]}\n\
         lr_schedule: {name: cosine_decay, warmup: 1, arguments: [1e-3, 10]}\n",
    );
    let run = folder.ok("lora -c run.yaml --iters 2");
    assert!(run.err.contains("iters: 2,") && run.err.contains("1 modules"), "{run:?}");
    let config = folder.json("of-file/adapter_config.json");
    let lora = json!({"dropout": 0.0, "keys": ["self_attn.q_proj"], "rank": 3, "scale": 4.0});
    assert_eq!((&config["lora_parameters"], &config["fine_tune_type"]), (&lora, &json!("dora")));
    assert_eq!((&config["iters"], &config["lr_schedule"]["warmup"]), (&json!(2), &json!(1)));

    for (text, parts) in [
        ("learnin_rate: 1\n", &["run2.yaml: unknown key `learnin_rate`; did you mean `learning_rate`?"][..]),
        ("lora_parameters: {rnk: 3}\n", &["unknown key `lora_parameters.rnk`", "`lora_parameters.rank`"][..]),
        ("iters: soon\n", &["run2.yaml: `iters` must be a whole number, found the text `soon`"][..]),
        ("report_to: wandb\n", &["report_to: wandb is not supported", "metrics.jsonl"][..]),
        ("- a\n- b\n", &["run2.yaml must hold `key: value` settings, found a list"][..]),
        ("hf_dataset: {pth: data}\n", &["unknown key `hf_dataset.pth`; did you mean `hf_dataset.path`?"][..]),
        ("hf_dataset: [{path: 5}]\n", &["`hf_dataset.path` must be a text, found the number 5"][..]),
        ("iters: [\n", &["run2.yaml is not a YAML file of settings"][..]),
    ] {
        folder.write("run2.yaml", text);
        folder.fails(2, "lora --train --model model --data data -c run2.yaml", parts);
    }
    folder.fails(1, "lora --train -c gone.yaml", &["cannot read the settings file gone.yaml: No such file"]);
}

#[test]
fn the_recipe_trains_on_answers_and_on_whole_texts_and_data_sets_may_be_slices() {
    let folder = Folder::with_model();
    let targets = |adapter: &str| timeless(&folder, adapter)[0]["tokens"].as_u64().unwrap();
    let train = "train --model model --iters 1 --batch-size 1 --val-batches 0 --rank 2";
    folder.rows("data/train.jsonl", &[row("hello", "the user")]);
    folder.ok(&format!("{train} --data data --adapter-path masked"));
    folder.write("whole.yaml", "mask_prompt: false\n");
    folder.ok(&format!("{train} --data data --adapter-path whole -c whole.yaml"));
    assert!(targets("masked") < targets("whole"), "{} {}", targets("masked"), targets("whole"));
    folder.write("texts/train.jsonl", "{\"text\": \"the user\"}\n");
    folder.ok(&format!("{train} --data texts --adapter-path texts-adapter"));
    // Two slices of one set: the second half of it, and a half with keys of its own.
    folder.rows("set/train.jsonl", &[json!({"q": "a", "a": "b"}), json!({"q": "c", "a": "d"})]);
    folder.write(
        "sets.yaml",
        "hf_dataset:\n- {path: set, prompt_feature: q, completion_feature: a, train_split: 'train[50%:]'}\n\
         - {path: data, train_split: train, mask_prompt: false}\n",
    );
    let run = folder.ok(&format!("{train} -c sets.yaml --adapter-path sets"));
    assert!(run.err.contains("2 batches per pass"), "{run:?}");
    // Rows of text have no prompt to mask, which the recipe alone asks for.
    folder.write("sets.yaml", "hf_dataset: {path: texts, train_split: train, valid_split: train}\n");
    folder.ok(&format!("{train} -c sets.yaml --adapter-path text-set"));
    folder.fails(1, &format!("{train} -c sets.yaml --mask-prompt"), &["a text row has no prompt to mask"]);
    folder.write("sets.yaml", "hf_dataset: {train_split: train}\n");
    folder.fails(2, &format!("{train} -c sets.yaml"), &["hf_dataset: `path` is required"]);
    folder.write("sets.yaml", "hf_dataset: {path: set, train_split: 'train[x]'}\n");
    folder.fails(2, &format!("{train} -c sets.yaml"), &["the split `train[x]` is not of the form"]);
}

#[test]
fn rows_that_are_not_what_they_should_be_are_named_by_file_and_line() {
    let folder = Folder::with_model();
    let good = row("hello", "the user");
    let bad = |split: &str, third: &str, parts: &[&str]| {
        let lines = [good.to_string(), String::new(), third.to_owned(), good.to_string()];
        let file = format!("data/{split}.jsonl");
        let kept = folder.read(&file);
        folder.write(&file, &lines.join("\n"));
        let named = format!("{file}:3: ");
        folder.fails(1, SHORT, &[&[named.as_str()], parts].concat());
        std::fs::write(folder.path(&file), kept).unwrap();
    };
    bad(
        "train",
        r#"{"question": "a", "answer": "b"}"#,
        &[r#"found the keys "question", "answer"; expected "prompt""#],
    );
    bad("train", r#"{"messages": ["#, &["not valid JSON"]);
    bad("train", "[1, 2]", &["expected a JSON object on each line, found another JSON value"]);
    bad("train", r#"{"messages": "hi"}"#, &[r#""messages": expected a list of messages, found a string"#]);
    bad("train", r#"{"messages": []}"#, &["the list of messages is empty"]);
    bad("valid", r#"{"text": 5}"#, &[r#""text": expected a string, found a number"#]);

    folder.write("data/train.jsonl", "\n\n");
    folder.fails(1, SHORT, &["data/train.jsonl: the file has no rows; expected at least one row such as"]);
    std::fs::remove_file(folder.path("data/train.jsonl")).unwrap();
    folder.fails(1, SHORT, &["data/train.jsonl: there is no such file"]);
    folder.rows("data/train.jsonl", &[good]);
    folder.fails(1, SHORT, &["data/train.jsonl: 1 usable rows, but batch_size is 2"]);
    folder.write("data/test.jsonl", "");
    let test = "lora --model model --test --data data --adapter-path adapter";
    folder.fails(1, test, &["data/test.jsonl: the file has no rows"]);
    folder.fails(
        1,
        "lora --model model --train --num-layers 1 --data gone",
        &["there is no data directory `gone`"],
    );
    let error = folder.fails(
        1,
        "lora --model model --train --num-layers 1 --data ./data/train.jsonl",
        &["`./data/train.jsonl` is a file; a directory with train.jsonl"],
    );
    assert!(!error.contains("gguf"), "{error}");
}

#[test]
fn a_row_whose_prompt_fills_the_limit_is_skipped_and_counted() {
    let folder = Folder::with_model();
    let long = row(&"hello ".repeat(60), "the user");
    let rows = [row("a", "b"), long.clone(), row("c", "d"), row("e", "f"), long.clone()];
    folder.rows("data/train.jsonl", &rows);
    let flags = format!("{SHORT} --mask-prompt --max-seq-length 40 --iters 6 --adapter-path new");
    let run = folder.ok(&format!("{flags} --learning-rate 1e-3 --steps-per-report 2"));
    assert!(run.err.contains("truncated: 2 of 5 rows are longer than max_seq_length"), "{run:?}");
    assert!(run.err.contains("nothing-to-train: 2 of 5 rows") && run.err.contains("(lines 2, 5)"), "{run:?}");
    let losses: Vec<f64> = timeless(&folder, "new").iter().filter_map(|line| line["loss"].as_f64()).collect();
    assert!(losses.len() >= 3 && losses.iter().all(|loss| loss.is_finite()), "{losses:?}");
    folder.ok("generate --model model --adapter-path new --max-tokens 2");

    folder.rows("data/train.jsonl", &[long.clone(), long]);
    folder.fails(1, &flags, &["data/train.jsonl: all 2 rows were skipped", "max_seq_length"]);
}

#[test]
fn full_training_of_packed_weights_is_explained() {
    let folder = Folder::with_model();
    let flags = format!("{SHORT} --fine-tune-type full --iters 2 --adapter-path new");
    let parts = ["packed weights have no gradient", "graft convert --dequantize", "DoRA at a higher rank"];
    folder.fails(2, &flags, &parts);
    // The way that the message shows.
    folder.ok("convert --hf-path model --mlx-path dense --dequantize");
    folder.ok(&flags.replace("--model model", "--model dense"));
    folder.ok("fuse --model dense --adapter-path new --save-path fused");
}

#[test]
fn settings_out_of_range_and_runs_that_blow_up_write_nothing() {
    let folder = Folder::with_model();
    for (flag, part) in [
        ("--batch-size 0", "--batch-size must be at least 1, not 0"),
        ("--iters -1", "--iters must be at least 0, not -1"),
        ("--learning-rate -1", "--learning-rate must be a number of at least 0"),
        ("--rank 0", "lora_parameters.rank must be at least 1"),
        ("--report-to wandb", "--report-to is not supported by graft lora"),
    ] {
        // The last of a repeated flag counts, as in argparse.
        folder.fails(2, &format!("{SHORT} {flag}"), &[part]);
    }
    folder.fails(2, "lora --model model", &["nothing to do: give --train, --test or both"]);
    folder.fails(2, &format!("{SHORT} --num-layers 16"), &["--num-layers 16: the model has 2 blocks"]);
    folder.fails(2, &format!("{SHORT} --max-grad-norm -1"), &["--max-grad-norm must be at least 0"]);
    folder.fails(2, &format!("{SHORT} --max-grad-norm nan"), &["expected a finite number"]);
    folder.fails(2, &format!("{SHORT} --test --test-batches 0"), &["--test-batches 0 tests nothing"]);
    folder.write("odd.yaml", "lr_schedule: {name: sine, arguments: [1]}\n");
    folder.fails(
        2,
        &format!("{SHORT} --model gone -c odd.yaml"),
        &["lr_schedule: expected cosine_decay", "found \"sine\""],
    );
    folder.write("odd.yaml", "optimizer_config: {adam: {speed: 1}}\n");
    folder.fails(2, &format!("{SHORT} --model gone -c odd.yaml"), &["optimizer_config.adam.speed"]);
    let blown = format!("{SHORT} --iters 9 --learning-rate 1e30 --optimizer sgd --adapter-path new");
    let run = folder.run(&blown);
    assert_eq!(run.status, Some(3), "{run:?}");
    assert!(
        run.err.contains("is not finite at iteration") && run.err.contains("train.jsonl lines"),
        "{run:?}"
    );
    assert!(!folder.names("new").iter().any(|name| name.ends_with(".safetensors")));
}

#[test]
fn a_base_that_is_none_or_damaged_is_named() {
    let folder = Folder::with_model();
    folder.fails(1, "lora --train --model gone --data data", &["there is no model directory `gone`"]);
    let short = format!("{SHORT} --adapter-path new");
    folder.model("deep", &graft_testkit::Tiny { layers: 3, ..llama(None) });
    let config = String::from_utf8(folder.read("model/config.json")).unwrap();
    folder
        .write("model/config.json", &config.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3"));
    folder.fails(
        1,
        &short,
        &["the weights do not fit config.json", "model.layers.2.self_attn.q_proj.weight: missing"],
    );
    folder.write("model/config.json", "{\"model_type\": \"gpt9\"}");
    folder.fails(
        1,
        &short,
        &["model/config.json: model_type \"gpt9\" is not supported; supported are llama"],
    );
    folder.write("model/config.json", "{");
    folder.fails(1, &short, &["model/config.json: not valid JSON"]);
    folder.write("model/config.json", &config);
    truncate(&folder.path("model/model.safetensors"), 30_000);
    folder.fails(1, &short, &["model/model.safetensors: damaged"]);
    std::fs::remove_file(folder.path("model/config.json")).unwrap();
    folder.fails(1, &short, &["model: config.json is missing"]);
}
