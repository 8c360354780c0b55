//! A weight, dense or packed: the one place where the difference is decided.

use graft_ops::ffi::{self, Mode};
use graft_ops::{Array, Dtype, PackedRef, Result};

use crate::Grid;

/// Weights W (out, in) as MLX packs them.
#[derive(Debug, Clone)]
pub struct Packed {
    /// (out, words) u32: codes, a little-endian bit stream by row.
    pub codes: Array,
    /// (out, groups), as stored: f32, f16 or bf16.
    pub scales: Array,
    /// As `scales`.
    pub biases: Array,
    /// Bits and group size.
    pub grid: Grid,
}

impl Packed {
    /// The view that operations take.
    pub fn as_ref(&self) -> PackedRef<'_> {
        PackedRef {
            codes: &self.codes,
            scales: &self.scales,
            biases: &self.biases,
            group_size: self.grid.group_size,
            bits: self.grid.bits,
        }
    }

    /// W (out, in) in `dtype`, computed in f32 and rounded once.
    ///
    /// # Errors
    /// When the parts do not fit together.
    pub fn dequantize(&self, dtype: Dtype) -> Result<Array> {
        let (scales, biases) = (self.scales.as_dtype(Dtype::Float32)?, self.biases.as_dtype(Dtype::Float32)?);
        let grid = self.grid;
        let dense = ffi::dequantize(
            &self.codes,
            &scales,
            Some(&biases),
            grid.group_size,
            grid.bits,
            Mode::Affine,
            Dtype::Float32,
        )?;
        dense.as_dtype(dtype)
    }

    /// Rows `from..to`.
    fn slice(&self, ids: &Array) -> Result<Packed> {
        Ok(Packed {
            codes: self.codes.take_axis(ids, 0)?,
            scales: self.scales.take_axis(ids, 0)?,
            biases: self.biases.take_axis(ids, 0)?,
            grid: self.grid,
        })
    }
}

/// W (out, in) of a linear, or E (V, E) of an embedding.
#[derive(Debug, Clone)]
pub enum Weight {
    /// Floats.
    Dense(Array),
    /// Codes.
    Packed(Packed),
}

/// Weights looked at together where a dense copy is needed for a moment: 16 MB in f32.
const BLOCK: i32 = 1 << 22;

impl Weight {
    /// Rows of W.
    pub fn out_features(&self) -> i32 {
        match self {
            Self::Dense(w) => w.dim(0),
            Self::Packed(w) => w.codes.dim(0),
        }
    }

    /// Columns of W, unpacked.
    pub fn in_features(&self) -> i32 {
        match self {
            Self::Dense(w) => w.dim(1),
            Self::Packed(w) => w.scales.dim(1) * w.grid.group_size,
        }
    }

    /// Whether it is packed.
    pub fn is_packed(&self) -> bool {
        matches!(self, Self::Packed(_))
    }

    /// Bytes in memory.
    pub fn nbytes(&self) -> usize {
        match self {
            Self::Dense(w) => w.nbytes(),
            Self::Packed(w) => w.codes.nbytes() + w.scales.nbytes() + w.biases.nbytes(),
        }
    }

    /// x W^T: x (..., in) gives (..., out).
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn matmul(&self, x: &Array) -> Result<Array> {
        match self {
            Self::Dense(w) => graft_ops::dense_matmul(x, w),
            Self::Packed(w) => graft_ops::packed_matmul(x, w.as_ref()),
        }
    }

    /// x W: x (..., out) gives (..., in).
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn matmul_t(&self, x: &Array) -> Result<Array> {
        match self {
            Self::Dense(w) => graft_ops::dense_matmul_t(x, w),
            Self::Packed(w) => graft_ops::packed_matmul_t(x, w.as_ref()),
        }
    }

    /// Rows `ids` (N,) as (N, in) in `dtype`.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn rows(&self, ids: &Array, dtype: Dtype) -> Result<Array> {
        match self {
            Self::Dense(w) => w.take_axis(ids, 0)?.as_dtype(dtype),
            Self::Packed(w) => graft_ops::packed_rows(ids, w.as_ref(), dtype),
        }
    }

    /// W dense in `dtype`.
    ///
    /// # Errors
    /// When the parts do not fit together.
    pub fn dequantize(&self, dtype: Dtype) -> Result<Array> {
        match self {
            Self::Dense(w) => w.as_dtype(dtype),
            Self::Packed(w) => w.dequantize(dtype),
        }
    }

    /// ||W_o||^2 of each row, f32 (out,). Dense copies exist of a block of rows at a time. Evaluates.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn row_norms_squared(&self) -> Result<Array> {
        let (out, input) = (self.out_features(), self.in_features());
        let step = (BLOCK / input.max(1)).clamp(1, out.max(1));
        let mut blocks = Vec::new();
        let mut from = 0;
        while from < out {
            let to = (from + step).min(out);
            let ids = Array::from_iter(from..to, &[to - from]);
            let rows = match self {
                Self::Dense(w) => w.take_axis(&ids, 0)?.as_dtype(Dtype::Float32)?,
                Self::Packed(w) => w.slice(&ids)?.dequantize(Dtype::Float32)?,
            };
            let squared = rows.square()?.sum_axis(1, false)?;
            squared.eval()?;
            blocks.push(squared);
            from = to;
        }
        let all = mlx_rs::ops::concatenate(&blocks, 0)?;
        all.eval()?;
        Ok(all)
    }

    /// Computes its arrays, if they are not yet.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn eval(&self) -> Result<()> {
        match self {
            Self::Dense(w) => w.eval(),
            Self::Packed(w) => mlx_rs::transforms::eval([&w.codes, &w.scales, &w.biases]),
        }
    }
}
