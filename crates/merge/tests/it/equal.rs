//! The fused network computes what the base with its adapter computes.

use graft_adapters::Route;
use graft_merge::Policy;
use graft_testkit::tolerance::F32_DEEP;
use graft_testkit::{Family, Tiny, assert_close, tiny_adapter, tiny_model};

use graft_quant::{Tensor, read_safetensors};
use serde_json::json;

use crate::support::{
    Tensors, adapter_dir, arrays, every_model, floats, fused, fused_with, gap, load, logits, options,
    read_json, tensors, unfused_logits, wave, write_tensors,
};

/// The error of the logits over their change by the adapter, in units of the reported error of the weights. The tiny
/// networks pass an error on about as they pass the update on; the worst of some thousand logits is a few times the mean.
const WORST: f64 = 4.0;

#[test]
fn dense_computes_what_the_adapter_does_and_raise_and_same_within_what_they_report() {
    arrays(|| {
        for tiny in every_model() {
            let base = tiny_model(&tiny);
            let plain = logits(&load(base.path()), &Route::Base);
            for dora in [false, true] {
                let adapter = tiny_adapter(base.path(), &tiny, dora, 4, 9);
                let wanted = unfused_logits(base.path(), adapter.path());
                let change = gap(&wanted, &plain);
                let policies = match (tiny.packed, tiny.family) {
                    (None, _) => vec![Policy::Raise],
                    (_, Family::Llama) => vec![Policy::Dense, Policy::Raise, Policy::Same],
                    _ => vec![Policy::Dense, Policy::Raise],
                };
                for policy in policies {
                    let case = format!("{tiny:?}, dora {dora}, {policy:?}");
                    let done = fused(base.path(), adapter.path(), policy);
                    let found = logits(&load(&done.dir), &Route::Base);
                    let error = done.report.totals.relative_error;
                    if tiny.packed.is_none() || policy == Policy::Dense {
                        assert!(error < 1e-5, "{case}: {error}");
                        assert_close(&found, &wanted, F32_DEEP);
                        assert!(change > 100.0 * gap(&found, &wanted), "{case}: the adapter does nothing");
                    } else {
                        let off = gap(&found, &wanted) / change;
                        assert!(
                            off < WORST * error,
                            "{case}: logits off by {off} of their change, weights {error}"
                        );
                    }
                    let layers = &done.report.layers;
                    assert_eq!(layers.len(), 14, "{case}");
                    let to = match (tiny.packed, policy) {
                        (None, _) | (_, Policy::Dense) => "float32".to_owned(),
                        (Some((_, group)), Policy::Raise) => format!("8 bits, groups of {}", group.max(32)),
                        (Some((bits, group)), Policy::Same | Policy::Fold) => {
                            let mode = if tiny.mode == "affine" { "" } else { tiny.mode };
                            format!(
                                "{mode}{}{bits} bits, groups of {group}",
                                if mode.is_empty() { "" } else { ", " }
                            )
                        }
                    };
                    assert!(layers.iter().all(|l| l.to == to), "{case}: {to}, {layers:?}");
                }
            }
        }
    });
}

#[test]
fn raise_loses_a_small_part_where_same_loses_most() {
    arrays(|| {
        // The update is about a tenth of the 4-bit steps.
        let tiny = Tiny { packed: Some((4, 32)), ..Tiny::new(Family::Qwen3) };
        let base = tiny_model(&tiny);
        let mut update = Tensors::new();
        for (name, inputs, outputs) in tiny.linears() {
            for layer in 0..tiny.layers {
                let path = format!("model.layers.{layer}.{name}");
                update.insert(format!("{path}.lora_a"), wave(&[inputs, 4], 0.7));
                let mut b = wave(&[4, outputs], 0.3);
                let small = b.to_f32().unwrap().iter().map(|x| x * 0.006).collect::<Vec<_>>();
                b.data = small.iter().flat_map(|v| v.to_le_bytes()).collect();
                update.insert(format!("{path}.lora_b"), b);
            }
        }
        let adapter = adapter_dir("lora", &update);
        let of = |policy| fused(base.path(), adapter.path(), policy);
        let (raise, same) = (of(Policy::Raise), of(Policy::Same));
        let (few, most) = (raise.report.totals, same.report.totals);
        assert!(few.relative_error < 0.25 && few.kept > 0.93, "{few:?}");
        assert!(most.relative_error > 0.8 && most.kept < 0.4, "{most:?}");
        assert_eq!(few.base_bytes, most.base_bytes);
        assert!(few.bytes > most.bytes && most.bytes == most.base_bytes);
    });
}

