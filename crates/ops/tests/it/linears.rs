//! Linears with a side path, a factor and a bias.

use graft_ops::{
    Array, Dtype, Input, LinearRef, LowRank, Precision, RowsUpdates, WeightRef, ffi, linears,
    linears_of_rows, matmul, set_threads, with_precision,
};
use graft_testkit::{assert_close, close, tolerance};

use crate::arranged::both;
use crate::packed::{Weights, first};
use crate::support::{bits, check, check_differences, every_level, mlx, mlx_form, random, with_gradients};

/// What the arguments are, in the order of the tests: x, then A, B and perhaps c of each linear.
struct Case<'a> {
    weights: Vec<WeightRef<'a>>,
    bias: Option<&'a Array>,
    factor: bool,
    own_input: bool,
    residual: bool,
}

impl Case<'_> {
    fn args(&self, rows: i32, rank: i32) -> Vec<Array> {
        let inputs = self.weights[0].shape().unwrap().1;
        let mut args = vec![random(1, &[rows, inputs])];
        for (i, w) in self.weights.iter().enumerate() {
            let out = w.shape().unwrap().0;
            let seed = 10 * i as u64;
            args.extend([random(seed + 2, &[inputs, rank]), random(seed + 3, &[rank, out])]);
            if self.factor {
                // Around one, as a ratio of norms is; some of them tiny or zero.
                let c = random(seed + 4, &[out]).abs().unwrap().add(Array::from_f32(0.5)).unwrap();
                let some = (0..out).map(|o| [1.0, 1.0, 0.0, 1.0, 1e-4][o as usize % 5]);
                args.push(c.multiply(Array::from_iter(some, &[out])).unwrap());
            }
            if self.own_input {
                args.push(random(seed + 5, &[rows, inputs]));
            }
            if self.residual {
                args.push(random(seed + 6, &[rows, out]));
            }
        }
        args
    }

    /// All outputs side by side.
    fn run(&self, args: &[Array]) -> graft_ops::Result<Array> {
        let mut rest = args[1..].iter();
        let parts: Vec<LinearRef> = self
            .weights
            .iter()
            .map(|weight| {
                let (a, b) = (rest.next().unwrap(), rest.next().unwrap());
                let factor = self.factor.then(|| rest.next().unwrap());
                let input = self.own_input.then(|| rest.next().unwrap());
                let residual = self.residual.then(|| rest.next().unwrap());
                let low_rank = Some(LowRank { a, b, scale: 0.5, factor, input });
                LinearRef { weight: *weight, bias: self.bias, residual, low_rank }
            })
            .collect();
        mlx_rs::ops::concatenate(&linears(&args[0], &parts)?, 1)
    }
}

#[test]
fn linears_and_their_gradients_are_mlxs() {
    mlx(|| {
        let (first, second) =
            (Weights::new(77, 96, 4, 32, Dtype::Float32), Weights::new(77, 96, 3, 32, Dtype::Float32));
        let dense = random(9, &[77, 96]).multiply(Array::from_f32(0.1)).unwrap();
        let bias = random(8, &[77]);
        for (weights, bias, factor, own_input, residual) in [
            (vec![first.view()], None, false, false, false),
            (vec![first.view(), second.view(), WeightRef::Dense(&dense)], None, false, false, false),
            (vec![first.view(), WeightRef::Dense(&dense)], Some(&bias), true, false, true),
            (vec![WeightRef::Dense(&dense)], Some(&bias), false, true, false),
            (vec![second.view()], None, true, true, true),
        ] {
            let case = Case { weights, bias, factor, own_input, residual };
            for (rows, rank) in [(1, 1), (5, 8), (50, 3), (35, 16), (20, 130)] {
                check(tolerance::F32_DEEP, &case.args(rows, rank), |args| case.run(args));
            }
        }
    });
}

