//! Gradients against finite differences, and the ways to compute them against each other.

use std::rc::Rc;

use graft_adapters::FineTuneType;
use graft_model::Model;
use graft_ops::{Array, Form};
use graft_testkit::tolerance::{F32_DEEP, Tolerance};
use graft_testkit::{Family, Tiny, assert_close};
use graft_train::{Batch, Graph, Params};

use crate::support::{arrays, load, lora, number, shake, split, trainer, values};

/// Dense, packed, with biases, with head norms, with an untied head.
fn models() -> Vec<(&'static str, Tiny)> {
    vec![
        ("dense llama", Tiny::new(Family::Llama)),
        ("packed llama, untied", Tiny { packed: Some((4, 32)), tied: false, ..Tiny::new(Family::Llama) }),
        ("packed qwen2", Tiny { packed: Some((8, 64)), ..Tiny::new(Family::Qwen2) }),
        ("dense qwen3", Tiny::new(Family::Qwen3)),
        ("mxfp4 llama, untied", Tiny { tied: false, ..Tiny::new(Family::Llama) }.in_mode("mxfp4")),
        ("nvfp4 llama", Tiny::new(Family::Llama).in_mode("nvfp4")),
        ("mxfp8 qwen2", Tiny::new(Family::Qwen2).in_mode("mxfp8")),
    ]
}

fn params(model: &Model, kind: FineTuneType) -> Params {
    let mut params = match kind {
        FineTuneType::Full => Params::full(model, -1).unwrap(),
        _ => Params::low_rank(model, &lora(4, 0.0), -1, kind == FineTuneType::Dora, 5).unwrap(),
    };
    if kind != FineTuneType::Full {
        shake(&mut params, 11);
    }
    params
}

fn graph(model: &Rc<Model>, params: &Params, checkpoint: bool, dropout: f32) -> Graph {
    Graph::new(Rc::clone(model), params, checkpoint, dropout, 1)
}

/// The gradient of each tensor along itself and along another direction, against the loss at two points.
fn differences(name: &str, model: &Rc<Model>, params: &Params, dropout: f32) {
    let split = split(&[9, 14], 3, 1);
    let batch = Batch::new(&split, &[0, 1], graft_ops::form());
    let graph = graph(model, params, false, dropout);
    let norms = params.norms(&params.values, model).unwrap();
    let (_, gradients) = graph.loss_and_gradients(params, &norms, &batch, 1).unwrap();
    for (i, gradient) in gradients.iter().enumerate() {
        let length = number(&gradient.square().unwrap().sum(false).unwrap().sqrt().unwrap());
        // A key's bias shifts all scores of a query alike where positions do not turn it: its gradient may be tiny.
        if params.names[i].ends_with("k_proj.bias") {
            continue;
        }
        assert!(length > 1e-4, "{name}: {} has no gradient", params.names[i]);
        let step = 2e-2 / length.max(1.0);
        let direction = gradient.multiply(Array::from_f32((1.0 / length) as f32)).unwrap();
        let at = |sign: f64| {
            let mut moved = params.clone();
            let way = direction.multiply(Array::from_f32((sign * step) as f32)).unwrap();
            moved.values[i] = moved.values[i].add(way).unwrap();
            // DoRA's norm is a constant of the gradient, so it stays as it was.
            number(&graph.loss_and_gradients(&moved, &norms, &batch, 1).unwrap().0)
        };
        let slope = (at(1.0) - at(-1.0)) / (2.0 * step);
        let gap = (slope - length).abs();
        assert!(gap < 2e-2 * length + 5e-3, "{name}: {}: slope {slope}, gradient {length}", params.names[i]);
    }
}

#[test]
fn low_rank_gradients_are_the_slopes_of_the_loss() {
    arrays(|| {
        for (name, tiny) in models() {
            let model = load(&tiny);
            for kind in [FineTuneType::Lora, FineTuneType::Dora] {
                differences(&format!("{name}, {}", kind.name()), &model, &params(&model, kind), 0.0);
            }
        }
    });
}

#[test]
fn gradients_with_dropout_see_one_mask() {
    arrays(|| {
        let model = load(&Tiny::new(Family::Llama));
        differences("dropout", &model, &params(&model, FineTuneType::Lora), 0.3);
    });
}

#[test]
fn full_gradients_are_the_slopes_of_the_loss() {
    arrays(|| {
        for family in [Family::Qwen2, Family::Qwen3] {
            let model = load(&Tiny::new(family));
            differences(family.name(), &model, &params(&model, FineTuneType::Full), 0.0);
        }
    });
}

