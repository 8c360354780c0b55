//! Keys and values of the tokens a sequence has seen.

use graft_ops::{Array, KeyValues, Result};
use mlx_rs::ops::indexing::TryIndexOp as _;

use crate::Model;

/// The cache of one sequence: the keys and values of its tokens in every block.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<KeyValues>,
    len: i32,
}

impl KvCache {
    /// An empty cache for `model`.
    pub fn new(model: &Model) -> Self {
        let layers = (0..model.config().layers).map(|_| KeyValues::default()).collect();
        Self { layers, len: 0 }
    }

    /// S, tokens seen.
    pub fn len(&self) -> i32 {
        self.len
    }

    /// No tokens yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that a cache of `tokens` tokens takes at most.
    pub fn bytes_for(model: &Model, tokens: usize) -> usize {
        let c = model.config();
        let heads = (usize::try_from(c.kv_heads).unwrap_or(0), usize::try_from(c.head_dim).unwrap_or(0));
        KeyValues::bytes_for(tokens, heads, model.dtype()) * usize::try_from(c.layers).unwrap_or(0)
    }

    /// How many tokens a cache of `bytes` bytes holds.
    pub fn capacity(model: &Model, bytes: usize) -> usize {
        let step = KeyValues::step(model.dtype());
        bytes / Self::bytes_for(model, 1).max(1) * step
    }

    /// The same first `len` tokens for another sequence, which goes its own way from there; both share what they have in
    /// common, as [`KeyValues::fork`] says.
    pub fn fork(&mut self, len: i32) -> Self {
        let len = len.clamp(0, self.len);
        Self { layers: self.layers.iter_mut().map(|layer| layer.fork(len)).collect(), len }
    }

    /// Bytes that the buffers take.
    pub fn nbytes(&self) -> usize {
        self.layers.iter().map(KeyValues::nbytes).sum()
    }

    /// The buffers, for evaluation.
    pub fn arrays(&self) -> impl Iterator<Item = &Array> {
        self.layers.iter().flat_map(KeyValues::arrays)
    }

    /// What block `index` appends to and reads.
    pub(crate) fn layer(&mut self, index: usize) -> Option<&mut KeyValues> {
        self.layers.get_mut(index)
    }

    pub(crate) fn advance(&mut self, new: i32) {
        self.len += new;
    }
}

/// Rows `start..end` of the first axis.
pub(crate) fn rows_of(x: &Array, start: i32, end: i32) -> Result<Array> {
    x.try_index(start..end)
}
