//! The updates of one module by several adapters, as factors and as dense rows.
//!
//! An update (a task vector) is what an adapter adds to W: `s (A B)^T` for LoRA. DoRA's `c * (W + s (A B)^T) - W` is
//! `(c - 1) * W + c * s (A B)^T`, a factor by row and a low-rank part: so a weighted sum of updates is again
//! `c' * (W + L) - W` with `c' = 1 + sum w (c - 1)` and `L = sum w (c / c') * s (A B)^T`, exactly.

use graft_adapters::{Adapter, Kind};
use graft_ops::linalg::{Svd, svd_of_product};
use graft_ops::{Array, Dtype, ffi, row_norms};
use graft_quant::Weight;

use crate::{Error, Result, Size};

/// Below this a row's factor c' is a cancellation, and L = .. / c' would be its noise.
const CANCELLED: f32 = 1e-4;
/// Elements of the dense rows that are looked at together: 8 MB in f32.
const BLOCK: i32 = 1 << 21;

/// What one adapter does to the module.
pub(crate) struct Part<'a> {
    pub(crate) adapter: &'a Adapter,
    /// DoRA's c (out,).
    pub(crate) factor: Option<Array>,
    pub(crate) weight: f64,
    pub(crate) density: f64,
    /// Which of the sources it is.
    pub(crate) source: usize,
}

/// A module with all that acts on it.
pub(crate) struct Module<'a> {
    pub(crate) path: &'a str,
    pub(crate) kind: Kind,
    pub(crate) parts: Vec<Part<'a>>,
    /// W and the squared norms of its rows, where a result with magnitudes is wanted.
    pub(crate) base: Option<(Weight, Array)>,
}

/// The result: factors with s = 1, and how good they are.
pub(crate) struct Outcome {
    pub(crate) adapter: Adapter,
    /// ||sum of the updates||; for DoRA, of their low-rank part.
    pub(crate) norm: f64,
    /// ||result - sum|| / ||sum||.
    pub(crate) error: f64,
}

impl<'a> Module<'a> {
    /// (rows, columns) of W.
    pub(crate) fn shape(&self) -> (i32, i32) {
        let (a, b) = self.parts.first().map_or((0, 0), |p| (p.adapter.a.dim(0), p.adapter.b.dim(1)));
        if self.kind == Kind::Linear { (b, a) } else { (a, b) }
    }

    /// The sum of all ranks.
    pub(crate) fn rank(&self) -> i32 {
        self.parts.iter().map(|part| part.adapter.rank()).sum()
    }

    /// The weight of each part.
    pub(crate) fn weights(&self) -> Vec<f64> {
        self.parts.iter().map(|part| part.weight).collect()
    }

    /// c' = 1 + sum w (c - 1), f32 (out,); none where the result is to have no magnitudes.
    ///
    /// Refuses a row whose factors cancel: no magnitude stands for it.
    pub(crate) fn factor(&self, weights: &[f64]) -> Result<Option<Array>> {
        let Some((base, _)) = &self.base else { return Ok(None) };
        let one = Array::from_f32(1.0);
        let mut c = mlx_rs::ops::ones::<f32>(&[base.out_features()])?;
        for (part, weight) in self.parts.iter().zip(weights) {
            if let Some(factor) = &part.factor {
                c = c.add(factor.subtract(&one)?.multiply(Array::from_f32(*weight as f32))?)?;
            }
        }
        let values = ffi::read::<f32>(&c)?;
        if let Some(row) = values.iter().position(|c| c.is_nan() || c.abs() < CANCELLED) {
            let (path, value) = (self.path.to_owned(), values[row]);
            return Err(Error::Cancels { path, row, value });
        }
        Ok(Some(c))
    }

    /// The weighted sum as factors A (.., R) and B (R, ..) with s = 1, side by side: R is the sum of the ranks.
    pub(crate) fn factors(&self, weights: &[f64], c: Option<&Array>) -> Result<(Array, Array)> {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        for (part, weight) in self.parts.iter().zip(weights) {
            let scale = (weight * f64::from(part.adapter.scale)) as f32;
            let mut own = part.adapter.b.multiply(Array::from_f32(scale))?;
            if let Some(c) = c {
                let factor = part.factor.clone().map_or_else(|| mlx_rs::ops::ones_like(c), Ok)?;
                own = own.multiply(factor.divide(c)?)?;
            }
            a.push(part.adapter.a.clone());
            b.push(own);
        }
        Ok((mlx_rs::ops::concatenate(&a, 1)?, mlx_rs::ops::concatenate(&b, 0)?))
    }

    /// The weighted sum, in the rank that is asked for.
    pub(crate) fn sum(&self, weights: &[f64], size: Size) -> Result<Outcome> {
        let c = self.factor(weights)?;
        let (a, b) = self.factors(weights, c.as_ref())?;
        let cut = cut(&a, &b, size)?;
        self.outcome(cut, c.as_ref())
    }

