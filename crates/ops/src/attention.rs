//! Causal attention over rows of different length, with grouped key/value heads.

use mlx_rs::fast::{self, ScaledDotProductAttentionMask as Mask};
use mlx_rs::ops;

use crate::{Array, Exception, Result, Rows};

/// The keys and values of one sequence as a cache holds them.
#[derive(Clone, Copy)]
pub struct CachedRow<'a> {
    /// (K, capacity, D).
    pub k: &'a Array,
    /// (K, capacity, D).
    pub v: &'a Array,
    /// How many of the capacity's positions are valid, the new tokens' included.
    pub len: i32,
}

fn heads_of(name: &str, q: &Array, kv_heads: i32, kv_dim: i32) -> Result<(i32, i32, i32)> {
    let &[tokens, heads, dim] = q.shape() else {
        return Err(Exception::custom(format!("{name}: queries must be (N, H, D), found {:?}", q.shape())));
    };
    if kv_dim != dim || kv_heads == 0 || heads % kv_heads != 0 {
        return Err(Exception::custom(format!(
            "{name}: {heads} query heads of {dim} do not fit {kv_heads} key heads of {kv_dim}"
        )));
    }
    Ok((tokens, heads, dim))
}

/// o = softmax(scale * q k^T) v for each head, causal inside each row: q (N, H, D), k and v (N, K, D) give (N, H, D)
/// in the type of q. Query head h reads key head h / (H / K). Differentiable in q, k and v. Rows start at position 0.
pub fn attention(q: &Array, k: &Array, v: &Array, rows: &Rows, scale: f32) -> Result<Array> {
    let &[kv_tokens, kv_heads, kv_dim] = k.shape() else {
        return Err(Exception::custom(format!("attention: keys must be (N, K, D), found {:?}", k.shape())));
    };
    let (tokens, heads, dim) = heads_of("attention", q, kv_heads, kv_dim)?;
    if kv_tokens != tokens || v.shape() != k.shape() {
        return Err(Exception::custom(format!(
            "attention: queries {:?}, keys {:?} and values {:?} do not fit together",
            q.shape(),
            k.shape(),
            v.shape()
        )));
    }
    rows.check(tokens)?;
    if rows.starts.iter().any(|&start| start != 0) {
        return Err(Exception::custom("attention: rows with cached tokens need attention_cached"));
    }
    match rows.equal_length() {
        Some(length) if length > 0 => {
            let batch = rows.lengths.len() as i32;
            let fold = |x: &Array, n: i32| x.reshape(&[batch, length, n, dim])?.transpose_axes(&[0, 2, 1, 3]);
            let o = mlx_causal(&fold(q, heads)?, &fold(k, kv_heads)?, &fold(v, kv_heads)?, scale)?;
            o.transpose_axes(&[0, 2, 1, 3])?.reshape(&[tokens, heads, dim])
        }
        _ => {
            let borders = rows.borders();
            let split = |x: &Array| ops::split_at_indices(x, &borders, 0);
            let (qs, ks, vs) = (split(q)?, split(k)?, split(v)?);
            let mut outputs = Vec::with_capacity(qs.len());
            for ((q, k), v) in qs.iter().zip(&ks).zip(&vs) {
                if q.dim(0) > 0 {
                    let fold = |x: &Array| x.transpose_axes(&[1, 0, 2])?.expand_dims(0);
                    outputs.push(unfold(&mlx_causal(&fold(q)?, &fold(k)?, &fold(v)?, scale)?)?);
                }
            }
            if outputs.is_empty() { Ok(q.clone()) } else { ops::concatenate(&outputs, 0) }
        }
    }
}

/// The same for tokens that follow `starts` cached ones: q (N, H, D) of all rows, one cache per row, whose last
/// positions are the row's new tokens. (N, H, D) in the type of q. Has no gradient.
pub fn attention_cached(q: &Array, cache: &[CachedRow], rows: &Rows, scale: f32) -> Result<Array> {
    rows.check(q.shape().first().copied().unwrap_or(0))?;
    if cache.len() != rows.lengths.len() {
        return Err(Exception::custom(format!(
            "attention: {} rows, but {} caches",
            rows.lengths.len(),
            cache.len()
        )));
    }
    for (i, row) in cache.iter().enumerate() {
        let &[kv_heads, capacity, kv_dim] = row.k.shape() else {
            return Err(Exception::custom(format!(
                "attention: cached keys must be (K, capacity, D), found {:?}",
                row.k.shape()
            )));
        };
        heads_of("attention", q, kv_heads, kv_dim)?;
        if row.v.shape() != row.k.shape() || row.k.shape()[0] != cache[0].k.shape()[0] {
            return Err(Exception::custom(format!(
                "attention: cached values {:?} do not fit the keys {:?}",
                row.v.shape(),
                row.k.shape()
            )));
        }
        if row.len > capacity || row.len != rows.starts[i] + rows.lengths[i] {
            return Err(Exception::custom(format!(
                "attention: row {i} has {} cached and {} new tokens, but {} valid keys of {capacity}",
                rows.starts[i], rows.lengths[i], row.len
            )));
        }
    }
    let qs = ops::split_at_indices(q, &rows.borders(), 0)?;
    let mut outputs = Vec::with_capacity(qs.len());
    for (q, row) in qs.iter().zip(cache) {
        if q.dim(0) == 0 {
            continue;
        }
        let valid = |x: &Array| ops::split_at_indices(x, &[row.len], 1)?[0].expand_dims(0);
        let folded = q.transpose_axes(&[1, 0, 2])?.expand_dims(0)?;
        outputs.push(unfold(&mlx_causal(&folded, &valid(row.k)?, &valid(row.v)?, scale)?)?);
    }
    if outputs.is_empty() { Ok(q.clone()) } else { ops::concatenate(&outputs, 0) }
}

/// (B, H, L, D) against (B, K, S, D): the last query sees every key.
fn mlx_causal(q: &Array, k: &Array, v: &Array, scale: f32) -> Result<Array> {
    // One new token sees everything; without a mask MLX takes its kernel for single queries.
    let mask = (q.dim(2) > 1).then_some(Mask::Causal);
    fast::scaled_dot_product_attention(q, k, v, scale, mask, None)
}

/// (1, H, L, D) back to (L, H, D).
fn unfold(o: &Array) -> Result<Array> {
    o.squeeze_axes(&[0])?.transpose_axes(&[1, 0, 2])
}
