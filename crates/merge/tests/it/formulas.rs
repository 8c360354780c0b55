//! Fused values against the formulas, computed here in f64 from the bytes of the files.

use std::path::Path;

use graft_merge::{LayerReport, Policy};
use graft_quant::{Grid, StoredDtype, Tensor};
use graft_testkit::{Dtype, Family, Tiny, tiny_adapter, tiny_model};

use crate::support::{Tensors, arrays, every_model, fused, read_json, tensors};

/// The adapters of the testkit have this s.
const SCALE: f64 = 2.0;

/// A matrix in f64, row-major.
pub(crate) struct Matrix {
    pub(crate) columns: usize,
    pub(crate) values: Vec<f64>,
}

/// A float tensor as a matrix; a vector has one column.
pub(crate) fn matrix(tensor: &Tensor) -> Matrix {
    let columns = tensor.shape.get(1).copied().unwrap_or(1);
    Matrix { columns, values: tensor.to_f32().unwrap().into_iter().map(f64::from).collect() }
}

/// A number of a sign, bits of exponent and bits of fraction.
fn small(code: u32, exponent: u32, fraction: u32) -> f64 {
    let power = (code >> fraction & ((1 << exponent) - 1)) as i32;
    let part = f64::from(code & ((1 << fraction) - 1)) / f64::from(1 << fraction);
    let size = if power == 0 { part } else { 1.0 + part };
    let sign = if code >> (exponent + fraction) & 1 == 1 { -1.0 } else { 1.0 };
    sign * size * 2.0_f64.powi(power.max(1) + 1 - (1 << (exponent - 1)))
}

/// Scales, which have eight bits where codes are floats.
fn levels(scales: &Tensor, group: usize) -> Matrix {
    if scales.dtype != StoredDtype::U8 {
        return matrix(scales);
    }
    let level = |byte: &u8| {
        if group == 16 { small((*byte).into(), 4, 3) } else { 2.0_f64.powi(i32::from(*byte) - 127) }
    };
    Matrix { columns: scales.shape[1], values: scales.data.iter().map(level).collect() }
}

/// The weight of module `path`, unpacked by hand: code i in bits [i b, (i + 1) b) of its row, w = scale code + bias, or w = scale
/// times the float that the code is.
pub(crate) fn weight(dir: &Path, all: &Tensors, path: &str) -> Matrix {
    let stored = &all[&format!("{path}.weight")];
    let Some(scales) = all.get(&format!("{path}.scales")) else { return matrix(stored) };
    let block = &read_json(&dir.join("config.json"))["quantization"];
    let own = if block[path].is_object() { &block[path] } else { block };
    let number = |key: &str| own[key].as_u64().unwrap() as usize;
    let (bits, group) = (number("bits"), number("group_size"));
    let (scales, biases) = (levels(scales, group), all.get(&format!("{path}.biases")).map(matrix));
    let columns = stored.shape[1] * 32 / bits;
    assert_eq!(columns, scales.columns * group, "{path}");
    let mut values = Vec::new();
    for (row, bytes) in stored.data.chunks_exact(stored.shape[1] * 4).enumerate() {
        for i in 0..columns {
            let at = i * bits;
            let next = bytes.get(at / 8 + 1).copied().unwrap_or_default();
            let pair = u16::from_le_bytes([bytes[at / 8], next]) >> (at % 8);
            let code = u32::from(pair & ((1 << bits) - 1));
            let level = row * scales.columns + i / group;
            values.push(match &biases {
                Some(biases) => scales.values[level] * f64::from(code) + biases.values[level],
                None if bits == 4 => scales.values[level] * small(code, 2, 1),
                None => scales.values[level] * small(code, 4, 3),
            });
        }
    }
    Matrix { columns, values }
}

