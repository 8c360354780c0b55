//! Weights laid out for inference, and activations rounded to 16 bits.

use graft_ops::{
    Arranged, Array, Dtype, Precision, WeightRef, arrange, linear_cross_entropy, matmul, rows, set_precision,
    set_threads, with_precision,
};
use graft_testkit::{assert_close, close, tolerance};

use crate::packed::{Weights, first};
use crate::support::{bits, every_level, mlx, random, skipped, values};

/// The weights in both layouts, or none where the processor has no use for the second.
pub(crate) fn both(
    out: i32,
    inputs: i32,
    width: i32,
    group: i32,
    dtype: Dtype,
) -> Option<(Weights, Arranged)> {
    laid_out(Weights::new(out, inputs, width, group, dtype))
}

/// The same of any weights.
pub(crate) fn laid_out(w: Weights) -> Option<(Weights, Arranged)> {
    let arranged = with_precision(Precision::Int16, || arrange(w.parts())).unwrap();
    let Some(arranged) = arranged else {
        skipped("there is no AVX-512 VNNI, or it is not to be used, so weights stay as they are");
        return None;
    };
    mlx_rs::transforms::eval(arranged.arrays()).unwrap();
    Some((w, arranged))
}

#[test]
fn the_layout_keeps_every_weight() {
    mlx(|| {
        for (width, group, dtype) in [
            (2, 64, Dtype::Float16),
            (3, 32, Dtype::Float16),
            (4, 128, Dtype::Bfloat16),
            (4, 32, Dtype::Float32),
            (5, 32, Dtype::Float16),
            (6, 64, Dtype::Bfloat16),
            (8, 32, Dtype::Float16),
        ] {
            // Rows that do not fill the last panel.
            let Some((w, arranged)) = both(50, 256, width, group, dtype) else { return };
            assert_eq!(arranged.shape(), (50, 256));
            let ids = Array::from_iter((0..50).rev(), &[50]);
            let expected = rows(&ids, w.view(), Dtype::Float32).unwrap();
            assert_close(
                &rows(&ids, WeightRef::Arranged(&arranged), Dtype::Float32).unwrap(),
                &expected,
                tolerance::F32,
            );
            let x = random(1, &[40, 256]);
            let exact = matmul(&x, w.view()).unwrap();
            exact.eval().unwrap();
            every_level(|level| {
                // In f32 the layout makes no difference, whatever the number of rows.
                for m in [1, 40] {
                    let y = matmul(&first(&x, m), WeightRef::Arranged(&arranged)).unwrap();
                    if let Err(e) = close(&y, &first(&exact, m), tolerance::F32) {
                        panic!("{level:?}, {width} bits, {m} rows: {e}");
                    }
                }
            });
        }
        let Some((_, arranged)) = both(50, 256, 4, 32, Dtype::Float16) else { return };
        let outside =
            rows(&Array::from_slice(&[50, -1], &[2]), WeightRef::Arranged(&arranged), Dtype::Float32)
                .unwrap();
        assert!(values(&outside).iter().all(|x| *x == 0.0));
        let e = matmul(&random(1, &[2, 64]), WeightRef::Arranged(&arranged)).unwrap_err().to_string();
        assert!(e.contains("256") && e.contains("64"), "{e}");
    });
}

