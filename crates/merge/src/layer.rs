//! One weight: the exact sum in f32, the forms in which it may be stored, and what that costs.

use std::collections::VecDeque;

use graft_adapters::{Adapter, Kind};
use graft_ops::ffi::read;
use graft_ops::{Array, Dtype};
use graft_quant::{Grid, Hessian, Levels, Packed, Tensor, Weight, round_compensated, round_nearest};

use crate::module::{norm_of_product, squared};
use crate::sums::Sums;
use crate::{ENOUGH, Error, LayerReport, Result};

/// What a packed weight with an adapter becomes. A dense one stays dense in its own type whatever the policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// Affine codes of 8 bits in the groups it had (32 where it had less), so that a small update is not lost between two
    /// steps; dense in the type of its scales, or of the model's floats, where 8 bits keep too little of it.
    Raise,
    /// Dense, in the type of its scales, or of the model's floats.
    Dense,
    /// The bits and the mode it had, with errors made good by later columns where the inputs are known. Each group keeps its
    /// scale and bias unless new ones come nearer.
    Same,
    /// The codes it had: DoRA's row factor goes into scales and biases, the low-rank part stays an adapter. As `Raise` where
    /// the rounding of 16-bit scales costs too much. Refused where codes are floats, whose scales take no such factor.
    Fold,
}

impl Policy {
    /// All of them.
    pub const ALL: [Policy; 4] = [Policy::Raise, Policy::Dense, Policy::Same, Policy::Fold];

    /// Its name on the command line and in the report.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raise => "raise",
            Self::Dense => "dense",
            Self::Same => "same",
            Self::Fold => "fold",
        }
    }

    /// The policy of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.name() == name)
    }
}

/// The width of a raised weight.
pub(crate) const RAISED: i32 = 8;
/// Below this share of ||W|| an update is the rounding of f32: a DoRA adapter at its start has m = n up to that.
const NOTHING: f64 = 1.1e-6;
/// What a row factor in 16-bit scales must keep of the update.
const FOLDED: f64 = 0.99;

/// What an adapter does to a weight.
pub(crate) enum Update<'a> {
    /// The low-rank sum.
    LowRank(&'a Adapter, Kind),
    /// Another weight in its place, of any float type.
    Whole(Array),
}

impl Update<'_> {
    /// Rows `ids` (N,) of W' in f32, where `rows` are those of W, and DoRA's factor of each.
    fn apply(&self, rows: &Array, ids: &Array) -> Result<(Array, Option<Array>)> {
        Ok(match self {
            Self::LowRank(adapter, kind) => adapter.rows(*kind, ids)?.fused_by(rows, *kind)?,
            Self::Whole(whole) => (whole.take_axis(ids, 0)?.as_dtype(Dtype::Float32)?, None),
        })
    }

    /// `||W' - W||^2` where it is known beforehand: of a low-rank sum without DoRA's factor, unless its parts nearly cancel and
    /// what is left is the rounding of f32.
    fn squares(&self) -> Result<Option<f64>> {
        let Self::LowRank(Adapter { a, b, scale, magnitude: None }, _) = self else { return Ok(None) };
        let square = |x: &Array| -> Result<f64> { Ok(squared(read(&x.contiguous()?)?)) };
        let (squares, terms) = (norm_of_product(a, b)?.powi(2), square(a)? * square(b)?);
        Ok(Some(f64::from(*scale).powi(2) * squares).filter(|_| squares > 1e-3 * terms))
    }

    fn folds(&self) -> bool {
        matches!(self, Self::LowRank(adapter, _) if adapter.magnitude.is_some())
    }
}

/// A form in which a weight may be stored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Form {
    /// Floats.
    Dense(Dtype),
    /// Codes of this grid.
    Packed(Grid),
    /// The codes as they are, with new scales and biases; the rest of the update stays an adapter.
    Folded,
}

impl Form {
    /// The forms that a policy tries, in this order, until one keeps enough.
    /// `floats` is the type of those that are not packed.
    pub(crate) fn of(policy: Policy, weight: &Weight, folds: bool, floats: Dtype) -> Result<Vec<Form>> {
        let packed = match weight {
            Weight::Dense(w) => return Ok(vec![Form::Dense(w.dtype())]),
            Weight::Packed(packed) => packed,
            Weight::Arranged(_) => return Err(not_stored()),
        };
        let dense = Form::Dense(level_type(packed, floats));
        // Groups of 16 may be an odd number in a row, which has no groups of 32.
        let raised = Some(packed.grid.raised(RAISED)).filter(|grid| grid.fits(weight.in_features() as usize));
        let raised = raised.map(Form::Packed);
        Ok(match policy {
            Policy::Dense => vec![dense],
            Policy::Same => vec![Form::Packed(packed.grid)],
            Policy::Fold if folds => {
                [Some(Form::Folded), raised, Some(dense)].into_iter().flatten().collect()
            }
            Policy::Raise | Policy::Fold => raised.into_iter().chain([dense]).collect(),
        })
    }

