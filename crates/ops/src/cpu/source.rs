//! What the x of linears comes out of: x itself, a norm or a gate.
//!
//! An operation that takes it in makes x in memory of its own, once more for its gradient: that costs less than keeping
//! x from the one to the other.

use std::ops::Range;

use super::level::dispatch;
use super::norm::{Gate, NormRows, RmsNormGradient, SwigluGradient};
use super::panels::by_parts;
use super::primitive::{Tensor, apply};
use crate::linears::Input;
use crate::pool::Shares;
use crate::{Array, Dtype, Result};

/// The way from an operation's first inputs to x (m, in).
#[derive(Clone, Copy)]
pub(super) enum Source {
    Plain,
    Norm { eps: f32 },
    Swiglu,
}

impl Source {
    /// The way, and the arrays that it begins with.
    pub(super) fn of(input: Input<'_>) -> (Source, Vec<&Array>) {
        match input {
            Input::Plain(x) => (Source::Plain, vec![x]),
            Input::Norm { x, weight, eps } => (Source::Norm { eps }, vec![x, weight]),
            Input::Swiglu { gate, up } => (Source::Swiglu, vec![gate, up]),
        }
    }

    /// How many arrays it begins with.
    pub(super) fn arrays(self) -> usize {
        if matches!(self, Source::Plain) { 1 } else { 2 }
    }

    /// The elements of memory that [`Source::make`] needs for x of `len`.
    pub(super) fn room(self, len: usize) -> usize {
        if matches!(self, Source::Plain) { 0 } else { len }
    }

    /// x (m, width), in `room` unless it is there.
    pub(super) fn make<'a>(self, inputs: &'a [Tensor], width: usize, room: &'a mut [f32]) -> &'a [f32] {
        let first = inputs[0].f32();
        if let Source::Plain = self {
            return first;
        }
        let second = inputs[1].f32();
        let m = first.len() / width.max(1);
        {
            let to = Shares::new(room);
            by_parts(m, m * width >= 1 << 13, |rows| self.rows(first, second, width, rows, &to));
        }
        room
    }

    fn rows(self, a: &[f32], b: &[f32], width: usize, rows: Range<usize>, to: &Shares<f32>) {
        match self {
            Source::Plain => {}
            Source::Norm { eps } => dispatch(NormRows { x: a, weight: b, eps, y: to, rows }),
            Source::Swiglu => {
                let range = rows.start * width..rows.end * width;
                // SAFETY: each row belongs to one task.
                let y = unsafe { to.part(range.start, range.len()) };
                dispatch(Gate { gate: &a[range.clone()], up: &b[range], y });
            }
        }
    }

    /// The gradients of the arrays it begins with, from that of x; `weight` says whether a norm's is wanted.
    pub(super) fn gradients(self, from: &[Array], dx: &Array, weight: bool) -> Result<Vec<Array>> {
        match (self, from) {
            (Source::Norm { eps }, [x, w, ..]) => {
                let dw = if weight { w.shape() } else { &[0] };
                let shapes = [(x.shape(), Dtype::Float32), (dw, Dtype::Float32)];
                apply(RmsNormGradient { eps, weight }, &[x, w, dx], &shapes)
            }
            (Source::Swiglu, [gate, up, ..]) => {
                let shape = (gate.shape(), Dtype::Float32);
                apply(SwigluGradient, &[gate, up, dx], &[shape, shape])
            }
            _ => Ok(vec![dx.clone()]),
        }
    }
}
