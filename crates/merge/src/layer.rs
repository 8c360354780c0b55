//! One weight: the exact sum in f32, how it is stored, and what that costs.

use graft_adapters::{Adapter, Kind};
use graft_ops::{Array, Dtype};
use graft_quant::{Grid, Levels, Packed, Tensor, Weight, round_nearest};

use crate::{Error, LayerReport, Result};

/// What a packed weight with an adapter becomes. A dense one stays dense in its own type whatever the policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// 8 bits in the groups it had, so that a small update is not lost between two steps.
    Raise,
    /// Dense, in the type of its scales.
    Dense,
    /// The bits it had. Each group keeps its scale and bias unless new ones come nearer.
    Same,
}

impl Policy {
    /// Its name on the command line and in the report.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raise => "raise",
            Self::Dense => "dense",
            Self::Same => "same",
        }
    }

    /// The policy of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Raise, Self::Dense, Self::Same].into_iter().find(|policy| policy.name() == name)
    }
}

/// The width of a raised weight.
const RAISED: i32 = 8;
/// Below this share of ||W|| an update is the rounding of f32: a DoRA adapter at its start has m = n up to that.
const NOTHING: f64 = 3e-7;

/// What an adapter does to a weight.
pub(crate) enum Update<'a> {
    /// The low-rank sum.
    LowRank(&'a Adapter, Kind),
    /// Another weight in its place, of any float type.
    Whole(Array),
}

impl Update<'_> {
    /// Rows `ids` (N,) of W' in f32, where `rows` are those of W.
    fn apply(&self, rows: &Array, ids: &Array) -> Result<Array> {
        Ok(match self {
            Self::LowRank(adapter, kind) => adapter.rows(*kind, ids)?.fused(rows, *kind)?,
            Self::Whole(whole) => whole.take_axis(ids, 0)?.as_dtype(Dtype::Float32)?,
        })
    }
}

/// A weight in the form of the file: codes, scales and biases, or one tensor of floats.
#[derive(Default)]
pub(crate) struct Stored {
    pub(crate) tensors: Vec<Tensor>,
    pub(crate) grid: Option<Grid>,
}

impl Stored {
    /// Appends rows, all in one form.
    fn push(&mut self, rows: &Weight) -> Result<()> {
        let tensors = match rows {
            Weight::Dense(w) => vec![Tensor::from_array(w)?],
            Weight::Packed(Packed { codes, scales, biases, grid }) => {
                self.grid = Some(*grid);
                vec![Tensor::from_array(codes)?, Tensor::from_array(scales)?, Tensor::from_array(biases)?]
            }
            Weight::Arranged(_) => return Err(not_stored()),
        };
        if self.tensors.is_empty() {
            self.tensors = tensors;
            return Ok(());
        }
        for (whole, part) in self.tensors.iter_mut().zip(tensors) {
            whole.shape[0] += part.shape[0];
            whole.data.extend(part.data);
        }
        Ok(())
    }
}

/// How a weight is stored, in words.
fn form(weight: &Weight) -> String {
    match weight {
        Weight::Packed(packed) => packed.grid.to_string(),
        Weight::Dense(w) => format!("{:?}", w.dtype()).to_lowercase(),
        Weight::Arranged(_) => "packed".into(),
    }
}

/// Checkpoints are read as they are stored; a weight in a layout of inference has no place here.
fn not_stored() -> Error {
    graft_quant::Error::Request("weights laid out for inference cannot be stored".into()).into()
}

/// A weight after its update; nothing to store if the update is nothing.
pub(crate) struct Fused {
    pub(crate) stored: Option<Stored>,
    pub(crate) report: LayerReport,
}

