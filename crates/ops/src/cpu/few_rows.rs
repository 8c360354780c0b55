//! Products of few rows with weights, packed or dense: row by row of W.
//!
//! The work is reading the weights once, so each row of W is widened in registers (or, for more than a few rows, in the
//! first-level cache) and multiplied with all rows of x.

use std::ops::Range;

use super::codes::{Code, E2m1, E4m3};
use super::gemm::{Matrix, product, share};
use super::level::dispatch;
use super::packed::{BLOCK, FEW, Layout, Packed};
use super::scratch::{LEFT, PANEL, scratch};
use super::simd::{Kernel, Simd};
use crate::Precision;
use crate::ffi::Mode;
use crate::pool::{self, Shares};

/// Rows of W that are multiplied together.
const TOGETHER: usize = 4;
/// Below this many multiply-adds waking another thread costs more than it saves.
const SMALL: usize = 1 << 16;

/// x W^T row by row of W.
pub(super) fn few_rows(x: &[f32], w: &Packed, y: &mut [f32]) {
    let Layout { out, inputs, bits, mode, .. } = w.layout;
    let m = x.len() / inputs;
    let direct = matches!(bits, 4 | 8) && m <= 4;
    // Of whole numbers of 4 bits the even ones of a block come first when they are widened, so x is laid out the same way.
    let evens = bits == 4 && mode == Mode::Affine;
    let mut arranged = scratch(&LEFT, if evens { x.len() } else { 0 });
    let x = if evens {
        evens_first(x, &mut arranged);
        &*arranged
    } else {
        x
    };
    let y = Shares::new(y);
    by_weight_rows(m, out, inputs, |rows| {
        let tiles = RowTiles { x, m, inputs, out, y: &y };
        dispatch(FewRows { tiles, w, rows, direct });
    })
}

/// Calls `run` with ranges that cover the rows of W, on all threads if there is enough to do.
fn by_weight_rows(m: usize, out: usize, inputs: usize, run: impl Fn(Range<usize>) + Sync) {
    let rows = out.div_ceil(4 * pool::threads()).clamp(TOGETHER, 64).next_multiple_of(TOGETHER);
    share(m * out * inputs >= SMALL, out.div_ceil(rows), |task| {
        run(task * rows..((task + 1) * rows).min(out))
    });
}

/// Each block of 32: its 16 even elements, then its 16 odd ones.
fn evens_first(x: &[f32], to: &mut [f32]) {
    for (x, to) in x.as_chunks::<BLOCK>().0.iter().zip(to.as_chunks_mut::<BLOCK>().0) {
        for i in 0..BLOCK / 2 {
            to[i] = x[2 * i];
            to[i + BLOCK / 2] = x[2 * i + 1];
        }
    }
}

struct FewRows<'a> {
    tiles: RowTiles<'a>,
    w: &'a Packed<'a>,
    rows: Range<usize>,
    direct: bool,
}

impl Kernel for FewRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let FewRows { tiles, w, rows, direct } = self;
        let Layout { inputs, group, bits, mode, .. } = w.layout;
        let groups = w.layout.groups();
        let mut scratch = scratch(&PANEL, TOGETHER * (2 * groups + inputs));
        let (levels, widened) = scratch.split_at_mut(TOGETHER * 2 * groups);
        let shift = group.trailing_zeros();
        let mut row = rows.start;
        while row < rows.end {
            let count = TOGETHER.min(rows.end - row);
            // Rows beyond the last repeat it; their results are not written.
            let mut codes = [std::ptr::null(); TOGETHER];
            let mut weights = [std::ptr::null(); TOGETHER];
            for r in 0..TOGETHER {
                let row = row + r.min(count - 1);
                codes[r] = w.codes(row, 0);
                let (scales, biases) = levels[r * 2 * groups..][..2 * groups].split_at_mut(groups);
                w.levels(s, row, 0, scales, biases);
                weights[r] = widened[r * inputs..][..inputs].as_ptr();
            }
            let four = Codes::<4> { codes, levels, groups, shift };
            let eight = Codes::<8> { codes, levels, groups, shift };
            let end = w.end();
            match (direct, mode, bits) {
                (true, Mode::Affine, 4) => tiles.run(s, row, count, &four),
                (true, Mode::Affine, _) => tiles.run(s, row, count, &eight),
                (true, Mode::Mxfp4 | Mode::Nvfp4, _) => {
                    tiles.run(
                        s,
                        row,
                        count,
                        &Small { code: E2m1, bits: 4, codes, end, levels, groups, shift },
                    );
                }
                (true, Mode::Mxfp8, _) => {
                    tiles.run(
                        s,
                        row,
                        count,
                        &Small { code: E4m3, bits: 8, codes, end, levels, groups, shift },
                    );
                }
                (false, ..) => {
                    for (r, to) in widened.chunks_exact_mut(inputs).enumerate() {
                        match (mode, bits) {
                            (Mode::Affine, 4) => four.widen(s, r, to),
                            (Mode::Affine, 8) => eight.widen(s, r, to),
                            _ => w.unpack(s, row + r.min(count - 1), 0, to),
                        }
                    }
                    tiles.run(s, row, count, &Weights(weights));
                }
            }
            row += TOGETHER;
        }
    }
}

