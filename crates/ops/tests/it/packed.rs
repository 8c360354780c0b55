//! Products with packed and dense weights.

use std::sync::atomic::{AtomicBool, Ordering};

use graft_ops::ffi::{Mode, quantize};
use graft_ops::{
    Array, Dtype, Level, PackedRef, Precision, WeightRef, linear_cross_entropy, matmul, matmul_t, rows,
    set_cpu_level, set_precision, set_threads, with_precision,
};
use graft_testkit::tolerance;

use crate::support::{bits, check, every_level, mlx, mlx_form, random, values};

pub(crate) struct Weights {
    pub(crate) parts: Vec<Array>,
    group_size: i32,
    bits: i32,
    mode: Mode,
}

impl Weights {
    pub(crate) fn new(out: i32, inputs: i32, bits: i32, group_size: i32, dtype: Dtype) -> Weights {
        let w = random(5, &[out, inputs]).multiply(Array::from_f32(0.1)).unwrap();
        let mut parts = quantize(&w, group_size, bits, Mode::Affine).unwrap();
        for part in &mut parts[1..] {
            *part = part.as_dtype(dtype).unwrap();
        }
        mlx_rs::transforms::eval(&parts).unwrap();
        Weights { parts, group_size, bits, mode: Mode::Affine }
    }

    /// Floats of a mode.
    pub(crate) fn of(out: i32, inputs: i32, mode: Mode) -> Weights {
        let w = random(5, &[out, inputs]).multiply(Array::from_f32(0.1)).unwrap();
        let (bits, group_size) = mode.fixed().unwrap();
        let parts = quantize(&w, group_size, bits, mode).unwrap();
        mlx_rs::transforms::eval(&parts).unwrap();
        Weights { parts, group_size, bits, mode }
    }

    /// Other parts of the same kind.
    pub(crate) fn with(&self, parts: Vec<Array>) -> Weights {
        mlx_rs::transforms::eval(&parts).unwrap();
        Weights { parts, ..*self }
    }

    pub(crate) fn view(&self) -> WeightRef<'_> {
        WeightRef::Packed(self.parts())
    }

    pub(crate) fn parts(&self) -> PackedRef<'_> {
        let [codes, scales, ..] = &self.parts[..] else { unreachable!() };
        let biases = self.parts.get(2);
        PackedRef { codes, scales, biases, group_size: self.group_size, bits: self.bits, mode: self.mode }
    }

    /// The same numbers with scales that MLX's own product does not round.
    fn wide(&self) -> Weights {
        let mut parts = self.parts.clone();
        for part in &mut parts[1..] {
            *part = part.as_dtype(Dtype::Float32).unwrap();
        }
        Weights { parts, ..*self }
    }
}

#[test]
fn products_are_mlxs_at_every_width() {
    mlx(|| {
        for (i, width) in [2, 3, 4, 5, 6, 8].into_iter().enumerate() {
            for (j, group) in [32, 64, 128].into_iter().enumerate() {
                let dtype = [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16][(i + j) % 3];
                // Sizes that are no multiple of any tile.
                let w = Weights::new(77, 384, width, group, dtype);
                let wide = w.wide();
                for m in [1, 3, 6, 32, 33, 61] {
                    let x = random(m as u64, &[m, 384]);
                    let of = |form: &Weights, x: &Array| matmul(x, form.view());
                    let theirs = mlx_form(|| of(&wide, &x).unwrap());
                    theirs.eval().unwrap();
                    every_level(|level| {
                        let ours = of(&w, &x).unwrap();
                        if let Err(e) = graft_testkit::close(&ours, &theirs, tolerance::F32) {
                            panic!("{level:?}, {width} bits, groups of {group}, {m} rows: {e}");
                        }
                    });
                    let y = random(m as u64, &[m, 77]);
                    let theirs = mlx_form(|| matmul_t(&y, wide.view()).unwrap());
                    theirs.eval().unwrap();
                    every_level(|level| {
                        let ours = matmul_t(&y, w.view()).unwrap();
                        if let Err(e) = graft_testkit::close(&ours, &theirs, tolerance::F32) {
                            panic!("{level:?}, transposed, {width} bits, groups of {group}, {m} rows: {e}");
                        }
                    });
                }
            }
        }
    });
}

#[test]
fn deep_and_wide_products_cross_every_border_of_blocks() {
    mlx(|| {
        // More inputs than panels hold at a time, more rows than are laid out at a time.
        for (m, inputs, out) in [(1100, 96, 40), (40, 4608, 33), (70, 2304, 130)] {
            let w = Weights::new(out, inputs, 4, 32, Dtype::Float32);
            check(tolerance::F32, &[random(1, &[m, inputs])], |x| matmul(&x[0], w.view()));
            check(tolerance::F32, &[random(1, &[m, out])], |x| matmul_t(&x[0], w.view()));
        }
    });
}

