//! Products of arranged weights with rows of x rounded to 16 bits: who rounds, multiplies and finishes what.
//!
//! The integer products stand in [`super::vnni`] and [`super::avx2`] and sum the same whole numbers; what is added to them is written
//! once for all levels.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::gemm::share;
use super::level::dispatch;
use super::packed::widen;
use super::panels::{BLOCK, Panels, ROWS, by_parts, each_part};
use super::scratch::{self, LEFT, PANEL};
use super::simd::{Kernel, Simd, prefetch};
use super::{avx2, vnni};
use crate::pool::{self, Shares};
use crate::{Level, cpu_level};

/// Whether this processor has instructions for such products, and the level in use allows them.
pub(crate) fn available() -> bool {
    cpu_level() >= Level::Avx2
}

/// Rows of x, rounded: numbers of two bytes (m, inputs) in an order of the instructions' own, then for every block of 32 the
/// step d and the sum of what the numbers stand for (m, inputs / 32).
pub(crate) struct Rounded<'a> {
    pub(crate) m: usize,
    pub(crate) inputs: usize,
    pub(crate) q: &'a [f32],
    pub(crate) factors: &'a [f32],
    pub(crate) sums: &'a [f32],
    /// The sums of every 16, or nothing if no W has groups of 16.
    pub(crate) halves: &'a [f32],
}

/// How codes are read: whole numbers, or floats of 4 bits by [`TABLE`].
pub(crate) const WHOLE: u8 = 0;
pub(crate) const FLOATS: u8 = 1;
/// Floats of 4 bits in groups of 16, of which a block has two.
pub(crate) const HALVES: u8 = 2;

/// 12 more than twice the float of each code: see [`super::panels`].
pub(crate) const TABLE: [i8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];

impl Rounded<'_> {
    /// How the codes of W are read. Panics unless the sizes are those that the instructions rely on for rows `rows`.
    pub(crate) fn reading(&self, panel: &Panel, rows: &Range<usize>) -> u8 {
        let w = panel.w;
        let inputs = w.arrangement.inputs;
        let levels = w.arrangement.groups() * ROWS;
        assert!(panel.scales.len() == levels && panel.biases.len() == levels);
        assert!(self.inputs == inputs && self.q.len() * 2 == self.m * inputs && rows.end <= self.m);
        assert!(self.factors.len() * BLOCK == self.m * inputs && self.sums.len() == self.factors.len());
        let read = reading(w);
        assert!(read != HALVES || self.halves.len() == 2 * self.sums.len());
        read
    }
}

/// How the codes of W are read.
fn reading(w: &Panels) -> u8 {
    match (w.biases, w.arrangement.group < BLOCK) {
        (Some(_), _) => WHOLE,
        (None, false) => FLOATS,
        (None, true) => HALVES,
    }
}

/// Fine steps in a coarse one: x = d (254 q + r).
pub(crate) const FINE: f32 = 254.0;

/// How far ahead of their use codes are asked for, in bytes.
pub(crate) const AHEAD: usize = 2048;

/// A panel of W with its scales and biases as f32, (groups, 16): converted between the products of a tile they would drive its
/// sums out of the registers.
pub(crate) struct Panel<'a> {
    pub(crate) w: &'a Panels<'a>,
    pub(crate) index: usize,
    pub(crate) scales: &'a [f32],
    pub(crate) biases: &'a [f32],
}

/// Scales, then biases, of a panel.
struct Levels<'a> {
    w: &'a Panels<'a>,
    panel: usize,
    to: &'a mut [f32],
}

impl Kernel for Levels<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Levels { w, panel, to } = self;
        let (scales, biases) = to.split_at_mut(to.len() / 2);
        let at = panel * scales.len();
        widen(s, w.scales, at, scales);
        if let Some(own) = w.biases {
            widen(s, own, at, biases);
            return;
        }
        for (scale, bias) in scales.iter_mut().zip(biases) {
            (*scale, *bias) = (0.5 * *scale, -6.0 * *scale);
        }
    }
}

