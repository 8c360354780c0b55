//! The operations of one row or one element at a time: norm, gated activation, rotation.

use std::ffi::CStr;
use std::ops::Range;
use std::sync::Arc;

use super::gemm::share;
use super::level::dispatch;
use super::primitive::{Backward, Op, Tensor, apply, apply_one};
use super::simd::{Kernel, Simd, exp, vectors};
use crate::pool::{self, Shares};
use crate::{Array, Dtype, Result};

/// Below so many elements another thread is not worth waking.
const SMALL: usize = 1 << 14;

/// Calls `run` with ranges that cover `0..rows`, on all threads if the rows of `width` elements are worth it.
fn by_rows(rows: usize, width: usize, run: impl Fn(Range<usize>) + Sync) {
    let worth_it = rows * width >= SMALL;
    let each = if worth_it { rows.div_ceil(2 * pool::threads()).max(1) } else { rows.max(1) };
    share(worth_it, rows.div_ceil(each), |task| run(task * each..((task + 1) * each).min(rows)));
}

/// A row of a matrix with rows of `width`.
fn row(x: &[f32], width: usize, i: usize) -> &[f32] {
    &x[i * width..(i + 1) * width]
}

/// y = x / sqrt(mean(x^2) + eps) * w over each stretch of x that is as long as w.
pub(crate) struct RmsNorm {
    pub(crate) eps: f32,
}

impl RmsNorm {
    pub(crate) fn apply(self, x: &Array, weight: &Array) -> Result<Array> {
        apply_one(self, &[x, weight], x.shape(), Dtype::Float32)
    }
}

impl Op for RmsNorm {
    fn name(&self) -> &'static CStr {
        c"rms norm"
    }

    fn run(&self, inputs: &[Tensor], outputs: &mut [Tensor]) {
        let (x, weight) = (inputs[0].f32(), inputs[1].f32());
        let width = weight.len();
        let y = Shares::new(outputs[0].f32_mut());
        by_rows(x.len() / width.max(1), width, |rows| {
            dispatch(NormRows { x, added: None, weight, eps: self.eps, y: &y, rows });
        });
    }

    fn gradients(&self, call: &Backward) -> Result<Vec<Array>> {
        let (x, weight) = (&call.primals[0], &call.primals[1]);
        let op = RmsNormGradient { eps: self.eps, weight: call.wanted.contains(&1) };
        call.choose(&op.apply(x, weight, &[&call.cotangents[0]])?)
    }
}

/// The sum h = x + r and its norm.
pub(crate) struct AddRmsNorm {
    pub(crate) eps: f32,
}

impl AddRmsNorm {
    pub(crate) fn apply(self, x: &Array, r: &Array, weight: &Array) -> Result<(Array, Array)> {
        let shape = (x.shape(), Dtype::Float32);
        let mut both = apply(self, &[x, r, weight], &[shape, shape])?;
        let normed = both.swap_remove(1);
        Ok((both.swap_remove(0), normed))
    }
}

impl Op for AddRmsNorm {
    fn name(&self) -> &'static CStr {
        c"sum and rms norm"
    }

    fn run(&self, inputs: &[Tensor], outputs: &mut [Tensor]) {
        let [x, r, weight] = [0, 1, 2].map(|i| inputs[i].f32());
        let width = weight.len();
        let [h, y] = outputs else { return };
        let (h, y) = (Shares::new(h.f32_mut()), Shares::new(y.f32_mut()));
        by_rows(x.len() / width.max(1), width, |rows| {
            dispatch(NormRows { x, added: Some((r, &h)), weight, eps: self.eps, y: &y, rows });
        });
    }

    fn gradients(&self, call: &Backward) -> Result<Vec<Array>> {
        let op = RmsNormGradient { eps: self.eps, weight: call.wanted.contains(&2) };
        let through =
            op.apply(&call.outputs[0], &call.primals[2], &[&call.cotangents[1], &call.cotangents[0]])?;
        call.choose(&[through[0].clone(), through[0].clone(), through[1].clone()])
    }
}

/// 1 / sqrt(mean(x^2) + eps)
#[inline(always)]
fn inverse_rms<S: Simd>(s: S, x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(s, x, x) / x.len() as f32 + eps).sqrt()
}

/// sum_i a_i b_i
#[inline(always)]
fn dot<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f32 {
    let length = a.len().min(b.len());
    let mut sums = s.splat(0.0);
    for i in vectors::<S>(length) {
        // SAFETY: whole vectors.
        unsafe { sums = s.fma(s.load(a.as_ptr().add(i)), s.load(b.as_ptr().add(i)), sums) };
    }
    let whole = length / S::LANES * S::LANES;
    s.sum(sums) + a[whole..].iter().zip(&b[whole..]).map(|(a, b)| a * b).sum::<f32>()
}

