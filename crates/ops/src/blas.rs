//! The one BLAS function that MLX's matrix product needs, in place of the reference BLAS that its Linux build brings,
//! which is some twenty times slower. libmlx leaves the name to the executable, where the linker finds ours.

use crate::cpu::gemm::{Matrix, Sizes, gemm};
use crate::cpu::level::Instructions;
use crate::pool::Shares;

const ROW_MAJOR: i32 = 101;
const NO_TRANSPOSE: i32 = 111;

/// Keeps the linker from leaving the function out of executables: nothing in Rust calls it.
pub(crate) fn linked() -> *const () {
    cblas_sgemm as *const ()
}

/// C = alpha op(A) op(B) + beta C for op(A) (m, k) and op(B) (k, n), as CBLAS has it.
///
/// # Safety
/// The matrices must have the sizes that the arguments say, and C must not overlap A or B.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "CBLAS decides them")]
pub(crate) unsafe extern "C" fn cblas_sgemm(
    order: i32,
    transpose_a: i32,
    transpose_b: i32,
    m: i32,
    n: i32,
    k: i32,
    alpha: f32,
    a: *const f32,
    lda: i32,
    b: *const f32,
    ldb: i32,
    beta: f32,
    c: *mut f32,
    ldc: i32,
) {
    // A column-major product is the row-major product of the transposed matrices in the other order.
    let row_major = order == ROW_MAJOR;
    let (m, n) = if row_major { (m, n) } else { (n, m) };
    let left = (a, lda, transpose_a);
    let right = (b, ldb, transpose_b);
    let (left, right) = if row_major { (left, right) } else { (right, left) };
    let matrix = |(data, ld, transpose): (*const f32, i32, i32)| {
        let ld = ld.max(0) as usize;
        if transpose == NO_TRANSPOSE {
            Matrix { data, row: ld, column: 1 }
        } else {
            Matrix { data, row: 1, column: ld }
        }
    };
    let sizes = Sizes { m: m.max(0) as usize, n: n.max(0) as usize, k: k.max(0) as usize };
    let c_row = ldc.max(0) as usize;
    if sizes.m == 0 || sizes.n == 0 {
        return;
    }
    // SAFETY: the caller's C, which is ours alone during the call.
    let c = unsafe { std::slice::from_raw_parts_mut(c, (sizes.m - 1) * c_row + sizes.n) };
    if beta != 0.0 && beta != 1.0 {
        for row in c.chunks_mut(c_row.max(1)) {
            row[..sizes.n].iter_mut().for_each(|c| *c *= beta);
        }
    }
    // Of each column the same; most callers have none.
    let alpha = (alpha != 1.0).then(|| vec![alpha; sizes.k]);
    let (with, left, right) = (Instructions::now(), (matrix(left), alpha.as_deref()), matrix(right));
    // SAFETY: the caller's A and B, of the sizes that were said.
    unsafe { gemm::<_, false>(with, sizes, left, &right, &Shares::new(c), c_row, beta != 0.0) };
}
