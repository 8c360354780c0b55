//! The gradient of [`super::linears`].

use std::ffi::CStr;

use super::gemm::{LeftRows, share};
use super::level::dispatch;
use super::linears::{Part, Places, Side, places};
use super::primitive::{Op, Tensor};
use super::scratch::{LEFT, MADE, scratch};
use super::simd::{Kernel, Simd};
use super::slim::{SMALL, Slim, by_blocks, pad_turned, whole_vectors};
use super::source::Source;
use crate::pool::{self, Shares};
use crate::{Array, Precision};

/// Which gradients of a part are wanted.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    pub(super) low_rank: bool,
    pub(super) factor: bool,
    pub(super) input: bool,
}

/// With g = c dy: dx = sum over parts of g W + s (g B^T) A^T, dA = s x^T (g B^T), dB = s z^T g, dc = sum over rows of
/// dy (y - h - b) / c, dh = dy. g itself is never in memory: c goes to where dy is read for g W, to B, and to the columns
/// of s z^T dy. The outputs are dx and, of each part, dA, dB, dc and the gradient of its own input; empty if not wanted.
pub(super) struct LinearsGradient {
    pub(super) source: Source,
    /// How many inputs x comes out of; they are empty where x is not read.
    pub(super) sources: usize,
    pub(super) parts: Vec<Part>,
    pub(super) wanted: Vec<Wanted>,
    pub(super) x: bool,
    pub(super) precision: Precision,
}

impl LinearsGradient {
    pub(super) fn shapes(&self, primals: &[Array], places: &[Places]) -> Vec<Vec<i32>> {
        let shape = |there: bool, place: usize| if there { primals[place].shape().to_vec() } else { vec![0] };
        let mut shapes = vec![shape(self.x, 0)];
        for (wanted, at) in self.wanted.iter().zip(places) {
            shapes.push(shape(wanted.low_rank, at.a));
            shapes.push(shape(wanted.low_rank, at.b));
            shapes.push(shape(wanted.factor, at.factor.unwrap_or(0)));
            shapes.push(shape(wanted.input, at.input));
        }
        shapes
    }
}

impl Op for LinearsGradient {
    fn name(&self) -> &'static CStr {
        c"gradient of linears"
    }

    fn run(&self, inputs: &[Tensor], outputs: &mut [Tensor]) {
        let places = places(&self.parts, self.sources);
        let width = self.parts.first().map_or(1, |part| part.kind.inputs());
        let mut made = scratch(&MADE, self.source.room(inputs[0].f32().len()));
        let x = self.source.make(inputs, width, &mut made);
        let sides = self.parts.iter().filter(|part| part.side.is_some()).count();
        let kept = self.wanted.iter().filter(|wanted| wanted.factor).count();
        let mut next_z = places.last().map_or(1, |at| at.end);
        let mut next_y = next_z + sides;
        let slopes = next_y + kept;
        let Some((dx, outputs)) = outputs.split_first_mut() else { return };
        let dx = dx.f32_mut();
        for (i, ((part, at), wanted)) in self.parts.iter().zip(&places).zip(&self.wanted).enumerate() {
            let dy = inputs[slopes + i].f32();
            let (out, width) = (part.kind.out(), part.kind.inputs());
            let rows = dy.len() / out.max(1);
            let [da, db, dc, d_input] = &mut outputs[4 * i..4 * i + 4] else { return };
            let factor = at.factor.map(|i| inputs[i].f32());
            if wanted.factor {
                let (bias, residual) =
                    (at.bias.map(|i| inputs[i].f32()), at.residual.map(|i| inputs[i].f32()));
                let (y, z) = (inputs[next_y].f32(), inputs[next_z].f32());
                next_y += 1;
                let (factor, dc) = (factor.unwrap_or_default(), dc.f32_mut());
                factor_gradient(FactorGradient { dy, y, bias, residual, factor }, dc);
                let Some(Side { rank, scale, .. }) = part.side else { return };
                let b = inputs[at.b].f32();
                let mut w = vec![0.0; width];
                for (o, dc) in dc.iter_mut().enumerate().filter(|(o, _)| factor[*o].abs() < SMALL_FACTOR) {
                    part.kind.weights(&inputs[at.weight..]).row(o, &mut w);
                    let before = |row: usize| {
                        let side = (0..rank).map(|r| z[row * rank + r] * b[r * out + o]).sum::<f32>();
                        let x = x[row * width..][..width].iter().zip(&w);
                        x.map(|(x, w)| x * w).sum::<f32>() + scale * side
                    };
                    *dc = (0..rows).map(|row| dy[row * out + o] * before(row)).sum();
                }
            }
            if self.x {
                let g = LeftRows { x: dy, factor };
                part.kind.weights(&inputs[at.weight..]).times(g, dx, self.precision, i > 0);
            }
            let Some(side) = part.side else { continue };
            let z = inputs[next_z].f32();
            next_z += 1;
            if !(wanted.low_rank || wanted.input || self.x) {
                continue;
            }
            let own = if side.own_input { inputs[at.input].f32() } else { x };
            // The side path's gradient by its input goes to x, or to the input it has in x's place.
            let to = match (side.own_input, wanted.input, self.x) {
                (true, true, _) => {
                    let to = d_input.f32_mut();
                    to.fill(0.0);
                    to
                }
                (false, _, true) => &mut *dx,
                _ => &mut [],
            };
            let low_rank = wanted.low_rank.then(|| (da.f32_mut(), db.f32_mut()));
            side_gradient(
                SideGradient { rows, width, out, side, x: own, z, dy, factor },
                [&inputs[at.a], &inputs[at.b]],
                to,
                low_rank,
            );
        }
    }
}

