//! Linears with arranged weights and all that stands around them in a decoder, as one operation: what x comes out of (a
//! norm, a gate), the products, and what is added to them.
//!
//! A decoded token is some hundred operations of a few microseconds each, so each one less counts: first every row of x is
//! made and rounded and z = s x A computed, then every panel of every W multiplies it and finishes its sixteen outputs,
//! y = c (W x + z B) + b + h, while they are in registers. There is no gradient: arranged weights have none.

use std::ffi::CStr;

use super::linears::{Part, places};
use super::panels::{Job, Panels, by_parts, rounded};
use super::primitive::{Op, Tensor, apply};
use super::scratch::{SIDE, scratch};
use super::source::Source;
use super::vnni::{self, After};
use super::weights::Kind;
use crate::linears::{Input, LinearRef};
use crate::pool::Shares;
use crate::{Array, Dtype, Precision, Result, WeightRef, precision};

/// Rows that share the reading of A.
const TOGETHER: usize = 8;

pub(crate) struct Answers {
    source: Source,
    parts: Vec<Part>,
}

impl Answers {
    /// Whether this operation is the one for such linears.
    pub(crate) fn fits(linears: &[LinearRef]) -> bool {
        let arranged = |linear: &LinearRef| {
            matches!(linear.weight, WeightRef::Arranged(_))
                && linear.low_rank.is_none_or(|u| u.input.is_none())
        };
        precision() == Precision::Int16 && vnni::available() && linears.iter().all(arranged)
    }

    pub(crate) fn apply(input: Input, linears: &[LinearRef]) -> Result<Vec<Array>> {
        let (source, mut inputs) = Source::of(input);
        let parts = linears.iter().map(|linear| Part::of(linear, &mut inputs)).collect::<Result<Vec<_>>>()?;
        let mut shape = inputs[0].shape().to_vec();
        let mut shapes: Vec<Vec<i32>> = Vec::with_capacity(parts.len());
        for part in &parts {
            if let Some(last) = shape.last_mut() {
                *last = part.kind.out() as i32;
            }
            shapes.push(shape.clone());
        }
        let outputs: Vec<(&[i32], Dtype)> = shapes.iter().map(|shape| (&shape[..], Dtype::Float32)).collect();
        apply(Answers { source, parts }, &inputs, &outputs)
    }
}

impl Op for Answers {
    fn name(&self) -> &'static CStr {
        c"linears of arranged weights"
    }

    fn run(&self, inputs: &[Tensor], outputs: &mut [Tensor]) {
        let places = places(&self.parts, self.source.arrays());
        let width = self.parts.first().map_or(1, |part| part.kind.inputs());
        let m = inputs[0].f32().len() / width.max(1);
        let made = self.source.room(m * width);
        let ranks = self.parts.iter().map(|part| part.side.map_or(0, |side| side.rank)).sum::<usize>();
        let mut scratch = scratch(&SIDE, made + m * ranks);
        let (x, mut rest) = scratch.split_at_mut(made);
        let x = self.source.make(inputs, width, x);
        let mut jobs = Vec::with_capacity(self.parts.len());
        for ((part, at), y) in self.parts.iter().zip(&places).zip(outputs) {
            let Kind::Arranged(of) = part.kind else { unreachable!("only arranged weights come here") };
            let vector = |place: Option<usize>| place.map(|place| inputs[place].f32());
            let mut after = After {
                side: None,
                factor: vector(at.factor),
                bias: vector(at.bias),
                residual: vector(at.residual),
            };
            if let Some(side) = part.side {
                let (z, others) = rest.split_at_mut(m * side.rank);
                rest = others;
                let a = inputs[at.a].f32();
                {
                    let z = Shares::new(z);
                    let blocks = m.div_ceil(TOGETHER);
                    by_parts(blocks, m * width * side.rank >= 1 << 16, |blocks| {
                        for row in blocks.map(|block| block * TOGETHER) {
                            let rows = TOGETHER.min(m - row);
                            // SAFETY: each block of rows belongs to one task; the processor has the instructions.
                            unsafe {
                                let z = z.part(row * side.rank, rows * side.rank);
                                vnni::low_rank(&x[row * width..][..rows * width], a, side.scale, rows, z);
                            }
                        }
                    });
                }
                after.side = Some((z, inputs[at.b].f32(), side.rank));
            }
            let w = Panels::new(of, &inputs[at.weight..]);
            jobs.push(Job { w, y: Shares::new(y.f32_mut()), after });
        }
        rounded(x, &jobs);
    }
}
