//! `graft fuse`: what it says, replaces and refuses.

use std::collections::BTreeMap;

use graft_ops::Array;
use graft_quant::{Tensor, read_safetensors, safetensors_bytes};
use graft_testkit::{Family, Tiny, tiny_adapter};
use serde_json::{Value, json};

use crate::setting::{Folder, llama, truncate};

const FUSE: &str = "fuse --model model --adapter-path adapter --save-path fused";

#[test]
fn policies_say_what_they_do_and_replace_what_they_did() {
    let folder = Folder::with_model();
    for (flags, form) in [
        ("--verify layers", "14 of 4 bits, groups of 32 -> 8 bits, groups of 32"),
        ("--data data", "14 of 4 bits, groups of 32 -> 8 bits, groups of 32"),
        ("--policy raise --verify off", "14 of 4 bits, groups of 32 -> 8 bits, groups of 32"),
        ("--policy dense", "14 of 4 bits, groups of 32 -> float32"),
        ("--policy same --data data --force", "14 of 4 bits, groups of 32 -> 4 bits, groups of 32"),
        ("--dequantize", "14 of 4 bits, groups of 32 -> float32"),
    ] {
        let run = folder.ok(&format!("{FUSE} {flags}"));
        assert!(run.out.starts_with("Fused 14 weights of model (lora, --policy "), "{run:?}");
        for part in [form, "\nSize: 70.4 kB -> ", "Update: ", " of it kept", "to fused.\n"] {
            assert!(run.out.contains(part), "{flags}: {part:?} is not in {run:?}");
        }
        assert!(run.err.contains("Weights: 70.4 kB -> about "), "{run:?}");
        let rows = flags.contains("--data");
        assert_eq!(run.out.contains("of the effect kept; KL(adapter || fused) "), rows, "{run:?}");
        assert_eq!(run.out.contains("tokens of 8 rows of data/valid.jsonl)"), rows, "{run:?}");
        let note =
            "the adapter does not say which rows it was validated on: the result is judged by its weights";
        let asked = !rows && !flags.contains("--verify");
        assert_eq!(run.err.contains(note), asked, "{flags}: {run:?}");
        assert_eq!(folder.names("."), ["adapter", "data", "fused", "model"]);
        let packed = folder.json("fused/config.json").get("quantization").is_some();
        assert_eq!(packed, flags != "--dequantize");
    }
    let report = folder.json("fused/fuse_report.json");
    assert_eq!((&report["policy"], &report["dequantize"]), (&json!("dense"), &json!(true)));
    folder.ok("generate --model fused --max-tokens 1");
}

#[test]
fn without_rows_no_tokenizer_is_needed() {
    let folder = Folder::with_model();
    std::fs::remove_file(folder.path("model/tokenizer.json")).unwrap();
    let run = folder.ok(FUSE);
    assert!(run.err.contains("the result is judged by its weights"), "{run:?}");
    assert_eq!(folder.json("fused/fuse_report.json")["judged_by"], "weights");
}

#[test]
fn the_model_says_from_what_it_was_made() {
    let folder = Folder::with_model();
    folder.ok(&format!("{FUSE} --data data"));
    let (report, config) = (folder.json("fused/fuse_report.json"), folder.json("fused/config.json"));
    let made = &config["graft"]["provenance"];
    assert_eq!(made, &report["provenance"]);
    assert_eq!((&made["operation"], &made["recipe"]["policy"]), (&json!("fuse"), &json!("raise")));
    for (source, file) in [
        (&made["base"], "model/model.safetensors"),
        (&made["base"], "model/config.json"),
        (&made["inputs"][0], "adapter/adapters.safetensors"),
    ] {
        let output = std::process::Command::new("sha256sum").arg(folder.path(file)).output().unwrap();
        let hash = String::from_utf8(output.stdout).unwrap();
        let name = file.rsplit('/').next().unwrap();
        assert_eq!(source["sha256"][name].as_str(), hash.split_whitespace().next(), "{file}");
    }
    assert_eq!(made["summary"]["kept"], report["totals"]["kept"]);
    assert_eq!(made["summary"]["model"]["kl"], report["model"]["fused"]["kl"]["value"]);
    // The same stands in the header of the tensors, but for what was measured once they were written.
    let bytes = folder.read("fused/model.safetensors");
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let described: Value =
        serde_json::from_str(header["__metadata__"]["graft_provenance"].as_str().unwrap()).unwrap();
    assert_eq!(described["base"], made["base"]);
    assert_eq!(described["summary"]["kept"], made["summary"]["kept"]);
    // `same` says by which rows it rounded.
    folder.ok(&format!("{FUSE} --policy same --data data --force"));
    let observed = folder.json("fused/config.json")["graft"]["provenance"]["recipe"]["observed"].clone();
    assert!(
        observed["file"].as_str().unwrap().starts_with("data/") && observed["tokens"].as_u64() > Some(8),
        "{observed}"
    );
    assert_eq!(observed["sha256"].as_str().unwrap().len(), 64);
    folder.ok(&format!("{FUSE} --data data"));
    // What is made of it says so, too.
    folder.ok("fuse --model fused --adapter-path adapter --save-path again --verify layers");
    assert_eq!(&folder.json("again/config.json")["graft"]["provenance"]["base"]["made_from"], made);
}

