//! Runs that are compared, and inputs that are observed, against what the whole network gives.
#![allow(clippy::unwrap_used, reason = "tests: a panic is the report")]

use graft_adapters::{Adapter, AdapterSet, Route};
use graft_model::{Model, Observer, Run, Text, compare};
use graft_ops::{Array, Dtype, Rows};
use graft_quant::{Checkpoint, Tensor, read_safetensors, safetensors_bytes};
use graft_testkit::{Family, Tiny, mlx, tiny_adapter, tiny_model};

fn texts() -> Vec<Text> {
    let ids = |n: u32, seed: u32| (0..n).map(|i| (i * 37 + seed * 101 + i * i * 7) % 250).collect::<Vec<_>>();
    vec![
        Text { tokens: ids(40, 1), targets: 1..40 },
        Text { tokens: ids(90, 2), targets: 60..90 },
        Text { tokens: ids(12, 3), targets: 5..6 },
    ]
}

fn host(array: &Array) -> Vec<f32> {
    Tensor::from_array(array).unwrap().to_f32().unwrap()
}

#[test]
fn a_comparison_is_that_of_the_logits_of_both_models() {
    mlx(|| {
        for tied in [true, false] {
            let tiny = Tiny { tied, ..Tiny::new(Family::Llama) };
            let base = tiny_model(&tiny);
            let adapter = tiny_adapter(base.path(), &tiny, true, 4, 9);
            let set = AdapterSet::load(adapter.path()).unwrap();
            let texts = texts();
            let run = |with: bool| {
                let model = Model::load(base.path(), Dtype::Float32).unwrap();
                let table = set.table(adapter.path(), |path| model.target(path)).unwrap();
                let route = if with { Route::Table(&table) } else { Route::Base };
                Run::of(&model, &route, &texts, &mut |_| true).unwrap().unwrap()
            };
            let (with, without) = (run(true), run(false));
            let same = compare(&with, &with, &texts, &mut || true).unwrap().unwrap();
            assert!(same.iter().all(|gap| gap.kl == 0.0 && gap.agree));
            let gaps = compare(&with, &without, &texts, &mut || true).unwrap().unwrap();
            assert_eq!(gaps.len(), 39 + 30 + 1);
            // The second text by itself, in f64.
            let model = Model::load(base.path(), Dtype::Float32).unwrap();
            let table = set.table(adapter.path(), |path| model.target(path)).unwrap();
            let probabilities = |route: &Route| -> Vec<Vec<f64>> {
                let ids: Vec<i32> = texts[1].tokens.iter().map(|t| *t as i32).collect();
                let hidden =
                    model.hidden(&Array::from_slice(&ids, &[90]), &Rows::new(vec![90]), None, route).unwrap();
                let logits = host(&model.logits(&hidden, route).unwrap());
                let row = |row: &[f32]| {
                    let all: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
                    row.iter().map(|x| f64::from(*x).exp() / all).collect()
                };
                logits.chunks_exact(logits.len() / 90).map(row).collect()
            };
            let (p, q) = (probabilities(&Route::Table(&table)), probabilities(&Route::Base));
            for (gap, target) in gaps[39..69].iter().zip(60..90) {
                let (p, q) = (&p[target - 1], &q[target - 1]);
                let kl: f64 = p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum();
                assert!((gap.kl - kl).abs() < 1e-5 * kl.max(1e-2), "{gap:?}, {kl}");
                let token = texts[1].tokens[target] as usize;
                assert!((gap.losses[0] + p[token].ln()).abs() < 1e-4, "{gap:?}");
                assert!((gap.losses[1] + q[token].ln()).abs() < 1e-4, "{gap:?}");
            }
            assert!(gaps.iter().any(|gap| gap.kl > 1e-4));
            assert!(compare(&with, &without, &texts[..2], &mut || true).is_err());
            assert!(compare(&with, &without, &texts, &mut || false).unwrap().is_none());
        }
    });
}

