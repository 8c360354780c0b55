//! The optimizers of MLX, formula by formula, over a list of f32 tensors. State is f32 and explicit.
//!
//! Letters: p parameter, g gradient, l learning rate, t the update (from 1).

use std::collections::BTreeMap;

use graft_ops::{AdamStep, Array};
use mlx_rs::ops;
use serde_json::{Map, Value};

use crate::Result;
use crate::error::setting;

/// One of MLX's optimizers with its settings (`optimizer_config` in mlx-lm).
#[derive(Debug, Clone, PartialEq)]
pub enum Optimizer {
    /// `m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; p -= l m / (sqrt(v) + eps)`; AdamW first does `p *= 1 - l d`.
    Adam {
        /// b1 and b2.
        betas: (f64, f64),
        /// eps.
        eps: f64,
        /// Whether m and v are divided by `1 - b^t`; MLX's default is no.
        bias_correction: bool,
        /// d, of AdamW.
        weight_decay: Option<f64>,
    },
    /// `g += d p; v = mu v + (1 - tau) g; p -= l v`, with Nesterov `p -= l (g + mu v)`.
    Sgd {
        /// mu.
        momentum: f64,
        /// d.
        weight_decay: f64,
        /// tau.
        dampening: f64,
        /// Whether the step looks ahead.
        nesterov: bool,
    },
    /// `g += d p; v = mu v + (1 - mu) g; u = (1 - mu) g + mu v; p -= l sqrt(max(1, rows / cols)) orthogonal(u)`.
    Muon {
        /// mu.
        momentum: f64,
        /// d.
        weight_decay: f64,
        /// Whether u mixes in g; u = v if not.
        nesterov: bool,
        /// Newton-Schulz iterations.
        ns_steps: u64,
    },
    /// Factored second moments; the learning rate is ignored while `relative_step` (MLX's default).
    Adafactor(Adafactor),
}

/// Settings of [`Optimizer::Adafactor`].
#[derive(Debug, Clone, PartialEq)]
pub struct Adafactor {
    /// Added to g^2, and the least scale of a parameter.
    pub eps: (f64, f64),
    /// Greatest root mean square of an update.
    pub clip_threshold: f64,
    /// c of `b2 = 1 - t^c`.
    pub decay_rate: f64,
    /// Momentum of the update.
    pub beta_1: Option<f64>,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Whether the rate is multiplied by the parameter's root mean square.
    pub scale_parameter: bool,
    /// Whether the rate is `min(1e-2, 1 / sqrt(t))` whatever the learning rate is.
    pub relative_step: bool,
    /// Whether that first number is `1e-6 t`.
    pub warmup_init: bool,
}

/// What an optimizer remembers of one parameter: named f32 arrays (`m`, `v`, ...).
pub type Slot = BTreeMap<String, Array>;

/// What an optimizer remembers.
#[derive(Debug, Clone)]
pub struct OptimizerState {
    /// Updates done.
    pub step: u64,
    /// By parameter.
    pub slots: Vec<Slot>,
}

/// Reads settings by name and notices those that nobody asked for.
struct Settings<'a> {
    name: &'a str,
    map: Map<String, Value>,
}

impl Settings<'_> {
    fn field(&self, key: &str) -> String {
        format!("optimizer_config.{}.{key}", self.name)
    }

    fn number(&mut self, key: &str, default: f64) -> Result<f64> {
        match self.map.remove(key) {
            None => Ok(default),
            Some(v) => {
                v.as_f64().filter(|x| x.is_finite()).ok_or_else(|| setting(&self.field(key), "a number", v))
            }
        }
    }

    fn flag(&mut self, key: &str, default: bool) -> Result<bool> {
        match self.map.remove(key) {
            None => Ok(default),
            Some(v) => v.as_bool().ok_or_else(|| setting(&self.field(key), "true or false", v)),
        }
    }

    fn pair(&mut self, key: &str, default: (f64, f64)) -> Result<(f64, f64)> {
        let Some(v) = self.map.remove(key) else { return Ok(default) };
        match v.as_array().map(Vec::as_slice) {
            Some([a, b]) => a.as_f64().zip(b.as_f64()),
            _ => None,
        }
        .ok_or_else(|| setting(&self.field(key), "a list of two numbers", v))
    }

    fn done(self) -> Result<()> {
        match self.map.keys().next() {
            None => Ok(()),
            Some(key) => Err(setting(&self.field(key), "a setting that this optimizer has", key)),
        }
    }
}