/// A product of x with one W, and what becomes of it.
pub(crate) struct Job<'a> {
    pub(crate) w: Panels<'a>,
    /// (m, out)
    pub(crate) y: Shares<'a, f32>,
    pub(crate) after: After<'a>,
}

/// What becomes of W x: y = c (W x + z B) + b + h, with z, B and c of each row's group.
#[derive(Clone, Copy, Default)]
pub(crate) struct After<'a> {
    /// Of groups of rows that have an update, in order.
    pub(crate) sides: &'a [SideRows<'a>],
    /// b (out,)
    pub(crate) bias: Option<&'a [f32]>,
    /// h (m, out)
    pub(crate) residual: Option<&'a [f32]>,
}

/// The update of some rows, z = s x A.
pub(crate) struct SideRows<'a> {
    pub(crate) rows: Range<usize>,
    /// A turned to (R, in), the bits of bf16.
    pub(crate) a: &'a [u16],
    pub(crate) scale: f32,
    /// z (rows, R), written by the first tasks of the product.
    pub(crate) z: Shares<'a, f32>,
    /// B (panels, R, 16), the bits of bf16.
    pub(crate) b: &'a [u16],
    pub(crate) rank: usize,
    /// c (out,)
    pub(crate) factor: Option<&'a [f32]>,
}

/// Rows of x that are multiplied by a task's panels before the next are: what is read again and again stays in the cache.
const BAND: usize = 64;

/// All jobs of one x (m, inputs), which is rounded once. The processor must have the instructions.
pub(crate) fn products(x: &[f32], jobs: &[Job]) {
    let inputs = jobs.first().map_or(1, |job| job.w.arrangement.inputs);
    let (m, words, blocks) = (x.len() / inputs, inputs / 2, inputs / BLOCK);
    // Another thread may choose another level meanwhile, and the order of the numbers depends on it.
    let wide = vnni::available();
    let halved = if jobs.iter().any(|job| reading(&job.w) == HALVES) { 2 * blocks } else { 0 };
    let mut scratch = scratch::scratch(&LEFT, m * (words + 2 * blocks + halved));
    let (q, rest) = scratch.split_at_mut(m * words);
    let (factors, rest) = rest.split_at_mut(m * blocks);
    let (sums, halves) = rest.split_at_mut(m * blocks);
    {
        let (q, factors) = (Shares::new(q), Shares::new(factors));
        let (sums, halves) = (Shares::new(sums), Shares::new(halves));
        by_parts(m, m * inputs >= 1 << 15, |rows| {
            for row in rows {
                let x = &x[row * inputs..][..inputs];
                // SAFETY: each row belongs to one task; the processor has the instructions.
                unsafe {
                    let q = q.part(row * words, words);
                    let (factors, sums) =
                        (factors.part(row * blocks, blocks), sums.part(row * blocks, blocks));
                    let halves = halves.part(row * halved, halved);
                    if wide {
                        vnni::round_row(x, q, factors, (sums, halves));
                    } else {
                        avx2::round_row(x, q, factors, (sums, halves));
                    }
                }
            }
        });
    }
    let rounded = Rounded { m, inputs, q, factors, sums, halves };
    // z of all updates comes first, so that whoever needs it waits for what another thread is already at.
    let mut low_rank = Vec::new();
    for side in jobs.iter().flat_map(|job| job.after.sides) {
        let count = (LOW_RANK / (inputs * side.rank).max(1)).max(1);
        let rows = side.rows.clone().step_by(count);
        low_rank.extend(rows.map(|row| (side, row..(row + count).min(side.rows.end))));
    }
    let left = AtomicUsize::new(low_rank.len());
    // The panels of all W, one after another.
    let panels: usize = jobs.iter().map(|job| job.w.arrangement.panels()).sum();
    let groups = jobs.iter().map(|job| job.w.arrangement.groups()).max().unwrap_or(0);
    let worth_it = m * panels * ROWS * inputs >= 1 << 15;
    let each = each_part(panels, worth_it);
    share(worth_it, low_rank.len() + panels.div_ceil(each), |task| {
        if let Some((side, rows)) = low_rank.get(task) {
            let _ended = Ended(&left);
            return side.low_rank(x, inputs, rows.clone());
        }
        let first = (task - low_rank.len()) * each;
        let range = first..(first + each).min(panels);
        let mut scratch = scratch::scratch(&PANEL, 2 * groups * ROWS);
        for row in (0..m).step_by(BAND) {
            let rows = row..(row + BAND).min(m);
            let mut first = 0;
            for job in jobs {
                let count = job.w.arrangement.panels();
                let own = range.start.clamp(first, first + count) - first
                    ..range.end.clamp(first, first + count) - first;
                first += count;
                let levels = &mut scratch[..2 * job.w.arrangement.groups() * ROWS];
                for index in own.clone() {
                    dispatch(Levels { w: &job.w, panel: index, to: levels });
                    let (scales, biases) = levels.split_at(levels.len() / 2);
                    let panel = Panel { w: &job.w, index, scales, biases };
                    job.after.ask_for(index, &rows);
                    // SAFETY: each panel's columns of y belong to one task; the processor has the instructions.
                    unsafe {
                        if wide {
                            vnni::multiply(&panel, &rounded, rows.clone(), &job.y);
                        } else {
                            avx2::multiply(&panel, &rounded, rows.clone(), &job.y);
                        }
                    }
                }
                if !own.is_empty() && !job.after.is_empty() {
                    // Tasks of lower numbers are at it, or have ended.
                    pool::wait_until(|| left.load(Ordering::Acquire) == 0);
                    dispatch(Finish { job, panels: own, rows: rows.clone(), m });
                }
            }
        }
    });
}