/// Where the weights of some rows of W come from.
trait Blocks {
    /// Weights `k`..`k + 32` of row `r`.
    ///
    /// # Safety
    /// The row must have them.
    unsafe fn block<S: Simd>(&self, s: S, r: usize, k: usize) -> S::Block;
}

/// Codes of BITS bits, 4 or 8; of each row the scales, then the biases.
struct Codes<'a, const BITS: usize> {
    codes: [*const u8; TOGETHER],
    levels: &'a [f32],
    groups: usize,
    shift: u32,
}

impl<const BITS: usize> Blocks for Codes<'_, BITS> {
    #[inline(always)]
    unsafe fn block<S: Simd>(&self, s: S, r: usize, k: usize) -> S::Block {
        let at = 2 * r * self.groups + (k >> self.shift);
        // SAFETY: the caller's promise; there is a scale and a bias for each group of each row.
        unsafe {
            let (scale, bias) =
                (*self.levels.get_unchecked(at), *self.levels.get_unchecked(at + self.groups));
            let codes = self.codes[r].add(k * BITS / 8);
            if BITS == 4 { s.block4(codes, scale, bias) } else { s.block8(codes, scale, bias) }
        }
    }
}

impl<const BITS: usize> Codes<'_, BITS> {
    /// All weights of row `r`, in the order of their blocks.
    #[inline(always)]
    fn widen<S: Simd>(&self, s: S, r: usize, to: &mut [f32]) {
        for (i, to) in to.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
            // SAFETY: `to` has as many blocks as the row.
            let weights = unsafe { self.block(s, r, i * BLOCK) };
            for part in 0..BLOCK / S::LANES {
                // SAFETY: vectors inside the block.
                unsafe { s.store(to.as_mut_ptr().add(part * S::LANES), weights[part]) };
            }
        }
    }
}

/// Small floats; of each row the scales, then room for as many.
struct Small<'a, C> {
    code: C,
    bits: usize,
    codes: [*const u8; TOGETHER],
    end: *const u8,
    levels: &'a [f32],
    groups: usize,
    shift: u32,
}

impl<C: Code> Blocks for Small<'_, C> {
    #[inline(always)]
    unsafe fn block<S: Simd>(&self, s: S, r: usize, k: usize) -> S::Block {
        const NOTHING: [f32; BLOCK] = [0.0; BLOCK];
        // SAFETY: the array has a block.
        let mut block = unsafe { s.block32(NOTHING.as_ptr()) };
        for part in 0..BLOCK / S::LANES {
            let k = k + part * S::LANES;
            // SAFETY: the caller's promise; there is a scale for each group of each row, and no group is shorter than a vector.
            let (codes, scale) = unsafe {
                let scale = *self.levels.get_unchecked(2 * r * self.groups + (k >> self.shift));
                (s.codes(self.codes[r].add(k * self.bits / 8), self.bits, self.end), s.splat(scale))
            };
            block[part] = self.code.weights(s, codes, scale, scale);
        }
        block
    }
}