/// Below this a factor says too little of W x + s (x A) B in the output, at 0 nothing: it is computed anew.
const SMALL_FACTOR: f32 = 1.0 / 64.0;

/// What a factor's gradient is made of.
#[derive(Clone, Copy)]
struct FactorGradient<'a> {
    /// (rows, out), as are y and h.
    dy: &'a [f32],
    y: &'a [f32],
    bias: Option<&'a [f32]>,
    residual: Option<&'a [f32]>,
    factor: &'a [f32],
}

/// dc_o = sum over rows of dy (y - h - b) / c.
fn factor_gradient(of: FactorGradient, dc: &mut [f32]) {
    let out = of.factor.len();
    let dc = Shares::new(dc);
    share(of.dy.len() >= SMALL, out.div_ceil(COLUMNS), |task| {
        let (first, count) = (task * COLUMNS, COLUMNS.min(out - task * COLUMNS));
        // SAFETY: each block of columns belongs to one task.
        let dc = unsafe { dc.part(first, count) };
        dispatch(FactorColumns { of, first, dc });
    });
}

/// Columns that a task takes at a time.
const COLUMNS: usize = 128;

struct FactorColumns<'a> {
    of: FactorGradient<'a>,
    first: usize,
    dc: &'a mut [f32],
}

impl Kernel for FactorColumns<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let FactorColumns { of: FactorGradient { dy, y, bias, residual, factor }, first, dc } = self;
        let (out, count) = (factor.len(), dc.len());
        let factor = &factor[first..first + count];
        let mut sums = [0.0; COLUMNS];
        let sums = &mut sums[..count];
        for row in 0..dy.len() / out.max(1) {
            let at = row * out + first;
            let dy = &dy[at..at + count];
            let slopes = sums.iter_mut().zip(dy).zip(&y[at..at + count]);
            let h = residual.map(|h| &h[at..at + count]);
            match (h, bias.map(|bias| &bias[first..first + count])) {
                (None, None) => slopes.for_each(|((sum, dy), y)| *sum += dy * y),
                (Some(h), None) => slopes.zip(h).for_each(|(((sum, dy), y), h)| *sum += dy * (y - h)),
                (None, Some(b)) => slopes.zip(b).for_each(|(((sum, dy), y), b)| *sum += dy * (y - b)),
                (Some(h), Some(b)) => {
                    slopes.zip(h.iter().zip(b)).for_each(|(((sum, dy), y), (h, b))| *sum += dy * (y - h - b))
                }
            }
        }
        dc.iter_mut().zip(&*sums).zip(factor).for_each(|((dc, sum), c)| *dc = sum / c);
    }
}

/// Sizes and rows of the gradient of a side path.
#[derive(Clone, Copy)]
struct SideGradient<'a> {
    rows: usize,
    /// in
    width: usize,
    out: usize,
    side: Side,
    x: &'a [f32],
    z: &'a [f32],
    dy: &'a [f32],
    factor: Option<&'a [f32]>,
}

