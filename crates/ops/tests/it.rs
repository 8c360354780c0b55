//! Our CPU operations against MLX's own.

#[test]
fn blas_is_ours() {
    graft_testkit::mlx(|| {
        let test = graft_ops::info::blas_test().unwrap();
        println!("{test:?}");
    });
}