/// Weights as f32.
struct Weights([*const f32; TOGETHER]);

impl Blocks for Weights {
    #[inline(always)]
    unsafe fn block<S: Simd>(&self, s: S, r: usize, k: usize) -> S::Block {
        // SAFETY: the caller's promise.
        unsafe { s.block32(self.0[r].add(k)) }
    }
}

/// What products of rows of W with rows of x have in common.
#[derive(Clone, Copy)]
struct RowTiles<'a> {
    /// (m, inputs); the inputs are a multiple of 32.
    x: &'a [f32],
    m: usize,
    inputs: usize,
    out: usize,
    /// (m, out)
    y: &'a Shares<'a, f32>,
}

impl RowTiles<'_> {
    /// Results of the first `count` of some rows of W, of which `row` is the first, with all rows of x.
    #[inline(always)]
    fn run<S: Simd>(&self, s: S, row: usize, count: usize, blocks: &impl Blocks) {
        let mut at = 0;
        // As many as the registers hold; each result is one chain of sums whatever the number.
        while S::LANES == 16 && self.m - at >= 4 {
            self.tile::<S, 4>(s, at, row, count, blocks);
            at += 4;
        }
        while self.m - at >= 2 {
            self.tile::<S, 2>(s, at, row, count, blocks);
            at += 2;
        }
        if at < self.m {
            self.tile::<S, 1>(s, at, row, count, blocks);
        }
    }

    #[inline(always)]
    fn tile<S: Simd, const C: usize>(&self, s: S, at: usize, row: usize, count: usize, blocks: &impl Blocks) {
        let mut sums = [[s.splat(0.0); C]; TOGETHER];
        for k in (0..self.inputs).step_by(BLOCK) {
            // SAFETY: blocks of rows of x and of W, whose length is a multiple of 32.
            unsafe {
                let x = self.x.as_ptr().add(at * self.inputs + k);
                let mut xs = [s.block32(x); C];
                for (c, xs) in xs.iter_mut().enumerate().skip(1) {
                    *xs = s.block32(x.add(c * self.inputs));
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let weights = blocks.block(s, r, k);
                    for part in 0..BLOCK / S::LANES {
                        for (sum, x) in sums.iter_mut().zip(&xs) {
                            *sum = s.fma(weights[part], x[part], *sum);
                        }
                    }
                }
            }
        }
        for (r, sums) in sums.iter().enumerate().take(count) {
            for (c, &sum) in sums.iter().enumerate() {
                // SAFETY: row `row + r` of W belongs to one task, and so does its column of y.
                unsafe { *self.y.pointer().add((at + c) * self.out + row + r) = s.sum(sum) };
            }
        }
    }
}

/// x W^T for dense W (out, inputs), with the same two paths.
pub(crate) fn dense_times_transpose(
    x: &[f32],
    w: &[f32],
    inputs: usize,
    y: &mut [f32],
    precision: Precision,
    many: bool,
) {
    let (m, out) = (x.len() / inputs, w.len() / inputs);
    if many || m > FEW || !inputs.is_multiple_of(BLOCK) {
        product(x, inputs, &Matrix { data: w.as_ptr(), row: 1, column: inputs }, out, y, precision, false);
        return;
    }
    let y = Shares::new(y);
    by_weight_rows(m, out, inputs, |rows| {
        dispatch(DenseRows { tiles: RowTiles { x, m, inputs, out, y: &y }, w, rows });
    });
}

struct DenseRows<'a> {
    tiles: RowTiles<'a>,
    w: &'a [f32],
    rows: Range<usize>,
}

impl Kernel for DenseRows<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let DenseRows { tiles, w, rows } = self;
        let mut row = rows.start;
        while row < rows.end {
            let count = TOGETHER.min(rows.end - row);
            let mut weights = [std::ptr::null(); TOGETHER];
            for (r, at) in weights.iter_mut().enumerate() {
                *at = w[(row + r.min(count - 1)) * tiles.inputs..][..tiles.inputs].as_ptr();
            }
            tiles.run(s, row, count, &Weights(weights));
            row += TOGETHER;
        }
    }
}
