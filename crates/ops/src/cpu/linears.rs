//! y = c (W x + s (x A) B) + b + h for one x and some linears, and the gradient.
//!
//! The side path has R columns, eight where W has hundreds: it is bound by reading x and y, so it runs over blocks of rows
//! while they are in the cache. A and B are laid out with whole vectors of R. For the gradient z = x A is kept, and of a
//! linear with a factor its output, from which W x + s (x A) B is (y - h - b) / c: of h and y others keep a copy anyway.

use std::ffi::CStr;

use super::gemm::share;
use super::level::dispatch;
use super::panels::{self, Panels};
use super::primitive::{Backward, Op, Tensor, apply};
use super::scratch::{SIDE, scratch};
use super::simd::{Kernel, Simd, Tile, tile};
use super::weights::Kind;
use crate::linears::LinearRef;
use crate::pool::{self, Shares};
use crate::{Array, Dtype, Precision, Result, precision};

/// Rows of x that a task takes at a time.
const ROWS: usize = 16;
/// R is rounded up to a multiple of this, whole vectors at every level.
const WIDTH: usize = 16;
/// Below this many multiply-adds another thread is not worth waking.
const SMALL: usize = 1 << 16;

/// One linear without its arrays.
#[derive(Clone)]
struct Part {
    kind: Kind,
    bias: bool,
    residual: bool,
    side: Option<Side>,
}

/// Its side path.
#[derive(Clone, Copy)]
struct Side {
    rank: usize,
    scale: f32,
    factor: bool,
    own_input: bool,
}

/// Where the arrays of a part are among the inputs. x is input 0.
struct Places {
    weight: usize,
    bias: Option<usize>,
    residual: Option<usize>,
    a: usize,
    b: usize,
    factor: Option<usize>,
    input: usize,
    end: usize,
}

impl Part {
    fn places(&self, first: usize) -> Places {
        let mut next = first + self.kind.arrays();
        let mut take = |there: bool| {
            let place = there.then_some(next);
            next += usize::from(there);
            place
        };
        let side = self.side;
        let (bias, residual) = (take(self.bias), take(self.residual));
        let a = take(side.is_some()).unwrap_or(0);
        let b = take(side.is_some()).unwrap_or(0);
        let factor = take(side.is_some_and(|side| side.factor));
        let input = take(side.is_some_and(|side| side.own_input)).unwrap_or(0);
        Places { weight: first, bias, residual, a, b, factor, input, end: next }
    }
}

fn places(parts: &[Part]) -> Vec<Places> {
    let mut first = 1;
    parts
        .iter()
        .map(|part| {
            let places = part.places(first);
            first = places.end;
            places
        })
        .collect()
}

/// The outputs are every y, then z of every linear that has a side path.
pub(crate) struct Linears {
    parts: Vec<Part>,
    precision: Precision,
}

impl Linears {
    pub(crate) fn apply(x: &Array, linears: &[LinearRef]) -> Result<Vec<Array>> {
        let mut inputs = vec![x];
        let mut parts = Vec::with_capacity(linears.len());
        for linear in linears {
            inputs.extend(linear.weight.arrays());
            inputs.extend(linear.bias);
            inputs.extend(linear.residual);
            let mut side = None;
            if let Some(update) = &linear.low_rank {
                inputs.extend([update.a, update.b]);
                inputs.extend(update.factor);
                inputs.extend(update.input);
                side = Some(Side {
                    rank: update.b.dim(0) as usize,
                    scale: update.scale,
                    factor: update.factor.is_some(),
                    own_input: update.input.is_some(),
                });
            }
            let (bias, residual) = (linear.bias.is_some(), linear.residual.is_some());
            parts.push(Part { kind: Kind::of(linear.weight)?, bias, residual, side });
        }
        let rows = x.size() as i32 / x.dim(-1).max(1);
        let mut shapes: Vec<Vec<i32>> = Vec::new();
        for part in &parts {
            let mut shape = x.shape().to_vec();
            shape.pop();
            shape.push(part.kind.out() as i32);
            shapes.push(shape);
        }
        shapes.extend(parts.iter().filter_map(|part| part.side).map(|side| vec![rows, side.rank as i32]));
        let outputs: Vec<(&[i32], Dtype)> = shapes.iter().map(|shape| (&shape[..], Dtype::Float32)).collect();
        let count = parts.len();
        let mut all = apply(Linears { parts, precision: precision() }, &inputs, &outputs)?;
        all.truncate(count);
        Ok(all)
    }
}

