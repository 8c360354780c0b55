//! What storing a weight costs, added up: squares over its elements, and at its outputs where the inputs are known.

use graft_ops::Array;
use graft_ops::ffi::read;
use graft_quant::Hessian;

use crate::Result;

/// Elements whose squares are added in f32 before they join the sum in f64, where no grid says otherwise.
const RUN: usize = 64;

/// Sums of squares over a matrix: W, W' - W, stored - W', and the product of the last two.
#[derive(Debug, Default, Clone)]
pub(crate) struct Sums {
    pub(crate) weight: f64,
    pub(crate) delta: f64,
    pub(crate) error: f64,
    along: f64,
    /// (W' - W)^2 in squared steps of the base's grid.
    steps: Option<f64>,
    /// Elements, and those that are stored as another number than the base's.
    pub(crate) count: f64,
    pub(crate) changed: f64,
    /// Squares of what is left to an adapter.
    pub(crate) low_rank: f64,
    pub(crate) effect: Option<Effect>,
}

/// `tr(D G D^T)` of the update and of the error, for inputs with moments G.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Effect {
    pub(crate) delta: f64,
    error: f64,
}

impl Sums {
    /// Adds rows: those of W, of W', and of what is stored; f32 and evaluated. `steps` are the base's scales by group.
    pub(crate) fn add(
        &mut self,
        [before, exact, after]: [&Array; 3],
        steps: Option<(&Array, i32)>,
    ) -> Result<()> {
        let columns = before.dim(1) as usize;
        let [before, exact, after] = [read::<f32>(before)?, read(exact)?, read(after)?];
        let scales = steps.map(|(scales, _)| read::<f32>(scales)).transpose()?;
        let run = steps.map_or(RUN, |(_, group)| group as usize).min(columns.max(1));
        let rows = before.len() / columns.max(1);
        // One total a row, added in their order: the same whatever the number of threads.
        let mut totals = vec![[0f64; 6]; rows];
        let share = rows.div_ceil(graft_ops::threads()).max(1);
        std::thread::scope(|scope| {
            for (part, totals) in totals.chunks_mut(share).enumerate() {
                scope.spawn(move || {
                    for (index, total) in totals.iter_mut().enumerate() {
                        let row = part * share + index;
                        let of = |all: &'_ [f32]| row * columns..((row + 1) * columns).min(all.len());
                        let parts = before[of(before)]
                            .chunks(run)
                            .zip(exact[of(exact)].chunks(run))
                            .zip(after[of(after)].chunks(run));
                        for (group, ((before, exact), after)) in parts.enumerate() {
                            let sums = squares(before, exact, after);
                            total.iter_mut().zip(sums).for_each(|(total, sum)| *total += f64::from(sum));
                            if let Some(scales) = scales {
                                let step = f64::from(scales[row * columns.div_ceil(run) + group]);
                                total[5] += if step == 0.0 { 0.0 } else { f64::from(sums[1]) / step.powi(2) };
                            }
                        }
                    }
                });
            }
        });
        for [weight, delta, error, along, changed, steps] in totals {
            self.weight += weight;
            self.delta += delta;
            self.error += error;
            self.along += along;
            self.changed += changed;
            if scales.is_some() {
                *self.steps.get_or_insert(0.0) += steps;
            }
        }
        self.count += before.len() as f64;
        Ok(())
    }

    /// Adds what update and error, (rows, in) each, do at the output.
    pub(crate) fn add_effect(&mut self, hessian: &Hessian, delta: &Array, error: &Array) -> Result<()> {
        let total =
            |rows: Array| -> Result<f64> { Ok(read::<f32>(&rows)?.iter().map(|x| f64::from(*x)).sum()) };
        let effect = self.effect.get_or_insert_default();
        effect.delta += total(hessian.cost(delta)?)?;
        effect.error += total(hessian.cost(error)?)?;
        Ok(())
    }

    pub(crate) fn is_finite(&self) -> bool {
        self.weight.is_finite() && self.delta.is_finite() && self.error.is_finite()
    }

    /// Whether the update is below `share` of the weight.
    pub(crate) fn is_nothing(&self, share: f64) -> bool {
        self.delta.sqrt() <= share * self.weight.sqrt()
    }

    /// The share of the update that is there, `1 - ||stored - W'||^2 / ||W' - W||^2`.
    pub(crate) fn kept(&self) -> f64 {
        1.0 - self.error / self.delta
    }

    /// Whether less than `enough` of an update of `total` squares will be kept, whatever the rows to come: for certain, with a
    /// margin for squares that are added in f32.
    pub(crate) fn falls_short(&self, enough: f64, total: f64) -> bool {
        self.error > 1.01 * (1.0 - enough) * total
    }

    /// The same at the output.
    pub(crate) fn effect_kept(&self) -> Option<f64> {
        self.effect.filter(|effect| effect.delta > 0.0).map(|effect| 1.0 - effect.error / effect.delta)
    }

    /// Cosine of the update and of what is stored of it.
    pub(crate) fn cosine(&self) -> f64 {
        let real = self.delta + 2.0 * self.along + self.error;
        if real > 0.0 { (self.delta + self.along) / (self.delta * real).sqrt() } else { 0.0 }
    }

    /// The root of the mean square of the update in steps of the base's grid; none where the base is dense.
    pub(crate) fn delta_steps(&self) -> Option<f64> {
        self.steps.map(|steps| (steps / self.count).sqrt())
    }
}

/// Of a run of elements: the squares of W, of W' - W, of stored - W', the product of the last two, and how many are stored as
/// another number than W's.
fn squares(before: &[f32], exact: &[f32], after: &[f32]) -> [f32; 5] {
    const LANES: usize = 8;
    let ((wholes, rest), (exact, exact_rest), (after, after_rest)) =
        (before.as_chunks::<LANES>(), exact.as_chunks::<LANES>(), after.as_chunks::<LANES>());
    let mut most = [0f32; LANES];
    for whole in wholes {
        for (most, w) in most.iter_mut().zip(whole) {
            *most = if w.abs() > *most { w.abs() } else { *most };
        }
    }
    // The same number may come out of f32 some units off in the last place of its scale and bias, not its own.
    let same = 1e-6 * most.iter().chain(rest).fold(0f32, |most, w| most.max(w.abs()));
    let mut lanes = [[0f32; LANES]; 5];
    let mut add = |lane: usize, w: f32, new: f32, stored: f32| {
        let (delta, error) = (new - w, stored - new);
        lanes[0][lane] += w * w;
        lanes[1][lane] += delta * delta;
        lanes[2][lane] += error * error;
        lanes[3][lane] += delta * error;
        lanes[4][lane] += f32::from(u8::from((stored - w).abs() > same));
    };
    for ((whole, exact), after) in wholes.iter().zip(exact).zip(after) {
        for lane in 0..LANES {
            add(lane, whole[lane], exact[lane], after[lane]);
        }
    }
    for (lane, ((w, new), stored)) in rest.iter().zip(exact_rest).zip(after_rest).enumerate() {
        add(lane, *w, *new, *stored);
    }
    lanes.map(|lanes| lanes.iter().sum())
}
