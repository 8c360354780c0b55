//! Decompositions of matrices, always on the CPU: MLX has no form of them for a GPU.
//!
//! MLX's own singular value decomposition forms both square factors, (m, m) and (n, n), so everything here first reduces a
//! matrix to a small core and decomposes that. M, N are the sides of a matrix, K the columns that are kept.

use mlx_rs::ops::concatenate;
use mlx_rs::{Stream, linalg, with_stream};

#[cfg(graft_cpu)]
use crate::Precision;
#[cfg(graft_cpu)]
use crate::cpu::gemm::{self, Matrix};
#[cfg(graft_cpu)]
use crate::cpu::tall;
use crate::{Array, Dtype, Exception, Form, Result, ffi, form};

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

/// A matrix (M, N) in the host's memory, row by row: what is too large to be copied into an array for nothing.
#[derive(Debug, Clone, Copy)]
pub struct HostMatrix<'a> {
    /// Its elements.
    pub values: &'a [f32],
    /// N.
    pub columns: i32,
}

impl HostMatrix<'_> {
    /// (M, N).
    pub fn shape(&self) -> (i32, i32) {
        ((self.values.len() / self.columns.max(1) as usize) as i32, self.columns)
    }

    /// Columns `from`.. of X A, as many as `width`, for X (rows, M) with few columns: to `out`, whose rows are `stride` apart. On
    /// the thread that calls.
    pub fn times_part(&self, x: &[f32], (from, width): (usize, usize), out: &mut [f32], stride: usize) {
        let n = self.columns as usize;
        #[cfg(graft_cpu)]
        tall::part(x, self.values, n, (from, width), out, stride);
        #[cfg(not(graft_cpu))]
        for (x, out) in x.chunks(self.shape().0.max(1) as usize).zip(out.chunks_mut(stride)) {
            out[..width].fill(0.0);
            for (x, row) in x.iter().zip(self.values.chunks(n)) {
                out.iter_mut().zip(&row[from..from + width]).for_each(|(out, a)| *out += x * a);
            }
        }
    }

    fn array(&self) -> Array {
        let (m, n) = self.shape();
        Array::from_slice(self.values, &[m, n])
    }
}

/// What the search for the leading part of a matrix is told.
#[derive(Debug, Clone, Copy)]
pub struct Search<'a> {
    /// How many values and vectors are wanted.
    pub rank: i32,
    /// ||A||^2.
    pub total: f64,
    /// Vectors (N, K) near whose span the leading right ones lie, where there are such.
    pub known: Option<&'a Array>,
    /// Of the vectors that are drawn.
    pub seed: u64,
}

/// Columns beyond those wanted or known that the search carries along.
const OVERSAMPLE: i32 = 10;
/// How often the search multiplies by A or A^T at most.
const PASSES: usize = 6;
/// The search ends when what one more product would still find is below this share of the squares that are lost.
const ENOUGH: f64 = 1e-3;

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

/// The leading `rank` values and vectors of A (M, N): of all of them, or by a search where few are asked for.
///
/// The search multiplies A by the vectors that are known and some random ones, and then by A^T and A in turn with an
/// orthonormal basis taken each time (Halko, Martinsson and Tropp, 2011, algorithms 4.4 and 5.1), until it is near the best or
/// has read A six times. U diag(s) V^T is A projected on one side whatever was found, so a caller knows the error:
/// ||A||^2 - sum s^2.
///
/// # Errors
/// When A is no matrix, or the rank is below 1.
pub fn svd_leading(a: HostMatrix, search: Search) -> Result<Svd> {
    let (m, n) = a.shape();
    if a.values.is_empty() || a.values.len() != m as usize * n as usize {
        let count = a.values.len();
        return Err(Exception::custom(format!("svd: {count} values are no matrix of {n} columns")));
    }
    let Search { rank, total, known, seed } = search;
    if rank < 1 {
        return Err(Exception::custom(format!("a rank must be at least 1, not {rank}")));
    }
    let width = rank + OVERSAMPLE;
    // Beyond a third of all the search costs as much as the whole.
    if 3 * width >= m.min(n) {
        return svd(&a.array())?.leading(rank);
    }
    let products = Products::of(a);
    on_cpu(|| {
        let key = mlx_rs::random::key(seed)?;
        let drawn = |shape: &[i32]| mlx_rs::random::normal::<f32>(shape, None, None, &key);
        let mut right = match known {
            None => drawn(&[n, width])?,
            Some(known) if known.dim(1) <= rank => {
                concatenate(&[known, &drawn(&[n, width - known.dim(1)])?], 1)?
            }
            Some(known) => known.matmul(drawn(&[known.dim(1), width])?)?,
        };
        let mut left = linalg::qr(products.times(&right)?)?.0;
        let mut before = 0.0;
        for pass in 1.. {
            // A is near `left core right^T` for the side that the last product gave, of all that the other one allows.
            let core = if pass % 2 == 1 {
                let (basis, r) = linalg::qr(products.under(&left)?.transpose()?)?;
                right = basis;
                r.transpose()?
            } else {
                let (basis, r) = linalg::qr(products.times(&right)?)?;
                left = basis;
                r
            };
            let core = svd(&core)?;
            let s = ffi::read::<f32>(&core.s)?;
            let squared = |s: &f32| f64::from(*s).powi(2);
            let found: f64 = s[..rank as usize].iter().map(squared).sum();
            // Each product turns the vectors towards A's by the ratio of the first value that is too many to the last wanted.
            let ratio = squared(&s[s.len() - 1]) / squared(&s[rank as usize - 1]);
            let gain = (found - before) * ratio / (1.0 - ratio);
            if pass + 1 == PASSES || pass > 1 && gain <= ENOUGH * (total - found) {
                let core = core.leading(rank)?;
                let vt = core.vt.matmul(right.transpose()?)?;
                return Ok(Svd { u: left.matmul(&core.u)?, s: core.s, vt });
            }
            before = found;
        }
        unreachable!("the search ends at its last pass")
    })
}

/// A on either side of a few columns: by our CPU form where it lies, by MLX as an array.
struct Products<'a> {
    host: HostMatrix<'a>,
    array: Option<Array>,
}

impl<'a> Products<'a> {
    fn of(host: HostMatrix<'a>) -> Self {
        Self { host, array: (form() == Form::Mlx).then(|| host.array()) }
    }

    fn array(&self) -> Array {
        self.array.clone().unwrap_or_else(|| self.host.array())
    }

    /// A X (M, K) for X (N, K).
    fn times(&self, x: &Array) -> Result<Array> {
        #[cfg(graft_cpu)]
        if self.array.is_none() {
            let (a, x) = (self.host, x.contiguous()?);
            let y = tall::product(a.values, a.columns as usize, ffi::read(&x)?, x.dim(1) as usize);
            return Ok(Array::from_slice(&y, &[a.shape().0, x.dim(1)]));
        }
        self.array().matmul(x)
    }

    /// X^T A (K, N) for X (M, K).
    fn under(&self, x: &Array) -> Result<Array> {
        let xt = x.transpose()?;
        #[cfg(graft_cpu)]
        if self.array.is_none() {
            let (xt, (m, n)) = (xt.contiguous()?, self.host.shape());
            let mut y = vec![0.0; xt.dim(0) as usize * n as usize];
            let a = Matrix { data: self.host.values.as_ptr(), row: n as usize, column: 1 };
            let left: &[f32] = ffi::read(&xt)?;
            gemm::product(left, m as usize, &a, n as usize, &mut y, Precision::F32, false);
            return Ok(Array::from_slice(&y, &[xt.dim(0), n]));
        }
        xt.matmul(self.array())
    }
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