/// W' = W + s (A B)^T, with magnitudes each row scaled to its own.
fn sum(w: &Matrix, adapter: &Tensors, path: &str) -> Vec<f64> {
    let part = |name: &str| adapter.get(&format!("{path}.{name}")).map(matrix);
    let (a, b, m) = (part("lora_a").unwrap(), part("lora_b").unwrap(), part("m"));
    let (rank, outputs) = (a.columns, b.columns);
    let mut values = w.values.clone();
    for (o, row) in values.chunks_exact_mut(w.columns).enumerate() {
        for (i, value) in row.iter_mut().enumerate() {
            let product = |r: usize| a.values[i * rank + r] * b.values[r * outputs + o];
            *value += SCALE * (0..rank).map(product).sum::<f64>();
        }
        if let Some(m) = &m {
            let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt();
            row.iter_mut().for_each(|v| *v *= m.values[o] / norm);
        }
    }
    values
}

pub(crate) fn distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| (x - y).powi(2)).sum::<f64>().sqrt()
}

/// Calls `check` with the report, the base's weight, the exact sum and what was stored, of every layer of a fuse.
fn each_layer(
    tiny: &Tiny,
    dora: bool,
    policy: Policy,
    mut check: impl FnMut(&LayerReport, &Matrix, &[f64], &Matrix),
) {
    let base = tiny_model(tiny);
    let adapter = tiny_adapter(base.path(), tiny, dora, 4, 9);
    let done = fused(base.path(), adapter.path(), policy);
    let (old, new) = (tensors(base.path()), tensors(&done.dir));
    let update = graft_quant::read_safetensors(&adapter.path().join("adapters.safetensors")).unwrap().0;
    assert_eq!(done.report.layers.len(), 14);
    for layer in &done.report.layers {
        let before = weight(base.path(), &old, &layer.path);
        check(layer, &before, &sum(&before, &update, &layer.path), &weight(&done.dir, &new, &layer.path));
    }
}

#[test]
fn floats_are_the_sum_rounded_once() {
    arrays(|| {
        for packed in [None, Some((4, 32)), Some((5, 64))] {
            // Half a unit in the last place of each type, and what f32 arithmetic adds to it.
            for (dtype, stored, ulp) in [
                (Dtype::F32, StoredDtype::F32, 2.0_f64.powi(-24)),
                (Dtype::F16, StoredDtype::F16, 2.0_f64.powi(-11)),
                (Dtype::Bf16, StoredDtype::BF16, 2.0_f64.powi(-8)),
            ] {
                let tiny = Tiny { packed, dtype, ..Tiny::new(Family::Qwen2) };
                for dora in [false, true] {
                    each_layer(&tiny, dora, Policy::Dense, |layer, _, exact, found| {
                        for (e, f) in exact.iter().zip(&found.values) {
                            // Numbers below 2^-14 are subnormal in f16.
                            let bound = ulp * e.abs().max(2.0_f64.powi(-14)) * 1.01 + 4e-7;
                            assert!((e - f).abs() <= bound, "{layer:?}: {e} stored as {f}");
                        }
                    });
                    let base = tiny_model(&tiny);
                    let adapter = tiny_adapter(base.path(), &tiny, dora, 4, 9);
                    let done = fused(base.path(), adapter.path(), Policy::Dense);
                    let q = &tensors(&done.dir)["model.layers.0.self_attn.q_proj.weight"];
                    assert_eq!((q.dtype, &q.shape[..]), (stored, &[64, 64][..]));
                }
            }
        }
    });
}

