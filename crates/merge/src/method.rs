//! How several updates of one module become one: the methods by the field's names, and values that change with depth.

use serde::{Deserialize, Serialize};

/// What is set to zero in each update before they are added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sparsify {
    /// Nothing.
    None,
    /// All but the share of elements that are largest by absolute value.
    Magnitude,
    /// A random share, and what stays is divided by the share that stays (DARE).
    Random,
}

/// How updates are combined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// The weighted sum, of sparse updates perhaps; with `consensus` of those alone whose sign is the elected one (TIES).
    Sum {
        /// What is dropped first.
        sparsify: Sparsify,
        /// Whether signs are elected.
        consensus: bool,
    },
    /// The weighted sum with the factors side by side, whatever rank that gives.
    Cat,
    /// The weighted sum, cut to a rank.
    Svd,
    /// The arc between two updates.
    Slerp,
}

/// Each name and its method; the first name of a method is the one that is reported.
const METHODS: [(&str, Method); 9] = [
    ("linear", Method::Sum { sparsify: Sparsify::None, consensus: false }),
    ("task_arithmetic", Method::Sum { sparsify: Sparsify::None, consensus: false }),
    ("cat", Method::Cat),
    ("svd", Method::Svd),
    ("ties", Method::Sum { sparsify: Sparsify::Magnitude, consensus: true }),
    ("dare_linear", Method::Sum { sparsify: Sparsify::Random, consensus: false }),
    ("dare_ties", Method::Sum { sparsify: Sparsify::Random, consensus: true }),
    ("magnitude_prune", Method::Sum { sparsify: Sparsify::Magnitude, consensus: false }),
    ("slerp", Method::Slerp),
];

impl Method {
    /// All names, aliases too.
    pub const NAMES: [&str; METHODS.len()] = {
        let mut names = [""; METHODS.len()];
        let mut i = 0;
        while i < names.len() {
            names[i] = METHODS[i].0;
            i += 1;
        }
        names
    };

    /// The method of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        METHODS.iter().find(|(own, _)| *own == name).map(|(_, method)| *method)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        METHODS.iter().find(|(_, method)| *method == self).map_or("consensus", |(name, _)| *name)
    }

    /// Whether the updates must be dense for it, one module at a time.
    pub fn is_dense(self) -> bool {
        matches!(self, Self::Sum { sparsify, consensus } if consensus || sparsify != Sparsify::None)
    }

    /// Whether the sum is divided by the sum of the weights unless the recipe says otherwise: where signs are elected,
    /// since TIES takes the mean of those that agree.
    pub fn normalizes(self) -> bool {
        matches!(self, Self::Sum { consensus: true, .. })
    }
}

/// How many columns a low-rank result keeps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Size {
    /// The sum of the ranks that went in, which loses nothing where the method is a sum.
    Full,
    /// This many, fewer where the matrix has no more.
    Rank(i32),
    /// The fewest whose squared singular values make up this share of all.
    Energy(f64),
}

impl Size {
    /// The rank to keep of singular values `s`, where `total` is the sum of the squares of all there are.
    ///
    /// None if an energy is asked for that these values do not reach.
    pub(crate) fn pick(self, s: &[f32], total: f64) -> Option<i32> {
        let all = s.len() as i32;
        match self {
            Self::Full => Some(all),
            Self::Rank(rank) => Some(rank.min(all)),
            Self::Energy(share) => {
                let mut sum = 0.0;
                let reached = s.iter().position(|s| {
                    sum += f64::from(*s).powi(2);
                    // The values are rounded to f32: with a share of 1 the sum may never be reached.
                    sum >= share * total * (1.0 - 1e-6)
                });
                reached.map(|k| k as i32 + 1)
            }
        }
    }
}

/// A number that may differ by module, as in mergekit's recipes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a number, a list of numbers from the first block to the last, or a list of {filter, value}"
)]
pub enum Setting {
    /// The same everywhere.
    Number(f64),
    /// Values at equal distances from the first block to the last, with straight lines between.
    Gradient(Vec<f64>),
    /// The value of the first filter that is part of the module's path; one without a filter is for the rest.
    Filters(Vec<Filtered>),
}

