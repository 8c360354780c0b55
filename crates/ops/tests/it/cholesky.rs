//! The inverse factor of a positive definite matrix, and matrices that have none.

use graft_ops::{Array, inverse_factor};

use crate::support::mlx;

#[test]
fn the_factor_is_upper_and_its_square_is_the_inverse() {
    mlx(|| {
        for n in [1, 2, 7, 65, 129, 300] {
            let key = mlx_rs::random::key(n as u64).unwrap();
            let x = mlx_rs::random::normal::<f32>(&[3 * n, n], None, None, &key).unwrap();
            let a = x.transpose().unwrap().matmul(&x).unwrap();
            let u = inverse_factor(&a).unwrap().unwrap();
            let below = mlx_rs::ops::tril(&u, -1).unwrap().abs().unwrap().max(false).unwrap();
            assert_eq!(below.item_cast::<f32>(), 0.0);
            // (U^T U) A = 1
            let identity = u.transpose().unwrap().matmul(&u).unwrap().matmul(&a).unwrap();
            let gap = identity.subtract(mlx_rs::ops::eye::<f32>(n, None, None).unwrap()).unwrap();
            let gap = gap.abs().unwrap().max(false).unwrap().item_cast::<f32>();
            assert!(gap < 1e-3, "{n}: {gap}");
        }
    });
}

#[test]
fn what_has_no_factor_has_none() {
    mlx(|| {
        let matrix = |values: [f32; 4]| Array::from_slice(&values, &[2, 2]);
        assert!(inverse_factor(&matrix([1.0, 2.0, 2.0, 1.0])).unwrap().is_none());
        assert!(inverse_factor(&matrix([0.0; 4])).unwrap().is_none());
        assert!(inverse_factor(&matrix([f32::NAN, 0.0, 0.0, 1.0])).unwrap().is_none());
        assert!(inverse_factor(&Array::from_slice(&[1f32; 6], &[2, 3])).is_err());
    });
}
