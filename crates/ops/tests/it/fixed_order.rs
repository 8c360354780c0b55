//! Sums have one fixed order: a row's result and its gradient are the same bits whatever rows stand beside it, in whichever
//! place, within a path (up to 32 rows, or more); and whatever the number of threads, also where a gradient sums over rows.

use graft_ops::ffi::Mode;
use graft_ops::{
    Array, Dtype, Head, KeyValues, LinearRef, LowRank, Precision, Result, RopeTable, Rows, WeightRef,
    attention, attention_cached, ffi, linear_cross_entropy, linears, matmul, rms_norm, set_threads, swiglu,
    with_precision,
};

use crate::arranged::{both, laid_out};
use crate::floats::MODES;
use crate::packed::Weights;
use crate::support::{bits, every_level, mlx, random};

/// Rows of the arguments of a test.
const ALL: i32 = 100;
/// Rows of a batch up to which the path of few rows is taken.
const FEW: i32 = 32;

/// Rows `ids` of x.
fn take(x: &Array, ids: &[i32]) -> Array {
    x.take_axis(Array::from_slice(ids, &[ids.len() as i32]), 0).unwrap()
}

/// What f gives for some rows, and the gradients of sum(weights * value) by all arguments.
struct Outcome {
    /// Of each row of the value and of the gradients by arguments with a row for each, the bits.
    rows: Vec<Vec<Vec<u32>>>,
    /// The gradients by the other arguments.
    sums: Vec<Vec<u32>>,
}

/// Rows `ids` of an operation whose first `by_row` arguments have ALL rows.
fn outcome(
    ids: &[i32],
    args: &[Array],
    by_row: usize,
    gradients: bool,
    f: &impl Fn(&[Array], &[i32]) -> Result<Array>,
) -> Outcome {
    let mut args = args.to_vec();
    for arg in &mut args[..by_row] {
        *arg = take(arg, ids);
    }
    let value = f(&args, ids).unwrap();
    let mut shape = value.shape().to_vec();
    shape[0] = ALL;
    let weights = take(&random(99, &shape), ids);
    let split = |x: &Array| {
        let bits = bits(x);
        bits.chunks(bits.len() / ids.len()).map(<[u32]>::to_vec).collect::<Vec<_>>()
    };
    let (mut rows, mut sums) = (vec![split(&value)], Vec::new());
    if gradients {
        let loss = |args: &[Array]| Ok(vec![f(args, ids)?.multiply(&weights)?.sum(false)?]);
        let wanted: Vec<i32> = (0..args.len() as i32).collect();
        let (_, made) = ffi::value_and_grad(loss, &args, &wanted).unwrap();
        rows.extend(made[..by_row].iter().map(split));
        sums = made[by_row..].iter().map(bits).collect();
    }
    Outcome { rows, sums }
}

/// Runs an operation on different numbers of rows, in their order and backwards, with different numbers of threads.
fn check(
    what: &str,
    args: &[Array],
    by_row: usize,
    gradients: bool,
    f: impl Fn(&[Array], &[i32]) -> Result<Array>,
) {
    set_threads(2);
    let run = |ids: &[i32]| outcome(ids, args, by_row, gradients, &f);
    let few = run(&(0..FEW).collect::<Vec<_>>());
    let many = run(&(0..ALL).collect::<Vec<_>>());
    for n in [1, 2, 7, 16, 17, 32, 33, 64, ALL] {
        let whole = if n <= FEW { &few } else { &many };
        let forwards: Vec<i32> = (0..n).collect();
        let backwards: Vec<i32> = (0..n).rev().collect();
        for ids in [forwards, backwards] {
            set_threads(2);
            let expected = run(&ids);
            for threads in [1, 2, 3] {
                set_threads(threads);
                let found = run(&ids);
                for (i, (rows, whole)) in found.rows.iter().zip(&whole.rows).enumerate() {
                    for (row, &id) in rows.iter().zip(&ids) {
                        assert!(
                            *row == whole[id as usize],
                            "{what}: row {id} of result {i} with {n} rows, from {}, {threads} threads",
                            ids[0]
                        );
                    }
                }
                assert!(found.sums == expected.sums, "{what}: sums over {n} rows, {threads} threads");
            }
        }
    }
    set_threads(2);
}

#[test]
fn products() {
    mlx(|| {
        let dense = random(3, &[150, 160]);
        let whole = [4, 8, 3].map(|width| Weights::new(150, 160, width, 32, Dtype::Float16));
        let packed: Vec<Weights> =
            whole.into_iter().chain(MODES.map(|mode| Weights::of(150, 160, mode))).collect();
        for precision in [Precision::F32, Precision::Bf16] {
            with_precision(precision, || {
                every_level(|level| {
                    let x = [random(1, &[ALL, 160])];
                    for (i, w) in
                        packed.iter().map(Weights::view).chain([WeightRef::Dense(&dense)]).enumerate()
                    {
                        let what = format!("{precision:?}, {level:?}, weight {i}");
                        check(&what, &x, 1, true, |x, _| matmul(&x[0], w));
                    }
                });
            });
        }
        let args = [random(1, &[ALL, 160]), dense.clone()];
        check("gradient by W", &args, 1, true, |x, _| matmul(&x[0], WeightRef::Dense(&x[1])));
    });
}