impl Optimizer {
    /// The optimizer of that name (adam, adamw, sgd, muon, adafactor) with MLX's defaults under `config`.
    ///
    /// # Errors
    /// When the name or a key is unknown, or a value is of the wrong type or out of range.
    pub fn from_config(name: &str, config: &Map<String, Value>) -> Result<Self> {
        let mut s = Settings { name, map: config.clone() };
        let optimizer = match name {
            "adam" | "adamw" => {
                let betas = s.pair("betas", (0.9, 0.999))?;
                if !(0.0..1.0).contains(&betas.0) || !(0.0..1.0).contains(&betas.1) {
                    return Err(setting(&s.field("betas"), "numbers in [0, 1)", format!("{betas:?}")));
                }
                let eps = s.number("eps", 1e-8)?;
                let bias_correction = s.flag("bias_correction", false)?;
                let weight_decay = if name == "adamw" { Some(s.number("weight_decay", 0.01)?) } else { None };
                Self::Adam { betas, eps, bias_correction, weight_decay }
            }
            "sgd" => {
                let momentum = s.number("momentum", 0.0)?;
                let weight_decay = s.number("weight_decay", 0.0)?;
                let dampening = s.number("dampening", 0.0)?;
                let nesterov = s.flag("nesterov", false)?;
                if nesterov && (momentum <= 0.0 || dampening != 0.0) {
                    return Err(setting(&s.field("nesterov"), "momentum above 0 and no dampening", nesterov));
                }
                Self::Sgd { momentum, weight_decay, dampening, nesterov }
            }
            "muon" => Self::Muon {
                momentum: s.number("momentum", 0.95)?,
                weight_decay: s.number("weight_decay", 0.01)?,
                nesterov: s.flag("nesterov", true)?,
                ns_steps: s.number("ns_steps", 5.0)? as u64,
            },
            "adafactor" => {
                let beta_1 = match s.map.remove("beta_1") {
                    None | Some(Value::Null) => None,
                    Some(v) => Some(v.as_f64().ok_or_else(|| setting(&s.field("beta_1"), "a number", v))?),
                };
                Self::Adafactor(Adafactor {
                    eps: s.pair("eps", (1e-30, 1e-3))?,
                    clip_threshold: s.number("clip_threshold", 1.0)?,
                    decay_rate: s.number("decay_rate", -0.8)?,
                    beta_1,
                    weight_decay: s.number("weight_decay", 0.0)?,
                    scale_parameter: s.flag("scale_parameter", true)?,
                    relative_step: s.flag("relative_step", true)?,
                    warmup_init: s.flag("warmup_init", false)?,
                })
            }
            _ => return Err(setting("optimizer", "adam, adamw, sgd, muon or adafactor", name)),
        };
        s.done()?;
        Ok(optimizer)
    }

    /// Whether the learning rate has no effect.
    pub fn ignores_learning_rate(&self) -> bool {
        matches!(self, Self::Adafactor(settings) if settings.relative_step)
    }