impl Op for Linears {
    fn name(&self) -> &'static CStr {
        c"linears"
    }

    fn run(&self, inputs: &[Tensor], outputs: &mut [Tensor]) {
        let x = inputs[0].f32();
        let places = places(&self.parts);
        let (ys, zs) = outputs.split_at_mut(self.parts.len());
        let arranged = self.parts.iter().zip(&places).map(|(part, at)| match part.kind {
            Kind::Arranged(of) => Some(Panels::new(of, &inputs[at.weight..])),
            _ => None,
        });
        match arranged.collect::<Option<Vec<Panels>>>() {
            Some(ws) => {
                let ys = ys.iter_mut().map(Tensor::f32_mut).collect();
                panels::times_transpose(x, &ws, ys, self.precision);
            }
            None => {
                for ((part, at), y) in self.parts.iter().zip(&places).zip(ys.iter_mut()) {
                    let y = y.f32_mut();
                    part.kind.times_transpose(x, &inputs[at.weight..], y, self.precision, false);
                }
            }
        }
        let mut zs = zs.iter_mut();
        for ((part, at), y) in self.parts.iter().zip(&places).zip(ys) {
            let bias = at.bias.map(|i| inputs[i].f32());
            let residual = at.residual.map(|i| inputs[i].f32());
            let factor = at.factor.map(|i| inputs[i].f32());
            let (inputs_wide, out) = (part.kind.inputs(), part.kind.out());
            let side = part.side;
            let z = match side.and_then(|_| zs.next()) {
                Some(z) => z.f32_mut(),
                None if bias.is_none() && residual.is_none() => continue,
                None => &mut [],
            };
            let width = side.map_or(0, |side| side.rank.next_multiple_of(WIDTH));
            let mut padded = scratch(&SIDE, inputs_wide * width);
            if let Some(side) = side {
                pad_columns(inputs[at.a].f32(), side.rank, width, &mut padded);
            }
            let own = if side.is_some_and(|side| side.own_input) { inputs[at.input].f32() } else { x };
            let b = if side.is_some() { inputs[at.b].f32() } else { &[] };
            let y = y.f32_mut();
            let rows = y.len() / out.max(1);
            let (y, z) = (Shares::new(y), Shares::new(z));
            let rank = side.map_or(0, |side| side.rank);
            by_blocks(rows, (inputs_wide + out) * rank.max(1), |first, count| {
                // SAFETY: each block of rows belongs to one task.
                let (y, z) =
                    unsafe { (y.part(first * out, count * out), z.part(first * rank, count * rank)) };
                dispatch(Forward {
                    x: &own[first * inputs_wide..(first + count) * inputs_wide],
                    a: &padded,
                    width,
                    side,
                    b,
                    factor,
                    bias,
                    residual: residual.map(|h| &h[first * out..(first + count) * out]),
                    y,
                    z,
                    count,
                });
            });
        }
    }

    fn gradients(&self, call: &Backward) -> Result<Vec<Array>> {
        let wants = |input: usize| call.wanted.contains(&input);
        if wants(0) {
            self.parts.iter().try_for_each(|part| part.kind.check_gradient())?;
        }
        let places = places(&self.parts);
        let wanted: Vec<Wanted> = self
            .parts
            .iter()
            .zip(&places)
            .map(|(part, at)| Wanted {
                low_rank: part.side.is_some() && (wants(at.a) || wants(at.b)),
                factor: at.factor.is_some_and(wants),
                input: part.side.is_some_and(|side| side.own_input) && wants(at.input),
            })
            .collect();
        // The inputs, then z of each side path, then each y that a factor's gradient needs, then the slopes.
        let count = self.parts.len();
        let mut inputs: Vec<&Array> = call.primals.iter().collect();
        inputs.extend(&call.outputs[count..]);
        let kept = wanted.iter().zip(&call.outputs).filter(|(wanted, _)| wanted.factor);
        inputs.extend(kept.map(|(_, y)| y));
        inputs.extend(&call.cotangents[..count]);
        let op =
            LinearsGradient { parts: self.parts.clone(), wanted, x: wants(0), precision: self.precision };
        let shapes = op.shapes(&call.primals, &places);
        let outputs: Vec<(&[i32], Dtype)> = shapes.iter().map(|shape| (&shape[..], Dtype::Float32)).collect();
        let made = apply(op, &inputs, &outputs)?;
        // x, then A, B, c and the own input of each part: all of them, empty where not wanted.
        let mut gradients = vec![made[0].clone(); call.primals.len()];
        for (i, at) in places.iter().enumerate() {
            if let Some(residual) = at.residual {
                gradients[residual] = call.cotangents[i].clone();
            }
            for (place, gradient) in
                [Some(at.a), Some(at.b), at.factor, Some(at.input)].into_iter().zip(&made[1 + 4 * i..])
            {
                if let Some(place) = place.filter(|&place| place > 0) {
                    gradients[place] = gradient.clone();
                }
            }
        }
        call.choose(&gradients)
    }
}

