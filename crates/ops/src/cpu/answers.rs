//! Linears with arranged weights and all that stands around them in a decoder, as one operation: what x comes out of (a
//! norm, a gate), the products, and what is added to them.
//!
//! A decoded token is some hundred operations of a few microseconds each, so each one less counts: first every row of x is
//! made and rounded; then the threads compute z = s x A, a few rows each, and go on with panels of every W, which multiply x
//! and finish their sixteen outputs, y = c (W x + z B) + b + h, while they are in registers. Rows come in groups, each with
//! updates of its own, so that one reading of W serves all of them. There is no gradient: arranged weights have none.

use std::ffi::CStr;
use std::ops::Range;

use super::panels::{Arrangement, Panels};
use super::primitive::{Floats, Op, Tensor, apply};
use super::rounded::{self, After, Job, SideRows};
use super::scratch::{SIDE, scratch};
use super::source::Source;
use super::weights::mode_arrays;
use crate::linears::{Input, LinearRef, RowsUpdates};
use crate::pool::Shares;
use crate::{Array, Dtype, Exception, Precision, Result, WeightRef, precision};

pub(crate) struct Answers {
    source: Source,
    /// Rows of each group.
    groups: Vec<usize>,
    parts: Vec<Part>,
}

/// One linear without its arrays: W, then b and h where they are there, then A, B and c of each group's update.
struct Part {
    weight: Arrangement,
    bias: bool,
    residual: bool,
    /// The update of each group.
    sides: Vec<Option<Side>>,
}

#[derive(Clone, Copy)]
struct Side {
    rank: usize,
    scale: f32,
    factor: bool,
}

impl Answers {
    /// Whether this operation is the one for such a linear.
    pub(crate) fn fits(linear: &LinearRef) -> bool {
        precision() == Precision::Int16
            && matches!(linear.weight, WeightRef::Arranged(_))
            && linear.low_rank.is_none_or(|update| update.arranged() && update.input.is_none())
            && rounded::available()
    }

    /// `groups` cover the rows of x and hold an update for each linear; those of the linears themselves are not read.
    pub(crate) fn apply(input: Input, linears: &[LinearRef], groups: &[RowsUpdates]) -> Result<Vec<Array>> {
        let (source, mut inputs) = Source::of(input);
        let mut parts = Vec::with_capacity(linears.len());
        for (index, linear) in linears.iter().enumerate() {
            let WeightRef::Arranged(weight) = linear.weight else {
                return Err(Exception::custom("linears: expected arranged weights"));
            };
            inputs.extend(linear.weight.arrays());
            inputs.extend(linear.bias);
            inputs.extend(linear.residual);
            let mut sides = Vec::with_capacity(groups.len());
            for update in groups.iter().map(|(_, updates)| updates[index]) {
                if let Some(update) = &update {
                    inputs.extend([update.a, update.b]);
                    inputs.extend(update.factor);
                }
                sides.push(update.map(|update| Side {
                    rank: update.rank() as usize,
                    scale: update.scale,
                    factor: update.factor.is_some(),
                }));
            }
            let (bias, residual) = (linear.bias.is_some(), linear.residual.is_some());
            parts.push(Part { weight: weight.arrangement, bias, residual, sides });
        }
        let mut shape = inputs[0].shape().to_vec();
        let mut shapes: Vec<Vec<i32>> = Vec::with_capacity(parts.len());
        for part in &parts {
            if let Some(last) = shape.last_mut() {
                *last = part.weight.out as i32;
            }
            shapes.push(shape.clone());
        }
        let outputs: Vec<(&[i32], Dtype)> = shapes.iter().map(|shape| (&shape[..], Dtype::Float32)).collect();
        let groups = groups.iter().map(|(rows, _)| *rows as usize).collect();
        apply(Answers { source, groups, parts }, &inputs, &outputs)
    }
}

impl Op for Answers {
    fn name(&self) -> &'static CStr {
        c"linears of arranged weights"
    }

    fn run(&self, inputs: &[Tensor], outputs: &mut [Tensor]) {
        let width = self.parts.first().map_or(1, |part| part.weight.inputs);
        let m = inputs[0].f32().len() / width.max(1);
        let made = self.source.room(m * width);
        let ranks = |part: &Part| {
            let sides = self.groups.iter().zip(&part.sides);
            sides.map(|(rows, side)| rows * side.map_or(0, |side| side.rank)).sum::<usize>()
        };
        let mut scratch = scratch(&SIDE, made + self.parts.iter().map(ranks).sum::<usize>());
        let (x, mut rest) = scratch.split_at_mut(made);
        let x = self.source.make(inputs, width, x);
        let mut next = self.source.arrays();
        let mut sides = Vec::with_capacity(self.parts.len() * self.groups.len());
        let mut jobs = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            let w = Panels::new(part.weight, &inputs[next..]);
            next += mode_arrays(part.weight.mode);
            let mut vector = |there: bool| {
                next += usize::from(there);
                there.then(|| inputs[next - 1].f32())
            };
            let (bias, residual) = (vector(part.bias), vector(part.residual));
            let first = sides.len();
            let mut row = 0;
            for (&count, side) in self.groups.iter().zip(&part.sides) {
                let rows = row..row + count;
                row = rows.end;
                let Some(side) = side else { continue };
                let (z, others) = rest.split_at_mut(count * side.rank);
                rest = others;
                let (a, b) = (halves(&inputs[next]), halves(&inputs[next + 1]));
                let factor = side.factor.then(|| inputs[next + 2].f32());
                next += 2 + usize::from(side.factor);
                let Side { rank, scale, .. } = *side;
                sides.push(SideRows { rows, a, scale, z: Shares::new(z), b, rank, factor });
            }
            jobs.push((w, first..sides.len(), bias, residual));
        }
        let jobs: Vec<Job> = jobs
            .into_iter()
            .zip(outputs)
            .map(|((w, range, bias, residual), y): ((Panels, Range<usize>, _, _), _)| Job {
                w,
                y: Shares::new(y.f32_mut()),
                after: After { sides: &sides[range], bias, residual },
            })
            .collect();
        rounded::products(x, &jobs);
    }
}

/// The bits of bf16 numbers, as which updates are arranged.
fn halves(tensor: &Tensor) -> &[u16] {
    match tensor.floats() {
        Floats::Bf16(halves) => halves,
        _ => unreachable!("arranged updates are bf16"),
    }
}
