//! The norms of a weight's rows under a low-rank update, as DoRA divides by them.

#[cfg(graft_cpu)]
use crate::cpu::row_norms::RowNorms;
use crate::{Array, Dtype, Exception, Precision, Result, WeightRef, matmul, with_precision};

/// n (out,), f32: the norms of the rows of `W + s (A B)^T` for W (out, in), A (in, R) and B (R, out), without W dense and
/// without the product A B.
///
/// With P = W A (out, R) from one packed product of R rows and G = A^T A (R, R):
/// `n_o^2 = n0_o + 2 s sum_r B[r,o] P[o,r] + s^2 sum_r B[r,o] (G B)[r,o]`, clamped at 0, where `n0` is ||W_o||^2 (out,).
/// It carries no gradient on a CPU; P is a few rows once per update or load, of which everything after is a multiple, so
/// its products are f32 whatever the precision. Formulation: arXiv 2603.22276.
pub fn row_norms(a: &Array, b: &Array, scale: f32, w: WeightRef, n0: &Array) -> Result<Array> {
    let (out, inputs) = w.shape()?;
    let fits =
        matches!((a.shape(), b.shape()), (&[i, r], &[q, o]) if i == inputs && r == q && o == out && r > 0);
    if !fits || n0.shape() != [out] {
        return Err(Exception::custom(format!(
            "row norms: A {:?}, B {:?} and the squared norms {:?} do not fit a weight of ({out}, {inputs})",
            a.shape(),
            b.shape(),
            n0.shape()
        )));
    }
    #[cfg(graft_cpu)]
    if w.on_cpu(a) && [b, n0].iter().all(|x| x.dtype() == Dtype::Float32) {
        return RowNorms::apply(a, b, scale, w, n0);
    }
    let at = a.transpose()?;
    let pt = with_precision(Precision::F32, || matmul(&at, w))?.as_dtype(Dtype::Float32)?;
    let gb = at.matmul(a)?.matmul(b)?;
    let cross = b.multiply(&pt)?.sum_axis(0, false)?.multiply(Array::from_f32(2.0 * scale))?;
    let own = b.multiply(&gb)?.sum_axis(0, false)?.multiply(Array::from_f32(scale * scale))?;
    let squared = n0.add(cross)?.add(own)?;
    mlx_rs::ops::maximum(squared, Array::from_f32(0.0))?.sqrt()
}
