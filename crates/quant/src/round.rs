//! The one rounding function.

use graft_ops::Array;
use graft_ops::ffi::{Mode, quantize};

use crate::{Error, Grid, Packed, Result};

/// Rounds W (out, in) to `grid`, each group on its own: MLX's affine rounding, so the same words as mlx-lm's.
///
/// The scales and biases have W's type; cast W first to choose it. Nothing is evaluated.
///
/// # Errors
/// When the grid does not exist or does not divide W's rows.
pub fn round(w: &Array, grid: Grid) -> Result<Packed> {
    grid.check()?;
    let inputs = w.shape().last().copied().unwrap_or(0);
    if !grid.fits(inputs as usize) {
        return Err(Error::Request(format!(
            "rows of {inputs} weights cannot be packed in groups of {}",
            grid.group_size
        )));
    }
    let mut parts = quantize(w, grid.group_size, grid.bits, Mode::Affine)?.into_iter();
    let (Some(codes), Some(scales), Some(biases)) = (parts.next(), parts.next(), parts.next()) else {
        return Err(Error::Request("MLX returned fewer than codes, scales and biases".into()));
    };
    Ok(Packed { codes, scales, biases, grid })
}
