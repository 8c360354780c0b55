//! The rotation of queries and keys by their positions.

use std::ffi::CStr;
use std::sync::Arc;

use super::norm::by_rows;
use super::primitive::{Backward, Op, Tensor, apply_one};
use crate::pool::Shares;
use crate::{Array, Dtype, Result};

/// By which angles pairs are rotated.
#[derive(Clone)]
pub(crate) struct Angles {
    /// (position, dims / 2): cosine and sine.
    pub(crate) table: Arc<Vec<(f32, f32)>>,
    /// How many leading elements of a head are rotated.
    pub(crate) dims: usize,
    /// Pairs are neighbours instead of halves.
    pub(crate) traditional: bool,
}

impl Angles {
    /// Rotates each head of a token at `position`, or back.
    pub(super) fn rotate(&self, heads: &mut [f32], head_dim: usize, position: usize, back: bool) {
        let half = self.dims / 2;
        let angles = &self.table[position * half..][..half];
        let turn = |a: &mut f32, b: &mut f32, &(cos, sin): &(f32, f32)| {
            let sin = if back { -sin } else { sin };
            (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
        };
        for head in heads.chunks_exact_mut(head_dim) {
            let head = &mut head[..self.dims];
            if self.traditional {
                for ([a, b], angle) in head.as_chunks_mut::<2>().0.iter_mut().zip(angles) {
                    turn(a, b, angle);
                }
            } else {
                let (first, second) = head.split_at_mut(half);
                for ((a, b), angle) in first.iter_mut().zip(second).zip(angles) {
                    turn(a, b, angle);
                }
            }
        }
    }

    /// Rotates x (N, H D) in place; `position` says where each token stands.
    pub(super) fn rotate_all(
        &self,
        x: &mut [f32],
        tokens: usize,
        head_dim: usize,
        position: impl Fn(usize) -> usize + Sync,
        back: bool,
    ) {
        let width = x.len() / tokens.max(1);
        let x = Shares::new(x);
        by_rows(tokens, width, |range| {
            for token in range {
                // SAFETY: each token belongs to one task.
                let heads = unsafe { x.part(token * width, width) };
                self.rotate(heads, head_dim, position(token), back);
            }
        });
    }
}

/// The rotation by itself, of x (N, H D).
#[derive(Clone)]
pub(crate) struct Rotation {
    pub(crate) angles: Angles,
    /// Position of each token.
    pub(crate) positions: Arc<Vec<usize>>,
    pub(crate) head_dim: usize,
    pub(crate) back: bool,
}

impl Rotation {
    pub(crate) fn apply(self, x: &Array) -> Result<Array> {
        apply_one(self, &[x], x.shape(), Dtype::Float32)
    }
}

impl Op for Rotation {
    fn name(&self) -> &'static CStr {
        c"rope"
    }

    fn run(&self, inputs: &[Tensor], outputs: &mut [Tensor]) {
        let in_place = inputs[0].is(&outputs[0]);
        let y = outputs[0].f32_mut();
        if !in_place {
            y.copy_from_slice(inputs[0].f32());
        }
        let at = |token: usize| self.positions[token];
        self.angles.rotate_all(y, self.positions.len(), self.head_dim, at, self.back);
    }

    fn gradients(&self, call: &Backward) -> Result<Vec<Array>> {
        let back = Rotation { back: !self.back, ..self.clone() };
        call.choose(&[back.apply(&call.cotangents[0])?])
    }

    fn takes_over(&self, output: usize) -> Option<usize> {
        Some(output)
    }
}