#[test]
fn what_runs_only_fused_is_judged_by_its_weights() {
    let folder = Folder::with_model();
    let mut tensors = read_safetensors(&folder.path("adapter/adapters.safetensors")).unwrap().0;
    let norm = Tensor::from_array(&Array::from_slice(&[0.5f32; 64], &[64])).unwrap();
    let name = "model.layers.1.input_layernorm.weight";
    tensors.insert(name.into(), norm.clone());
    let mut config = folder.json("adapter/adapter_config.json");
    config["graft"]["weights"] = json!([name]);
    let put = |folder: &Folder, config: &Value, tensors: &BTreeMap<String, Tensor>| {
        let bytes = safetensors_bytes(tensors, &BTreeMap::new()).unwrap();
        std::fs::write(folder.path("adapter/adapters.safetensors"), bytes).unwrap();
        folder.write("adapter/adapter_config.json", &config.to_string());
    };
    put(&folder, &config, &tensors);
    let run = folder.ok(&format!("{FUSE} --data data"));
    assert!(
        run.err
            .contains("a whole weight beside low-rank updates, which run only fused: the result is judged"),
        "{run:?}"
    );
    assert_eq!(folder.json("fused/fuse_report.json")["judged_by"], "weights");
    // A full fine-tune, and packed weights under it.
    config["fine_tune_type"] = json!("full");
    let packed = "model.layers.1.self_attn.q_proj";
    let whole = Tensor::from_array(&Array::from_slice(&[0.25f32; 64 * 64], &[64, 64])).unwrap();
    put(&folder, &config, &BTreeMap::from([(name.to_owned(), norm), (format!("{packed}.weight"), whole)]));
    let run = folder.ok(&format!("{FUSE} --data data"));
    assert!(
        run.err.contains(&format!("{packed} is packed (4 bits, groups of 32), and a full fine-tune")),
        "{run:?}"
    );
}

#[test]
fn what_loses_the_update_is_not_written() {
    let folder = Folder::with_model();
    // A thousandth of it, of which 4 bits keep nothing.
    let file = folder.path("adapter/adapter_config.json");
    let mut config: Value = folder.json("adapter/adapter_config.json");
    config["lora_parameters"]["scale"] = json!(0.02);
    std::fs::write(file, config.to_string()).unwrap();
    let flags = format!("{FUSE} --policy same --verify layers");
    let parts = [
        "cannot fuse adapter into model: nothing was written",
        "of the update was kept, 90 % are wanted",
        "--policy raise keeps more",
    ];
    folder.fails(1, &flags, &parts);
    assert_eq!(folder.names("."), ["adapter", "data", "model"]);
    folder.fails(1, &format!("{flags} --data data --verify model"), &["nothing was written"]);
    let run = folder.ok(&format!("{flags} --force"));
    assert!(run.err.contains("warning: at most "), "{run:?}");
    assert_eq!(folder.json("fused/fuse_report.json")["judged_by"], "weights");
    folder.ok(&format!("{FUSE} --data data"));
}

