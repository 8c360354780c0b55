//! An adapter for a tiny model, in mlx-lm's files.

use std::path::Path;

use serde_json::json;
use tempfile::TempDir;

use crate::files::{Tensor, Tensors, write_json, write_safetensors};
use crate::random::Random;
use crate::tiny::dense_tensors;
use crate::{Dtype, Tiny, mlx};

/// Scale of the tiny adapters.
const SCALE: f32 = 2.0;

/// Writes an adapter on every linear of every layer: `<path>.lora_a` (in, r), `<path>.lora_b` (r, out), both non-zero,
/// and for DoRA `<path>.m` (out,), near the row norms of the weight in `dir`. All f32.
pub fn tiny_adapter(dir: &Path, tiny: &Tiny, dora: bool, rank: usize, seed: u64) -> TempDir {
    let out = tempfile::tempdir().expect("a temporary directory");
    let base = mlx(|| dense_tensors(dir));
    let mut tensors = Tensors::new();
    for layer in 0..tiny.layers {
        for (name, inputs, outputs) in tiny.linears() {
            let path = format!("model.layers.{layer}.{name}");
            let mut add = |suffix: &str, shape: &[usize], values: Vec<f32>| {
                tensors.insert(format!("{path}.{suffix}"), Tensor::floats(&values, shape, Dtype::F32));
            };
            // A is as at the start of a training, B as after some steps.
            let normal = |suffix: &str, n: usize, std: f32| {
                Random::new(seed, &format!("{path}.{suffix}")).normal(n, 0.0, std)
            };
            add("lora_a", &[inputs, rank], normal("lora_a", inputs * rank, 1.0 / (inputs as f32).sqrt()));
            add("lora_b", &[rank, outputs], normal("lora_b", rank * outputs, 0.05));
            if dora {
                let weight = base[&format!("{path}.weight")].to_f32();
                let norms =
                    weight.chunks_exact(inputs).map(|row| row.iter().map(|w| w * w).sum::<f32>().sqrt());
                let m =
                    norms.zip(normal("m", outputs, 0.05)).map(|(norm, noise)| norm * (1.0 + noise)).collect();
                add("m", &[outputs], m);
            }
        }
    }
    write_safetensors(&out.path().join("adapters.safetensors"), &tensors);
    let keys = tiny.linears().map(|(name, ..)| name);
    let config = json!({
        "fine_tune_type": if dora { "dora" } else { "lora" },
        "num_layers": tiny.layers,
        "lora_parameters": {"rank": rank, "scale": SCALE, "dropout": 0.0, "keys": keys},
    });
    write_json(&out.path().join("adapter_config.json"), &config);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::read_safetensors;
    use crate::{Family, tiny_model};

    #[test]
    fn has_the_tensors_of_its_kind() {
        let tiny = Tiny { packed: Some((4, 32)), ..Tiny::new(Family::Qwen3) };
        let dir = tiny_model(&tiny);
        let (lora, dora) =
            (tiny_adapter(dir.path(), &tiny, false, 4, 7), tiny_adapter(dir.path(), &tiny, true, 4, 7));
        let read = |dir: &TempDir| read_safetensors(&dir.path().join("adapters.safetensors"));
        let (lora, dora) = (read(&lora), read(&dora));
        assert_eq!((lora.len(), dora.len()), (28, 42));
        assert_eq!(lora["model.layers.1.mlp.down_proj.lora_a"].shape, [128, 4]);
        assert_eq!(lora["model.layers.1.mlp.down_proj.lora_b"].shape, [4, 64]);
        assert!(lora["model.layers.0.mlp.up_proj.lora_b"].to_f32().iter().all(|v| *v != 0.0));
        assert!(dora["model.layers.0.mlp.up_proj.m"].to_f32().iter().all(|m| *m > 0.3 && *m < 3.0));
    }
}
