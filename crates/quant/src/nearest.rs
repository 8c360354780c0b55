//! Rounding to scales that are given, so that a weight which has them already keeps what it can of its grid.

use graft_ops::ffi::array_from_bytes;
use graft_ops::{Array, Dtype};

use crate::{Error, Grid, Packed, Result, Tensor, round};

/// Scales and biases for the groups of a weight, (out, groups) each, in the type in which they are stored.
#[derive(Debug, Clone)]
pub struct Levels {
    /// The step between two codes.
    pub scales: Array,
    /// The value of code 0.
    pub biases: Array,
}

impl Levels {
    /// MLX's own for W (out, in), stored in `dtype`.
    ///
    /// # Errors
    /// As [`round()`].
    pub fn fresh(w: &Array, grid: Grid, dtype: Dtype) -> Result<Levels> {
        let packed = round(&w.as_dtype(Dtype::Float32)?, grid)?;
        Ok(Levels { scales: packed.scales.as_dtype(dtype)?, biases: packed.biases.as_dtype(dtype)? })
    }

    /// Those of a packed weight for `bits` codes, which hold each of its values exactly: a power of two finer.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn finer(packed: &Packed, bits: i32) -> Result<Levels> {
        let finer = Array::from_f32(0.5_f32.powi(bits - packed.grid.bits)).as_dtype(packed.scales.dtype())?;
        Ok(Levels { scales: packed.scales.multiply(finer)?, biases: packed.biases.clone() })
    }
}

/// Rounds W (out, in) so that each group takes the candidate which comes nearest to it in squares, the first if equal.
///
/// Codes are chosen for the scales as stored: MLX's own rounding chooses them before it rounds the scales to 16 bits,
/// which costs up to half a step of 8 bits. Evaluates.
///
/// # Errors
/// When the grid does not fit, or there is no candidate.
pub fn round_nearest(w: &Array, grid: Grid, candidates: &[Levels]) -> Result<Packed> {
    grid.check()?;
    let &[out, input] = w.shape() else {
        return Err(Error::Request(format!("expected a matrix to pack, found shape {:?}", w.shape())));
    };
    if !grid.fits(input as usize) {
        return Err(Error::Request(format!(
            "rows of {input} weights cannot be packed in groups of {}",
            grid.group_size
        )));
    }
    let grouped = w.as_dtype(Dtype::Float32)?.reshape(&[out, input / grid.group_size, grid.group_size])?;
    let top = Array::from_f32(2_f32.powi(grid.bits) - 1.0);
    let (zero, one) = (Array::from_f32(0.0), Array::from_f32(1.0));
    let mut best: Option<(Array, Array, Levels)> = None;
    for levels in candidates {
        let wide = |array: &Array| array.as_dtype(Dtype::Float32)?.expand_dims(2);
        let (scales, biases) = (wide(&levels.scales)?, wide(&levels.biases)?);
        let step = mlx_rs::ops::select(scales.eq(&zero)?, &one, &scales)?;
        let codes = mlx_rs::ops::round(grouped.subtract(&biases)?.divide(step)?, 0)?;
        let codes = mlx_rs::ops::clip(codes, (&zero, &top))?;
        let error = grouped.subtract(scales.multiply(&codes)?.add(&biases)?)?.square()?.sum_axis(2, false)?;
        let next = match best {
            None => (codes, error, levels.clone()),
            Some((old_codes, old_error, old)) => {
                let nearer = error.lt(&old_error)?;
                let pick = |new: &Array, old: &Array| mlx_rs::ops::select(&nearer, new, old);
                let codes = mlx_rs::ops::select(nearer.expand_dims(2)?, codes, old_codes)?;
                let scales = pick(&levels.scales, &old.scales)?;
                let biases = pick(&levels.biases, &old.biases)?;
                (codes, pick(&error, &old_error)?, Levels { scales, biases })
            }
        };
        graft_ops::ffi::eval([&next.0, &next.1, &next.2.scales, &next.2.biases])?;
        best = Some(next);
    }
    let Some((codes, _, levels)) = best else {
        return Err(Error::Request("no scales were given to round to".into()));
    };
    let codes = Tensor::from_array(&codes.as_dtype(Dtype::Uint8)?)?.data;
    let words = [out, grid.words(input as usize) as i32];
    let codes = array_from_bytes(&bit_stream(&codes, grid.bits), &words, Dtype::Uint32)?;
    Ok(Packed { codes, scales: levels.scales, biases: levels.biases, grid })
}

/// The codes of such a stream, one a byte: the inverse of [`bit_stream`].
pub(crate) fn codes_of(bytes: &[u8], bits: i32) -> Vec<u8> {
    let mut codes = Vec::with_capacity(bytes.len() * 8 / bits.max(1) as usize);
    let (mut pending, mut held) = (0_u32, 0);
    for &byte in bytes {
        pending |= u32::from(byte) << held;
        held += 8;
        while held >= bits {
            codes.push((pending & ((1 << bits) - 1)) as u8);
            pending >>= bits;
            held -= bits;
        }
    }
    codes
}

/// Code i in bits `[i b, (i + 1) b)`. Rows are whole words, so that the rows of a matrix are one stream.
fn bit_stream(codes: &[u8], bits: i32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(codes.len() * bits as usize / 8);
    let (mut pending, mut held) = (0_u32, 0);
    for &code in codes {
        pending |= u32::from(code) << held;
        held += bits;
        while held >= 8 {
            bytes.push(pending as u8);
            pending >>= 8;
            held -= 8;
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_come_back_out_of_the_stream() {
        for bits in Grid::BITS {
            let codes: Vec<u8> = (0..96_u32).map(|i| (i * 37 % (1 << bits)) as u8).collect();
            assert_eq!(codes_of(&bit_stream(&codes, bits), bits), codes, "{bits} bits");
        }
    }
}
