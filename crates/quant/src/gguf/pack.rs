//! Weights as ggml's blocks: codes, scales and biases as they are wherever a block holds them, else rounded, and what that
//! cost measured.

use graft_ops::ffi::Mode;
use graft_ops::{Array, Dtype};
use half::f16;

use super::{BLOCK, Block, HostPacked, Kind};
use crate::nearest::codes_of;
use crate::{Error, Grid, Levels, Result, StoredDtype, Tensor, Weight, round_nearest};

/// A tensor's bytes in the file.
pub(super) struct Encoded {
    pub(super) data: Vec<u8>,
    /// ||written - W||^2 and ||W||^2; both 0 where nothing was rounded.
    pub(super) error: f64,
    pub(super) weight: f64,
}

/// The type which holds packed weights with the least loss, by their scales and biases alone.
///
/// Up to 4 bits are Q4_1, or Q4_0 where every bias is -8 times its scale; wider ones are Q8_0, and floats, whose steps are finer
/// near 0 than whole numbers of 4 bits have them.
pub(super) fn nearest_kind(grid: Grid, scales: &Tensor, biases: Option<&Tensor>) -> Result<Kind> {
    let Some(biases) = biases.filter(|_| grid.bits <= 4) else { return Ok(Kind::Q8_0) };
    let symmetric = grid.bits == 4 && symmetric(Kind::Q4_0, &scales.to_f32()?, &biases.to_f32()?);
    Ok(if symmetric { Kind::Q4_0 } else { Kind::Q4_1 })
}

/// The bias that a type without one has with scale d.
fn implied(kind: Kind, d: f32) -> Option<f32> {
    match kind {
        Kind::Q4_0 => Some(-8.0 * d),
        Kind::Q8_0 => Some(-128.0 * d),
        _ => None,
    }
}

/// Whether each bias is the one that `kind` has with the scale; true of a type that keeps biases.
fn symmetric(kind: Kind, scales: &[f32], biases: &[f32]) -> bool {
    scales.iter().zip(biases).all(|(scale, bias)| implied(kind, *scale).is_none_or(|own| own == *bias))
}

/// Whether `kind` holds the codes of packed weights as they are.
fn keeps_codes(packed: &HostPacked, kind: Kind) -> Result<bool> {
    let bits = packed.grid.bits;
    let Some(biases) = &packed.biases else { return Ok(false) };
    let fits = match kind {
        Kind::Q4_1 => bits <= 4,
        Kind::Q4_0 => bits == 4,
        Kind::Q8_0 => bits == 8,
        _ => false,
    };
    Ok(fits && symmetric(kind, &packed.scales.to_f32()?, &biases.to_f32()?))
}

/// Writes a tensor as `kind`. Beside it and its bytes, dense copies exist of a block of rows at a time.
///
/// # Errors
/// When it holds values that `kind` cannot, with what they are.
pub(super) fn encode(block: &Block, kind: Kind) -> Result<Encoded> {
    match block {
        Block::Packed(packed) if keeps_codes(packed, kind)? => repack(packed, kind),
        Block::Dense(tensor) if tensor.shape.len() == 1 => {
            let data = tensor.to_f32()?.iter().flat_map(|x| x.to_le_bytes()).collect();
            Ok(Encoded { data, error: 0.0, weight: 0.0 })
        }
        Block::Dense(tensor) if kind.dense() == Some(tensor.dtype) => {
            Ok(Encoded { data: tensor.data.clone(), error: 0.0, weight: 0.0 })
        }
        Block::Dense(tensor) => rounded(&Weight::Dense(tensor.to_array()?), kind),
        Block::Packed(packed) => rounded(&Weight::Packed(packed.to_arrays()?), kind),
    }
}

/// Codes as they are: only the scales and biases are made 16 bits, and repeated where a group has several blocks.
fn repack(packed: &HostPacked, kind: Kind) -> Result<Encoded> {
    let repeat = packed.grid.group_size as usize / BLOCK;
    let codes = codes_of(&packed.codes.data, packed.grid.bits);
    let (scales, biases) = (packed.scales.to_f32()?, packed.biases.as_ref().map(Tensor::to_f32).transpose()?);
    let biases = biases.unwrap_or_default();
    let levels: Vec<[f16; 2]> =
        scales.iter().zip(&biases).map(|(s, b)| [f16::from_f32(*s), f16::from_f32(*b)]).collect();
    let stored = levels.iter().map(|[d, m]| {
        let d = d.to_f32();
        (d, implied(kind, d).unwrap_or(m.to_f32()))
    });
    let groups = || stored.clone().zip(scales.iter().zip(&biases));
    let (mut error, mut weight) = (0.0, 0.0);
    if groups().any(|((d, m), (s, b))| (d, m) != (*s, *b)) {
        for (((d, m), (s, b)), codes) in groups().zip(codes.chunks_exact(repeat * BLOCK)) {
            for code in codes {
                let (old, new) = (s * f32::from(*code) + b, d * f32::from(*code) + m);
                error += f64::from(new - old).powi(2);
                weight += f64::from(old).powi(2);
            }
        }
    }
    let levels = levels.iter().flat_map(|pair| std::iter::repeat_n(*pair, repeat));
    Ok(Encoded { data: blocks(kind, &codes, levels)?, error, weight })
}

