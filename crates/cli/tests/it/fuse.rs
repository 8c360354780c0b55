//! `graft fuse`: what it says, replaces and refuses.

use graft_testkit::{Family, Tiny, tiny_adapter};
use serde_json::json;

use crate::setting::{Folder, llama, truncate};

const FUSE: &str = "fuse --model model --adapter-path adapter --save-path fused";

#[test]
fn policies_say_what_they_do_and_replace_what_they_did() {
    let folder = Folder::with_model();
    for (flags, form, warns) in [
        ("", "14 of 4 bits, groups of 32 -> 8 bits, groups of 32", false),
        ("--policy raise", "14 of 4 bits, groups of 32 -> 8 bits, groups of 32", false),
        ("--policy dense", "14 of 4 bits, groups of 32 -> float32", false),
        ("--policy same", "14 of 4 bits, groups of 32 -> 4 bits, groups of 32", true),
        ("--dequantize", "14 of 4 bits, groups of 32 -> float32", false),
    ] {
        let run = folder.ok(&format!("{FUSE} {flags}"));
        assert!(run.out.starts_with("Fused 14 weights of model (lora, --policy "), "{run:?}");
        for part in [form, "\nSize: 70.4 kB -> ", " of it kept, with an error of ", "to fused.\n"] {
            assert!(run.out.contains(part), "{flags}: {part:?} is not in {run:?}");
        }
        assert_eq!(
            run.err.contains("warning: 14 packed weights were rounded to the bits they had"),
            warns,
            "{run:?}"
        );
        assert_eq!(folder.names("."), ["adapter", "data", "fused", "model"]);
        let packed = folder.json("fused/config.json").get("quantization").is_some();
        assert_eq!(packed, flags != "--dequantize");
    }
    let report = folder.json("fused/fuse_report.json");
    assert_eq!((&report["policy"], &report["dequantize"]), (&json!("dense"), &json!(true)));
    folder.ok("generate --model fused --max-tokens 1");
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
    folder.fails(1, &FUSE.replace("fused", "adapter"), &["adapter exists already"]);
    folder.fails(1, &FUSE.replace("fused", "model/config.json"), &["it is no directory"]);
    folder.fails(1, &FUSE.replace("fused", "model"), &["model is the base itself"]);
    folder.fails(1, &FUSE.replace("fused", "./model/../model"), &["is the base itself"]);
    folder.fails(2, &format!("{FUSE} --dequantize --policy raise"), &["leave out --policy"]);
    folder.fails(2, &format!("{FUSE} --policy fold"), &["invalid value 'fold' for '--policy"]);
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
