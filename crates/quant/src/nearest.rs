//! Rounding to scales that are given, so that a weight which has them already keeps what it can of its grid.

use graft_ops::ffi::{Mode, array_from_bytes, read};
use graft_ops::{Array, Dtype, minifloat};

use crate::{Error, Grid, Packed, Result, round};

/// Scales and biases for the groups of a weight, (out, groups) each, in the type in which they are stored.
#[derive(Debug, Clone)]
pub struct Levels {
    /// The step between two codes; of codes that are floats the factor.
    pub scales: Array,
    /// The value of code 0; only in the affine mode.
    pub biases: Option<Array>,
}

impl From<&Packed> for Levels {
    fn from(packed: &Packed) -> Levels {
        Levels { scales: packed.scales.clone(), biases: packed.biases.clone() }
    }
}

impl Levels {
    /// Those that MLX's rounding ([`crate::round()`]) would choose for W (out, in), to the bit; affine ones are stored in `dtype`,
    /// and found here, on all threads, without the codes. Evaluates.
    ///
    /// # Errors
    /// When the grid does not exist or does not divide W's rows.
    pub fn fresh(w: &Array, grid: Grid, dtype: Dtype) -> Result<Levels> {
        if grid.is_float() {
            return Ok(Levels::from(&round(&w.as_dtype(Dtype::Float32)?, grid, None)?));
        }
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
        Ok(Levels { scales: part(0)?, biases: Some(part(1)?) })
    }

    /// Those for affine codes of `bits` bits, stored in `dtype`, that hold each value of a packed weight exactly; none where a
    /// mode has no such levels.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn finer(packed: &Packed, bits: i32, dtype: Dtype) -> Result<Option<Levels>> {
        let grid = packed.grid;
        let times =
            |array: &Array, factor: f32| array.multiply(Array::from_f32(factor).as_dtype(array.dtype())?);
        match grid.mode {
            // A power of two finer.
            Mode::Affine => {
                let scales = times(&packed.scales, 0.5_f32.powi(bits - grid.bits))?;
                Ok(Some(Levels { scales, biases: packed.biases.clone() }))
            }
            // Halves of the scale from -6 to 6 lie on a grid that goes from -8 nearly to 8.
            Mode::Mxfp4 => {
                let scales = Levels::from(packed).host(grid.mode)?[0].clone();
                let scales = Array::from_slice(&scales, packed.scales.shape());
                let steps = times(&scales, 0.5_f32.powi(bits - 4))?.as_dtype(dtype)?;
                Ok(Some(Levels { scales: steps, biases: Some(times(&scales, -8.0)?.as_dtype(dtype)?) }))
            }
            Mode::Nvfp4 | Mode::Mxfp8 => Ok(None),
        }
    }

    /// The affine levels of the same rows, each multiplied by its `factor` (out,) f32: multiplied in f32, rounded once to the
    /// type in which they are stored.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn scaled(&self, factor: &Array) -> Result<Levels> {
        let factor = factor.expand_dims(1)?;
        self.map(|levels| levels.as_dtype(Dtype::Float32)?.multiply(&factor)?.as_dtype(levels.dtype()))
    }

    fn map(&self, f: impl Fn(&Array) -> graft_ops::Result<Array>) -> Result<Levels> {
        Ok(Levels { scales: f(&self.scales)?, biases: self.biases.as_ref().map(&f).transpose()? })
    }

    /// Scales and biases of that mode in f32, row-major; without biases zeros.
    pub(crate) fn host(&self, mode: Mode) -> Result<[Vec<f32>; 2]> {
        let wide = |levels: &Array| -> Result<Vec<f32>> {
            Ok(read::<f32>(&levels.as_dtype(Dtype::Float32)?.contiguous()?)?.to_vec())
        };
        let decoded = |decode: fn(u8) -> f32| -> Result<Vec<f32>> {
            Ok(read::<u8>(&self.scales.contiguous()?)?.iter().map(|code| decode(*code)).collect())
        };
        let scales = match mode {
            Mode::Affine => wide(&self.scales)?,
            Mode::Mxfp4 | Mode::Mxfp8 => decoded(minifloat::e8m0)?,
            Mode::Nvfp4 => decoded(minifloat::e4m3)?,
        };
        let biases = self.biases.as_ref().map_or_else(|| Ok(vec![0.0; scales.len()]), wide)?;
        Ok([scales, biases])
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
    let levels = candidates.iter().map(|own| own.host(grid.mode)).collect::<Result<Vec<_>>>()?;
    let w = w.as_dtype(Dtype::Float32)?.contiguous()?;
    let values = read::<f32>(&w)?;
    let (codes, chosen) = match grid.mode {
        Mode::Affine => choose(values, &levels, (input, grid), Affine { top: grid.top() }),
        Mode::Mxfp4 | Mode::Nvfp4 => choose(values, &levels, (input, grid), E2m1),
        Mode::Mxfp8 => choose(values, &levels, (input, grid), E4m3),
    };
    let shape = [out as i32, grid.groups(input) as i32];
    let part = |index: usize, dtype: Dtype| -> Result<Array> {
        let all = chosen.iter().map(|own| own[index]);
        Ok(match grid.mode {
            Mode::Affine => Array::from_iter(all, &shape).as_dtype(dtype)?,
            Mode::Mxfp4 | Mode::Mxfp8 => Array::from_iter(all.map(minifloat::to_e8m0), &shape),
            Mode::Nvfp4 => Array::from_iter(all.map(minifloat::to_e4m3), &shape),
        })
    };
    Ok(Packed {
        codes: pack(&codes, out, input, grid)?,
        scales: part(0, first.scales.dtype())?,
        biases: first.biases.as_ref().map(|biases| part(1, biases.dtype())).transpose()?,
        grid,
    })
}

