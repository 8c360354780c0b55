//! Causal attention over rows of different length, with grouped key/value heads.

#[cfg(graft_cpu)]
use std::sync::Arc;

use mlx_rs::fast::{self, ScaledDotProductAttentionMask as Mask};
use mlx_rs::ops;
use mlx_rs::ops::indexing::TryIndexMutOp as _;

#[cfg(graft_cpu)]
use crate::cpu::{
    attention::{Causal, Heads, KEYS},
    cached::{Cached, CachedSequence, KvBlock},
    primitive::apply,
    rope::Angles,
};
#[cfg(graft_cpu)]
use crate::form::on_cpu;
use crate::rope::mlx_rotated;
use crate::{Array, Dtype, Exception, Result, RopeTable, Rows};

/// The keys and values of one sequence in one layer. How they are laid out is the business of [`attention_cached`].
#[derive(Default)]
pub struct KeyValues {
    /// MLX's form: (1, K, capacity, D) each.
    kv: Option<(Array, Array)>,
    /// Ours.
    #[cfg(graft_cpu)]
    blocks: Vec<Arc<KvBlock>>,
    /// So many of the first blocks are another sequence's too: neither side writes them any more, but a copy.
    #[cfg(graft_cpu)]
    shared: usize,
    /// An output of the last operation that wrote to the blocks and an input of the next one, so that MLX, which sees no
    /// other connection between them, runs them in this order.
    #[cfg(graft_cpu)]
    written: Option<Array>,
}

impl std::fmt::Debug for KeyValues {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeyValues").field("nbytes", &self.nbytes()).finish()
    }
}

impl KeyValues {
    /// What has to be evaluated for new tokens to be in the buffers, besides the outputs of [`attention_cached`].
    pub fn arrays(&self) -> impl Iterator<Item = &Array> {
        let arrays = self.kv.iter().flat_map(|(k, v)| [k, v]);
        #[cfg(graft_cpu)]
        let arrays = arrays.chain(&self.written);
        arrays
    }

    /// Bytes that the buffers take.
    pub fn nbytes(&self) -> usize {
        let bytes: usize = self.kv.iter().map(|(k, v)| k.nbytes() + v.nbytes()).sum();
        #[cfg(graft_cpu)]
        let bytes = bytes + self.blocks.iter().map(|block| block.nbytes()).sum::<usize>();
        bytes
    }

    /// Tokens by which buffers of activations of `dtype` grow.
    pub fn step(dtype: Dtype) -> usize {
        #[cfg(graft_cpu)]
        if dtype == Dtype::Float32 && crate::form() == crate::Form::Cpu {
            return KEYS;
        }
        let _ = dtype;
        STEP as usize
    }

    /// Bytes that the buffers of `tokens` tokens of K heads of D take, (K, D) given.
    pub fn bytes_for(tokens: usize, (kv_heads, dim): (usize, usize), dtype: Dtype) -> usize {
        let step = Self::step(dtype);
        let tokens = tokens.div_ceil(step) * step;
        #[cfg(graft_cpu)]
        if step == KEYS {
            let heads = Heads { heads: kv_heads, kv_heads, dim, scale: 1.0 };
            return 4 * 2 * tokens * kv_heads * heads.width();
        }
        2 * tokens * kv_heads * dim * if dtype == Dtype::Float32 { 4 } else { 2 }
    }

    /// The same first `len` tokens for another sequence, which goes its own way from there. Memory is shared as far as
    /// it stays the same.
    pub fn fork(&mut self, len: i32) -> KeyValues {
        // MLX's buffers are shared whole: writing to one copies it, and what is behind `len` is written over.
        #[cfg(not(graft_cpu))]
        let _ = len;
        #[cfg(graft_cpu)]
        let common = (len.max(0) as usize).div_ceil(KEYS).min(self.blocks.len());
        #[cfg(graft_cpu)]
        {
            self.shared = self.shared.max(common);
        }
        KeyValues {
            kv: self.kv.clone(),
            #[cfg(graft_cpu)]
            blocks: self.blocks[..common].to_vec(),
            #[cfg(graft_cpu)]
            shared: common,
            #[cfg(graft_cpu)]
            written: self.written.clone(),
        }
    }

