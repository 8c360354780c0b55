//! Decompositions of matrices, always on the CPU: MLX has no form of them for a GPU.
//!
//! MLX's own singular value decomposition forms both square factors, (m, m) and (n, n), so everything here first reduces a
//! matrix to a small core and decomposes that. M, N are the sides of a matrix, K the columns that are kept.

use mlx_rs::{Stream, linalg, with_stream};

use crate::{Array, Dtype, Exception, Result};

/// U (M, K), s (K,) from the largest down, V^T (K, N): a matrix, or the nearest one of rank K, is U diag(s) V^T.
#[derive(Debug, Clone)]
pub struct Svd {
    /// Left vectors, orthonormal columns.
    pub u: Array,
    /// Singular values, none below 0.
    pub s: Array,
    /// Right vectors, orthonormal rows.
    pub vt: Array,
}

impl Svd {
    /// The leading `rank` values and vectors; all of them if there are no more.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn leading(&self, rank: i32) -> Result<Svd> {
        if rank >= self.s.dim(0) {
            return Ok(self.clone());
        }
        let ids = Array::from_iter(0..rank, &[rank]);
        let (u, vt) = (self.u.take_axis(&ids, 1)?, self.vt.take_axis(&ids, 0)?);
        Ok(Svd { u, s: self.s.take_axis(&ids, 0)?, vt })
    }

    /// The two factors U diag(sqrt(s)) (M, K) and diag(sqrt(s)) V^T (K, N), whose product is the matrix; balanced, so that
    /// neither is much larger than the other.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn factors(&self) -> Result<(Array, Array)> {
        let root = self.s.sqrt()?;
        Ok((self.u.multiply(&root)?, self.vt.multiply(root.expand_dims(1)?)?))
    }
}

/// Columns beyond the rank that the search for the leading ones carries along.
const OVERSAMPLE: i32 = 10;
/// How often the search multiplies by A A^T: each time what is small beside the leading values shrinks by its square.
const POWERS: usize = 2;

/// A = Q R for A (M, N): Q (M, K) with orthonormal columns, R (K, N), K = min(M, N).
///
/// # Errors
/// When A is no matrix of f32.
pub fn qr(a: &Array) -> Result<(Array, Array)> {
    matrix("qr", a)?;
    on_cpu(|| linalg::qr(a))
}

/// The whole decomposition of A (M, N), K = min(M, N).
///
/// # Errors
/// When A is no matrix of f32.
pub fn svd(a: &Array) -> Result<Svd> {
    let (m, n) = matrix("svd", a)?;
    on_cpu(|| {
        if m < n {
            let Svd { u, s, vt } = svd(&a.transpose()?)?;
            return Ok(Svd { u: vt.transpose()?, s, vt: u.transpose()? });
        }
        if m > n {
            let (q, r) = linalg::qr(a)?;
            let (u, s, vt) = linalg::svd(&r)?;
            return Ok(Svd { u: q.matmul(&u)?, s, vt });
        }
        let (u, s, vt) = linalg::svd(a)?;
        Ok(Svd { u, s, vt })
    })
}

/// The decomposition of the product A B for A (M, R), B (R, N), without the product: with A = Qa Ra and B^T = Qb Rb it is
/// that of the core Ra Rb^T, which is R wide. K = min(M, N, R). Exact up to rounding.
///
/// # Errors
/// When the two do not fit together.
pub fn svd_of_product(a: &Array, b: &Array) -> Result<Svd> {
    let ((m, r), (q, n)) = (matrix("svd of a product", a)?, matrix("svd of a product", b)?);
    if r != q {
        return Err(Exception::custom(format!("({m}, {r}) and ({q}, {n}) have no product")));
    }
    on_cpu(|| {
        let (left, ra) = linalg::qr(a)?;
        let (right, rb) = linalg::qr(b.transpose()?)?;
        let core = svd(&ra.matmul(rb.transpose()?)?)?;
        Ok(Svd { u: left.matmul(&core.u)?, s: core.s, vt: core.vt.matmul(right.transpose()?)? })
    })
}

/// The leading `rank` values and vectors of A (M, N): of all of them, or by a randomized search where few are asked for.
///
/// The search multiplies A by `rank + 10` random vectors and twice by A^T and A with an orthonormal basis taken each time
/// (Halko, Martinsson and Tropp, 2011, algorithms 4.4 and 5.1). U is orthonormal and U diag(s) V^T is U U^T A whatever was
/// found, so a caller who knows ||A|| knows the error: ||A||^2 - sum s^2.
///
/// # Errors
/// When A is no matrix of f32, or the rank is below 1.
pub fn svd_leading(a: &Array, rank: i32, seed: u64) -> Result<Svd> {
    let (m, n) = matrix("svd", a)?;
    if rank < 1 {
        return Err(Exception::custom(format!("a rank must be at least 1, not {rank}")));
    }
    let width = rank + OVERSAMPLE;
    // Beyond a third of all the search costs as much as the whole.
    if 3 * width >= m.min(n) {
        return svd(a)?.leading(rank);
    }
    on_cpu(|| {
        let key = mlx_rs::random::key(seed)?;
        let start = mlx_rs::random::normal::<f32>(&[n, width][..], None, None, &key)?;
        let at = a.transpose()?;
        let mut basis = linalg::qr(a.matmul(&start)?)?.0;
        for _ in 0..POWERS {
            let other = linalg::qr(at.matmul(&basis)?)?.0;
            basis = linalg::qr(a.matmul(&other)?)?.0;
        }
        let small = svd(&basis.transpose()?.matmul(a)?)?.leading(rank)?;
        Ok(Svd { u: basis.matmul(&small.u)?, ..small })
    })
}

/// The sides of a matrix of f32.
fn matrix(what: &str, a: &Array) -> Result<(i32, i32)> {
    match (a.shape(), a.dtype()) {
        (&[m, n], Dtype::Float32) if m > 0 && n > 0 => Ok((m, n)),
        (shape, dtype) => {
            Err(Exception::custom(format!("{what}: expected a matrix of f32, found {shape:?} of {dtype:?}")))
        }
    }
}

/// Runs on MLX's own stream of the CPU, which is there from the start: no stream is made here.
fn on_cpu<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    with_stream(&Stream::cpu(), f)
}