#[test]
fn embedding_and_head_train_where_they_are_keyed() {
    arrays(|| {
        for tied in [true, false] {
            let model = load(&Tiny { tied, packed: Some((4, 32)), ..Tiny::new(Family::Llama) });
            let mut settings = lora(4, 0.0);
            let mut keys = vec!["self_attn.q_proj".to_owned(), "model.embed_tokens".to_owned()];
            if !tied {
                keys.push("lm_head".into());
            }
            settings.keys = Some(keys);
            let mut params = Params::low_rank(&model, &settings, 1, false, 5).unwrap();
            assert_eq!(params.sites.len(), if tied { 2 } else { 3 });
            shake(&mut params, 11);
            differences("embedding", &model, &params, 0.0);
            // More targets than a head that is trained takes at a time are the sum of their parts.
            let rows = split(&[150, 170], 3, 2);
            let graph = graph(&model, &params, false, 0.0);
            let norms = params.norms(&params.values, &model).unwrap();
            let [both, first, second] = [&[0, 1][..], &[0], &[1]].map(|rows_of| {
                let batch = Batch::new(&rows, rows_of, graft_ops::form());
                let (loss, mut gradients) = graph.loss_and_gradients(&params, &norms, &batch, 1).unwrap();
                gradients.push(loss);
                gradients
            });
            for ((both, first), second) in both.iter().zip(&first).zip(&second) {
                assert_close(both, &first.add(second).unwrap(), F32_DEEP);
            }
        }
    });
}

#[test]
fn every_tensor_has_moved_after_three_steps() {
    arrays(|| {
        for (name, tiny) in models() {
            let model = load(&tiny);
            for kind in [FineTuneType::Lora, FineTuneType::Dora, FineTuneType::Full] {
                if kind == FineTuneType::Full && tiny.packed.is_some() {
                    let refused = Params::full(&model, -1).unwrap_err().to_string();
                    assert!(refused.contains("dequantize") || refused.contains("Dequantize"), "{refused}");
                    continue;
                }
                let start = match kind {
                    FineTuneType::Full => Params::full(&model, -1).unwrap(),
                    _ => Params::low_rank(&model, &lora(4, 0.0), -1, kind == FineTuneType::Dora, 5).unwrap(),
                };
                let split = split(&[9, 14], 0, 1);
                let batch = Batch::new(&split, &[0, 1], graft_ops::form());
                let mut trainer = trainer(&model, start.clone(), "adam", 1e-3);
                for iter in 1..=3 {
                    trainer.step(&batch, &split, iter, true).unwrap();
                }
                for ((tensor, before), after) in
                    start.names.iter().zip(&start.values).zip(&trainer.params.values)
                {
                    assert_ne!(
                        values(before),
                        values(after),
                        "{name}, {}: {tensor} did not move",
                        kind.name()
                    );
                }
            }
        }
    });
}

fn compare(name: &str, a: &(Array, Vec<Array>), b: &(Array, Vec<Array>), tolerance: Tolerance) {
    assert_close(&a.0, &b.0, tolerance);
    for (x, y) in a.1.iter().zip(&b.1) {
        if let Err(e) = graft_testkit::close(x, y, tolerance) {
            panic!("{name}: {e}");
        }
    }
}

#[test]
fn padding_changes_neither_loss_nor_gradient() {
    arrays(|| {
        for (name, tiny) in models() {
            let model = load(&tiny);
            let params = params(&model, FineTuneType::Dora);
            for offset in [0, 4] {
                let split = split(&[5, 17, 40], offset, 2);
                let graph = graph(&model, &params, false, 0.0);
                let norms = params.norms(&params.values, &model).unwrap();
                let of = |form| {
                    let batch = Batch::new(&split, &[0, 1, 2], form);
                    assert_eq!(batch.count, split.examples.iter().map(|e| e.targets()).sum::<usize>());
                    if form == Form::Mlx {
                        assert_eq!(batch.rows.lengths, [64, 64, 64]);
                    } else {
                        assert_eq!(batch.rows.lengths, [4, 16, 39]);
                    }
                    graph.loss_and_gradients(&params, &norms, &batch, 1).unwrap()
                };
                compare(name, &of(Form::Cpu), &of(Form::Mlx), F32_DEEP);
            }
        }
    });
}

#[test]
fn checkpointing_changes_nothing() {
    arrays(|| {
        for kind in [FineTuneType::Lora, FineTuneType::Dora, FineTuneType::Full] {
            let packed = (kind != FineTuneType::Full).then_some((4, 32));
            let model = load(&Tiny { packed, ..Tiny::new(Family::Qwen2) });
            let params = params(&model, kind);
            let split = split(&[5, 17], 0, 2);
            let batch = Batch::new(&split, &[0, 1], graft_ops::form());
            let norms = params.norms(&params.values, &model).unwrap();
            let of = |checkpoint| {
                graph(&model, &params, checkpoint, 0.2)
                    .loss_and_gradients(&params, &norms, &batch, 4)
                    .unwrap()
            };
            compare(kind.name(), &of(true), &of(false), F32_DEEP);
        }
    });
}