/// The codes of all groups of rows of `input` weights, each by the candidate that comes nearest, and its scale and bias.
fn choose(
    values: &[f32],
    levels: &[[Vec<f32>; 2]],
    (input, grid): (usize, Grid),
    rule: impl Rule,
) -> (Vec<u8>, Vec<[f32; 2]>) {
    let (group, groups) = (grid.group_size as usize, grid.groups(input));
    let out = values.len() / input;
    let mut codes = vec![0u8; out * input];
    let mut chosen = vec![[0f32; 2]; out * groups];
    let rows = out.div_ceil(graft_ops::threads()).max(1);
    std::thread::scope(|scope| {
        let parts = codes.chunks_mut(rows * input).zip(chosen.chunks_mut(rows * groups)).enumerate();
        for (part, (codes, chosen)) in parts {
            let values = &values[part * rows * input..];
            scope.spawn(move || {
                let mut other = vec![0u8; group];
                let all = codes.chunks_exact_mut(group).zip(values.chunks_exact(group)).zip(chosen);
                for (index, ((codes, w), chosen)) in all.enumerate() {
                    let at = part * rows * groups + index;
                    let mut best = f32::INFINITY;
                    for [scales, biases] in levels {
                        let own = [scales[at], biases[at]];
                        let error = nearest(w, own, rule, &mut other);
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
    (codes, chosen)
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

/// Which code is nearest to a weight.
pub(crate) trait Rule: Copy + Send + Sync {
    /// The code nearest to `w`, and the weight that it stands for.
    fn nearest(self, w: f32, scale: f32, bias: f32) -> (u8, f32);
}

/// Whole numbers up to `top`.
#[derive(Clone, Copy)]
pub(crate) struct Affine {
    pub(crate) top: f32,
}

/// Floats of four bits.
#[derive(Clone, Copy)]
pub(crate) struct E2m1;

/// Floats of eight bits.
#[derive(Clone, Copy)]
pub(crate) struct E4m3;

impl Rule for Affine {
    #[inline]
    fn nearest(self, w: f32, scale: f32, bias: f32) -> (u8, f32) {
        /// 1.5 * 2^23: added to a number below 2^22 and taken away again, it leaves the nearest whole number, of two the even.
        const ROUND: f32 = 12_582_912.0;
        let whole = ((w - bias) / step(scale)).clamp(0.0, self.top) + ROUND;
        // Its last eight bits are the code; a conversion would look at each number for what it cannot hold.
        (whole.to_bits() as u8, scale * (whole - ROUND) + bias)
    }
}

impl Rule for E2m1 {
    #[inline]
    fn nearest(self, w: f32, scale: f32, _: f32) -> (u8, f32) {
        let code = minifloat::to_e2m1(w / step(scale));
        (code, scale * minifloat::E2M1[usize::from(code & 15)])
    }
}

impl Rule for E4m3 {
    #[inline]
    fn nearest(self, w: f32, scale: f32, _: f32) -> (u8, f32) {
        let code = minifloat::to_e4m3(w / step(scale));
        (code, scale * minifloat::e4m3(code))
    }
}

/// A scale to divide by.
fn step(scale: f32) -> f32 {
    if scale == 0.0 { 1.0 } else { scale }
}

/// The nearest codes of a group, and the sum of the squared errors.
fn nearest(w: &[f32], [scale, bias]: [f32; 2], rule: impl Rule, codes: &mut [u8]) -> f32 {
    let mut lanes = [0f32; 8];
    for (w, codes) in w.chunks_exact(8).zip(codes.chunks_exact_mut(8)) {
        for (lane, (w, code)) in lanes.iter_mut().zip(w.iter().zip(codes)) {
            let (own, weight) = rule.nearest(*w, scale, bias);
            let error = w - weight;
            *lane += error * error;
            *code = own;
        }
    }
    lanes.iter().sum()
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