    /// MLX's form: appends k and v (1, K, n, D) behind the first `len` tokens of buffers (1, K, capacity, D), and gives the
    /// keys and values (1, K, len + n, D) of all tokens.
    fn mlx_append(&mut self, k: &Array, v: &Array, len: i32) -> Result<(Array, Array)> {
        let end = len + k.dim(2);
        let appended = |old: Option<Array>, new: &Array| -> Result<Array> {
            let capacity = old.as_ref().map_or(0, |a| a.dim(2));
            let mut buffer = match old {
                Some(old) if end <= capacity => old,
                old => {
                    let target = (end + STEP - 1) / STEP * STEP;
                    let shape = [1, new.dim(1), target - capacity, new.dim(3)];
                    let more = ops::zeros_dtype(&shape, new.dtype())?;
                    old.map_or(Ok(more.clone()), |old| ops::concatenate(&[old, more], 2))?
                }
            };
            buffer.try_index_mut((.., .., len..end, ..), new)?;
            Ok(buffer)
        };
        let (old_k, old_v) = self.kv.take().unzip();
        let (keys, values) = (appended(old_k, k)?, appended(old_v, v)?);
        let valid = |x: &Array| -> Result<Array> { Ok(ops::split_at_indices(x, &[end], 2)?.swap_remove(0)) };
        let all = (valid(&keys)?, valid(&values)?);
        self.kv = Some((keys, values));
        Ok(all)
    }
}

/// Tokens by which a buffer grows, so that most steps write in place.
const STEP: i32 = 256;

/// How wide a head is, the factor of its scores, and how queries and keys are rotated.
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    /// D.
    pub dim: i32,
    /// Usually 1 / sqrt(D).
    pub scale: f32,
    /// Rotary positions, where there are some.
    pub rope: Option<&'a RopeTable>,
}

impl Head<'_> {
    /// x (B, heads, L, D), whose sequences begin at `starts`.
    fn rotated(&self, x: &Array, starts: &[i32]) -> Result<Array> {
        self.rope.map_or(Ok(x.clone()), |table| mlx_rotated(x, starts, table))
    }

    #[cfg(graft_cpu)]
    fn angles(&self, rows: &Rows) -> Result<Option<Angles>> {
        self.rope.map(|table| table.angles(rows)).transpose()
    }
}

/// H and K of q (N, H D) and k and v (N, K D), which have to fit each other and the rows.
fn heads_of(q: &Array, k: &Array, v: &Array, rows: &Rows, head: Head) -> Result<(i32, i32)> {
    let wrong = |what: &str| {
        let (q, k, v) = (q.shape(), k.shape(), v.shape());
        Err(Exception::custom(format!(
            "attention: queries {q:?}, keys {k:?} and values {v:?} of heads of {} {what}",
            head.dim
        )))
    };
    let (&[tokens, q_width], &[kv_tokens, kv_width]) = (q.shape(), k.shape()) else {
        return wrong("must have two dimensions");
    };
    if kv_tokens != tokens || v.shape() != k.shape() {
        return wrong("do not fit together");
    }
    if head.dim <= 0
        || q_width % head.dim != 0
        || kv_width % head.dim != 0
        || kv_width == 0
        || q_width % kv_width != 0
    {
        return wrong("do not fit together");
    }
    if head.rope.is_some_and(|table| table.dims > head.dim) {
        return wrong("have fewer dimensions than are to be rotated");
    }
    rows.check(tokens)?;
    Ok((q_width / head.dim, kv_width / head.dim))
}

