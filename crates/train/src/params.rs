//! What is trained: which tensors, where they act, how they start, and how they become an adapter.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use graft_adapters::{Adapter, AdapterSet, Dropout, FineTuneType, Kind, LoraParameters, Route, Site, Table};
use graft_model::Model;
use graft_ops::{Array, Dtype, Exception};
use graft_quant::{Tensor, Weight};

use crate::error::setting;
use crate::rng::mix;
use crate::{Error, Result};

/// Tag of the random streams that start A.
const INIT: u64 = 0x696e_6974;

/// One module that an adapter acts on. Its tensors stand at `first`, `first + 1` (A, B) and `first + 2` (m).
#[derive(Debug, Clone)]
pub struct SiteSpec {
    /// Module path.
    pub path: String,
    /// Its block; none for the embedding and the head.
    pub block: Option<usize>,
    /// Orientation of A and B.
    pub kind: Kind,
    /// s.
    pub scale: f32,
    /// Index of A among the tensors.
    pub first: usize,
    /// ||W_o||^2 (out,), f32, for DoRA.
    pub n0: Option<Array>,
}

impl SiteSpec {
    /// How many tensors it has.
    pub fn tensors(&self) -> usize {
        if self.n0.is_some() { 3 } else { 2 }
    }
}

/// The trained tensors, f32, by name.
#[derive(Debug, Clone)]
pub struct Params {
    /// lora, dora or full.
    pub fine_tune_type: FineTuneType,
    /// Tensor names as they are saved.
    pub names: Vec<String>,
    /// The tensors.
    pub values: Vec<Array>,
    /// Where low-rank tensors act; empty for `full`.
    pub sites: Vec<SiteSpec>,
    /// For `full`: the block of each tensor.
    pub blocks: Vec<usize>,
}

/// A site without its trained tensors.
#[derive(Debug, Clone)]
pub(crate) struct Frame {
    path: String,
    scale: f32,
    norm: Option<Array>,
    dropout: Option<Dropout>,
    tensors: usize,
}

/// The table of some sites: `tensors` holds A, B and perhaps m of each, one site after another.
pub(crate) fn table(frames: &[Frame], mut tensors: &[Array]) -> graft_ops::Result<Table> {
    let mut sites = HashMap::new();
    for frame in frames {
        let Some((own, rest)) = tensors.split_at_checked(frame.tensors) else {
            return Err(Exception::custom(format!("{}: tensors are missing", frame.path)));
        };
        tensors = rest;
        let factor = match (own.get(2), &frame.norm) {
            (Some(m), Some(n)) => Some(graft_ops::row_factor(m, n)?),
            _ => None,
        };
        let (a, b, dropout) = (own[0].clone(), own[1].clone(), frame.dropout.clone());
        sites.insert(frame.path.clone(), Site { a, b, scale: frame.scale, factor, dropout });
    }
    Ok(Table { sites })
}

/// A route that owns what it refers to.
#[derive(Debug)]
pub enum OwnedRoute {
    /// The base alone.
    Base,
    /// Low-rank updates.
    Table(Table),
    /// Whole tensors.
    Weights(HashMap<String, Array>),
}

impl OwnedRoute {
    /// The route to hand to a model.
    pub fn route(&self) -> Route<'_> {
        match self {
            Self::Base => Route::Base,
            Self::Table(table) => Route::Table(table),
            Self::Weights(weights) => Route::Weights(weights),
        }
    }

    /// The route of an adapter of any type, checked against the model.
    ///
    /// # Errors
    /// When the adapter does not fit.
    pub fn of(set: &AdapterSet, origin: &Path, model: &Model) -> Result<Self> {
        if set.config.fine_tune_type != FineTuneType::Full {
            return Ok(Self::Table(set.table(origin, |path| model.target(path))?));
        }
        let mut params = Params::full(model, set.config.num_layers)?;
        params.assign(origin, &set.weights)?;
        params.route(&[], model.dtype())
    }
}

/// The first of the last `num_layers` blocks; 0 and -1 mean all.
fn first_block(model: &Model, num_layers: i32) -> Result<usize> {
    let layers = model.config().layers;
    if num_layers > layers {
        return Err(setting(
            "num_layers",
            &format!("at most the model's {layers} blocks (-1 for all)"),
            num_layers,
        ));
    }
    Ok(if num_layers <= 0 { 0 } else { (layers - num_layers) as usize })
}

