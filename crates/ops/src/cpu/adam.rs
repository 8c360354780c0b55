//! A step of Adam in one operation for each tensor, and the norm of all gradients in one: as MLX's own they are some twenty
//! for each of hundreds of small tensors, and cost a batch of short rows a tenth of its time.

use std::ffi::CStr;

use super::level::dispatch;
use super::norm::dot;
use super::primitive::{Op, Tensor, apply, apply_one};
use super::simd::{Kernel, Simd};
use crate::adam::AdamStep;
use crate::pool::{self, Shares};
use crate::{Array, Dtype, Result};

pub(crate) struct Adam(AdamStep);

impl Adam {
    pub(crate) fn apply(p: &Array, g: &Array, m: &Array, v: &Array, step: AdamStep) -> Result<[Array; 3]> {
        let shape = (p.shape(), Dtype::Float32);
        let made = apply(Adam(step), &[p, g, m, v], &[shape; 3])?;
        made.try_into().map_err(|_| crate::Exception::custom("adam has three results"))
    }
}

/// Elements that a task takes at a time.
const CHUNK: usize = 1 << 14;

impl Op for Adam {
    fn name(&self) -> &'static CStr {
        c"step of adam"
    }

    fn run(&self, inputs: &[Tensor], outputs: &mut [Tensor]) {
        let [p, g, m, v] = [0, 1, 2, 3].map(|i| inputs[i].f32());
        let [new_p, new_m, new_v] = outputs else { return };
        let new = [new_p, new_m, new_v].map(|x| Shares::new(x.f32_mut()));
        pool::run(p.len().div_ceil(CHUNK), |task| {
            let range = task * CHUNK..((task + 1) * CHUNK).min(p.len());
            // SAFETY: each chunk belongs to one task.
            let new = new.each_ref().map(|x| unsafe { x.part(range.start, range.len()) });
            let old = [p, g, m, v].map(|x| &x[range.clone()]);
            dispatch(Elements { step: self.0, old, new });
        });
    }
}

struct Elements<'a> {
    step: AdamStep,
    old: [&'a [f32]; 4],
    new: [&'a mut [f32]; 3],
}

impl Kernel for Elements<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let AdamStep { betas, shares, eps, rate, correction, keep } = self.step;
        let (correction, keep) = (correction.unwrap_or(1.0), keep.unwrap_or(1.0));
        let ([p, g, m, v], [new_p, new_m, new_v]) = (self.old, self.new);
        let old = p.iter().zip(g).zip(m.iter().zip(v));
        let new = new_p.iter_mut().zip(new_m).zip(new_v);
        for (((p, g), (m, v)), ((new_p, new_m), new_v)) in old.zip(new) {
            *new_m = m * betas.0 + g * shares.0;
            *new_v = v * betas.1 + g * g * shares.1;
            *new_p = p * keep - *new_m * rate / (new_v.sqrt() * correction + eps);
        }
    }
}

pub(crate) struct SquaredNorm;

impl SquaredNorm {
    pub(crate) fn apply(arrays: &[Array]) -> Result<Array> {
        apply_one(SquaredNorm, &arrays.iter().collect::<Vec<_>>(), &[], Dtype::Float32)
    }
}

impl Op for SquaredNorm {
    fn name(&self) -> &'static CStr {
        c"squared norm"
    }

    fn run(&self, inputs: &[Tensor], outputs: &mut [Tensor]) {
        let inputs: Vec<&[f32]> = inputs.iter().map(Tensor::f32).collect();
        let mut sums = vec![0.0; inputs.len()];
        {
            let sums = Shares::new(&mut sums);
            pool::run(inputs.len(), |i| {
                // SAFETY: each sum belongs to one task.
                unsafe { sums.part(i, 1) }.copy_from_slice(&[dispatch(Squares(inputs[i]))]);
            });
        }
        outputs[0].f32_mut()[0] = sums.iter().sum();
    }
}

struct Squares<'a>(&'a [f32]);

impl Kernel for Squares<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        dot(s, self.0, self.0)
    }
}
