//! DoRA's factor: a magnitude over the norm that a weight's row has under a low-rank update.

#[cfg(graft_cpu)]
use crate::cpu::dora::{RowFactor, RowNorms, RowSquares};
#[cfg(graft_cpu)]
use crate::form::on_cpu;
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
    // 2 s P^T + s^2 G B
    let both = mlx_rs::ops::addmm(pt, at.matmul(a)?, b, scale * scale, 2.0 * scale)?;
    let squared = n0.add(b.multiply(both)?.sum_axis(0, false)?)?;
    mlx_rs::ops::maximum(squared, Array::from_f32(0.0))?.sqrt()
}

/// ||x_i||^2 of each row of a matrix (M, N): (M,).
pub fn row_squares(x: &Array) -> Result<Array> {
    #[cfg(graft_cpu)]
    if x.ndim() == 2 && on_cpu(&[x]) {
        return RowSquares::apply(x);
    }
    x.square()?.sum_axis(1, false)
}

/// c = m / n, and 1 where n = 0 (a row of zeros has no direction to scale): m, n and c are (out,). n is a constant.
pub fn row_factor(m: &Array, n: &Array) -> Result<Array> {
    #[cfg(graft_cpu)]
    if m.shape() == n.shape() && on_cpu(&[m, n]) {
        return RowFactor::apply(m, n);
    }
    let zero = n.eq(Array::from_f32(0.0))?;
    let one = Array::from_f32(1.0);
    let safe = mlx_rs::ops::select(&zero, &one, n)?;
    mlx_rs::ops::select(&zero, &one, m.divide(safe)?)
}
