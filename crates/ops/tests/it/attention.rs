//! Attention of whole rows and of new tokens after cached ones.

use graft_ops::{Array, Head, KeyValues, RopeTable, Rows, attention, attention_cached, rope, set_threads};
use graft_testkit::{assert_close, tolerance};

use crate::support::{bits, check, check_differences, every_level, mlx, mlx_form, random, with_gradients};

/// A head of attention.
fn head(dim: i32, scale: f32) -> Head<'static> {
    Head { dim, scale, rope: None }
}

/// q (N, H D), k and v (N, K D).
fn inputs(tokens: i32, heads: i32, kv_heads: i32, dim: i32) -> Vec<Array> {
    [heads, kv_heads, kv_heads].iter().zip(1..).map(|(h, seed)| random(seed, &[tokens, h * dim])).collect()
}

#[test]
fn attention_and_its_gradients_are_mlxs() {
    mlx(|| {
        for (lengths, heads, kv_heads, dim) in [
            (vec![1], 2, 1, 64),
            (vec![5, 1, 33], 4, 2, 16),
            (vec![130, 64], 3, 3, 64),
            (vec![70, 31], 8, 1, 80),
            (vec![200], 6, 2, 128),
        ] {
            let rows = Rows::new(lengths);
            let scale = 1.0 / (dim as f32).sqrt();
            let args = inputs(rows.tokens(), heads, kv_heads, dim);
            check(tolerance::F32_DEEP, &args, |x| attention(&x[0], &x[1], &x[2], &rows, head(dim, scale)));
        }
    });
}

#[test]
fn queries_and_keys_are_rotated_first() {
    mlx(|| {
        let frequencies: Vec<f32> = (0..8).map(|i| 10_f32.powf(-i as f32 / 2.0)).collect();
        let table = RopeTable::new(&Array::from_slice(&frequencies, &[8]), false).unwrap();
        let rows = Rows::new(vec![40, 3, 70]);
        let rotated = Head { dim: 20, scale: 0.3, rope: Some(&table) };
        let args = inputs(113, 4, 2, 20);
        let apart = |x: &[Array]| {
            let (q, k) = (rope(&x[0], 20, &rows, &table)?, rope(&x[1], 20, &rows, &table)?);
            attention(&q, &k, &x[2], &rows, head(20, 0.3))
        };
        let expected = mlx_form(|| with_gradients(&args, apart));
        every_level(|_| {
            let together = with_gradients(&args, |x| attention(&x[0], &x[1], &x[2], &rows, rotated));
            for (a, b) in together.iter().zip(&expected) {
                assert_close(a, b, tolerance::F32_DEEP);
            }
            // After cached tokens the positions go on.
            let whole = attention(&args[0], &args[1], &args[2], &Rows::new(vec![113]), rotated).unwrap();
            assert_close(&in_steps(&args, &[50, 51, 113], rotated), &whole, tolerance::F32_DEEP);
        });
    });
}

#[test]
fn gradients_are_differences() {
    mlx(|| {
        let rows = Rows::new(vec![3, 2]);
        check_differences(&inputs(5, 2, 1, 8), |x| attention(&x[0], &x[1], &x[2], &rows, head(8, 0.35)));
    });
}

/// Rows `from..to` of the first axis.
fn tokens(x: &Array, from: i32, to: i32) -> Array {
    x.take_axis(Array::from_iter(from..to, &[to - from]), 0).unwrap()
}

/// The outputs of one sequence in steps that end at `borders`.
fn in_steps(all: &[Array], borders: &[i32], head: Head) -> Array {
    let mut cache = KeyValues::default();
    let mut outputs = Vec::new();
    let mut from = 0;
    for &to in borders {
        let [q, k, v] = [0, 1, 2].map(|i| tokens(&all[i], from, to));
        let rows = Rows { lengths: vec![to - from], starts: vec![from] };
        outputs.push(attention_cached(&q, &k, &v, &mut [&mut cache], &rows, head).unwrap());
        from = to;
    }
    let all = mlx_rs::ops::concatenate(&outputs, 0).unwrap();
    all.eval().unwrap();
    all
}

#[test]
fn cached_is_whole_whatever_the_steps() {
    mlx(|| {
        for (heads, kv_heads, dim) in [(6, 2, 64), (4, 4, 16), (8, 1, 80)] {
            let all = inputs(300, heads, kv_heads, dim);
            let whole = mlx_form(|| {
                attention(&all[0], &all[1], &all[2], &Rows::new(vec![300]), head(dim, 0.2)).unwrap()
            });
            whole.eval().unwrap();
            every_level(|_| {
                for borders in [vec![300], vec![256, 257, 300], vec![1, 64, 65, 130, 299, 300]] {
                    assert_close(&in_steps(&all, &borders, head(dim, 0.2)), &whole, tolerance::F32_DEEP);
                }
            });
        }
    });
}

