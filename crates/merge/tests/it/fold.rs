//! `fold` and the falls back to a finer form: what is lost is measured, and where it is too much another form is taken.

use graft_adapters::{AdapterSet, Fingerprint, Provenance, Route};
use graft_merge::{Error, Policy};
use graft_quant::Checkpoint;
use graft_testkit::tolerance::F32_DEEP;
use graft_testkit::{Dtype, Family, Tiny, assert_close, tiny_adapter, tiny_model};

use crate::support::{
    Tensors, adapter_dir, arrays, floats, fused, fused_with, load, logits, options, tensors, unfused_logits,
    wave,
};

/// DoRA whose magnitudes alone differ: by 2 % to 4 %, up and down.
fn magnitudes(base: &std::path::Path, adapter: &std::path::Path) -> AdapterSet {
    let (model, mut set) = (load(base), AdapterSet::load(adapter).unwrap());
    for (path, adapter) in &mut set.adapters {
        adapter.b = adapter.b.multiply(graft_ops::Array::from_f32(0.0)).unwrap();
        let norms = model.target(path).unwrap().weight.row_norms_squared().unwrap().sqrt().unwrap();
        let by = |i: i32| 1.0 + (0.02 + 0.02 * (i % 7) as f32 / 6.0) * if i % 2 == 0 { 1.0 } else { -1.0 };
        let factors = graft_ops::Array::from_iter((0..norms.dim(0)).map(by), &[norms.dim(0)]);
        adapter.magnitude = Some(norms.multiply(factors).unwrap());
    }
    set
}

#[test]
fn magnitudes_go_into_the_scales_and_no_code_changes() {
    arrays(|| {
        for (dtype, folds) in [(Dtype::F32, true), (Dtype::F16, true), (Dtype::Bf16, false)] {
            let tiny = Tiny { packed: Some((4, 32)), dtype, ..Tiny::new(Family::Llama) };
            let base = tiny_model(&tiny);
            let adapter = tiny_adapter(base.path(), &tiny, true, 4, 9);
            let set = magnitudes(base.path(), adapter.path());
            let done = fused_with(base.path(), &set, &options(Policy::Fold)).unwrap();
            let (old, new) = (tensors(base.path()), tensors(&done.dir));
            assert_eq!(done.report.low_rank_left, 0);
            assert!(!done.dir.join("adapters.safetensors").exists());
            for layer in &done.report.layers {
                let codes = |all: &Tensors| all[&format!("{}.weight", layer.path)].clone();
                if folds {
                    assert!(codes(&old) == codes(&new) && layer.reason.is_none(), "{layer:?}");
                    assert!(layer.kept >= 0.99, "{dtype:?}: {layer:?}");
                } else {
                    let reason = layer.reason.as_deref().unwrap();
                    assert!(reason.starts_with("scales with the row factor kept "), "{layer:?}");
                    assert_eq!(layer.to, "8 bits, groups of 32");
                }
            }
        }
    });
}

#[test]
fn a_low_rank_part_stays_an_adapter_on_the_folded_model() {
    arrays(|| {
        let tiny = Tiny { packed: Some((4, 32)), ..Tiny::new(Family::Qwen2) };
        let base = tiny_model(&tiny);
        let adapter = tiny_adapter(base.path(), &tiny, true, 4, 9);
        let done = fused(base.path(), adapter.path(), Policy::Fold);
        assert_eq!(done.report.low_rank_left, 14);
        let wanted = unfused_logits(base.path(), adapter.path());
        assert_close(&unfused_logits(&done.dir, &done.dir), &wanted, F32_DEEP);
        // Without it the model is another.
        let change = crate::support::gap(&logits(&load(&done.dir), &Route::Base), &wanted);
        assert!(change > 0.01, "{change}");
        let set = AdapterSet::load(&done.dir).unwrap();
        // It is on the folded model, and says of what it was made.
        let folded = Fingerprint::of(&Checkpoint::open(&done.dir).unwrap(), &done.dir.display().to_string());
        assert_eq!(Fingerprint::read(&set.config).as_ref(), Some(&folded));
        assert_eq!(serde_json::from_str::<Fingerprint>(&set.metadata["base"]).unwrap(), folded);
        let made = Provenance::read(&set).unwrap();
        assert_eq!((made.operation.as_str(), &made.recipe["policy"]), ("fuse", &"fold".into()));
        assert!(set.metadata.contains_key("graft_provenance") && !set.metadata.contains_key("dtypes"));
        assert!(set.adapters.values().all(|adapter| adapter.magnitude.is_none()));
    });
}

#[test]
fn without_magnitudes_there_is_nothing_to_fold() {
    arrays(|| {
        let tiny = Tiny { packed: Some((4, 32)), ..Tiny::new(Family::Llama) };
        let base = tiny_model(&tiny);
        let set = AdapterSet::load(tiny_adapter(base.path(), &tiny, false, 4, 9).path()).unwrap();
        let error = fused_with(base.path(), &set, &options(Policy::Fold)).err().unwrap();
        assert!(
            matches!(error, Error::NothingToFold { .. }) && error.to_string().contains("raise"),
            "{error}"
        );
    });
}

#[test]
fn an_update_below_the_steps_of_eight_bits_is_kept_in_floats_or_not_at_all() {
    arrays(|| {
        for (dtype, size, form, enough) in [
            (Dtype::F16, 1e-3, "float16", true),
            (Dtype::F32, 1e-6, "float32", true),
            (Dtype::Bf16, 1e-5, "8 bits, groups of 32", false),
        ] {
            let tiny = Tiny { packed: Some((4, 32)), dtype, ..Tiny::new(Family::Llama) };
            let base = tiny_model(&tiny);
            let path = "model.layers.0.mlp.up_proj";
            let b: Vec<f32> = wave(&[4, 128], 0.3).to_f32().unwrap().iter().map(|x| x * size).collect();
            let update = Tensors::from([
                (format!("{path}.lora_a"), wave(&[64, 4], 0.7)),
                (format!("{path}.lora_b"), floats(&b, &[4, 128])),
            ]);
            let adapter = adapter_dir("lora", &update);
            let done = fused(base.path(), adapter.path(), Policy::Raise);
            let layer = &done.report.layers[0];
            let reason = layer.reason.as_deref().unwrap();
            assert!(reason.starts_with("8 bits kept ") && layer.to == form, "{layer:?}");
            assert_eq!(layer.kept >= 0.9, enough, "{layer:?}");
            let shortfall = done.report.shortfall();
            assert_eq!(shortfall.is_none(), enough, "{shortfall:?}");
            if let Some(text) = shortfall {
                assert!(
                    text.contains("even the floats of this base are too coarse") && text.contains("--force"),
                    "{text}"
                );
            }
            load(&done.dir);
        }
    });
}