/// Calls `run` with the first row and the number of rows of blocks that cover `0..rows`.
fn by_blocks(rows: usize, cost: usize, run: impl Fn(usize, usize) + Sync) {
    share(rows * cost >= SMALL, rows.div_ceil(ROWS), |task| run(task * ROWS, ROWS.min(rows - task * ROWS)));
}

/// (rows, columns) as (rows, width), with zeros beyond.
fn pad_columns(from: &[f32], columns: usize, width: usize, to: &mut [f32]) {
    for (from, to) in from.chunks_exact(columns).zip(to.chunks_exact_mut(width)) {
        to[..columns].copy_from_slice(from);
        to[columns..].fill(0.0);
    }
}

/// (rows, columns) turned to (columns, width), with zeros beyond.
fn pad_turned(from: &[f32], columns: usize, width: usize, to: &mut [f32]) {
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
struct Slim<'a> {
    rows: usize,
    columns: usize,
    k: usize,
    a: &'a [f32],
    a_row: usize,
    a_k: usize,
    b: &'a [f32],
    b_k: usize,
    c_row: usize,
    add: bool,
}

impl Slim<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S, c: &mut [f32]) {
        assert!(self.rows == 0 || (self.rows - 1) * self.c_row + self.columns <= c.len());
        // SAFETY: C has all rows, by the assertion, and is borrowed.
        unsafe { self.run_at(s, c.as_mut_ptr()) };
    }

    /// # Safety
    /// All rows of C must be valid and nobody else's.
    #[inline(always)]
    unsafe fn run_at<S: Simd>(self, s: S, c: *mut f32) {
        let Slim { rows, columns, k, a, a_row, a_k, b, b_k, c_row, add } = self;
        if rows == 0 || columns == 0 || k == 0 {
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
                    8.. if S::LANES == 16 => 8,
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

/// The side path of a block of rows, then factor, bias and what the result is added to.
struct Forward<'a> {
    x: &'a [f32],
    /// A (in, width), padded.
    a: &'a [f32],
    width: usize,
    side: Option<Side>,
    /// B (rank, out).
    b: &'a [f32],
    factor: Option<&'a [f32]>,
    bias: Option<&'a [f32]>,
    residual: Option<&'a [f32]>,
    y: &'a mut [f32],
    z: &'a mut [f32],
    count: usize,
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Forward { x, a, width, side, b, factor, bias, residual, y, z, count } = self;
        let out = y.len() / count.max(1);
        if let Some(Side { rank, scale, .. }) = side {
            let inputs = x.len() / count.max(1);
            let mut wide = [0.0; ROWS * 128];
            // More columns than fit are taken in turn.
            for first in (0..width).step_by(128) {
                let columns = 128.min(width - first);
                let product = Slim {
                    rows: count,
                    columns,
                    k: inputs,
                    a: x,
                    a_row: inputs,
                    a_k: 1,
                    b: &a[first..],
                    b_k: width,
                    c_row: columns,
                    add: false,
                };
                product.run(s, &mut wide);
                let valid = columns.min(rank - first.min(rank));
                for (z, wide) in z.chunks_exact_mut(rank).zip(wide.chunks_exact(columns)) {
                    z[first..first + valid].copy_from_slice(&wide[..valid]);
                }
            }
            let mut scaled = [0.0; ROWS * 128];
            for first in (0..rank).step_by(128) {
                let columns = 128.min(rank - first);
                for (scaled, z) in scaled.chunks_exact_mut(columns).zip(z.chunks_exact(rank)) {
                    for (scaled, z) in scaled.iter_mut().zip(&z[first..]) {
                        *scaled = scale * z;
                    }
                }
                let product = Slim {
                    rows: count,
                    columns: out,
                    k: columns,
                    a: &scaled,
                    a_row: columns,
                    a_k: 1,
                    b: &b[first * out..],
                    b_k: out,
                    c_row: out,
                    add: true,
                };
                product.run(s, y);
            }
        }
        for y in y.chunks_exact_mut(out) {
            if let Some(factor) = factor {
                y.iter_mut().zip(factor).for_each(|(y, c)| *y *= c);
            }
            if let Some(bias) = bias {
                y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
        }
        if let Some(residual) = residual {
            y.iter_mut().zip(residual).for_each(|(y, h)| *y += h);
        }
    }
}

/// Which gradients of a part are wanted.
#[derive(Clone, Copy)]
struct Wanted {
    low_rank: bool,
    factor: bool,
    input: bool,
}

/// With g = c dy: dx = sum over parts of g W + s (g B^T) A^T, dA = s x^T (g B^T), dB = s z^T g, dc = sum over rows of
/// dy (y - h - b) / c, dh = dy. The outputs are dx and, of each part, dA, dB, dc and the gradient of its own input; empty if not wanted.
struct LinearsGradient {
    parts: Vec<Part>,
    wanted: Vec<Wanted>,
    x: bool,
    precision: Precision,
}

impl LinearsGradient {
    fn shapes(&self, primals: &[Array], places: &[Places]) -> Vec<Vec<i32>> {
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
        let x = inputs[0].f32();
        let places = places(&self.parts);
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
                let y = inputs[next_y].f32();
                next_y += 1;
                factor_gradient(dy, y, (bias, residual), factor.unwrap_or_default(), dc.f32_mut());
            }
            let mut scaled = scratch(&SIDE, if factor.is_some() { dy.len() } else { 0 });
            let g = match factor {
                Some(factor) => {
                    let to = Shares::new(&mut scaled);
                    by_blocks(rows, out, |first, count| {
                        // SAFETY: each block of rows belongs to one task.
                        let to = unsafe { to.part(first * out, count * out) };
                        for (to, dy) in to.chunks_exact_mut(out).zip(dy[first * out..].chunks_exact(out)) {
                            to.iter_mut().zip(dy).zip(factor).for_each(|((to, dy), c)| *to = dy * c);
                        }
                    });
                    &*scaled
                }
                None => dy,
            };
            if self.x {
                part.kind.times(g, &inputs[at.weight..], dx, self.precision, i > 0);
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
                SideGradient { rows, width, out, side, x: own, z, g },
                [&inputs[at.a], &inputs[at.b]],
                to,
                low_rank,
            );
        }
    }
}

