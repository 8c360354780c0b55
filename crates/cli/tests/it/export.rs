//! `graft export gguf` and `graft fuse --export-gguf`: what they say and write, and what they refuse.

use graft_testkit::{Dtype, Family, Tiny, tiny_adapter};

use crate::setting::{Folder, llama};

#[test]
fn a_model_comes_back_and_answers_the_same() {
    let folder = Folder::new();
    folder.model("model", &Tiny { dtype: Dtype::F16, ..llama(Some((4, 64))) });
    let run = folder.ok("export gguf --model model --out m.gguf");
    let expected = "Saved m.gguf (";
    assert!(run.out.starts_with(expected) && run.err.is_empty(), "{run:?}");
    assert!(run.out.ends_with("  15 of 4 bits, groups of 64 -> Q4_1, exactly\n"), "{run:?}");
    // The file says of what it was made.
    let bytes = folder.read("m.gguf");
    let hash = graft_adapters::file_hash(&folder.path("model/model.safetensors")).unwrap();
    let found = |text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
    assert!(found("graft.provenance") && found(&hash) && found("\"operation\":\"export gguf\""));
    folder.ok("convert --hf-path m.gguf --mlx-path back");
    let answer = |model: &str| {
        folder.ok(&format!("generate --model {model} --max-tokens 8 --prompt hello --verbose false")).out
    };
    assert_eq!(answer("back"), answer("model"));

    let run = folder.ok("export gguf --model model --out q.gguf --type q8_0");
    assert!(
        run.out.contains("15 of 4 bits, groups of 64 -> Q8_0, 15 of them rounded, by up to 0."),
        "{run:?}"
    );
    let report = folder.ok("export gguf --model model --out r.gguf --type f16 --json").out;
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["matrices"].as_array().unwrap().len(), 15);
    assert_eq!((&report["kind"], &report["matrices"][0]["to"]), (&"export".into(), &"F16".into()));
    let size = std::fs::metadata(folder.path("r.gguf")).unwrap().len();
    assert_eq!(report["bytes"], size);
}

#[test]
fn an_adapter_is_a_file_of_its_own() {
    let folder = Folder::with_model();
    let run = folder.ok("export gguf --model model --adapter-path adapter --out a.gguf");
    assert!(run.out.ends_with("  LoRA of 14 modules, alpha 8\n"), "{run:?}");
    let both = "export gguf --model model --adapter-path adapter --out b.gguf";
    folder.fails(2, &format!("{both} --type q8_0"), &["--type q8_0", "an adapter is written as f32"]);
    let tiny = llama(Some((4, 32)));
    let dora = tiny_adapter(&folder.path("model"), &tiny, true, 4, 9);
    std::fs::rename(dora.keep(), folder.path("dora")).unwrap();
    folder.fails(
        1,
        &both.replace("path adapter", "path dora"),
        &["DoRA's magnitude", "graft fuse --export-gguf"],
    );
    folder.model("qwen", &Tiny::new(Family::Qwen2));
    folder.ok("lora --model model --train --data data --num-layers 2 --iters 1 --val-batches 0 --adapter-path trained");
    let parts = ["the adapter trained is for another base than qwen", "a llama model, this is a qwen2"];
    folder.fails(1, "export gguf --model qwen --adapter-path trained --out b.gguf", &parts);
}

#[test]
fn a_fused_model_gets_its_file() {
    let folder = Folder::with_model();
    let fuse = "fuse --model model --adapter-path adapter --save-path fused";
    let run = folder.ok(&format!("{fuse} --export-gguf"));
    assert!(run.out.contains("Saved fused/ggml-model-f16.gguf ("), "{run:?}");
    assert!(
        run.out.contains("14 of 8 bits, groups of 32 -> F16, 14 of them rounded, by up to 0.0"),
        "{run:?}"
    );
    assert!(folder.names("fused").contains(&"config.json".to_owned()));
    let run = folder.ok(&format!("{fuse} --export-gguf --gguf-path m.gguf --gguf-type auto"));
    assert!(run.out.contains("1 of 4 bits, groups of 32 -> Q4_1, 1 of them rounded"), "{run:?}");
    let names = folder.names("fused");
    assert!(names.contains(&"m.gguf".to_owned()) && !names.contains(&"ggml-model-f16.gguf".to_owned()));
    folder.ok("convert --hf-path fused/m.gguf --mlx-path back");
    folder.ok("generate --model back --max-tokens 1");
    folder.fails(2, &format!("{fuse} --gguf-type f16"), &["--gguf-type", "--export-gguf only"]);
    folder.write("there.gguf", "");
    folder.fails(
        2,
        &format!("{fuse} --export-gguf --gguf-path ../there.gguf"),
        &["there.gguf exists already"],
    );
}

