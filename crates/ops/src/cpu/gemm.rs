//! C = A B for many rows: A is copied into panels once, B is made panel by panel where it is used.
//!
//! B may be packed weights, which are widened to f32 only as the panel that a tile needs next, so a dense copy of them
//! never exists. Work is shared over blocks of C, never over k: each element of C is summed in one fixed order.
//! With bf16 both panels hold words of two neighbours in k, which one instruction multiplies and adds to an f32.

use super::level::Instructions;
use super::scratch::{LEFT, PANEL, scratch};
use super::simd::{Kernel, Simd, Tile, prefetch};
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
/// Elements of A that all of them are multiplied with before others: with the panels, half of a second-level cache.
const TURN: usize = 24 << 10;
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
    let depth = k.div_ceil(k.div_ceil(deepest).max(1)).next_multiple_of(unit).min(deepest / unit * unit);
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
                    with.run(Left::<BF16> { a, row: at, valid, k: begin + from, depth, factor, out });
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
/// does not have; with BF16 as words of two neighbours, (depth / 2, tile_rows), of which the last of an odd depth is half zero.
struct Left<'a, const BF16: bool> {
    a: Matrix,
    row: usize,
    valid: usize,
    k: usize,
    depth: usize,
    /// Of these columns.
    factor: Option<&'a [f32]>,
    out: &'a mut [f32],
}

/// Rows of a tile at most.
const TALLEST: usize = 12;

impl<const BF16: bool> Kernel for Left<'_, BF16> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Left { a, row, valid, k, depth, factor, out } = self;
        // SAFETY: within A by the caller's promise.
        let from = unsafe { a.data.add(row * a.row + k * a.column) };
        if !BF16 && valid == S::LARGE_ROWS && a.column == 1 && factor.is_none() {
            // SAFETY: whole rows of A.
            unsafe { turn_rows(s, from, a.row, out) };
            return;
        }
        let mut rows = [[0.0; DEEPEST]; TALLEST];
        for (i, to) in rows.iter_mut().enumerate().take(valid) {
            // SAFETY: as above.
            let from = unsafe { from.add(i * a.row) };
            if a.column == 1 {
                // SAFETY: as above.
                to[..depth].copy_from_slice(unsafe { std::slice::from_raw_parts(from, depth) });
            } else {
                for (at, to) in to.iter_mut().enumerate().take(depth) {
                    // SAFETY: as above.
                    *to = unsafe { *from.add(at * a.column) };
                }
            }
            for (to, factor) in to.iter_mut().zip(factor.unwrap_or_default()) {
                *to *= factor;
            }
            if BF16 {
                for at in (0..depth).step_by(S::LANES) {
                    // SAFETY: vectors of a row, whose length is a multiple of them; half of each is written where it was read.
                    unsafe {
                        let words = to.as_mut_ptr().add(at / 2).cast();
                        s.pair_neighbours(to.as_ptr().add(at), words);
                    }
                }
            }
        }
        // SAFETY: the array has more rows than a tile, and longer ones.
        unsafe { turn_rows(s, rows.as_ptr().cast(), DEEPEST, out) };
    }
}

/// As many rows as a tile has, `row` apart, turned to (depth, rows).
///
/// # Safety
/// The rows must be valid for reading as many numbers as `out` has columns.
#[inline(always)]
unsafe fn turn_rows<S: Simd>(s: S, from: *const f32, row: usize, out: &mut [f32]) {
    let high = S::LARGE_ROWS;
    let depth = out.len() / high;
    for at in (0..depth / 4 * 4).step_by(4) {
        for i in (0..high).step_by(4) {
            // The last four overlap those before where rows are no multiple of four.
            let i = i.min(high - 4);
            // SAFETY: rows i..i + 4 and columns at..at + 4 of both.
            unsafe { s.turn(from.add(i * row + at), row, out.as_mut_ptr().add(at * high + i), high) };
        }
    }
    for at in depth / 4 * 4..depth {
        for i in 0..high {
            // SAFETY: an element of the rows.
            out[at * high + i] = unsafe { *from.add(i * row + at) };
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
        let columns = self.first_panel..self.last_panel;
        // A panel of B as it is multiplied, and with BF16 as it is made, with one row more for the zeros that make an odd
        // depth even.
        let (kept, made) = (width * steps::<BF16>(depth), if BF16 { width * (depth + 1) } else { 0 });
        let mut scratch = scratch(&PANEL, columns.len() * kept + made + S::LARGE_ROWS * width);
        let (right, rest) = scratch.split_at_mut(columns.len() * kept);
        let (made, edge) = rest.split_at_mut(made);
        for from in (0..here).step_by(depth) {
            let depth = depth.min(here - from);
            for (p, kept) in columns.clone().zip(right.chunks_exact_mut(kept)) {
                let column = p * width;
                let n = (column, width.min(sizes.n - column));
                let to = if BF16 { &mut made[..width * depth] } else { &mut kept[..width * depth] };
                self.b.panel(s, (begin + from, depth), n, width, to);
                if BF16 {
                    made[width * depth..width * (depth + depth % 2)].fill(0.0);
                    for (two, to) in made.chunks_exact(2 * width).zip(kept.chunks_exact_mut(width)) {
                        for j in (0..width).step_by(S::LANES) {
                            // SAFETY: a row is `width`, which is whole vectors.
                            unsafe {
                                let (even, odd) = (two.as_ptr().add(j), two.as_ptr().add(width + j));
                                s.pair_columns(even, odd, to.as_mut_ptr().add(j).cast());
                            }
                        }
                    }
                }
            }
            // The panels take turns with some rows of A, which come from far away once for all of them.
            let turn = (TURN / (S::LARGE_ROWS * steps::<BF16>(depth))).max(1);
            for first in (self.first_row..self.last_row).step_by(turn) {
                for (p, r) in columns
                    .clone()
                    .flat_map(|p| (first..(first + turn).min(self.last_row)).map(move |r| (p, r)))
                {
                    let column = p * width;
                    let columns = width.min(sizes.n - column);
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
                        b: right[(p - self.first_panel) * kept..].as_ptr(),
                        b_k: width,
                        c: if whole { c } else { edge.as_mut_ptr() },
                        c_row: if whole { c_row } else { width },
                        add: whole && (add || from > 0),
                    };
                    // C comes from far away and is needed last.
                    for i in (0..S::LARGE_ROWS).filter(|_| whole) {
                        let row = tile.c.wrapping_add(i * c_row);
                        prefetch(row);
                        prefetch(row.wrapping_add(width - 1));
                    }
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