#[test]
fn a_sequence_does_not_depend_on_its_neighbours_or_on_the_threads() {
    mlx(|| {
        let lengths = [70, 5, 140];
        let sequences: Vec<Vec<Array>> = (0..3)
            .map(|i| {
                inputs(lengths[i] + 1, 6, 2, 64)
                    .iter()
                    .map(|x| x.multiply(Array::from_f32(1.0 + i as f32)).unwrap())
                    .collect()
            })
            .collect();
        every_level(|level| {
            set_threads(2);
            let alone: Vec<Vec<u32>> = sequences
                .iter()
                .zip(lengths)
                .map(|(s, n)| bits(&in_steps(s, &[n, n + 1], head(64, 0.125))))
                .collect();
            for threads in [1, 3] {
                set_threads(threads);
                let mut caches: Vec<KeyValues> = (0..3).map(|_| KeyValues::default()).collect();
                for step in 0..2 {
                    let of = |i: usize, part: usize| match step {
                        0 => tokens(&sequences[i][part], 0, lengths[i]),
                        _ => tokens(&sequences[i][part], lengths[i], lengths[i] + 1),
                    };
                    let [q, k, v] = [0, 1, 2].map(|part| {
                        mlx_rs::ops::concatenate(&[of(0, part), of(1, part), of(2, part)], 0).unwrap()
                    });
                    let (lengths, starts) = if step == 0 {
                        (lengths.to_vec(), vec![0; 3])
                    } else {
                        (vec![1; 3], lengths.to_vec())
                    };
                    let mut layers: Vec<&mut KeyValues> = caches.iter_mut().collect();
                    let rows = Rows { lengths: lengths.clone(), starts };
                    let o = bits(&attention_cached(&q, &k, &v, &mut layers, &rows, head(64, 0.125)).unwrap());
                    let mut at = 0;
                    for (i, &n) in lengths.iter().enumerate() {
                        let size = n as usize * 6 * 64;
                        let skipped = alone[i].len() - if step == 0 { alone[i].len() } else { size };
                        assert!(
                            o[at..at + size] == alone[i][skipped..skipped + size],
                            "{level:?}, sequence {i}, step {step}"
                        );
                        at += size;
                    }
                }
            }
        });
        set_threads(2);
    });
}

#[test]
fn forks_share_what_is_common_and_nothing_else() {
    mlx(|| {
        let all = inputs(140, 2, 1, 32);
        let step = |cache: &mut KeyValues, from: i32, to: i32, factor: f32| {
            let [q, k, v] =
                [0, 1, 2].map(|i| tokens(&all[i], from, to).multiply(Array::from_f32(factor)).unwrap());
            let rows = Rows { lengths: vec![to - from], starts: vec![from] };
            bits(&attention_cached(&q, &k, &v, &mut [cache], &rows, head(32, 0.2)).unwrap())
        };
        // In the middle of a block and at its border.
        for len in [80, 64, 128] {
            let mut alone = KeyValues::default();
            step(&mut alone, 0, len, 1.0);
            let expected = step(&mut alone, len, len + 12, 1.0);
            let mut first = KeyValues::default();
            step(&mut first, 0, len, 1.0);
            let (mut second, mut third) = (first.fork(len), first.fork(len));
            assert!(step(&mut second, len, len + 12, 3.0) != expected);
            assert!(step(&mut first, len, len + 12, 1.0) == expected);
            assert!(step(&mut third, len, len + 12, 1.0) == expected);
            // What was forgotten is written anew.
            assert!(step(&mut second, len, len + 12, 1.0) == expected);
        }
    });
}

