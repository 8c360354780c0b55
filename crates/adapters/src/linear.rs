//! The parts of a decoder whose weights a route can change. They own no adapter: a forward is handed a route.

use graft_ops::{Array, Dtype, Exception, Input, LinearRef, Result, RowsUpdates, WeightRef};
use graft_quant::Weight;
use mlx_rs::ops::concatenate;

use crate::{Route, Site};

/// y = W x + b, where an adapter may act.
#[derive(Debug, Clone)]
pub struct Linear {
    /// W (out, in), dense or packed; always frozen.
    pub weight: Weight,
    /// b (out,); DoRA does not scale it.
    pub bias: Option<Array>,
    /// Module path in the checkpoint, by which a route finds its site.
    pub path: String,
}

impl Linear {
    /// x (..., in) to (..., out), in x's dtype.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward(&self, x: &Array, route: &Route) -> Result<Array> {
        let [y] = Self::all([self], x.into(), None, route)?;
        Ok(y)
    }

    /// h (..., out) + [`Linear::forward`] of x, which may be what a gate gives.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward_onto<'a>(&self, h: &Array, x: impl Into<Input<'a>>, route: &Route) -> Result<Array> {
        let [y] = Self::all([self], x.into(), Some(h), route)?;
        Ok(y)
    }

    /// [`Linear::forward`] of one x, which may be a norm, through each of some linears: it takes less time together.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward_each<'a, const N: usize>(
        linears: [&Linear; N],
        x: impl Into<Input<'a>>,
        route: &Route,
    ) -> Result<[Array; N]> {
        Self::all(linears, x.into(), None, route)
    }

    fn all<const N: usize>(
        linears: [&Linear; N],
        input: Input,
        residual: Option<&Array>,
        route: &Route,
    ) -> Result<[Array; N]> {
        let ys = if linears.iter().any(|linear| route.tensor(&linear.path, "weight").is_some()) {
            let x = &input.array()?;
            linears.iter().map(|linear| linear.trained(x, residual, route)).collect::<Result<Vec<_>>>()?
        } else if let Some(groups) = linears.iter().find_map(|linear| route.mixed(&linear.path)) {
            let updates: Vec<RowsUpdates> = groups
                .iter()
                .map(|group| {
                    let sites = linears.iter().map(|linear| group.site(&linear.path));
                    (group.rows, sites.map(|site| site.map(|site| site.low_rank(None))).collect())
                })
                .collect();
            let plain = linears.map(|linear| linear.plain(residual));
            graft_ops::linears_of_rows(input, &plain, &updates)?
        } else {
            let sites = linears.map(|linear| route.site(&linear.path));
            let dropouts = sites.map(|site| site.and_then(|site| site.dropout.as_ref()));
            // What dropout takes from must be there by itself.
            let whole = if dropouts.iter().any(Option::is_some) { Some(input.array()?) } else { None };
            let mut inputs = Vec::with_capacity(N);
            for dropout in dropouts {
                inputs.push(dropout.zip(whole.as_ref()).map(|(d, x)| d.apply(x)).transpose()?);
            }
            let parts: Vec<LinearRef> = linears
                .iter()
                .zip(sites)
                .zip(&inputs)
                .map(|((linear, site), input)| LinearRef {
                    low_rank: site.map(|site| site.low_rank(input.as_ref())),
                    ..linear.plain(residual)
                })
                .collect();
            graft_ops::linears(whole.as_ref().map_or(input, Input::Plain), &parts)?
        };
        ys.try_into().map_err(|_| Exception::custom("a linear has no output"))
    }

    /// As an operation takes it, without an update.
    fn plain<'a>(&'a self, residual: Option<&'a Array>) -> LinearRef<'a> {
        LinearRef { weight: self.weight.as_ref(), bias: self.bias.as_ref(), residual, low_rank: None }
    }

    /// W x + b with the tensors of the route (`full` fine-tuning), onto the residual.
    fn trained(&self, x: &Array, residual: Option<&Array>, route: &Route) -> Result<Array> {
        let mut y = match route.tensor(&self.path, "weight") {
            Some(weight) => graft_ops::matmul(x, WeightRef::Dense(weight))?,
            None => self.weight.matmul(x)?,
        };
        if let Some(bias) = route.tensor(&self.path, "bias").or(self.bias.as_ref()) {
            y = y.add(bias)?;
        }
        residual.map_or(Ok(y.clone()), |h| h.add(&y))
    }
}

/// Root-mean-square norm, x / rms(x) * w.
#[derive(Debug)]
pub struct Norm {
    /// w (E,).
    pub weight: Array,
    /// Added to the mean square.
    pub eps: f32,
    /// Module path in the checkpoint.
    pub path: String,
}

impl Norm {
    /// x (..., E) to (..., E), in x's dtype.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward(&self, x: &Array, route: &Route) -> Result<Array> {
        self.of(x, route).array()
    }

    /// The norm of x as what linears read.
    pub fn of<'a>(&'a self, x: &'a Array, route: &Route<'a>) -> Input<'a> {
        let weight = route.tensor(&self.path, "weight").unwrap_or(&self.weight);
        Input::Norm { x, weight, eps: self.eps }
    }
}

/// Token embedding E (V, E), also the output head where the two are tied.
#[derive(Debug, Clone)]
pub struct Embedding {
    /// E (V, E), dense or packed.
    pub weight: Weight,
    /// Module path in the checkpoint.
    pub path: String,
}

impl Embedding {
    /// ids (N,) to rows (N, E) in `dtype`.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward(&self, ids: &Array, dtype: Dtype, route: &Route) -> Result<Array> {
        let rows = self.weight.rows(ids, dtype)?;
        added(rows, ids, &self.path, route, |site, ids| site.low_rank_rows(ids, dtype))
    }

    /// The tied head: x (..., E) to logits (..., V).
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn as_linear(&self, x: &Array, route: &Route) -> Result<Array> {
        let y = self.weight.matmul(x)?;
        added(y, x, &self.path, route, Site::low_rank_tied)
    }
}

/// y (N, ...) of x (N, ...) plus what the sites of a module give for their rows of x.
fn added(
    y: Array,
    x: &Array,
    path: &str,
    route: &Route,
    update: impl Fn(&Site, &Array) -> Result<Array>,
) -> Result<Array> {
    if let Some(site) = route.site(path) {
        return y.add(update(site, x)?);
    }
    let Some(groups) = route.mixed(path) else { return Ok(y) };
    let mut parts = Vec::with_capacity(groups.len());
    let mut first = 0;
    for group in groups {
        let rows = Array::from_slice(&(first..first + group.rows).collect::<Vec<i32>>(), &[group.rows]);
        first += group.rows;
        let part = y.take_axis(&rows, 0)?;
        parts.push(match group.site(path) {
            Some(site) => part.add(update(site, &x.take_axis(&rows, 0)?)?)?,
            None => part,
        });
    }
    concatenate(&parts, 0)
}
