//! One training step: gradients, accumulation, clipping, update; nothing is taken over before it is known to be finite.

use std::rc::Rc;

use graft_model::Model;
use graft_ops::{Array, ffi::eval};

use crate::batch::Batch;
use crate::data::Split;
use crate::graph::Graph;
use crate::loss::number;
use crate::optim::{Optimizer, OptimizerState, clip_factor, global_norm};
use crate::params::{OwnedRoute, Params};
use crate::schedule::Schedule;
use crate::{Error, Result};

/// Parameters, optimizer and what has been accumulated.
#[derive(Debug)]
pub struct Trainer {
    model: Rc<Model>,
    graph: Graph,
    /// What is trained.
    pub params: Params,
    /// DoRA's n of each site under `params`.
    norms: Vec<Option<Array>>,
    optimizer: Optimizer,
    schedule: Schedule,
    max_grad_norm: Option<f64>,
    /// The optimizer's memory.
    pub optimizer_state: OptimizerState,
    /// Summed gradients of the batches since the last update.
    pub accumulated: Option<Vec<Array>>,
    /// Their targets.
    pub accumulated_tokens: u64,
}

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepResult {
    /// Sum of the losses of the batch's targets.
    pub loss_sum: f64,
    /// The batch's targets.
    pub tokens: u64,
    /// Norm of the mean gradient of all batches accumulated so far, before clipping.
    pub grad_norm: f64,
    /// The update's rate, if there was an update.
    pub learning_rate: Option<f64>,
}

/// What a trainer is made of besides its parameters.
#[derive(Debug)]
pub struct TrainerSettings {
    /// The optimizer.
    pub optimizer: Optimizer,
    /// Its rate.
    pub schedule: Schedule,
    /// Greatest gradient norm.
    pub max_grad_norm: Option<f64>,
    /// Compute blocks again in the backward pass.
    pub grad_checkpoint: bool,
    /// Dropout of the low-rank branches.
    pub dropout: f32,
    /// Seed of the dropout masks.
    pub seed: u64,
}

impl Trainer {
    /// A trainer before its first step.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn new(model: Rc<Model>, params: Params, settings: TrainerSettings) -> Result<Self> {
        let TrainerSettings { optimizer, schedule, max_grad_norm, grad_checkpoint, dropout, seed } = settings;
        let graph = Graph::new(Rc::clone(&model), &params, grad_checkpoint, dropout, seed);
        let optimizer_state = optimizer.start(&params.values)?;
        let mut trainer = Self {
            model,
            graph,
            params,
            norms: vec![],
            optimizer,
            schedule,
            max_grad_norm,
            optimizer_state,
            accumulated: None,
            accumulated_tokens: 0,
        };
        trainer.refresh()?;
        Ok(trainer)
    }

    /// Computes what follows from the parameters; needed after they were replaced from outside.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn refresh(&mut self) -> Result<()> {
        self.norms = self.params.norms(&self.params.values, &self.model)?;
        Ok(eval(self.norms.iter().flatten())?)
    }

    /// The route of a forward with the present parameters, without dropout.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn route(&self) -> Result<OwnedRoute> {
        self.params.route(&self.norms, self.model.dtype())
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Takes one batch; with `update` the gradients accumulated up to now change the parameters.
    ///
    /// # Errors
    /// [`Error::NonFinite`] when the loss or the gradient is not finite: parameters, optimizer and accumulated
    /// gradients are then as before. Other errors when an array operation fails.
    pub fn step(&mut self, batch: &Batch, split: &Split, iter: u64, update: bool) -> Result<StepResult> {
        let (loss, mut gradients) = self.graph.loss_and_gradients(&self.params, &self.norms, batch, iter)?;
        let tokens = self.accumulated_tokens + batch.count as u64;
        if let Some(before) = &self.accumulated {
            for (sum, old) in gradients.iter_mut().zip(before) {
                *sum = old.add(&*sum)?;
            }
        }
        let share = Array::from_f32(1.0 / tokens as f32);
        let norm = global_norm(&gradients)?.multiply(&share)?;
        if !update {
            eval([&loss, &norm].into_iter().chain(&gradients))?;
            let result = self.checked(&loss, &norm, batch, split, iter)?;
            self.accumulated = Some(gradients);
            self.accumulated_tokens = tokens;
            return Ok(result);
        }
        let factor = match self.max_grad_norm {
            Some(max_norm) => share.multiply(clip_factor(&norm, max_norm)?)?,
            None => share,
        };
        let mut means = Vec::with_capacity(gradients.len());
        for g in &gradients {
            means.push(g.multiply(&factor)?);
        }
        drop(gradients);
        let rate = self.schedule.at(self.optimizer_state.step);
        let (values, state) =
            self.optimizer.update(rate, &self.params.values, &means, &self.optimizer_state)?;
        drop(means);
        let norms = self.params.norms(&values, &self.model)?;
        let slots = state.slots.iter().flat_map(|slot| slot.values());
        // One evaluation for all of it, so that MLX frees each gradient as soon as it is used up.
        eval([&loss, &norm].into_iter().chain(&values).chain(slots).chain(norms.iter().flatten()))?;
        let mut result = self.checked(&loss, &norm, batch, split, iter)?;
        result.learning_rate = Some(rate);
        self.params.values = values;
        self.optimizer_state = state;
        self.norms = norms;
        self.accumulated = None;
        self.accumulated_tokens = 0;
        Ok(result)
    }

    fn checked(
        &self,
        loss: &Array,
        norm: &Array,
        batch: &Batch,
        split: &Split,
        iter: u64,
    ) -> Result<StepResult> {
        let loss_sum = number(loss)?;
        let grad_norm = number(norm)?;
        for (what, value) in [("loss", loss_sum), ("gradient", grad_norm)] {
            if !value.is_finite() {
                let rows = split.name_rows(&batch.examples);
                return Err(Error::NonFinite { what: what.to_owned(), iter, rows });
            }
        }
        Ok(StepResult { loss_sum, tokens: batch.count as u64, grad_norm, learning_rate: None })
    }
}