    /// The state before the first update: zeros.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn start(&self, params: &[Array]) -> Result<OptimizerState> {
        let mut slots = Vec::with_capacity(params.len());
        for p in params {
            let whole = p.shape();
            let names = match self {
                Self::Adam { .. } => vec![("m", whole), ("v", whole)],
                Self::Sgd { momentum, .. } if *momentum <= 0.0 => vec![],
                Self::Sgd { .. } | Self::Muon { .. } => vec![("v", whole)],
                Self::Adafactor(settings) => {
                    let factored = vec![("exp_avg_sq_row", &whole[..1]), ("exp_avg_sq_col", &whole[1..])];
                    let mut names = if whole.len() == 2 { factored } else { vec![("exp_avg_sq", whole)] };
                    names.extend(settings.beta_1.map(|_| ("exp_avg", whole)));
                    names
                }
            };
            let mut slot = Slot::new();
            for (name, shape) in names {
                slot.insert(name.to_owned(), ops::zeros::<f32>(shape)?);
            }
            slots.push(slot);
        }
        Ok(OptimizerState { step: 0, slots })
    }

    /// One update: the new parameters and the new state, not evaluated. The old ones stay valid.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn update(
        &self,
        rate: f64,
        params: &[Array],
        grads: &[Array],
        state: &OptimizerState,
    ) -> Result<(Vec<Array>, OptimizerState)> {
        let t = state.step + 1;
        let mut next = OptimizerState { step: t, slots: Vec::with_capacity(params.len()) };
        let mut updated = Vec::with_capacity(params.len());
        for ((p, g), slot) in params.iter().zip(grads).zip(&state.slots) {
            let mut slot = slot.clone();
            updated.push(self.update_one(rate, t, p, g, &mut slot)?);
            next.slots.push(slot);
        }
        Ok((updated, next))
    }

    fn update_one(&self, rate: f64, t: u64, p: &Array, g: &Array, slot: &mut Slot) -> Result<Array> {
        match *self {
            Self::Adafactor(ref settings) => settings.update(rate, t, p, g, slot),
            Self::Adam { betas: (b1, b2), eps, bias_correction, weight_decay } => {
                let mut step = AdamStep {
                    betas: (b1 as f32, b2 as f32),
                    shares: ((1.0 - b1) as f32, (1.0 - b2) as f32),
                    eps: eps as f32,
                    rate: rate as f32,
                    correction: None,
                    keep: weight_decay.map(|d| (1.0 - rate * d) as f32),
                };
                if bias_correction {
                    step.rate = (rate / (1.0 - b1.powf(t as f64))) as f32;
                    step.correction = Some((1.0 / (1.0 - b2.powf(t as f64)).sqrt()) as f32);
                }
                let start = || ops::zeros::<f32>(p.shape());
                let [m, v] = ["m", "v"].map(|name| slot.get(name).cloned().map_or_else(start, Ok));
                let [p, m, v] = graft_ops::adam(p, g, &m?, &v?, step)?;
                slot.insert("m".into(), m);
                slot.insert("v".into(), v);
                Ok(p)
            }
            Self::Sgd { momentum, weight_decay, dampening, nesterov } => {
                let g = decay(g, p, weight_decay)?;
                if momentum <= 0.0 {
                    return Ok(p.subtract(g.multiply(scalar(rate))?)?);
                }
                let v = blend(slot.get("v"), &g, momentum, 1.0 - dampening)?;
                let step = if nesterov { g.add(v.multiply(scalar(momentum))?)? } else { v.clone() };
                slot.insert("v".into(), v);
                Ok(p.subtract(step.multiply(scalar(rate))?)?)
            }
            Self::Muon { momentum, weight_decay, nesterov, ns_steps } => {
                let g = decay(g, p, weight_decay)?;
                let v = blend(slot.get("v"), &g, momentum, 1.0 - momentum)?;
                let mut step = if nesterov {
                    g.multiply(scalar(1.0 - momentum))?.add(v.multiply(scalar(momentum))?)?
                } else {
                    v.clone()
                };
                slot.insert("v".into(), v);
                let mut rate = rate;
                if let &[rows, cols] = step.shape() {
                    step = orthogonal(&step, ns_steps)?;
                    rate *= f64::from(rows).max(f64::from(cols)).sqrt() / f64::from(cols).sqrt();
                }
                Ok(p.subtract(step.multiply(scalar(rate))?)?)
            }
        }
    }
}