/// o = softmax(scale * q k^T) v for each head, after the rotation of q and k, causal inside each row: q (N, H D), k and v (N, K D) give (N, H D) in the
/// type of q. Query head h reads key head h / (H / K). Differentiable in q, k and v. Rows start at position 0.
pub fn attention(q: &Array, k: &Array, v: &Array, rows: &Rows, head: Head) -> Result<Array> {
    let (heads, kv_heads) = heads_of(q, k, v, rows, head)?;
    if rows.starts.iter().any(|&start| start != 0) {
        return Err(Exception::custom("attention: rows with cached tokens need attention_cached"));
    }
    #[cfg(graft_cpu)]
    if on_cpu(&[q, k, v]) {
        let starts = rows.lengths.iter().scan(0, |at, &length| {
            let start = *at;
            *at += length as usize;
            Some((start, length as usize))
        });
        let heads = cpu_heads(heads, kv_heads, head);
        return Causal { heads, rows: Arc::new(starts.collect()), angles: head.angles(rows)? }.apply(q, k, v);
    }
    let mut outputs = Vec::new();
    for [q, k, v] in mlx_folded([(q, heads), (k, kv_heads), (v, kv_heads)], rows, head)? {
        outputs.push(mlx_causal(&q, &k, &v, head.scale)?);
    }
    joined(q, &outputs)
}

/// Queries, keys and values as MLX's operation takes them, (B, heads, L, D), q and k rotated: all rows together where they
/// have one length, otherwise each alone.
fn mlx_folded(parts: [(&Array, i32); 3], rows: &Rows, head: Head) -> Result<Vec<[Array; 3]>> {
    let group = |parts: [(&Array, i32); 3], starts: &[i32]| -> Result<[Array; 3]> {
        let fold = |(x, n): (&Array, i32)| {
            x.reshape(&[starts.len() as i32, -1, n, head.dim])?.transpose_axes(&[0, 2, 1, 3])
        };
        let [q, k, v] = parts;
        Ok([head.rotated(&fold(q)?, starts)?, head.rotated(&fold(k)?, starts)?, fold(v)?])
    };
    match rows.equal_length() {
        Some(0) => Ok(vec![]),
        Some(_) => Ok(vec![group(parts, &rows.starts)?]),
        None => {
            let [q, k, v] = parts;
            let split = |x: &Array| ops::split_at_indices(x, &rows.borders(), 0);
            let (qs, ks, vs) = (split(q.0)?, split(k.0)?, split(v.0)?);
            let rows = qs.iter().zip(&ks).zip(&vs).zip(rows.starts.chunks(1));
            let held = rows.filter(|(((q, _), _), _)| q.dim(0) > 0);
            held.map(|(((a, b), c), start)| group([(a, q.1), (b, k.1), (c, v.1)], start)).collect()
        }
    }
}

/// Outputs (B, H, L, D), one after another, as rows (N, H D) of q's shape.
fn joined(q: &Array, outputs: &[Array]) -> Result<Array> {
    let rows = |o: &Array| o.transpose_axes(&[0, 2, 1, 3])?.reshape(&[-1, q.dim(1)]);
    match outputs {
        [] => Ok(q.clone()),
        [one] => rows(one),
        many => ops::concatenate(&many.iter().map(rows).collect::<Result<Vec<_>>>()?, 0),
    }
}

