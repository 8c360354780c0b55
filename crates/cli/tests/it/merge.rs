//! `graft merge` and `graft adapter`: what they write and say, that the result runs, and what they refuse.

use graft_testkit::tiny_adapter;
use serde_json::json;

use crate::setting::{Folder, llama, row};

/// A folder with a packed model, a LoRA adapter of rank 4 in `adapter` and a DoRA one of rank 6 in `dora`.
fn folder() -> Folder {
    let folder = Folder::with_model();
    let dora = tiny_adapter(&folder.path("model"), &llama(Some((4, 32))), true, 6, 3);
    std::fs::rename(dora.keep(), folder.path("dora")).unwrap();
    folder
}

#[test]
fn every_method_writes_an_adapter_that_runs() {
    let folder = folder();
    for (flags, said) in [
        ("--method linear", "Merged 2 adapters (linear, dora) in 14 modules\nRank: 10\n"),
        ("--method task_arithmetic", "(linear, dora)"),
        ("--method cat", "(cat, dora)"),
        ("--method svd --rank 5", "(svd, dora) in 14 modules\nRank: 5\n"),
        ("--method svd --energy 0.5", "Rank: "),
        ("--method ties --density 0.5", "(ties, dora)"),
        ("--method dare_linear --density 0.5 --seed 3", "(dare_linear, dora)"),
        ("--method dare_ties --density 0.5 --normalize false", "(dare_ties, dora)"),
        ("--method magnitude_prune --density 0.5 --lambda 0.5", "(magnitude_prune, dora)"),
        ("--method slerp --t 0.3", "(slerp, dora)"),
    ] {
        let run = folder.ok(&format!(
            "merge {flags} --adapter adapter=0.7 --adapter dora --model model --save-path merged"
        ));
        assert!(run.out.contains(said), "{flags}: {run:?}");
        assert!(run.out.ends_with("Saved the adapter and its merge_report.json to merged.\n"), "{run:?}");
        folder.ok("generate --model model --adapter-path merged --max-tokens 1");
        let config = folder.json("merged/adapter_config.json");
        assert_eq!(config["graft"]["provenance"]["inputs"][0]["name"], "adapter");
        assert_eq!(config["graft"]["base"]["lineage"], "model");
        std::fs::remove_dir_all(folder.path("merged")).unwrap();
    }
    folder.ok("merge --method linear --adapter adapter --adapter dora --model model --save-path merged");
    folder.ok("fuse --model model --adapter-path merged --save-path fused");
    assert_eq!(folder.json("merged/merge_report.json")["adapters"], json!(["adapter", "dora"]));
}

#[test]
fn a_recipe_says_what_flags_say() {
    let folder = folder();
    folder.write(
        "recipe.yaml",
        "merge_method: ties\nbase_model: model\nmodels:\n  - model: adapter\n    parameters:\n      weight: 0.7\n      \
         density: 0.5\n  - model: dora\n    parameters: {density: 0.25}\nparameters:\n  weight: 1\n  rank: 8\n  seed: 4\n",
    );
    folder.ok("merge --recipe recipe.yaml --save-path one");
    let recipe = folder.json("one/adapter_config.json")["graft"]["provenance"]["recipe"].clone();
    assert_eq!(
        recipe["adapters"],
        json!([{"weight": 0.7, "density": 0.5}, {"weight": 1.0, "density": 0.25}])
    );
    assert_eq!((&recipe["size"], &recipe["seed"]), (&json!({"rank": 8}), &json!(4)));
    // A flag goes before the file.
    folder.ok("merge --recipe recipe.yaml --density 0.5 --save-path two");
    folder.ok("merge --method ties --adapter adapter=0.7 --adapter dora --density 0.5 --rank 8 --seed 4 --model model --save-path three");
    assert!(folder.read("two/adapters.safetensors") == folder.read("three/adapters.safetensors"));
    assert!(folder.read("one/adapters.safetensors") != folder.read("two/adapters.safetensors"));
    folder.write("wrong.yaml", "merge_method: ties\nmodels: []\nslices: []\n");
    folder.fails(2, "merge --recipe wrong.yaml", &["wrong.yaml: unknown field `slices`"]);
    folder.write("wrong.yaml", "merge_method: breadcrumbs\nmodels: [{model: adapter}]\n");
    folder.fails(2, "merge --recipe wrong.yaml", &["merge_method breadcrumbs: expected one of linear, "]);
}