/// Fuses one matrix. Beside the weight itself and its result, a block of rows is in memory.
pub(crate) fn fuse_weight(path: &str, weight: &Weight, update: &Update, policy: Policy) -> Result<Fused> {
    let mut stored = Stored::default();
    let mut to = form(weight);
    let mut sums = Sums::default();
    for ids in weight.row_blocks() {
        let rows = weight.slice(&ids)?;
        let before = rows.dequantize(Dtype::Float32)?;
        let exact = update.apply(&before, &ids)?;
        let delta = exact.subtract(&before)?;
        let new = store(&exact, &rows, policy)?;
        let error = new.dequantize(Dtype::Float32)?.subtract(&exact)?;
        sums.weight += sum(&before.square()?)?;
        sums.delta += sum(&delta.square()?)?;
        sums.error += sum(&error.square()?)?;
        sums.along += sum(&error.multiply(&delta)?)?;
        stored.push(&new)?;
        to = form(&new);
    }
    let (weight_norm, delta_norm, error_norm) = (sums.weight.sqrt(), sums.delta.sqrt(), sums.error.sqrt());
    let (kind, rank, scale) = match update {
        Update::LowRank(a, _) if a.magnitude.is_some() => ("dora", Some(a.rank()), Some(a.scale)),
        Update::LowRank(a, _) => ("lora", Some(a.rank()), Some(a.scale)),
        Update::Whole(_) => ("full", None, None),
    };
    if !(delta_norm.is_finite() && error_norm.is_finite()) {
        return Err(Error::NotFinite { path: path.to_owned(), scale: scale.unwrap_or(1.0) });
    }
    let changed = delta_norm > NOTHING * weight_norm;
    let report = LayerReport {
        path: path.to_owned(),
        kind: kind.into(),
        rank,
        scale,
        from: form(weight),
        to: if changed { to } else { form(weight) },
        weight_norm,
        delta_norm: if changed { delta_norm } else { 0.0 },
        relative_error: if changed { error_norm / delta_norm } else { 0.0 },
        survival: if changed { 1.0 + sums.along / sums.delta } else { 1.0 },
    };
    Ok(Fused { stored: changed.then_some(stored), report })
}

/// A packed matrix made dense, in the type of its scales.
pub(crate) fn dense(weight: &Packed) -> Result<Stored> {
    let (dtype, weight) = (weight.scales.dtype(), Weight::Packed(weight.clone()));
    let mut stored = Stored::default();
    for ids in weight.row_blocks() {
        stored.push(&Weight::Dense(weight.slice(&ids)?.dequantize(dtype)?))?;
    }
    Ok(stored)
}

/// Rows of the exact weight in the form that the policy gives them.
fn store(exact: &Array, rows: &Weight, policy: Policy) -> Result<Weight> {
    let packed = match rows {
        Weight::Dense(w) => return Ok(Weight::Dense(exact.as_dtype(w.dtype())?)),
        Weight::Packed(packed) => packed,
        Weight::Arranged(_) => return Err(not_stored()),
    };
    let dtype = packed.scales.dtype();
    let old = Levels { scales: packed.scales.clone(), biases: packed.biases.clone() };
    let (grid, old) = match policy {
        Policy::Dense => return Ok(Weight::Dense(exact.as_dtype(dtype)?)),
        Policy::Same => (packed.grid, old),
        Policy::Raise if packed.grid.bits >= RAISED => (packed.grid, old),
        Policy::Raise => (Grid { bits: RAISED, ..packed.grid }, Levels::finer(packed, RAISED)?),
    };
    let fresh = Levels::fresh(exact, grid, dtype)?;
    Ok(Weight::Packed(round_nearest(exact, grid, &[old, fresh])?))
}

/// Sums of squares over a matrix: W, W' - W, stored - W', and the product of the last two.
#[derive(Default)]
struct Sums {
    weight: f64,
    delta: f64,
    error: f64,
    along: f64,
}

/// The sum of a matrix: rows in f32, the rows' sums in f64.
fn sum(array: &Array) -> Result<f64> {
    let rows = Tensor::from_array(&array.sum_axis(-1, false)?)?;
    Ok(rows.to_f32()?.into_iter().map(f64::from).sum())
}
