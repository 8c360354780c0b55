//! Packed weights whose codes are floats: mxfp4, nvfp4 and mxfp8, against MLX's own unpacking and products.

use graft_ops::ffi::{self, Mode};
use graft_ops::{
    Array, Dtype, LinearRef, LowRank, PackedRef, Precision, WeightRef, arrange, dequantize,
    linear_cross_entropy, linears, matmul, matmul_t, row_norms, rows, with_precision,
};
use graft_testkit::tolerance;

use crate::arranged::laid_out;
use crate::packed::{Weights, first};
use crate::support::{bits, check, check_differences, every_level, mlx, mlx_form, random, values};

pub(crate) const MODES: [Mode; 3] = [Mode::Mxfp4, Mode::Nvfp4, Mode::Mxfp8];

/// The same bits, whichever NaN they are.
fn same(ours: &Array, theirs: &Array) -> Result<(), String> {
    for (i, (a, b)) in values(ours).into_iter().zip(values(theirs)).enumerate() {
        if a.to_bits() != b.to_bits() && !(a.is_nan() && b.is_nan()) {
            return Err(format!("element {i}: {a:e}, in MLX {b:e}"));
        }
    }
    Ok(())
}

/// Row s has the scale s in all groups, and every code that there is.
fn table(mode: Mode) -> [Array; 2] {
    let (bits, group) = mode.fixed().unwrap();
    let codes: Vec<u8> = match bits {
        8 => (0..=255).collect(),
        _ => (0..64).map(|i| (i * 2 % 16) | (i * 2 % 16 + 1) << 4).collect(),
    };
    let inputs = codes.len() as i32 * 8 / bits;
    let codes = ffi::array_from_bytes(&codes.repeat(256), &[256, inputs * bits / 32], Dtype::Uint32).unwrap();
    let scales: Vec<u8> = (0..=255).flat_map(|s| vec![s; (inputs / group) as usize]).collect();
    [codes, ffi::array_from_bytes(&scales, &[256, inputs / group], Dtype::Uint8).unwrap()]
}

#[test]
fn every_code_with_every_scale_is_mlxs_to_the_bit() {
    mlx(|| {
        for mode in MODES {
            let (bits, group_size) = mode.fixed().unwrap();
            let [codes, scales] = table(mode);
            let w = PackedRef { codes: &codes, scales: &scales, biases: None, group_size, bits, mode };
            let theirs = dequantize(w, Dtype::Float32).unwrap();
            let ids = Array::from_iter(0..256, &[256]);
            every_level(|level| {
                let ours = rows(&ids, WeightRef::Packed(w), Dtype::Float32).unwrap();
                same(&ours, &theirs).unwrap_or_else(|e| panic!("{mode:?}, {level:?}: {e}"));
            });
        }
    });
}

#[test]
fn every_path_of_products_unpacks_alike() {
    mlx(|| {
        // Inputs that are no multiple of a panel's depth, or of a block; outputs that are none of a panel's width.
        let odd = (Mode::Nvfp4, 176);
        for (mode, inputs) in MODES.map(|mode| (mode, 352)).into_iter().chain([odd]) {
            let out = 45;
            let wide = Weights::of(out, 352, mode);
            let of =
                |x: &Array, columns: i32| x.take_axis(Array::from_iter(0..columns, &[columns]), 1).unwrap();
            let dense = of(&dequantize(wide.parts(), Dtype::Float32).unwrap(), inputs);
            let (bits, group) = mode.fixed().unwrap();
            let w =
                wide.with(vec![of(&wide.parts[0], inputs * bits / 32), of(&wide.parts[1], inputs / group)]);
            let turned = dense.transpose().unwrap().contiguous().unwrap();
            let ones = |n: i32| mlx_rs::ops::eye::<f32>(n, None, None).unwrap();
            every_level(|level| {
                // A row of x with a single one picks a column of W.
                for step in [1, 4, 20, inputs] {
                    let parts: Vec<Array> = (0..inputs)
                        .step_by(step as usize)
                        .map(|at| {
                            let ids = Array::from_iter(at..(at + step).min(inputs), &[step.min(inputs - at)]);
                            matmul(&ones(inputs).take_axis(&ids, 0).unwrap(), w.view()).unwrap()
                        })
                        .collect();
                    let all = mlx_rs::ops::concatenate(&parts, 0).unwrap();
                    assert_eq!(values(&all), values(&turned), "{mode:?}, {level:?}, {step} rows");
                }
                let back = matmul_t(&ones(out), w.view()).unwrap();
                assert_eq!(values(&back), values(&dense), "{mode:?}, {level:?}, transposed");
            });
        }
    });
}

#[test]
fn products_and_gradients_are_mlxs() {
    mlx(|| {
        for mode in MODES {
            let w = Weights::of(77, 384, mode);
            for m in [1, 3, 6, 32, 33, 61] {
                check(tolerance::F32, &[random(m as u64, &[m, 384])], |x| matmul(&x[0], w.view()));
                check(tolerance::F32, &[random(m as u64, &[m, 77])], |x| matmul_t(&x[0], w.view()));
                let (x, back) = (random(m as u64, &[m, 384]), random(m as u64, &[m, 77]));
                let exact = mlx_form(|| [matmul(&x, w.view()).unwrap(), matmul_t(&back, w.view()).unwrap()]);
                let near =
                    with_precision(Precision::Bf16, || [matmul(&x, w.view()), matmul_t(&back, w.view())]);
                for (near, exact) in near.into_iter().zip(exact) {
                    graft_testkit::assert_close(&near.unwrap(), &exact, tolerance::BF16);
                }
            }
        }
    });
}

