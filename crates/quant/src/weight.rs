//! A weight, dense or packed: the one place where the difference is decided.

use graft_ops::ffi;
use graft_ops::{Arranged, Array, Dtype, Exception, PackedRef, Result, WeightRef};

use crate::Grid;

/// Weights W (out, in) as MLX packs them.
#[derive(Debug, Clone)]
pub struct Packed {
    /// (out, words) u32: codes, a little-endian bit stream by row.
    pub codes: Array,
    /// (out, groups), as stored: f32, f16 or bf16; u8 in the modes of floats.
    pub scales: Array,
    /// As `scales`; only the affine mode has them.
    pub biases: Option<Array>,
    /// Bits, group size and mode.
    pub grid: Grid,
}

impl Packed {
    /// The view that operations take.
    pub fn as_ref(&self) -> PackedRef<'_> {
        PackedRef {
            codes: &self.codes,
            scales: &self.scales,
            biases: self.biases.as_ref(),
            group_size: self.grid.group_size,
            bits: self.grid.bits,
            mode: self.grid.mode,
        }
    }

    /// Codes, scales and, where there are any, biases, with the names of their tensors after the module's path.
    pub fn parts(&self) -> impl Iterator<Item = (&'static str, &Array)> {
        let biases = self.biases.as_ref().map(|biases| ("biases", biases));
        [("weight", &self.codes), ("scales", &self.scales)].into_iter().chain(biases)
    }

    /// As `parts` give them, each made anew.
    ///
    /// # Errors
    /// As `f`.
    pub fn map(&self, mut f: impl FnMut(&Array) -> Result<Array>) -> Result<Packed> {
        let (codes, scales) = (f(&self.codes)?, f(&self.scales)?);
        Ok(Packed { codes, scales, biases: self.biases.as_ref().map(f).transpose()?, grid: self.grid })
    }

    /// The distance of two neighbouring weights in each group, f32 (out, groups): see [`Grid::step`].
    ///
    /// # Errors
    /// When the parts do not fit together.
    pub fn steps(&self) -> crate::Result<Array> {
        let [scales, _] = crate::Levels::from(self).host(self.grid.mode)?;
        let step = self.grid.step();
        Ok(Array::from_iter(scales.iter().map(|scale| scale * step), self.scales.shape()))
    }

    /// W (out, in) in `dtype`, computed in f32 and rounded once.
    ///
    /// # Errors
    /// When the parts do not fit together.
    pub fn dequantize(&self, dtype: Dtype) -> Result<Array> {
        graft_ops::dequantize(self.as_ref(), dtype)
    }
}

/// W (out, in) of a linear, or E (V, E) of an embedding.
#[derive(Debug, Clone)]
pub enum Weight {
    /// Floats.
    Dense(Array),
    /// Codes.
    Packed(Packed),
    /// Codes, laid out for inference on a CPU.
    Arranged(Arranged),
}

/// Weights looked at together where a dense copy is needed for a moment: 4 MB in f32, which the heap has again for the next.
const BLOCK: i32 = 1 << 20;

impl Weight {
    /// Rows of W.
    pub fn out_features(&self) -> i32 {
        match self {
            Self::Dense(w) => w.dim(0),
            Self::Packed(w) => w.codes.dim(0),
            Self::Arranged(w) => w.shape().0,
        }
    }

    /// Columns of W, unpacked.
    pub fn in_features(&self) -> i32 {
        match self {
            Self::Dense(w) => w.dim(1),
            Self::Packed(w) => w.scales.dim(1) * w.grid.group_size,
            Self::Arranged(w) => w.shape().1,
        }
    }

    /// Bytes in memory.
    pub fn nbytes(&self) -> usize {
        match self {
            Self::Dense(w) => w.nbytes(),
            Self::Packed(w) => w.parts().map(|(_, array)| array.nbytes()).sum(),
            Self::Arranged(w) => w.arrays().iter().map(Array::nbytes).sum(),
        }
    }

    /// The view that operations take.
    pub fn as_ref(&self) -> WeightRef<'_> {
        match self {
            Self::Dense(w) => WeightRef::Dense(w),
            Self::Packed(w) => WeightRef::Packed(w.as_ref()),
            Self::Arranged(w) => WeightRef::Arranged(w),
        }
    }

    /// x W^T: x (..., in) gives (..., out).
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn matmul(&self, x: &Array) -> Result<Array> {
        graft_ops::matmul(x, self.as_ref())
    }

    /// x W: x (..., out) gives (..., in).
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn matmul_t(&self, x: &Array) -> Result<Array> {
        graft_ops::matmul_t(x, self.as_ref())
    }

    /// Rows `ids` (N,) as (N, in) in `dtype`.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn rows(&self, ids: &Array, dtype: Dtype) -> Result<Array> {
        graft_ops::rows(ids, self.as_ref(), dtype)
    }

    /// W dense in `dtype`.
    ///
    /// # Errors
    /// When the parts do not fit together.
    pub fn dequantize(&self, dtype: Dtype) -> Result<Array> {
        match self {
            Self::Dense(w) => w.as_dtype(dtype),
            Self::Packed(w) => w.dequantize(dtype),
            Self::Arranged(w) => {
                let out = w.shape().0;
                self.rows(&Array::from_iter(0..out, &[out]), dtype)
            }
        }
    }

    /// All rows in runs, ids (N,) each, of which a dense copy in f32 takes 4 MB at most.
    pub fn row_blocks(&self) -> impl Iterator<Item = Array> + use<> {
        let (out, step) = (self.out_features(), (BLOCK / self.in_features().max(1)).max(1));
        (0..out).step_by(step as usize).map(move |from| {
            let to = (from + step).min(out);
            Array::from_iter(from..to, &[to - from])
        })
    }

    /// The weight of rows `ids` (N,) alone, in the same form.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn slice(&self, ids: &Array) -> Result<Weight> {
        let take = |array: &Array| array.take_axis(ids, 0);
        Ok(match self {
            Self::Dense(w) => Self::Dense(take(w)?),
            Self::Packed(w) => Self::Packed(w.map(take)?),
            Self::Arranged(_) => {
                return Err(Exception::custom("weights laid out for inference have no slices"));
            }
        })
    }

    /// The same weight in the form that inference reads fastest with the precision in use; itself where that is this one.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn arranged(self) -> Result<Self> {
        let Self::Packed(w) = &self else { return Ok(self) };
        Ok(graft_ops::arrange(w.as_ref())?.map_or(self, Self::Arranged))
    }

    /// ||W_o||^2 of each row, f32 (out,). Dense copies exist of a block of rows at a time. Evaluates.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn row_norms_squared(&self) -> Result<Array> {
        let mut blocks = Vec::new();
        for ids in self.row_blocks() {
            let squared = graft_ops::row_squares(&self.rows(&ids, Dtype::Float32)?)?;
            ffi::eval([&squared])?;
            blocks.push(squared);
        }
        let all = mlx_rs::ops::concatenate(&blocks, 0)?;
        ffi::eval([&all])?;
        Ok(all)
    }

    /// Computes its arrays, if they are not yet.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn evaluate(&self) -> Result<()> {
        match self {
            Self::Dense(w) => ffi::eval([w]),
            Self::Packed(w) => ffi::eval(w.parts().map(|(_, array)| array)),
            Self::Arranged(w) => ffi::eval(w.arrays()),
        }
    }
}
