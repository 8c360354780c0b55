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
            let frequencies = ffi::read::<f32>(&self.inv_freq)?;
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
    let groups = match rows.equal_length() {
        Some(_) => vec![(x.clone(), &rows.starts[..])],
        None => {
            ops::split_at_indices(x, &rows.borders(), 0)?.into_iter().zip(rows.starts.chunks(1)).collect()
        }
    };
    let mut rotated = Vec::with_capacity(groups.len());
    for (x, starts) in groups.iter().filter(|(x, _)| x.dim(0) > 0) {
        let batch = [starts.len() as i32, -1, width / head_dim, head_dim];
        let y = mlx_rotated(&x.reshape(&batch)?.transpose_axes(&[0, 2, 1, 3])?, starts, table)?;
        rotated.push(y.transpose_axes(&[0, 2, 1, 3])?.reshape(x.shape())?);
    }
    if rotated.is_empty() { Ok(x.clone()) } else { ops::concatenate(&rotated, 0) }
}

/// MLX's operation on x (B, heads, L, D), whose sequences begin at `starts`.
pub(crate) fn mlx_rotated(x: &Array, starts: &[i32], table: &RopeTable) -> Result<Array> {
    let (dims, periods) = (table.dims, &table.periods);
    if starts.iter().all(|start| *start == starts[0]) {
        fast::rope(x, dims, table.traditional, None, 1.0, starts[0], periods)
    } else {
        let offsets = Array::from_slice(starts, &[starts.len() as i32]);
        fast::rope_dynamic(x, dims, table.traditional, None, 1.0, offsets, periods)
    }
}