#[test]
fn what_the_report_says_of_a_layer_is_so() {
    arrays(|| {
        for tiny in every_model().filter(|tiny| tiny.packed.is_some()) {
            for (dora, policy) in [(false, Policy::Raise), (true, Policy::Raise), (true, Policy::Same)] {
                each_layer(&tiny, dora, policy, |layer, before, exact, found| {
                    let delta = distance(exact, &before.values);
                    let zero = vec![0.0; exact.len()];
                    let error = distance(&found.values, exact) / delta;
                    let real = distance(&found.values, &before.values);
                    let cosine: f64 = (found.values.iter().zip(&before.values).zip(exact))
                        .map(|((f, w), e)| (f - w) * (e - w))
                        .sum::<f64>()
                        / (delta * real);
                    let most = before.values.iter().fold(0.0, |most: f64, w| most.max(w.abs()));
                    let changed = found
                        .values
                        .iter()
                        .zip(&before.values)
                        .filter(|(f, w)| (*f - *w).abs() > 1e-6 * most)
                        .count();
                    for (said, is) in [
                        (layer.weight_norm, distance(&before.values, &zero)),
                        (layer.delta_norm, delta),
                        (layer.relative_error, error),
                        (layer.kept, 1.0 - error * error),
                        (layer.cosine, cosine),
                    ] {
                        assert!((said - is).abs() <= 1e-4 * is.abs().max(1e-2), "{layer:?}: {said}, is {is}");
                    }
                    // A value that a finer grid holds exactly may differ by a rounding of f32, here or there.
                    let changed = changed as f64 / exact.len() as f64;
                    assert!((layer.codes_changed - changed).abs() < 1e-3, "{layer:?}: {changed} changed");
                });
            }
        }
    });
}

#[test]
fn every_raised_value_is_within_half_a_step_or_at_the_end_of_its_scale() {
    arrays(|| {
        let tiny = Tiny { packed: Some((4, 32)), ..Tiny::new(Family::Llama) };
        let base = tiny_model(&tiny);
        let adapter = tiny_adapter(base.path(), &tiny, true, 4, 9);
        let done = fused(base.path(), adapter.path(), Policy::Raise);
        let new = tensors(&done.dir);
        let grid = Grid::affine(8, 32);
        let (mut outside, mut all) = (0, 0);
        each_layer(&tiny, true, Policy::Raise, |layer, _, exact, found| {
            let scales = matrix(&new[&format!("{}.scales", layer.path)]);
            let biases = matrix(&new[&format!("{}.biases", layer.path)]);
            for (i, (e, f)) in exact.iter().zip(&found.values).enumerate() {
                let level = i / grid.group_size as usize;
                let (scale, bias) = (scales.values[level], biases.values[level]);
                let (low, high) = (bias.min(bias + 255.0 * scale), bias.max(bias + 255.0 * scale));
                let inside = (low..=high).contains(e);
                (outside, all) = (outside + usize::from(!inside), all + 1);
                let nearest = e.clamp(low, high);
                assert!((nearest - f).abs() <= scale.abs() * 0.5001 + 1e-7, "{layer:?}: {e} stored as {f}");
            }
        });
        // A group keeps its scale, sixteen times finer, where that is nearer in squares than one as wide as the sum.
        assert!(outside < all / 20, "{outside} of {all} values lie beyond their scales");
    });
}

#[test]
fn the_zeroth_column_of_a_group_is_no_special_case() {
    // The reference reads three bits across byte borders as the writer writes them: 5 codes are 15 bits.
    let data = vec![0b1101_0001, 0b0101_1000, 0, 0];
    let tensor = |dtype, shape: &[usize], data| Tensor { dtype, shape: shape.to_vec(), data };
    let one: Vec<u8> = 1.0_f32.to_le_bytes().to_vec();
    let mut words = data;
    words.extend([0; 8]);
    let all = Tensors::from([
        ("p.weight".to_owned(), tensor(StoredDtype::U32, &[1, 3], words)),
        ("p.scales".to_owned(), tensor(StoredDtype::F32, &[1, 1], one)),
        ("p.biases".to_owned(), tensor(StoredDtype::F32, &[1, 1], vec![0; 4])),
    ]);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), r#"{"quantization": {"bits": 3, "group_size": 32}}"#)
        .unwrap();
    assert_eq!(weight(dir.path(), &all, "p").values[..5], [1.0, 2.0, 3.0, 4.0, 5.0]);
}