#[test]
fn what_was_folded_is_not_taken_without_its_adapter() {
    let folder = Folder::with_model();
    let dora = tiny_adapter(&folder.path("model"), &llama(Some((4, 32))), true, 4, 9);
    std::fs::rename(dora.keep(), folder.path("dora")).unwrap();
    let fuse = "fuse --model model --adapter-path dora --save-path folded --policy fold --verify off";
    folder.fails(
        2,
        &format!("{fuse} --export-gguf"),
        &["--policy fold leaves the low-rank part", "choose --policy raise, same or dense"],
    );
    assert!(!folder.path("folded").exists());
    folder.ok(fuse);
    // It is measured as what it is: the model with its adapter, which keeps nearly all.
    let run = folder.ok("fuse --model model --adapter-path dora --measure folded --data data");
    let kept =
        run.out.split("Answers: ").nth(1).and_then(|rest| rest.split(" %").next()?.parse::<f64>().ok());
    assert!(kept > Some(99.0), "{run:?}");
    folder.ok(
        "eval --model model --adapter-path dora --fused folded --data data --metric loss --output e.json",
    );
    let models = folder.json("e.json")["models"].clone();
    let loss = |i: usize| models[i]["score"].as_f64().unwrap();
    assert!((loss(2) - loss(1)).abs() < 0.05 * (loss(1) - loss(0)).abs(), "{models}");
    std::fs::remove_file(folder.path("e.json")).unwrap();
    let beside = ["folded/adapters.safetensors: an adapter beside the model", "graft fuse --model folded"];
    folder.fails(1, "export gguf --model folded --out f.gguf", &beside);
    folder.fails(1, "convert --hf-path folded --mlx-path plain --dequantize", &beside);
    folder.fails(1, "fuse --model folded --adapter-path adapter --save-path other --verify off", &beside);
    assert_eq!(folder.names("."), ["adapter", "data", "dora", "folded", "model"]);
    // The adapter by itself, and both as one model, which is a model like any other.
    folder.ok("export gguf --model folded --adapter-path folded --out a.gguf");
    folder.ok("fuse --model folded --adapter-path folded --save-path whole --verify off --export-gguf");
    folder.ok("convert --hf-path whole --mlx-path plain --dequantize");
}

#[test]
fn a_gguf_file_has_a_name_of_its_own() {
    let folder = Folder::with_model();
    let fuse = "fuse --model model --adapter-path adapter --save-path fused --verify layers --export-gguf";
    for name in ["model.safetensors", "config.json", "gguf"] {
        let parts = [name, "expected a name that ends in .gguf"];
        folder.fails(2, &format!("{fuse} --gguf-path {name}"), &parts);
    }
    assert!(!folder.path("fused").exists());
    folder.ok(&format!("{fuse} --gguf-path M.GGUF"));
    folder.ok("generate --model fused --max-tokens 1");
}

#[test]
fn what_is_wrong_is_said_before_anything_is_written() {
    let folder = Folder::with_model();
    folder.write("there.gguf", "");
    folder.fails(2, "export gguf --model model", &["required arguments"]);
    folder.fails(2, "export gguf --model model --out there.gguf", &["--out there.gguf exists already"]);
    folder.fails(
        1,
        "export gguf --model model --out gone/a.gguf",
        &["--out cannot be written", "gone/a.gguf"],
    );
    folder.fails(2, "export gguf --model model --out a.gguf --type q4_k", &["invalid value 'q4_k'"]);
    folder.fails(1, "export gguf --out a.gguf", &["there is no model directory `mlx_model`"]);
    folder.fails(1, "export gguf --model data --out a.gguf", &["data: config.json is missing"]);
    // A fuse that could not be exported is not begun.
    let mut tokenizer = folder.json("model/tokenizer.json");
    tokenizer["pre_tokenizer"]["use_regex"] = false.into();
    folder.write("model/tokenizer.json", &tokenizer.to_string());
    let parts = ["model cannot be written as GGUF", "pre_tokenizer", "convert_hf_to_gguf.py"];
    folder.fails(1, "export gguf --model model --out a.gguf", &parts);
    folder.fails(1, "fuse --model model --adapter-path adapter --save-path fused --export-gguf", &parts);
}
