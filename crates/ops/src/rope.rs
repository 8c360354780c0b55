//! Rotary position embedding over rows of different length.

#[cfg(graft_cpu)]
use std::sync::{Arc, Mutex, PoisonError};

use mlx_rs::{fast, ops};

#[cfg(graft_cpu)]
use crate::cpu::rope::{Angles, Rotation};
#[cfg(graft_cpu)]
use crate::form::on_cpu;
use crate::{Array, Dtype, Exception, Result, Rows, ffi};

/// The frequencies of a rotary embedding, after whatever scaling the model's config asks for.
#[derive(Debug)]
pub struct RopeTable {
    /// (dims / 2,) f32: the angle of pair i at position p is `p * inv_freq[i]`.
    pub inv_freq: Array,
    /// How many leading dimensions of a head are rotated; the others pass through.
    pub dims: i32,
    /// Pairs are neighbours (2i, 2i + 1) instead of halves (i, i + dims / 2).
    pub traditional: bool,
    /// 1 / inv_freq, which is what MLX's own operation takes.
    periods: Array,
    /// Cosine and sine of each pair's angle, (positions, dims / 2), for the positions seen so far.
    #[cfg(graft_cpu)]
    angles: Mutex<Arc<Vec<(f32, f32)>>>,
}

impl RopeTable {
    /// A table for `inv_freq` (dims / 2,), which is converted to f32 and evaluated.
    pub fn new(inv_freq: &Array, traditional: bool) -> Result<RopeTable> {
        if inv_freq.ndim() != 1 || inv_freq.size() == 0 {
            return Err(Exception::custom(format!(
                "rope: the frequencies must have one dimension, found {:?}",
                inv_freq.shape()
            )));
        }
        let inv_freq = inv_freq.as_dtype(Dtype::Float32)?;
        let periods = inv_freq.reciprocal()?;
        ffi::eval([&inv_freq, &periods])?;
        Ok(RopeTable {
            dims: 2 * inv_freq.dim(0),
            inv_freq,
            traditional,
            periods,
            #[cfg(graft_cpu)]
            angles: Mutex::default(),
        })
    }

    /// The angles of all positions that the rows have.
    #[cfg(graft_cpu)]
    pub(crate) fn angles(&self, rows: &Rows) -> Result<Angles> {
        let ends =
            rows.lengths.iter().zip(&rows.starts).map(|(&length, &start)| (start + length).max(0) as usize);
        let positions = ends.max().unwrap_or(0);
        let half = self.dims as usize / 2;
        let mut angles = self.angles.lock().unwrap_or_else(PoisonError::into_inner);
        if angles.len() < positions * half {
            let frequencies =
                ffi::read::<f32>(&self.inv_freq)?;
            // Some more than are asked for, since decoding asks for one more each time.
            let angle = |p: usize| frequencies.iter().map(move |f| (p as f32 * f).sin_cos());
            let all = (0..positions.next_multiple_of(512)).flat_map(angle);
            *angles = Arc::new(all.map(|(sin, cos)| (cos, sin)).collect());
        }
        Ok(Angles { table: Arc::clone(&angles), dims: self.dims as usize, traditional: self.traditional })
    }
}

/// x (N, H D) rotated head by head by each token's position (row start + index in the row), in the type of x.
/// Differentiable in x. (Attention does this itself.)
pub fn rope(x: &Array, head_dim: i32, rows: &Rows, table: &RopeTable) -> Result<Array> {
    let &[tokens, width] = x.shape() else {
        return Err(Exception::custom(format!("rope: x must be (N, H D), found {:?}", x.shape())));
    };
    rows.check(tokens)?;
    if table.dims > head_dim || width % head_dim != 0 {
        let dims = table.dims;
        return Err(Exception::custom(format!(
            "rope: {dims} dimensions to rotate in heads of {head_dim} of {width}"
        )));
    }
    #[cfg(graft_cpu)]
    if on_cpu(&[x]) {
        let positions = rows.lengths.iter().zip(&rows.starts).flat_map(|(&n, &start)| start..start + n);
        let rotation = Rotation {
            angles: table.angles(rows)?,
            positions: Arc::new(positions.map(|p| p as usize).collect()),
            head_dim: head_dim as usize,
            back: false,
        };
        return rotation.apply(x);
    }
    let heads = x.reshape(&[tokens, -1, head_dim])?;
    let rotated = match rows.equal_length() {
        Some(length) if length > 0 => mlx_equal(&heads, rows, length, table),
        _ => mlx_ragged(&heads, rows, table),
    };
    rotated?.reshape(x.shape())
}

/// Rows of one length are a batch, which MLX's own operation takes with one offset per row.
fn mlx_equal(x: &Array, rows: &Rows, length: i32, table: &RopeTable) -> Result<Array> {
    let (heads, head_dim) = (x.dim(1), x.dim(2));
    let batch = rows.lengths.len() as i32;
    let x = x.reshape(&[batch, length, heads, head_dim])?.transpose_axes(&[0, 2, 1, 3])?;
    let y = if rows.starts.iter().all(|&start| start == rows.starts[0]) {
        fast::rope(x, table.dims, table.traditional, None, 1.0, rows.starts[0], &table.periods)?
    } else {
        let offsets = Array::from_slice(&rows.starts, &[batch]);
        fast::rope_dynamic(x, table.dims, table.traditional, None, 1.0, offsets, &table.periods)?
    };
    y.transpose_axes(&[0, 2, 1, 3])?.reshape(&[batch * length, heads, head_dim])
}

fn mlx_ragged(x: &Array, rows: &Rows, table: &RopeTable) -> Result<Array> {
    let (tokens, heads, head_dim) = (x.dim(0), x.dim(1), x.dim(2));
    let (dims, half) = (table.dims, table.dims / 2);
    let mut positions = Vec::with_capacity(tokens as usize);
    for (&length, &start) in rows.lengths.iter().zip(&rows.starts) {
        positions.extend((start..start + length).map(|p| p as f32));
    }
    let angles =
        Array::from_slice(&positions, &[tokens, 1, 1]).multiply(table.inv_freq.reshape(&[1, 1, half])?)?;
    let (cos, sin) = (angles.cos()?, angles.sin()?);

    let parts = ops::split_at_indices(x, &[dims], 2)?;
    let rotated = parts[0].as_dtype(Dtype::Float32)?;
    let (first, second) = if table.traditional {
        let pairs = ops::split_at_indices(rotated.reshape(&[tokens, heads, half, 2])?, &[1], 3)?;
        (pairs[0].squeeze_axes(&[3])?, pairs[1].squeeze_axes(&[3])?)
    } else {
        let halves = ops::split_at_indices(&rotated, &[half], 2)?;
        (halves[0].clone(), halves[1].clone())
    };
    let new_first = first.multiply(&cos)?.subtract(second.multiply(&sin)?)?;
    let new_second = first.multiply(&sin)?.add(second.multiply(&cos)?)?;
    let y = if table.traditional {
        ops::stack(&[new_first, new_second], 3)?.reshape(&[tokens, heads, dims])?
    } else {
        ops::concatenate(&[new_first, new_second], 2)?
    };
    let y = y.as_dtype(x.dtype())?;
    if dims == head_dim { Ok(y) } else { ops::concatenate(&[y, parts[1].clone()], 2) }
}
