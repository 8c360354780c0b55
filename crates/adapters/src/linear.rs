//! The parts of a decoder whose weights a route can change. They own no adapter: a forward is handed a route.

use graft_ops::{Array, Dtype, Exception, LinearRef, Result, WeightRef};
use graft_quant::Weight;

use crate::Route;

/// y = W x + b, where an adapter may act.
#[derive(Debug)]
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
        let [y] = Self::all([self], x, None, route)?;
        Ok(y)
    }

    /// h (..., out) + [`Linear::forward`] of x.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward_onto(&self, h: &Array, x: &Array, route: &Route) -> Result<Array> {
        let [y] = Self::all([self], x, Some(h), route)?;
        Ok(y)
    }

    /// [`Linear::forward`] of one x through each of some linears, which takes less time together.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward_each<const N: usize>(
        linears: [&Linear; N],
        x: &Array,
        route: &Route,
    ) -> Result<[Array; N]> {
        Self::all(linears, x, None, route)
    }

    fn all<const N: usize>(
        linears: [&Linear; N],
        x: &Array,
        residual: Option<&Array>,
        route: &Route,
    ) -> Result<[Array; N]> {
        let ys = if linears.iter().any(|linear| route.tensor(&linear.path, "weight").is_some()) {
            linears.iter().map(|linear| linear.trained(x, residual, route)).collect::<Result<Vec<_>>>()?
        } else {
            let sites = linears.map(|linear| route.site(&linear.path));
            let mut inputs = Vec::with_capacity(N);
            for site in &sites {
                let dropout = site.and_then(|site| site.dropout.as_ref());
                inputs.push(dropout.map(|dropout| dropout.apply(x)).transpose()?);
            }
            let parts: Vec<LinearRef> = linears
                .iter()
                .zip(sites)
                .zip(&inputs)
                .map(|((linear, site), input)| LinearRef {
                    weight: linear.weight.as_ref(),
                    bias: linear.bias.as_ref(),
                    residual,
                    low_rank: site.map(|site| site.low_rank(input.as_ref())),
                })
                .collect();
            graft_ops::linears(x, &parts)?
        };
        ys.try_into().map_err(|_| Exception::custom("a linear has no output"))
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
        graft_ops::rms_norm(x, route.tensor(&self.path, "weight").unwrap_or(&self.weight), self.eps)
    }
}

/// Token embedding E (V, E), also the output head where the two are tied.
#[derive(Debug)]
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
        match route.site(&self.path) {
            Some(site) => rows.add(site.low_rank_rows(ids, dtype)?),
            None => Ok(rows),
        }
    }

    /// The tied head: x (..., E) to logits (..., V).
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn as_linear(&self, x: &Array, route: &Route) -> Result<Array> {
        let y = self.weight.matmul(x)?;
        match route.site(&self.path) {
            Some(site) => y.add(site.low_rank_tied(x)?),
            None => Ok(y),
        }
    }
}