/// A value for some modules.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Filtered {
    /// Part of the path of the modules meant; none, or `*`, is all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
    /// Their value, or values by block.
    pub value: Setting,
}

impl Setting {
    /// The value for a module at `depth`, 0 the first block and 1 the last; none if no filter names it.
    pub fn at(&self, path: &str, depth: f64) -> Option<f64> {
        match self {
            Self::Number(x) => Some(*x),
            Self::Gradient(values) => {
                let last = values.len().checked_sub(1)?;
                let place = depth.clamp(0.0, 1.0) * last as f64;
                let (from, to) = (place.floor() as usize, place.ceil() as usize);
                Some(values[from] + (place - place.floor()) * (values[to] - values[from]))
            }
            Self::Filters(filters) => {
                let matches = |f: &&Filtered| match f.filter.as_deref() {
                    None | Some("*") => true,
                    Some(part) => path.contains(part),
                };
                filters.iter().find(matches).and_then(|f| f.value.at(path, depth))
            }
        }
    }

    /// The first value that `allowed` refuses.
    pub(crate) fn refused(&self, allowed: impl Fn(f64) -> bool) -> Option<f64> {
        self.values().into_iter().find(|x| !allowed(*x))
    }

    fn values(&self) -> Vec<f64> {
        match self {
            Self::Number(x) => vec![*x],
            Self::Gradient(values) => values.clone(),
            Self::Filters(filters) => filters.iter().flat_map(|f| f.value.values()).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_methods_are_one_to_one_but_for_the_alias() {
        for name in Method::NAMES {
            let method = Method::from_name(name).unwrap();
            assert_eq!(method.name(), if name == "task_arithmetic" { "linear" } else { name });
            assert_eq!(method.normalizes(), name.ends_with("ties"));
            let dense = ["ties", "dare_linear", "dare_ties", "magnitude_prune"].contains(&name);
            assert_eq!(method.is_dense(), dense, "{name}");
        }
        assert_eq!(Method::from_name("breadcrumbs"), None);
    }

    #[test]
    fn settings_follow_depth_and_filters() {
        let json = |text: &str| serde_json::from_str::<Setting>(text).unwrap();
        assert_eq!(json("0.3").at("x", 0.5), Some(0.3));
        let gradient = json("[0, 1, 0.5]");
        let at = [0.0, 0.25, 0.5, 0.75, 1.0].map(|depth| gradient.at("x", depth).unwrap());
        assert_eq!(at, [0.0, 0.5, 1.0, 0.75, 0.5]);
        let filters = json(r#"[{"filter": "mlp", "value": 2}, {"filter": "*", "value": 3}]"#);
        assert_eq!(["a.mlp.up", "a.attn.q"].map(|p| filters.at(p, 0.0)), [Some(2.0), Some(3.0)]);
        assert_eq!(json(r#"[{"filter": "mlp", "value": 2}]"#).at("a.attn.q", 0.0), None);
        assert_eq!(gradient.refused(|x| x > 0.0), Some(0.0));
        let wrong =
            serde_json::from_str::<Setting>(r#"[{"filtre": "mlp", "value": 2}]"#).unwrap_err().to_string();
        assert!(wrong.contains("a list of {filter, value}"), "{wrong}");
        // mergekit's usual recipe of an arc.
        let both = json(r#"[{"filter": "attn", "value": [0, 1]}, {"value": 0.5}]"#);
        assert_eq!(["a.attn.q", "a.mlp.up"].map(|path| both.at(path, 0.25)), [Some(0.25), Some(0.5)]);
        assert_eq!(both.refused(|x| x < 1.0), Some(1.0));
    }

    #[test]
    fn a_size_picks_the_fewest_columns_that_do() {
        let s = [3.0, 2.0, 1.0];
        let pick = |size: Size| size.pick(&s, 14.0);
        assert_eq!(pick(Size::Full), Some(3));
        assert_eq!((pick(Size::Rank(2)), pick(Size::Rank(9))), (Some(2), Some(3)));
        let energies = [0.5, 0.65, 13.0 / 14.0, 1.0].map(|e| pick(Size::Energy(e)));
        assert_eq!(energies, [Some(1), Some(2), Some(2), Some(3)]);
        assert_eq!(Size::Energy(0.9).pick(&s[..1], 14.0), None);
    }
}
