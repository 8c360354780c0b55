//! The operations of one row or one element at a time: norm and gated activation.

use std::ffi::CStr;
use std::ops::Range;

use super::gemm::share;
use super::level::dispatch;
use super::primitive::{Backward, Op, Tensor, apply_one};
use super::simd::{Kernel, Simd, exp, vectors};
use super::source::Source;
use crate::pool::{self, Shares};
use crate::{Array, Dtype, Result};

/// Below so many elements another thread is not worth waking.
const SMALL: usize = 1 << 14;

/// Calls `run` with ranges that cover `0..rows`, on all threads if the rows of `width` elements are worth it.
pub(super) fn by_rows(rows: usize, width: usize, run: impl Fn(Range<usize>) + Sync) {
    let worth_it = rows * width >= SMALL;
    let each = if worth_it { rows.div_ceil(2 * pool::threads()).max(1) } else { rows.max(1) };
    share(worth_it, rows.div_ceil(each), |task| run(task * each..((task + 1) * each).min(rows)));
}

/// A row of a matrix with rows of `width`.
pub(super) fn row(x: &[f32], width: usize, i: usize) -> &[f32] {
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
            dispatch(NormRows { x, weight, eps: self.eps, y: &y, rows });
        });
    }

    fn gradients(&self, call: &Backward) -> Result<Vec<Array>> {
        let of = Source::Norm { eps: self.eps };
        call.choose(&of.gradients(&call.primals, &call.cotangents[0], call.wanted.contains(&1))?)
    }
}

/// 1 / sqrt(mean(x^2) + eps)
#[inline(always)]
fn inverse_rms<S: Simd>(s: S, x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(s, x, x) / x.len() as f32 + eps).sqrt()
}

/// sum_i a_i b_i
#[inline(always)]
pub(super) fn dot<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f32 {
    let length = a.len().min(b.len());
    let mut sums = s.splat(0.0);
    for i in vectors::<S>(length) {
        // SAFETY: whole vectors.
        unsafe { sums = s.fma(s.load(a.as_ptr().add(i)), s.load(b.as_ptr().add(i)), sums) };
    }
    let whole = length / S::LANES * S::LANES;
    s.sum(sums) + a[whole..].iter().zip(&b[whole..]).map(|(a, b)| a * b).sum::<f32>()
}

/// Some rows of the norm.
pub(super) struct NormRows<'a> {
    pub(super) x: &'a [f32],
    pub(super) weight: &'a [f32],
    pub(super) eps: f32,
    pub(super) y: &'a Shares<'a, f32>,
    pub(super) rows: Range<usize>,
}

impl Kernel for NormRows<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let width = self.weight.len();
        for i in self.rows {
            let x = row(self.x, width, i);
            let scale = inverse_rms(s, x, self.eps);
            // SAFETY: each row belongs to one task.
            let y = unsafe { self.y.part(i * width, width) };
            for ((y, x), w) in y.iter_mut().zip(x).zip(self.weight) {
                *y = x * scale * w;
            }
        }
    }
}

/// With r = 1 / sqrt(mean(x^2) + eps) and g = w dy: dx = r (g - x r^2 mean(g x)), dw = sum over rows of dy x r.
pub(super) struct RmsNormGradient {
    pub(super) eps: f32,
    pub(super) weight: bool,
}

impl Op for RmsNormGradient {
    fn name(&self) -> &'static CStr {
        c"gradient of rms norm"
    }

    fn run(&self, inputs: &[Tensor], outputs: &mut [Tensor]) {
        let [x, weight, dy] = [0, 1, 2].map(|i| inputs[i].f32());
        let width = weight.len();
        let rows = x.len() / width.max(1);
        let [dx, dw] = outputs else { return };
        let dx = Shares::new(dx.f32_mut());
        by_rows(rows, width, |rows| {
            dispatch(NormGradientRows { x, weight, dy, eps: self.eps, dx: &dx, rows });
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
        call.choose(&Source::Swiglu.gradients(&call.primals, &call.cotangents[0], false)?)
    }
}

/// Elements that a task takes at a time.
const CHUNK: usize = 1024;

/// silu(gate) up of slices of one length.
pub(super) struct Gate<'a> {
    pub(super) gate: &'a [f32],
    pub(super) up: &'a [f32],
    pub(super) y: &'a mut [f32],
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
pub(super) struct SwigluGradient;

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
