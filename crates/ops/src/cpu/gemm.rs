//! C = A B for many rows: A is copied into panels once, B is made panel by panel where it is used.
//!
//! B may be packed weights, which are widened to f32 only as the panel that a tile needs next, so a dense copy of them
//! never exists. Work is shared over blocks of C, never over k: each element of C is summed in one fixed order.

use super::level::dispatch;
use super::scratch::{LEFT, PANEL, scratch};
use super::simd::{Kernel, Simd, Tile};
use crate::pool::{self, Shares};

/// The depth of a panel of B at most: with 32 columns, most of a first-level cache.
pub(crate) const DEPTH: usize = 256;
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
    fn panel<S: Simd>(
        &self,
        s: S,
        k: usize,
        depth: usize,
        n: usize,
        columns: usize,
        width: usize,
        panel: &mut [f32],
    );
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

/// C = alpha A B, or C += alpha A B if `add`; C's rows are `c_row` apart.
///
/// # Safety
/// A must be readable for (m, k) by its strides, and C must hold (m - 1) * c_row + n floats that nobody else uses.
pub(crate) unsafe fn gemm(
    sizes: Sizes,
    a: Matrix,
    alpha: f32,
    b: &impl Right,
    c: &Shares<f32>,
    c_row: usize,
    add: bool,
) {
    let Sizes { m, n, k } = sizes;
    if m == 0 || n == 0 {
        return;
    }
    let width_of = dispatch(Shape);
    let tile_rows = width_of.rows;
    let narrow = n <= width_of.lanes;
    let width = if narrow { width_of.lanes } else { 2 * width_of.lanes };
    // Depth blocks of about one size, so that the last is not a stump.
    let unit = b.depth_unit();
    let depth = k.div_ceil(k.div_ceil(DEPTH).max(1)).next_multiple_of(unit).max(unit);
    let span = depth * BLOCKS;

    for row in (0..m).step_by(ROWS) {
        let rows = ROWS.min(m - row);
        let panels = rows.div_ceil(tile_rows);
        let mut begin = 0;
        loop {
            let here = span.min(k - begin);
            let mut left = scratch(&LEFT, panels * tile_rows * here);
            let shares = Shares::new(&mut left);
            let pack = |panel: usize| {
                let at = row + panel * tile_rows;
                let valid = tile_rows.min(m - at);
                for from in (0..here).step_by(depth) {
                    let depth = depth.min(here - from);
                    // SAFETY: each panel has a part of its own in every depth block.
                    let out = unsafe {
                        let start = from * panels * tile_rows + panel * tile_rows * depth;
                        shares.part(start, tile_rows * depth)
                    };
                    // SAFETY: within A by the caller's promise.
                    unsafe { pack_left(a, at, valid, begin + from, tile_rows, alpha, out) };
                }
            };
            share(rows * here >= SMALL / 4, panels, pack);

            let block =
                Block { sizes, row, rows, begin, here, depth, width, narrow, c_row, add: add || begin > 0 };
            let (column_tasks, columns) = cut(n.div_ceil(width), 2 * pool::threads(), WIDE);
            let (row_tasks, row_panels) =
                cut(panels, (2 * pool::threads()).div_ceil(column_tasks), usize::MAX);
            // SAFETY: only read from here on.
            let left = unsafe { shares.part(0, panels * tile_rows * here) };
            share(rows * n * here >= SMALL, column_tasks * row_tasks, |task| {
                let (column, part) = (task % column_tasks, task / column_tasks);
                dispatch(Task {
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

pub(crate) fn share(worth_it: bool, tasks: usize, run: impl Fn(usize) + Sync) {
    if worth_it {
        pool::run(tasks, run);
    } else {
        (0..tasks).for_each(run);
    }
}

/// Cuts `count` things into at least `wanted` parts of at most `most`, if there are enough: (parts, things in a part).
fn cut(count: usize, wanted: usize, most: usize) -> (usize, usize) {
    let each = (count / wanted.max(1)).clamp(1, most);
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

/// Rows `row`..`row + valid` of A from column `k` on, as (depth, tile_rows) with zeros for the rows that A does not have.
unsafe fn pack_left(
    a: Matrix,
    row: usize,
    valid: usize,
    k: usize,
    tile_rows: usize,
    alpha: f32,
    out: &mut [f32],
) {
    // SAFETY: within A by the caller's promise, here and below.
    let start = unsafe { a.data.add(row * a.row + k * a.column) };
    if valid < tile_rows {
        out.fill(0.0);
    }
    for (at, out) in out.chunks_exact_mut(tile_rows).enumerate() {
        for (i, out) in out[..valid].iter_mut().enumerate() {
            *out = alpha * unsafe { *start.add(i * a.row + at * a.column) };
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
struct Task<'a, B> {
    block: Block,
    left: &'a [f32],
    b: &'a B,
    c: *mut f32,
    first_panel: usize,
    last_panel: usize,
    first_row: usize,
    last_row: usize,
}

impl<B: Right> Kernel for Task<'_, B> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Block { sizes, row, rows, begin, here, depth, width, narrow, c_row, add } = self.block;
        let panels = rows.div_ceil(S::LARGE_ROWS);
        let mut scratch = scratch(&PANEL, width * depth + S::LARGE_ROWS * width);
        let (panel, edge) = scratch.split_at_mut(width * depth);
        for from in (0..here).step_by(depth) {
            let depth = depth.min(here - from);
            for p in self.first_panel..self.last_panel {
                let column = p * width;
                let columns = width.min(sizes.n - column);
                self.b.panel(s, begin + from, depth, column, columns, width, &mut panel[..width * depth]);
                for r in self.first_row..self.last_row {
                    let at = r * S::LARGE_ROWS;
                    let valid = S::LARGE_ROWS.min(rows - at);
                    let whole = valid == S::LARGE_ROWS && columns == width;
                    let left = from * panels * S::LARGE_ROWS + r * S::LARGE_ROWS * depth;
                    // SAFETY: C is (m, n) and this tile is inside it.
                    let c = unsafe { self.c.add((row + at) * c_row + column) };
                    let tile = Tile {
                        k: depth,
                        a: self.left[left..].as_ptr(),
                        a_row: 1,
                        a_k: S::LARGE_ROWS,
                        b: panel.as_ptr(),
                        b_k: width,
                        c: if whole { c } else { edge.as_mut_ptr() },
                        c_row: if whole { c_row } else { width },
                        add: whole && (add || from > 0),
                    };
                    // SAFETY: the panels hold `depth` rows of what the tile reads; a tile that is not whole
                    // goes to `edge`, which has the tile's size.
                    unsafe { if narrow { s.narrow_tile(tile) } else { s.large_tile(tile) } }
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
        k: usize,
        depth: usize,
        n: usize,
        columns: usize,
        width: usize,
        panel: &mut [f32],
    ) {
        if columns < width {
            panel.fill(0.0);
        }
        for (i, out) in panel.chunks_exact_mut(width).enumerate().take(depth) {
            // SAFETY: row k + i and columns n.. are within the matrix.
            unsafe {
                let from = self.data.add((k + i) * self.row + n * self.column);
                if self.column == 1 && columns == width {
                    for j in (0..width).step_by(S::LANES) {
                        s.store(out.as_mut_ptr().add(j), s.load(from.add(j)));
                    }
                } else {
                    for (j, out) in out[..columns].iter_mut().enumerate() {
                        *out = *from.add(j * self.column);
                    }
                }
            }
        }
    }
}