struct NormRows<'a> {
    x: &'a [f32],
    /// What is added to x first, and where the sum goes.
    added: Option<(&'a [f32], &'a Shares<'a, f32>)>,
    weight: &'a [f32],
    eps: f32,
    y: &'a Shares<'a, f32>,
    rows: Range<usize>,
}

impl Kernel for NormRows<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let width = self.weight.len();
        for i in self.rows {
            let mut x = row(self.x, width, i);
            if let Some((r, sum)) = self.added {
                // SAFETY: each row belongs to one task, here and below.
                let sum = unsafe { sum.part(i * width, width) };
                for ((sum, x), r) in sum.iter_mut().zip(x).zip(row(r, width, i)) {
                    *sum = x + r;
                }
                x = sum;
            }
            let scale = inverse_rms(s, x, self.eps);
            // SAFETY: as above.
            let y = unsafe { self.y.part(i * width, width) };
            for ((y, x), w) in y.iter_mut().zip(x).zip(self.weight) {
                *y = x * scale * w;
            }
        }
    }
}

/// With r = 1 / sqrt(mean(x^2) + eps) and g = w dy: dx = r (g - x r^2 mean(g x)), dw = sum over rows of dy x r. What comes
/// to x by another way may follow dy, and is added to dx.
struct RmsNormGradient {
    eps: f32,
    weight: bool,
}

impl RmsNormGradient {
    /// dx and dw.
    fn apply(self, x: &Array, weight: &Array, slopes: &[&Array]) -> Result<Vec<Array>> {
        let shape = if self.weight { weight.shape() } else { &[0] };
        let inputs: Vec<&Array> = [x, weight].into_iter().chain(slopes.iter().copied()).collect();
        apply(self, &inputs, &[(x.shape(), Dtype::Float32), (shape, Dtype::Float32)])
    }
}

impl Op for RmsNormGradient {
    fn name(&self) -> &'static CStr {
        c"gradient of rms norm"
    }

    fn run(&self, inputs: &[Tensor], outputs: &mut [Tensor]) {
        let [x, weight, dy] = [0, 1, 2].map(|i| inputs[i].f32());
        let other = inputs.get(3).map(Tensor::f32);
        let width = weight.len();
        let rows = x.len() / width.max(1);
        let [dx, dw] = outputs else { return };
        let dx = Shares::new(dx.f32_mut());
        by_rows(rows, width, |rows| {
            dispatch(NormGradientRows { x, weight, dy, other, eps: self.eps, dx: &dx, rows });
        });
        if self.weight {
            // In the order of the rows, whatever the number of threads.
            let dw = dw.f32_mut();
            dw.fill(0.0);
            for i in 0..rows {
                dispatch(WeightGradientRow { x: row(x, width, i), dy: row(dy, width, i), eps: self.eps, dw });
            }
        }
    }
}

struct NormGradientRows<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    dy: &'a [f32],
    other: Option<&'a [f32]>,
    eps: f32,
    dx: &'a Shares<'a, f32>,
    rows: Range<usize>,
}

impl Kernel for NormGradientRows<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let width = self.weight.len();
        for i in self.rows {
            let (x, dy) = (row(self.x, width, i), row(self.dy, width, i));
            // SAFETY: each row belongs to one task.
            let dx = unsafe { self.dx.part(i * width, width) };
            let r = inverse_rms(s, x, self.eps);
            for ((dx, dy), w) in dx.iter_mut().zip(dy).zip(self.weight) {
                *dx = dy * w;
            }
            let along = dot(s, dx, x) / width as f32 * r * r;
            for (dx, x) in dx.iter_mut().zip(x) {
                *dx = r * (*dx - x * along);
            }
            if let Some(other) = self.other {
                for (dx, other) in dx.iter_mut().zip(row(other, width, i)) {
                    *dx += other;
                }
            }
        }
    }
}

struct WeightGradientRow<'a> {
    x: &'a [f32],
    dy: &'a [f32],
    eps: f32,
    dw: &'a mut [f32],
}

impl Kernel for WeightGradientRow<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let r = inverse_rms(s, self.x, self.eps);
        for ((dw, x), dy) in self.dw.iter_mut().zip(self.x).zip(self.dy) {
            *dw += dy * (x * r);
        }
    }
}

/// y = silu(gate) up.
pub(crate) struct Swiglu;