impl Params {
    /// LoRA or DoRA tensors of the chosen linears, as they start.
    ///
    /// Without keys these are all linears of the last `num_layers` blocks; a key is a path inside those blocks
    /// (`self_attn.q_proj`) or a whole path (`model.embed_tokens`, `lm_head`).
    ///
    /// # Errors
    /// When a setting is out of range, a key matches nothing, or DoRA is asked for on an embedding.
    pub fn low_rank(
        model: &Model,
        lora: &LoraParameters,
        num_layers: i32,
        dora: bool,
        seed: u64,
    ) -> Result<Self> {
        if lora.rank < 1 {
            return Err(setting("lora_parameters.rank", "a whole number above 0", lora.rank));
        }
        if !(0.0..1.0).contains(&lora.dropout) {
            return Err(setting("lora_parameters.dropout", "a number in [0, 1)", lora.dropout));
        }
        if !lora.scale.is_finite() {
            return Err(setting("lora_parameters.scale", "a finite number", lora.scale));
        }
        let mut params = Self::none(if dora { FineTuneType::Dora } else { FineTuneType::Lora });
        for (path, block, kind) in chosen(model, lora.keys.as_deref(), num_layers)? {
            let Some(target) = model.target(&path) else { continue };
            if dora && kind == Kind::Embedding {
                return Err(setting(
                    "lora_parameters.keys",
                    "linears only, since DoRA has no form for an embedding",
                    path,
                ));
            }
            let shape = (target.weight.out_features(), target.weight.in_features());
            let n0 = if dora { Some(target.weight.row_norms_squared()?) } else { None };
            // Each module has a stream of its own, so its start does not depend on which others are trained.
            let name: Vec<u64> = [seed, INIT].into_iter().chain(path.bytes().map(u64::from)).collect();
            let key = mlx_rs::random::key(mix(&name))?;
            let adapter = Adapter::init(kind, shape, lora.rank, lora.scale, n0.as_ref(), &key)?;
            graft_ops::ffi::eval(adapter.arrays().chain(&n0))?;
            let first = params.values.len();
            params.names.push(format!("{path}.lora_a"));
            params.names.push(format!("{path}.lora_b"));
            params.values.extend([adapter.a, adapter.b]);
            if let Some(m) = adapter.magnitude {
                params.names.push(format!("{path}.m"));
                params.values.push(m);
            }
            params.sites.push(SiteSpec { path, block, kind, scale: lora.scale, first, n0 });
        }
        Ok(params)
    }

    /// All tensors of the last `num_layers` blocks: weights, biases and norms.
    ///
    /// # Errors
    /// When a weight is packed, which has no gradient.
    pub fn full(model: &Model, num_layers: i32) -> Result<Self> {
        let mut params = Self::none(FineTuneType::Full);
        for block in first_block(model, num_layers)?..model.config().layers as usize {
            for linear in model.block_linears(block).into_iter().flatten() {
                let Weight::Dense(w) = &linear.weight else {
                    return Err(setting(
                        "fine_tune_type",
                        "lora or dora on a quantized model: packed weights have no gradient. Dequantize the model first \
                         (graft convert --dequantize), or train DoRA at a higher rank",
                        format!("full, and {} is packed", linear.path),
                    ));
                };
                params.push(format!("{}.weight", linear.path), w, block)?;
                if let Some(bias) = &linear.bias {
                    params.push(format!("{}.bias", linear.path), bias, block)?;
                }
            }
            for norm in model.block_norms(block) {
                params.push(format!("{}.weight", norm.path), &norm.weight, block)?;
            }
        }
        graft_ops::ffi::eval(&params.values)?;
        Ok(params)
    }

    fn none(fine_tune_type: FineTuneType) -> Self {
        Self { fine_tune_type, names: vec![], values: vec![], sites: vec![], blocks: vec![] }
    }

    fn push(&mut self, name: String, value: &Array, block: usize) -> Result<()> {
        self.names.push(name);
        self.values.push(value.as_dtype(Dtype::Float32)?);
        self.blocks.push(block);
        Ok(())
    }

    /// How many numbers are trained.
    pub fn count(&self) -> u64 {
        self.values.iter().map(|v| v.size() as u64).sum()
    }

    /// Replaces all tensors by those of a file: every name must be there, no other, each in its shape and finite.
    ///
    /// # Errors
    /// [`graft_adapters::Error::Mismatch`] with every problem.
    pub fn assign(&mut self, origin: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        let mut problems = Vec::new();
        let mut values = Vec::with_capacity(self.values.len());
        for (name, old) in self.names.iter().zip(&self.values) {
            let Some(tensor) = tensors.get(name) else {
                problems.push(format!("{name}: missing"));
                continue;
            };
            let value = tensor.to_array()?.as_dtype(Dtype::Float32)?;
            if value.shape() != old.shape() {
                problems.push(format!("{name}: expected shape {:?}, found {:?}", old.shape(), value.shape()));
            } else if tensor.to_f32()?.iter().any(|x| !x.is_finite()) {
                problems.push(format!("{name}: holds values that are not finite"));
            }
            values.push(value);
        }
        let known = |name: &String| self.names.contains(name);
        problems.extend(
            tensors.keys().filter(|n| !known(n)).map(|n| format!("{n}: not trained with these settings")),
        );
        if !problems.is_empty() {
            return Err(graft_adapters::Error::Mismatch { file: origin.to_path_buf(), problems }.into());
        }
        self.values = values;
        Ok(())
    }

