//! What a fuse will weigh, said before a byte is written.

use graft_adapters::AdapterSet;
use graft_quant::Checkpoint;
use serde::Serialize;
use serde_json::Value;

use crate::layer::RAISED;
use crate::{Policy, Result};

/// Sizes of the weights, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// On the disk.
    pub bytes: u64,
    /// Read for a token that is decoded: all but an embedding that is no head. Decoding waits for memory, so its speed goes
    /// about as the inverse of it.
    pub read: u64,
}

impl Plan {
    /// The base as it is.
    ///
    /// # Errors
    /// When its parts do not fit together.
    pub fn of_base(checkpoint: &Checkpoint) -> Result<Plan> {
        Plan::sum(checkpoint, |_, bytes| Ok(bytes))
    }

    /// The fused model. Weights of `raise` and `fold` that fall back to floats are not foreseen.
    ///
    /// # Errors
    /// As [`Plan::of_base`].
    pub fn of_fused(
        checkpoint: &Checkpoint,
        adapter: &AdapterSet,
        policy: Policy,
        dequantize: bool,
    ) -> Result<Plan> {
        let floats = checkpoint.float_type();
        Plan::sum(checkpoint, |path, bytes| {
            let Some(grid) = checkpoint.grid(path)? else { return Ok(bytes) };
            let touched = adapter.adapters.contains_key(path)
                || adapter.weights.contains_key(&format!("{path}.weight"));
            let (Some(codes), Some(scales)) =
                (checkpoint.info(&format!("{path}.weight")), checkpoint.info(&format!("{path}.scales")))
            else {
                return Ok(bytes);
            };
            let rows = scales.shape[0];
            let inputs = grid.inputs(codes.shape[1]).unwrap_or(0);
            let float = if grid.is_float() { floats } else { scales.dtype }.bitsize() as u64 / 8;
            let folds = adapter.adapters.get(path).is_some_and(|adapter| adapter.magnitude.is_some());
            Ok(match policy {
                _ if dequantize => (rows * inputs) as u64 * float,
                _ if !touched => bytes,
                Policy::Dense => (rows * inputs) as u64 * float,
                Policy::Same => bytes,
                Policy::Fold if folds => bytes,
                Policy::Raise | Policy::Fold => {
                    let raised = grid.raised(RAISED);
                    if !raised.fits(inputs) {
                        return Ok((rows * inputs) as u64 * float);
                    }
                    (rows * raised.words(inputs) * 4) as u64
                        + (2 * rows * raised.groups(inputs)) as u64 * float
                }
            })
        })
    }

    fn sum(checkpoint: &Checkpoint, weigh: impl Fn(&str, u64) -> Result<u64>) -> Result<Plan> {
        let size = |name: &str| checkpoint.info(name).map_or(0, |info| info.range.end - info.range.start);
        let tied = checkpoint.info("lm_head.weight").is_none()
            || checkpoint.config().get("tie_word_embeddings").and_then(Value::as_bool) == Some(true);
        let mut plan = Plan::default();
        for name in checkpoint.names() {
            let (path, part) = name.rsplit_once('.').unwrap_or((name, ""));
            let packed = checkpoint.info(&format!("{path}.scales")).is_some();
            let bytes = match part {
                "scales" | "biases" if packed => continue,
                "weight" if packed => {
                    let all = ["weight", "scales", "biases"]
                        .iter()
                        .map(|part| size(&format!("{path}.{part}")))
                        .sum();
                    weigh(path, all)?
                }
                _ => size(name),
            };
            plan.bytes += bytes;
            if tied || !path.ends_with("embed_tokens") {
                plan.read += bytes;
            }
        }
        Ok(plan)
    }
}
