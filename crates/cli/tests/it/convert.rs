//! `graft convert`: nothing is overwritten, and wrong options are said first.

use crate::setting::{Folder, llama};

#[test]
fn a_model_is_packed_and_made_dense_again() {
    let folder = Folder::new();
    folder.model("model", &llama(None));
    let run = folder.ok("convert --hf-path model -q --q-bits 8 --q-group-size 32");
    assert!(
        run.err.contains("packed 15 modules") && run.out.starts_with("mlx_model: 92480 parameters"),
        "{run:?}"
    );
    folder.ok("convert --hf-path mlx_model --mlx-path dense -d --dtype bfloat16");
    assert_eq!(folder.json("dense/config.json")["torch_dtype"], "bfloat16");
    folder.ok("generate --model dense --max-tokens 1");
    folder.ok("quantize --model model --mlx-path three --q-bits 3 --q-group-size 64");
    assert_eq!(folder.json("three/config.json")["quantization"]["bits"], 3);
}

#[test]
fn wrong_options_write_nothing() {
    let folder = Folder::new();
    folder.model("model", &llama(None));
    folder.copy("model", "other");
    let config = String::from_utf8(folder.read("other/config.json")).unwrap();
    folder.write("other/config.json", &config.replace("\"llama\"", "\"qwen3_moe\""));
    for (status, flags, part) in [
        (2, "", "--hf-path (or --model) is required"),
        (2, "--hf-path model --mlx-path data", "--mlx-path data exists already"),
        (2, "--hf-path model -q -d", "--quantize and --dequantize exclude each other"),
        (2, "--hf-path model -q --q-bits 7", "7 bits in groups of 64 do not exist"),
        (2, "--hf-path model -q --q-mode mxfp4 --q-bits 8", "mxfp4 has 4 bits in groups of 32, not 8"),
        (2, "--hf-path model -q --q-mode nvfp4 --quant-predicate mixed_3_6", "--q-mode nvfp4 has one"),
        (2, "--hf-path model --upload-repo a/b", "--upload-repo is not supported by graft convert"),
        (
            1,
            "--hf-path other -q",
            "model_type \"qwen3_moe\" is not supported; supported are llama, mistral, qwen2, qwen3",
        ),
        (1, "--hf-path gone", "there is no model directory `gone`"),
        (1, "--hf-path gone.gguf", "there is no file gone.gguf"),
        (1, "--hf-path data", "data: config.json is missing"),
    ] {
        folder.fails(status, &format!("convert {flags}"), &[part]);
    }
}