#[test]
fn gradients_are_the_transposed_products() {
    mlx(|| {
        let w = Weights::new(96, 128, 4, 64, Dtype::Float32);
        for m in [2, 50] {
            check(tolerance::F32, &[random(1, &[m, 128])], |x| matmul(&x[0], w.view()));
            check(tolerance::F32, &[random(1, &[m, 96])], |x| matmul_t(&x[0], w.view()));
        }
        for (m, inputs) in [(2, 128), (50, 128), (3, 40)] {
            let args = [random(1, &[m, inputs]), random(2, &[96, inputs])];
            check(tolerance::F32, &args, |x| matmul(&x[0], WeightRef::Dense(&x[1])));
            let args = [random(1, &[m, 96]), random(2, &[96, inputs])];
            check(tolerance::F32, &args, |x| matmul_t(&x[0], WeightRef::Dense(&x[1])));
        }
    });
}

/// The first `n` rows of x, which is (rows, columns).
pub(crate) fn first(x: &Array, n: i32) -> Array {
    let ids = Array::from_iter(0..n, &[n]);
    x.take_axis(&ids, 0).unwrap()
}

#[test]
fn a_row_does_not_depend_on_its_neighbours_or_on_the_threads() {
    for precision in [Precision::F32, Precision::Bf16] {
        rows_are_alone(precision);
    }
}

fn rows_are_alone(precision: Precision) {
    mlx(|| {
        set_precision(precision);
        let inputs = 320;
        let dense = random(3, &[300, inputs]);
        every_level(|level| {
            for width in [2, 3, 4, 8] {
                let w = Weights::new(300, inputs, width, 32, Dtype::Float16);
                let few = random(1, &[32, inputs]);
                let many = random(2, &[1100, inputs]);
                let all = |x: &Array| {
                    let products = [matmul(x, w.view()), matmul(x, WeightRef::Dense(&dense))];
                    products.map(|y| bits(&y.unwrap()))
                };
                let back = |x: &Array| {
                    bits(&matmul_t(&matmul(x, WeightRef::Dense(&dense)).unwrap(), w.view()).unwrap())
                };
                set_threads(2);
                let (whole_few, whole_many, whole_back) = (all(&few), all(&many), back(&many));
                for threads in [1, 2, 3] {
                    set_threads(threads);
                    for n in [1, 2, 7, 16, 17, 32] {
                        for (part, whole) in all(&first(&few, n)).iter().zip(&whole_few) {
                            assert!(
                                part[..] == whole[..part.len()],
                                "{level:?}, {width} bits, {n} rows, {threads} threads"
                            );
                        }
                    }
                    for n in [33, 64, 511, 1021, 1100] {
                        for (part, whole) in all(&first(&many, n)).iter().zip(&whole_many) {
                            assert!(
                                part[..] == whole[..part.len()],
                                "{level:?}, {width} bits, {n} rows, {threads} threads"
                            );
                        }
                        let part = back(&first(&many, n));
                        assert!(
                            part[..] == whole_back[..part.len()],
                            "{level:?}, back, {n} rows, {threads} threads"
                        );
                    }
                }
            }
        });
        set_threads(2);
        set_precision(Precision::F32);
    });
}

#[test]
fn sixteen_bits_are_f32_for_weights_that_are_not_arranged() {
    mlx(|| {
        let (w, dense) = (Weights::new(77, 96, 4, 32, Dtype::Float16), random(3, &[77, 96]));
        let targets = Array::from_iter(0..40, &[40]);
        for m in [1, 33, 70] {
            let x = random(1, &[m, 96]);
            let all = |precision| {
                with_precision(precision, || {
                    let dense = WeightRef::Dense(&dense);
                    let losses = linear_cross_entropy(&random(2, &[40, 96]), dense, &targets, 64);
                    [matmul(&x, w.view()), matmul(&x, dense), losses].map(|y| bits(&y.unwrap()))
                })
            };
            assert!(all(Precision::Int16) == all(Precision::F32), "{m} rows");
        }
    });
}