#[test]
fn parents_and_merge_are_scored_on_each_task() {
    let folder = folder();
    folder.ok("lora --model model --train --data data --num-layers 2 --iters 1 --val-batches 0 --adapter-path trained");
    let flags = "--max-tokens 3 --metric contains --save-path merged --eval";
    // One knows its data; for the other it is said.
    folder.fails(
        2,
        &format!("merge --method linear --adapter trained --adapter adapter --model model {flags}"),
        &["--eval: adapter does not say which data"],
    );
    let run = folder.ok(&format!(
        "merge --method linear --adapter trained --adapter adapter --model model {flags} --eval-data data --eval-data \
         data/test.jsonl --json"
    ));
    let report: serde_json::Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!(report, folder.json("merged/merge_report.json"));
    let tasks = report["eval"].as_array().unwrap();
    assert_eq!(tasks.len(), 2);
    let names: Vec<&str> =
        tasks[1]["scores"].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["base", "trained", "adapter", "merged"]);
    assert_eq!((&tasks[1]["parent"], &tasks[0]["rows"]), (&json!("adapter"), &json!(8)));
    folder.fails(
        2,
        "merge --method linear --adapter adapter --eval",
        &["--eval needs the base: give --model"],
    );
}

#[test]
fn what_cannot_be_merged_is_refused_by_name() {
    let folder = folder();
    folder.fails(2, "merge", &["give --method and --adapter, or --recipe FILE"]);
    folder.fails(2, "merge --method linear", &["there is nothing to merge"]);
    folder.fails(
        2,
        "merge --method linear --adapter adapter=x",
        &["--adapter adapter=x: expected a finite number"],
    );
    folder.fails(1, "merge --method linear --adapter gone", &["there is no adapter directory `gone`"]);
    folder.fails(
        1,
        "merge --method linear --adapter adapter --adapter dora",
        &["dora is a DoRA adapter", "(--model)"],
    );
    folder.fails(1, "merge --method linear --adapter adapter --save-path data", &["data exists already"]);
    folder.fails(1, "merge --method svd --adapter adapter", &["svd: expected a rank or an energy"]);
    folder.model("wide", &graft_testkit::Tiny { hidden: 128, ..llama(None) });
    let parts = ["cannot merge adapter", "adapter: wide: the adapter does not fit:", "weight is (64, 128)"];
    folder.fails(1, "merge --method linear --adapter adapter --model wide", &parts);
}

#[test]
fn an_interrupted_merge_leaves_nothing() {
    let folder = Folder::new();
    let tiny = graft_testkit::Tiny { layers: 12, hidden: 256, ffn: 1024, ..llama(Some((4, 32))) };
    folder.model("model", &tiny);
    let adapter = tiny_adapter(&folder.path("model"), &tiny, true, 4, 9);
    std::fs::rename(adapter.keep(), folder.path("adapter")).unwrap();
    let command = "merge --method ties --adapter adapter --adapter adapter --density 0.5 --rank 256 --model model --save-path merged";
    for signal in ["INT", "KILL"] {
        let running = folder.start(command);
        while !folder.names(".").iter().any(|name| name.starts_with(".merged.part-")) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        if signal == "INT" {
            running.interrupt();
            let run = running.end();
            assert_eq!(run.status, Some(130), "{run:?}");
            assert!(run.err.contains("Interrupted: stopped before the adapter was complete"), "{run:?}");
            assert_eq!(folder.names("."), ["adapter", "data", "model"]);
        } else {
            // Dropped, it is killed: what it had begun has a name of its own, and the target is not there.
            drop(running);
            assert!(!folder.path("merged").exists());
        }
    }
}

