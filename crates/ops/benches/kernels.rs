//! Our CPU operations by themselves, at the sizes of a small model (E 576, F 1536, V 49152, 9 heads of 64 over 3).
//!
//! Everything is evaluated inside the timed closure. `cargo xtask bench` runs it in the profile that everything else uses.
#![allow(missing_docs, clippy::unwrap_used, reason = "a benchmark: a panic is the report")]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use graft_ops::ffi::{Mode, quantize};
use graft_ops::{Array, KeyValues, PackedRef, Precision, Rows, WeightRef, arrange, ffi, with_precision};
use mlx_rs::random::{key, normal};

const HEAD: graft_ops::Head<'static> = graft_ops::Head { dim: 64, scale: 0.125, rope: None };

fn random(shape: &[i32]) -> Array {
    let x = normal::<f32>(shape, None, None, &key(shape.iter().map(|d| *d as u64).sum()).unwrap()).unwrap();
    x.eval().unwrap();
    x
}

struct Packed {
    parts: Vec<Array>,
    bits: i32,
}

impl Packed {
    fn new(out: i32, inputs: i32, bits: i32) -> Packed {
        let w = random(&[out, inputs]);
        let mut parts = quantize(&w, 32, bits, Mode::Affine).unwrap();
        for part in &mut parts[1..] {
            *part = part.as_dtype(graft_ops::Dtype::Float16).unwrap();
        }
        mlx_rs::transforms::eval(&parts).unwrap();
        Packed { parts, bits }
    }

    fn view(&self) -> PackedRef<'_> {
        let [codes, scales, biases] = &self.parts[..] else { unreachable!() };
        PackedRef { codes, scales, biases: Some(biases), group_size: 32, bits: self.bits, mode: Mode::Affine }
    }
}

fn products(c: &mut Criterion) {
    let mut group = c.benchmark_group("packed matmul");
    for (inputs, out) in [(576, 1536), (1536, 576), (576, 49152)] {
        for bits in [4, 8, 3] {
            let w = Packed::new(out, inputs, bits);
            for m in [1, 4, 16, 128, 512] {
                if (out > 2000 && m > 128) || (bits == 3 && m == 4) {
                    continue;
                }
                let x = random(&[m, inputs]);
                group.throughput(Throughput::Elements(2 * (m * inputs) as u64 * out as u64));
                group.bench_function(format!("{bits} bits, {m} x {inputs} -> {out}"), |b| {
                    b.iter(|| {
                        graft_ops::matmul(black_box(&x), WeightRef::Packed(w.view())).unwrap().eval().unwrap()
                    });
                });
            }
        }
    }
    group.finish();
    let mut group = c.benchmark_group("arranged matmul");
    for (inputs, out, bits) in [(576, 1536, 4), (1536, 576, 4), (576, 49152, 8)] {
        let w = Packed::new(out, inputs, bits);
        let arranged = with_precision(Precision::Int16, || arrange(w.view())).unwrap();
        let Some(arranged) = arranged else { continue };
        for m in [1, 4, 16, 512] {
            if out > 2000 && m > 16 {
                continue;
            }
            let x = random(&[m, inputs]);
            group.throughput(Throughput::Elements(2 * (m * inputs) as u64 * out as u64));
            group.bench_function(format!("{bits} bits, {m} x {inputs} -> {out}"), |b| {
                b.iter(|| {
                    let product = || graft_ops::matmul(black_box(&x), WeightRef::Arranged(&arranged));
                    with_precision(Precision::Int16, product).unwrap().eval().unwrap();
                });
            });
        }
    }
    group.finish();
    let mut group = c.benchmark_group("transposed packed matmul");
    let (w, x) = (Packed::new(1536, 576, 4), random(&[512, 1536]));
    group.throughput(Throughput::Elements(2 * 512 * 1536 * 576));
    group.bench_function("4 bits, 512 x 1536 -> 576", |b| {
        b.iter(|| graft_ops::matmul_t(black_box(&x), WeightRef::Packed(w.view())).unwrap().eval().unwrap());
    });
    group.finish();
    let mut group = c.benchmark_group("dense matmul");
    let w = random(&[1536, 576]);
    for m in [1, 512] {
        let x = random(&[m, 576]);
        group.throughput(Throughput::Elements(2 * m as u64 * 1536 * 576));
        group.bench_function(format!("{m} x 576 -> 1536"), |b| {
            b.iter(|| graft_ops::matmul(black_box(&x), WeightRef::Dense(&w)).unwrap().eval().unwrap());
        });
    }
    group.finish();
}

fn others(c: &mut Criterion) {
    let (x, weight) = (random(&[512, 576]), random(&[576]));
    c.bench_function("rms norm, 512 x 576", |b| {
        b.iter(|| graft_ops::rms_norm(black_box(&x), &weight, 1e-5).unwrap().eval().unwrap());
    });
    let (gate, up) = (random(&[512, 1536]), random(&[1536, 512]).reshape(&[512, 1536]).unwrap());
    c.bench_function("swiglu, 512 x 1536", |b| {
        b.iter(|| graft_ops::swiglu(black_box(&gate), &up).unwrap().eval().unwrap());
    });
    let (q, k, v) = (random(&[512, 576]), random(&[512, 192]), random(&[512, 192]));
    let rows = Rows::new(vec![128; 4]);
    c.bench_function("attention, 4 x 128", |b| {
        b.iter(|| graft_ops::attention(black_box(&q), &k, &v, &rows, HEAD).unwrap().eval().unwrap());
    });
    c.bench_function("attention and its gradient, 4 x 128", |b| {
        b.iter(|| {
            let f =
                |x: &[Array]| Ok(vec![graft_ops::attention(&x[0], &x[1], &x[2], &rows, HEAD)?.sum(false)?]);
            let (_, g) = ffi::value_and_grad(f, &[q.clone(), k.clone(), v.clone()], &[0, 1, 2]).unwrap();
            mlx_rs::transforms::eval(&g).unwrap();
        });
    });
    let mut cache = KeyValues::default();
    let long = Rows::new(vec![512]);
    graft_ops::attention_cached(&q, &k, &v, &mut [&mut cache], &long, HEAD).unwrap().eval().unwrap();
    let (q, k, v) = (random(&[1, 576]), random(&[1, 192]), random(&[1, 192]));
    c.bench_function("cached attention, 1 after 512", |b| {
        let rows = Rows { lengths: vec![1], starts: vec![512] };
        b.iter(|| {
            graft_ops::attention_cached(black_box(&q), &k, &v, &mut [&mut cache], &rows, HEAD)
                .unwrap()
                .eval()
                .unwrap();
        });
    });
    let (h, head) = (random(&[400, 576]), Packed::new(49152, 576, 8));
    let targets = Array::from_iter((0..400).map(|i| i * 97), &[400]);
    let mut group = c.benchmark_group("loss of the head");
    group.sample_size(10);
    group.bench_function("400 x 576 -> 49152, with its gradient", |b| {
        b.iter(|| {
            let f = |x: &[Array]| {
                let head = WeightRef::Packed(head.view());
                Ok(vec![graft_ops::linear_cross_entropy(&x[0], head, &targets, 256)?.sum(false)?])
            };
            let (_, g) = ffi::value_and_grad(f, std::slice::from_ref(&h), &[0]).unwrap();
            mlx_rs::transforms::eval(&g).unwrap();
        });
    });
    group.finish();
}

criterion_group!(benches, products, others);
criterion_main!(benches);
