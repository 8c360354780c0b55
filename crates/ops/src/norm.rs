//! Root-mean-square normalisation and the gated activation of the feed-forward layer.

use mlx_rs::{fast, nn};

#[cfg(graft_cpu)]
use crate::cpu::norm::{AddRmsNorm, RmsNorm, Swiglu};
#[cfg(graft_cpu)]
use crate::form::on_cpu;
use crate::{Array, Exception, Result};

fn check_weight(x: &Array, weight: &Array) -> Result<i32> {
    match (x.shape().last(), weight.shape()) {
        (Some(&width), &[part]) if part > 0 && width % part == 0 => Ok(part),
        _ => Err(Exception::custom(format!(
            "rms norm: the weight's length must divide the last dimension of x {:?}, found {:?}",
            x.shape(),
            weight.shape()
        ))),
    }
}

/// y = x / sqrt(mean(x^2) + eps) * weight over each stretch of the last axis that is as long as the weight (E,): x (..., E),
/// or (..., n E), in the type of x. Differentiable in both.
pub fn rms_norm(x: &Array, weight: &Array, eps: f32) -> Result<Array> {
    let part = check_weight(x, weight)?;
    #[cfg(graft_cpu)]
    if on_cpu(&[x, weight]) {
        return RmsNorm { eps }.apply(x, weight);
    }
    if x.shape().last() == Some(&part) {
        return fast::rms_norm(x, Some(weight), eps);
    }
    fast::rms_norm(x.reshape(&[-1, part])?, Some(weight), eps)?.reshape(x.shape())
}

/// h = x + r and [`rms_norm`] of h: x and r (..., E), weight (E,). Differentiable in all three.
pub fn add_rms_norm(x: &Array, r: &Array, weight: &Array, eps: f32) -> Result<(Array, Array)> {
    check_weight(x, weight)?;
    if x.shape() != r.shape() {
        let (x, r) = (x.shape(), r.shape());
        return Err(Exception::custom(format!("rms norm of a sum: {x:?} and {r:?} must agree")));
    }
    #[cfg(graft_cpu)]
    if on_cpu(&[x, r, weight]) {
        return AddRmsNorm { eps }.apply(x, r, weight);
    }
    let h = x.add(r)?;
    let y = rms_norm(&h, weight, eps)?;
    Ok((h, y))
}

/// y = silu(gate) * up with silu(z) = z / (1 + exp(-z)); gate and up have one shape and type. Differentiable in both.
pub fn swiglu(gate: &Array, up: &Array) -> Result<Array> {
    if gate.shape() != up.shape() || gate.dtype() != up.dtype() {
        return Err(Exception::custom(format!(
            "swiglu: gate {:?} {:?} and up {:?} {:?} must agree",
            gate.shape(),
            gate.dtype(),
            up.shape(),
            up.dtype()
        )));
    }
    #[cfg(graft_cpu)]
    if on_cpu(&[gate]) {
        return Swiglu::apply(gate, up);
    }
    nn::silu(gate)?.multiply(up)
}
