//! Passes through the model for sequences that share one: a chunk of a prompt, or one token of each.
//!
//! Where the largest logit is all that is asked for, the next pass begins before the tokens of the last one are read: its
//! graph is built, and its tokens are arrays, while the last one is computed.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use graft_adapters::{Route, RouteRows, Table};
use graft_model::{KvCache, Model, PREFILL_STEP};
use graft_ops::{Array, Dtype, Rows as Lengths, ffi};
use mlx_rs::ops::indexing::{TryIndexOp as _, argmax_axis};

use crate::sequence::Sequence;

/// Logits that are being computed, or the ids that follow from them.
pub(crate) struct Ahead {
    /// The sequences, by row.
    pub(crate) members: Vec<u64>,
    made: Made,
}

enum Made {
    /// (M, V), f32.
    Logits(Array),
    /// The ids (M,) of the largest logits, and those logits (M, 1).
    Best(Array, Array),
}

/// What a pass gave for each of its rows.
pub(crate) enum Rows {
    /// Rows of logits, one behind the other.
    Logits(Vec<f32>),
    /// The id of the largest logit, and that logit.
    Best(Vec<(u32, f32)>),
}

impl Ahead {
    /// Waits for what is being computed. Where the largest logit is all that is asked for, the others stay where they are.
    pub(crate) fn read(&self) -> Result<Rows, String> {
        caught(|| match &self.made {
            Made::Logits(logits) => Ok(Rows::Logits(ffi::read::<f32>(logits).map_err(words)?.to_vec())),
            Made::Best(ids, best) => {
                let ids = ffi::read::<i32>(ids).map_err(words)?.iter().map(|id| *id as u32);
                Ok(Rows::Best(ids.zip(ffi::read::<f32>(best).map_err(words)?.iter().copied()).collect()))
            }
        })
    }

    /// The ids that the next pass takes, where they need not come from the host.
    fn ids(&self) -> Option<Array> {
        match &self.made {
            Made::Logits(_) => None,
            Made::Best(ids, _) => Some(ids.clone()),
        }
    }
}

/// Begins the pass that gives one more token of each sequence of a group, those of one adapter side by side. The tokens that
/// it takes are those that `last` is computing, or else the next ones of those that are known; with `best` it computes the next
/// ones, too, and not what the host would choose by.
/// Sequences that hold no adapter take `base`.
pub(crate) fn begin(
    model: &Model,
    base: Route,
    group: &mut [&mut Sequence],
    last: Option<&Ahead>,
    best: bool,
) -> Result<Ahead, String> {
    caught(|| {
        let members = group.iter().map(|sequence| sequence.id).collect();
        let tokens = match last.and_then(Ahead::ids) {
            Some(ids) => ids,
            None => {
                let known: Vec<i32> = group.iter().filter_map(|s| s.next()).map(|id| id as i32).collect();
                Array::from_slice(&known, &[known.len() as i32])
            }
        };
        let tables: Vec<Option<Rc<Table>>> = group.iter().map(|sequence| sequence.table.clone()).collect();
        let parts = parts(&tables);
        let route = match parts.as_slice() {
            [one] => one.table.map_or(base, Route::Table),
            several => Route::Mixed(several),
        };
        let mut caches: Vec<&mut KvCache> = group.iter_mut().map(|s| &mut s.cache).collect();
        let rows =
            Lengths { lengths: vec![1; caches.len()], starts: caches.iter().map(|c| c.len()).collect() };
        let hidden = model.hidden(&tokens, &rows, Some(&mut caches), &route).map_err(words)?;
        let made = if best {
            largest(&model.logits(&hidden, &route).map_err(words)?).map_err(words)?
        } else {
            Made::Logits(logits(model, &hidden, &route)?)
        };
        let arrays = caches.iter().flat_map(|cache| cache.arrays());
        let arrays = arrays.chain(match &made {
            Made::Logits(logits) => vec![logits],
            Made::Best(ids, best) => vec![ids, best],
        });
        ffi::async_eval(arrays).map_err(words)?;
        Ok(Ahead { members, made })
    })
}

/// The largest of each row of logits (M, V). Where nothing compares with it, since it is not a number, it is such a one itself.
fn largest(logits: &Array) -> graft_ops::Result<Made> {
    let ids = argmax_axis(logits, -1, true)?;
    let best = logits.take_along_axis(&ids, -1)?;
    Ok(Made::Best(ids.as_dtype(Dtype::Int32)?.reshape(&[-1])?, best.as_dtype(Dtype::Float32)?))
}

/// Rows that stand together and have one adapter.
fn parts(tables: &[Option<Rc<Table>>]) -> Vec<RouteRows<'_>> {
    let same = |a: &Option<Rc<Table>>, b: &Option<Rc<Table>>| match (a, b) {
        (Some(a), Some(b)) => Rc::ptr_eq(a, b),
        (None, None) => true,
        _ => false,
    };
    let groups = tables.chunk_by(same);
    groups.map(|group| RouteRows { rows: group.len() as i32, table: group[0].as_deref() }).collect()
}

/// Reads a sequence's prompt up to the next border of a chunk. If that is its end, and nothing was said after it, the logits
/// (V,) that follow; else nothing.
/// A sequence that holds no adapter takes `base`.
pub(crate) fn chunk(model: &Model, base: Route, sequence: &mut Sequence) -> Result<Option<Vec<f32>>, String> {
    caught(|| {
        let start = sequence.cache.len().max(0) as usize;
        let end = ((start / PREFILL_STEP + 1) * PREFILL_STEP).min(sequence.prompt);
        let last = end == sequence.history.len();
        let route = sequence.table.as_deref().map_or(base, Route::Table);
        let tokens: Vec<i32> = sequence.history[start..end].iter().map(|id| *id as i32).collect();
        let count = tokens.len() as i32;
        let rows = Lengths { lengths: vec![count], starts: vec![start as i32] };
        let tokens = Array::from_slice(&tokens, &[count]);
        let mut caches = [&mut sequence.cache];
        let hidden = model.hidden(&tokens, &rows, Some(&mut caches), &route).map_err(words)?;
        let arrays = caches.iter().flat_map(|cache| cache.arrays());
        if !last {
            // Without this the whole prompt would be one graph.
            ffi::eval(arrays).map_err(words)?;
            return Ok(None);
        }
        let logits = logits(model, &hidden.try_index(count - 1..count).map_err(words)?, &route)?;
        ffi::eval(arrays.chain([&logits])).map_err(words)?;
        Ok(Some(ffi::read::<f32>(&logits).map_err(words)?.to_vec()))
    })
}

/// Logits (M, V) of hidden states (M, E) as f32, as the host reads them.
fn logits(model: &Model, hidden: &Array, route: &Route) -> Result<Array, String> {
    let logits = model.logits(hidden, route).map_err(words)?;
    logits.as_dtype(Dtype::Float32).and_then(|logits| logits.contiguous()).map_err(words)
}

pub(crate) fn words(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Runs a part of a step; a panic in it is a failure of that part, not the end of the thread.
pub(crate) fn caught<T>(part: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(part)).unwrap_or_else(|panic| Err(panic_message(&*panic)))
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a message".into())
}

#[cfg(test)]
mod tests {
    use super::caught;

    #[test]
    fn a_panic_is_a_failure_of_its_part() {
        assert_eq!(caught::<()>(|| panic!("at {}", 3)), Err("at 3".into()));
        assert_eq!(caught(|| Ok(3)), Ok(3));
    }
}