    /// Puts a magnitude to factors that stand for L: m = c' ||W + L||.
    pub(crate) fn outcome(&self, cut: Cut, c: Option<&Array>) -> Result<Outcome> {
        let Cut { a, b, norm, error } = cut;
        let magnitude = match (&self.base, c) {
            (Some((base, n0)), Some(c)) => {
                let n = row_norms(&a, &b, 1.0, base.as_ref(), n0)?;
                Some(n.multiply(c)?)
            }
            _ => None,
        };
        let adapter = Adapter { a, b, scale: 1.0, magnitude };
        check_finite(self.path, &adapter, &[norm, error])?;
        Ok(Outcome { adapter, norm, error })
    }

    /// Runs of rows, ids (N,) each.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = Array> + use<> {
        let (rows, columns) = self.shape();
        let step = (BLOCK / columns.max(1)).max(1);
        (0..rows).step_by(step as usize).map(move |from| {
            let to = (from + step).min(rows);
            Array::from_iter(from..to, &[to - from])
        })
    }

    /// W's rows `ids` in f32, where W is there.
    pub(crate) fn base_rows(&self, ids: &Array) -> Result<Option<Array>> {
        let rows = |(base, _): &(Weight, Array)| base.rows(ids, Dtype::Float32);
        Ok(self.base.as_ref().map(rows).transpose()?)
    }

    /// Rows `ids` of a part's update, dense, f32 (N, columns); `base` are W's.
    pub(crate) fn rows(&self, part: &Part, ids: &Array, base: Option<&Array>) -> Result<Array> {
        let low_rank = part.adapter.rows(self.kind, ids)?.delta(self.kind)?;
        let (Some(factor), Some(base)) = (&part.factor, base) else { return Ok(low_rank) };
        let c = factor.take_axis(ids, 0)?.expand_dims(1)?;
        let turned = base.multiply(c.subtract(Array::from_f32(1.0))?)?;
        Ok(turned.add(low_rank.multiply(c)?)?)
    }
}

/// Factors of a matrix and what cutting them to a rank lost.
pub(crate) struct Cut {
    pub(crate) a: Array,
    pub(crate) b: Array,
    pub(crate) norm: f64,
    pub(crate) error: f64,
}

/// A B in the rank that is asked for; as it is where that loses nothing.
pub(crate) fn cut(a: &Array, b: &Array, size: Size) -> Result<Cut> {
    if size == Size::Full || matches!(size, Size::Rank(rank) if rank >= a.dim(1)) {
        // ||A B||^2 = sum of (A^T A) * (B B^T), element by element.
        let gram = a.transpose()?.matmul(a)?.multiply(b.matmul(b.transpose()?)?)?;
        let norm = gram.sum_axis(0, false)?;
        let norm = ffi::read::<f32>(&norm)?.iter().map(|x| f64::from(*x)).sum::<f64>();
        // Below zero it is rounding; `max` would also make 0 of what is no number.
        let norm = if norm < 0.0 { 0.0 } else { norm.sqrt() };
        return Ok(Cut { a: a.clone(), b: b.clone(), norm, error: 0.0 });
    }
    let svd = svd_of_product(a, b)?;
    let s = ffi::read::<f32>(&svd.s)?;
    let total = squared(s);
    let rank = size.pick(s, total).unwrap_or(svd.s.dim(0)).max(1);
    let error = if total > 0.0 { (squared(&s[rank as usize..]) / total).sqrt() } else { 0.0 };
    let (a, b) = svd.leading(rank)?.factors()?;
    Ok(Cut { a, b, norm: total.sqrt(), error })
}

/// The sum of squares.
pub(crate) fn squared(values: &[f32]) -> f64 {
    values.iter().map(|x| f64::from(*x).powi(2)).sum()
}

/// Refuses a result with a value that is not finite, evaluating it; `measured` are the numbers that go into the report.
pub(crate) fn check_finite(path: &str, adapter: &Adapter, measured: &[f64]) -> Result<()> {
    ffi::eval(adapter.arrays())?;
    let mut finite = measured.iter().all(|x| x.is_finite());
    for array in adapter.arrays() {
        finite &= ffi::read::<f32>(array)?.iter().all(|x| x.is_finite());
    }
    if finite { Ok(()) } else { Err(Error::UpdateNotFinite { path: path.to_owned() }) }
}

/// Factors in an adapter's orientation of a weight's decomposition (rows, columns).
pub(crate) fn oriented(kind: Kind, svd: &Svd) -> Result<(Array, Array)> {
    let (left, right) = svd.factors()?;
    Ok(match kind {
        Kind::Linear => (right.transpose()?.contiguous()?, left.transpose()?.contiguous()?),
        Kind::Embedding => (left, right),
    })
}

/// The same adapter with columns of zeros up to `rank`, so that all modules of a directory have one rank.
pub(crate) fn padded(adapter: Adapter, rank: i32) -> Result<Adapter> {
    let missing = rank - adapter.rank();
    if missing <= 0 {
        return Ok(adapter);
    }
    let a = mlx_rs::ops::zeros::<f32>(&[adapter.a.dim(0), missing])?;
    let b = mlx_rs::ops::zeros::<f32>(&[missing, adapter.b.dim(1)])?;
    let a = mlx_rs::ops::concatenate(&[&adapter.a, &a], 1)?;
    let b = mlx_rs::ops::concatenate(&[&adapter.b, &b], 0)?;
    Ok(Adapter { a, b, ..adapter })
}