#[test]
fn forks_may_be_trimmed_below_where_they_parted() {
    mlx(|| {
        let all = inputs(220, 2, 1, 32);
        let step = |cache: &mut KeyValues, from: i32, to: i32, factor: f32| {
            let [q, k, v] =
                [0, 1, 2].map(|i| tokens(&all[i], from, to).multiply(Array::from_f32(factor)).unwrap());
            let rows = Rows { lengths: vec![to - from], starts: vec![from] };
            bits(&attention_cached(&q, &k, &v, &mut [cache], &rows, head(32, 0.2)).unwrap())
        };
        // The fork's length, and what each side is trimmed to: in its last block, at a border, in an earlier block.
        for (len, trims) in [(150, [140, 128, 100, 64, 5]), (128, [127, 100, 64, 30, 0])] {
            for trim in trims {
                let mut alone = KeyValues::default();
                step(&mut alone, 0, 200, 1.0);
                let expected = step(&mut alone, len, len + 12, 1.0);
                for trims_fork in [false, true] {
                    let mut first = KeyValues::default();
                    step(&mut first, 0, 200, 1.0);
                    let mut second = first.fork(len);
                    let mut third = second.fork(len);
                    let (trimmed, other) =
                        if trims_fork { (&mut second, &mut first) } else { (&mut first, &mut second) };
                    let what = format!("{len} tokens, trimmed to {trim}, fork: {trims_fork}");
                    // Other tokens where the common ones stood.
                    let changed = step(trimmed, trim, 160, 3.0);
                    assert!(step(other, len, len + 12, 1.0) == expected, "{what}");
                    assert!(step(&mut third, len, len + 12, 1.0) == expected, "{what}, third");
                    let mut again = KeyValues::default();
                    step(&mut again, 0, 150, 1.0);
                    assert!(step(&mut again, trim, 160, 3.0) == changed, "{what}, trimmed side");
                }
            }
        }
    });
}

#[test]
fn what_was_trimmed_has_no_effect_whatever_it_was() {
    mlx(|| {
        let all = inputs(140, 2, 1, 32);
        let broken = |from: i32, to: i32| {
            let [q, k, v] = [0, 1, 2]
                .map(|i| tokens(&all[i], from, to).multiply(Array::from_f32(f32::INFINITY)).unwrap());
            [q, k.subtract(&k).unwrap(), v.subtract(&v).unwrap()]
        };
        let plain = |from: i32, to: i32| [0, 1, 2].map(|i| tokens(&all[i], from, to));
        let step = |cache: &mut KeyValues, [q, k, v]: [Array; 3], from: i32| {
            let rows = Rows { lengths: vec![q.dim(0)], starts: vec![from] };
            bits(&attention_cached(&q, &k, &v, &mut [cache], &rows, head(32, 0.2)).unwrap())
        };
        every_level(|level| {
            for (len, new) in [(80, 1), (80, 20), (64, 1), (10, 60), (70, 70)] {
                let mut alone = KeyValues::default();
                step(&mut alone, plain(0, len), 0);
                let mut first = KeyValues::default();
                step(&mut first, plain(0, len), 0);
                step(&mut first, broken(len, 140), len);
                let mut second = first.fork(len);
                let expected = step(&mut alone, plain(len, len + new), len);
                assert!(expected.iter().all(|bits| f32::from_bits(*bits).is_finite()));
                for (name, cache) in [("trimmed", &mut first), ("forked", &mut second)] {
                    let o = step(cache, plain(len, len + new), len);
                    assert!(o == expected, "{level:?}, {name} to {len}, {new} new");
                }
            }
        });
    });
}

#[test]
fn a_step_may_be_planned_while_the_one_before_is_computed() {
    mlx(|| {
        let all = inputs(40, 6, 2, 64);
        let expected = bits(&in_steps(&all, &(1..=40).collect::<Vec<_>>(), head(64, 0.125)));
        let mut cache = KeyValues::default();
        let outputs: Vec<Array> = (0..40)
            .map(|at| {
                let [q, k, v] = [0, 1, 2].map(|i| tokens(&all[i], at, at + 1));
                let rows = Rows { lengths: vec![1], starts: vec![at] };
                let o = attention_cached(&q, &k, &v, &mut [&mut cache], &rows, head(64, 0.125)).unwrap();
                mlx_rs::transforms::async_eval([&o]).unwrap();
                o
            })
            .collect();
        assert!(bits(&mlx_rs::ops::concatenate(&outputs, 0).unwrap()) == expected);
    });
}

#[test]
fn what_does_not_fit_is_an_error() {
    mlx(|| {
        let all = inputs(4, 4, 2, 16);
        let e =
            attention(&all[0], &all[1], &all[2], &Rows::new(vec![3]), head(16, 1.0)).unwrap_err().to_string();
        assert!(e.contains('3') && e.contains('4'), "{e}");
        let e = attention(&random(1, &[4, 48]), &all[1], &all[2], &Rows::new(vec![4]), head(16, 1.0))
            .unwrap_err();
        assert!(e.to_string().contains("do not fit"), "{e}");
        let rows = Rows { lengths: vec![4], starts: vec![100] };
        let e = attention_cached(
            &all[0],
            &all[1],
            &all[2],
            &mut [&mut KeyValues::default()],
            &rows,
            head(16, 1.0),
        )
        .unwrap_err();
        assert!(e.to_string().contains("100"), "{e}");
    });
}