#[test]
fn products_of_bf16_take_the_factor_along() {
    mlx(|| {
        // An odd number of outputs: in the gradient the last of them has no neighbour to share a word with.
        let (w, dense) = (Weights::new(77, 96, 4, 32, Dtype::Float32), random(9, &[77, 96]));
        for weight in [w.view(), WeightRef::Dense(&dense)] {
            let case =
                Case { weights: vec![weight], bias: None, factor: true, own_input: false, residual: false };
            for rows in [1, 50] {
                let args = case.args(rows, 3);
                let exact = mlx_form(|| with_gradients(&args, |args| case.run(args)));
                every_level(|level| {
                    let near =
                        with_precision(Precision::Bf16, || with_gradients(&args, |args| case.run(args)));
                    // The value and the gradient by x; the products of the others are f32's.
                    for (i, (near, exact)) in near.iter().zip(&exact).enumerate().take(2) {
                        close(near, exact, tolerance::BF16)
                            .unwrap_or_else(|e| panic!("{level:?}, {rows} rows, result {i}: {e}"));
                    }
                });
            }
        }
    });
}

#[test]
fn a_norm_or_a_gate_is_made_with_them_and_again_for_the_gradient() {
    mlx(|| {
        let (w, dense) = (Weights::new(77, 96, 4, 32, Dtype::Float16), random(9, &[77, 96]));
        // The first two are the input's, then A and B.
        let run = |args: &[Array], gate: bool| {
            let low_rank = LowRank { a: &args[2], b: &args[3], scale: 0.5, factor: None, input: None };
            let bare = LinearRef { weight: w.view(), bias: None, residual: None, low_rank: None };
            let parts = [
                LinearRef { low_rank: Some(low_rank), ..bare },
                LinearRef { weight: WeightRef::Dense(&dense), ..bare },
            ];
            let input = match gate {
                true => Input::Swiglu { gate: &args[0], up: &args[1] },
                false => Input::Norm { x: &args[0], weight: &args[1], eps: 1e-5 },
            };
            mlx_rs::ops::concatenate(&linears(input, &parts)?, 1)
        };
        for rows in [1, 7, 50] {
            let (a, b) = (random(3, &[96, 4]), random(4, &[4, 77]));
            for (gate, second) in [(true, random(2, &[rows, 96])), (false, random(2, &[96]))] {
                let args = [random(1, &[rows, 96]), second, a.clone(), b.clone()];
                check(tolerance::F32_DEEP, &args, |args| run(args, gate));
            }
        }
    });
}

#[test]
fn gradients_are_differences() {
    mlx(|| {
        let w = Weights::new(12, 64, 4, 32, Dtype::Float32);
        let case =
            Case { weights: vec![w.view()], bias: None, factor: true, own_input: false, residual: true };
        check_differences(&case.args(3, 2), |args| case.run(args));
    });
}

#[test]
fn what_has_no_update_is_the_product_and_the_bias() {
    mlx(|| {
        let w = Weights::new(50, 64, 4, 32, Dtype::Float32);
        let bias = random(2, &[50]);
        for bias in [None, Some(&bias)] {
            check(tolerance::F32, &[random(1, &[7, 64])], |x| {
                let parts = [LinearRef { weight: w.view(), bias, residual: None, low_rank: None }; 2];
                mlx_rs::ops::concatenate(&linears(&x[0], &parts)?, 1)
            });
        }
    });
}

#[test]
fn arranged_weights_take_updates_too() {
    mlx(|| {
        let Some((w, arranged)) = both(77, 96, 4, 32, Dtype::Float16) else { return };
        let bias = random(8, &[77]);
        let of = |weight| Case {
            weights: vec![weight; 2],
            bias: Some(&bias),
            factor: true,
            own_input: false,
            residual: true,
        };
        let plain = of(w.view());
        let args = plain.args(9, 8);
        let expected = mlx_form(|| plain.run(&args).unwrap());
        expected.eval().unwrap();
        let ours =
            with_precision(Precision::Int16, || of(WeightRef::Arranged(&arranged)).run(&args)).unwrap();
        // The arranged product rounds x to 16 bits, and MLX's form computes with scales of 16 bits.
        let tolerance =
            graft_testkit::Tolerance { name: "16-bit activations", absolute: 1e-6, relative: 1e-3 };
        assert_close(&ours, &expected, tolerance);
    });
}

