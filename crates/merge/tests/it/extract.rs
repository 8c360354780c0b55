//! An adapter out of two models is the difference that was put in; a cut adapter says what the cut lost.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use graft_adapters::{AdapterSet, Origin, Provenance, Route};
use graft_merge::{Error, Event, ExtractOptions, MergeReport, Policy, Result, Size, extract, resize};
use graft_quant::Checkpoint;
use graft_testkit::{Family, Tiny, tiny_adapter, tiny_model};

use crate::support::{arrays, fused, gap, load, logits, names, tensors, unfused_logits, wave, write_tensors};

fn extracted(base: &Path, tuned: &Path, out: &Path, size: Size, leave_out: bool) -> Result<MergeReport> {
    let (base, tuned) = (Checkpoint::open(base).unwrap(), Checkpoint::open(tuned).unwrap());
    let origin = |c: &Checkpoint, name: &str| Origin::of_model(c, name).unwrap();
    let options = ExtractOptions {
        size,
        leave_out,
        seed: 3,
        base: origin(&base, "the base"),
        tuned: origin(&tuned, "the tuned model"),
    };
    extract((&base, &tuned), &options, out, &AtomicBool::new(false), &mut |_| {})
}

#[test]
fn the_difference_that_was_fused_comes_out_again() {
    arrays(|| {
        for packed in [None, Some((4, 32))] {
            for dora in [false, true] {
                let tiny = Tiny { packed, ..Tiny::new(Family::Qwen3) };
                let base = tiny_model(&tiny);
                let adapter = tiny_adapter(base.path(), &tiny, dora, 4, 9);
                let done = fused(base.path(), adapter.path(), Policy::Dense);
                let out = tempfile::tempdir().unwrap();
                // The difference of a DoRA adapter has full rank.
                let size = if dora { Size::Rank(64) } else { Size::Rank(4) };
                let to = out.path().join("lora");
                let report = extracted(base.path(), &done.dir, &to, size, false).unwrap();
                assert_eq!(report.layers.len(), 14, "what was not touched gets no update");
                assert!(report.layers.iter().all(|l| l.error < 1e-3), "{report:?}");
                let wanted = unfused_logits(base.path(), adapter.path());
                assert!(gap(&unfused_logits(base.path(), &to), &wanted) < 2e-3);
                let made = Provenance::read(&AdapterSet::load(&to).unwrap()).unwrap();
                assert_eq!(
                    (made.operation.as_str(), made.inputs[0].name.as_str()),
                    ("adapter extract", "the tuned model")
                );
                if dora {
                    continue;
                }
                let by_energy = out.path().join("energy");
                let report =
                    extracted(base.path(), &done.dir, &by_energy, Size::Energy(0.999), false).unwrap();
                assert!(report.layers.iter().all(|l| l.rank <= 4 && l.error.powi(2) < 0.0011), "{report:?}");
            }
        }
    });
}

#[test]
fn models_that_differ_otherwise_are_refused_by_name() {
    arrays(|| {
        let tiny = Tiny::new(Family::Llama);
        let (base, tuned) = (tiny_model(&tiny), tiny_model(&tiny));
        let out = tempfile::tempdir().unwrap();
        let to = out.path().join("lora");
        let text = |tuned: &Path| {
            let text = extracted(base.path(), tuned, &to, Size::Rank(4), false).unwrap_err().to_string();
            assert_eq!(names(out.path()), Vec::<String>::new());
            text
        };
        assert!(
            text(tuned.path())
                .contains("the tuned model: a model without a changed matrix cannot be extracted")
        );
        let file = tuned.path().join("model.safetensors");
        let mut all = tensors(tuned.path());
        all.insert("model.norm.weight".into(), wave(&[64], 0.3));
        all.insert("model.layers.0.mlp.up_proj.weight".into(), wave(&[128, 64], 0.3));
        write_tensors(&file, &all);
        assert!(text(tuned.path()).contains("1 tensors that are no matrix and changed cannot be extracted"));
        let report = extracted(base.path(), tuned.path(), &to, Size::Rank(64), true).unwrap();
        assert_eq!((report.left_out, report.layers.len()), (vec!["model.norm.weight".to_owned()], 1));
        std::fs::remove_dir_all(&to).unwrap();
        all.insert("model.layers.0.mlp.up_proj.weight".into(), wave(&[128, 32], 0.3));
        all.remove("model.layers.1.mlp.up_proj.weight");
        write_tensors(&file, &all);
        let found = text(tuned.path());
        assert!(found.contains("model.layers.0.mlp.up_proj: (128, 64) in the base, (128, 32) in"), "{found}");
        assert!(found.contains("model.layers.1.mlp.up_proj: only the base has it"), "{found}");
        let mut broken = tensors(base.path());
        let infinite = graft_ops::Array::from_slice(&vec![f32::INFINITY; 128 * 64], &[128, 64]);
        let infinite = graft_quant::Tensor::from_array(&infinite).unwrap();
        broken.insert("model.layers.0.mlp.up_proj.weight".into(), infinite);
        write_tensors(&file, &broken);
        assert!(text(tuned.path()).contains(
            "model.layers.0.mlp.up_proj: the difference of the two models holds values that are not finite"
        ));
    });
}

