//! Reading a prompt and answering, with random weights in the shape of a small model: six blocks of SmolLM2-135M's, 4 bits.
//! One element is one token, so criterion's rate is tokens per second; with a batch, of all sequences together.
#![allow(missing_docs, clippy::unwrap_used, reason = "a benchmark: a panic is the report")]

use std::path::Path;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use graft_adapters::Route;
use graft_model::{KvCache, Model};
use graft_ops::{Array, Dtype, Precision, Rows, set_precision};
use graft_testkit::{Family, Tiny, mlx, tiny_model};

/// Tokens that stand in the caches when the answers begin.
const PROMPT: i32 = 64;

/// What `graft` answers in, and `--exact`.
const PRECISIONS: [(&str, Precision); 2] = [("default", Precision::Int16), ("exact", Precision::F32)];

fn tokens(count: i32) -> Array {
    Array::from_iter((0..count).map(|i| i * 37 % 4000), &[count])
}

/// The logits (B, V) of the last of `each` new tokens in every sequence.
fn forward(model: &Model, caches: &mut [KvCache], each: i32) {
    let count = caches.len() as i32;
    let rows = Rows { lengths: vec![each; caches.len()], starts: caches.iter().map(KvCache::len).collect() };
    let mut caches: Vec<&mut KvCache> = caches.iter_mut().collect();
    let hidden = model.hidden(&tokens(count * each), &rows, Some(&mut caches), &Route::Base).unwrap();
    let last = Array::from_iter((1..=count).map(|row| row * each - 1), &[count]);
    let logits = model.logits(&hidden.take_axis(&last, 0).unwrap(), &Route::Base).unwrap();
    logits.eval().unwrap();
}

/// Runs `work` `count` times on the array thread, after it ran once untimed.
fn timed(dir: &Path, precision: Precision, count: u64, work: impl Fn(&Model) -> Duration + Sync) -> Duration {
    mlx(|| {
        set_precision(precision);
        let model = Model::load(dir, Dtype::Float32).unwrap();
        work(&model);
        let spent = (0..count).map(|_| work(&model)).sum();
        set_precision(Precision::F32);
        spent
    })
}

fn generation(c: &mut Criterion) {
    let dir = tiny_model(&Tiny {
        packed: Some((4, 32)),
        layers: 6,
        hidden: 576,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        ffn: 1536,
        vocab: 4096,
        ..Tiny::new(Family::Llama)
    });
    let mut group = c.benchmark_group("prefill");
    group.sample_size(10);
    for (name, precision) in PRECISIONS {
        for length in [32, 512] {
            group.throughput(Throughput::Elements(length));
            group.bench_function(BenchmarkId::new(name, length), |bencher| {
                bencher.iter_custom(|count| {
                    timed(dir.path(), precision, count, |model| {
                        let began = Instant::now();
                        forward(model, &mut [KvCache::new(model)], length as i32);
                        began.elapsed()
                    })
                });
            });
        }
    }
    group.finish();
    let mut group = c.benchmark_group("decode");
    group.sample_size(10);
    for (name, precision) in PRECISIONS {
        for batch in [1, 4, 16] {
            const STEPS: u64 = 16;
            group.throughput(Throughput::Elements(batch * STEPS));
            group.bench_function(BenchmarkId::new(name, batch), |bencher| {
                bencher.iter_custom(|count| {
                    timed(dir.path(), precision, count, |model| {
                        let mut caches: Vec<KvCache> = (0..batch).map(|_| KvCache::new(model)).collect();
                        forward(model, &mut caches, PROMPT);
                        let began = Instant::now();
                        for _ in 0..STEPS {
                            forward(model, &mut caches, 1);
                        }
                        began.elapsed()
                    })
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, generation);
criterion_main!(benches);
