//! The loss: the token-weighted mean over targets, of which only the targets' hidden states reach the head.

use std::sync::atomic::{AtomicBool, Ordering};

use graft_adapters::Route;
use graft_model::Model;
use graft_ops::{Array, Dtype, ffi};

use crate::Result;
use crate::batch::{Batch, fixed_groups};
use crate::data::Split;
use crate::error::setting;

/// What an evaluation found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evaluation {
    /// Mean loss of a target, in nats.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Targets.
    pub tokens: u64,
}

/// Losses (M,), f32, of a batch's targets, from the last block's output h (N, E).
///
/// # Errors
/// When an array operation fails.
pub(crate) fn target_losses(
    model: &Model,
    h: &Array,
    batch: &Batch,
    route: &Route,
) -> std::result::Result<Array, graft_model::Error> {
    // The norm is by row, so masked rows are dropped before it.
    let h = target_rows(h, batch)?;
    model.losses(&model.final_norm(&h, route)?, &batch.targets, route)
}

/// The rows (M, E) of h (N, E) whose next token is a target.
pub(crate) fn target_rows(h: &Array, batch: &Batch) -> graft_ops::Result<Array> {
    match &batch.positions {
        Some(positions) => h.take_axis(positions, 0),
        None => Ok(h.clone()),
    }
}

/// The sum of a batch's losses (f32 scalar, not evaluated), without a gradient.
///
/// # Errors
/// When an array operation fails.
pub fn batch_loss(model: &Model, batch: &Batch, route: &Route) -> Result<Array> {
    let h = model.hidden(&batch.tokens, &batch.rows, None, route)?;
    let h = target_rows(&h, batch)?;
    Ok(model.losses(&h, &batch.targets, route)?.as_dtype(Dtype::Float32)?.sum(false)?)
}

/// The value of an f32 scalar; evaluates it.
pub(crate) fn number(scalar: &Array) -> Result<f64> {
    Ok(f64::from(ffi::read::<f32>(scalar)?[0]))
}

/// The token-weighted mean loss over some groups of examples; none if `go_on` (given the groups done) said to stop.
///
/// # Errors
/// When an array operation fails.
pub fn evaluate(
    model: &Model,
    route: &Route,
    split: &Split,
    groups: &[Vec<usize>],
    go_on: &mut dyn FnMut(usize) -> bool,
) -> Result<Option<Evaluation>> {
    let (mut sum, mut tokens) = (0.0, 0);
    for (done, group) in groups.iter().enumerate() {
        if !go_on(done) {
            return Ok(None);
        }
        let batch = Batch::new(split, group, graft_ops::form());
        sum += number(&batch_loss(model, &batch, route)?)?;
        tokens += batch.count as u64;
    }
    let loss = if tokens == 0 { 0.0 } else { sum / tokens as f64 };
    Ok(Some(Evaluation { loss, perplexity: loss.exp(), tokens }))
}

/// Evaluates a test set: `batches` batches of it (all if negative), always the same ones for the same seed; none if `stop`
/// was set before it was done.
///
/// # Errors
/// When the split has no rows, or a token that the model does not know, `batches` is 0, or an array operation fails.
pub fn test(
    model: &Model,
    route: &Route,
    split: &Split,
    batch_size: usize,
    batches: i64,
    seed: u64,
    stop: &AtomicBool,
) -> Result<Option<Evaluation>> {
    if batches == 0 {
        return Err(setting("test_batches", "a whole number above 0, or -1 for all", batches));
    }
    split.check_vocabulary(model.config().vocab as usize)?;
    let groups = fixed_groups(split.require()?, batch_size, batches, seed);
    evaluate(model, route, split, &groups, &mut |_| !stop.load(Ordering::Relaxed))
}