/// dc_o = sum over rows of dy (y - h - b) / c.
fn factor_gradient(
    dy: &[f32],
    y: &[f32],
    (bias, residual): (Option<&[f32]>, Option<&[f32]>),
    factor: &[f32],
    dc: &mut [f32],
) {
    const COLUMNS: usize = 256;
    let out = factor.len();
    let rows = dy.len() / out.max(1);
    let to = Shares::new(dc);
    share(dy.len() >= SMALL, out.div_ceil(COLUMNS), |task| {
        let (first, count) = (task * COLUMNS, COLUMNS.min(out - task * COLUMNS));
        // SAFETY: each block of columns belongs to one task.
        let to = unsafe { to.part(first, count) };
        to.fill(0.0);
        let mut before = [0.0; COLUMNS];
        for row in 0..rows {
            let at = row * out + first;
            let before = &mut before[..count];
            before.copy_from_slice(&y[at..at + count]);
            if let Some(h) = residual {
                before.iter_mut().zip(&h[at..]).for_each(|(y, h)| *y -= h);
            }
            if let Some(bias) = bias {
                before.iter_mut().zip(&bias[first..]).for_each(|(y, b)| *y -= b);
            }
            to.iter_mut().zip(dy[at..].iter().zip(&*before)).for_each(|(to, (dy, y))| *to += dy * y);
        }
        to.iter_mut().zip(&factor[first..]).for_each(|(to, c)| *to /= c);
    });
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
    g: &'a [f32],
}