/// A weight by its values, a block of rows at a time.
fn rounded(weight: &Weight, kind: Kind) -> Result<Encoded> {
    let mut all = Encoded { data: Vec::new(), error: 0.0, weight: 0.0 };
    for ids in weight.row_blocks() {
        let rows = weight.slice(&ids)?;
        let exact = rows.dequantize(Dtype::Float32)?;
        let new = match kind.grid() {
            Some(grid) => Weight::Packed(round_nearest(&exact, grid, &candidates(&exact, &rows, kind)?)?),
            None => Weight::Dense(exact.as_dtype(kind.float()?)?),
        };
        all.error += sum(&new.dequantize(Dtype::Float32)?.subtract(&exact)?.square()?)?;
        all.weight += sum(&exact.square()?)?;
        all.data.extend(match &new {
            Weight::Packed(packed) => {
                let codes = codes_of(&Tensor::from_array(&packed.codes)?.data, packed.grid.bits);
                let [scales, biases] = Levels::from(packed).host(packed.grid.mode)?;
                let pairs = scales.iter().zip(&biases).map(|(s, b)| [f16::from_f32(*s), f16::from_f32(*b)]);
                blocks(kind, &codes, pairs)?
            }
            other => Tensor::from_array(&other.dequantize(kind.float()?)?)?.data,
        });
    }
    if all.error.is_finite() {
        return Ok(all);
    }
    let hint = "values that 16 bits cannot hold (beyond 65504) or that are not finite";
    Err(Error::Request(format!("{hint}; choose the type bf16 or f32")))
}

/// The scales among which each block of 32 takes the best. Those of Q8_0 keep 0 in the middle; one that a weight has already
/// is the first, and exact wherever its bias is a multiple of it.
fn candidates(exact: &Array, rows: &Weight, kind: Kind) -> Result<Vec<Levels>> {
    let half =
        |array: Array| -> Result<Array> { Ok(array.as_dtype(Dtype::Float16)?.as_dtype(Dtype::Float32)?) };
    let &[out, input] = exact.shape() else {
        return Err(Error::Request(format!("expected a matrix, found shape {:?}", exact.shape())));
    };
    let grouped = exact.reshape(&[out, input / BLOCK as i32, BLOCK as i32])?;
    if kind != Kind::Q8_0 {
        let grid = Grid::affine(4, BLOCK as i32);
        return Ok(vec![Levels::fresh(exact, grid, Dtype::Float16)?]);
    }
    let symmetric = |scales: Array| -> Result<Levels> {
        let biases = scales.multiply(Array::from_f32(-128.0))?;
        Ok(Levels { scales, biases: Some(biases) })
    };
    let largest = grouped.abs()?.max_axis(2, false)?;
    let mut all = vec![symmetric(half(largest.divide(Array::from_f32(127.0))?)?)?];
    if let Weight::Packed(packed) = rows {
        let own = || -> Result<Array> {
            let [scales, _] = Levels::from(packed).host(packed.grid.mode)?;
            Ok(Array::from_slice(&scales, packed.scales.shape()))
        };
        match packed.grid.mode {
            Mode::Affine => {
                let repeat = packed.grid.group_size / BLOCK as i32;
                all.insert(0, symmetric(half(mlx_rs::ops::repeat_axis::<f32>(own()?, repeat, 1)?)?)?);
            }
            // All its numbers are halves of the scale, of which 12 are the most.
            Mode::Mxfp4 => all.insert(0, symmetric(half(own()?.multiply(Array::from_f32(0.5))?)?)?),
            Mode::Nvfp4 | Mode::Mxfp8 => {}
        }
    }
    Ok(all)
}

/// Blocks of 32 codes, one a byte, with d and m of each.
fn blocks(kind: Kind, codes: &[u8], levels: impl Iterator<Item = [f16; 2]>) -> Result<Vec<u8>> {
    let mut data = Vec::with_capacity(codes.len() / 2);
    for (codes, [d, m]) in codes.as_chunks::<BLOCK>().0.iter().zip(levels) {
        if !d.is_finite() || kind == Kind::Q4_1 && !m.is_finite() {
            let what = format!("a scale {d} and a bias {m}, of which {kind} has 16 bits each (up to 65504)");
            return Err(Error::Request(format!("{what}; choose the type bf16 or f32")));
        }
        data.extend(d.to_le_bytes());
        match kind {
            Kind::Q8_0 => {
                data.extend(codes.map(|code| code ^ 0x80));
                continue;
            }
            Kind::Q4_1 => data.extend(m.to_le_bytes()),
            _ => {}
        }
        let (low, high) = codes.split_at(BLOCK / 2);
        data.extend(low.iter().zip(high).map(|(low, high)| low | high << 4));
    }
    Ok(data)
}

/// The sum of a matrix: rows in f32, the rows' sums in f64.
fn sum(array: &Array) -> Result<f64> {
    let rows = Tensor::from_array(&array.sum_axis(-1, false)?)?;
    Ok(rows.to_f32()?.into_iter().map(f64::from).sum())
}

impl Kind {
    /// The stored type of a kind that is not made of blocks.
    pub(super) fn dense(self) -> Option<StoredDtype> {
        match self {
            Self::F32 => Some(StoredDtype::F32),
            Self::F16 => Some(StoredDtype::F16),
            Self::BF16 => Some(StoredDtype::BF16),
            _ => None,
        }
    }

    fn float(self) -> Result<Dtype> {
        let dtype = self.dense().and_then(crate::tensor::mlx_dtype);
        dtype.ok_or_else(|| Error::Request(format!("graft cannot write {self}")))
    }
}
