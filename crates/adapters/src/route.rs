//! What a forward pass is told about adapters: nothing, one table of arrays by module path, or whole tensors.

use std::collections::HashMap;

use graft_ops::{Array, Dtype, LowRank, Result};

/// Dropout on the input of the low-rank branch: inverted, rate p, with an explicit key.
#[derive(Debug, Clone)]
pub struct Dropout {
    /// p, the share of inputs that is dropped; 0 <= p < 1.
    pub rate: f32,
    /// MLX random key.
    pub key: Array,
}

impl Dropout {
    /// Zeroes a share p of `x` and scales the rest by 1 / (1 - p).
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn apply(&self, x: &Array) -> Result<Array> {
        let keep = 1.0 - self.rate;
        let mask = mlx_rs::random::bernoulli(&Array::from_f32(keep), x.shape(), &self.key)?;
        x.multiply(mask.as_dtype(x.dtype())?)?.multiply(Array::from_f32(1.0 / keep).as_dtype(x.dtype())?)
    }
}

/// The arrays of one adapter as a forward pass needs them.
///
/// In training they are the explicit inputs of the transform; in serving they are computed once per load, and A and B are as
/// [`graft_ops::arrange_update`] gives them where the weight is arranged.
#[derive(Debug, Clone)]
pub struct Site {
    /// A, f32 or arranged.
    pub a: Array,
    /// B, f32 or arranged.
    pub b: Array,
    /// s.
    pub scale: f32,
    /// DoRA's c = m / n, f32 (out,); none for LoRA.
    pub factor: Option<Array>,
    /// Dropout of the low-rank branch, in training only.
    pub dropout: Option<Dropout>,
}

impl Site {
    /// The update as an operation takes it; `input` is x after dropout.
    pub(crate) fn low_rank<'a>(&'a self, input: Option<&'a Array>) -> LowRank<'a> {
        LowRank { a: &self.a, b: &self.b, scale: self.scale, factor: self.factor.as_ref(), input }
    }

    /// `s (x B^T) A^T` in x's dtype: the update of a tied head, x (..., E) gives (..., V).
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn low_rank_tied(&self, x: &Array) -> Result<Array> {
        let x32 = x.as_dtype(Dtype::Float32)?;
        self.scaled(&x32.matmul(self.b.transpose()?)?)?.matmul(self.a.transpose()?)?.as_dtype(x.dtype())
    }

    /// `s A[ids] B` in `dtype`: the update of embedding rows, ids (N,) gives (N, E).
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn low_rank_rows(&self, ids: &Array, dtype: Dtype) -> Result<Array> {
        self.scaled(&self.a.take_axis(ids, 0)?)?.matmul(&self.b)?.as_dtype(dtype)
    }

    /// s times the part of R columns, where it costs least.
    fn scaled(&self, z: &Array) -> Result<Array> {
        z.multiply(Array::from_f32(self.scale))
    }
}

/// Sites by module path (`model.layers.3.self_attn.q_proj`).
#[derive(Debug, Clone)]
pub struct Table {
    /// The sites.
    pub sites: HashMap<String, Site>,
}

impl Table {
    /// All arrays of the table, for evaluation.
    pub fn arrays(&self) -> impl Iterator<Item = &Array> {
        self.sites.values().flat_map(|s| [&s.a, &s.b].into_iter().chain(&s.factor))
    }
}

/// Some rows of a pass (tokens, or hidden states for the head) and their adapter.
#[derive(Debug, Clone, Copy)]
pub struct RouteRows<'a> {
    /// How many rows.
    pub rows: i32,
    /// None: the base alone.
    pub table: Option<&'a Table>,
}

impl<'a> RouteRows<'a> {
    /// The site of a module for these rows, if they have one.
    pub fn site(&self, path: &str) -> Option<&'a Site> {
        self.table.and_then(|table| table.sites.get(path))
    }
}

/// What one forward pass does about adapters.
#[derive(Debug, Clone, Copy)]
pub enum Route<'a> {
    /// The base alone.
    Base,
    /// One adapter for all rows.
    Table(&'a Table),
    /// Consecutive rows with adapters of their own; together they are all rows of the pass.
    Mixed(&'a [RouteRows<'a>]),
    /// Whole tensors by name, used in place of the model's own (`full` fine-tuning, where they are differentiated).
    Weights(&'a HashMap<String, Array>),
}

impl<'a> Route<'a> {
    /// The site of a module for all rows, if this pass has one.
    pub fn site(&self, path: &str) -> Option<&'a Site> {
        match self {
            Self::Table(table) => table.sites.get(path),
            Self::Base | Self::Mixed(_) | Self::Weights(_) => None,
        }
    }

    /// The groups of rows, where some of them have a site at a module.
    pub fn mixed(&self, path: &str) -> Option<&'a [RouteRows<'a>]> {
        match self {
            Self::Mixed(groups) if groups.iter().any(|group| group.site(path).is_some()) => Some(groups),
            _ => None,
        }
    }

    /// Whether this pass changes what a module computes.
    pub fn changes(&self, path: &str) -> bool {
        self.site(path).is_some() || self.mixed(path).is_some() || self.tensor(path, "weight").is_some()
    }

    /// The tensor `<path>.<part>` that this pass uses in place of the model's own, if it does.
    pub fn tensor(&self, path: &str, part: &str) -> Option<&'a Array> {
        match self {
            Self::Weights(tensors) => tensors.get(&format!("{path}.{part}")),
            Self::Base | Self::Table(_) | Self::Mixed(_) => None,
        }
    }
}
