//! Equivalences of the adapter maths, and what the files of mlx-lm and PEFT may and may not hold.
#![allow(clippy::unwrap_used, reason = "tests: a panic is the report")]

use std::collections::BTreeMap;
use std::path::Path;

use graft_adapters::{Adapter, AdapterConfig, AdapterSet, Kind, Linear, Route, Site, Table, Target};
use graft_ops::row_norms;
use graft_ops::{Array, Dtype};
use graft_quant::{Grid, Tensor, Weight};
use graft_testkit::{mlx, wanted, wanted_form_is_mlx};
use serde_json::json;

/// Deterministic values in ±1 that no formula here could produce by itself.
fn wave(shape: &[i32], seed: f32) -> Array {
    let n: i32 = shape.iter().product();
    let values: Vec<f32> = (0..n).map(|i| ((i as f32 + 1.0) * (seed + 0.37)).sin()).collect();
    Array::from_slice(&values, shape)
}

fn values(a: &Array) -> Vec<f32> {
    a.as_dtype(Dtype::Float32).unwrap().to_vec_cast::<f32>().unwrap()
}

fn gap(a: &Array, b: &Array) -> f32 {
    assert_eq!(a.shape(), b.shape());
    values(a).iter().zip(values(b)).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

fn start() {
    if wanted_form_is_mlx() {
        graft_ops::set_form(graft_ops::Form::Mlx);
    }
    if let Some(level) = wanted("GRAFT_CPU") {
        graft_ops::set_cpu_level(level);
    }
}

/// W (96, 64) dense, and packed at every width.
fn weights() -> Vec<(String, Weight)> {
    let dense = wave(&[96, 64], 0.11);
    let mut all = vec![("dense".to_owned(), Weight::Dense(dense.clone()))];
    for bits in [2, 3, 4, 5, 6, 8] {
        let packed = graft_quant::round(&dense, Grid::affine(bits, 32), None).unwrap();
        all.push((format!("{bits} bits"), Weight::Packed(packed)));
    }
    all
}

fn adapter(dora: bool) -> Adapter {
    Adapter {
        a: wave(&[64, 4], 0.7),
        b: wave(&[4, 96], 0.3),
        scale: 0.5,
        magnitude: dora.then(|| wave(&[96], 0.9).abs().unwrap().add(Array::from_f32(0.5)).unwrap()),
    }
}

fn site(adapter: &Adapter, weight: &Weight) -> Site {
    Site {
        a: adapter.a.clone(),
        b: adapter.b.clone(),
        scale: adapter.scale,
        factor: adapter.factor(weight).unwrap(),
        dropout: None,
    }
}

#[test]
fn row_norms_equal_those_of_the_dense_sum() {
    mlx(|| {
        start();
        for (name, weight) in weights() {
            let adapter = adapter(false);
            let n0 = weight.row_norms_squared().unwrap();
            let n = row_norms(&adapter.a, &adapter.b, 0.5, weight.as_ref(), &n0).unwrap();
            let sum =
                weight.dequantize(Dtype::Float32).unwrap().add(adapter.delta(Kind::Linear).unwrap()).unwrap();
            let dense = sum.square().unwrap().sum_axis(1, false).unwrap().sqrt().unwrap();
            assert!(gap(&n, &dense) < 1e-4, "{name}: {}", gap(&n, &dense));
        }
    });
}

#[test]
fn unfused_equals_fused_and_leaves_the_bias_alone() {
    mlx(|| {
        start();
        let x = wave(&[5, 64], 0.23);
        for (name, weight) in weights() {
            for dora in [false, true] {
                let adapter = adapter(dora);
                let dense = weight.dequantize(Dtype::Float32).unwrap();
                let fused = adapter.fused(&dense, Kind::Linear).unwrap();
                let bias = wave(&[96], 0.41);
                let expected = x.matmul(fused.transpose().unwrap()).unwrap().add(&bias).unwrap();
                let table = Table { sites: [("p".to_owned(), site(&adapter, &weight))].into() };
                let linear = Linear { weight: weight.clone(), bias: Some(bias), path: "p".into() };
                let y = linear.forward(&x, &Route::Table(&table)).unwrap();
                assert!(gap(&y, &expected) < 2e-4, "{name}, dora {dora}: {}", gap(&y, &expected));
            }
        }
    });
}

#[test]
fn a_fresh_adapter_is_the_identity() {
    mlx(|| {
        start();
        let key = mlx_rs::random::key(3).unwrap();
        let x = wave(&[5, 64], 0.23);
        for (name, weight) in weights() {
            let base = weight.matmul(&x).unwrap();
            let n0 = weight.row_norms_squared().unwrap();
            let linear = Linear { weight, bias: None, path: "p".into() };
            for dora in [false, true] {
                let fresh =
                    Adapter::init(Kind::Linear, (96, 64), 8, 20.0, dora.then_some(&n0), &key).unwrap();
                assert!(values(&fresh.a).iter().any(|v| *v != 0.0));
                assert!(values(&fresh.a).iter().all(|v| v.abs() <= 1.0 / 8.0));
                let table = Table { sites: [("p".to_owned(), site(&fresh, &linear.weight))].into() };
                let y = linear.forward(&x, &Route::Table(&table)).unwrap();
                let limit = if dora { 1e-5 } else { 0.0 };
                assert!(gap(&y, &base) <= limit, "{name}, dora {dora}: {}", gap(&y, &base));
            }
        }
    });
}

#[test]
fn a_row_of_zeros_keeps_factor_one() {
    mlx(|| {
        let c = graft_ops::row_factor(
            &Array::from_slice(&[2.0f32, 3.0], &[2]),
            &Array::from_slice(&[0.0f32, 2.0], &[2]),
        );
        assert_eq!(values(&c.unwrap()), [1.0, 1.5]);
    });
}

fn write_peft(dir: &Path, extra: serde_json::Value, tensors: &BTreeMap<String, Tensor>) {
    let serde_json::Value::Object(extra) = extra else { panic!("options are an object, not {extra}") };
    let mut config =
        json!({"peft_type": "LORA", "r": 4, "lora_alpha": 2.0, "bias": "none", "use_rslora": false});
    config.as_object_mut().unwrap().extend(extra);
    std::fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    let bytes = graft_quant::safetensors_bytes(tensors, &BTreeMap::new()).unwrap();
    std::fs::write(dir.join("adapter_model.safetensors"), bytes).unwrap();
}

fn peft_tensors(adapter: &Adapter) -> BTreeMap<String, Tensor> {
    let at = |name: &str| format!("base_model.model.model.layers.0.self_attn.q_proj.{name}");
    let tensor = |a: &Array| Tensor::from_array(a).unwrap();
    let mut tensors = BTreeMap::from([
        (at("lora_A.weight"), tensor(&adapter.a.transpose().unwrap())),
        (at("lora_B.weight"), tensor(&adapter.b.transpose().unwrap())),
    ]);
    if let Some(m) = &adapter.magnitude {
        tensors.insert(at("lora_magnitude_vector"), tensor(m));
    }
    tensors
}

#[test]
fn peft_is_read_with_its_scalings_and_the_rest_refused_by_name() {
    mlx(|| {
        let path = "model.layers.0.self_attn.q_proj";
        for (extra, scale, dora) in [
            (json!({}), 0.5, false),
            (json!({"use_rslora": true}), 1.0, false),
            (json!({"use_dora": true}), 0.5, true),
            (json!({"alpha_pattern": {"q_proj": 8}}), 2.0, false),
            (json!({"alpha_pattern": {"k_proj": 8}}), 0.5, false),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let original = adapter(dora);
            write_peft(dir.path(), extra, &peft_tensors(&original));
            let set = AdapterSet::load(dir.path()).unwrap();
            let read = &set.adapters[path];
            assert_eq!(read.scale, scale);
            assert_eq!(gap(&read.a, &original.a), 0.0);
            assert_eq!(gap(&read.b, &original.b), 0.0);
            assert_eq!(read.magnitude.is_some(), dora);
            // Written in mlx-lm's form and read again, nothing has changed.
            let again = tempfile::tempdir().unwrap();
            set.save(again.path()).unwrap();
            let back = AdapterSet::load(again.path()).unwrap();
            assert_eq!(back.adapters[path].scale, scale);
            assert_eq!(gap(&back.adapters[path].b, &original.b), 0.0);
        }
        for (extra, word) in [
            (json!({"trainable_token_indices": [1]}), "trainable_token_indices"),
            (json!({"bias": "all"}), "bias"),
            (json!({"init_lora_weights": "pissa_niter_4"}), "pissa"),
            (json!({"peft_type": "IA3"}), "IA3"),
            (json!({"use_qalora": true}), "use_qalora"),
            (json!({"use_dora": true}), "lora_magnitude_vector"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            write_peft(dir.path(), extra, &peft_tensors(&adapter(false)));
            let message = AdapterSet::load(dir.path()).unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        }
        let dir = tempfile::tempdir().unwrap();
        let broken = Adapter { b: adapter(false).b.divide(Array::from_f32(0.0)).unwrap(), ..adapter(false) };
        write_peft(dir.path(), json!({}), &peft_tensors(&broken));
        let message = AdapterSet::load(dir.path()).unwrap_err().to_string();
        assert!(message.contains("lora_B.weight: holds values that are not finite"), "{message}");
    });
}

#[test]
fn an_adapter_without_a_rank_is_refused() {
    mlx(|| {
        let zeros = |shape: &[i32]| mlx_rs::ops::zeros::<f32>(shape).unwrap();
        for (a, b, found) in [
            (zeros(&[64, 0]), zeros(&[0, 96]), "found [64, 0] and [0, 96]"),
            (zeros(&[0, 4]), zeros(&[4, 96]), "found [0, 4] and [4, 96]"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let broken = Adapter { a, b, scale: 1.0, magnitude: None };
            let json = json!({"fine_tune_type": "lora", "num_layers": 1,
                "lora_parameters": {"rank": 4, "scale": 1.0, "dropout": 0.0}});
            let config: AdapterConfig =
                AdapterConfig::from_map(Path::new("config"), json.as_object().unwrap().clone()).unwrap();
            let adapters = BTreeMap::from([("model.layers.0.mlp.up_proj".to_owned(), broken)]);
            let set = AdapterSet { adapters, weights: BTreeMap::new(), config, metadata: BTreeMap::new() };
            set.save(dir.path()).unwrap();
            let message = AdapterSet::load(dir.path()).unwrap_err().to_string();
            assert!(message.contains("at least 1 of each") && message.contains(found), "{message}");
        }
        let dir = tempfile::tempdir().unwrap();
        let broken = Adapter { a: zeros(&[64, 0]), b: zeros(&[0, 96]), ..adapter(false) };
        write_peft(dir.path(), json!({}), &peft_tensors(&broken));
        let message = AdapterSet::load(dir.path()).unwrap_err().to_string();
        assert!(message.contains("at least 1 of each, found [0, 64] and [96, 0]"), "{message}");
    });
}

#[test]
fn what_does_not_fit_the_base_is_listed_whole() {
    mlx(|| {
        let raw = json!({"num_layers": 2, "lora_parameters": {"rank": 4, "scale": 0.5, "dropout": 0.0}});
        let config = AdapterConfig::from_map(Path::new("c"), raw.as_object().unwrap().clone()).unwrap();
        let adapters = BTreeMap::from([
            ("there".to_owned(), adapter(false)),
            ("gone".to_owned(), adapter(false)),
            ("other".to_owned(), adapter(true)),
        ]);
        let set = AdapterSet { adapters, weights: BTreeMap::new(), config, metadata: BTreeMap::new() };
        let (fits, other) = (Weight::Dense(wave(&[96, 64], 0.1)), Weight::Dense(wave(&[32, 64], 0.1)));
        let target = |path: &str| match path {
            "there" => Some(Target { weight: &fits, kind: Kind::Linear }),
            "other" => Some(Target { weight: &other, kind: Kind::Linear }),
            _ => None,
        };
        let message = set.table(Path::new("dir"), target).unwrap_err().to_string();
        assert!(message.contains("gone: the base has no such linear"), "{message}");
        assert!(
            message.contains("other: A is [64, 4] and B is [4, 96]") && message.contains("(32, 64)"),
            "{message}"
        );
        assert!(!message.contains("there:"), "{message}");
    });
}

#[test]
fn embeddings_act_on_rows_and_on_the_tied_head() {
    mlx(|| {
        start();
        let e = wave(&[40, 64], 0.21);
        let update = Adapter { a: wave(&[40, 4], 0.5), b: wave(&[4, 64], 0.6), scale: 0.25, magnitude: None };
        let path = "model.embed_tokens".to_owned();
        assert_eq!(update.kind(&path, (40, 64)), Some(Kind::Embedding));
        let dense = update.fused(&e, Kind::Embedding).unwrap();
        let embedding = graft_adapters::Embedding { weight: Weight::Dense(e), path: path.clone() };
        let table = Table { sites: [(path, site(&update, &Weight::Dense(dense.clone())))].into() };
        let route = Route::Table(&table);
        let ids = Array::from_slice(&[3i32, 39, 0], &[3]);
        let rows = embedding.forward(&ids, Dtype::Float32, &route).unwrap();
        let fused = graft_adapters::Embedding { weight: Weight::Dense(dense), path: "x".into() };
        assert!(gap(&rows, &fused.forward(&ids, Dtype::Float32, &Route::Base).unwrap()) < 1e-5);
        let x = wave(&[3, 64], 0.8);
        assert!(
            gap(&embedding.as_linear(&x, &route).unwrap(), &fused.as_linear(&x, &Route::Base).unwrap())
                < 1e-4
        );
    });
}
