//! Cross-entropy with the output head folded in: some rows' logits of a part of the vocabulary exist at a time.
//!
//! The vocabulary is taken part by part, as attention takes its keys: with M the largest logit so far, Z the sum of
//! exp(l - M) and D the sum of exp(l - M) W_v over the words v other than the target t, a part that raises M scales Z and D
//! by exp(M_old - M_new). In the end `loss = M - l_t + ln(Z + e_t)` and `dloss/dh = (D - Z W_t) / (Z + e_t)` with
//! e_t = exp(l_t - M). So each part of W is read once for all rows, and since the target is kept out of the sums, the
//! gradient of a word that is nearly certain keeps its accuracy where products are rounded to bf16.

use std::ffi::CStr;

use super::level::dispatch;
use super::primitive::{Backward, Op, Tensor, apply};
use super::scratch::{LOGITS, PANEL, scratch};
use super::simd::{Kernel, Simd, exp, vectors};
use super::weights::{Kind, Weights};
use crate::pool::{self, Shares};
use crate::{Array, Dtype, Precision, Result, WeightRef, precision};

/// Words of a part of the vocabulary; fixed, since it decides the order of sums. A multiple of 16.
const PART: usize = 2048;
/// Rows that are taken together, at most. With [`PART`] their logits are 8 MB.
const ROWS: usize = 1020;

/// Losses (M,) of h (M, E) and targets (M,), and if `gradient` of each loss by its row of h (M, E).
pub(crate) struct HeadLoss {
    head: Kind,
    gradient: bool,
    precision: Precision,
}

impl HeadLoss {
    pub(crate) fn apply(h: &Array, head: WeightRef, targets: &Array, gradient: bool) -> Result<Array> {
        let inputs: Vec<&Array> = [h, targets].into_iter().chain(head.arrays()).collect();
        let op = HeadLoss { head: Kind::of(head)?, gradient, precision: precision() };
        Ok(op.outputs(&inputs)?.swap_remove(0))
    }

    fn outputs(self, inputs: &[&Array]) -> Result<Vec<Array>> {
        if self.gradient {
            self.head.check_gradient()?;
        }
        let (losses, all) = ([inputs[0].dim(0)], (inputs[0].shape(), Dtype::Float32));
        let none: (&[i32], Dtype) = (&[0], Dtype::Float32);
        let shapes = [(&losses[..], Dtype::Float32), if self.gradient { all } else { none }];
        apply(self, inputs, &shapes)
    }
}

impl Op for HeadLoss {
    fn name(&self) -> &'static CStr {
        c"loss of the head"
    }

    fn run(&self, inputs: &[Tensor], outputs: &mut [Tensor]) {
        let (h, targets) = (inputs[0].f32(), inputs[1].i32());
        let (head, hidden) = (self.head.weights(&inputs[2..]), self.head.inputs());
        let [losses, gradient] = outputs else { return };
        let (losses, gradient) = (losses.f32_mut(), gradient.f32_mut());
        // Parts of about one size, so that the last is not a stump: each reads the whole head.
        let rows = targets.len().div_ceil(targets.len().div_ceil(ROWS).max(1)).max(1);
        for (i, targets) in targets.chunks(rows).enumerate() {
            let (first, last) = (i * rows, i * rows + targets.len());
            let gradient = if self.gradient { &mut gradient[first * hidden..last * hidden] } else { &mut [] };
            let h = &h[first * hidden..last * hidden];
            self.some_rows(h, targets, head, &mut losses[first..last], gradient);
        }
    }

    fn gradients(&self, call: &Backward) -> Result<Vec<Array>> {
        let by_row = if self.gradient {
            call.outputs[1].clone()
        } else {
            let inputs: Vec<&Array> = call.primals.iter().collect();
            HeadLoss { gradient: true, ..*self }.outputs(&inputs)?.swap_remove(1)
        };
        call.choose(&[by_row.multiply(call.cotangents[0].expand_dims(1)?)?])
    }
}

