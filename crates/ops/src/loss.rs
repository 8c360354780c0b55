//! Cross-entropy, of logits and of a hidden state with the output head folded in.

use mlx_rs::ops;

#[cfg(graft_cpu)]
use crate::cpu::loss::HeadLoss;
#[cfg(graft_cpu)]
use crate::form::on_cpu;
use crate::{Arranged, Array, Dtype, Exception, PackedRef, Result, ffi, packed_matmul, packed_matmul_t};

/// The weights of the output head, W (V, E).
#[derive(Clone, Copy)]
pub enum HeadRef<'a> {
    /// Dense, (V, E) of any float type.
    Dense(&'a Array),
    /// Packed.
    Packed(PackedRef<'a>),
    /// Packed, laid out for inference.
    Arranged(&'a Arranged),
}

/// An owned head, for the functions that MLX keeps.
enum Head {
    Dense(Array),
    Packed { codes: Array, scales: Array, biases: Array, group_size: i32, bits: i32 },
}

impl HeadRef<'_> {
    fn shape(&self) -> Result<(i32, i32)> {
        match self {
            HeadRef::Packed(w) => w.shape(),
            HeadRef::Arranged(w) => Ok(w.shape()),
            HeadRef::Dense(w) => match w.shape() {
                &[vocabulary, hidden] => Ok((vocabulary, hidden)),
                other => Err(Exception::custom(format!("the output head must be (V, E), found {other:?}"))),
            },
        }
    }

    fn to_owned(self) -> Result<Head> {
        Ok(match self {
            HeadRef::Dense(w) => Head::Dense(w.clone()),
            HeadRef::Packed(w) => Head::Packed {
                codes: w.codes.clone(),
                scales: w.scales.clone(),
                biases: w.biases.clone(),
                group_size: w.group_size,
                bits: w.bits,
            },
            HeadRef::Arranged(_) => {
                return Err(Exception::custom(
                    "weights laid out for our CPU operations need them, and f32 activations",
                ));
            }
        })
    }
}

impl Head {
    fn packed(&self) -> Option<PackedRef<'_>> {
        match self {
            Head::Dense(_) => None,
            Head::Packed { codes, scales, biases, group_size, bits } => {
                Some(PackedRef { codes, scales, biases, group_size: *group_size, bits: *bits })
            }
        }
    }

    /// h W^T
    fn logits(&self, h: &Array) -> Result<Array> {
        match (self, self.packed()) {
            (Head::Dense(w), _) => ops::matmul(h, w.transpose()?),
            (_, Some(w)) => packed_matmul(h, w),
            _ => Err(Exception::custom("the output head is neither dense nor packed")),
        }
    }

    /// d W
    fn transposed(&self, d: &Array) -> Result<Array> {
        match (self, self.packed()) {
            (Head::Dense(w), _) => ops::matmul(d, w),
            (_, Some(w)) => packed_matmul_t(d, w),
            _ => Err(Exception::custom("the output head is neither dense nor packed")),
        }
    }
}

fn check_targets(rows: i32, targets: &Array) -> Result<()> {
    if targets.shape() != [rows] {
        return Err(Exception::custom(format!(
            "cross-entropy: {rows} rows need targets of shape [{rows}], found {:?}",
            targets.shape()
        )));
    }
    Ok(())
}

/// logsumexp(logits) - logits[target] for each row: logits (M, V), targets (M,) i32 give (M,) f32. Differentiable in the logits.
pub fn cross_entropy(logits: &Array, targets: &Array) -> Result<Array> {
    let &[rows, _] = logits.shape() else {
        return Err(Exception::custom(format!(
            "cross-entropy: the logits must be (M, V), found {:?}",
            logits.shape()
        )));
    };
    check_targets(rows, targets)?;
    mlx_cross_entropy(logits, targets)
}

fn mlx_cross_entropy(logits: &Array, targets: &Array) -> Result<Array> {
    let logits = logits.as_dtype(Dtype::Float32)?;
    let chosen = logits.take_along_axis(targets.expand_dims(1)?, 1)?.squeeze_axes(&[1])?;
    logits.logsumexp_axis(1, false)?.subtract(chosen)
}

