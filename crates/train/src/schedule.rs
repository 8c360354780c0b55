//! Learning rates over the optimizer's updates, by the names and arguments that MLX's schedules have.

use serde_json::Value;

use crate::Result;
use crate::error::setting;

/// The learning rate of update t, t counting from 0.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    /// The rate after the warm-up.
    pub curve: Curve,
    /// A linear rise before it.
    pub warmup: Option<Warmup>,
}

/// A linear rise from `init` to the curve's first value over `steps` updates.
///
/// Update `steps` and the one after it both have the curve's first value, as mlx-lm joins the two.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Warmup {
    /// W.
    pub steps: u64,
    /// The rate of update 0.
    pub init: f64,
}

/// Shapes of the rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Curve {
    /// The same for ever.
    Constant(f64),
    /// `end + (init - end) (1 + cos(pi min(t, steps) / steps)) / 2`.
    Cosine {
        /// First rate.
        init: f64,
        /// Updates until the end.
        steps: u64,
        /// Last rate.
        end: f64,
    },
    /// `init + (end - init) min(t, steps) / steps`.
    Linear {
        /// First rate.
        init: f64,
        /// Last rate.
        end: f64,
        /// Updates until the end.
        steps: u64,
    },
    /// `init rate^t`.
    Exponential {
        /// First rate.
        init: f64,
        /// Factor of each update.
        rate: f64,
    },
    /// `init rate^floor(t / steps)`.
    Step {
        /// First rate.
        init: f64,
        /// Factor of each stair.
        rate: f64,
        /// Updates of a stair.
        steps: u64,
    },
}

impl Curve {
    fn at(self, t: u64) -> f64 {
        match self {
            Self::Constant(rate) => rate,
            Self::Cosine { init, steps, end } => {
                let share = t.min(steps) as f64 / steps as f64;
                end + 0.5 * (1.0 + (std::f64::consts::PI * share).cos()) * (init - end)
            }
            Self::Linear { init, end, steps } => init + (end - init) * (t.min(steps) as f64 / steps as f64),
            Self::Exponential { init, rate } => init * rate.powf(t as f64),
            Self::Step { init, rate, steps } => init * rate.powf((t / steps) as f64),
        }
    }
}

impl Schedule {
    /// The same rate for ever.
    pub fn constant(rate: f64) -> Self {
        Self { curve: Curve::Constant(rate), warmup: None }
    }

    /// mlx-lm's `lr_schedule`: name, arguments, warmup, warmup_init.
    ///
    /// # Errors
    /// When the name is unknown, an argument is missing or of the wrong type, or a key is unknown.
    pub fn from_value(value: &Value) -> Result<Self> {
        let map = value
            .as_object()
            .ok_or_else(|| setting("lr_schedule", "a map with name and arguments", value))?;
        if let Some(key) =
            map.keys().find(|k| !["name", "arguments", "warmup", "warmup_init"].contains(&k.as_str()))
        {
            return Err(setting("lr_schedule", "the keys name, arguments, warmup and warmup_init", key));
        }
        let null = Value::Null;
        let get = |key: &str| map.get(key).unwrap_or(&null);
        let list = get("arguments");
        let arguments: Vec<f64> =
            list.as_array()
                .and_then(|list| list.iter().map(Value::as_f64).collect())
                .ok_or_else(|| setting("lr_schedule.arguments", "a list of numbers", list))?;
        let steps = |x: f64| {
            if x >= 1.0 && x.fract() == 0.0 {
                return Ok(x as u64);
            }
            Err(setting("lr_schedule.arguments", "a number of steps that is whole and at least 1", x))
        };
        let name = get("name");
        let curve = match (name.as_str().unwrap_or_default(), arguments.as_slice()) {
            ("cosine_decay", &[init, n]) => Curve::Cosine { init, steps: steps(n)?, end: 0.0 },
            ("cosine_decay", &[init, n, end]) => Curve::Cosine { init, steps: steps(n)?, end },
            ("linear_schedule", &[init, end, n]) => Curve::Linear { init, end, steps: steps(n)? },
            ("exponential_decay", &[init, rate]) => Curve::Exponential { init, rate },
            ("step_decay", &[init, rate, n]) => Curve::Step { init, rate, steps: steps(n)? },
            _ => {
                return Err(setting(
                    "lr_schedule",
                    "cosine_decay [init, steps, end = 0], linear_schedule [init, end, steps], \
                     exponential_decay [init, rate] or step_decay [init, rate, steps]",
                    format!("{name} {list}"),
                ));
            }
        };
        let warmup = match get("warmup") {
            Value::Null => None,
            v => match v.as_u64().ok_or_else(|| setting("lr_schedule.warmup", "a number of steps", v))? {
                0 => None,
                steps => Some(Warmup { steps, init: get("warmup_init").as_f64().unwrap_or(0.0) }),
            },
        };
        Ok(Self { curve, warmup })
    }

    /// The rate of update `t` (from 0).
    pub fn at(&self, t: u64) -> f64 {
        match self.warmup {
            Some(Warmup { steps, init }) if t <= steps => {
                Curve::Linear { init, end: self.curve.at(0), steps }.at(t)
            }
            Some(Warmup { steps, .. }) => self.curve.at(t - steps - 1),
            None => self.curve.at(t),
        }
    }
}
