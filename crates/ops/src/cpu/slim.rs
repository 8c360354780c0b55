//! Products with few columns or few terms, as a side path of rank R has: bound by reading, so nothing is packed and they run
//! over blocks of rows that stay in the cache.

use super::gemm::share;
use super::simd::{Simd, Tile, tile};
use crate::{Level, cpu_level};

/// Rows of x that a task takes at a time.
pub(super) const ROWS: usize = 16;
/// R rounded up to whole vectors.
pub(super) fn whole_vectors(rank: usize) -> usize {
    rank.next_multiple_of(if cpu_level() == Level::Avx512 { 16 } else { 8 })
}

/// Below this many multiply-adds another thread is not worth waking.
pub(super) const SMALL: usize = 1 << 16;

/// Calls `run` with the first row and the number of rows of blocks that cover `0..rows`.
pub(super) fn by_blocks(rows: usize, cost: usize, run: impl Fn(usize, usize) + Sync) {
    share(rows * cost >= SMALL, rows.div_ceil(ROWS), |task| run(task * ROWS, ROWS.min(rows - task * ROWS)));
}

/// (rows, columns) as (rows, width), with zeros beyond.
pub(super) fn pad_columns(from: &[f32], columns: usize, width: usize, to: &mut [f32]) {
    for (from, to) in from.chunks_exact(columns).zip(to.chunks_exact_mut(width)) {
        to[..columns].copy_from_slice(from);
        to[columns..].fill(0.0);
    }
}

/// (rows, columns) turned to (columns, width), with zeros beyond.
pub(super) fn pad_turned(from: &[f32], columns: usize, width: usize, to: &mut [f32]) {
    for (j, to) in to.chunks_exact_mut(width).enumerate().take(columns) {
        to.fill(0.0);
        for (to, row) in to.iter_mut().zip(from.chunks_exact(columns)) {
            *to = row[j];
        }
    }
}

/// C (rows, columns) = A B, or += with `add`: A by its strides, B (k, columns) and C by their rows' distance. Whole
/// vectors, then column by column.
#[derive(Clone, Copy)]
pub(super) struct Slim<'a> {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) k: usize,
    pub(super) a: &'a [f32],
    pub(super) a_row: usize,
    pub(super) a_k: usize,
    pub(super) b: &'a [f32],
    pub(super) b_k: usize,
    pub(super) c_row: usize,
    pub(super) add: bool,
}

impl Slim<'_> {
    #[inline(always)]
    pub(super) fn run<S: Simd>(self, s: S, c: &mut [f32]) {
        assert!(self.rows == 0 || (self.rows - 1) * self.c_row + self.columns <= c.len());
        // SAFETY: C has all rows, by the assertion, and is borrowed.
        unsafe { self.run_at(s, c.as_mut_ptr()) };
    }

    /// # Safety
    /// All rows of C must be valid and nobody else's.
    #[inline(always)]
    pub(super) unsafe fn run_at<S: Simd>(self, s: S, c: *mut f32) {
        let Slim { rows, columns, k, a, a_row, a_k, b, b_k, c_row, add } = self;
        if rows == 0 || columns == 0 {
            return;
        }
        if k == 0 {
            for row in (0..rows).filter(|_| !add) {
                // SAFETY: a row of C.
                unsafe { std::slice::from_raw_parts_mut(c.add(row * c_row), columns) }.fill(0.0);
            }
            return;
        }
        assert!((rows - 1) * a_row + (k - 1) * a_k < a.len() && (k - 1) * b_k + columns <= b.len());
        let (pairs, whole) = (columns / (2 * S::LANES) * 2 * S::LANES, columns / S::LANES * S::LANES);
        let mut row = 0;
        while row < rows {
            let (a, b) = (a[row * a_row..].as_ptr(), b.as_ptr());
            // SAFETY: the assertions cover every element that a tile reads or writes.
            unsafe {
                let at = |column: usize| Tile {
                    k,
                    a,
                    a_row,
                    a_k,
                    b: b.add(column),
                    b_k,
                    c: c.add(row * c_row + column),
                    c_row,
                    add,
                };
                let step = match rows - row {
                    // Single vectors leave registers free, and so few sums at a time would wait for each other.
                    8.. if S::LANES == 16 || pairs == 0 => 8,
                    4.. => 4,
                    _ => 1,
                };
                for column in (0..pairs).step_by(2 * S::LANES) {
                    match step {
                        8 => tile::<S, 8, 2>(s, at(column)),
                        4 => tile::<S, 4, 2>(s, at(column)),
                        _ => tile::<S, 1, 2>(s, at(column)),
                    }
                }
                for column in (pairs..whole).step_by(S::LANES) {
                    match step {
                        8 => tile::<S, 8, 1>(s, at(column)),
                        4 => tile::<S, 4, 1>(s, at(column)),
                        _ => tile::<S, 1, 1>(s, at(column)),
                    }
                }
                for column in whole..columns {
                    for i in 0..step {
                        let mut sum = 0.0;
                        for k in 0..k {
                            sum += *a.add(i * a_row + k * a_k) * *b.add(k * b_k + column);
                        }
                        let c = c.add((row + i) * c_row + column);
                        *c = if add { *c + sum } else { sum };
                    }
                }
                row += step;
            }
        }
    }
}