#[test]
fn bf16_rounds_both_sides_and_nothing_else() {
    mlx(|| {
        let round = |x: &Array| x.as_dtype(Dtype::Bfloat16).unwrap().as_dtype(Dtype::Float32).unwrap();
        set_precision(Precision::Bf16);
        every_level(|level| {
            // With instructions for bf16 what is rounded decides the result; without them nothing is rounded.
            let rounds = level == Level::Avx512 && has("avx512bf16");
            // Groups of 128 do not divide the depth that a panel has with bf16.
            for (width, group, m, inputs, out) in [
                (4, 32, 61, 384, 77),
                (8, 32, 40, 2304, 33),
                (3, 32, 100, 96, 9),
                (4, 32, 1100, 64, 50),
                (4, 128, 61, 640, 77),
            ] {
                let w = Weights::new(out, inputs, width, group, Dtype::Float32);
                // Our own lookup: an f32 that differs in its last bit may be rounded to another bf16.
                let dense = rows(&Array::from_iter(0..out, &[out]), w.view(), Dtype::Float32).unwrap();
                for (x, ours) in [
                    (random(1, &[m, inputs]), matmul as fn(&Array, WeightRef) -> graft_ops::Result<Array>),
                    (random(2, &[m, out]), matmul_t),
                ] {
                    let y = ours(&x, w.view()).unwrap();
                    let (x, dense) = if rounds { (round(&x), round(&dense)) } else { (x, dense.clone()) };
                    let right = if x.dim(1) == inputs { dense.transpose().unwrap() } else { dense };
                    let expected = mlx_form(|| x.matmul(&right).unwrap());
                    if let Err(e) = graft_testkit::close(&y, &expected, tolerance::F32) {
                        panic!("{level:?}, {width} bits by {group}, {m} x {inputs} x {out}: {e}");
                    }
                }
            }
        });
        set_precision(Precision::F32);
    });
}

#[test]
fn another_level_may_be_chosen_while_products_run() {
    mlx(|| {
        let w = Weights::new(300, 320, 4, 32, Dtype::Float16);
        let x = random(1, &[200, 320]);
        let expected = matmul(&x, w.view()).unwrap();
        expected.eval().unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    [Level::Portable, Level::Avx2, Level::Avx512].into_iter().for_each(set_cpu_level);
                }
            });
            for i in 0..200 {
                let (precision, near) =
                    [(Precision::F32, tolerance::F32), (Precision::Bf16, tolerance::BF16)][i % 2];
                let y = with_precision(precision, || matmul(&x, w.view()).unwrap());
                graft_testkit::close(&y, &expected, near).unwrap_or_else(|e| {
                    done.store(true, Ordering::Relaxed);
                    panic!("{precision:?}: {e}")
                });
            }
            done.store(true, Ordering::Relaxed);
        });
        every_level(|_| {});
    });
}

/// Whether this processor has a feature that our operations know.
fn has(feature: &str) -> bool {
    graft_ops::info::info().cpu_features.contains(&feature)
}

#[test]
fn rows_are_looked_up_in_f32() {
    mlx(|| {
        for (width, group) in [(2, 32), (3, 64), (4, 128), (5, 32), (6, 32), (8, 64)] {
            let w = Weights::new(50, 128, width, group, Dtype::Float16);
            let ids = Array::from_slice(&[49, 0, 7, 7, 12], &[5]);
            let theirs = mlx_form(|| rows(&ids, w.view(), Dtype::Float32).unwrap());
            theirs.eval().unwrap();
            every_level(|_| {
                let ours = rows(&ids, w.view(), Dtype::Float32).unwrap();
                graft_testkit::assert_close(&ours, &theirs, tolerance::F32);
            });
        }
        let w = Weights::new(50, 128, 4, 32, Dtype::Float16);
        let outside = rows(&Array::from_slice(&[50, -1], &[2]), w.view(), Dtype::Float32).unwrap();
        assert!(values(&outside).iter().all(|x| *x == 0.0));
    });
}

#[test]
fn what_does_not_fit_is_an_error() {
    mlx(|| {
        let w = Weights::new(8, 64, 4, 32, Dtype::Float32);
        let e = matmul(&random(1, &[2, 60]), w.view()).unwrap_err().to_string();
        assert!(e.contains("64") && e.contains("60"), "{e}");
        let wrong = WeightRef::Packed(PackedRef { bits: 8, ..w.parts() });
        let e = matmul(&random(1, &[2, 64]), wrong).unwrap_err().to_string();
        assert!(e.contains("do not fit 8 bits"), "{e}");
        let e = matmul(&random(1, &[2, 60]), WeightRef::Dense(&random(1, &[4, 64]))).unwrap_err().to_string();
        assert!(e.contains("64") && e.contains("60"), "{e}");
        // Transposed and broadcast views are laid out anew before a kernel sees them.
        let x = random(3, &[64, 5]).transpose().unwrap();
        let straight = Array::from_slice(&values(&x.contiguous().unwrap()), &[5, 64]);
        let (a, b) = (matmul(&x, w.view()).unwrap(), matmul(&straight, w.view()).unwrap());
        assert_eq!(bits(&a), bits(&b));
    });
}
