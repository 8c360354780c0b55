//! The one rounding function.

use graft_ops::ffi::quantize;
use graft_ops::{Array, Dtype};

use crate::{Error, Grid, Hessian, Levels, Packed, Result, round_compensated};

/// Rounds W (out, in) to `grid`, each group on its own: MLX's rounding in the grid's mode, so the same words as mlx-lm's. With a
/// Hessian the scales are the same and the codes are chosen by [`round_compensated`].
///
/// Affine scales and biases have W's type; cast W first to choose it. Nothing is evaluated without a Hessian.
///
/// # Errors
/// When the grid does not exist or does not divide W's rows.
pub fn round(w: &Array, grid: Grid, hessian: Option<&Hessian>) -> Result<Packed> {
    grid.check()?;
    let inputs = w.shape().last().copied().unwrap_or(0);
    if !grid.fits(inputs as usize) {
        return Err(Error::Request(format!(
            "rows of {inputs} weights cannot be packed in groups of {}",
            grid.group_size
        )));
    }
    let mut parts = quantize(w, grid.group_size, grid.bits, grid.mode)?.into_iter();
    let (Some(codes), Some(scales), biases) = (parts.next(), parts.next(), parts.next()) else {
        return Err(Error::Request("MLX returned fewer than codes and scales".into()));
    };
    if biases.is_some() == grid.is_float() {
        return Err(Error::Request(format!("MLX returned no such parts as {grid} have")));
    }
    match hessian {
        None => Ok(Packed { codes, scales, biases, grid }),
        Some(hessian) => {
            round_compensated(&w.as_dtype(Dtype::Float32)?, grid, &Levels { scales, biases }, hessian)
        }
    }
}
