//! Norm, gated activation and rotation.

use graft_ops::{
    AdamStep, Array, RopeTable, Rows, WeightRef, adam, rms_norm, rope, row_factor, row_norms, row_squares,
    set_threads, squared_norm, swiglu,
};
use graft_testkit::{assert_close, tolerance};

use crate::support::{bits, check, check_differences, every_level, mlx, mlx_form, random, values};

#[test]
fn norms_are_mlxs() {
    mlx(|| {
        for shape in [&[1, 64][..], &[70, 576], &[3, 5, 20], &[300, 128]] {
            let width = shape[shape.len() - 1];
            let args = [random(1, shape), random(2, &[width])];
            check(tolerance::F32_DEEP, &args, |x| rms_norm(&x[0], &x[1], 1e-5));
        }
        check_differences(&[random(1, &[4, 24]), random(2, &[24])], |x| rms_norm(&x[0], &x[1], 1e-5));
        // By heads: stretches of the last axis.
        check(tolerance::F32_DEEP, &[random(1, &[30, 96]), random(2, &[32])], |x| {
            rms_norm(&x[0], &x[1], 1e-5)
        });
    });
}

#[test]
fn gates_are_mlxs() {
    mlx(|| {
        for shape in [&[1, 7][..], &[33, 100], &[2, 1024]] {
            let args = [random(1, shape).multiply(Array::from_f32(4.0)).unwrap(), random(2, shape)];
            check(tolerance::F32, &args, |x| swiglu(&x[0], &x[1]));
        }
        check_differences(&[random(1, &[3, 5]), random(2, &[3, 5])], |x| swiglu(&x[0], &x[1]));
    });
}

#[test]
fn gates_have_limits_and_pass_on_what_is_not_a_number() {
    mlx(|| {
        every_level(|level| {
            let z = [-1e30, -200.0, -90.0, -20.0, 0.0, 20.0, 90.0, 200.0, 1e30, f32::NAN];
            let gate = Array::from_slice(&z, &[10]);
            let y = values(&swiglu(&gate, &Array::from_slice(&[1.0_f32; 10], &[10])).unwrap());
            for (z, y) in z.iter().zip(&y) {
                let expected = f64::from(*z) / (1.0 + (-f64::from(*z)).exp());
                let close = (f64::from(*y) - expected).abs() <= 1e-6 * expected.abs() + 1e-30;
                assert!(
                    if z.is_nan() { y.is_nan() } else { close },
                    "{level:?}: silu({z}) = {y}, not {expected}"
                );
            }
        });
    });
}

#[test]
fn rotations_are_mlxs() {
    mlx(|| {
        let inv_freq: Vec<f32> = (0..8).map(|i| 10_f32.powf(-i as f32 / 2.0)).collect();
        for traditional in [false, true] {
            let table = RopeTable::new(&Array::from_slice(&inv_freq, &[8]), traditional).unwrap();
            // Heads of 16, all of which are rotated, and of 20, of which the first 16 are.
            for dim in [16, 20] {
                for (lengths, starts) in
                    [(vec![40, 40], vec![0, 0]), (vec![3, 1, 60], vec![0, 700, 2]), (vec![1], vec![1500])]
                {
                    let rows = Rows { lengths, starts };
                    let x = random(4, &[rows.tokens(), 3 * dim]);
                    check(tolerance::F32_DEEP, &[x], |x| rope(&x[0], dim, &rows, &table));
                }
            }
        }
    });
}

#[test]
fn a_rotation_may_work_in_place_but_never_on_what_is_still_needed() {
    mlx(|| {
        let table = RopeTable::new(&Array::from_slice(&[1.0_f32, 0.5], &[2]), false).unwrap();
        let rows = Rows::new(vec![5]);
        let x = random(1, &[5, 8]);
        let before = bits(&x);
        let rotated = |x: &Array| rope(x, 4, &rows, &table).unwrap();
        let kept = rotated(&x);
        kept.eval().unwrap();
        assert_eq!(bits(&x), before);
        // A value that only the rotation needs.
        let free = rotated(&x.add(Array::from_f32(0.0)).unwrap());
        assert_eq!(bits(&free), bits(&kept));
        // A value that another operation of the same graph needs too.
        let shared = x.add(Array::from_f32(0.0)).unwrap();
        let sum = rotated(&shared).add(&shared).unwrap();
        drop(shared);
        assert_eq!(bits(&sum), bits(&kept.add(&x).unwrap()));
    });
}