/// [`cross_entropy`] of h W^T without ever holding it: h (M, E), targets (M,) i32 give (M,) f32.
///
/// `chunk` rows of logits exist at a time. The gradient flows to h only. It is computed along with the losses inside
/// [`ffi::value_and_grad`]; in other transforms the logits are computed twice.
pub fn linear_cross_entropy(h: &Array, head: HeadRef, targets: &Array, chunk: i32) -> Result<Array> {
    let (_, hidden) = head.shape()?;
    let &[rows, width] = h.shape() else {
        return Err(Exception::custom(format!(
            "cross-entropy: the hidden state must be (M, E), found {:?}",
            h.shape()
        )));
    };
    if width != hidden {
        return Err(Exception::custom(format!(
            "cross-entropy: the output head takes {hidden} features, the hidden state has {width}"
        )));
    }
    check_targets(rows, targets)?;
    if rows == 0 {
        return ops::zeros_dtype(&[0], Dtype::Float32);
    }
    #[cfg(graft_cpu)]
    if on_cpu(&[h]) && !matches!(head, HeadRef::Dense(w) if w.dtype() != Dtype::Float32) {
        let targets = targets.as_dtype(Dtype::Int32)?;
        return HeadLoss::apply(h, head, &targets, ffi::differentiating());
    }
    mlx_linear(h, head, targets, chunk.max(1))
}

fn mlx_linear(h: &Array, head: HeadRef, targets: &Array, chunk: i32) -> Result<Array> {
    let rows = h.dim(0);
    let borders: Vec<i32> = (1..).map(|i| i * chunk).take_while(|&at| at < rows).collect();
    let hs = ops::split_at_indices(h, &borders, 0)?;
    let ts = ops::split_at_indices(targets, &borders, 0)?;
    let mut losses = Vec::with_capacity(hs.len());
    // Each chunk waits for the one before it, or MLX would start them all and hold all their logits.
    let mut before: Vec<Array> = Vec::new();
    for (h, targets) in hs.iter().zip(&ts) {
        let mut h = h.clone();
        if !before.is_empty() {
            h = ffi::depends(&[h], &before)?.swap_remove(0);
        }
        let (loss, gradient) = if ffi::differentiating() {
            let (loss, gradient) = loss_and_gradient(&h, &head.to_owned()?, targets)?;
            (with_gradient(&loss, &h, &gradient)?, Some(gradient))
        } else {
            let owned = head.to_owned()?;
            let recomputed = ffi::checkpoint(move |inputs| {
                Ok(vec![mlx_cross_entropy(&owned.logits(&inputs[0])?, &inputs[1])?])
            })?;
            (recomputed.call(&[h, targets.clone()])?.swap_remove(0), None)
        };
        before = vec![loss.clone()];
        before.extend(gradient);
        losses.push(loss);
    }
    ops::concatenate(&losses, 0)
}

/// The losses of some rows and the gradient of each loss with respect to its own row of h.
fn loss_and_gradient(h: &Array, head: &Head, targets: &Array) -> Result<(Array, Array)> {
    let h = mlx_rs::stop_gradient(h)?;
    let logits = head.logits(&h)?.as_dtype(Dtype::Float32)?;
    let loss = mlx_cross_entropy(&logits, targets)?;
    let mut slope = ops::softmax_axis(&logits, 1, true)?;
    let columns = ops::arange::<i32, i32>(None, logits.dim(1), None)?;
    let hit = columns.expand_dims(0)?.eq(targets.expand_dims(1)?)?;
    slope = slope.subtract(hit.as_dtype(Dtype::Float32)?)?;
    Ok((loss, head.transposed(&slope.as_dtype(h.dtype())?)?))
}

/// A value that is `loss`, with `gradient` (M, E) as its derivative by h: a token's loss depends on its own row only.
pub(crate) fn with_gradient(loss: &Array, h: &Array, gradient: &Array) -> Result<Array> {
    let gradient = mlx_rs::stop_gradient(gradient)?.as_dtype(Dtype::Float32)?;
    // The difference is zero, and so is what it adds; only its derivative is not.
    let zero = h.subtract(mlx_rs::stop_gradient(h)?)?.as_dtype(Dtype::Float32)?;
    mlx_rs::stop_gradient(loss)?.add(zero.multiply(gradient)?.sum_axis(1, false)?)
}