#[test]
fn the_rows_that_training_recorded_are_measured_unless_they_changed() {
    let folder = Folder::with_model();
    folder.ok("lora --model model --train --data data --num-layers 2 --iters 20 --learning-rate 1e-2 --val-batches 1 --adapter-path trained");
    let fuse = "fuse --model model --adapter-path trained --save-path fused";
    let run = folder.ok(fuse);
    assert!(run.out.contains("tokens of 8 rows of ") && run.out.contains("/data/valid.jsonl)"), "{run:?}");
    // Also from elsewhere.
    let recorded = folder.json("trained/adapter_config.json")["graft"]["rows"]["valid"]["file"].clone();
    assert!(std::path::Path::new(recorded.as_str().unwrap()).is_absolute(), "{recorded}");
    let report = folder.json("fused/fuse_report.json");
    assert_eq!((&report["judged_by"], &report["verify"]), (&json!("model"), &json!("model")));
    let model = &report["model"];
    assert!(
        model["fused"]["kl"]["value"].as_f64().unwrap()
            < 0.05 * model["base"]["kl"]["value"].as_f64().unwrap()
    );
    assert!(model["kept"]["value"].as_f64().unwrap() > 0.95, "{model}");
    let p = |name: &str| model["perplexity"][name].as_f64().unwrap();
    assert!(p("adapter") < p("base") && (p("fused") / p("adapter") - 1.0).abs() < 0.05, "{model}");
    // `graft perplexity` has no masks and windows of one length, so the two are only near each other; eval has the same loss.
    folder
        .ok("eval --model model --adapter-path trained --fused fused --data data/valid.jsonl --metric loss");
    let eval = folder.json("eval.json");
    for (index, name) in ["base", "adapter", "fused"].iter().enumerate() {
        let loss = eval["models"][index]["score"].as_f64().unwrap();
        assert!(loss.is_finite() && p(name) > 1.0);
    }
    // Scores of answers.
    let run = folder.ok(&format!("{fuse} --metric contains --max-tokens 4"));
    assert!(run.out.contains("Score (contains): base 0.000, adapter "), "{run:?}");
    folder.write("data/valid.jsonl", "{\"text\": \"another\"}\n");
    let run = folder.ok(fuse);
    assert!(run.err.contains("data/valid.jsonl has changed since the adapter was trained"), "{run:?}");
    std::fs::remove_file(folder.path("data/valid.jsonl")).unwrap();
    let run = folder.ok(fuse);
    assert!(
        run.err.contains("data/valid.jsonl, on which the adapter was validated, is not there"),
        "{run:?}"
    );
    folder.fails(2, &format!("{fuse} --data gone"), &["--data gone: expected a .jsonl file"]);
    folder.fails(2, &format!("{fuse} --metric loss"), &["the perplexity is measured without it"]);
    folder.fails(2, &format!("{fuse} --metric exact --verify off"), &["--metric belongs to --verify model"]);
}

#[test]
fn another_precision_of_the_base_is_measured_and_another_model_refused() {
    let folder = Folder::with_model();
    folder.model("plain", &llama(None));
    folder.ok("lora --model model --train --data data --num-layers 2 --iters 20 --learning-rate 1e-2 --val-batches 1 --adapter-path trained");
    let fuse = "fuse --model model --adapter-path trained --save-path fused";
    let run = folder.ok(&format!("{fuse} --base plain"));
    assert!(run.err.contains("another precision (float32) than the adapter was trained on"), "{run:?}");
    assert!(run.out.contains("Beside the adapter on the base it was trained on: KL "), "{run:?}");
    assert!(folder.json("fused/config.json").get("quantization").is_none());
    folder.model("qwen", &Tiny::new(Family::Qwen2));
    let parts = ["--base qwen is another model than --model model", "a llama model, this is a qwen2"];
    folder.fails(1, &format!("{fuse} --base qwen"), &parts);
    // The base that it was trained on is not replaced.
    let before = folder.read("model/model.safetensors");
    let into =
        "fuse --model model --base plain --adapter-path trained --save-path ./plain/../model --verify layers";
    folder.fails(1, into, &["is the model itself that the adapter was trained on"]);
    assert!(folder.read("model/model.safetensors") == before);
}

#[test]
fn another_model_of_the_same_shapes_is_refused_warned_of_or_forced() {
    let folder = Folder::with_model();
    folder.model("other", &Tiny { seed: 2, ..llama(Some((4, 32))) });
    let train = "lora --train --data data --num-layers 2 --val-batches 0 --adapter-path trained";
    folder.ok(&format!("{train} --model model --iters 1"));
    let fuse = "fuse --model other --adapter-path trained --save-path fused --verify layers";
    let parts = ["trained on model, another model of the same shapes", "--force"];
    folder.fails(1, fuse, &parts);
    let run = folder.ok(&format!("{fuse} --force"));
    assert!(run.err.contains("warning: the adapter does not belong to "), "{run:?}");
    let base = "fuse --model model --base other --adapter-path trained --save-path fused --verify layers";
    folder.fails(1, base, &["--base other is another model than --model model"]);
    let merge = "merge --method linear --adapter trained --model other --save-path merged";
    folder.fails(1, merge, &parts);
    folder.ok(&format!("{merge} --force"));
    let run = folder.ok("generate --model other --adapter-path trained --max-tokens 1");
    assert!(run.err.contains("warning: the adapter trained is not for other"), "{run:?}");
    folder.fails(1, &format!("{train} --model other --iters 2 --resume"), &["--resume", parts[0]]);
    let weights = "--resume-adapter-file trained/adapters.safetensors";
    let run = folder
        .ok(&format!("{} --model other --iters 1 {weights}", train.replace("path trained", "path new")));
    assert!(
        run.err.contains("warning: the adapter trained/adapters.safetensors is not for other"),
        "{run:?}"
    );
    // On its own base nothing is said.
    let run = folder.ok(&format!("{train} --model model --iters 2 --resume"));
    assert!(!run.err.contains("warning: the adapter"), "{run:?}");
}