#[test]
fn linears_with_updates_their_gradients_and_row_norms_are_mlxs() {
    mlx(|| {
        for mode in MODES {
            let w = Weights::of(77, 96, mode);
            let run = |args: &[Array]| {
                let low_rank =
                    LowRank { a: &args[1], b: &args[2], scale: 0.5, factor: Some(&args[3]), input: None };
                let part = LinearRef {
                    weight: w.view(),
                    bias: None,
                    residual: Some(&args[4]),
                    low_rank: Some(low_rank),
                };
                Ok(linears(&args[0], &[part])?.swap_remove(0))
            };
            let args = |m: i32| {
                let factor = random(4, &[77]).abs().unwrap().add(Array::from_f32(0.5)).unwrap();
                [random(1, &[m, 96]), random(2, &[96, 4]), random(3, &[4, 77]), factor, random(5, &[m, 77])]
            };
            check(tolerance::F32_DEEP, &args(7), run);
            check(tolerance::F32_DEEP, &args(50), run);
            check_differences(&args(3), run);
            let [_, a, b, ..] = args(1);
            let dense = dequantize(w.parts(), Dtype::Float32).unwrap();
            let n0 = dense.square().unwrap().sum_axis(1, false).unwrap();
            let whole = dense.add(a.matmul(&b).unwrap().transpose().unwrap()).unwrap();
            let whole = whole.square().unwrap().sum_axis(1, false).unwrap().sqrt().unwrap();
            let norms = || row_norms(&a, &b, 1.0, w.view(), &n0).unwrap();
            graft_testkit::assert_close(&norms(), &whole, tolerance::F32);
            graft_testkit::assert_close(&mlx_form(norms), &whole, tolerance::F32);
        }
    });
}

#[test]
fn the_head_and_its_gradient_are_mlxs() {
    mlx(|| {
        for mode in MODES {
            let w = Weights::of(300, 64, mode);
            let targets = Array::from_iter((0..40).map(|i| 7 * i), &[40]);
            check(tolerance::F32_DEEP, &[random(1, &[40, 64])], |h| {
                linear_cross_entropy(&h[0], w.view(), &targets, 16)
            });
        }
    });
}

#[test]
fn other_numbers_than_the_modes_are_refused() {
    mlx(|| {
        for mode in MODES {
            let w = Weights::of(8, 64, mode);
            let x = random(1, &[2, 64]);
            let refused = |w: PackedRef| matmul(&x, WeightRef::Packed(w)).unwrap_err().to_string();
            let e = refused(PackedRef { group_size: 64, ..w.parts() });
            assert!(e.contains(mode.name()) && e.contains("groups of 64"), "{e}");
            let e = refused(PackedRef { biases: Some(w.parts().scales), ..w.parts() });
            assert!(e.contains("no biases"), "{e}");
            let floats = random(2, w.parts().scales.shape());
            let e = refused(PackedRef { scales: &floats, ..w.parts() });
            assert!(e.contains("uint8") && e.contains("Float32"), "{e}");
            // The same bits of the same weights, wherever they come from.
            let ids = Array::from_iter(0..8, &[8]);
            let theirs = mlx_form(|| rows(&ids, w.view(), Dtype::Float32).unwrap());
            assert_eq!(bits(&rows(&ids, w.view(), Dtype::Float32).unwrap()), bits(&theirs));
        }
    });
}

#[test]
fn floats_of_four_bits_are_laid_out_for_answers() {
    mlx(|| {
        for mode in [Mode::Mxfp4, Mode::Nvfp4] {
            let Some((w, arranged)) = laid_out(Weights::of(50, 320, mode)) else { return };
            let ids = Array::from_iter((0..50).rev(), &[50]);
            let of = |w| rows(&ids, w, Dtype::Float32).unwrap();
            assert_eq!(bits(&of(WeightRef::Arranged(&arranged))), bits(&of(w.view())), "{mode:?}");
            let x = random(1, &[40, 320]);
            every_level(|level| {
                let exact = matmul(&x, w.view()).unwrap();
                let wide = matmul(&x, WeightRef::Arranged(&arranged)).unwrap();
                graft_testkit::assert_close(&wide, &exact, tolerance::F32);
                for m in [1, 2, 9, 40] {
                    let x = first(&x, m);
                    let y = with_precision(Precision::Int16, || matmul(&x, WeightRef::Arranged(&arranged)));
                    // Half a step of 2^-15 of the largest of 32, at random: a tenth of F32_DEEP in the mean.
                    graft_testkit::close(&y.unwrap(), &first(&exact, m), tolerance::F32_DEEP)
                        .unwrap_or_else(|e| panic!("{mode:?}, {level:?}, {m} rows: {e}"));
                }
            });
        }
        let w = Weights::of(50, 320, Mode::Mxfp8);
        assert!(with_precision(Precision::Int16, || arrange(w.parts())).unwrap().is_none());
    });
}