    /// The tensors by name, in `dtype`, as host bytes.
    ///
    /// # Errors
    /// When a value is not finite, which must never reach a file, or an array operation fails.
    pub fn tensors(&self, dtype: Dtype, iter: u64) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors = BTreeMap::new();
        for (name, value) in self.names.iter().zip(&self.values) {
            let tensor = Tensor::from_array(&value.as_dtype(dtype)?)?;
            if tensor.to_f32()?.iter().any(|x| !x.is_finite()) {
                let rows = "no row that is to blame by itself".to_owned();
                return Err(Error::NonFinite { what: format!("tensor {name}"), iter, rows });
            }
            tensors.insert(name.clone(), tensor);
        }
        Ok(tensors)
    }

    /// DoRA's n of each site under the present A and B, not evaluated; none for LoRA.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn norms(&self, values: &[Array], model: &Model) -> Result<Vec<Option<Array>>> {
        let norm = |site: &SiteSpec| -> Result<Option<Array>> {
            let (Some(n0), Some(target)) = (&site.n0, model.target(&site.path)) else { return Ok(None) };
            let (a, b) = (&values[site.first], &values[site.first + 1]);
            Ok(Some(graft_ops::row_norms(a, b, site.scale, target.weight.as_ref(), n0)?))
        };
        self.sites.iter().map(norm).collect()
    }

    /// The route of a forward without training: no dropout. `norms` are those of [`Params::norms`].
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn route(&self, norms: &[Option<Array>], dtype: Dtype) -> Result<OwnedRoute> {
        if self.fine_tune_type == FineTuneType::Full {
            let mut weights = HashMap::new();
            for (name, value) in self.names.iter().zip(&self.values) {
                weights.insert(name.clone(), value.as_dtype(dtype)?);
            }
            return Ok(OwnedRoute::Weights(weights));
        }
        let frames: Vec<Frame> = (0..self.sites.len()).map(|i| self.frame(i, norms, None)).collect();
        Ok(OwnedRoute::Table(table(&frames, &self.values)?))
    }

    /// A site without its trained tensors; `norms` as in [`Params::route`].
    pub(crate) fn frame(&self, index: usize, norms: &[Option<Array>], dropout: Option<Dropout>) -> Frame {
        let spec = &self.sites[index];
        let norm = norms.get(index).cloned().flatten();
        Frame { path: spec.path.clone(), scale: spec.scale, norm, dropout, tensors: spec.tensors() }
    }
}

/// Path, block and orientation of every module that gets an adapter.
fn chosen(
    model: &Model,
    keys: Option<&[String]>,
    num_layers: i32,
) -> Result<Vec<(String, Option<usize>, Kind)>> {
    let first = first_block(model, num_layers)?;
    let mut found = Vec::new();
    let mut unmatched: Vec<&str> = keys.unwrap_or_default().iter().map(String::as_str).collect();
    let mut wanted = |inner: Option<&str>, whole: &str| {
        let Some(keys) = keys else { return inner.is_some() };
        unmatched.retain(|k| *k != whole && Some(*k) != inner);
        keys.iter().any(|k| k == whole || Some(k.as_str()) == inner)
    };
    for block in 0..model.config().layers as usize {
        let prefix = format!("model.layers.{block}.");
        for linear in model.block_linears(block).into_iter().flatten() {
            let inner = linear.path.strip_prefix(&prefix).filter(|_| block >= first);
            if wanted(inner, &linear.path) {
                found.push((linear.path.clone(), Some(block), Kind::Linear));
            }
        }
    }
    let embedding = &model.embedding().path;
    if wanted(None, embedding) {
        found.push((embedding.clone(), None, Kind::Embedding));
    }
    for linear in model.linears().filter(|l| !l.path.contains(".layers.")) {
        if wanted(None, &linear.path) {
            found.push((linear.path.clone(), None, Kind::Linear));
        }
    }
    if let Some(key) = unmatched.first() {
        let inner = model.block_linears(0).into_iter().flatten();
        let inner: Vec<&str> = inner.filter_map(|l| l.path.strip_prefix("model.layers.0.")).collect();
        let known = inner.join(", ");
        return Err(setting(
            "lora_parameters.keys",
            &format!("paths inside a block ({known}) or whole ones ({embedding}, lm_head if there is one)"),
            key,
        ));
    }
    if found.is_empty() {
        return Err(setting("lora_parameters.keys", "at least one module to train", "an empty list"));
    }
    Ok(found)
}
