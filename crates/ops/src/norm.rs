//! Root-mean-square normalisation and the gated activation of the feed-forward layer.

use mlx_rs::{fast, nn};

#[cfg(graft_cpu)]
use crate::cpu::norm::{RmsNorm, Swiglu};
#[cfg(graft_cpu)]
use crate::form::on_cpu;
use crate::{Array, Exception, Result};

/// y = x / sqrt(mean(x^2) + eps) * weight over the last axis, x (..., E), weight (E,), in the type of x.
/// Differentiable in both.
pub fn rms_norm(x: &Array, weight: &Array, eps: f32) -> Result<Array> {
    if x.shape().last() != weight.shape().last() || weight.ndim() != 1 {
        return Err(Exception::custom(format!(
            "rms norm: the weight must have the last dimension of x {:?}, found {:?}",
            x.shape(),
            weight.shape()
        )));
    }
    #[cfg(graft_cpu)]
    if on_cpu(&[x, weight]) {
        return RmsNorm { eps }.apply(x, weight);
    }
    fast::rms_norm(x, Some(weight), eps)
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