    fn enough(self) -> f64 {
        if self == Form::Folded { FOLDED } else { ENOUGH }
    }

    fn name(self) -> String {
        match self {
            Form::Dense(dtype) => format!("{dtype:?}").to_lowercase(),
            Form::Packed(grid) if grid.is_float() => grid.mode.name().into(),
            Form::Packed(grid) => format!("{} bits", grid.bits),
            Form::Folded => "scales with the row factor".into(),
        }
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
            Weight::Packed(packed) => {
                self.grid = Some(packed.grid);
                packed.parts().map(|(_, array)| Ok(Tensor::from_array(array)?)).collect::<Result<_>>()?
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

/// The type of affine scales or of floats that a packed weight may get: of its scales, or of the model's `floats`.
fn level_type(packed: &Packed, floats: Dtype) -> Dtype {
    if packed.grid.is_float() { floats } else { packed.scales.dtype() }
}

/// Checkpoints are read as they are stored; a weight in a layout of inference has no place here.
fn not_stored() -> Error {
    graft_quant::Error::Request("weights laid out for inference cannot be stored".into()).into()
}

/// A weight after its update; nothing to store if the update is nothing.
pub(crate) struct Fused {
    pub(crate) stored: Option<Stored>,
    /// What of the update is not in the weight and stays an adapter on it.
    pub(crate) rest: Option<Adapter>,
    pub(crate) report: LayerReport,
}

/// A form that was tried.
struct Attempt {
    form: Form,
    to: String,
    stored: Stored,
    sums: Sums,
    /// Rows that were done before it was certain that it keeps too little.
    left_after: Option<i32>,
    /// Rows whose errors were made good by later columns, where that was tried.
    compensated: Option<usize>,
    /// DoRA's factor of all rows, where it went into the scales.
    factor: Option<Array>,
}

/// Fuses one matrix of a model whose floats are `floats`. Beside the weight itself and its results, a block of rows is in memory.
pub(crate) fn fuse_weight(
    path: &str,
    weight: &Weight,
    update: &Update,
    (policy, floats): (Policy, Dtype),
    hessian: Option<&Hessian>,
) -> Result<Fused> {
    let (kind, rank, scale) = match update {
        Update::LowRank(a, _) if a.magnitude.is_some() => ("dora", Some(a.rank()), Some(a.scale)),
        Update::LowRank(a, _) => ("lora", Some(a.rank()), Some(a.scale)),
        Update::Whole(_) => ("full", None, None),
    };
    let forms = Form::of(policy, weight, update.folds(), floats)?;
    let total = if forms.len() > 1 { update.squares()? } else { None };
    let mut best: Option<Attempt> = None;
    let mut reasons = Vec::new();
    // The last one has nothing to be left for.
    let count = forms.len();
    let bounded = forms.into_iter().enumerate().map(|(i, form)| (form, total.filter(|_| i + 1 < count)));
    let mut forms: VecDeque<_> = bounded.collect();
    while let Some((form, total)) = forms.pop_front() {
        let found = attempt(weight, update, (form, floats), (hessian, total))?;
        if !found.sums.is_finite() {
            return Err(Error::NotFinite { path: path.to_owned(), scale: scale.unwrap_or(1.0) });
        }
        if let (Some(rows), Some(total)) = (found.left_after, total) {
            // It may still be the best if those to come keep too little as well.
            forms.push_back((form, None));
            let most = 100.0 * (1.0 - found.sums.error / total);
            let of = weight.out_features();
            reasons.push(format!(
                "{} kept at most {most:.1} % of the update (left after {rows} of {of} rows)",
                form.name()
            ));
            continue;
        }
        let done = found.sums.is_nothing(NOTHING) || found.sums.kept() >= form.enough();
        let kept = 100.0 * found.sums.kept();
        // Of forms that all keep too little, the one that keeps most.
        if done || best.as_ref().is_none_or(|best| found.sums.error < best.sums.error) {
            best = Some(found);
        }
        if done {
            break;
        }
        reasons.push(format!("{} kept {kept:.1} % of the update", form.name()));
    }
    let Some(Attempt { form: chosen, to, stored, sums, compensated, factor, .. }) = best else {
        return Err(not_stored());
    };
    let changed = !sums.is_nothing(NOTHING);
    let rest = match update {
        Update::LowRank(adapter, _) if chosen == Form::Folded && changed && sums.low_rank > 0.0 => {
            let b = factor.map_or_else(|| Ok(adapter.b.clone()), |factor| adapter.b.multiply(factor))?;
            Some(Adapter { a: adapter.a.clone(), b, scale: adapter.scale, magnitude: None })
        }
        _ => None,
    };
    let rows = f64::from(weight.out_features());
    let when = |value: f64, nothing: f64| if changed { value } else { nothing };
    let report = LayerReport {
        path: path.to_owned(),
        kind: kind.into(),
        rank,
        scale,
        from: self::form(weight),
        to: if changed { to } else { self::form(weight) },
        weight_norm: sums.weight.sqrt(),
        delta_norm: when(sums.delta.sqrt(), 0.0),
        delta_steps: sums.delta_steps().filter(|_| changed),
        relative_error: when((sums.error / sums.delta).sqrt(), 0.0),
        kept: when(sums.kept(), 1.0),
        cosine: when(sums.cosine(), 1.0),
        codes_changed: when(sums.changed / sums.count, 0.0),
        effect_norm: sums.effect.map(|effect| effect.delta.sqrt()).filter(|_| changed),
        effect_kept: sums.effect_kept().filter(|_| changed),
        compensated: compensated.map(|n| n as f64 / rows).filter(|_| changed),
        reason: Some(reasons.join("; ")).filter(|reason| changed && !reason.is_empty()),
    };
    Ok(Fused { stored: changed.then_some(stored), rest, report })
}

/// Rows of a weight, and what an update makes of them: MLX's thread begins with them while ours still have those before.
struct Block {
    rows: Weight,
    before: Array,
    exact: Array,
    factor: Option<Array>,
}

impl Block {
    fn begin(weight: &Weight, update: &Update, ids: &Array) -> Result<Block> {
        let (rows, before) = (weight.slice(ids)?, weight.rows(ids, Dtype::Float32)?);
        let (exact, factor) = update.apply(&before, ids)?;
        graft_ops::ffi::async_eval([&before, &exact])?;
        Ok(Block { rows, before, exact, factor })
    }
}

/// Stores a weight in one form and adds up what that costs; of an update of `total` squares it is left as soon as it is certain
/// to keep too little.
fn attempt(
    weight: &Weight,
    update: &Update,
    (form, floats): (Form, Dtype),
    (hessian, total): (Option<&Hessian>, Option<f64>),
) -> Result<Attempt> {
    let (mut stored, mut sums) = (Stored::default(), Sums::default());
    let (mut rows_done, mut left_after) = (0, None);
    let (mut to, mut compensated, mut factors) = (self::form(weight), None, Vec::new());
    let mut blocks = weight.row_blocks().map(|ids| Block::begin(weight, update, &ids));
    let mut next = blocks.next();
    while let Some(block) = next {
        let Block { rows, before, exact, factor } = block?;
        next = blocks.next();
        let new = match (form, &rows) {
            (Form::Dense(dtype), _) => Weight::Dense(exact.as_dtype(dtype)?),
            (Form::Packed(grid), Weight::Packed(packed)) => {
                let dtype = level_type(packed, floats);
                let (new, own) = pack(&exact, factor.as_ref(), packed, (grid, dtype), hessian)?;
                compensated = own.map(|own| own + compensated.unwrap_or(0)).or(compensated);
                Weight::Packed(new)
            }
            (Form::Folded, Weight::Packed(packed)) => fold(packed, factor.as_ref())?,
            _ => return Err(not_stored()),
        };
        let mut after =
            new.rows(&Array::from_iter(0..new.out_features(), &[new.out_features()]), Dtype::Float32)?;
        if let (Form::Folded, Some(factor)) = (form, &factor) {
            // What the adapter that stays adds to it.
            let rest = exact.subtract(before.multiply(factor.expand_dims(1)?)?)?;
            sums.low_rank +=
                read::<f32>(&rest.square()?.sum_axis(1, false)?)?.iter().map(|x| f64::from(*x)).sum::<f64>();
            after = after.add(rest)?;
            factors.push(factor.clone());
        }
        let steps = match &rows {
            Weight::Packed(packed) => Some((packed.steps()?, packed.grid.group_size)),
            _ => None,
        };
        graft_ops::ffi::eval([&before, &exact, &after])?;
        sums.add([&before, &exact, &after], steps.as_ref().map(|(scales, group)| (scales, *group)))?;
        if let Some(hessian) = hessian {
            sums.add_effect(hessian, &exact.subtract(&before)?, &after.subtract(&exact)?)?;
        }
        stored.push(&new)?;
        to = self::form(&new);
        rows_done += new.out_features();
        if next.is_some() && total.is_some_and(|total| sums.falls_short(form.enough(), total)) {
            left_after = Some(rows_done);
            break;
        }
    }
    let factor = if factors.is_empty() { None } else { Some(mlx_rs::ops::concatenate(&factors, 0)?) };
    Ok(Attempt { form, to, stored, sums, left_after, compensated, factor })
}

/// Rows of the exact weight in a grid, with affine scales of `dtype`, and in how many of them errors were made good by later
/// columns.
fn pack(
    exact: &Array,
    factor: Option<&Array>,
    packed: &Packed,
    (grid, dtype): (Grid, Dtype),
    hessian: Option<&Hessian>,
) -> Result<(Packed, Option<usize>)> {
    let own = if grid == packed.grid {
        Some(Levels::from(packed))
    } else {
        Levels::finer(packed, grid.bits, dtype)?
    };
    // DoRA's rows are those of W + s A B times a factor: so are the levels on which W lies. Codes are chosen for the levels as
    // stored, which rounds once where packing first and multiplying then would round twice.
    let scaled = match (&own, factor) {
        (Some(own), Some(factor)) if !grid.is_float() => Some(own.scaled(factor)?),
        _ => None,
    };
    let fresh = Levels::fresh(exact, grid, dtype)?;
    let start = scaled.as_ref().or(own.as_ref()).unwrap_or(&fresh).clone();
    let levels: Vec<Levels> = own.into_iter().chain(scaled).chain([fresh]).collect();
    let plain = round_nearest(exact, grid, &levels)?;
    let Some(hessian) = hessian else { return Ok((plain, None)) };
    let better = round_compensated(exact, grid, &start, hessian)?;
    let cost = |packed: &Packed| -> Result<Array> {
        Ok(hessian.cost(&packed.dequantize(Dtype::Float32)?.subtract(exact)?)?)
    };
    let cheaper = cost(&better)?.lt(cost(&plain)?)?;
    let rows = read::<bool>(&cheaper)?.iter().filter(|row| **row).count();
    let cheaper = cheaper.expand_dims(1)?;
    let pick = |new: &Array, old: &Array| mlx_rs::ops::select(&cheaper, new, old);
    let chosen = Packed {
        codes: pick(&better.codes, &plain.codes)?,
        scales: pick(&better.scales, &plain.scales)?,
        biases: match (&better.biases, &plain.biases) {
            (Some(better), Some(plain)) => Some(pick(better, plain)?),
            _ => None,
        },
        grid,
    };
    Ok((chosen, Some(rows)))
}

/// Rows with the factor in their scales and biases.
fn fold(packed: &Packed, factor: Option<&Array>) -> Result<Weight> {
    let levels = Levels::from(packed);
    let Levels { scales, biases } = factor.map_or(Ok(levels.clone()), |factor| levels.scaled(factor))?;
    Ok(Weight::Packed(Packed { codes: packed.codes.clone(), scales, biases, grid: packed.grid }))
}

/// A packed matrix made dense, in the type of its scales, or in that of the model's floats.
pub(crate) fn dense(weight: &Packed, floats: Dtype) -> Result<Stored> {
    let (dtype, weight) = (level_type(weight, floats), Weight::Packed(weight.clone()));
    let mut stored = Stored::default();
    for ids in weight.row_blocks() {
        stored.push(&Weight::Dense(weight.slice(&ids)?.dequantize(dtype)?))?;
    }
    Ok(stored)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a panic is a test's report")]
mod tests {
    use graft_quant::round;

    use super::*;

    /// The size of an update of which 8 bits keep just over 90 %.
    const BARELY: f32 = 2.67e-3;

    /// A weight of two blocks of rows and an update of about so much, on floats of f16.
    fn fused(size: f32) -> (Weight, Adapter, Fused) {
        let wave = |rows: i32, columns: i32, by: f32, size: f32| {
            Array::from_iter((0..rows * columns).map(|i| size * (by * i as f32).sin()), &[rows, columns])
        };
        let grid = Grid::affine(4, 64);
        let w = wave(2100, 512, 0.37, 0.5).as_dtype(Dtype::Float16).unwrap();
        let weight = Weight::Packed(round(&w, grid, None).unwrap());
        let (a, b) = (wave(512, 2, 0.71, 1.0), wave(2, 2100, 0.53, size));
        let adapter = Adapter { a, b, scale: 1.5, magnitude: None };
        let update = Update::LowRank(&adapter, Kind::Linear);
        let fused = fuse_weight("layer", &weight, &update, (Policy::Raise, Dtype::Float16), None).unwrap();
        (weight, adapter, fused)
    }

    /// What storing it whole in 8 bits and in floats takes.
    fn whole(weight: &Weight, adapter: &Adapter) -> [Attempt; 2] {
        let update = Update::LowRank(adapter, Kind::Linear);
        let Weight::Packed(packed) = weight else { unreachable!() };
        let forms = [Form::Packed(packed.grid.raised(RAISED)), Form::Dense(Dtype::Float16)];
        forms.map(|form| attempt(weight, &update, (form, Dtype::Float16), (None, None)).unwrap())
    }

    /// Whether it is stored as that attempt did.
    fn is(fused: Fused, attempt: &Attempt) -> bool {
        let (own, other) = (fused.stored.unwrap().tensors, &attempt.stored.tensors);
        fused.report.to == attempt.to
            && own.len() == other.len()
            && own.iter().zip(other).all(|(a, b)| a.data == b.data)
    }

    #[test]
    fn rows_that_have_no_groups_of_32_become_floats() {
        let w = Array::from_iter((0..48 * 8).map(|i| (0.37 * i as f32).sin()), &[8, 48]);
        let weight = Weight::Packed(round(&w, Grid::of(graft_ops::ffi::Mode::Nvfp4), None).unwrap());
        let forms = Form::of(Policy::Raise, &weight, false, Dtype::Float16).unwrap();
        assert_eq!(forms, [Form::Dense(Dtype::Float16)]);
    }

    #[test]
    fn a_form_that_is_too_coarse_is_left_as_soon_as_that_is_certain() {
        let (weight, adapter, fused) = fused(1e-3);
        let [raised, dense] = whole(&weight, &adapter);
        assert!(raised.sums.kept() < 0.9 && dense.sums.kept() > 0.9);
        let reason = fused.report.reason.clone().unwrap();
        let most: f64 = reason.split(' ').nth(5).unwrap().parse().unwrap();
        assert!(
            reason.starts_with("8 bits kept at most ") && reason.ends_with("(left after 2048 of 2100 rows)")
        );
        assert!(most >= 100.0 * raised.sums.kept() - 0.05 && most < 90.0, "{reason}");
        assert!(is(fused, &dense));
    }

    #[test]
    fn a_form_that_keeps_barely_enough_is_not_left() {
        let (weight, adapter, fused) = fused(BARELY);
        let [raised, _] = whole(&weight, &adapter);
        assert!((0.9..0.91).contains(&raised.sums.kept()), "{}", raised.sums.kept());
        assert!(fused.report.reason.is_none() && is(fused, &raised));
    }

    #[test]
    fn where_no_form_keeps_enough_one_that_was_left_may_still_be_the_best() {
        let (weight, adapter, fused) = fused(1e-5);
        let [raised, dense] = whole(&weight, &adapter);
        assert!(raised.sums.kept() < 0.9 && dense.sums.kept() < 0.9 && raised.sums.error < dense.sums.error);
        let reason = fused.report.reason.as_deref().unwrap();
        assert!(
            reason.contains("2100 rows); float16 kept ") && reason.contains("; 8 bits kept "),
            "{reason}"
        );
        assert!(is(fused, &raised));
    }

    #[test]
    fn of_an_update_whose_parts_cancel_nothing_is_known_beforehand() {
        let ones = |shape: &[i32]| mlx_rs::ops::ones::<f32>(shape).unwrap();
        let minus = Array::from_slice(&[1.0f32, -1.000_01], &[2, 1]);
        let b = ones(&[2, 64]).multiply(minus).unwrap();
        let adapter = Adapter { a: ones(&[64, 2]), b, scale: 1.0, magnitude: None };
        assert_eq!(Update::LowRank(&adapter, Kind::Linear).squares().unwrap(), None);
    }
}