#[test]
fn a_cut_adapter_says_what_it_lost_and_keeps_its_magnitudes() {
    arrays(|| {
        let tiny = Tiny { packed: Some((4, 32)), ..Tiny::new(Family::Llama) };
        let base = tiny_model(&tiny);
        for dora in [false, true] {
            let adapter = tiny_adapter(base.path(), &tiny, dora, 8, 9);
            let set = AdapterSet::load(adapter.path()).unwrap();
            let origin = Origin::of_adapter(adapter.path(), "one").unwrap();
            let out = tempfile::tempdir().unwrap();
            let stop = AtomicBool::new(false);
            let cut = |size: Size, to: &Path| resize((&set, &origin), size, to, &stop, &mut |_| {});
            let [same, half] = ["same", "half"].map(|name| out.path().join(name));
            let report = cut(Size::Rank(12), &same).unwrap();
            assert!(report.totals.error == 0.0 && report.layers.iter().all(|l| l.rank == 8));
            let wanted = unfused_logits(base.path(), adapter.path());
            assert!(gap(&unfused_logits(base.path(), &same), &wanted) < 1e-4);
            let report = cut(Size::Rank(4), &half).unwrap();
            assert_eq!(report.fine_tune_type, if dora { "dora" } else { "lora" });
            let small = AdapterSet::load(&half).unwrap();
            for layer in &report.layers {
                // The error is what the singular values say that were left away.
                let spectrum = set.adapters[&layer.path].spectrum().unwrap();
                let squares = |s: &[f32]| s.iter().map(|s| f64::from(*s).powi(2)).sum::<f64>();
                let lost = (squares(&spectrum[4..]) / squares(&spectrum)).sqrt();
                assert!((layer.error - lost).abs() < 1e-5 && lost > 0.1, "{layer:?}: {lost}");
                let kept = small.adapters[&layer.path].spectrum().unwrap();
                assert!(kept.iter().zip(&spectrum).all(|(a, b)| (a - b).abs() < 1e-4 * spectrum[0]));
                let magnitudes = [&set, &small].map(|set| {
                    set.adapters[&layer.path]
                        .magnitude
                        .as_ref()
                        .map(|m| graft_quant::Tensor::from_array(m).unwrap())
                });
                assert_eq!(magnitudes[0], magnitudes[1]);
            }
            let model = load(base.path());
            let table = small.table(&half, |path| model.target(path)).unwrap();
            assert_eq!(logits(&model, &Route::Table(&table)).shape(), [24, 288]);
            let refused = cut(Size::Rank(0), &out.path().join("none"));
            assert!(matches!(refused, Err(Error::Recipe { .. })));
            let exists = cut(Size::Rank(2), &half).map(|_| ()).unwrap_err().to_string();
            assert!(exists.contains("half exists already"), "{exists}");
            // Stopped after the first module, of which it was told.
            let (last, mut seen) = (out.path().join("stopped"), 0);
            let stopped = resize((&set, &origin), Size::Rank(2), &last, &stop, &mut |event| {
                assert_eq!(event, Event::Tensor { done: 1, total: 14 });
                seen += 1;
                stop.store(true, Ordering::Relaxed);
            });
            assert!(matches!(stopped, Err(Error::Stopped)) && seen == 1 && !last.exists());
            stop.store(false, Ordering::Relaxed);
            let mut whole = set.clone();
            let weight =
                graft_quant::Tensor::from_array(&graft_ops::Array::from_slice(&[1f32], &[1])).unwrap();
            whole.weights.insert("model.norm.weight".into(), weight);
            let refused = resize((&whole, &origin), Size::Rank(2), &last, &stop, &mut |_| {});
            let text = refused.map(|_| ()).unwrap_err().to_string();
            assert!(text.contains("an adapter with whole weights cannot be resized"), "{text}");
        }
    });
}
