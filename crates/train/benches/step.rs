//! One training step on a tiny packed model, LoRA and DoRA, and DoRA's norm alone.
#![allow(missing_docs, clippy::unwrap_used, reason = "a benchmark: a panic is the report")]

use std::rc::Rc;

use criterion::{Criterion, criterion_group, criterion_main};
use graft_adapters::LoraParameters;
use graft_model::Model;
use graft_ops::Dtype;
use graft_testkit::{Family, Tiny, mlx, tiny_model};
use graft_train::{Batch, Example, Optimizer, Params, Schedule, Split, Trainer, TrainerSettings};

fn split() -> Split {
    let example = |line: usize| {
        let tokens: Vec<u32> = (0..64 + line).map(|i| ((i * 7 + line * 13) % 288) as u32).collect();
        Example::whole(line, tokens, 0)
    };
    let examples = (0..4).map(example).collect();
    Split { file: "train.jsonl".into(), examples, skipped: vec![], warnings: vec![], found: true }
}

fn trainer(model: &Rc<Model>, dora: bool) -> Trainer {
    let lora = LoraParameters { rank: 8, scale: 20.0, dropout: 0.0, keys: None };
    let params = Params::low_rank(model, &lora, -1, dora, 0).unwrap();
    let settings = TrainerSettings {
        optimizer: Optimizer::from_config("adam", &serde_json::Map::new()).unwrap(),
        schedule: Schedule::constant(1e-5),
        max_grad_norm: Some(1.0),
        grad_checkpoint: false,
        dropout: 0.0,
        seed: 0,
    };
    Trainer::new(Rc::clone(model), params, settings).unwrap()
}

fn steps(c: &mut Criterion) {
    let dir = tiny_model(&Tiny {
        packed: Some((4, 32)),
        hidden: 128,
        ffn: 256,
        head_dim: 32,
        ..Tiny::new(Family::Llama)
    });
    // Arrays live on one thread; the measured loop goes there as a whole.
    let mut group = c.benchmark_group("train");
    for (name, dora) in [("lora step", false), ("dora step", true)] {
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|count| {
                mlx(|| {
                    let model = Rc::new(Model::load(dir.path(), Dtype::Float32).unwrap());
                    let mut trainer = trainer(&model, dora);
                    let split = split();
                    let batch = Batch::new(&split, &[0, 1, 2, 3], graft_ops::form());
                    trainer.step(&batch, &split, 1, true).unwrap();
                    let began = std::time::Instant::now();
                    for iter in 0..count {
                        trainer.step(&batch, &split, iter + 2, true).unwrap();
                    }
                    began.elapsed()
                })
            });
        });
    }
    group.bench_function("dora norm", |bencher| {
        bencher.iter_custom(|count| {
            mlx(|| {
                let model = Rc::new(Model::load(dir.path(), Dtype::Float32).unwrap());
                let mut trainer = trainer(&model, true);
                let began = std::time::Instant::now();
                for _ in 0..count {
                    trainer.refresh().unwrap();
                }
                began.elapsed()
            })
        });
    });
    group.finish();
}

criterion_group!(benches, steps);
criterion_main!(benches);
