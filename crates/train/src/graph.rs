//! The loss of a batch as a function of the trained tensors, with as little kept for the gradient as possible.
//!
//! What is frozen below the first trained block runs outside the transform and leaves nothing behind; DoRA's norm is an
//! input without a gradient; with checkpointing each block keeps its input only; a head that is trained keeps no logits.

use std::collections::HashMap;
use std::rc::Rc;

use graft_adapters::{Dropout, Kind, Route};
use graft_model::{HEAD_CHUNK, Model};
use graft_ops::{Array, Dtype, Exception, Rows, ffi};

use crate::Result;
use crate::batch::Batch;
use crate::loss::target_rows;
use crate::params::{Frame, OwnedRoute, Params, table};
use crate::rng::mix;

/// Tag of the random streams of dropout.
const DROPOUT: u64 = 0x6472_6f70;

/// How the loss is computed.
#[derive(Debug)]
pub struct Graph {
    model: Rc<Model>,
    /// Trained blocks and all above them.
    blocks: Vec<BlockSpec>,
    /// First of `blocks`; everything below is frozen.
    first: usize,
    /// Sites of the embedding and the head, as indices into the parameters' sites.
    outer: Vec<usize>,
    /// Whether the embedding is trained, so that nothing can run ahead of the transform.
    embedding: bool,
    /// Whether blocks are computed again in the backward pass.
    pub checkpoint: bool,
    /// Share of the low-rank branches' inputs that is dropped.
    pub dropout: f32,
    /// Seed of the dropout keys.
    pub seed: u64,
}

/// Which tensors a block is given: sites for low-rank training, tensors for `full`.
#[derive(Debug, Clone)]
struct BlockSpec {
    index: usize,
    sites: Vec<usize>,
    tensors: Vec<usize>,
}

/// One block's function: its first input is h (N, E), the others its trained tensors.
struct BlockFn {
    model: Rc<Model>,
    index: usize,
    rows: Rc<Rows>,
    frames: Vec<Frame>,
    names: Vec<String>,
}

impl BlockFn {
    fn call(&self, inputs: &[Array]) -> graft_ops::Result<Array> {
        let (h, tensors) =
            inputs.split_first().ok_or_else(|| Exception::custom("a block needs its input"))?;
        let route = if self.names.is_empty() {
            OwnedRoute::Table(table(&self.frames, tensors)?)
        } else {
            let mut weights = HashMap::new();
            for (name, tensor) in self.names.iter().zip(tensors) {
                weights.insert(name.clone(), tensor.as_dtype(self.model.dtype())?);
            }
            OwnedRoute::Weights(weights)
        };
        self.model.block(self.index, h, &self.rows, &route.route()).map_err(exception)
    }
}

/// The head's function where it is trained: its inputs are hidden states (M, E) and the trained tensors.
struct HeadFn {
    model: Rc<Model>,
    frames: Vec<Frame>,
    /// (M,)
    targets: Array,
}

impl HeadFn {
    fn call(&self, inputs: &[Array]) -> graft_ops::Result<Array> {
        let (h, tensors) =
            inputs.split_first().ok_or_else(|| Exception::custom("the head needs its input"))?;
        let table = table(&self.frames, tensors)?;
        self.model.losses(h, &self.targets, &Route::Table(&table)).map_err(exception)
    }
}

/// A scalar that is `loss`, with `gradients` as its derivatives by `inputs`.
fn with_gradients(loss: &Array, inputs: &[Array], gradients: &[Array]) -> graft_ops::Result<Array> {
    let mut sum = mlx_rs::stop_gradient(loss)?;
    for (input, gradient) in inputs.iter().zip(gradients) {
        // The difference is zero, and so is what it adds; only its derivative is not.
        let zero = input.subtract(mlx_rs::stop_gradient(input)?)?.as_dtype(Dtype::Float32)?;
        let gradient = mlx_rs::stop_gradient(gradient)?.as_dtype(Dtype::Float32)?;
        sum = sum.add(zero.multiply(gradient)?.sum(false)?)?;
    }
    Ok(sum)
}

/// An error on its way through a function that MLX calls.
fn exception(error: graft_model::Error) -> Exception {
    match error {
        graft_model::Error::Array(e) => e,
        other => Exception::custom(other.to_string()),
    }
}

impl Graph {
    /// Plans the computation for some parameters of a model.
    pub fn new(model: Rc<Model>, params: &Params, checkpoint: bool, dropout: f32, seed: u64) -> Self {
        let layers = model.config().layers as usize;
        let of_block = |index: usize| BlockSpec {
            index,
            sites: (0..params.sites.len()).filter(|i| params.sites[*i].block == Some(index)).collect(),
            tensors: (0..params.blocks.len()).filter(|i| params.blocks[*i] == index).collect(),
        };
        let all: Vec<BlockSpec> = (0..layers).map(of_block).collect();
        let outer: Vec<usize> =
            (0..params.sites.len()).filter(|i| params.sites[*i].block.is_none()).collect();
        let embedding = outer.iter().any(|i| params.sites[*i].kind == Kind::Embedding);
        let trained = |b: &BlockSpec| !b.sites.is_empty() || !b.tensors.is_empty();
        let first = if embedding { 0 } else { all.iter().position(trained).unwrap_or(layers) };
        Self { model, blocks: all[first..].to_vec(), first, outer, embedding, checkpoint, dropout, seed }
    }