impl Swiglu {
    pub(crate) fn apply(gate: &Array, up: &Array) -> Result<Array> {
        apply_one(Swiglu, &[gate, up], gate.shape(), Dtype::Float32)
    }
}

impl Op for Swiglu {
    fn name(&self) -> &'static CStr {
        c"swiglu"
    }

    fn run(&self, inputs: &[Tensor], outputs: &mut [Tensor]) {
        let (gate, up) = (inputs[0].f32(), inputs[1].f32());
        let y = Shares::new(outputs[0].f32_mut());
        by_rows(gate.len().div_ceil(CHUNK), CHUNK, |chunks| {
            let range = chunks.start * CHUNK..(chunks.end * CHUNK).min(gate.len());
            // SAFETY: each chunk belongs to one task.
            let y = unsafe { y.part(range.start, range.len()) };
            dispatch(Gate { gate: &gate[range.clone()], up: &up[range], y });
        });
    }

    fn gradients(&self, call: &Backward) -> Result<Vec<Array>> {
        let (gate, up) = (&call.primals[0], &call.primals[1]);
        let shape = (gate.shape(), Dtype::Float32);
        call.choose(&apply(SwigluGradient, &[gate, up, &call.cotangents[0]], &[shape, shape])?)
    }
}

/// Elements that a task takes at a time.
const CHUNK: usize = 1024;

struct Gate<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    y: &'a mut [f32],
}

impl Kernel for Gate<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        gate(s, self.gate, self.up, self.y);
        let whole = self.gate.len() / S::LANES * S::LANES;
        if whole < self.gate.len() {
            let mut y = [0.0; LINE];
            gate(s, &line(&self.gate[whole..]), &line(&self.up[whole..]), &mut y);
            let rest = &mut self.y[whole..];
            rest.copy_from_slice(&y[..rest.len()]);
        }
    }
}

/// silu(gate) up for whole vectors of slices of one length.
#[inline(always)]
fn gate<S: Simd>(s: S, gate: &[f32], up: &[f32], y: &mut [f32]) {
    assert!(gate.len() == up.len() && gate.len() == y.len());
    for i in vectors::<S>(gate.len()) {
        // SAFETY: whole vectors of slices of one length.
        unsafe {
            let (silu, _) = silu(s, s.load(gate.as_ptr().add(i)));
            s.store(y.as_mut_ptr().add(i), s.mul(silu, s.load(up.as_ptr().add(i))));
        }
    }
}

/// Floats that are whole vectors at every level.
const LINE: usize = 16;

/// Less than a line, with zeros.
fn line(x: &[f32]) -> [f32; LINE] {
    let mut line = [0.0; LINE];
    line[..x.len()].copy_from_slice(x);
    line
}

/// silu(z) = z sigmoid(z) and sigmoid(z).
#[inline(always)]
fn silu<S: Simd>(s: S, z: S::V) -> (S::V, S::V) {
    let one = s.splat(1.0);
    // Further down z sigmoid(z) is zero to every digit, but the exponential would overflow. NaN passes.
    let z = s.max(s.splat(-88.0), z);
    let sigmoid = s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), z))));
    (s.mul(z, sigmoid), sigmoid)
}

/// dgate = dy up sigmoid(z) (1 + z (1 - sigmoid(z))), dup = dy silu(z).
struct SwigluGradient;

impl Op for SwigluGradient {
    fn name(&self) -> &'static CStr {
        c"gradient of swiglu"
    }

    fn run(&self, inputs: &[Tensor], outputs: &mut [Tensor]) {
        let (gate, up, dy) = (inputs[0].f32(), inputs[1].f32(), inputs[2].f32());
        let [dgate, dup] = outputs else { return };
        let (dgate, dup) = (Shares::new(dgate.f32_mut()), Shares::new(dup.f32_mut()));
        by_rows(gate.len().div_ceil(CHUNK), CHUNK, |chunks| {
            let range = chunks.start * CHUNK..(chunks.end * CHUNK).min(gate.len());
            // SAFETY: each chunk belongs to one task.
            let (dgate, dup) =
                unsafe { (dgate.part(range.start, range.len()), dup.part(range.start, range.len())) };
            let (gate, up, dy) = (&gate[range.clone()], &up[range.clone()], &dy[range]);
            dispatch(GateGradient { gate, up, dy, dgate, dup });
        });
    }
}

struct GateGradient<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    dy: &'a [f32],
    dgate: &'a mut [f32],
    dup: &'a mut [f32],
}

