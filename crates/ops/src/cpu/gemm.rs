//! C = A B for many rows: A is copied into panels once, B is made panel by panel where it is used.
//!
//! B may be packed weights, which are widened to f32 only as the panel that a tile needs next, so a dense copy of them
//! never exists. Work is shared over blocks of C, never over k: each element of C is summed in one fixed order.
//! With bf16 both panels hold words of two neighbours in k, which one instruction multiplies and adds to an f32.

use super::level::Instructions;
use super::scratch::{LEFT, PANEL, scratch};
use super::simd::{Kernel, Simd, Tile, vectors};
use crate::Precision;
use crate::pool::{self, Shares};

/// The depth of a panel of B at most: with 32 columns of f32, most of a first-level cache; of bf16, little more than half.
const DEPTH: usize = 256;
const BF16_DEPTH: usize = 320;
/// The larger of the two.
pub(crate) const DEEPEST: usize = BF16_DEPTH;
/// Depth blocks for which A is in panels at a time.
const BLOCKS: usize = 8;
/// Rows for which A is in panels at a time; a multiple of every level's tile.
const ROWS: usize = 1020;
/// Panels of B that one task makes at a time.
const WIDE: usize = 4;
/// Below this many multiply-adds waking another thread costs more than it saves.
const SMALL: usize = 1 << 17;

/// The right side of a product, (k, n).
pub(crate) trait Right: Sync {
    /// Writes rows `k`..`k + depth` of columns `n`..`n + columns` to `panel` (depth, width), with zeros in the other columns.
    fn panel<S: Simd>(&self, s: S, k: (usize, usize), n: (usize, usize), width: usize, panel: &mut [f32]);
    /// What depths have to be multiples of.
    fn depth_unit(&self) -> usize;
}

/// A matrix in memory, with the distance between rows and between columns.
#[derive(Clone, Copy)]
pub(crate) struct Matrix {
    pub(crate) data: *const f32,
    pub(crate) row: usize,
    pub(crate) column: usize,
}

// SAFETY: it is only read, and whoever makes one keeps the memory alive and unchanged during the product.
unsafe impl Sync for Matrix {}

/// The sizes of a product: A (m, k), B (k, n), C (m, n).
#[derive(Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
}

/// The left side of a product: rows of k numbers, of which the i-th is taken times `factor[i]` if there is a factor.
#[derive(Clone, Copy)]
pub(crate) struct LeftRows<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) factor: Option<&'a [f32]>,
}

impl<'a> From<&'a [f32]> for LeftRows<'a> {
    fn from(x: &'a [f32]) -> Self {
        Self { x, factor: None }
    }
}

/// y = x B for x (m, k) and y (m, n), both row by row; y += x B if `add`.
pub(crate) fn product<'a>(
    left: impl Into<LeftRows<'a>>,
    k: usize,
    b: &impl Right,
    n: usize,
    y: &mut [f32],
    precision: Precision,
    add: bool,
) {
    let LeftRows { x, factor } = left.into();
    let sizes = Sizes { m: x.len() / k, n, k };
    assert!(y.len() >= sizes.m * n && factor.is_none_or(|factor| factor.len() == k));
    let a = Matrix { data: x.as_ptr(), row: k, column: 1 };
    let c = Shares::new(y);
    let with = Instructions::with_bf16();
    // SAFETY: x is (m, k), y is (m, n) and borrowed for us alone.
    unsafe {
        if precision == Precision::Bf16 && with.bf16() {
            gemm::<_, true>(with, sizes, (a, factor), b, &c, n, add);
        } else {
            gemm::<_, false>(with, sizes, (a, factor), b, &c, n, add);
        }
    }
}

