//! What an adapter does not touch stays as it is, byte for byte; and no more is in memory than a few tensors.

use std::path::Path;

use graft_adapters::AdapterSet;
use graft_merge::Policy;
use graft_ops::ffi::memory;
use graft_ops::{Array, Dtype as ArrayDtype};
use graft_testkit::{Dtype, Family, Tiny, tiny_adapter, tiny_model};
use serde_json::json;

use crate::support::{
    Tensors, adapter_dir, arrays, every_model, fused, fused_with, load, names, options, read_json, tensors,
    wave, write_tensors,
};

/// The adapter of `dir` with B = 0 and, for DoRA, m the row norms of the base.
fn zeroed(base: &Path, adapter: &Path) -> AdapterSet {
    let model = load(base);
    let mut set = AdapterSet::load(adapter).unwrap();
    for (path, adapter) in &mut set.adapters {
        adapter.b = adapter.b.multiply(Array::from_f32(0.0)).unwrap();
        if adapter.magnitude.is_some() {
            // By another way than the fuse's own, so that the two differ by rounding.
            let w = model.target(path).unwrap().weight.dequantize(ArrayDtype::Float32).unwrap();
            let norms = w.square().unwrap().transpose().unwrap().sum_axis(0, false).unwrap();
            adapter.magnitude = Some(norms.sqrt().unwrap().multiply(Array::from_f32(1.0 + 9e-7)).unwrap());
        }
    }
    set
}

#[test]
fn an_adapter_of_nothing_changes_no_byte() {
    arrays(|| {
        for (i, tiny) in every_model().enumerate() {
            let tiny = Tiny { dtype: [Dtype::F32, Dtype::Bf16][i % 2], ..tiny };
            let base = tiny_model(&tiny);
            let before = tensors(base.path());
            for dora in [false, true] {
                let adapter = tiny_adapter(base.path(), &tiny, dora, 4, 9);
                let set = zeroed(base.path(), adapter.path());
                let policies = [Policy::Raise, Policy::Dense, Policy::Same, Policy::Fold];
                for policy in policies.into_iter().take(if tiny.packed.is_some() && dora { 4 } else { 1 }) {
                    if policy == Policy::Fold && tiny.mode != "affine" {
                        let e = fused_with(base.path(), &set, &options(policy)).err().unwrap().to_string();
                        assert!(e.contains(tiny.mode) && e.contains("choose raise, same or dense"), "{e}");
                        continue;
                    }
                    let done = fused_with(base.path(), &set, &options(policy)).unwrap();
                    assert!(tensors(&done.dir) == before, "{tiny:?}, dora {dora}, {policy:?}");
                    let mut config = read_json(&done.dir.join("config.json"));
                    assert_eq!(config["graft"]["provenance"]["operation"], "fuse");
                    config.as_object_mut().unwrap().remove("graft");
                    assert_eq!(config, read_json(&base.path().join("config.json")));
                    let totals = &done.report.totals;
                    assert_eq!((totals.changed, totals.unchanged), (0, 14));
                    assert_eq!((totals.relative_error, totals.kept), (0.0, 1.0));
                    assert_eq!(done.warnings, Vec::<String>::new());
                }
            }
        }
    });
}

/// An adapter on two of the fourteen linears.
fn on_two() -> Tensors {
    let (q, down) = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj");
    Tensors::from([
        (format!("{q}.lora_a"), wave(&[64, 4], 0.1)),
        (format!("{q}.lora_b"), wave(&[4, 64], 0.2)),
        (format!("{down}.lora_a"), wave(&[128, 4], 0.3)),
        (format!("{down}.lora_b"), wave(&[4, 64], 0.4)),
    ])
}