#[test]
fn a_full_disk_names_what_was_to_be_written() {
    let folder = folder();
    let graft = env!("CARGO_BIN_EXE_graft");
    for (arguments, target) in [
        ("merge --method linear --adapter adapter --save-path new", "new"),
        ("adapter resize adapter --rank 2 --save-path new", "new"),
        ("adapter export adapter --save-path new", "new"),
        ("export gguf --model model --out new.gguf", "new.gguf"),
    ] {
        // A limit of the size of files is as good as a full disk: 8 blocks of 512 bytes.
        let line = format!("trap '' XFSZ; ulimit -f 8; exec {graft} {arguments}");
        let mut command = std::process::Command::new("sh");
        let output = command.args(["-c", &line]).current_dir(folder.path(".")).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments}: {error}");
        let wanted = format!("{target}: File too large");
        for part in [wanted.as_str(), " bytes; nothing was left behind: make room"] {
            assert!(error.contains(part), "{arguments}: {part:?} is not in {error}");
        }
        assert!(!error.contains(".part-") && !error.contains(".tmp"), "{error}");
        assert_eq!(folder.names("."), ["adapter", "data", "dora", "model"]);
    }
}

#[test]
fn peft_and_back_is_the_same() {
    let folder = folder();
    for name in ["adapter", "dora"] {
        folder.ok(&format!("adapter export {name} --save-path peft-{name}"));
        assert_eq!(
            folder.names(&format!("peft-{name}")),
            ["adapter_config.json", "adapter_model.safetensors"]
        );
        folder.ok(&format!("adapter import peft-{name} --save-path back-{name}"));
        assert!(
            folder.json(&format!("{name}/adapter_config.json"))
                == folder.json(&format!("back-{name}/adapter_config.json"))
        );
        let said = |adapter: &str| {
            folder.ok(&format!("generate --model model --adapter-path {adapter} --max-tokens 8")).out
        };
        assert_eq!(said(name).lines().nth(1), said(&format!("peft-{name}")).lines().nth(1));
    }
    folder.ok("adapter import peft-adapter --model model --save-path checked");
    let config = folder.json("checked/adapter_config.json");
    assert_eq!(config["graft"]["base"]["lineage"], "model");
    assert_eq!(config["graft"]["provenance"]["operation"], "adapter import");
    folder.fails(1, "adapter import adapter --save-path x", &["adapter_model.safetensors is missing"]);
    folder.fails(1, "adapter export adapter --save-path dora", &["dora exists already"]);
    folder.model("wide", &graft_testkit::Tiny { hidden: 128, ..llama(None) });
    folder.fails(
        1,
        "adapter import peft-adapter --model wide --save-path x",
        &["cannot import peft-adapter for wide", "weight is (64, 128)"],
    );
}