#[test]
fn logits_that_are_no_numbers_are_named() {
    mlx(|| {
        let tiny = Tiny::new(Family::Llama);
        let (base, broken) = (tiny_model(&tiny), tiny_model(&tiny));
        let file = broken.path().join("model.safetensors");
        let (mut tensors, metadata) = read_safetensors(&file).unwrap();
        tensors.get_mut("model.norm.weight").unwrap().data[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        std::fs::write(&file, safetensors_bytes(&tensors, &metadata).unwrap()).unwrap();
        let texts = texts();
        let run = |dir: &std::path::Path| {
            let model = Model::load(dir, Dtype::Float32).unwrap();
            Run::of(&model, &Route::Base, &texts, &mut |_| true).unwrap().unwrap()
        };
        let (good, bad) = (run(base.path()), run(broken.path()));
        for (first, second, wanted) in [(&good, &bad, "second"), (&bad, &good, "first")] {
            let error = compare(first, second, &texts, &mut || true).unwrap_err().to_string();
            assert!(error.contains(&format!("the logits of the {wanted} of two models")), "{error}");
            assert!(error.contains("not finite at target 0"), "{error}");
        }
    });
}

#[test]
fn moments_are_those_of_the_inputs_that_a_linear_reads() {
    mlx(|| {
        for (packed, tied) in [(None, true), (Some((4, 32)), false)] {
            let tiny = Tiny { packed, tied, ..Tiny::new(Family::Qwen3) };
            let base = tiny_model(&tiny);
            let adapter = tiny_adapter(base.path(), &tiny, true, 4, 9);
            let mut set = AdapterSet::load(adapter.path()).unwrap();
            if !tied {
                // What leaves the head as it was is no question of the part that is observed.
                let rows = |n: i32, m: i32| Array::from_slice(&vec![1e-3f32; (n * m) as usize], &[n, m]);
                let update = Adapter { a: rows(288, 4), b: rows(4, 64), scale: 1.0, magnitude: None };
                set.adapters.insert("model.embed_tokens".into(), update);
                set.leave_head();
            }
            let texts: Vec<Vec<u32>> = texts().into_iter().map(|text| text.tokens).collect();
            let checkpoint = Checkpoint::open(base.path()).unwrap();
            let mut observer = Observer::new(checkpoint, Dtype::Float32, &set, &texts).unwrap();
            assert_eq!(observer.tokens(), 142);
            // The input of the second block's q, k and v by the whole network, whose first block gives it.
            let model = Model::load(base.path(), Dtype::Float32).unwrap();
            let table = set.table(adapter.path(), |path| model.target(path)).unwrap();
            let route = Route::Table(&table);
            let mut gram = vec![0f64; 64 * 64];
            for text in &texts {
                let ids: Vec<i32> = text.iter().map(|t| *t as i32).collect();
                let (n, rows) = (ids.len() as i32, Rows::new(vec![ids.len() as i32]));
                let h = model.embed(&Array::from_slice(&ids, &[n]), &route).unwrap();
                let h = model.block(0, &h, &rows, &route).unwrap();
                let x = host(&model.block_norms(1).next().unwrap().forward(&h, &route).unwrap());
                for x in x.chunks_exact(64) {
                    for (i, a) in x.iter().enumerate() {
                        for (j, b) in x.iter().enumerate() {
                            gram[i * 64 + j] += f64::from(*a) * f64::from(*b) / 142.0;
                        }
                    }
                }
            }
            let q = observer.moments("model.layers.1.self_attn.q_proj").unwrap().unwrap();
            for i in 0..64 {
                let mut unit = [0f32; 64];
                unit[i] = 1.0;
                let found = host(&q.cost(&Array::from_slice(&unit, &[1, 64])).unwrap())[0];
                let wanted = gram[i * 64 + i];
                assert!((f64::from(found) - wanted).abs() < 1e-3 * wanted, "{i}: {found}, {wanted}");
            }
            let of = |observer: &mut Observer, path: &str| observer.moments(path).unwrap();
            let k = of(&mut observer, "model.layers.1.self_attn.k_proj").unwrap();
            assert!(std::rc::Rc::ptr_eq(&q, &k));
            let down = of(&mut observer, "model.layers.1.mlp.down_proj").unwrap();
            assert!(down.cost(&Array::from_slice(&[1f32; 128], &[1, 128])).is_ok());
            assert!(of(&mut observer, "model.norm").is_none());
            let error = observer.moments("model.layers.0.mlp.up_proj").unwrap_err().to_string();
            assert!(error.contains("left behind"), "{error}");
        }
    });
}