impl Adafactor {
    fn update(&self, rate: f64, t: u64, p: &Array, g: &Array, slot: &mut Slot) -> Result<Array> {
        let t = t as f64;
        let rate = if self.relative_step {
            (if self.warmup_init { 1e-6 * t } else { 1e-2 }).min(1.0 / t.sqrt())
        } else {
            rate
        };
        let rate = if self.scale_parameter {
            ops::maximum(scalar(self.eps.1), root_mean_square(p)?)?.multiply(scalar(rate))?
        } else {
            scalar(rate)
        };
        let b2 = 1.0 - t.powf(self.decay_rate);
        let squared = g.square()?.add(scalar(self.eps.0))?;
        let mut step = if p.ndim() == 2 {
            let row = blend(slot.get("exp_avg_sq_row"), &squared.mean_axis(1, false)?, b2, 1.0 - b2)?;
            let col = blend(slot.get("exp_avg_sq_col"), &squared.mean_axis(0, false)?, b2, 1.0 - b2)?;
            let rows = row.divide(row.mean(true)?)?.rsqrt()?.expand_dims(1)?;
            let cols = col.rsqrt()?.expand_dims(0)?;
            slot.insert("exp_avg_sq_row".into(), row);
            slot.insert("exp_avg_sq_col".into(), col);
            rows.multiply(cols)?.multiply(g)?
        } else {
            let all = blend(slot.get("exp_avg_sq"), &squared, b2, 1.0 - b2)?;
            let step = all.rsqrt()?.multiply(g)?;
            slot.insert("exp_avg_sq".into(), all);
            step
        };
        let excess = root_mean_square(&step)?.divide(scalar(self.clip_threshold))?;
        step = step.divide(ops::maximum(scalar(1.0), excess)?)?.multiply(&rate)?;
        if let Some(b1) = self.beta_1 {
            step = blend(slot.get("exp_avg"), &step, b1, 1.0 - b1)?;
            slot.insert("exp_avg".into(), step.clone());
        }
        let mut p = p.clone();
        if self.weight_decay != 0.0 {
            p = p.add(p.multiply(rate.multiply(scalar(-self.weight_decay))?)?)?;
        }
        Ok(p.subtract(step)?)
    }
}

fn scalar(x: f64) -> Array {
    Array::from_f32(x as f32)
}

/// `keep old + share new`, and `share new` where there is no old value.
fn blend(old: Option<&Array>, new: &Array, keep: f64, share: f64) -> Result<Array> {
    let new = new.multiply(scalar(share))?;
    Ok(match old {
        Some(old) => old.multiply(scalar(keep))?.add(new)?,
        None => new,
    })
}

fn decay(g: &Array, p: &Array, d: f64) -> Result<Array> {
    if d == 0.0 { Ok(g.clone()) } else { Ok(g.add(p.multiply(scalar(d))?)?) }
}

fn root_mean_square(x: &Array) -> Result<Array> {
    Ok(x.square()?.mean(false)?.sqrt()?)
}

/// Nearly the closest orthogonal matrix: Newton-Schulz iterations of degree five with MLX's coefficients.
fn orthogonal(x: &Array, steps: u64) -> Result<Array> {
    let tall = x.dim(0) > x.dim(1);
    let mut x = if tall { x.transpose()? } else { x.clone() };
    let norm = x.square()?.sum(true)?.sqrt()?.add(scalar(1e-7))?;
    x = x.divide(norm)?;
    for _ in 0..steps {
        let a = x.matmul(x.transpose()?)?;
        let b = a.multiply(scalar(-4.7750))?.add(a.matmul(&a)?.multiply(scalar(2.0315))?)?;
        x = x.multiply(scalar(3.4445))?.add(b.matmul(&x)?)?;
    }
    if tall { Ok(x.transpose()?) } else { Ok(x) }
}

/// `sqrt(sum of all squares)` of the gradients, a scalar that is not evaluated.
///
/// # Errors
/// When an array operation fails.
pub fn global_norm(grads: &[Array]) -> Result<Array> {
    Ok(graft_ops::squared_norm(grads)?.sqrt()?)
}

/// `min(max_norm / (norm + 1e-6), 1)`, by which every gradient is multiplied.
///
/// # Errors
/// When an array operation fails.
pub fn clip_factor(norm: &Array, max_norm: f64) -> Result<Array> {
    Ok(ops::minimum(scalar(max_norm).divide(norm.add(scalar(1e-6))?)?, scalar(1.0))?)
}
