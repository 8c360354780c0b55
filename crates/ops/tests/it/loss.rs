//! Cross-entropy with the head folded in.

use graft_ops::ffi::{Mode, quantize};
use graft_ops::{Array, PackedRef, WeightRef, cross_entropy, linear_cross_entropy, matmul};
use graft_testkit::{assert_close, tolerance};

use crate::support::{check, every_level, mlx, mlx_form, random, values, with_gradients};

#[test]
fn the_folded_head_is_the_head_and_then_the_loss() {
    mlx(|| {
        let w = random(3, &[501, 64]);
        let parts = quantize(&w, 32, 4, Mode::Affine).unwrap();
        mlx_rs::transforms::eval(&parts).unwrap();
        let packed = PackedRef {
            codes: &parts[0],
            scales: &parts[1],
            biases: Some(&parts[2]),
            group_size: 32,
            bits: 4,
            mode: Mode::Affine,
        };
        for rows in [1, 5, 40] {
            let targets = Array::from_iter((0..rows).map(|i| (i * 97) % 501), &[rows]);
            let h = random(rows as u64, &[rows, 64]);
            check(tolerance::F32_DEEP, std::slice::from_ref(&h), |x| {
                linear_cross_entropy(&x[0], WeightRef::Packed(packed), &targets, 16)
            });
            check(tolerance::F32_DEEP, std::slice::from_ref(&h), |x| {
                linear_cross_entropy(&x[0], WeightRef::Dense(&w), &targets, 16)
            });
            // Against logits that are held.
            let plain = mlx_form(|| {
                with_gradients(std::slice::from_ref(&h), |x| {
                    cross_entropy(&matmul(&x[0], WeightRef::Packed(packed))?, &targets)
                })
            });
            every_level(|_| {
                let folded = with_gradients(std::slice::from_ref(&h), |x| {
                    linear_cross_entropy(&x[0], WeightRef::Packed(packed), &targets, 16)
                });
                for (a, b) in folded.iter().zip(&plain) {
                    assert_close(a, b, tolerance::F32_DEEP);
                }
            });
        }
    });
}

#[test]
fn a_large_vocabulary_is_taken_in_parts() {
    mlx(|| {
        // More logits than are held at a time.
        let (rows, vocabulary) = (150, 70_000);
        let (h, w) = (random(1, &[rows, 32]), random(2, &[vocabulary, 32]));
        let targets = Array::from_iter((0..rows).map(|i| i * 433), &[rows]);
        let folded = linear_cross_entropy(&h, WeightRef::Dense(&w), &targets, 64).unwrap();
        let held = mlx_form(|| cross_entropy(&matmul(&h, WeightRef::Dense(&w)).unwrap(), &targets).unwrap());
        assert_close(&folded, &held, tolerance::F32_DEEP);
    });
}

#[test]
fn nothing_that_is_not_a_number_gets_lost() {
    mlx(|| {
        every_level(|level| {
            let mut h = vec![0.5_f32; 64];
            h[3] = f32::NAN;
            let h = Array::from_slice(&h, &[2, 32]);
            let w = random(1, &[40, 32]);
            let loss = values(
                &linear_cross_entropy(&h, WeightRef::Dense(&w), &Array::from_slice(&[1, 2], &[2]), 8)
                    .unwrap(),
            );
            assert!(loss[0].is_nan() && loss[1].is_finite(), "{level:?}: {loss:?}");
            let loss = linear_cross_entropy(
                &random(2, &[1, 32]),
                WeightRef::Dense(&w),
                &Array::from_slice(&[40], &[1]),
                8,
            );
            assert!(values(&loss.unwrap())[0].is_nan());
        });
    });
}

#[test]
fn no_rows_have_no_losses() {
    mlx(|| {
        let w = random(1, &[40, 32]);
        let none = linear_cross_entropy(
            &random(2, &[0, 32]),
            WeightRef::Dense(&w),
            &Array::from_slice::<i32>(&[], &[0]),
            8,
        );
        assert_eq!(none.unwrap().shape(), [0]);
    });
}
