//! Linears of arranged weights with what stands before and after them in one operation, against the parts one by one.

use graft_ops::{
    Arranged, Array, Dtype, Input, LinearRef, LowRank, Precision, RowsUpdates, WeightRef, arrange_update,
    linears, linears_of_rows, matmul, set_threads, with_precision,
};
use graft_testkit::{assert_close, mlx, tolerance};
use mlx_rs::ops;

use crate::arranged::both;
use crate::packed::first;
use crate::support::{bits, random};

/// The three things that x can come out of, from two arrays of x's shape and a weight.
fn inputs<'a>(x: &'a Array, other: &'a Array, weight: &'a Array) -> [Input<'a>; 3] {
    [Input::Plain(x), Input::Norm { x, weight, eps: 1e-5 }, Input::Swiglu { gate: x, up: other }]
}

/// A and B as answers read them, and rounded as these are.
struct Update {
    arranged: (Array, Array),
    rounded: (Array, Array),
}

impl Update {
    fn new(weight: &Arranged, seed: u64, (inputs, rank, out): (i32, i32, i32)) -> Self {
        let (a, b) = (random(seed, &[inputs, rank]), random(seed + 1, &[rank, out]));
        let rounded =
            |array: &Array| array.as_dtype(Dtype::Bfloat16).unwrap().as_dtype(Dtype::Float32).unwrap();
        let arranged = arrange_update(WeightRef::Arranged(weight), &a, &b).unwrap().unwrap();
        Self { arranged, rounded: (rounded(&a), rounded(&b)) }
    }

    fn low_rank<'a>(&'a self, factor: Option<&'a Array>) -> LowRank<'a> {
        LowRank { a: &self.arranged.0, b: &self.arranged.1, scale: 0.7, factor, input: None }
    }

    /// The same without the arrangement.
    fn straight<'a>(&'a self, linear: &LinearRef<'a>) -> LinearRef<'a> {
        let (a, b) = (&self.rounded.0, &self.rounded.1);
        LinearRef { low_rank: linear.low_rank.map(|update| LowRank { a, b, ..update }), ..*linear }
    }
}

/// c (W x + s (x A) B) + b + h, each operation by itself; W x as the product of arranged weights computes it.
fn apart(input: Input, linear: &LinearRef) -> Array {
    let x = input.array().unwrap();
    let mut y = matmul(&x, linear.weight).unwrap();
    if let Some(LowRank { a, b, scale, factor, .. }) = linear.low_rank {
        let side = ops::matmul(ops::matmul(&x, a).unwrap(), b).unwrap();
        y = y.add(side.multiply(Array::from_f32(scale)).unwrap()).unwrap();
        if let Some(c) = factor {
            y = y.multiply(c).unwrap();
        }
    }
    if let Some(bias) = linear.bias {
        y = y.add(bias).unwrap();
    }
    linear.residual.map_or(y.clone(), |h| h.add(&y).unwrap())
}

#[test]
fn one_operation_is_its_parts_one_by_one() {
    mlx(|| {
        // 4- and 8-bit codes, rows that do not fill the last panel, ranks that do not fill a vector.
        for (out, width, rank) in [(50, 4, 8), (64, 8, 16), (35, 3, 20), (48, 6, 1)] {
            let Some((_, arranged)) = both(out, 96, width, 32, Dtype::Float16) else { return };
            let weight = WeightRef::Arranged(&arranged);
            let own = Update::new(&arranged, 1, (96, rank, out));
            let (c, bias, norm) = (random(3, &[out]), random(4, &[out]), random(5, &[96]));
            for m in [1, 7, 40] {
                let (x, other) = (random(6, &[m, 96]), random(7, &[m, 96]));
                let h = random(8, &[m, out]);
                let (update, dora) = (own.low_rank(None), own.low_rank(Some(&c)));
                let all = [
                    LinearRef { weight, bias: None, residual: None, low_rank: None },
                    LinearRef { weight, bias: Some(&bias), residual: Some(&h), low_rank: None },
                    LinearRef { weight, bias: None, residual: Some(&h), low_rank: Some(update) },
                    LinearRef { weight, bias: Some(&bias), residual: None, low_rank: Some(dora) },
                ];
                for input in inputs(&x, &other, &norm) {
                    with_precision(Precision::Int16, || {
                        let together = linears(input, &all).unwrap();
                        for (y, linear) in together.iter().zip(&all) {
                            assert_close(y, &apart(input, &own.straight(linear)), tolerance::F32_DEEP);
                        }
                    });
                }
            }
        }
    });
}