#[test]
fn sixteen_bits_round_the_activations_and_nothing_else() {
    mlx(|| {
        for (width, group, inputs, dtype) in [
            (4, 32, 320, Dtype::Float16),
            (8, 32, 96, Dtype::Bfloat16),
            (3, 64, 256, Dtype::Float32),
            (4, 128, 1536, Dtype::Bfloat16),
            (6, 32, 64, Dtype::Float32),
        ] {
            let Some((w, arranged)) = both(70, inputs, width, group, dtype) else { return };
            let ids = Array::from_iter(0..70, &[70]);
            let dense = values(&rows(&ids, w.view(), Dtype::Float32).unwrap());
            every_level(|level| {
                for m in [1, 2, 9, 33] {
                    // One block of each row is not zero, so that a large block does not hide what happens to a small one;
                    // it has a size of its own and one number that is larger than the others.
                    let mut x = values(&random(m as u64, &[m, inputs]));
                    for (i, row) in x.chunks_mut(inputs as usize).enumerate() {
                        let (size, kept) = ([1.0, 1e-6, 1e6, 3e-3][i % 4], 5 * i % (inputs as usize / 32));
                        for (at, block) in row.chunks_mut(32).enumerate() {
                            let factor = if at == kept { size } else { 0.0 };
                            block.iter_mut().for_each(|x| *x *= factor);
                            block[7] *= 20.0;
                        }
                    }
                    let array = Array::from_slice(&x, &[m, inputs]);
                    let y =
                        with_precision(Precision::Int16, || matmul(&array, WeightRef::Arranged(&arranged)));
                    let y = values(&y.unwrap());
                    for (i, row) in x.chunks(inputs as usize).enumerate() {
                        let step = row.iter().fold(0.0_f32, |most, x| most.max(x.abs())) / (127.0 * 254.0);
                        for (o, w) in dense.chunks(inputs as usize).enumerate() {
                            let terms = || row.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
                            // Half a step for each number of the block, then f32's own rounding of some sums.
                            let touched = row.iter().zip(w).filter(|(x, _)| **x != 0.0);
                            let rounding = touched.map(|(_, w)| f64::from(step / 2.0 * w.abs())).sum::<f64>();
                            // A weight is scale * code + bias, two terms that may be much larger than their sum.
                            let sums = 1e-6 * row.iter().map(|x| f64::from(x.abs())).sum::<f64>();
                            let gap = (f64::from(y[i * 70 + o]) - terms().sum::<f64>()).abs();
                            assert!(
                                gap <= 1.01 * rounding + sums,
                                "{level:?}, {width} bits, {m} rows, row {i}, output {o}: off by {gap:e}, rounding {rounding:e}"
                            );
                        }
                    }
                }
            });
        }
    });
}

#[test]
fn a_row_does_not_depend_on_its_neighbours_or_on_the_threads() {
    mlx(|| {
        for width in [4, 8] {
            let Some((_, arranged)) = both(300, 320, width, 32, Dtype::Float16) else { return };
            let x = random(1, &[200, 320]);
            let product = |x: &Array| {
                set_precision(Precision::Int16);
                let y = bits(&matmul(x, WeightRef::Arranged(&arranged)).unwrap());
                set_precision(Precision::F32);
                y
            };
            set_threads(2);
            let whole = product(&x);
            for threads in [1, 2, 3] {
                set_threads(threads);
                for n in [1, 2, 7, 8, 16, 17, 32, 33, 64, 200] {
                    let part = product(&first(&x, n));
                    assert!(part[..] == whole[..part.len()], "{width} bits, {n} rows, {threads} threads");
                }
            }
            set_threads(2);
        }
    });
}

#[test]
fn the_head_rounds_as_the_product_does() {
    mlx(|| {
        let Some((_, arranged)) = both(300, 64, 4, 32, Dtype::Float16) else { return };
        let (h, targets) = (random(1, &[5, 64]), Array::from_slice(&[0, 299, 7, 7, 100], &[5]));
        let (folded, logits) = with_precision(Precision::Int16, || {
            let folded = linear_cross_entropy(&h, WeightRef::Arranged(&arranged), &targets, 64).unwrap();
            (folded, matmul(&h, WeightRef::Arranged(&arranged)).unwrap())
        });
        assert_close(&folded, &graft_ops::cross_entropy(&logits, &targets).unwrap(), tolerance::F32);
    });
}

#[test]
fn nothing_that_is_not_a_number_gets_lost() {
    mlx(|| {
        let Some((_, arranged)) = both(20, 64, 4, 32, Dtype::Float16) else { return };
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![0.5_f32; 128];
            x[40] = broken;
            let x = Array::from_slice(&x, &[2, 64]);
            every_level(|level| {
                let y = values(
                    &with_precision(Precision::Int16, || matmul(&x, WeightRef::Arranged(&arranged))).unwrap(),
                );
                assert!(
                    y[..20].iter().all(|y| !y.is_finite()) && y[20..].iter().all(|y| y.is_finite()),
                    "{level:?}, {broken}"
                );
            });
        }
    });
}