#[test]
fn a_full_disk_is_said_and_cleaned_up() {
    let folder = Folder::new();
    let tiny = Tiny { layers: 4, hidden: 256, ffn: 1024, heads: 16, kv_heads: 16, ..llama(Some((4, 32))) };
    folder.model("model", &tiny);
    let adapter = tiny_adapter(&folder.path("model"), &tiny, false, 4, 9);
    std::fs::rename(adapter.keep(), folder.path("adapter")).unwrap();
    // A limit of the size of files is as good as a full disk: 512 blocks of 512 bytes.
    let graft = env!("CARGO_BIN_EXE_graft");
    let line = format!("trap '' XFSZ; ulimit -f 512; exec {graft} {FUSE} --verify layers");
    let mut command = std::process::Command::new("sh");
    let output = command.args(["-c", &line]).current_dir(folder.path(".")).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(
        error.contains("File too large") && error.contains("make room") && error.contains("nothing was left"),
        "{error}"
    );
    assert_eq!(folder.names("."), ["adapter", "data", "model"]);
}

#[test]
fn a_killed_fuse_leaves_no_half_model_and_the_next_one_cleans_up() {
    let folder = Folder::new();
    let tiny = Tiny { layers: 8, hidden: 256, ffn: 1024, heads: 16, kv_heads: 16, ..llama(Some((4, 32))) };
    folder.model("model", &tiny);
    let adapter = tiny_adapter(&folder.path("model"), &tiny, true, 4, 9);
    std::fs::rename(adapter.keep(), folder.path("adapter")).unwrap();
    let flags = format!("{FUSE} --verify layers");
    folder.ok(&flags);
    let before = folder.read("fused/model.safetensors");
    let hidden = |folder: &Folder| {
        folder.names(".").into_iter().filter(|name| name.starts_with('.')).collect::<Vec<_>>()
    };
    for wait in [0, 20, 60, 120, 200] {
        let mut running = folder.start(&flags);
        while hidden(&folder).is_empty() && running.0.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        std::thread::sleep(std::time::Duration::from_millis(wait));
        running.0.kill().unwrap();
        running.0.wait().unwrap();
        // Whole, whichever of the two it is.
        assert_eq!(folder.read("fused/model.safetensors").len(), before.len());
        assert!(folder.read("fused/model.safetensors") == before);
        folder.json("fused/fuse_report.json");
        for name in hidden(&folder) {
            let old = std::time::SystemTime::now() - std::time::Duration::from_secs(60);
            std::fs::File::open(folder.path(&name)).unwrap().set_modified(old).unwrap();
        }
    }
    folder.ok(&flags);
    assert_eq!(folder.names("."), ["adapter", "data", "fused", "model"]);
}

#[test]
fn the_page_shows_what_the_report_says() {
    let folder = Folder::with_model();
    folder.ok(&format!("{FUSE} --html fuse.html"));
    let (report, page) = (folder.json("fused/fuse_report.json"), folder.read("fuse.html"));
    let page = String::from_utf8(page).unwrap();
    let layers = report["layers"].as_array().unwrap();
    for (index, layer) in layers.iter().enumerate() {
        let error = 100.0 * layer["relative_error"].as_f64().unwrap();
        assert!(page.contains(layer["path"].as_str().unwrap()));
        let cell = format!("data-at=\"/layers/{index}/relative_error\">{error:.1} %<");
        assert!(page.contains(&cell), "{cell} is not in {page}");
    }
    assert!(layers.len() >= 14 && page.contains("data-at=\"/totals/changed\">14<"), "{page}");
    folder.fails(2, &format!("{FUSE} --html gone/a.html"), &["--html gone/a.html", "directory that exists"]);
}

