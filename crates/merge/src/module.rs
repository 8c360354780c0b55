//! The updates of one module by several adapters, as factors and as dense rows.
//!
//! An update (a task vector) is what an adapter adds to W: `s (A B)^T` for LoRA. DoRA's `c * (W + s (A B)^T) - W` is
//! `(c - 1) * W + c * s (A B)^T`, a factor by row and a low-rank part: so a weighted sum of updates is again
//! `c' * (W + L) - W` with `c' = 1 + sum w (c - 1)` and `L = sum w (c / c') * s (A B)^T`, exactly.

use std::ops::Range;

use graft_adapters::{Adapter, Kind};
use graft_ops::linalg::{HostMatrix, Svd, svd_of_product};
use graft_ops::{Array, Dtype, ffi, row_norms};
use graft_quant::Weight;

use crate::{Error, Result, Size};

/// Below this a row's factor c' is a cancellation, and L = .. / c' would be its noise.
const CANCELLED: f32 = 1e-4;
/// Elements of dense rows that are in memory at a time: 4 MB in f32, which the heap has again for the next.
pub(crate) const BLOCK: i32 = 1 << 20;
/// Elements of a row that a thread makes dense at a time, of [`STRIP`] rows: those of a few updates stay in a near cache.
pub(crate) const RUN: usize = 1 << 9;
/// Rows that a thread makes dense at a time.
pub(crate) const STRIP: usize = 8;

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

    /// Shows `look` the rows of all updates, a block of them at a time.
    pub(crate) fn each_block(&self, mut look: impl FnMut(&Rows) -> Result<()>) -> Result<()> {
        let sides = self.parts.iter().map(|part| self.side(part)).collect::<Result<Vec<_>>>()?;
        let (rows, columns) = self.shape();
        // Low-rank parts are made where they are looked at; W's rows are what there is a block of.
        let step = if self.base.is_some() { (BLOCK / columns.max(1)).max(1) } else { rows.max(1) };
        for from in (0..rows).step_by(step as usize) {
            let to = (from + step).min(rows);
            let ids = Array::from_iter(from..to, &[to - from]);
            let base = self.base.as_ref().map(|(w, _)| w.rows(&ids, Dtype::Float32)).transpose()?;
            let base = base.as_ref().map(ffi::read).transpose()?;
            let (first, count) = (from as usize, (to - from) as usize);
            look(&Rows { first, count, columns: columns as usize, sides: &sides, base })?;
        }
        Ok(())
    }

    /// What dense rows of a part's update are made of.
    fn side(&self, part: &Part) -> Result<Side> {
        let Adapter { a, b, scale, .. } = part.adapter;
        let (left, right) = match self.kind {
            Kind::Linear => (b.transpose()?, a.transpose()?),
            Kind::Embedding => (a.clone(), b.clone()),
        };
        let mut left = left.multiply(Array::from_f32(*scale))?;
        let mut turn = None;
        if let Some(c) = &part.factor {
            left = left.multiply(c.expand_dims(1)?)?;
            turn = Some(ffi::read::<f32>(c)?.iter().map(|c| c - 1.0).collect());
        }
        let host = |x: Array| -> Result<Vec<f32>> { Ok(ffi::read(&x.contiguous()?)?.to_vec()) };
        Ok(Side { left: host(left)?, right: host(right)?, turn })
    }

    /// Vectors (columns, R) that span the rows of the low-rank parts.
    pub(crate) fn span(&self) -> Result<Array> {
        let mut spans = Vec::new();
        for part in &self.parts {
            spans.push(match self.kind {
                Kind::Linear => part.adapter.a.clone(),
                Kind::Embedding => part.adapter.b.transpose()?,
            });
        }
        Ok(mlx_rs::ops::concatenate(&spans, 1)?)
    }
}

/// An update in the weight's own orientation: left (rows, R) times right (R, columns), s and DoRA's c in it, and W's rows times
/// c - 1.
struct Side {
    left: Vec<f32>,
    right: Vec<f32>,
    turn: Option<Vec<f32>>,
}

/// A block of rows of all updates.
pub(crate) struct Rows<'a> {
    /// The first of them.
    pub(crate) first: usize,
    pub(crate) count: usize,
    pub(crate) columns: usize,
    sides: &'a [Side],
    /// W's.
    base: Option<&'a [f32]>,
}

impl Rows<'_> {
    /// W's row `row` of the block.
    pub(crate) fn base(&self, row: usize) -> Option<&[f32]> {
        self.base.map(|base| &base[row * self.columns..][..self.columns])
    }

    /// Makes `rows` of the block dense, run by run, in `room`: `look` is told a run's row in the block and its first column, and
    /// gets it of all updates, one after the other.
    pub(crate) fn each_run(
        &self,
        rows: Range<usize>,
        room: &mut Vec<f32>,
        mut look: impl FnMut(usize, usize, &mut [f32]),
    ) {
        for first in rows.clone().step_by(STRIP) {
            let count = STRIP.min(rows.end - first);
            for from in (0..self.columns).step_by(RUN) {
                let width = RUN.min(self.columns - from);
                let all = width * self.sides.len();
                room.resize(count * all, 0.0);
                for (part, side) in self.sides.iter().enumerate() {
                    let right = HostMatrix { values: &side.right, columns: self.columns as i32 };
                    let rank = right.shape().0 as usize;
                    let left = &side.left[(self.first + first) * rank..][..count * rank];
                    let room = &mut room[part * width..];
                    right.times_part(left, (from, width), room, all);
                    let Some(turn) = &side.turn else { continue };
                    for (row, out) in (first..).zip(room.chunks_mut(all)) {
                        let turn = turn[self.first + row];
                        let base = self.base(row).unwrap_or_default();
                        out.iter_mut().zip(&base[from..from + width]).for_each(|(t, w)| *t += turn * w);
                    }
                }
                room.chunks_mut(all).zip(first..).for_each(|(run, row)| look(row, from, run));
            }
        }
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
        let norm = norm_of_product(a, b)?;
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

/// `||A B|| = sqrt(sum of (A^T A) * (B B^T), element by element)`, without the product.
pub(crate) fn norm_of_product(a: &Array, b: &Array) -> Result<f64> {
    let gram = a.transpose()?.matmul(a)?.multiply(b.matmul(b.transpose()?)?)?;
    let squares = gram.sum_axis(0, false)?;
    let squares = ffi::read::<f32>(&squares)?.iter().map(|x| f64::from(*x)).sum::<f64>();
    // Below zero it is rounding; `max` would also make 0 of what is no number.
    Ok(if squares < 0.0 { 0.0 } else { squares.sqrt() })
}

/// The sum of squares, in f64.
pub(crate) fn squared(values: &[f32]) -> f64 {
    dot(values, values)
}

/// The inner product, in f64, as eight sums of every eighth term.
pub(crate) fn dot(x: &[f32], y: &[f32]) -> f64 {
    let mut sums = [0.0; 8];
    for (x, y) in x.chunks(8).zip(y.chunks(8)) {
        sums.iter_mut().zip(x).zip(y).for_each(|((sum, x), y)| *sum += f64::from(*x) * f64::from(*y));
    }
    sums.iter().sum()
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
