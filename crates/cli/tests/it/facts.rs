//! `graft inspect` and `graft doctor`: facts for people and as JSON.

use serde_json::Value;

use crate::setting::{Folder, truncate};

#[test]
fn inspect_tells_models_from_adapters() {
    let folder = Folder::with_model();
    let model = folder.ok("inspect model").out;
    for part in
        ["kind            model", "model_type      llama", "runs            yes", "4 bits, groups of 32"]
    {
        assert!(model.contains(part), "{part:?} is not in {model}");
    }
    let json: Value = serde_json::from_str(&folder.ok("inspect adapter --json").out).unwrap();
    assert_eq!((&json["kind"], &json["rank"], &json["modules"]), (&"adapter".into(), &4.into(), &14.into()));
    folder.fails(1, "inspect gone", &["there is no model directory `gone`"]);
    folder.fails(1, "inspect data", &["data holds neither config.json (a model) nor adapter_config.json"]);
    truncate(&folder.path("model/model.safetensors"), 20_000);
    folder.fails(1, "inspect model", &["model/model.safetensors: damaged"]);
}

#[test]
fn doctor_says_what_this_machine_runs_on() {
    let folder = Folder::new();
    let json: Value = serde_json::from_str(&folder.ok("doctor --json").out).unwrap();
    assert!(json["mlx"].is_string() && json["cores"].as_u64() >= Some(1), "{json}");
    assert!(json["blas_gflops"].as_f64() > Some(0.0), "{json}");
    let text = folder.ok("doctor").out;
    assert!(text.contains("BLAS under MLX") && text.contains("memory  "), "{text}");
}