/// Multiply-adds of z = s x A that a task does.
const LOW_RANK: usize = 1 << 15;

/// Counts a task as ended, also where it panics: others would wait for ever.
struct Ended<'a>(&'a AtomicUsize);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

impl SideRows<'_> {
    /// z of some of the rows of x (m, in).
    fn low_rank(&self, x: &[f32], inputs: usize, rows: Range<usize>) {
        for row in rows {
            // SAFETY: each row of z belongs to one task, and nobody reads it before all of these have ended.
            let z = unsafe { self.z.part((row - self.rows.start) * self.rank, self.rank) };
            dispatch(LowRankRow { x: &x[row * inputs..][..inputs], a: self.a, scale: self.scale, z });
        }
    }
}

impl After<'_> {
    /// Asks for what [`Finish`] reads of a panel's updates for these rows, so that it is there when the product is; for no more
    /// than leaves the product its place in the nearest cache.
    fn ask_for(&self, panel: usize, rows: &Range<usize>) {
        let mut lines = 64;
        for side in self.sides.iter().filter(|side| side.rows.start < rows.end && rows.start < side.rows.end)
        {
            let b = &side.b[panel * side.rank * ROWS..][..side.rank * ROWS];
            for line in b.chunks(32).take(lines) {
                prefetch(line.as_ptr());
            }
            lines = lines.saturating_sub(side.rank / 2);
            if let Some(c) = side.factor.filter(|_| lines > 0) {
                prefetch(c[panel * ROWS..].as_ptr());
            }
        }
    }

    fn is_empty(&self) -> bool {
        self.sides.is_empty() && self.bias.is_none() && self.residual.is_none()
    }
}

/// [`After`] for some panels and rows of y, which are still in the cache.
struct Finish<'a> {
    job: &'a Job<'a>,
    panels: Range<usize>,
    rows: Range<usize>,
    m: usize,
}

