//! Cross-entropy with the output head folded in: the logits of some rows exist at a time.

use std::ffi::CStr;

use super::gemm::{Matrix, product};
use super::level::dispatch;
use super::packed::{Layout, Packed, Plain, Transposed};
use super::panels::{self, Arrangement, Panels};
use super::primitive::{Backward, Op, Tensor, apply};
use super::scratch::{LOGITS, scratch};
use super::simd::{Kernel, Simd, exp, vectors};
use crate::pool::{self, Shares};
use crate::{Array, Dtype, Exception, HeadRef, Precision, Result, precision};

/// Logits that exist at a time, at most, unless 32 rows are more: 32 MB.
const AT_A_TIME: usize = 8 << 20;

/// W (V, E) of the head, without the weights.
#[derive(Clone, Copy)]
enum Head {
    Dense { vocabulary: usize, hidden: usize },
    Packed(Layout),
    Arranged(Arrangement),
}

/// Losses (M,) of h (M, E) and targets (M,), and if `gradient` of each loss by its row of h (M, E).
pub(crate) struct HeadLoss {
    head: Head,
    gradient: bool,
    precision: Precision,
}

impl HeadLoss {
    pub(crate) fn apply(h: &Array, head: HeadRef, targets: &Array, gradient: bool) -> Result<Array> {
        let (kind, weights) = match head {
            HeadRef::Dense(w) => {
                (Head::Dense { vocabulary: w.dim(0) as usize, hidden: w.dim(1) as usize }, vec![w])
            }
            HeadRef::Packed(w) => (Head::Packed(Layout::of(w)?), vec![w.codes, w.scales, w.biases]),
            HeadRef::Arranged(w) => (Head::Arranged(w.arrangement), w.arrays().iter().collect()),
        };
        let inputs: Vec<&Array> = [h, targets].into_iter().chain(weights).collect();
        Ok(HeadLoss { head: kind, gradient, precision: precision() }.outputs(&inputs)?.swap_remove(0))
    }

    fn outputs(self, inputs: &[&Array]) -> Result<Vec<Array>> {
        if self.gradient && matches!(self.head, Head::Arranged(_)) {
            return Err(Exception::custom("weights laid out for inference have no gradient"));
        }
        let (losses, all) = ([inputs[0].dim(0)], (inputs[0].shape(), Dtype::Float32));
        let none: (&[i32], Dtype) = (&[0], Dtype::Float32);
        let shapes = [(&losses[..], Dtype::Float32), if self.gradient { all } else { none }];
        apply(self, inputs, &shapes)
    }
}

impl HeadLoss {
    /// h W^T
    fn logits(&self, h: &[f32], weights: &[Tensor], logits: &mut [f32]) {
        match self.head {
            Head::Dense { vocabulary, hidden } => {
                let w = Matrix { data: weights[0].f32().as_ptr(), row: 1, column: hidden };
                product(h, hidden, &w, vocabulary, logits, self.precision);
            }
            Head::Packed(layout) => {
                let w = Packed::new(layout, weights);
                product(h, layout.inputs, &Transposed(&w), layout.out, logits, self.precision);
            }
            Head::Arranged(of) => {
                panels::times_transpose(h, &[Panels::new(of, weights)], vec![logits], self.precision);
            }
        }
    }

    /// slopes W
    fn back(&self, slopes: &[f32], weights: &[Tensor], to: &mut [f32]) {
        match self.head {
            Head::Dense { vocabulary, hidden } => {
                let w = Matrix { data: weights[0].f32().as_ptr(), row: hidden, column: 1 };
                product(slopes, vocabulary, &w, hidden, to, self.precision);
            }
            Head::Packed(layout) => {
                let w = Packed::new(layout, weights);
                product(slopes, layout.out, &Plain(&w), layout.inputs, to, self.precision);
            }
            Head::Arranged(_) => unreachable!("`apply` refuses a gradient through arranged weights"),
        }
    }
}

impl Op for HeadLoss {
    fn name(&self) -> &'static CStr {
        c"loss of the head"
    }

    fn run(&self, inputs: &[Tensor], outputs: &mut [Tensor]) {
        let (h, targets) = (inputs[0].f32(), inputs[1].i32());
        let (vocabulary, hidden) = match self.head {
            Head::Dense { vocabulary, hidden } => (vocabulary, hidden),
            Head::Packed(layout) => (layout.out, layout.inputs),
            Head::Arranged(of) => (of.out, of.inputs),
        };
        let [losses, gradient] = outputs else { return };
        let (losses, gradient) = (losses.f32_mut(), gradient.f32_mut());
        let rows = (AT_A_TIME / vocabulary.max(1)).max(32).min(targets.len().max(1));
        let mut logits = scratch(&LOGITS, rows * vocabulary);
        for first in (0..targets.len()).step_by(rows) {
            let count = rows.min(targets.len() - first);
            let h = &h[first * hidden..(first + count) * hidden];
            let logits = &mut logits[..count * vocabulary];
            self.logits(h, &inputs[2..], logits);
            let (shares, sums) = (Shares::new(logits), Shares::new(&mut losses[first..first + count]));
            pool::run(count, |i| {
                // SAFETY: each row belongs to one task.
                let (row, loss) = unsafe { (shares.part(i * vocabulary, vocabulary), sums.part(i, 1)) };
                loss[0] = dispatch(LossRow { row, target: targets[first + i], slope: self.gradient });
            });
            if self.gradient {
                let to = &mut gradient[first * hidden..(first + count) * hidden];
                self.back(logits, &inputs[2..], to);
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