#[test]
fn a_row_does_not_depend_on_its_neighbours_or_on_the_threads() {
    mlx(|| {
        let w = Weights::new(300, 320, 4, 32, Dtype::Float16);
        let case = Case {
            weights: vec![w.view(), w.view()],
            bias: None,
            factor: true,
            own_input: false,
            residual: true,
        };
        let args = case.args(100, 8);
        every_level(|level| {
            let run = |n: i32| {
                let mut args = args.clone();
                for arg in &mut args {
                    if arg.dim(0) == 100 {
                        *arg = first(arg, n);
                    }
                }
                bits(&case.run(&args).unwrap())
            };
            set_threads(2);
            let (few, many) = (run(32), run(100));
            for threads in [1, 2, 3] {
                set_threads(threads);
                for n in [1, 7, 16, 17, 32, 33, 70, 100] {
                    let part = run(n);
                    let whole = if n > 32 { &many } else { &few };
                    assert!(part[..] == whole[..part.len()], "{level:?}, {n} rows, {threads} threads");
                }
            }
        });
        set_threads(2);
    });
}

#[test]
fn what_does_not_fit_is_an_error() {
    mlx(|| {
        let w = Weights::new(50, 64, 4, 32, Dtype::Float32);
        let (x, a, b) = (random(1, &[3, 64]), random(2, &[64, 4]), random(3, &[5, 50]));
        let low_rank = Some(LowRank { a: &a, b: &b, scale: 1.0, factor: None, input: None });
        let e = linears(&x, &[LinearRef { weight: w.view(), bias: None, residual: None, low_rank }])
            .unwrap_err()
            .to_string();
        assert!(e.contains("[64, 4]") && e.contains("[5, 50]") && e.contains("(50, 64)"), "{e}");
        let short = random(4, &[49]);
        let e = linears(
            &x,
            &[LinearRef { weight: w.view(), bias: Some(&short), residual: None, low_rank: None }],
        )
        .unwrap_err();
        assert!(e.to_string().contains("the bias of 50 outputs"), "{e}");
        let h = random(5, &[2, 50]);
        let parts = [LinearRef { weight: w.view(), bias: None, residual: Some(&h), low_rank: None }];
        let e = linears(&x, &parts).unwrap_err().to_string();
        assert!(e.contains("cannot be added to [2, 50]"), "{e}");
        let (a, b) = (random(2, &[64, 0]), random(3, &[0, 50]));
        let low_rank = Some(LowRank { a: &a, b: &b, scale: 1.0, factor: None, input: None });
        let parts = [LinearRef { weight: w.view(), bias: None, residual: None, low_rank }];
        let e = linears(&x, &parts).unwrap_err().to_string();
        assert!(e.contains("A [64, 0] and B [0, 50] have rank 0"), "{e}");
        for (out, inputs) in [(0, 64), (50, 0)] {
            let (w, x) = (random(1, &[out, inputs]), random(2, &[3, inputs]));
            let weight = WeightRef::Dense(&w);
            let parts = [LinearRef { weight, bias: None, residual: None, low_rank: None }];
            for e in [linears(&x, &parts).unwrap_err(), matmul(&x, weight).unwrap_err()] {
                assert!(
                    e.to_string().contains(&format!("at least 1 of each, found ({out}, {inputs})")),
                    "{e}"
                );
            }
        }
    });
}

#[test]
fn what_stands_beside_a_weight_is_f32_as_x_is() {
    mlx(|| {
        let w = Weights::new(50, 64, 4, 32, Dtype::Float32);
        let x = random(1, &[3, 64]);
        let parts = [&[64, 4][..], &[4, 50], &[50], &[3, 64], &[50], &[3, 50]].map(|shape| random(2, shape));
        let names = ["A", "B", "the factor", "the side path's own input", "the bias", "the residual"];
        for (i, name) in names.into_iter().enumerate() {
            let mut parts = parts.clone();
            parts[i] = parts[i].as_dtype(Dtype::Bfloat16).unwrap();
            let [a, b, factor, input, bias, residual] = &parts;
            let low_rank = Some(LowRank { a, b, scale: 1.0, factor: Some(factor), input: Some(input) });
            let part = LinearRef { weight: w.view(), bias: Some(bias), residual: Some(residual), low_rank };
            let e = linears(&x, &[part]).unwrap_err().to_string();
            assert!(e.contains(&format!("{name} must be f32")) && e.contains("Bfloat16"), "{e}");
        }
    });
}