/// C = A B, or C += A B if `add`, with A's columns times `factor` (k,) if there is one; C's rows are `c_row` apart. With BF16,
/// for which A's columns must be next to each other, both sides are rounded.
///
/// # Safety
/// A must be readable for (m, k) by its strides, a factor must have k numbers, and C must hold (m - 1) * c_row + n floats that nobody else uses. BF16
/// only with instructions for it.
pub(crate) unsafe fn gemm<B: Right, const BF16: bool>(
    with: Instructions,
    sizes: Sizes,
    (a, factor): (Matrix, Option<&[f32]>),
    b: &B,
    c: &Shares<f32>,
    c_row: usize,
    add: bool,
) {
    let Sizes { m, n, k } = sizes;
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        for row in (0..m).filter(|_| !add) {
            // SAFETY: a row of C.
            unsafe { std::slice::from_raw_parts_mut(c.pointer().add(row * c_row), n) }.fill(0.0);
        }
        return;
    }
    let TileShape { rows: tile_rows, lanes } = with.run(Shape);
    let narrow = n <= lanes;
    let width = if narrow { lanes } else { 2 * lanes };
    // Depth blocks of about one size, so that the last is not a stump.
    let unit = b.depth_unit().next_multiple_of(if BF16 { 2 } else { 1 });
    let deepest = if BF16 { BF16_DEPTH } else { DEPTH };
    let depth = k.div_ceil(k.div_ceil(deepest).max(1)).next_multiple_of(unit).max(unit);
    let span = depth * BLOCKS;

    for row in (0..m).step_by(ROWS) {
        let rows = ROWS.min(m - row);
        let panels = rows.div_ceil(tile_rows);
        let mut begin = 0;
        loop {
            let here = span.min(k - begin);
            let mut left = scratch(&LEFT, panels * tile_rows * steps::<BF16>(here));
            let shares = Shares::new(&mut left);
            share(rows * here >= SMALL / 4, panels, |panel| {
                let at = row + panel * tile_rows;
                let valid = tile_rows.min(m - at);
                for from in (0..here).step_by(depth) {
                    let depth = depth.min(here - from);
                    let start =
                        steps::<BF16>(from) * panels * tile_rows + panel * tile_rows * steps::<BF16>(depth);
                    // SAFETY: each panel has a part of its own in every depth block.
                    let out = unsafe { shares.part(start, tile_rows * steps::<BF16>(depth)) };
                    let factor = factor.map(|all| &all[begin + from..begin + from + depth]);
                    let left = Left { a, row: at, valid, k: begin + from, depth, tile_rows, factor, out };
                    if BF16 { with.run(PairLeft(left)) } else { left.pack() }
                }
            });
            let add = add || begin > 0;
            let block = Block { sizes, row, rows, begin, here, depth, width, narrow, c_row, add };
            let threads = pool::threads();
            let (column_tasks, columns) = spread(n.div_ceil(width), threads);
            let (row_tasks, row_panels) = cut(panels, (2 * threads).div_ceil(column_tasks));
            // SAFETY: only read from here on.
            let left = unsafe { shares.part(0, panels * tile_rows * steps::<BF16>(here)) };
            share(rows * n * here >= SMALL, column_tasks * row_tasks, |task| {
                let (column, part) = (task % column_tasks, task / column_tasks);
                with.run(Task::<B, BF16> {
                    block,
                    left,
                    b,
                    c: c.pointer(),
                    first_panel: column * columns,
                    last_panel: ((column + 1) * columns).min(n.div_ceil(width)),
                    first_row: part * row_panels,
                    last_row: ((part + 1) * row_panels).min(panels),
                });
            });
            begin += here;
            if begin >= k {
                break;
            }
        }
    }
}

/// Elements of a panel for a depth.
const fn steps<const BF16: bool>(depth: usize) -> usize {
    if BF16 { depth.div_ceil(2) } else { depth }
}

pub(crate) fn share(worth_it: bool, tasks: usize, run: impl Fn(usize) + Sync) {
    if worth_it {
        pool::run(tasks, run);
    } else {
        (0..tasks).for_each(run);
    }
}

/// Cuts `count` panels into parts of at most WIDE, two or more a thread if there are enough, so that the thread with the
/// largest share has as little as can be: (parts, panels in a part).
fn spread(count: usize, threads: usize) -> (usize, usize) {
    let largest = (count / (2 * threads)).clamp(1, WIDE);
    let share = |each: &usize| count.div_ceil(*each).div_ceil(threads) * each;
    let each = (1..=largest).rev().min_by_key(share).unwrap_or(1);
    (count.div_ceil(each), each)
}