impl Kernel for GateGradient<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        gate_gradient(s, [self.gate, self.up, self.dy], [self.dgate, self.dup]);
        let whole = self.gate.len() / S::LANES * S::LANES;
        if whole < self.gate.len() {
            let (mut dgate, mut dup) = ([0.0; LINE], [0.0; LINE]);
            let lines = [self.gate, self.up, self.dy].map(|x| line(&x[whole..]));
            gate_gradient(s, [&lines[0], &lines[1], &lines[2]], [&mut dgate, &mut dup]);
            for (rest, line) in [(self.dgate, dgate), (self.dup, dup)] {
                let rest = &mut rest[whole..];
                rest.copy_from_slice(&line[..rest.len()]);
            }
        }
    }
}

/// dgate and dup for whole vectors of slices of one length.
#[inline(always)]
fn gate_gradient<S: Simd>(s: S, [gate, up, dy]: [&[f32]; 3], [dgate, dup]: [&mut [f32]; 2]) {
    assert!([up.len(), dy.len(), dgate.len(), dup.len()].iter().all(|&n| n == gate.len()));
    let one = s.splat(1.0);
    for i in vectors::<S>(gate.len()) {
        // SAFETY: whole vectors of slices of one length.
        unsafe {
            let z = s.load(gate.as_ptr().add(i));
            let (up, dy) = (s.load(up.as_ptr().add(i)), s.load(dy.as_ptr().add(i)));
            let (silu, sigmoid) = silu(s, z);
            let slope = s.mul(sigmoid, s.fma(z, s.sub(one, sigmoid), one));
            s.store(dgate.as_mut_ptr().add(i), s.mul(s.mul(dy, up), slope));
            s.store(dup.as_mut_ptr().add(i), s.mul(dy, silu));
        }
    }
}

/// The rotation of pairs by the angles in `table`, or back, of any number of arrays (N, H D).
#[derive(Clone)]
pub(crate) struct Rotation {
    /// (position, dims / 2): cosine and sine.
    pub(crate) table: Arc<Vec<(f32, f32)>>,
    /// Position of each token.
    pub(crate) positions: Arc<Vec<u32>>,
    pub(crate) head_dim: usize,
    pub(crate) dims: usize,
    pub(crate) traditional: bool,
    pub(crate) back: bool,
}

impl Rotation {
    pub(crate) fn apply(self, xs: &[&Array]) -> Result<Vec<Array>> {
        let shapes: Vec<(&[i32], Dtype)> = xs.iter().map(|x| (x.shape(), Dtype::Float32)).collect();
        apply(self, xs, &shapes)
    }
}

impl Op for Rotation {
    fn name(&self) -> &'static CStr {
        c"rope"
    }

    fn run(&self, inputs: &[Tensor], outputs: &mut [Tensor]) {
        for (x, y) in inputs.iter().zip(outputs) {
            let in_place = x.is(y);
            let x = if in_place { &[] } else { x.f32() };
            let y = y.f32_mut();
            let width = y.len() / self.positions.len().max(1);
            let y = Shares::new(y);
            by_rows(self.positions.len(), width, |tokens| {
                for token in tokens {
                    // SAFETY: each token belongs to one task.
                    let y = unsafe { y.part(token * width, width) };
                    if !in_place {
                        y.copy_from_slice(row(x, width, token));
                    }
                    let half = self.dims / 2;
                    let angles = &self.table[self.positions[token] as usize * half..][..half];
                    for head in y.chunks_exact_mut(self.head_dim) {
                        self.rotate(&mut head[..self.dims], angles);
                    }
                }
            });
        }
    }

    fn gradients(&self, call: &Backward) -> Result<Vec<Array>> {
        let back = Rotation { back: !self.back, ..self.clone() };
        call.choose(&back.apply(&call.cotangents.iter().collect::<Vec<_>>())?)
    }

    fn takes_over(&self, output: usize) -> Option<usize> {
        Some(output)
    }
}

impl Rotation {
    fn rotate(&self, head: &mut [f32], angles: &[(f32, f32)]) {
        let turn = |a: &mut f32, b: &mut f32, &(cos, sin): &(f32, f32)| {
            let sin = if self.back { -sin } else { sin };
            (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
        };
        if self.traditional {
            for ([a, b], angle) in head.as_chunks_mut::<2>().0.iter_mut().zip(angles) {
                turn(a, b, angle);
            }
        } else {
            let (first, second) = head.split_at_mut(angles.len());
            for ((a, b), angle) in first.iter_mut().zip(second).zip(angles) {
                turn(a, b, angle);
            }
        }
    }
}
