//! Cross-entropy with the output head folded in: the logits of some rows exist at a time.

use std::ffi::CStr;

use super::level::dispatch;
use super::primitive::{Backward, Op, Tensor, apply};
use super::scratch::{LOGITS, scratch};
use super::simd::{Kernel, Simd, exp, vectors};
use super::weights::Kind;
use crate::pool::{self, Shares};
use crate::{Array, Dtype, Precision, Result, WeightRef, precision};

/// Logits that exist at a time, at most, unless 32 rows are more: 32 MB.
const AT_A_TIME: usize = 8 << 20;

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
        let (vocabulary, hidden) = (self.head.out(), self.head.inputs());
        let [losses, gradient] = outputs else { return };
        let (losses, gradient) = (losses.f32_mut(), gradient.f32_mut());
        let rows = (AT_A_TIME / vocabulary.max(1)).max(32).min(targets.len().max(1));
        let mut logits = scratch(&LOGITS, rows * vocabulary);
        for first in (0..targets.len()).step_by(rows) {
            let count = rows.min(targets.len() - first);
            let h = &h[first * hidden..(first + count) * hidden];
            let logits = &mut logits[..count * vocabulary];
            self.head.times_transpose(h, &inputs[2..], logits, self.precision, true);
            let (shares, sums) = (Shares::new(logits), Shares::new(&mut losses[first..first + count]));
            pool::run(count, |i| {
                // SAFETY: each row belongs to one task.
                let (row, loss) = unsafe { (shares.part(i * vocabulary, vocabulary), sums.part(i, 1)) };
                loss[0] = dispatch(LossRow { row, target: targets[first + i], slope: self.gradient });
            });
            if self.gradient {
                let to = &mut gradient[first * hidden..(first + count) * hidden];
                self.head.times(logits, &inputs[2..], to, self.precision, false);
            }
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

/// The loss of one row of logits, which become softmax(logits) - onehot(target) if `slope`.
struct LossRow<'a> {
    row: &'a mut [f32],
    target: i32,
    slope: bool,
}

impl Kernel for LossRow<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let row = self.row;
        // A target outside the vocabulary has no probability; MLX's form would read whatever is there.
        let Some(chosen) = usize::try_from(self.target).ok().filter(|&t| t < row.len()) else {
            return f32::NAN;
        };
        let logit = row[chosen];
        let mut most = s.splat(f32::NEG_INFINITY);
        for i in vectors::<S>(row.len()) {
            // SAFETY: whole vectors of the row.
            most = s.max(most, unsafe { s.load(row.as_ptr().add(i)) });
        }
        let whole = row.len() / S::LANES * S::LANES;
        let most = row[whole..].iter().fold(s.largest(most), |most, &x| most.max(x));
        let (base, mut sum) = (s.splat(most), s.splat(0.0));
        for i in vectors::<S>(row.len()) {
            // SAFETY: whole vectors of the row.
            let e = exp(s, s.sub(unsafe { s.load(row.as_ptr().add(i)) }, base));
            // SAFETY: as above.
            unsafe { s.store(row.as_mut_ptr().add(i), e) };
            sum = s.add(sum, e);
        }
        let mut total = s.sum(sum);
        for x in &mut row[whole..] {
            *x = (*x - most).exp();
            total += *x;
        }
        if self.slope {
            let share = 1.0 / total;
            row.iter_mut().for_each(|x| *x *= share);
            row[chosen] -= 1.0;
        }
        most - logit + total.ln()
    }
}