/// Cuts `count` things into at least `wanted` parts, if there are enough: (parts, things in a part).
fn cut(count: usize, wanted: usize) -> (usize, usize) {
    let each = (count / wanted.max(1)).max(1);
    (count.div_ceil(each), each)
}

struct Shape;

struct TileShape {
    rows: usize,
    lanes: usize,
}

impl Kernel for Shape {
    type Output = TileShape;
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> TileShape {
        TileShape { rows: S::LARGE_ROWS, lanes: S::LANES }
    }
}

/// Rows `row`..`row + valid` of A from column `k` on, to be laid out as (depth, tile_rows) with zeros for the rows that A
/// does not have.
struct Left<'a> {
    a: Matrix,
    row: usize,
    valid: usize,
    k: usize,
    depth: usize,
    tile_rows: usize,
    /// Of these columns.
    factor: Option<&'a [f32]>,
    out: &'a mut [f32],
}

impl Left<'_> {
    fn pack(self) {
        let Left { a, row, valid, k, depth: _, tile_rows, factor, out } = self;
        if valid < tile_rows {
            out.fill(0.0);
        }
        for i in 0..valid {
            // SAFETY: within A by the caller's promise.
            let from = unsafe { a.data.add((row + i) * a.row + k * a.column) };
            // SAFETY: as above.
            let x = |at: usize| unsafe { *from.add(at * a.column) };
            let columns = out.chunks_exact_mut(tile_rows).enumerate();
            match factor {
                Some(factor) => {
                    columns.zip(factor).for_each(|((at, column), factor)| column[i] = factor * x(at))
                }
                None => columns.for_each(|(at, column)| column[i] = x(at)),
            }
        }
    }
}

/// The same as words of two neighbours, (depth / 2, tile_rows); the last word of an odd depth is half zero.
struct PairLeft<'a>(Left<'a>);