#[test]
fn untouched_tensors_and_files_are_copied() {
    arrays(|| {
        for tiny in every_model() {
            let tiny = Tiny { dtype: Dtype::F16, ..tiny };
            let base = tiny_model(&tiny);
            std::fs::write(base.path().join("chat_template.jinja"), "{{ messages }}").unwrap();
            std::fs::write(base.path().join("adapter_config.json"), "{}").unwrap();
            let adapter = adapter_dir("lora", &on_two());
            let touched = ["model.layers.0.self_attn.q_proj.", "model.layers.1.mlp.down_proj."];
            let policies = [Policy::Raise, Policy::Dense, Policy::Same];
            for policy in policies.into_iter().take(if tiny.packed.is_some() { 3 } else { 1 }) {
                let done = fused(base.path(), adapter.path(), policy);
                let (old, new) = (tensors(base.path()), tensors(&done.dir));
                let mut changed = 0;
                for (name, tensor) in &old {
                    if touched.iter().any(|path| name.starts_with(path)) {
                        changed += usize::from(new.get(name) != Some(tensor));
                    } else {
                        assert_eq!(new.get(name), Some(tensor), "{name}");
                    }
                }
                assert!(changed >= 2, "{changed}");
                assert_eq!(done.report.totals.tensors, new.len());
                let bytes: usize = new.values().map(|t| t.data.len()).sum();
                assert_eq!(done.report.totals.bytes, bytes as u64);
                for file in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
                    let read = |dir: &Path| std::fs::read(dir.join(file)).unwrap();
                    assert_eq!(read(&done.dir), read(base.path()));
                }
                assert_eq!(
                    names(&done.dir),
                    [
                        "chat_template.jinja",
                        "config.json",
                        "fuse_report.json",
                        "generation_config.json",
                        "model.safetensors",
                        "model.safetensors.index.json",
                        "tokenizer.json",
                        "tokenizer_config.json"
                    ]
                );
                let report = read_json(&done.dir.join("fuse_report.json"));
                assert_eq!((&report["schema"], &report["kind"]), (&json!(1), &json!("fuse")));
                assert_eq!(
                    (&report["base"], &report["adapter"]),
                    (&json!("the base"), &json!("the adapter"))
                );
                assert_eq!(report["layers"].as_array().unwrap().len(), 2);
                load(&done.dir);
            }
        }
    });
}

#[test]
fn a_base_in_several_files_gives_the_same_model() {
    arrays(|| {
        let tiny = Tiny { packed: Some((4, 32)), ..Tiny::new(Family::Mistral) };
        let (base, sharded) = (tiny_model(&tiny), tiny_model(&tiny));
        // The parts of one packed weight may stand in different files.
        let file = sharded.path().join("model.safetensors");
        let (mut first, mut second, mut map) = (Tensors::new(), Tensors::new(), serde_json::Map::new());
        for (i, (name, tensor)) in tensors(&file.with_file_name("")).into_iter().enumerate() {
            let part = if i % 2 == 0 { &mut first } else { &mut second };
            map.insert(name.clone(), format!("model-0000{}-of-00002.safetensors", i % 2 + 1).into());
            part.insert(name, tensor);
        }
        std::fs::remove_file(&file).unwrap();
        write_tensors(&sharded.path().join("model-00001-of-00002.safetensors"), &first);
        write_tensors(&sharded.path().join("model-00002-of-00002.safetensors"), &second);
        let index = json!({"metadata": {}, "weight_map": map});
        std::fs::write(sharded.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        let adapter = tiny_adapter(base.path(), &tiny, true, 4, 9);
        let (whole, parts) = (
            fused(base.path(), adapter.path(), Policy::Raise),
            fused(sharded.path(), adapter.path(), Policy::Raise),
        );
        assert!(tensors(&whole.dir) == tensors(&parts.dir));
        assert_eq!(
            (&whole.report.layers, &whole.report.totals),
            (&parts.report.layers, &parts.report.totals)
        );
    });
}

#[test]
fn memory_does_not_grow_with_the_layers() {
    arrays(|| {
        let peak = |layers: usize| {
            let tiny =
                Tiny { layers, hidden: 128, ffn: 1024, packed: Some((4, 32)), ..Tiny::new(Family::Llama) };
            let base = tiny_model(&tiny);
            let adapter = tiny_adapter(base.path(), &tiny, true, 1, 9);
            let set = AdapterSet::load(adapter.path()).unwrap();
            for adapter in set.adapters.values() {
                mlx_rs::transforms::eval(adapter.arrays()).unwrap();
            }
            memory::clear_cache().unwrap();
            memory::reset_peak_memory().unwrap();
            let before = memory::active_memory().unwrap();
            fused_with(base.path(), &set, &options(Policy::Raise)).unwrap();
            memory::peak_memory().unwrap() - before
        };
        // MLX frees on a thread of its own, a little later or earlier; the weights of 14 layers are as much again as the
        // peak of two.
        let (two, many) = (peak(2), peak(16));
        assert!(many <= two + two / 3, "{two} bytes for 2 layers, {many} for 16");
    });
}
