//! Decompositions give back the matrix, and the search for a few leading values is near the best that there is.

use graft_ops::linalg::{HostMatrix, Search, Svd, qr, svd, svd_leading, svd_of_product};
use graft_ops::{Array, ffi};
use mlx_rs::ops::concatenate;

use crate::support::{mlx, random};

fn noise(shape: &[i32], seed: u64) -> Array {
    random(seed, shape)
}

fn norm(a: &Array) -> f64 {
    ffi::read::<f32>(&a.contiguous().unwrap())
        .unwrap()
        .iter()
        .map(|x| f64::from(*x).powi(2))
        .sum::<f64>()
        .sqrt()
}

fn gap(a: &Array, b: &Array) -> f64 {
    assert_eq!(a.shape(), b.shape());
    norm(&a.subtract(b).unwrap()) / norm(b).max(1e-30)
}

fn whole(d: &Svd) -> Array {
    d.u.multiply(&d.s).unwrap().matmul(&d.vt).unwrap()
}

fn identity(n: i32) -> Array {
    mlx_rs::ops::eye::<f32>(n, None, None).unwrap()
}

/// That U has orthonormal columns, V^T orthonormal rows, and s falls.
fn check(d: &Svd) {
    let k = d.s.dim(0);
    assert!(gap(&d.u.transpose().unwrap().matmul(&d.u).unwrap(), &identity(k)) < 1e-5);
    assert!(gap(&d.vt.matmul(d.vt.transpose().unwrap()).unwrap(), &identity(k)) < 1e-5);
    let s = ffi::read::<f32>(&d.s).unwrap();
    assert!(s.windows(2).all(|pair| pair[0] >= pair[1]) && s[s.len() - 1] >= 0.0, "{s:?}");
}

#[test]
fn decompositions_give_back_the_matrix() {
    mlx(|| {
        for shape in [[40, 7], [7, 40], [16, 16], [1, 5], [5, 1], [1, 1]] {
            let a = noise(&shape, 3);
            let k = shape[0].min(shape[1]);
            let (q, r) = qr(&a).unwrap();
            assert_eq!((q.shape(), r.shape()), (&[shape[0], k][..], &[k, shape[1]][..]));
            assert!(gap(&q.matmul(&r).unwrap(), &a) < 1e-5);
            let d = svd(&a).unwrap();
            check(&d);
            assert!(gap(&whole(&d), &a) < 1e-5, "{shape:?}");
            let (left, right) = d.factors().unwrap();
            assert!(gap(&left.matmul(&right).unwrap(), &a) < 1e-5);
        }
        let zeros = svd(&mlx_rs::ops::zeros::<f32>(&[6, 3]).unwrap()).unwrap();
        assert_eq!(norm(&zeros.s), 0.0);
        check(&zeros);
    });
}

#[test]
fn a_product_is_decomposed_without_being_formed() {
    mlx(|| {
        // The last one is wider than its sides.
        for (m, r, n) in [(50, 6, 30), (30, 6, 50), (12, 20, 9)] {
            let (a, b) = (noise(&[m, r], 1), noise(&[r, n], 2));
            let product = a.matmul(&b).unwrap();
            let d = svd_of_product(&a, &b).unwrap();
            check(&d);
            assert_eq!(d.s.dim(0), m.min(n).min(r));
            assert!(gap(&whole(&d), &product) < 1e-5);
            let direct = svd(&product).unwrap().leading(d.s.dim(0)).unwrap();
            assert!(gap(&d.s, &direct.s) < 1e-5);
        }
    });
}

/// The leading part by the search.
fn search(a: &Array, rank: i32, known: Option<&Array>, seed: u64) -> graft_ops::Result<Svd> {
    let a = a.contiguous().unwrap();
    let matrix = HostMatrix { values: ffi::read(&a).unwrap(), columns: a.dim(1) };
    svd_leading(matrix, Search { rank, total: norm(&a).powi(2), known, seed })
}

#[test]
fn the_leading_part_is_as_good_as_the_whole_decomposition_says() {
    mlx(|| {
        let exact = noise(&[300, 8], 1).matmul(noise(&[8, 200], 2)).unwrap();
        // A flat tail is the hard case: what sparsified updates look like.
        for (share, limit) in [(0.0f32, 1e-5), (0.05, 1.01), (0.5, 1.02), (3.0, 1.03)] {
            let a = exact.add(noise(&[300, 200], 5).multiply(Array::from_f32(share)).unwrap()).unwrap();
            let a = if share > 2.0 { a.transpose().unwrap().contiguous().unwrap() } else { a };
            // Fewer known vectors than are wanted, more, and wrong ones.
            let n = a.dim(1);
            let some = noise(&[8, 200], 2).transpose().unwrap();
            let more = concatenate(&[&some, &noise(&[200, 12], 9)], 1).unwrap();
            let few = some.take_axis(Array::from_iter(0..3, &[3]), 1).unwrap();
            let known = [None, Some(&few), Some(&more), Some(&some)];
            for known in known.into_iter().filter(|known| known.is_none_or(|known| known.dim(0) == n)) {
                let found = search(&a, 8, known, 7).unwrap();
                check(&found);
                let error = gap(&whole(&found), &a);
                // What was found is a projection of A, so its norm says the error.
                let rest = (norm(&a).powi(2) - norm(&found.s).powi(2)).max(0.0).sqrt() / norm(&a);
                assert!((error - rest).abs() < 1e-3, "{error} and {rest}");
                if share == 0.0 {
                    assert!(error < limit, "{error}");
                } else {
                    let best = gap(&whole(&svd(&a).unwrap().leading(8).unwrap()), &a);
                    assert!(error <= limit * best, "noise {share}: {error}, the best is {best}");
                }
            }
        }
        let a = noise(&[300, 200], 5);
        let twice = [7, 7].map(|seed| search(&a, 8, None, seed).unwrap().s);
        assert_eq!(gap(&twice[0], &twice[1]), 0.0);
        // Nearly all of it is asked for: the whole decomposition is taken.
        assert!(gap(&whole(&search(&a, 200, None, 7).unwrap()), &a) < 1e-5);
    });
}

#[test]
fn what_is_no_matrix_is_refused() {
    mlx(|| {
        let a = noise(&[6, 4], 1);
        let text = |result: Result<Svd, graft_ops::Exception>| result.unwrap_err().to_string();
        assert!(text(svd(&a.reshape(&[24]).unwrap())).contains("expected a matrix of f32, found [24]"));
        assert!(text(svd(&a.as_dtype(graft_ops::Dtype::Float16).unwrap())).contains("Float16"));
        assert!(text(svd_of_product(&a, &a)).contains("(6, 4) and (6, 4) have no product"));
        assert!(text(search(&a, 0, None, 1)).contains("at least 1, not 0"));
        let (values, search) = ([0.0; 5], Search { rank: 1, total: 0.0, known: None, seed: 1 });
        let part = text(svd_leading(HostMatrix { values: &values, columns: 2 }, search));
        assert!(part.contains("5 values are no matrix of 2 columns"), "{part}");
    });
}