#[test]
fn inspect_extract_and_resize_say_what_there_is() {
    let folder = folder();
    let run = folder.ok("adapter inspect dora");
    let parts = [
        "dora adapter of 14 modules",
        "it does not say which base",
        "effective rank",
        "model.layers.1.mlp.up_proj",
    ];
    for part in parts {
        assert!(run.out.contains(part), "{part:?} is not in {run:?}");
    }
    let run = folder.ok("adapter inspect dora --json");
    let report: serde_json::Value = serde_json::from_str(&run.out).unwrap();
    let layer = &report["layers"][0];
    let spectrum: Vec<f64> =
        layer["spectrum"].as_array().unwrap().iter().map(|s| s.as_f64().unwrap()).collect();
    let norm = spectrum.iter().map(|s| s * s).sum::<f64>().sqrt();
    assert!(spectrum.len() == 6 && (norm - layer["norm"].as_f64().unwrap()).abs() < 1e-9);
    let effective = layer["effective_rank"].as_f64().unwrap();
    assert!(effective > 3.0 && effective <= 6.0, "{effective}");

    let run = folder.ok("adapter resize adapter --rank 2 --save-path small");
    assert!(run.out.starts_with("Resized adapter (svd, lora) in 14 modules\nRank: 2\n"), "{run:?}");
    folder.ok("generate --model model --adapter-path small --max-tokens 1");
    let run = folder.ok("adapter resize dora --rank 2 --save-path small-dora");
    assert!(run.out.starts_with("Resized dora (svd, dora) in 14 modules\nRank: 2\n"), "{run:?}");
    let run = folder.ok("adapter inspect small");
    assert!(run.out.contains("made by adapter resize of adapter"), "{run:?}");
    folder.ok("fuse --model model --adapter-path adapter --save-path tuned --policy dense");
    let run = folder.ok("adapter extract --model model --tuned tuned --rank 4 --save-path taken");
    assert!(
        run.out.starts_with("Extracted tuned from model (svd, lora) in 14 modules\nRank: 4\n"),
        "{run:?}"
    );
    assert!(run.err.contains("warning: model and tuned are stored in other precisions"), "{run:?}");
    folder.ok("generate --model model --adapter-path taken --max-tokens 1");
    folder.fails(2, "adapter resize adapter --save-path x", &["required arguments were not provided"]);
    folder.fails(2, "adapter resize adapter --rank 2 --energy 0.5 --save-path x", &["cannot be used with"]);
    folder.fails(
        1,
        "adapter extract --model model --tuned model --rank 4 --save-path x",
        &["without a changed matrix"],
    );
    let report: serde_json::Value = serde_json::from_slice(&folder.read("taken/merge_report.json")).unwrap();
    assert_eq!((&report["kind"], &report["base"]), (&json!("extract"), &json!("model")));
}

#[test]
fn extract_says_how_far_the_answers_are() {
    let folder = folder();
    folder.ok("fuse --model model --adapter-path adapter --save-path tuned --policy dense --verify layers");
    let rows: Vec<_> = (0..20).map(|i| row(&format!("what is {i}?"), &format!("{i} and more"))).collect();
    folder.rows("rows.jsonl", &rows);
    let of = |name: &str, rank: i32, more: &str| {
        let run = folder.ok(&format!(
            "adapter extract --model model --tuned tuned --rank {rank} --save-path {name} {more}"
        ));
        (run, folder.json(&format!("{name}/merge_report.json"))["model"].clone())
    };
    let number = |of: &serde_json::Value| of.as_f64().unwrap();
    let kl = |model: &serde_json::Value, of: &str| number(&model[of]["kl"]["value"]);
    for data in ["", "--data rows.jsonl"] {
        let name = |rank: i32| format!("{rank}-{}", data.len());
        let (run, whole) = of(&name(4), 4, data);
        let (_, part) = of(&name(1), 1, data);
        // The update has rank 4: with that the adapter does what the model does, with less it does a part of it.
        let base = kl(&whole, "base");
        assert!(base > 1e-6 && kl(&whole, "adapter") < 1e-3 * base, "{whole}");
        assert!(kl(&part, "adapter") > 10.0 * kl(&whole, "adapter"), "{part}, {whole}");
        assert!(number(&whole["kept"]["value"]) > number(&part["kept"]["value"]), "{part}, {whole}");
        assert_eq!(number(&part["base"]["kl"]["value"]), base, "the same texts each time");
        assert!(run.out.contains("KL(tuned || base with the adapter)"), "{run:?}");
        assert_eq!(whole["rows"], 16);
        let named = whole["data"].as_str().unwrap();
        assert!(
            if data.is_empty() { named == "drawn from tuned" } else { named.ends_with("rows.jsonl") },
            "{named}"
        );
    }
    let (_, model) = of("weights", 4, "--verify layers");
    assert!(model.is_null());
    folder.fails(
        2,
        "adapter extract --model model --tuned tuned --rank 2 --save-path x --data nowhere",
        &["--data nowhere"],
    );
}