#[test]
fn what_is_frozen_has_no_gradient_and_says_so() {
    mlx(|| {
        let args = [random(1, &[3, 64]), random(2, &[50, 64]), random(3, &[50])];
        let loss = |args: &[Array]| {
            let (weight, bias) = (WeightRef::Dense(&args[1]), Some(&args[2]));
            let first = LinearRef { weight, bias: None, residual: None, low_rank: None };
            let ys = linears(&args[0], &[first, LinearRef { bias, ..first }])?;
            Ok(vec![ys[0].add(&ys[1])?.sum(false)?])
        };
        ffi::value_and_grad(loss, &args, &[0]).unwrap();
        for (input, name) in [(1, "the weight of linear 0 is frozen"), (2, "the bias of linear 1 is frozen")]
        {
            let e = ffi::value_and_grad(loss, &args, &[input]).unwrap_err().to_string();
            assert!(e.contains(name) && e.contains("`matmul`"), "{e}");
        }
    });
}

#[test]
fn without_an_update_x_is_not_kept_for_the_gradient() {
    mlx(|| {
        let w = Weights::new(256, 256, 4, 32, Dtype::Float32);
        let x = random(1, &[4096, 256]);
        let kept = |layers: usize| {
            let loss = |args: &[Array]| {
                let part = LinearRef { weight: w.view(), bias: None, residual: None, low_rank: None };
                let mut h = args[0].clone();
                for _ in 0..layers {
                    h = linears(&h, &[part])?.swap_remove(0);
                }
                Ok(vec![h.sum(false)?])
            };
            let (value, gradients) = ffi::value_and_grad(loss, std::slice::from_ref(&x), &[0]).unwrap();
            mlx_rs::transforms::eval(&value).unwrap();
            // The gradients are a graph still, which holds what it will read.
            let kept = ffi::memory::active_memory().unwrap();
            mlx_rs::transforms::eval(&gradients).unwrap();
            kept
        };
        let (few, many) = (kept(2), kept(18));
        assert!(many < few + 4 * x.nbytes(), "{few} bytes with 2 layers, {many} with 18");
    });
}

#[test]
fn groups_of_rows_give_what_each_gives_alone() {
    let run = |exactly: bool| {
        let (w, dense) = (Weights::new(77, 96, 4, 32, Dtype::Float16), random(9, &[77, 96]));
        let (x, bias, h, c) =
            (random(1, &[12, 96]), random(2, &[77]), random(3, &[12, 77]), random(4, &[77]));
        let (a, b) = (random(5, &[96, 5]), random(6, &[5, 77]));
        let lora = LowRank { a: &a, b: &b, scale: 0.5, factor: None, input: None };
        let dora = LowRank { scale: 2.0, factor: Some(&c), ..lora };
        let groups: Vec<RowsUpdates> =
            vec![(2, vec![Some(lora), Some(dora)]), (7, vec![None, Some(lora)]), (3, vec![Some(dora), None])];
        let plain = [w.view(), WeightRef::Dense(&dense)].map(|weight| LinearRef {
            weight,
            bias: Some(&bias),
            residual: Some(&h),
            low_rank: None,
        });
        let together = linears_of_rows(&x, &plain, &groups).unwrap();
        for (index, y) in together.iter().enumerate() {
            let mut from = 0;
            for (rows, own) in &groups {
                let part = |array: &Array| {
                    array
                        .take_axis(Array::from_slice(&(from..from + rows).collect::<Vec<i32>>(), &[*rows]), 0)
                        .unwrap()
                };
                let h = part(&h);
                let linear = LinearRef { residual: Some(&h), low_rank: own[index], ..plain[index] };
                let alone = linears(&part(&x), &[linear]).unwrap();
                if exactly {
                    assert_eq!(bits(&part(y)), bits(&alone[0]), "linear {index}, rows from {from}");
                } else {
                    assert_close(&part(y), &alone[0], tolerance::F32_DEEP);
                }
                from += rows;
            }
        }
        for wrong in [
            vec![(2, vec![None, None])],
            vec![(12, vec![None])],
            vec![(12, vec![None, None]), (0, vec![None; 2])],
        ] {
            let e = linears_of_rows(&x, &plain, &wrong).unwrap_err().to_string();
            assert!(e.contains("[12, 96]"), "{e}");
        }
    };
    mlx(|| run(true));
    mlx(|| mlx_form(|| run(false)));
}