impl HeadLoss {
    fn some_rows(&self, h: &[f32], targets: &[i32], head: Weights, losses: &mut [f32], gradient: &mut [f32]) {
        let (vocabulary, hidden, rows) = (self.head.out(), self.head.inputs(), targets.len());
        let mut logits = scratch(&LOGITS, rows * PART.min(vocabulary));
        let mut sums = vec![Sums::default(); rows];
        gradient.fill(0.0);
        for first in (0..vocabulary).step_by(PART) {
            let count = PART.min(vocabulary - first);
            let (words, logits) = (head.rows(first..first + count), &mut logits[..rows * count]);
            words.times_transpose(h, logits, self.precision, true);
            let (parts, all) = (Shares::new(logits), Shares::new(&mut sums));
            let to = Shares::new(gradient);
            pool::run(rows, |i| {
                // SAFETY: each row belongs to one task.
                let (logits, sums) = unsafe { (parts.part(i * count, count), all.part(i, 1)) };
                let target = usize::try_from(targets[i]).ok().and_then(|t| t.checked_sub(first));
                let slope = if self.gradient {
                    // SAFETY: as above.
                    unsafe { to.part(i * hidden, hidden) }
                } else {
                    &mut []
                };
                dispatch(Part { logits, target: target.filter(|&t| t < count), sums: &mut sums[0], slope });
            });
            if self.gradient {
                words.times(&*logits, gradient, self.precision, true);
            }
        }
        let (losses, to) = (Shares::new(losses), Shares::new(gradient));
        pool::run(rows, |i| {
            let Sums { most, target, others } = sums[i];
            let total = others + (target - most).exp();
            // SAFETY: each row belongs to one task.
            let loss = unsafe { losses.part(i, 1) };
            loss[0] = most - target + total.ln();
            if self.gradient {
                // A target outside the vocabulary has no probability; its loss is no number, and so is its slope.
                let chosen = usize::try_from(targets[i]).ok().filter(|&t| t < vocabulary);
                let mut w = scratch(&PANEL, hidden);
                match chosen {
                    Some(target) => head.row(target, &mut w),
                    None => w.fill(f32::NAN),
                }
                // SAFETY: as above.
                for (slope, w) in unsafe { to.part(i * hidden, hidden) }.iter_mut().zip(w.iter()) {
                    *slope = (*slope - others * w) / total;
                }
            }
        });
    }
}

/// What is known of a row after some of the vocabulary.
#[derive(Clone, Copy)]
struct Sums {
    /// The largest logit.
    most: f32,
    /// The target's logit.
    target: f32,
    /// The sum of exp(logit - most) over the other words.
    others: f32,
}

impl Default for Sums {
    fn default() -> Sums {
        Sums { most: f32::NEG_INFINITY, target: f32::NAN, others: 0.0 }
    }
}

/// A row's logits of a part of the vocabulary become exp(logit - most), 0 for the target; the sums and the slope that were
/// made with a smaller `most` are scaled.
struct Part<'a> {
    logits: &'a mut [f32],
    target: Option<usize>,
    sums: &'a mut Sums,
    slope: &'a mut [f32],
}

impl Kernel for Part<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Part { logits, target, sums, slope } = self;
        let mut most = s.splat(sums.most);
        for i in vectors::<S>(logits.len()) {
            // SAFETY: whole vectors of the row.
            most = s.max(most, unsafe { s.load(logits.as_ptr().add(i)) });
        }
        let whole = logits.len() / S::LANES * S::LANES;
        let most = logits[whole..].iter().fold(s.largest(most), |most, &x| most.max(x));
        if most > sums.most {
            let scale = (sums.most - most).exp();
            sums.others *= scale;
            slope.iter_mut().for_each(|x| *x *= scale);
            sums.most = most;
        }
        if let Some(target) = target {
            sums.target = std::mem::replace(&mut logits[target], f32::NEG_INFINITY);
        }
        let (base, mut sum) = (s.splat(sums.most), s.splat(0.0));
        for i in vectors::<S>(logits.len()) {
            // SAFETY: whole vectors of the row.
            let e = exp(s, s.sub(unsafe { s.load(logits.as_ptr().add(i)) }, base));
            // SAFETY: as above.
            unsafe { s.store(logits.as_mut_ptr().add(i), e) };
            sum = s.add(sum, e);
        }
        let mut total = s.sum(sum);
        for x in &mut logits[whole..] {
            *x = (*x - sums.most).exp();
            total += *x;
        }
        sums.others += total;
    }
}