#[test]
fn threads_change_no_bit() {
    mlx(|| {
        let (x, w) = (random(1, &[300, 200]), random(2, &[200]));
        let all = || {
            let norm = bits(&rms_norm(&x, &w, 1e-5).unwrap());
            norm.into_iter().chain(bits(&swiglu(&x, &x).unwrap())).collect::<Vec<_>>()
        };
        set_threads(2);
        let two = all();
        for n in [1, 3] {
            set_threads(n);
            assert!(all() == two, "{n} threads");
        }
        set_threads(2);
    });
}

#[test]
fn adam_and_the_norm_of_gradients_are_mlxs() {
    mlx(|| {
        let step = AdamStep {
            betas: (0.9, 0.999),
            shares: (0.1, 0.001),
            eps: 1e-8,
            rate: 1e-2,
            correction: Some(3.0),
            keep: Some(0.99),
        };
        for (size, step) in
            [(1, step), (37, AdamStep { correction: None, keep: None, ..step }), (40_000, step), (0, step)]
        {
            let [p, g, m] = [1, 2, 3].map(|seed| random(seed, &[size]));
            let v = random(4, &[size]).square().unwrap();
            let all = |form: &dyn Fn() -> [Array; 3]| form().map(|x| values(&x));
            let run = || adam(&p, &g, &m, &v, step).unwrap();
            let expected = mlx_form(|| all(&run));
            every_level(|level| {
                for (ours, mlxs) in all(&run).iter().zip(&expected) {
                    let far = ours.iter().zip(mlxs).any(|(a, b)| (a - b).abs() > 1e-6 * (1.0 + b.abs()));
                    assert!(!far && ours.len() == mlxs.len(), "{level:?}, {size} elements");
                }
            });
            let arrays = [p.clone(), g.reshape(&[1, size]).unwrap()];
            let norm = || values(&squared_norm(&arrays).unwrap())[0];
            let expected = mlx_form(norm);
            every_level(|level| {
                assert!((norm() - expected).abs() <= 1e-5 * expected, "{level:?}: {} {expected}", norm());
            });
        }
        let e = adam(&random(1, &[2]), &random(1, &[3]), &random(1, &[2]), &random(1, &[2]), step);
        assert!(e.unwrap_err().to_string().contains("must have one shape"));
    });
}

#[test]
fn doras_factor_is_mlxs_and_one_where_there_is_no_row() {
    mlx(|| {
        let n = Array::from_slice(&[2.0_f32, 0.0, 0.5], &[3]);
        check(tolerance::F32, &[random(1, &[3])], |x| row_factor(&x[0], &n));
        assert_eq!(values(&row_factor(&random(1, &[3]), &n).unwrap())[1], 1.0);
        for (rank, out) in [(1, 5), (8, 130), (20, 64)] {
            let (a, b, w) = (random(1, &[96, rank]), random(2, &[rank, out]), random(3, &[out, 96]));
            let n0 = mlx_form(|| row_squares(&w).unwrap());
            every_level(|_| assert_close(&row_squares(&w).unwrap(), &n0, tolerance::F32_DEEP));
            let norms = || row_norms(&a, &b, 0.5, WeightRef::Dense(&w), &n0).unwrap();
            let expected = mlx_form(norms);
            every_level(|_| assert_close(&norms(), &expected, tolerance::F32_DEEP));
        }
        let (a, b, w) = (random(1, &[96, 2]), random(2, &[3, 5]), random(3, &[5, 96]));
        let e = row_norms(&a, &b, 0.5, WeightRef::Dense(&w), &random(4, &[5])).unwrap_err().to_string();
        assert!(e.contains("do not fit a weight of (5, 96)"), "{e}");
    });
}