#[test]
fn arranged_products() {
    mlx(|| {
        let whole = [4, 8, 3].map(|width| Weights::new(150, 160, width, 32, Dtype::Float16));
        let floats = [Mode::Mxfp4, Mode::Nvfp4].map(|mode| Weights::of(150, 160, mode));
        for (i, w) in whole.into_iter().chain(floats).enumerate() {
            let Some((_, w)) = laid_out(w) else { return };
            with_precision(Precision::Int16, || {
                let x = [random(1, &[ALL, 160])];
                check(&format!("weight {i}"), &x, 1, false, |x, _| matmul(&x[0], WeightRef::Arranged(&w)));
            });
        }
    });
}

#[test]
fn linears_with_updates() {
    mlx(|| {
        let packed = Weights::new(150, 160, 4, 32, Dtype::Float16);
        let dense = random(3, &[150, 160]);
        let factor = random(4, &[150]).abs().unwrap().add(Array::from_f32(0.5)).unwrap();
        let [x, h] = [random(1, &[ALL, 160]), random(2, &[ALL, 150])];
        let [a, b] = [random(5, &[160, 8]), random(6, &[8, 150])];
        let run = |w: WeightRef, dora: bool, args: &[Array]| {
            let (a, b) = (&args[2], &args[3]);
            let low_rank = Some(LowRank { a, b, scale: 0.5, factor: dora.then(|| &args[4]), input: None });
            let part = LinearRef { weight: w, bias: None, residual: Some(&args[1]), low_rank };
            Ok(linears(&args[0], &[part])?.swap_remove(0))
        };
        let lora = [x, h, a, b];
        let dora: Vec<Array> = lora.iter().cloned().chain([factor]).collect();
        every_level(|level| {
            for (name, w) in [("packed", packed.view()), ("dense", WeightRef::Dense(&dense))] {
                check(&format!("{level:?}, LoRA, {name}"), &lora, 2, true, |args, _| run(w, false, args));
                check(&format!("{level:?}, DoRA, {name}"), &dora, 2, true, |args, _| run(w, true, args));
            }
        });
        let Some((_, arranged)) = both(150, 160, 4, 32, Dtype::Float16) else { return };
        with_precision(Precision::Int16, || {
            let w = WeightRef::Arranged(&arranged);
            check("arranged, DoRA", &dora, 2, false, |args, _| run(w, true, args));
        });
    });
}

#[test]
fn norms_and_gates() {
    mlx(|| {
        every_level(|level| {
            let what = format!("{level:?}");
            let (x, y) = (random(1, &[ALL, 200]), random(2, &[ALL, 200]));
            let norm = [x.clone(), random(3, &[200])];
            check(&what, &norm, 1, true, |x, _| rms_norm(&x[0], &x[1], 1e-5));
            let norm = [x.clone(), random(3, &[40])];
            check(&what, &norm, 1, true, |x, _| rms_norm(&x[0], &x[1], 1e-5));
            check(&what, &[x, y], 2, true, |x, _| swiglu(&x[0], &x[1]));
        });
    });
}

#[test]
fn the_loss_of_the_head() {
    mlx(|| {
        let packed = Weights::new(300, 64, 4, 32, Dtype::Float16);
        let dense = random(3, &[300, 64]);
        let h = [random(1, &[ALL, 64])];
        every_level(|level| {
            for w in [packed.view(), WeightRef::Dense(&dense)] {
                check(&format!("{level:?}"), &h, 1, true, |h, ids| {
                    let targets = Array::from_iter(ids.iter().map(|id| id * 3), &[ids.len() as i32]);
                    linear_cross_entropy(&h[0], w, &targets, 64)
                });
            }
        });
    });
}

/// q, k and v of a sequence with 6 heads that read 2 key heads of 32.
fn sequence(seed: u64, length: i32) -> [Array; 3] {
    [(6, 1), (2, 2), (2, 3)].map(|(heads, part)| random(10 * seed + part, &[length, heads * 32]))
}

fn table() -> RopeTable {
    let frequencies: Vec<f32> = (0..16).map(|i| 10_f32.powf(-i as f32 / 4.0)).collect();
    RopeTable::new(&Array::from_slice(&frequencies, &[16]), false).unwrap()
}