#[test]
fn a_row_depends_neither_on_its_neighbours_nor_on_the_threads() {
    mlx(|| {
        let Some((_, arranged)) = both(300, 320, 4, 32, Dtype::Float16) else { return };
        let (own, c) = (Update::new(&arranged, 1, (320, 12, 300)), random(3, &[300]));
        let (x, other, h) = (random(4, &[200, 320]), random(5, &[200, 320]), random(6, &[200, 300]));
        let norm = random(7, &[320]);
        let run = |which: usize, rows: i32| {
            let (x, other, h) = (first(&x, rows), first(&other, rows), first(&h, rows));
            let linear = LinearRef {
                weight: WeightRef::Arranged(&arranged),
                bias: None,
                residual: Some(&h),
                low_rank: Some(own.low_rank(Some(&c))),
            };
            let input = inputs(&x, &other, &norm)[which];
            with_precision(Precision::Int16, || bits(&linears(input, &[linear]).unwrap()[0]))
        };
        for which in 0..3 {
            let whole = run(which, 200);
            for threads in [1, 2, 3] {
                set_threads(threads);
                for rows in [1, 2, 7, 8, 9, 16, 17, 32, 33, 64, 65, 200] {
                    let part = run(which, rows);
                    assert!(part[..] == whole[..part.len()], "input {which}, {rows} rows, {threads} threads");
                }
            }
            set_threads(2);
        }
    });
}

#[test]
fn rows_of_several_updates_give_what_each_gives_alone() {
    mlx(|| {
        let Some((_, arranged)) = both(300, 320, 4, 32, Dtype::Float16) else { return };
        let updates =
            [(1, 8), (3, 20), (5, 1)].map(|(seed, rank)| Update::new(&arranged, seed, (320, rank, 300)));
        let (c, norm) = (random(8, &[300]), random(9, &[320]));
        let (x, other, h) = (random(10, &[31, 320]), random(11, &[31, 320]), random(12, &[31, 300]));
        let weight = WeightRef::Arranged(&arranged);
        let plain = LinearRef { weight, bias: None, residual: Some(&h), low_rank: None };
        // Borders within, at and across the tiles of rows; a factor; groups without an update.
        let groups: Vec<RowsUpdates> = vec![
            (3, vec![Some(updates[0].low_rank(None)), None]),
            (5, vec![Some(updates[1].low_rank(Some(&c))), Some(updates[0].low_rank(None))]),
            (1, vec![None, None]),
            (9, vec![Some(updates[2].low_rank(None)), Some(updates[2].low_rank(Some(&c)))]),
            (13, vec![None, Some(updates[1].low_rank(None))]),
        ];
        for input in inputs(&x, &other, &norm) {
            with_precision(Precision::Int16, || {
                let together = linears_of_rows(input, &[plain, plain], &groups).unwrap();
                for (index, y) in together.iter().enumerate() {
                    let (all, mut first) = (bits(y), 0);
                    for (rows, own) in &groups {
                        let alone = linears(input, &[LinearRef { low_rank: own[index], ..plain }]).unwrap();
                        let range = first * 300..(first + *rows as usize) * 300;
                        assert!(
                            all[range.clone()] == bits(&alone[0])[range],
                            "linear {index}, rows from {first}"
                        );
                        first += *rows as usize;
                    }
                }
            });
        }
    });
}

#[test]
fn an_arranged_update_is_read_by_nothing_else() {
    mlx(|| {
        let Some((packed, arranged)) = both(50, 96, 4, 32, Dtype::Float16) else { return };
        let own = Update::new(&arranged, 1, (96, 8, 50));
        let x = random(3, &[2, 96]);
        let linear =
            |weight| LinearRef { weight, bias: None, residual: None, low_rank: Some(own.low_rank(None)) };
        for weight in [WeightRef::Arranged(&arranged), packed.view()] {
            let e = with_precision(Precision::F32, || linears(&x, &[linear(weight)])).unwrap_err();
            assert!(e.to_string().contains("arranged"), "{e}");
        }
        assert!(arrange_update(packed.view(), &own.rounded.0, &own.rounded.1).unwrap().is_none());
    });
}

#[test]
fn what_does_not_fit_is_refused() {
    mlx(|| {
        let Some((_, arranged)) = both(50, 96, 4, 32, Dtype::Float16) else { return };
        let weight = WeightRef::Arranged(&arranged);
        let plain = [LinearRef { weight, bias: None, residual: None, low_rank: None }];
        let (x, other, norm) = (random(1, &[2, 96]), random(2, &[3, 96]), random(3, &[32]));
        with_precision(Precision::Int16, || {
            let e = linears(Input::Swiglu { gate: &x, up: &other }, &plain).unwrap_err().to_string();
            assert!(e.contains("swiglu") && e.contains("[3, 96]"), "{e}");
            let e = linears(&random(4, &[2, 64]), &plain).unwrap_err().to_string();
            assert!(e.contains("96") && e.contains("64"), "{e}");
            // A norm of parts of a row is one of its own, and then the product.
            let y = linears(Input::Norm { x: &x, weight: &norm, eps: 1e-5 }, &plain).unwrap();
            assert_close(
                &y[0],
                &apart(Input::Norm { x: &x, weight: &norm, eps: 1e-5 }, &plain[0]),
                tolerance::F32,
            );
        });
    });
}