impl Kernel for Finish<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Finish { job: Job { w, y, after }, panels, rows, m } = self;
        let out = w.arrangement.out;
        assert!(after.bias.is_none_or(|bias| bias.len() == out));
        assert!(after.residual.is_none_or(|h| h.len() == m * out));
        for side in after.sides {
            assert!(side.rows.end <= m);
            assert!(side.b.len() == w.arrangement.panels() * side.rank * ROWS);
            assert!(side.factor.is_none_or(|c| c.len() == out));
        }
        for panel in panels {
            let column = panel * ROWS;
            let columns = ROWS.min(out - column);
            let part = |of: &'_ [f32], row: usize, to: &mut [f32; ROWS]| {
                to[..columns].copy_from_slice(&of[row * out + column..][..columns]);
            };
            for side in after.sides {
                let b = &side.b[panel * side.rank * ROWS..][..side.rank * ROWS];
                let mut c = [1.0; ROWS];
                if let Some(factor) = side.factor {
                    part(factor, 0, &mut c);
                }
                for row in rows.start.max(side.rows.start)..rows.end.min(side.rows.end) {
                    // SAFETY: the tasks that write z have ended.
                    let z = unsafe { side.z.read((row - side.rows.start) * side.rank, side.rank) };
                    // SAFETY: these columns of y belong to this task.
                    let y = unsafe { y.part(row * out + column, columns) };
                    let mut sums = [0.0; ROWS];
                    sums[..columns].copy_from_slice(y);
                    for lane in (0..ROWS).step_by(S::LANES) {
                        // SAFETY: whole vectors inside arrays of sixteen and rows of B.
                        unsafe {
                            let mut sum = s.load(sums.as_ptr().add(lane));
                            for (r, &z) in z.iter().enumerate() {
                                let b = s.load_bf16(b.as_ptr().add(r * ROWS + lane));
                                sum = s.fma(s.splat(z), b, sum);
                            }
                            if side.factor.is_some() {
                                sum = s.mul(sum, s.load(c.as_ptr().add(lane)));
                            }
                            s.store(sums.as_mut_ptr().add(lane), sum);
                        }
                    }
                    y.copy_from_slice(&sums[..columns]);
                }
            }
            let (mut bias, mut residual) = ([0.0; ROWS], [0.0; ROWS]);
            if let Some(b) = after.bias {
                part(b, 0, &mut bias);
            }
            if after.bias.is_none() && after.residual.is_none() {
                continue;
            }
            for row in rows.clone() {
                if let Some(h) = after.residual {
                    part(h, row, &mut residual);
                }
                // SAFETY: as above.
                let y = unsafe { y.part(row * out + column, columns) };
                for ((y, b), h) in y.iter_mut().zip(&bias).zip(&residual) {
                    *y = *y + b + h;
                }
            }
        }
    }
}

/// z (R,) = s x A for a row x (in,) and A turned to (R, in), the bits of bf16. `in` is a whole number of blocks.
pub(crate) struct LowRankRow<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) a: &'a [u16],
    pub(crate) scale: f32,
    pub(crate) z: &'a mut [f32],
}

impl Kernel for LowRankRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let LowRankRow { x, a, scale, z } = self;
        assert!(x.len().is_multiple_of(BLOCK) && a.len() == x.len() * z.len());
        for (z, a) in z.chunks_mut(TOGETHER).zip(a.chunks(TOGETHER * x.len())) {
            // A row beyond the last repeats it; its result is not written.
            let row = |r: usize| a[r.min(z.len() - 1) * x.len()..].as_ptr();
            let rows = [row(0), row(1), row(2), row(3)];
            let mut sums = [s.splat(0.0); TOGETHER];
            for k in (0..x.len()).step_by(S::LANES) {
                // SAFETY: whole vectors of x and of rows of A, which are multiples of 32.
                unsafe {
                    let x = s.load(x.as_ptr().add(k));
                    for (sum, row) in sums.iter_mut().zip(rows) {
                        *sum = s.fma(x, s.load_bf16(row.add(k)), *sum);
                    }
                }
            }
            for (z, sum) in z.iter_mut().zip(sums) {
                *z = scale * s.sum(sum);
            }
        }
    }
}

/// Rows of A that share the reading of x.
const TOGETHER: usize = 4;
