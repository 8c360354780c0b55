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
    /// Another weight in its place, f32.
    Whole(Array),
}

/// A weight after its update; none if the update is nothing.
pub(crate) struct Fused {
    pub(crate) stored: Option<Weight>,
    pub(crate) report: LayerReport,
}

/// Fuses one weight.
pub(crate) fn fuse_weight(path: &str, weight: &Weight, update: &Update, policy: Policy) -> Result<Fused> {
    let before = weight.dequantize(Dtype::Float32)?;
    let exact = match update {
        Update::LowRank(adapter, kind) => adapter.fused(&before, *kind)?,
        Update::Whole(whole) => whole.clone(),
    };
    let delta = exact.subtract(&before)?;
    let weight_norm = norm(&before)?;
    drop(before);
    let delta_norm = norm(&delta)?;
    let scale = if let Update::LowRank(adapter, _) = update { adapter.scale } else { 1.0 };
    if !delta_norm.is_finite() {
        return Err(Error::NotFinite { path: path.to_owned(), scale });
    }
    let mut report = LayerReport {
        path: path.to_owned(),
        kind: match update {
            Update::LowRank(adapter, _) if adapter.magnitude.is_some() => "dora".into(),
            Update::LowRank(..) => "lora".into(),
            Update::Whole(_) => "full".into(),
        },
        rank: if let Update::LowRank(adapter, _) = update { Some(adapter.rank()) } else { None },
        scale: if matches!(update, Update::LowRank(..)) { Some(scale) } else { None },
        from: form(weight),
        to: form(weight),
        weight_norm,
        delta_norm: 0.0,
        relative_error: 0.0,
        survival: 1.0,
    };
    if delta_norm <= NOTHING * weight_norm {
        return Ok(Fused { stored: None, report });
    }
    let stored = store(&exact, weight, policy)?;
    stored.eval()?;
    let error = stored.dequantize(Dtype::Float32)?.subtract(&exact)?;
    let error_norm = norm(&error)?;
    if !error_norm.is_finite() {
        return Err(Error::NotFinite { path: path.to_owned(), scale });
    }
    let along = sum(&error.multiply(&delta)?)?;
    report.to = form(&stored);
    report.delta_norm = delta_norm;
    report.relative_error = error_norm / delta_norm;
    report.survival = 1.0 + along / (delta_norm * delta_norm);
    Ok(Fused { stored: Some(stored), report })
}

/// The exact weight in the form that the policy gives it.
fn store(exact: &Array, weight: &Weight, policy: Policy) -> Result<Weight> {
    let packed = match weight {
        Weight::Dense(w) => return Ok(Weight::Dense(exact.as_dtype(w.dtype())?)),
        Weight::Packed(packed) => packed,
        Weight::Arranged(_) => return Err(graft_quant::Error::Request(NOT_STORED.into()).into()),
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

/// How a weight is stored, in words.
pub(crate) fn form(weight: &Weight) -> String {
    match weight {
        Weight::Packed(Packed { grid, .. }) => grid.to_string(),
        Weight::Dense(w) => match w.dtype() {
            Dtype::Float32 => "float32".into(),
            Dtype::Float16 => "float16".into(),
            Dtype::Bfloat16 => "bfloat16".into(),
            other => format!("{other:?}"),
        },
        Weight::Arranged(_) => "packed".into(),
    }
}

/// Checkpoints are read as they are stored; a weight in a layout of inference has no place here.
pub(crate) const NOT_STORED: &str = "weights laid out for inference cannot be stored";

/// The Frobenius norm.
fn norm(array: &Array) -> Result<f64> {
    Ok(sum(&array.square()?)?.sqrt())
}

/// The sum of a matrix: rows in f32, the rows' sums in f64.
fn sum(array: &Array) -> Result<f64> {
    let rows = Tensor::from_array(&array.sum_axis(-1, false)?)?;
    Ok(rows.to_f32()?.into_iter().map(f64::from).sum())
}
