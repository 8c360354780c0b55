//! Rounding to scales that are given, so that a weight which has them already keeps what it can of its grid.

use graft_ops::ffi::{array_from_bytes, read};
use graft_ops::{Array, Dtype};

use crate::{Error, Grid, Packed, Result};

/// Scales and biases for the groups of a weight, (out, groups) each, in the type in which they are stored.
#[derive(Debug, Clone)]
pub struct Levels {
    /// The step between two codes.
    pub scales: Array,
    /// The value of code 0.
    pub biases: Array,
}

impl Levels {
    /// Those that MLX's rounding ([`crate::round()`]) would choose for W (out, in), to the bit, stored in `dtype`; found here,
    /// on all threads, without its codes. Evaluates.
    ///
    /// # Errors
    /// When the grid does not exist or does not divide W's rows.
    pub fn fresh(w: &Array, grid: Grid, dtype: Dtype) -> Result<Levels> {
        let (out, input) = shape_for(w, grid)?;
        let w = w.as_dtype(Dtype::Float32)?.contiguous()?;
        let values = read::<f32>(&w)?;
        let (group, groups) = (grid.group_size as usize, grid.groups(input));
        let mut chosen = vec![[0f32; 2]; out * groups];
        let share = chosen.len().div_ceil(graft_ops::threads()).max(1);
        std::thread::scope(|scope| {
            for (chosen, values) in chosen.chunks_mut(share).zip(values.chunks(share * group)) {
                scope.spawn(move || {
                    for (own, w) in chosen.iter_mut().zip(values.chunks_exact(group)) {
                        *own = anchored(w, grid.top());
                    }
                });
            }
        });
        Levels::of_groups(&chosen, [out, groups], dtype)
    }

    /// Scale and bias of each group, (out, groups) row-major, rounded to the type in which they are stored.
    fn of_groups(all: &[[f32; 2]], [out, groups]: [usize; 2], dtype: Dtype) -> Result<Levels> {
        let part = |index: usize| {
            Array::from_iter(all.iter().map(|own| own[index]), &[out as i32, groups as i32]).as_dtype(dtype)
        };
        Ok(Levels { scales: part(0)?, biases: part(1)? })
    }

    /// Those of a packed weight for `bits` codes, which hold each of its values exactly: a power of two finer.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn finer(packed: &Packed, bits: i32) -> Result<Levels> {
        let finer = Array::from_f32(0.5_f32.powi(bits - packed.grid.bits)).as_dtype(packed.scales.dtype())?;
        Ok(Levels { scales: packed.scales.multiply(finer)?, biases: packed.biases.clone() })
    }

    /// The levels of the same rows, each multiplied by its `factor` (out,) f32: multiplied in f32, rounded once to the type
    /// in which they are stored.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn scaled(&self, factor: &Array) -> Result<Levels> {
        let factor = factor.expand_dims(1)?;
        let times =
            |levels: &Array| levels.as_dtype(Dtype::Float32)?.multiply(&factor)?.as_dtype(levels.dtype());
        Ok(Levels { scales: times(&self.scales)?, biases: times(&self.biases)? })
    }

    /// Scales and biases in f32, row-major.
    pub(crate) fn host(&self) -> Result<[Vec<f32>; 2]> {
        let wide = |levels: &Array| -> Result<Vec<f32>> {
            Ok(read::<f32>(&levels.as_dtype(Dtype::Float32)?.contiguous()?)?.to_vec())
        };
        Ok([wide(&self.scales)?, wide(&self.biases)?])
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
    let (out, input) = shape_for(w, grid)?;
    let Some(first) = candidates.first() else {
        return Err(Error::Request("no scales were given to round to".into()));
    };
    let levels = candidates.iter().map(Levels::host).collect::<Result<Vec<_>>>()?;
    let w = w.as_dtype(Dtype::Float32)?.contiguous()?;
    let values = read::<f32>(&w)?;
    let (group, groups) = (grid.group_size as usize, grid.groups(input));
    let mut codes = vec![0u8; out * input];
    let mut chosen = vec![[0f32; 2]; out * groups];
    let rows = out.div_ceil(graft_ops::threads()).max(1);
    std::thread::scope(|scope| {
        let parts = codes.chunks_mut(rows * input).zip(chosen.chunks_mut(rows * groups)).enumerate();
        for (part, (codes, chosen)) in parts {
            let (levels, values) = (&levels, &values[part * rows * input..]);
            scope.spawn(move || {
                let mut other = vec![0u8; group];
                let all = codes.chunks_exact_mut(group).zip(values.chunks_exact(group)).zip(chosen);
                for (index, ((codes, w), chosen)) in all.enumerate() {
                    let at = part * rows * groups + index;
                    let mut best = f32::INFINITY;
                    for [scales, biases] in levels {
                        let own = [scales[at], biases[at]];
                        let error = nearest(w, own, grid.top(), &mut other);
                        // A group with values that are no numbers takes the first, and is refused by whoever looks.
                        if error < best || best == f32::INFINITY {
                            (best, *chosen) = (error, own);
                            codes.copy_from_slice(&other);
                        }
                    }
                }
            });
        }
    });
    let Levels { scales, biases } = Levels::of_groups(&chosen, [out, groups], first.scales.dtype())?;
    Ok(Packed { codes: pack(&codes, out, input, grid)?, scales, biases, grid })
}

