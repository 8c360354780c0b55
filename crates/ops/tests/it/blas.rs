//! MLX's own matrix product, which runs on our BLAS function.

use graft_ops::Array;
use graft_testkit::{assert_close, tolerance};

use crate::support::{every_level, mlx, random, values};

/// C = A B in f64.
fn plain(a: &Array, b: &Array) -> Array {
    let (m, k, n) = (a.dim(0), a.dim(1), b.dim(1));
    let (x, y) = (values(&a.contiguous().unwrap()), values(&b.contiguous().unwrap()));
    let at = |i: i32, j: i32| {
        let product = |l: i32| f64::from(x[(i * k + l) as usize]) * f64::from(y[(l * n + j) as usize]);
        (0..k).map(product).sum::<f64>() as f32
    };
    Array::from_iter((0..m).flat_map(|i| (0..n).map(move |j| (i, j))).map(|(i, j)| at(i, j)), &[m, n])
}

#[test]
fn blas_is_ours_and_right() {
    mlx(|| {
        let origin = graft_ops::info::blas_test().unwrap().origin.unwrap();
        let me = std::env::current_exe().unwrap();
        assert_eq!(std::path::Path::new(&origin).file_name(), me.file_name(), "{origin}");
        every_level(|_| {
            for (m, k, n) in [(1, 1, 1), (3, 5, 7), (40, 300, 33), (13, 8, 100), (100, 64, 8), (1030, 20, 50)]
            {
                let (a, b) = (random(1, &[m, k]), random(2, &[k, n]));
                let (at, bt) =
                    (random(3, &[k, m]).transpose().unwrap(), random(4, &[n, k]).transpose().unwrap());
                for (a, b) in [(&a, &b), (&at, &b), (&a, &bt), (&at, &bt)] {
                    assert_close(&a.matmul(b).unwrap(), &plain(a, b), tolerance::F32);
                }
                let c = random(5, &[m, n]);
                let sum = mlx_rs::ops::addmm(&c, &a, &b, 0.5, 2.0).unwrap();
                let half = plain(&a, &b).multiply(Array::from_f32(0.5)).unwrap();
                assert_close(
                    &sum,
                    &c.multiply(Array::from_f32(2.0)).unwrap().add(half).unwrap(),
                    tolerance::F32,
                );
            }
            let (a, b) = (random(1, &[3, 4, 9, 16]), random(2, &[3, 4, 16, 5]));
            let y = a.matmul(&b).unwrap().reshape(&[12, 9, 5]).unwrap();
            let (a, b) = (a.reshape(&[12, 9, 16]).unwrap(), b.reshape(&[12, 16, 5]).unwrap());
            for i in 0..12 {
                let at = |x: &Array| {
                    x.take_axis(Array::from_slice(&[i], &[1]), 0).unwrap().squeeze_axes(&[0]).unwrap()
                };
                assert_close(&at(&y), &plain(&at(&a), &at(&b)), tolerance::F32);
            }
        });
    });
}
