//! Products of a large side and a small one: what is large is read once, where it is, since packing it would cost more than
//! the product.

use super::level::dispatch;
use super::simd::{Kernel, Simd};
use super::slim::{Slim, pad_columns, whole_vectors};
use crate::pool::{self, Shares};

/// Rows of A that a task takes: for so many, a block of X comes to the nearest cache once.
const ROWS: usize = 64;
/// Rows of X in such a block.
const DEPTH: usize = 256;

/// Columns `from`.. of A B, as many as `columns`, for some rows of A (m, k) and B (k, n) with small k: to C, whose rows are
/// `c_row` apart.
pub(crate) fn part(
    a: &[f32],
    b: &[f32],
    n: usize,
    (from, columns): (usize, usize),
    c: &mut [f32],
    c_row: usize,
) {
    let k = b.len() / n.max(1);
    let rows = a.len() / k.max(1);
    let part = Slim { rows, columns, k, a, a_row: k, a_k: 1, b: &b[from..], b_k: n, c_row, add: false };
    dispatch(Part(part, c));
}

struct Part<'a>(Slim<'a>, &'a mut [f32]);

impl Kernel for Part<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.0.run(s, self.1);
    }
}

/// A X of A (m, k) and X (k, columns), row by row.
pub(crate) fn product(a: &[f32], k: usize, x: &[f32], columns: usize) -> Vec<f32> {
    assert!(k > 0 && columns > 0 && a.len().is_multiple_of(k) && x.len() == k * columns);
    let (m, width) = (a.len() / k, whole_vectors(columns));
    let mut wide = vec![0.0; k * width];
    pad_columns(x, columns, width, &mut wide);
    let mut y = vec![0.0; m * columns];
    let shares = Shares::new(&mut y);
    pool::run(m.div_ceil(ROWS), |task| {
        let rows = ROWS.min(m - task * ROWS);
        let a = &a[task * ROWS * k..][..rows * k];
        let mut sums = vec![0.0; rows * width];
        dispatch(Strip { a, k, x: &wide, width, sums: &mut sums });
        // SAFETY: each task has rows of its own.
        let y = unsafe { shares.part(task * ROWS * columns, rows * columns) };
        for (y, sums) in y.chunks_exact_mut(columns).zip(sums.chunks_exact(width)) {
            y.copy_from_slice(&sums[..columns]);
        }
    });
    y
}

/// Some rows of A.
struct Strip<'a> {
    a: &'a [f32],
    k: usize,
    x: &'a [f32],
    width: usize,
    sums: &'a mut [f32],
}

impl Kernel for Strip<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Strip { a, k, x, width, sums } = self;
        for from in (0..k).step_by(DEPTH) {
            let part = Slim {
                rows: a.len() / k,
                columns: width,
                k: DEPTH.min(k - from),
                a: &a[from..],
                a_row: k,
                a_k: 1,
                b: &x[from * width..],
                b_k: width,
                c_row: width,
                add: from > 0,
            };
            part.run(s, sums);
        }
    }
}
