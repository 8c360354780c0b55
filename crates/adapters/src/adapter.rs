//! One low-rank update: its tensors and the formulas that every other place uses.

use graft_ops::linalg::svd_of_product;
use graft_ops::{Array, Dtype, Result, ffi, row_factor, row_norms};
use graft_quant::Weight;

use crate::{Site, Target};

/// The update of one weight; DoRA when `magnitude` is there, LoRA when it is not.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// A, f32: (in, R) of a linear, (V, R) of an embedding.
    pub a: Array,
    /// B, f32: (R, out) of a linear, (R, E) of an embedding.
    pub b: Array,
    /// s, the factor of the product A B; mlx-lm's raw `scale`, PEFT's alpha / R (rsLoRA: alpha / sqrt(R)).
    pub scale: f32,
    /// DoRA's m, f32 (out,).
    pub magnitude: Option<Array>,
}

/// Which of the two orientations A and B have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// W (out, in), A (in, R), B (R, out).
    Linear,
    /// E (V, E), A (V, R), B (R, E).
    Embedding,
}

impl Kind {
    /// The orientation in which A of `rows` rows and B of `columns` columns fit a weight of `out` x `input`, or none if they
    /// fit neither way.
    ///
    /// A square weight fits both ways; `path` decides then (`embed_tokens` is an embedding).
    pub fn of(path: &str, (rows, columns): (i32, i32), (out, input): (i32, i32)) -> Option<Self> {
        let linear = (rows, columns) == (input, out);
        let embedding = (rows, columns) == (out, input);
        match (linear, embedding) {
            (true, true) if path.ends_with("embed_tokens") => Some(Self::Embedding),
            (true, _) => Some(Self::Linear),
            (false, true) => Some(Self::Embedding),
            (false, false) => None,
        }
    }
}

impl Adapter {
    /// A fresh adapter: A uniform in ±1/sqrt(in) (in = V for an embedding), B zero, m the row norms of W when `dora`.
    ///
    /// The start is mlx-lm's; with B = 0 the adapter is the identity. `n0` is [`Weight::row_norms_squared`].
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn init(
        kind: Kind,
        (out, input): (i32, i32),
        rank: i32,
        scale: f32,
        n0: Option<&Array>,
        key: &Array,
    ) -> Result<Self> {
        let (rows, cols) = match kind {
            Kind::Linear => (input, out),
            Kind::Embedding => (out, input),
        };
        let bound = 1.0 / (rows as f32).sqrt();
        let a = mlx_rs::random::uniform::<_, f32>(-bound, bound, &[rows, rank][..], key)?;
        let b = mlx_rs::ops::zeros::<f32>(&[rank, cols])?;
        let magnitude = n0.map(|n0| n0.sqrt()).transpose()?;
        Ok(Self { a, b, scale, magnitude })
    }

    /// R.
    pub fn rank(&self) -> i32 {
        self.b.dim(0)
    }

    /// The orientation in which this adapter fits a weight of `out` x `input`, or none if it fits neither way.
    pub fn kind(&self, path: &str, shape: (i32, i32)) -> Option<Kind> {
        Kind::of(path, (self.a.dim(0), self.b.dim(1)), shape)
    }

    /// The adapter of the weight's rows `ids` (N,) alone; rows depend on no other row.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn rows(&self, kind: Kind, ids: &Array) -> Result<Self> {
        let (a, b) = match kind {
            Kind::Linear => (self.a.clone(), self.b.take_axis(ids, 1)?),
            Kind::Embedding => (self.a.take_axis(ids, 0)?, self.b.clone()),
        };
        let magnitude = self.magnitude.as_ref().map(|m| m.take_axis(ids, 0)).transpose()?;
        Ok(Self { a, b, scale: self.scale, magnitude })
    }

    /// The update s A B in the weight's own orientation, f32 (out, in) or (V, E).
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn delta(&self, kind: Kind) -> Result<Array> {
        let product = match kind {
            Kind::Linear => self.b.transpose()?.matmul(self.a.transpose()?)?,
            Kind::Embedding => self.a.matmul(&self.b)?,
        };
        product.multiply(Array::from_f32(self.scale))
    }

    /// The fused weight in f32: `W + s (A B)^T`, for DoRA with each row scaled to its magnitude.
    ///
    /// `weight` is W in f32; the norm is that of the sum itself, so no rounding stands between the two.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn fused(&self, weight: &Array, kind: Kind) -> Result<Array> {
        Ok(self.fused_by(weight, kind)?.0)
    }

    /// [`Adapter::fused`], and DoRA's factor c, f32 (out,), by which its rows were multiplied.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn fused_by(&self, weight: &Array, kind: Kind) -> Result<(Array, Option<Array>)> {
        let sum = weight.as_dtype(Dtype::Float32)?.add(self.delta(kind)?)?;
        let Some(m) = &self.magnitude else { return Ok((sum, None)) };
        let n = sum.square()?.sum_axis(1, false)?.sqrt()?;
        let factor = row_factor(m, &n)?;
        Ok((sum.multiply(factor.expand_dims(1)?)?, Some(factor)))
    }

    /// DoRA's factor c = m / n on `weight`, f32 (out,); none for LoRA.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn factor(&self, weight: &Weight) -> Result<Option<Array>> {
        if self.magnitude.is_none() {
            return Ok(None);
        }
        self.factor_with(weight, &weight.row_norms_squared()?)
    }

    /// The same where [`Weight::row_norms_squared`] is known already.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn factor_with(&self, weight: &Weight, n0: &Array) -> Result<Option<Array>> {
        let Some(m) = &self.magnitude else { return Ok(None) };
        let n = row_norms(&self.a, &self.b, self.scale, weight.as_ref(), n0)?;
        Ok(Some(row_factor(m, &n)?))
    }

    /// What a forward pass needs of this update of a module, nothing evaluated yet.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn site(&self, target: &Target) -> Result<Site> {
        let factor = self.factor(target.weight)?;
        let arranged = match target.kind {
            Kind::Linear => graft_ops::arrange_update(target.weight.as_ref(), &self.a, &self.b)?,
            Kind::Embedding => None,
        };
        let (a, b) = arranged.unwrap_or_else(|| (self.a.clone(), self.b.clone()));
        Ok(Site { a, b, scale: self.scale, factor, dropout: None })
    }

    /// The singular values of s A B, from the largest down; there are R of them, or fewer where the matrix has fewer.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn spectrum(&self) -> Result<Vec<f32>> {
        let s = svd_of_product(&self.a, &self.b)?.s;
        Ok(ffi::read::<f32>(&s)?.iter().map(|s| s * self.scale.abs()).collect())
    }

    /// All arrays of the adapter, for evaluation.
    pub fn arrays(&self) -> impl Iterator<Item = &Array> {
        [&self.a, &self.b].into_iter().chain(&self.magnitude)
    }
}