#[test]
fn attention_of_whole_rows() {
    mlx(|| {
        let table = table();
        let head = Head { dim: 32, scale: 0.2, rope: Some(&table) };
        let lengths = [1, 2, 7, 16, 17, 32, 33, 64, 130];
        let all: Vec<[Array; 3]> = lengths.iter().zip(1..).map(|(n, seed)| sequence(seed, *n)).collect();
        // Output and gradients of each of some sequences in one batch.
        let run = |chosen: &[usize]| -> Vec<Vec<Vec<u32>>> {
            let rows = Rows::new(chosen.iter().map(|&i| lengths[i]).collect());
            let joined = |part: usize| {
                let arrays: Vec<Array> = chosen.iter().map(|&i| all[i][part].clone()).collect();
                mlx_rs::ops::concatenate(&arrays, 0).unwrap()
            };
            let args = [0, 1, 2].map(joined);
            let run = |x: &[Array]| attention(&x[0], &x[1], &x[2], &rows, head);
            // The slope is the query, so that each row has one of its own.
            let loss = |x: &[Array]| Ok(vec![run(x)?.multiply(&args[0])?.sum(false)?]);
            let (_, gradients) = ffi::value_and_grad(loss, &args, &[0, 1, 2]).unwrap();
            let results: Vec<Array> = [run(&args).unwrap()].into_iter().chain(gradients).collect();
            let mut at = 0;
            let parts = chosen.iter().map(|&i| {
                let ids: Vec<i32> = (at..at + lengths[i]).collect();
                at += lengths[i];
                results.iter().map(|x| bits(&take(x, &ids))).collect()
            });
            parts.collect()
        };
        every_level(|level| {
            set_threads(2);
            let alone: Vec<_> = (0..lengths.len()).map(|i| run(&[i]).swap_remove(0)).collect();
            for threads in [1, 2, 3] {
                set_threads(threads);
                for chosen in [vec![0, 1, 2, 3, 4, 5, 6, 7, 8], vec![8, 6, 4, 2, 0], vec![1, 8], vec![7]] {
                    for (found, &i) in run(&chosen).iter().zip(&chosen) {
                        assert!(*found == alone[i], "{level:?}, row {i} of {chosen:?}, {threads} threads");
                    }
                }
            }
        });
        set_threads(2);
    });
}

#[test]
fn attention_to_cached_tokens_in_chunks() {
    mlx(|| {
        const CHUNK: i32 = 64;
        let table = table();
        let head = Head { dim: 32, scale: 0.2, rope: Some(&table) };
        let lengths = [200, 70, 130, 33];
        let all: Vec<[Array; 3]> = lengths.iter().zip(1..).map(|(n, seed)| sequence(seed, *n)).collect();
        // The prompts are read in chunks that end at the same borders; `late` sequences begin some steps after the others.
        let run = |chosen: &[usize], late: i32| -> Vec<Vec<u32>> {
            let mut caches: Vec<KeyValues> = chosen.iter().map(|_| KeyValues::default()).collect();
            let mut outputs = vec![Vec::new(); chosen.len()];
            for step in 0..20 {
                let spans: Vec<(i32, i32)> = chosen
                    .iter()
                    .enumerate()
                    .map(|(place, &i)| {
                        let at = CHUNK * (step - late * place as i32);
                        (at.clamp(0, lengths[i]), (at + CHUNK).clamp(0, lengths[i]))
                    })
                    .collect();
                let part = |part: usize| {
                    let arrays: Vec<Array> = chosen
                        .iter()
                        .zip(&spans)
                        .map(|(&i, &(from, to))| take(&all[i][part], &(from..to).collect::<Vec<_>>()))
                        .collect();
                    mlx_rs::ops::concatenate(&arrays, 0).unwrap()
                };
                let [q, k, v] = [0, 1, 2].map(part);
                let rows = Rows {
                    lengths: spans.iter().map(|(from, to)| to - from).collect(),
                    starts: spans.iter().map(|(from, _)| *from).collect(),
                };
                let mut layers: Vec<&mut KeyValues> = caches.iter_mut().collect();
                let o = bits(&attention_cached(&q, &k, &v, &mut layers, &rows, head).unwrap());
                let mut rest = &o[..];
                for (output, n) in outputs.iter_mut().zip(&rows.lengths) {
                    let (part, others) = rest.split_at(*n as usize * 6 * 32);
                    output.extend_from_slice(part);
                    rest = others;
                }
            }
            outputs
        };
        every_level(|level| {
            set_threads(2);
            let alone: Vec<_> = (0..lengths.len()).map(|i| run(&[i], 0).swap_remove(0)).collect();
            for threads in [1, 2, 3] {
                set_threads(threads);
                for (chosen, late) in [(vec![0, 1, 2, 3], 0), (vec![3, 2, 1, 0], 1), (vec![1, 0], 2)] {
                    for (found, &i) in run(&chosen, late).iter().zip(&chosen) {
                        assert!(*found == alone[i], "{level:?}, {i} of {chosen:?}, {threads} threads");
                    }
                }
            }
        });
        set_threads(2);
    });
}