    /// The sum of the losses of all targets of a batch (f32 scalar) and its gradient by every tensor of `params`.
    ///
    /// `norms` are DoRA's n; `iter` decides the dropout masks. Nothing is evaluated.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn loss_and_gradients(
        &self,
        params: &Params,
        norms: &[Option<Array>],
        batch: &Batch,
        iter: u64,
    ) -> Result<(Array, Vec<Array>)> {
        let prefix = if self.embedding { None } else { Some(self.prefix(batch)?) };
        let argnums: Vec<i32> = (0..params.values.len() as i32).collect();
        let f =
            |values: &[Array]| Ok(vec![self.loss((params, norms), values, batch, iter, prefix.as_ref())?]);
        let (mut values, gradients) = ffi::value_and_grad(f, &params.values, &argnums)?;
        Ok((values.swap_remove(0), gradients))
    }

    /// h below the first trained block.
    fn prefix(&self, batch: &Batch) -> Result<Array> {
        let mut h = self.model.embed(&batch.tokens, &Route::Base)?;
        for index in 0..self.first {
            h = self.model.block(index, &h, &batch.rows, &Route::Base)?;
        }
        Ok(h)
    }

    fn loss(
        &self,
        (params, norms): (&Params, &[Option<Array>]),
        values: &[Array],
        batch: &Batch,
        iter: u64,
        prefix: Option<&Array>,
    ) -> graft_ops::Result<Array> {
        let dropout = |site: u64| -> graft_ops::Result<Option<Dropout>> {
            let key = mlx_rs::random::key(mix(&[self.seed, DROPOUT, iter, site]))?;
            Ok((self.dropout > 0.0).then_some(Dropout { rate: self.dropout, key }))
        };
        let frames = |sites: &[usize]| -> graft_ops::Result<Vec<Frame>> {
            sites.iter().map(|i| Ok(params.frame(*i, norms, dropout(*i as u64)?))).collect()
        };
        let tensors = |sites: &[usize]| -> Vec<Array> {
            let specs = sites.iter().map(|i| &params.sites[*i]);
            specs.flat_map(|s| values[s.first..s.first + s.tensors()].iter().cloned()).collect()
        };
        let outer = table(&frames(&self.outer)?, &tensors(&self.outer))?;
        let outer = Route::Table(&outer);
        let mut h = match prefix {
            Some(h) => h.clone(),
            None => self.model.embed(&batch.tokens, &outer).map_err(exception)?,
        };
        let rows = Rc::new(batch.rows.clone());
        for spec in &self.blocks {
            let mut inputs = vec![h];
            inputs.extend(tensors(&spec.sites));
            inputs.extend(spec.tensors.iter().map(|i| values[*i].clone()));
            let block = BlockFn {
                model: Rc::clone(&self.model),
                index: spec.index,
                rows: Rc::clone(&rows),
                frames: frames(&spec.sites)?,
                names: spec.tensors.iter().map(|i| params.names[*i].clone()).collect(),
            };
            h = if self.checkpoint {
                let again = ffi::checkpoint(move |inputs| Ok(vec![block.call(inputs)?]))?;
                again.call(&inputs)?.swap_remove(0)
            } else {
                block.call(&inputs)?
            };
        }
        if !outer.changes(self.model.head_path()) {
            let losses = crate::loss::target_losses(&self.model, &h, batch, &outer).map_err(exception)?;
            return losses.as_dtype(Dtype::Float32)?.sum(false);
        }
        // A head that is trained takes its logits chunk by chunk, and their gradient with them.
        let h = self.model.final_norm(&target_rows(&h, batch)?, &outer).map_err(exception)?;
        let count = h.dim(0);
        let mut total = Array::from_f32(0.0);
        let mut before: Vec<Array> = Vec::new();
        for (chunk, from) in (0..count).step_by(HEAD_CHUNK as usize).enumerate() {
            let rows = (from..count.min(from + HEAD_CHUNK)).collect::<Vec<i32>>();
            let rows = Array::from_slice(&rows, &[rows.len() as i32]);
            let mut inputs = vec![h.take_axis(&rows, 0)?];
            inputs.extend(tensors(&self.outer));
            // Each chunk has masks of its own.
            let salt = chunk as u64 * params.sites.len() as u64;
            let own = self.outer.iter().map(|&i| Ok(params.frame(i, norms, dropout(i as u64 + salt)?)));
            let head = HeadFn {
                model: Rc::clone(&self.model),
                frames: own.collect::<graft_ops::Result<Vec<Frame>>>()?,
                targets: batch.targets.take_axis(&rows, 0)?,
            };
            // Each chunk waits for the one before it, or MLX would start them all and hold all their logits.
            let fixed =
                inputs.iter().map(mlx_rs::stop_gradient).collect::<graft_ops::Result<Vec<Array>>>()?;
            let fixed = if before.is_empty() { fixed } else { ffi::depends(&fixed, &before)? };
            let loss = |inputs: &[Array]| Ok(vec![head.call(inputs)?.as_dtype(Dtype::Float32)?.sum(false)?]);
            let all: Vec<i32> = (0..fixed.len() as i32).collect();
            let (mut losses, gradients) = ffi::value_and_grad(loss, &fixed, &all)?;
            let loss = losses.swap_remove(0);
            total = total.add(with_gradients(&loss, &inputs, &gradients)?)?;
            before = gradients;
            before.push(loss);
        }
        Ok(total)
    }
}