/// The same for new tokens that follow `starts` cached ones: q (N, H D), k and v (N, K D) of all rows and one cache per row,
/// to which k and v are appended. (N, H D) in the type of q. Has no gradient.
pub fn attention_cached(
    q: &Array,
    k: &Array,
    v: &Array,
    caches: &mut [&mut KeyValues],
    rows: &Rows,
    head: Head,
) -> Result<Array> {
    let (heads, kv_heads) = heads_of(q, k, v, rows, head)?;
    if caches.len() != rows.lengths.len() {
        let (rows, caches) = (rows.lengths.len(), caches.len());
        return Err(Exception::custom(format!("attention: {rows} rows have {caches} caches")));
    }
    #[cfg(graft_cpu)]
    if on_cpu(&[q, k, v]) {
        return cpu_cached((q, k, v), caches, rows, (cpu_heads(heads, kv_heads, head), head.angles(rows)?));
    }
    let mut sequences = Vec::with_capacity(caches.len());
    for group in mlx_folded([(q, heads), (k, kv_heads), (v, kv_heads)], rows, head)? {
        let [qs, ks, vs] = match group[0].dim(0) {
            1 => group.map(|x| vec![x]),
            batch => {
                let [q, k, v] = group;
                let each = |x: &Array| ops::split_equal(x, batch, 0);
                [each(&q)?, each(&k)?, each(&v)?]
            }
        };
        sequences.extend(qs.into_iter().zip(ks.into_iter().zip(vs)));
    }
    let held = caches.iter_mut().zip(&rows.starts).zip(&rows.lengths).filter(|(_, length)| **length > 0);
    let mut outputs = Vec::with_capacity(sequences.len());
    for (((cache, &start), _), (q, (k, v))) in held.zip(sequences) {
        let (keys, values) = cache.mlx_append(&k, &v, start)?;
        outputs.push(mlx_causal(&q, &keys, &values, head.scale)?);
    }
    joined(q, &outputs)
}

#[cfg(graft_cpu)]
fn cpu_heads(heads: i32, kv_heads: i32, head: Head) -> Heads {
    Heads { heads: heads as usize, kv_heads: kv_heads as usize, dim: head.dim as usize, scale: head.scale }
}

#[cfg(graft_cpu)]
fn cpu_cached(
    (q, k, v): (&Array, &Array, &Array),
    caches: &mut [&mut KeyValues],
    rows: &Rows,
    (heads, angles): (Heads, Option<Angles>),
) -> Result<Array> {
    let mut sequences = Vec::with_capacity(caches.len());
    for (cache, (&length, &before)) in caches.iter_mut().zip(rows.lengths.iter().zip(&rows.starts)) {
        let (length, before) = (length as usize, before as usize);
        if before > cache.blocks.len() * KEYS {
            let blocks = cache.blocks.len();
            return Err(Exception::custom(format!(
                "attention: {before} tokens are not in {blocks} blocks of a cache"
            )));
        }
        // The first block that is written; what comes after it was forgotten.
        let written = before / KEYS;
        cache.blocks.truncate(before.div_ceil(KEYS));
        cache.shared = cache.shared.min(cache.blocks.len());
        let mut copied = None;
        if cache.shared > written && length > 0 {
            cache.shared = written;
            copied = cache.blocks.pop();
        }
        while cache.blocks.len() * KEYS < before + length {
            cache.blocks.push(Arc::new(KvBlock::new(heads)));
        }
        sequences.push(CachedSequence { length, before, blocks: cache.blocks.clone(), copied });
    }
    let before: Vec<Array> = caches.iter_mut().filter_map(|cache| cache.written.take()).collect();
    let inputs: Vec<&Array> = [q, k, v].into_iter().chain(&before).collect();
    let outputs = [(q.shape(), Dtype::Float32), (&[0][..], Dtype::Float32)];
    let made = apply(Cached { heads, angles, sequences }, &inputs, &outputs)?;
    for cache in caches.iter_mut() {
        cache.written = Some(made[1].clone());
    }
    Ok(made[0].clone())
}

/// (B, H, L, D) against (B, K, S, D): the last query sees every key.
fn mlx_causal(q: &Array, k: &Array, v: &Array, scale: f32) -> Result<Array> {
    // One new token sees everything; without a mask MLX takes its kernel for single queries.
    let mask = (q.dim(2) > 1).then_some(Mask::Causal);
    fast::scaled_dot_product_attention(q, k, v, scale, mask, None)
}