/// With g = c dy: dz = s g B^T; `to` += dz A^T unless it is empty; dA = x^T dz and dB = s z^T g.
fn side_gradient(
    of: SideGradient,
    [a, b]: [&Tensor; 2],
    to: &mut [f32],
    low_rank: Option<(&mut [f32], &mut [f32])>,
) {
    let SideGradient { rows, width, out, side, x, z, dy, factor } = of;
    let rank = side.rank;
    let wide = whole_vectors(rank);
    let sizes = [out * wide, rank * width, rows * wide, rows * rank];
    let mut scratch = scratch(&LEFT, sizes.iter().sum());
    let (b_turned, rest) = scratch.split_at_mut(sizes[0]);
    let (a_turned, rest) = rest.split_at_mut(sizes[1]);
    let (dz, scaled) = rest.split_at_mut(sizes[2]);
    pad_turned(b.f32(), out, wide, b_turned);
    if let Some(factor) = factor {
        for (column, c) in b_turned.chunks_exact_mut(wide).zip(factor) {
            column.iter_mut().for_each(|b| *b *= c);
        }
    }
    pad_turned(a.f32(), rank, width, a_turned);
    let (b_turned, a_turned) = (&*b_turned, &*a_turned);
    {
        let (dz, to) = (Shares::new(dz), Shares::new(to));
        by_blocks(rows, (width + out) * rank, |first, count| {
            // SAFETY: each block of rows belongs to one task.
            let dz = unsafe { dz.part(first * wide, count * wide) };
            let to = match to.is_empty() {
                true => &mut [][..],
                // SAFETY: as above.
                false => unsafe { to.part(first * width, count * width) },
            };
            let dy = &dy[first * out..(first + count) * out];
            dispatch(SideRows {
                dy,
                b_turned,
                a_turned,
                scale: side.scale,
                rank,
                wide,
                width,
                dz,
                to,
                count,
            });
        });
    }
    let Some((da, db)) = low_rank else { return };
    if rows == 0 {
        da.fill(0.0);
        db.fill(0.0);
        return;
    }
    for (scaled, z) in scaled.iter_mut().zip(z) {
        *scaled = side.scale * z;
    }
    let (dz, scaled) = (&*dz, &*scaled);
    // dA by blocks of inputs, dB by blocks of outputs; each sum runs over the rows in their order.
    let da = Shares::new(da);
    share(rows * width * rank >= SMALL, width.div_ceil(BLOCK), |task| {
        let (first, count) = (task * BLOCK, BLOCK.min(width - task * BLOCK));
        // SAFETY: each block of inputs belongs to one task.
        let to = unsafe { da.part(first * rank, count * rank) };
        dispatch(TurnedProduct { x, width, dz, wide, rank, rows, first, count, to });
    });
    // Whole vectors, and whole lines, which no two tasks should write.
    let columns = out.div_ceil(2 * pool::threads()).next_multiple_of(16);
    let db = Shares::new(db);
    share(rows * out * rank >= SMALL, out.div_ceil(columns), |task| {
        let (first, count) = (task * columns, columns.min(out - task * columns));
        dispatch(OuterProduct { scaled, rank, dy, factor, out, rows, first, count, to: &db });
    });
}

/// Inputs of dA that a task takes at a time.
const BLOCK: usize = 64;

struct SideRows<'a> {
    dy: &'a [f32],
    /// c B^T (out, wide).
    b_turned: &'a [f32],
    a_turned: &'a [f32],
    scale: f32,
    rank: usize,
    wide: usize,
    width: usize,
    dz: &'a mut [f32],
    to: &'a mut [f32],
    count: usize,
}

impl Kernel for SideRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let SideRows { dy, b_turned, a_turned, scale, rank, wide, width, dz, to, count } = self;
        let out = dy.len() / count.max(1);
        let product = Slim {
            rows: count,
            columns: wide,
            k: out,
            a: dy,
            a_row: out,
            a_k: 1,
            b: b_turned,
            b_k: wide,
            c_row: wide,
            add: false,
        };
        product.run(s, dz);
        dz.iter_mut().for_each(|dz| *dz *= scale);
        if !to.is_empty() {
            let product = Slim {
                rows: count,
                columns: width,
                k: rank,
                a: dz,
                a_row: wide,
                a_k: 1,
                b: a_turned,
                b_k: width,
                c_row: width,
                add: true,
            };
            product.run(s, to);
        }
    }
}

/// Rows `first`..`first + count` of x^T dz.
struct TurnedProduct<'a> {
    x: &'a [f32],
    width: usize,
    dz: &'a [f32],
    wide: usize,
    rank: usize,
    rows: usize,
    first: usize,
    count: usize,
    to: &'a mut [f32],
}

impl Kernel for TurnedProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let TurnedProduct { x, width, dz, wide, rank, rows, first, count, to } = self;
        let mut block = [0.0; BLOCK * 128];
        for column in (0..wide).step_by(128) {
            let columns = 128.min(wide - column);
            let product = Slim {
                rows: count,
                columns,
                k: rows,
                a: &x[first..],
                a_row: 1,
                a_k: width,
                b: &dz[column..],
                b_k: wide,
                c_row: columns,
                add: false,
            };
            product.run(s, &mut block);
            let valid = columns.min(rank - column.min(rank));
            for (to, block) in to.chunks_exact_mut(rank).zip(block.chunks_exact(columns)) {
                to[column..column + valid].copy_from_slice(&block[..valid]);
            }
        }
    }
}

/// Columns `first`..`first + count` of (s z)^T dy, times c.
struct OuterProduct<'a> {
    scaled: &'a [f32],
    rank: usize,
    dy: &'a [f32],
    factor: Option<&'a [f32]>,
    out: usize,
    rows: usize,
    first: usize,
    count: usize,
    to: &'a Shares<'a, f32>,
}

impl Kernel for OuterProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let OuterProduct { scaled, rank, dy, factor, out, rows, first, count, to } = self;
        let product = Slim {
            rows: rank,
            columns: count,
            k: rows,
            a: scaled,
            a_row: 1,
            a_k: rank,
            b: &dy[first..],
            b_k: out,
            c_row: out,
            add: false,
        };
        // SAFETY: dB is (rank, out), and each block of its columns belongs to one task.
        unsafe { product.run_at(s, to.pointer().add(first)) };
        let Some(factor) = factor else { return };
        for r in 0..rank {
            // SAFETY: as above.
            let row = unsafe { to.part(r * out + first, count) };
            row.iter_mut().zip(&factor[first..]).for_each(|(db, c)| *db *= c);
        }
    }
}