#[test]
fn frozen_blocks_below_the_first_adapter_change_nothing() {
    arrays(|| {
        let model = load(&Tiny { layers: 3, ..Tiny::new(Family::Llama) });
        let some = Params::low_rank(&model, &lora(4, 0.0), 1, true, 5).unwrap();
        assert!(some.names.iter().all(|n| n.starts_with("model.layers.2.")));
        let all = Params::low_rank(&model, &lora(4, 0.0), -1, true, 5).unwrap();
        let split = split(&[9, 14], 0, 1);
        let batch = Batch::new(&split, &[0, 1], graft_ops::form());
        let of = |params: &Params| {
            let norms = params.norms(&params.values, &model).unwrap();
            graph(&model, params, false, 0.0).loss_and_gradients(params, &norms, &batch, 1).unwrap()
        };
        let (loss, gradients) = of(&all);
        let top =
            all.names.iter().zip(gradients).filter(|(n, _)| some.names.contains(n)).map(|(_, g)| g).collect();
        compare("prefix", &of(&some), &(loss, top), F32_DEEP);
    });
}

#[test]
fn accumulated_batches_are_one_big_batch() {
    arrays(|| {
        let model = load(&Tiny::new(Family::Llama));
        // The batches have very different numbers of targets: weighting them alike would be seen.
        let split = split(&[4, 30, 9, 17], 0, 2);
        let of = |groups: &[&[usize]]| {
            let mut trainer = trainer(&model, params(&model, FineTuneType::Lora), "sgd", 1.0);
            for (i, group) in groups.iter().enumerate() {
                let batch = Batch::new(&split, group, graft_ops::form());
                trainer.step(&batch, &split, i as u64 + 1, i + 1 == groups.len()).unwrap();
            }
            trainer.params.values
        };
        for (a, b) in of(&[&[0], &[1, 2], &[3]]).iter().zip(of(&[&[0, 1, 2, 3]])) {
            assert_close(a, &b, F32_DEEP);
        }
    });
}

#[test]
fn settings_that_choose_nothing_are_refused() {
    arrays(|| {
        let model = load(&Tiny::new(Family::Llama));
        let refused = |keys: Option<&str>, layers: i32, dora: bool| {
            let mut settings = lora(4, 0.0);
            settings.keys = keys.map(|k| vec![k.to_owned()]);
            Params::low_rank(&model, &settings, layers, dora, 5).unwrap_err().to_string()
        };
        assert!(refused(Some("self_attn.qproj"), -1, false).contains("self_attn.q_proj"));
        assert!(refused(None, 3, false).contains("at most the model's 2 blocks"));
        assert!(refused(Some("model.embed_tokens"), -1, true).contains("DoRA"));
        let one = |k: &str| {
            let mut settings = lora(4, 0.0);
            settings.keys = Some(vec![k.to_owned()]);
            Params::low_rank(&model, &settings, 1, false, 5).unwrap().names
        };
        // A whole path is taken wherever it is, a path inside a block in the last blocks only.
        assert_eq!(one("model.layers.0.mlp.up_proj")[0], "model.layers.0.mlp.up_proj.lora_a");
        assert_eq!(
            one("mlp.up_proj"),
            ["model.layers.1.mlp.up_proj.lora_a", "model.layers.1.mlp.up_proj.lora_b"]
        );
    });
}

#[test]
fn checkpointing_and_frozen_blocks_save_memory() {
    arrays(|| {
        use graft_ops::ffi::memory;
        let model = load(&Tiny { layers: 6, packed: Some((4, 32)), ..Tiny::new(Family::Llama) });
        let split = split(&[400, 400], 0, 2);
        let batch = Batch::new(&split, &[0, 1], graft_ops::form());
        let peak = |checkpoint: bool, layers: i32| {
            let params = Params::low_rank(&model, &lora(4, 0.0), layers, false, 5).unwrap();
            let found =
                graph(&model, &params, checkpoint, 0.0).loss_and_gradients(&params, &[], &batch, 1).unwrap();
            let before = memory::active_memory().unwrap();
            memory::reset_peak_memory().unwrap();
            mlx_rs::transforms::eval([&found.0].into_iter().chain(&found.1)).unwrap();
            memory::peak_memory().unwrap() - before
        };
        let (whole, again, last) = (peak(false, -1), peak(true, -1), peak(false, 1));
        assert!(again < whole * 6 / 10, "checkpointed {again}, all kept {whole}");
        assert!(last < whole * 6 / 10, "last block {last}, all blocks {whole}");
    });
}