#[test]
fn what_is_no_model_is_not_replaced() {
    let folder = Folder::with_model();
    folder.fails(
        1,
        &FUSE.replace("fused", "data"),
        &["data exists already", "other things than a model's files"],
    );
    folder.fails(1, &FUSE.replace("fused", "adapter"), &["adapter is the adapter itself"]);
    folder.fails(1, &FUSE.replace("fused", "model/config.json"), &["it is no directory"]);
    folder.fails(1, &FUSE.replace("fused", "model"), &["model is the base itself"]);
    folder.fails(1, &FUSE.replace("fused", "./model/../model"), &["is the base itself"]);
    folder.fails(2, &format!("{FUSE} --dequantize --policy raise"), &["leave out --policy"]);
    folder.fails(
        1,
        &format!("{FUSE} --policy fold"),
        &["DoRA's row factor", "this adapter is lora: choose raise"],
    );
    folder.fails(2, &format!("{FUSE} --policy bend"), &["invalid value 'bend' for '--policy"]);
    folder.fails(1, "fuse", &["there is no model directory `mlx_model`"]);
    folder.fails(
        1,
        &FUSE.replace("--adapter-path adapter", ""),
        &["there is no adapter directory `adapters`"],
    );
    folder.fails(1, &FUSE.replace("path adapter", "path model"), &["not an adapter directory"]);
    folder.fails(1, &FUSE.replace("--model model", "--model data"), &["data: config.json is missing"]);
}

#[test]
fn an_adapter_that_does_not_fit_is_refused_with_both_names() {
    let folder = Folder::with_model();
    let other = Tiny { hidden: 128, ..Tiny::new(Family::Llama) };
    folder.model("other", &other);
    let adapter = tiny_adapter(&folder.path("other"), &other, true, 4, 9);
    std::fs::rename(adapter.keep(), folder.path("wide")).unwrap();
    let parts =
        ["cannot fuse wide into model", "q_proj: A is [128, 4] and B is [4, 64]", "weight is (64, 64)"];
    folder.fails(1, &FUSE.replace("path adapter", "path wide"), &parts);
    // One that says which base it is for.
    folder.model("qwen", &Tiny::new(Family::Qwen2));
    folder.ok("lora --model model --train --data data --num-layers 2 --iters 1 --val-batches 0 --adapter-path trained");
    let parts = ["cannot fuse trained into qwen", "it was trained on a llama model, this is a qwen2"];
    folder.fails(1, "fuse --model qwen --adapter-path trained --save-path fused", &parts);
    folder.fails(1, "generate --model qwen --adapter-path trained", &["it was trained on a llama model"]);
    // The same weights before they were packed are another precision.
    folder.model("plain", &llama(None));
    let run = folder.ok("fuse --model plain --adapter-path trained --save-path fused");
    assert!(run.err.contains("warning: the adapter was trained on model in another precision"), "{run:?}");

    folder.copy("adapter", "cut");
    truncate(&folder.path("cut/adapters.safetensors"), 3000);
    folder.fails(1, &FUSE.replace("path adapter", "path cut"), &["cut/adapters.safetensors: damaged"]);
    folder.write("cut/adapter_config.json", r#"{"num_layers": 2, "lora_parameters": {"rank": 4}}"#);
    let parts = ["cut/adapter_config.json: field `lora_parameters.scale`: expected a number, found nothing"];
    folder.fails(1, &FUSE.replace("path adapter", "path cut"), &parts);
}

#[test]
fn an_interrupted_fuse_leaves_nothing() {
    let folder = Folder::new();
    // Large enough to be in the midst of it when the signal comes.
    let tiny = Tiny { layers: 30, hidden: 256, ffn: 1024, heads: 16, kv_heads: 16, ..llama(Some((4, 32))) };
    folder.model("model", &tiny);
    let adapter = tiny_adapter(&folder.path("model"), &tiny, true, 4, 9);
    std::fs::rename(adapter.keep(), folder.path("adapter")).unwrap();
    let running = folder.start(FUSE);
    while !folder.names(".").iter().any(|name| name.starts_with(".fused.part-")) {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    running.interrupt();
    let run = running.end();
    assert_eq!(run.status, Some(130), "{run:?}");
    assert!(
        run.err.contains("Interrupted: stopped before the fused model was complete; nothing was written")
    );
    assert_eq!(folder.names("."), ["adapter", "data", "model"]);
}
