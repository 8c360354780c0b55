//! Keys and values of the tokens a sequence has seen.

use graft_ops::{Array, CachedRow, Dtype, Result};
use mlx_rs::ops::indexing::{TryIndexMutOp as _, TryIndexOp as _};

use crate::Model;

/// Tokens by which a buffer grows, so that most steps write in place.
const STEP: i32 = 256;

/// The cache of one sequence. Each block holds keys and values (K, capacity, D) of which `len` tokens are valid.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<Layer>,
    len: i32,
    shape: (i32, i32),
    dtype: Dtype,
}

#[derive(Debug, Default)]
struct Layer {
    kv: Option<(Array, Array)>,
}

impl KvCache {
    /// An empty cache for `model`.
    pub fn new(model: &Model) -> Self {
        let config = model.config();
        let layers = (0..config.layers).map(|_| Layer::default()).collect();
        Self { layers, len: 0, shape: (config.kv_heads, config.head_dim), dtype: model.dtype() }
    }

    /// S, tokens seen.
    pub fn len(&self) -> i32 {
        self.len
    }

    /// No tokens yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets the tokens from `len` on.
    pub fn trim(&mut self, len: i32) {
        self.len = self.len.min(len.max(0));
    }

    /// Bytes that the buffers take.
    pub fn nbytes(&self) -> usize {
        self.layers.iter().flat_map(|l| &l.kv).map(|(k, v)| k.nbytes() + v.nbytes()).sum()
    }

    /// The buffers, for evaluation.
    pub fn arrays(&self) -> impl Iterator<Item = &Array> {
        self.layers.iter().flat_map(|l| &l.kv).flat_map(|(k, v)| [k, v])
    }

    /// Writes keys and values (n, K, D) of new tokens behind the valid ones of block `index`; `advance` makes them count.
    pub(crate) fn append(&mut self, index: usize, k: &Array, v: &Array) -> Result<()> {
        let (start, end) = (self.len, self.len + k.dim(0));
        let (heads, dim) = self.shape;
        let dtype = self.dtype;
        let grown = |old: Option<Array>| -> Result<Array> {
            let capacity = old.as_ref().map_or(0, |a| a.dim(1));
            if end <= capacity
                && let Some(old) = old
            {
                return Ok(old);
            }
            let target = (end + STEP - 1) / STEP * STEP;
            let more = mlx_rs::ops::zeros::<f32>(&[heads, target - capacity, dim])?.as_dtype(dtype)?;
            match old {
                Some(old) => mlx_rs::ops::concatenate(&[old, more], 1),
                None => Ok(more),
            }
        };
        let layer = &mut self.layers[index];
        let (old_k, old_v) = layer.kv.take().unzip();
        let (mut keys, mut values) = (grown(old_k)?, grown(old_v)?);
        keys.try_index_mut((.., start..end, ..), k.swap_axes(0, 1)?)?;
        values.try_index_mut((.., start..end, ..), v.swap_axes(0, 1)?)?;
        layer.kv = Some((keys, values));
        Ok(())
    }

    /// What attention reads in block `index` once `new` tokens have been appended.
    pub(crate) fn row(&self, index: usize, new: i32) -> Option<CachedRow<'_>> {
        let (k, v) = self.layers.get(index)?.kv.as_ref()?;
        Some(CachedRow { k, v, len: self.len + new })
    }

    pub(crate) fn advance(&mut self, new: i32) {
        self.len += new;
    }
}

/// Rows `start..end` of the first axis.
pub(crate) fn rows_of(x: &Array, start: i32, end: i32) -> Result<Array> {
    x.try_index(start..end)
}