impl Kernel for PairLeft<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Left { a, row, valid, k, depth, tile_rows, factor, out } = self.0;
        if valid < tile_rows {
            out.fill(0.0);
        }
        let mut words = [0_u32; BF16_DEPTH / 2];
        let mut scaled = [0.0; BF16_DEPTH];
        let whole = depth / S::LANES * S::LANES;
        for i in 0..valid {
            // SAFETY: row + i is a row of A, which has `depth` columns next to each other from k on.
            unsafe {
                let mut from = a.data.add((row + i) * a.row + k);
                if let Some(factor) = factor {
                    let row = std::slice::from_raw_parts(from, depth);
                    scaled.iter_mut().zip(row).zip(factor).for_each(|((y, x), c)| *y = x * c);
                    from = scaled.as_ptr();
                }
                for at in vectors::<S>(depth) {
                    s.pair_neighbours(from.add(at), words.as_mut_ptr().add(at / 2));
                }
                if whole < depth {
                    let mut rest = [0.0; 16];
                    std::ptr::copy_nonoverlapping(from.add(whole), rest.as_mut_ptr(), depth - whole);
                    let mut last = [0; 8];
                    s.pair_neighbours(rest.as_ptr(), last.as_mut_ptr());
                    let count = (depth - whole).div_ceil(2);
                    words[whole / 2..whole / 2 + count].copy_from_slice(&last[..count]);
                }
            }
            for (at, word) in words[..depth.div_ceil(2)].iter().enumerate() {
                out[at * tile_rows + i] = f32::from_bits(*word);
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Block {
    sizes: Sizes,
    row: usize,
    rows: usize,
    begin: usize,
    here: usize,
    depth: usize,
    width: usize,
    narrow: bool,
    c_row: usize,
    add: bool,
}

/// Some panels of columns times some panels of rows.
struct Task<'a, B, const BF16: bool> {
    block: Block,
    left: &'a [f32],
    b: &'a B,
    c: *mut f32,
    first_panel: usize,
    last_panel: usize,
    first_row: usize,
    last_row: usize,
}

impl<B: Right, const BF16: bool> Kernel for Task<'_, B, BF16> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Block { sizes, row, rows, begin, here, depth, width, narrow, c_row, add } = self.block;
        let panels = rows.div_ceil(S::LARGE_ROWS);
        let pairs = if BF16 { width * steps::<BF16>(depth) } else { 0 };
        // One row more than the depth, for the zeros that make an odd depth even.
        let mut scratch = scratch(&PANEL, width * (depth + 1) + pairs + S::LARGE_ROWS * width);
        let (panel, rest) = scratch.split_at_mut(width * (depth + 1));
        let (pairs, edge) = rest.split_at_mut(pairs);
        for from in (0..here).step_by(depth) {
            let depth = depth.min(here - from);
            for p in self.first_panel..self.last_panel {
                let column = p * width;
                let columns = width.min(sizes.n - column);
                self.b.panel(s, (begin + from, depth), (column, columns), width, &mut panel[..width * depth]);
                if BF16 {
                    panel[width * depth..width * (depth + depth % 2)].fill(0.0);
                    for (two, to) in panel.chunks_exact(2 * width).zip(pairs.chunks_exact_mut(width)) {
                        for j in (0..width).step_by(S::LANES) {
                            // SAFETY: a row is `width`, which is whole vectors.
                            unsafe {
                                let (even, odd) = (two.as_ptr().add(j), two.as_ptr().add(width + j));
                                s.pair_columns(even, odd, to.as_mut_ptr().add(j).cast());
                            }
                        }
                    }
                }
                for r in self.first_row..self.last_row {
                    let at = r * S::LARGE_ROWS;
                    let valid = S::LARGE_ROWS.min(rows - at);
                    let whole = valid == S::LARGE_ROWS && columns == width;
                    let left = steps::<BF16>(from) * panels * S::LARGE_ROWS
                        + r * S::LARGE_ROWS * steps::<BF16>(depth);
                    // SAFETY: C is (m, n) and this tile is inside it.
                    let c = unsafe { self.c.add((row + at) * c_row + column) };
                    let tile = Tile {
                        k: steps::<BF16>(depth),
                        a: self.left[left..].as_ptr(),
                        a_row: 1,
                        a_k: S::LARGE_ROWS,
                        b: if BF16 { pairs.as_ptr() } else { panel.as_ptr() },
                        b_k: width,
                        c: if whole { c } else { edge.as_mut_ptr() },
                        c_row: if whole { c_row } else { width },
                        add: whole && (add || from > 0),
                    };
                    // SAFETY: the panels hold `depth` rows of what the tile reads; a tile that is not whole goes to
                    // `edge`, which has the tile's size.
                    unsafe {
                        match (BF16, narrow) {
                            (true, true) => s.pair_tile::<true>(tile),
                            (true, false) => s.pair_tile::<false>(tile),
                            (false, true) => s.narrow_tile(tile),
                            (false, false) => s.large_tile(tile),
                        }
                    }
                    if !whole {
                        for i in 0..valid {
                            for j in 0..columns {
                                // SAFETY: within C, since i and j count what is valid.
                                let c = unsafe { &mut *c.add(i * c_row + j) };
                                let sum = edge[i * width + j];
                                *c = if add || from > 0 { *c + sum } else { sum };
                            }
                        }
                    }
                }
            }
        }
    }
}

impl Right for Matrix {
    fn depth_unit(&self) -> usize {
        1
    }

    #[inline(always)]
    fn panel<S: Simd>(
        &self,
        s: S,
        (k, depth): (usize, usize),
        (n, columns): (usize, usize),
        width: usize,
        panel: &mut [f32],
    ) {
        if columns < width {
            panel.fill(0.0);
        }
        // SAFETY: rows k..k + depth and columns n..n + columns are within the matrix.
        unsafe {
            let from = self.data.add(k * self.row + n * self.column);
            if self.column == 1 {
                for (i, out) in panel.chunks_exact_mut(width).enumerate().take(depth) {
                    let row = from.add(i * self.row);
                    if columns == width {
                        for j in (0..width).step_by(S::LANES) {
                            s.store(out.as_mut_ptr().add(j), s.load(row.add(j)));
                        }
                    } else {
                        std::ptr::copy_nonoverlapping(row, out.as_mut_ptr(), columns);
                    }
                }
            } else {
                // Along the columns, whose elements are next to each other where W^T is meant.
                for j in 0..columns {
                    let column = from.add(j * self.column);
                    for i in 0..depth {
                        panel[i * width + j] = *column.add(i * self.row);
                    }
                }
            }
        }
    }
}
