//! The parts of a decoder whose weights a route can change. They own no adapter: a forward is handed a route.

use graft_ops::{Array, Dtype, Exception, Result};
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
        let y = match route.tensor(&self.path, "weight") {
            Some(weight) => graft_ops::dense_matmul(x, weight)?,
            None => self.weight.matmul(x)?,
        };
        self.finish(x, y, route)
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
        let ys = if linears.iter().any(|linear| route.tensor(&linear.path, "weight").is_some()) {
            linears.iter().map(|linear| linear.forward(x, route)).collect::<Result<Vec<_>>>()?
        } else {
            let products = Weight::matmuls(x, &linears.map(|linear| &linear.weight))?;
            linears
                .iter()
                .zip(products)
                .map(|(linear, y)| linear.finish(x, y, route))
                .collect::<Result<_>>()?
        };
        ys.try_into().map_err(|_| Exception::custom("a product is missing"))
    }

    /// What follows the product y = W x: the adapter, then the bias.
    fn finish(&self, x: &Array, mut y: Array, route: &Route) -> Result<Array> {
        if let Some(site) = route.site(&self.path) {
            y = y.add(site.low_rank(x)?)?;
            if let Some(c) = &site.factor {
                y = y.multiply(c.as_dtype(y.dtype())?)?;
            }
        }
        match route.tensor(&self.path, "bias").or(self.bias.as_ref()) {
            Some(bias) => y.add(bias),
            None => Ok(y),
        }
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
        graft_ops::rms_norm(x, self.weight_in(route), self.eps)
    }

    /// x + r and its norm, both (..., E).
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward_sum(&self, x: &Array, r: &Array, route: &Route) -> Result<(Array, Array)> {
        graft_ops::add_rms_norm(x, r, self.weight_in(route), self.eps)
    }

    fn weight_in<'a>(&'a self, route: &Route<'a>) -> &'a Array {
        route.tensor(&self.path, "weight").unwrap_or(&self.weight)
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
