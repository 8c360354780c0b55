//! Cross-entropy, of logits and of a hidden state with the output head folded in.

use mlx_rs::ops;

#[cfg(graft_cpu)]
use crate::cpu::loss::HeadLoss;
use crate::ffi::Mode;
use crate::{Array, Dtype, Exception, PackedRef, Result, WeightRef, ffi, matmul, matmul_t};

/// An owned head, for the functions that MLX keeps.
enum Head {
    Dense(Array),
    Packed { codes: Array, scales: Array, biases: Option<Array>, group_size: i32, bits: i32, mode: Mode },
}

impl Head {
    fn of(w: WeightRef) -> Result<Head> {
        Ok(match w {
            WeightRef::Dense(w) => Head::Dense(w.clone()),
            WeightRef::Packed(w) => Head::Packed {
                codes: w.codes.clone(),
                scales: w.scales.clone(),
                biases: w.biases.cloned(),
                group_size: w.group_size,
                bits: w.bits,
                mode: w.mode,
            },
            WeightRef::Arranged(_) => {
                return Err(Exception::custom(
                    "weights laid out for our CPU operations take f32 activations only",
                ));
            }
        })
    }

    fn view(&self) -> WeightRef<'_> {
        match self {
            Head::Dense(w) => WeightRef::Dense(w),
            Head::Packed { codes, scales, biases, group_size, bits, mode } => {
                let (group_size, bits, mode) = (*group_size, *bits, *mode);
                WeightRef::Packed(PackedRef {
                    codes,
                    scales,
                    biases: biases.as_ref(),
                    group_size,
                    bits,
                    mode,
                })
            }
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

/// `logsumexp(logits) - logits[target]` for each row: logits (M, V), targets (M,) i32 give (M,) f32. Differentiable in the logits.
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
pub fn linear_cross_entropy(h: &Array, head: WeightRef, targets: &Array, chunk: i32) -> Result<Array> {
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
    if head.on_cpu(h) {
        let targets = targets.as_dtype(Dtype::Int32)?;
        return HeadLoss::apply(h, head, &targets, ffi::differentiating());
    }
    mlx_linear(h, head, targets, chunk.max(1))
}

fn mlx_linear(h: &Array, head: WeightRef, targets: &Array, chunk: i32) -> Result<Array> {
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
            let (loss, gradient) = loss_and_gradient(&h, &Head::of(head)?, targets)?;
            (with_gradient(&loss, &h, &gradient)?, Some(gradient))
        } else {
            let owned = Head::of(head)?;
            let recomputed = ffi::checkpoint(move |inputs| {
                Ok(vec![mlx_cross_entropy(&matmul(&inputs[0], owned.view())?, &inputs[1])?])
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
    let logits = matmul(&h, head.view())?.as_dtype(Dtype::Float32)?;
    let loss = mlx_cross_entropy(&logits, targets)?;
    let mut slope = ops::softmax_axis(&logits, 1, true)?;
    let columns = ops::arange::<i32, i32>(None, logits.dim(1), None)?;
    let hit = columns.expand_dims(0)?.eq(targets.expand_dims(1)?)?;
    slope = slope.subtract(hit.as_dtype(Dtype::Float32)?)?;
    Ok((loss, matmul_t(&slope.as_dtype(h.dtype())?, head.view())?))
}

/// A value that is `loss`, with `gradient` (M, E) as its derivative by h: a token's loss depends on its own row only.
pub(crate) fn with_gradient(loss: &Array, h: &Array, gradient: &Array) -> Result<Array> {
    let gradient = mlx_rs::stop_gradient(gradient)?.as_dtype(Dtype::Float32)?;
    // The difference is zero, and so is what it adds; only its derivative is not.
    let zero = h.subtract(mlx_rs::stop_gradient(h)?)?.as_dtype(Dtype::Float32)?;
    mlx_rs::stop_gradient(loss)?.add(zero.multiply(gradient)?.sum_axis(1, false)?)
}