#[test]
fn an_embedding_and_its_tied_head_an_untied_head_and_a_few_layers() {
    arrays(|| {
        for (tied, packed) in [(true, None), (true, Some((4, 32))), (false, None), (false, Some((3, 32)))] {
            let tiny = Tiny { tied, packed, ..Tiny::new(Family::Llama) };
            let base = tiny_model(&tiny);
            let down = "model.layers.1.mlp.down_proj";
            let mut update = Tensors::from([
                ("model.embed_tokens.lora_a".to_owned(), wave(&[288, 4], 0.1)),
                ("model.embed_tokens.lora_b".to_owned(), wave(&[4, 64], 0.2)),
                (format!("{down}.lora_a"), wave(&[128, 4], 0.3)),
                (format!("{down}.lora_b"), wave(&[4, 64], 0.4)),
            ]);
            if !tied {
                update.insert("lm_head.lora_a".into(), wave(&[64, 4], 0.5));
                update.insert("lm_head.lora_b".into(), wave(&[4, 288], 0.6));
            }
            let adapter = adapter_dir("lora", &update);
            let wanted = unfused_logits(base.path(), adapter.path());
            let done = fused(base.path(), adapter.path(), Policy::Dense);
            assert_close(&logits(&load(&done.dir), &Route::Base), &wanted, F32_DEEP);
            assert_eq!(done.report.totals.changed, if tied { 2 } else { 3 });
            if packed.is_some() {
                let block = &read_json(&done.dir.join("config.json"))["quantization"];
                assert_eq!((&block["model.embed_tokens"], &block[down]), (&false.into(), &false.into()));
                assert!(block.get("model.layers.0.mlp.down_proj").is_none());
            }
            if tied {
                let dora = adapter_dir("dora", &{
                    let mut update = update.clone();
                    update.insert("model.embed_tokens.m".into(), wave(&[288], 0.7));
                    update.insert(format!("{down}.m"), wave(&[64], 0.8));
                    update
                });
                let set = graft_adapters::AdapterSet::load(dora.path()).unwrap();
                let error = fused_with(base.path(), &set, &options(Policy::Raise)).err().unwrap().to_string();
                assert!(
                    error.contains("model.embed_tokens: DoRA on an embedding is not supported"),
                    "{error}"
                );
            }
        }
    });
}

#[test]
fn whole_weights_take_the_place_of_the_bases() {
    arrays(|| {
        for packed in [None, Some((4, 32))] {
            // Another model's last block, biases and norms too.
            let tiny = Tiny { packed, ..Tiny::new(Family::Qwen2) };
            let (base, other) =
                (tiny_model(&tiny), tiny_model(&Tiny { seed: 2, ..Tiny::new(Family::Qwen2) }));
            let mut weights = tensors(other.path());
            weights.retain(|name, _| name.starts_with("model.layers.1."));
            let adapter = adapter_dir("full", &weights);
            let set = graft_adapters::AdapterSet::load(adapter.path()).unwrap();
            for policy in [Policy::Dense, Policy::Raise] {
                let done = fused_with(base.path(), &set, &options(policy)).unwrap();
                assert_eq!(done.report.totals.changed, 7 + 3 + 2);
                assert!(done.report.layers.iter().any(|l| l.path == "model.layers.1.self_attn.q_proj.bias"));
                let found = tensors(&done.dir);
                for (name, tensor) in &weights {
                    let path = name.strip_suffix(".weight").unwrap_or(name);
                    if policy == Policy::Dense || !found.contains_key(&format!("{path}.scales")) {
                        assert_eq!(&found[name], tensor, "{name}");
                    }
                }
                // Eight bits of weights as wide as these are off by about 1/255 of six standard deviations.
                assert!(done.report.totals.relative_error < 0.01, "{:?}", done.report.totals);
                load(&done.dir);
            }
        }
    });
}

#[test]
fn pefts_form_of_an_adapter_fuses_to_the_same_bytes() {
    arrays(|| {
        let tiny = Tiny { packed: Some((4, 32)), ..Tiny::new(Family::Mistral) };
        let base = tiny_model(&tiny);
        for dora in [false, true] {
            let ours = tiny_adapter(base.path(), &tiny, dora, 4, 9);
            let theirs = tempfile::tempdir().unwrap();
            let mut renamed = Tensors::new();
            for (name, tensor) in read_safetensors(&ours.path().join("adapters.safetensors")).unwrap().0 {
                let (path, part) = name.rsplit_once('.').unwrap();
                let part = match part {
                    "lora_a" => "lora_A.weight",
                    "lora_b" => "lora_B.weight",
                    _ => "lora_magnitude_vector",
                };
                renamed.insert(format!("base_model.model.{path}.{part}"), transposed(&tensor));
            }
            write_tensors(&theirs.path().join("adapter_model.safetensors"), &renamed);
            // The testkit's s is 2.
            let config =
                json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_dora": dora});
            std::fs::write(theirs.path().join("adapter_config.json"), config.to_string()).unwrap();
            let of =
                |adapter: &tempfile::TempDir| tensors(&fused(base.path(), adapter.path(), Policy::Raise).dir);
            assert!(of(&ours) == of(&theirs), "dora {dora}");
        }
    });
}

/// A matrix of f32 turned; a vector as it is.
fn transposed(tensor: &Tensor) -> Tensor {
    let &[rows, columns] = &tensor.shape[..] else { return tensor.clone() };
    let values = tensor.to_f32().unwrap();
    let turned = (0..columns).flat_map(|c| (0..rows).map(move |r| r * columns + c)).map(|at| values[at]);
    floats(&turned.collect::<Vec<_>>(), &[columns, rows])
}

#[test]
fn dequantize_makes_the_whole_model_dense() {
    arrays(|| {
        let tiny = Tiny { packed: Some((4, 32)), tied: false, ..Tiny::new(Family::Qwen3) };
        let base = tiny_model(&tiny);
        let adapter = tiny_adapter(base.path(), &tiny, true, 4, 9);
        let set = graft_adapters::AdapterSet::load(adapter.path()).unwrap();
        let whole = graft_merge::FuseOptions { dequantize: true, ..options(Policy::Raise) };
        let done = fused_with(base.path(), &set, &whole).unwrap();
        assert_eq!((done.report.policy.as_str(), done.report.dequantize), ("dense", true));
        let config = read_json(&done.dir.join("config.json"));
        assert!(config.get("quantization").is_none() && config.get("quantization_config").is_none());
        assert!(
            tensors(&done.dir).keys().all(|name| !name.ends_with(".scales") && !name.ends_with(".biases"))
        );
        let wanted = unfused_logits(base.path(), adapter.path());
        assert_close(&logits(&load(&done.dir), &Route::Base), &wanted, F32_DEEP);
    });
}