/// dz = s g B^T; `to` += dz A^T unless it is empty; dA = x^T dz and dB = s z^T g.
fn side_gradient(
    of: SideGradient,
    [a, b]: [&Tensor; 2],
    to: &mut [f32],
    low_rank: Option<(&mut [f32], &mut [f32])>,
) {
    let SideGradient { rows, width, out, side, x, z, g } = of;
    let rank = side.rank;
    let wide = rank.next_multiple_of(WIDTH);
    let sizes = [out * wide, rank * width, rows * wide, rows * rank];
    let mut scratch = scratch(&super::scratch::LEFT, sizes.iter().sum());
    let (b_turned, rest) = scratch.split_at_mut(sizes[0]);
    let (a_turned, rest) = rest.split_at_mut(sizes[1]);
    let (dz, scaled) = rest.split_at_mut(sizes[2]);
    pad_turned(b.f32(), out, wide, b_turned);
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
            let g = &g[first * out..(first + count) * out];
            dispatch(SideRows { g, b_turned, a_turned, scale: side.scale, rank, wide, width, dz, to, count });
        });
    }
    let Some((da, db)) = low_rank else { return };
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
    let columns = out.div_ceil(2 * pool::threads()).next_multiple_of(WIDTH);
    let db = Shares::new(db);
    share(rows * out * rank >= SMALL, out.div_ceil(columns), |task| {
        let (first, count) = (task * columns, columns.min(out - task * columns));
        dispatch(OuterProduct { scaled, rank, g, out, rows, first, count, to: &db });
    });
}

/// Inputs of dA that a task takes at a time.
const BLOCK: usize = 64;

struct SideRows<'a> {
    g: &'a [f32],
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
        let SideRows { g, b_turned, a_turned, scale, rank, wide, width, dz, to, count } = self;
        let out = g.len() / count.max(1);
        let product = Slim {
            rows: count,
            columns: wide,
            k: out,
            a: g,
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

/// Columns `first`..`first + count` of (s z)^T g.
struct OuterProduct<'a> {
    scaled: &'a [f32],
    rank: usize,
    g: &'a [f32],
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
        let OuterProduct { scaled, rank, g, out, rows, first, count, to } = self;
        let product = Slim {
            rows: rank,
            columns: count,
            k: rows,
            a: scaled,
            a_row: 1,
            a_k: rank,
            b: &g[first..],
            b_k: out,
            c_row: out,
            add: false,
        };
        // SAFETY: dB is (rank, out), and each block of its columns belongs to one task.
        unsafe { product.run_at(s, to.pointer().add(first)) };
    }
}