/// Scale and bias of a group as MLX chooses them: zero and the end farther from it are levels.
fn anchored(w: &[f32], top: f32) -> [f32; 2] {
    /// The smallest step.
    const LEAST: f32 = 1e-7;
    // Groups are multiples of eight.
    let ends = |pick: fn(f32, f32) -> f32, start: f32| {
        let mut lanes = [start; 8];
        for w in w.chunks_exact(8) {
            lanes.iter_mut().zip(w).for_each(|(lane, w)| *lane = pick(*lane, *w));
        }
        lanes.into_iter().fold(start, pick)
    };
    let (low, high) = (ends(f32::min, f32::INFINITY), ends(f32::max, f32::NEG_INFINITY));
    let downwards = low.abs() <= high.abs();
    let step = ((high - low) / top).max(LEAST);
    let (step, edge) = if downwards { (-step, high) } else { (step, low) };
    let code = (edge / step).round_ties_even();
    if code == 0.0 { [step, 0.0] } else { [edge / code, edge] }
}

/// The nearest codes of a group, and the sum of the squared errors.
fn nearest(w: &[f32], [scale, bias]: [f32; 2], top: f32, codes: &mut [u8]) -> f32 {
    let mut lanes = [0f32; 8];
    for (w, codes) in w.chunks_exact(8).zip(codes.chunks_exact_mut(8)) {
        for (lane, (w, code)) in lanes.iter_mut().zip(w.iter().zip(codes)) {
            let level = code_of(*w, scale, bias, top);
            let error = w - (scale * level + bias);
            *lane += error * error;
            // Its last eight bits are the code; a conversion would look at each number for what it cannot hold.
            *code = (level + ROUND).to_bits() as u8;
        }
    }
    lanes.iter().sum()
}

/// 1.5 * 2^23: added to a number below 2^22 and taken away again, it leaves the nearest whole number.
const ROUND: f32 = 12_582_912.0;

/// The code nearest to `w`, half to even, as a number.
#[inline]
pub(crate) fn code_of(w: f32, scale: f32, bias: f32, top: f32) -> f32 {
    let step = if scale == 0.0 { 1.0 } else { scale };
    ((w - bias) / step).clamp(0.0, top) + ROUND - ROUND
}

/// Rows and columns of a matrix that the grid divides.
pub(crate) fn shape_for(w: &Array, grid: Grid) -> Result<(usize, usize)> {
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
    Ok((out as usize, input as usize))
}

/// Codes (out, in), one a byte, as MLX's words.
pub(crate) fn pack(codes: &[u8], out: usize, input: usize, grid: Grid) -> Result<Array> {
    let words = [out as i32, grid.words(input) as i32];
    if grid.bits == 8 {
        return Ok(array_from_bytes(codes, &words, Dtype::Uint32)?);
    }
    Ok(array_from_bytes(&bit_stream(codes, grid.bits), &words, Dtype::Uint32)?)
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
