//! DoRA's norms and factor, each in one operation: as MLX's own they are a score for each linear, each over a few thousand
//! numbers, and a batch of short rows waits for them longer than for its products.

use std::ffi::CStr;
use std::ops::Range;

use super::level::dispatch;
use super::norm::{by_rows, dot, row};
use super::panels::by_parts;
use super::primitive::{Backward, Op, Tensor, apply_one};
use super::scratch::{MADE, scratch};
use super::simd::{Kernel, Simd};
use super::weights::Kind;
use crate::pool::Shares;
use crate::{Array, Dtype, Precision, Result, WeightRef};

/// Outputs that are summed side by side.
const COLUMNS: usize = 64;

pub(crate) struct RowNorms {
    kind: Kind,
    rank: usize,
    scale: f32,
}

impl RowNorms {
    pub(crate) fn apply(a: &Array, b: &Array, scale: f32, w: WeightRef, n0: &Array) -> Result<Array> {
        let inputs: Vec<&Array> = [a, b, n0].into_iter().chain(w.arrays()).collect();
        let op = RowNorms { kind: Kind::of(w)?, rank: a.dim(1) as usize, scale };
        apply_one(op, &inputs, n0.shape(), Dtype::Float32)
    }
}

impl Op for RowNorms {
    fn name(&self) -> &'static CStr {
        c"norms of rows"
    }

    fn run(&self, inputs: &[Tensor], outputs: &mut [Tensor]) {
        let [a, b, n0] = [0, 1, 2].map(|i| inputs[i].f32());
        let (out, width, rank) = (self.kind.out(), self.kind.inputs(), self.rank);
        let mut room = scratch(&MADE, rank * (width + out + rank));
        let (turned, rest) = room.split_at_mut(rank * width);
        let (p, g) = rest.split_at_mut(rank * out);
        for (k, row) in a.chunks_exact(rank).enumerate() {
            for (r, &x) in row.iter().enumerate() {
                turned[r * width + k] = x;
            }
        }
        self.kind.weights(&inputs[3..]).times_transpose(turned, p, Precision::F32, false);
        let (turned, p) = (&*turned, &*p);
        dispatch(Gram { turned, rank, g });
        let (g, n) = (&*g, Shares::new(outputs[0].f32_mut()));
        by_parts(out.div_ceil(COLUMNS), out * rank * rank >= 1 << 15, |blocks| {
            let range = blocks.start * COLUMNS..(blocks.end * COLUMNS).min(out);
            // SAFETY: each block of outputs belongs to one task.
            let n = unsafe { n.part(range.start, range.len()) };
            dispatch(Norms { b, p, g, n0, rank, scale: self.scale, range, n });
        });
    }
}

/// G (R, R) = A^T A from A^T (R, in).
struct Gram<'a> {
    turned: &'a [f32],
    rank: usize,
    g: &'a mut [f32],
}

impl Kernel for Gram<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let width = self.turned.len() / self.rank;
        let row = |r: usize| &self.turned[r * width..(r + 1) * width];
        for i in 0..self.rank {
            for j in 0..=i {
                let sum = dot(s, row(i), row(j));
                self.g[i * self.rank + j] = sum;
                self.g[j * self.rank + i] = sum;
            }
        }
    }
}

/// n of the outputs `range`.
struct Norms<'a> {
    b: &'a [f32],
    /// P^T (R, out)
    p: &'a [f32],
    g: &'a [f32],
    n0: &'a [f32],
    rank: usize,
    scale: f32,
    range: Range<usize>,
    n: &'a mut [f32],
}

impl<'a> Kernel for Norms<'a> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Norms { b, p, g, n0, rank, scale, range, n } = self;
        let out = n0.len();
        for (i, n) in n.chunks_mut(COLUMNS).enumerate() {
            let first = range.start + i * COLUMNS;
            let count = n.len();
            let of = |x: &'a [f32], r: usize| &x[r * out + first..][..count];
            let (mut cross, mut own) = ([0.0; COLUMNS], [0.0; COLUMNS]);
            for r in 0..rank {
                let (b_row, p_row) = (of(b, r), of(p, r));
                let mut gb = [0.0; COLUMNS];
                for q in 0..rank {
                    let weight = g[r * rank + q];
                    gb.iter_mut().zip(of(b, q)).for_each(|(gb, b)| *gb += weight * b);
                }
                for c in 0..count {
                    cross[c] += b_row[c] * p_row[c];
                    own[c] += b_row[c] * gb[c];
                }
            }
            for (c, n) in n.iter_mut().enumerate() {
                let squared = n0[first + c] + 2.0 * scale * cross[c] + scale * scale * own[c];
                // The order lets NaN through.
                *n = if squared < 0.0 { 0.0 } else { squared.sqrt() };
            }
        }
    }
}

/// ||x_i||^2 of each row x_i (in,).
pub(crate) struct RowSquares;

impl RowSquares {
    pub(crate) fn apply(x: &Array) -> Result<Array> {
        apply_one(RowSquares, &[x], &x.shape()[..1], Dtype::Float32)
    }
}

impl Op for RowSquares {
    fn name(&self) -> &'static CStr {
        c"squares of rows"
    }

    fn run(&self, inputs: &[Tensor], outputs: &mut [Tensor]) {
        let (x, y) = (inputs[0].f32(), outputs[0].f32_mut());
        let (rows, width) = (y.len(), x.len() / y.len().max(1));
        let y = Shares::new(y);
        by_rows(rows, width, |rows| {
            // SAFETY: each range has outputs of its own.
            let y = unsafe { y.part(rows.start, rows.len()) };
            dispatch(Squares { x: &x[rows.start * width..rows.end * width], width, y });
        });
    }
}

struct Squares<'a> {
    x: &'a [f32],
    width: usize,
    y: &'a mut [f32],
}

impl Kernel for Squares<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (i, y) in self.y.iter_mut().enumerate() {
            let x = row(self.x, self.width, i);
            *y = dot(s, x, x);
        }
    }
}

/// m / n, and `otherwise` where n = 0.
pub(crate) struct RowFactor {
    otherwise: f32,
}

impl RowFactor {
    pub(crate) fn apply(m: &Array, n: &Array) -> Result<Array> {
        apply_one(RowFactor { otherwise: 1.0 }, &[m, n], m.shape(), Dtype::Float32)
    }
}

impl Op for RowFactor {
    fn name(&self) -> &'static CStr {
        c"factor of rows"
    }

    fn run(&self, inputs: &[Tensor], outputs: &mut [Tensor]) {
        let (m, n) = (inputs[0].f32(), inputs[1].f32());
        for (c, (m, n)) in outputs[0].f32_mut().iter_mut().zip(m.iter().zip(n)) {
            *c = if *n == 0.0 { self.otherwise } else { m / n };
        }
    }

    fn gradients(&self, call: &Backward) -> Result<Vec<Array>> {
        // dm = dc / n; n has none.
        let (n, dc) = (&call.primals[1], &call.cotangents[0]);
        let dm = apply_one(RowFactor { otherwise: 0.0 }, &[dc, n], n.shape(), Dtype::Float32)?;
        call.choose(&[dm])
    }
}
