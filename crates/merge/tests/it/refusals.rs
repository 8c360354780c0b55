//! What cannot be fused is refused by name, and nothing is written.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use graft_adapters::{AdapterSet, Fingerprint};
use graft_merge::{Error, Event, FuseOptions, Policy, Result};
use graft_quant::{Checkpoint, StoredDtype, Tensor};
use graft_testkit::{Dtype, Family, Tiny, tiny_adapter, tiny_model};
use serde_json::Value;
use tempfile::TempDir;

use crate::support::{
    Tensors, adapter_dir, arrays, floats, fuse_into, fused_with, names, options, read_json, tensors, wave,
    write_tensors,
};

const Q: &str = "model.layers.0.self_attn.q_proj";

fn pair(path: &str, inputs: usize, outputs: usize) -> Tensors {
    Tensors::from([
        (format!("{path}.lora_a"), wave(&[inputs, 4], 0.1)),
        (format!("{path}.lora_b"), wave(&[4, outputs], 0.2)),
    ])
}

/// The message of a fuse that must fail, after a look that its target's parent is as empty as before.
#[track_caller]
fn message(base: &Path, set: &AdapterSet) -> String {
    let parent = tempfile::tempdir().unwrap();
    let out = parent.path().join("fused");
    let error = fuse_into(base, set, &out, &options(Policy::Raise), &AtomicBool::new(false), &mut |_| {});
    assert_eq!(names(parent.path()), Vec::<String>::new());
    error.unwrap_err().to_string()
}

fn load(adapter: &TempDir) -> AdapterSet {
    AdapterSet::load(adapter.path()).unwrap()
}

#[test]
fn what_does_not_fit_is_listed_whole() {
    arrays(|| {
        let tiny = Tiny { packed: Some((4, 32)), ..Tiny::new(Family::Llama) };
        let base = tiny_model(&tiny);
        // Layers that the base does not have, and a width that it does not have.
        let deep = Tiny { layers: 3, hidden: 128, ..tiny };
        let other = tiny_model(&deep);
        let text = message(base.path(), &load(&tiny_adapter(other.path(), &deep, false, 4, 9)));
        for part in [
            "model.layers.2.mlp.up_proj: the base has no such linear or embedding",
            "model.layers.0.self_attn.q_proj: A is [128, 4] and B is [4, 64], but the base's weight is (64, 64)",
        ] {
            assert!(text.contains(part), "{text}");
        }
        // m of another length.
        let mut dora = pair(Q, 64, 64);
        dora.insert(format!("{Q}.m"), wave(&[32], 0.3));
        let text = message(base.path(), &load(&adapter_dir("dora", &dora)));
        assert!(text.contains("q_proj: m has another length than the 64 rows"), "{text}");
        // Whole weights: an unknown one, a misshapen one, a part of a packed one.
        let full = Tensors::from([
            ("model.layers.9.input_layernorm.weight".to_owned(), wave(&[64], 0.1)),
            ("model.layers.0.input_layernorm.weight".to_owned(), wave(&[65], 0.1)),
            (format!("{Q}.scales"), wave(&[64, 2], 0.1)),
            (format!("{Q}.weight"), wave(&[64, 64], 0.1)),
        ]);
        let text = message(base.path(), &load(&adapter_dir("full", &full)));
        for part in [
            "model.layers.9.input_layernorm.weight: the base has no such weight",
            "model.layers.0.input_layernorm.weight: expected shape [64] as in the base, found [65]",
            "q_proj.scales: the base has no such weight",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert!(!text.contains("q_proj.weight"), "{text}");
    });
}

#[test]
fn the_copy_of_a_tied_head_is_no_target() {
    arrays(|| {
        let tiny = Tiny { tied: true, ..Tiny::new(Family::Llama) };
        let base = tiny_model(&tiny);
        let file = base.path().join("model.safetensors");
        let mut all = tensors(base.path());
        all.insert("lm_head.weight".into(), all["model.embed_tokens.weight"].clone());
        write_tensors(&file, &all);
        let text = message(base.path(), &load(&adapter_dir("lora", &pair("lm_head", 64, 288))));
        assert!(text.contains("lm_head: the base has no such linear"), "{text}");
        let whole = Tensors::from([("lm_head.weight".to_owned(), wave(&[288, 64], 0.1))]);
        let text = message(base.path(), &load(&adapter_dir("full", &whole)));
        assert!(text.contains("lm_head.weight: the head of this base is its embedding"), "{text}");
    });
}

#[test]
fn the_adapter_of_another_base_is_foreign() {
    arrays(|| {
        let tiny = Tiny::new(Family::Llama);
        let base = tiny_model(&tiny);
        let mut set = load(&tiny_adapter(base.path(), &tiny, false, 4, 9));
        let mut trained_on = |dir: &TempDir| {
            let fingerprint = Fingerprint::of(&Checkpoint::open(dir.path()).unwrap(), "their/model");
            set.config.set_extra(Fingerprint::KEY, serde_json::to_value(fingerprint).unwrap());
            fused_with(base.path(), &set, &options(Policy::Raise))
        };
        let text = |result: Result<_>| result.map(|_| ()).unwrap_err().to_string();
        assert!(trained_on(&base).unwrap().warnings.is_empty());
        let other = text(trained_on(&tiny_model(&Tiny::new(Family::Mistral))));
        assert!(other.contains("it was trained on a mistral model, this is a llama"), "{other}");
        let other = text(trained_on(&tiny_model(&Tiny { ffn: 192, ..tiny.clone() })));
        assert!(other.contains("trained on their/model, whose weights have other shapes"), "{other}");
        let tokens = tiny_model(&tiny);
        let tokenizer = tokens.path().join("tokenizer.json");
        let mut json = read_json(&tokenizer);
        json["added_tokens"][0]["content"] = "<other>".into();
        std::fs::write(&tokenizer, json.to_string()).unwrap();
        assert!(text(trained_on(&tokens)).contains("whose tokenizer differs"));
        // The same model in another precision is another sum, but it is the same model.
        let packed = trained_on(&tiny_model(&Tiny { packed: Some((4, 32)), ..tiny.clone() })).unwrap();
        assert_eq!(packed.warnings.len(), 1);
        assert!(packed.warnings[0].contains("in another precision"), "{:?}", packed.warnings);
    });
}

#[test]
fn another_model_of_the_same_shapes_is_foreign_unless_forced() {
    arrays(|| {
        let tiny = Tiny::new(Family::Llama);
        let (base, other) = (tiny_model(&tiny), tiny_model(&Tiny { seed: 2, ..tiny.clone() }));
        let mut set = load(&tiny_adapter(base.path(), &tiny, false, 4, 9));
        let fingerprint = Fingerprint::of(&Checkpoint::open(other.path()).unwrap(), "their/model");
        set.config.set_extra(Fingerprint::KEY, serde_json::to_value(fingerprint).unwrap());
        let text = message(base.path(), &set);
        for part in ["their/model, another model of the same shapes", "norms hold other values", "--force"] {
            assert!(text.contains(part), "{text}");
        }
        let forced = FuseOptions { force: true, ..options(Policy::Raise) };
        let done = fused_with(base.path(), &set, &forced).unwrap();
        assert!(done.warnings[0].contains("another model of the same shapes"), "{:?}", done.warnings);
        assert!(fused_with(other.path(), &set, &options(Policy::Raise)).unwrap().warnings.is_empty());
    });
}

#[test]
fn values_that_are_not_finite_are_refused_by_name() {
    arrays(|| {
        let tiny = Tiny { dtype: Dtype::F16, ..Tiny::new(Family::Llama) };
        let base = tiny_model(&tiny);
        let mut nan = pair(Q, 64, 64);
        nan.insert(format!("{Q}.lora_b"), floats(&[f32::NAN; 4 * 64], &[4, 64]));
        let error = AdapterSet::load(adapter_dir("lora", &nan).path()).unwrap_err().to_string();
        assert!(error.contains("q_proj.lora_b: holds values that are not finite"), "{error}");
        let norm = "model.norm.weight".to_owned();
        let full = Tensors::from([(norm, floats(&[f32::INFINITY; 64], &[64]))]);
        let error = AdapterSet::load(adapter_dir("full", &full).path()).unwrap_err().to_string();
        assert!(error.contains("model.norm.weight: holds values that are not finite"), "{error}");
        let codes = Tensor { dtype: StoredDtype::U32, shape: vec![64, 8], data: vec![0; 64 * 8 * 4] };
        let full = Tensors::from([(format!("{Q}.weight"), codes)]);
        let error = AdapterSet::load(adapter_dir("full", &full).path()).unwrap_err().to_string();
        assert!(error.contains("q_proj.weight: expected floats, found U32"), "{error}");
        // Finite in f32, beyond the type of the base.
        let mut large = pair(Q, 64, 64);
        large.insert(format!("{Q}.lora_b"), floats(&[1e6; 4 * 64], &[4, 64]));
        let text = message(base.path(), &load(&adapter_dir("lora", &large)));
        assert!(text.contains("q_proj: the fused weight holds values that are not finite"), "{text}");
    });
}

#[test]
fn a_target_is_a_model_directory_that_is_not_the_base_or_nothing_yet() {
    arrays(|| {
        let tiny = Tiny::new(Family::Llama);
        let base = tiny_model(&tiny);
        let set = load(&tiny_adapter(base.path(), &tiny, false, 4, 9));
        let parent = tempfile::tempdir().unwrap();
        let out = parent.path().join("fused");
        let go = |out: &Path, overwrite: bool| {
            let options = FuseOptions { overwrite, ..options(Policy::Raise) };
            fuse_into(base.path(), &set, out, &options, &AtomicBool::new(false), &mut |_| {})
        };
        let refused = |out: &Path, overwrite: bool| go(out, overwrite).unwrap_err().to_string();
        // Someone's files, a file, a model that holds someone's directory.
        std::fs::create_dir(&out).unwrap();
        std::fs::write(out.join("diary.txt"), "dear").unwrap();
        assert!(refused(&out, true).contains("would be lost (diary.txt)"));
        assert!(refused(&out.join("diary.txt"), true).contains("it is no directory"));
        std::fs::write(out.join("config.json"), "{}").unwrap();
        std::fs::create_dir(out.join("adapters")).unwrap();
        assert!(refused(&out, true).contains("other things than a model's files"));
        assert_eq!(names(&out), ["adapters", "config.json", "diary.txt"]);
        assert_eq!(names(parent.path()), ["fused"]);
        // An empty directory, then a model, which goes whole, and only with leave.
        std::fs::remove_dir_all(&out).unwrap();
        std::fs::create_dir(&out).unwrap();
        go(&out, false).unwrap();
        assert!(refused(&out, false).contains("exists already"));
        std::fs::write(out.join("model-old.safetensors"), "rest of another model").unwrap();
        let report = go(&out, true).unwrap();
        assert_eq!(report.layers.len(), 14);
        assert!(!names(&out).contains(&"model-old.safetensors".to_owned()));
        assert_eq!(names(parent.path()), ["fused"]);
        // The base, by its own name and by another.
        let before = tensors(base.path());
        let detour = base.path().join("..").join(base.path().file_name().unwrap());
        for same in [base.path(), &detour] {
            assert!(
                matches!(go(same, true), Err(Error::IntoInput { what: "base", .. })),
                "{}",
                same.display()
            );
        }
        assert!(tensors(base.path()) == before);
        // The adapter, whose directory may hold a model, too.
        let options = FuseOptions { overwrite: true, adapter_dir: out.clone(), ..options(Policy::Raise) };
        let into = fuse_into(base.path(), &set, &out, &options, &AtomicBool::new(false), &mut |_| {});
        assert!(matches!(into, Err(Error::IntoInput { what: "adapter", .. })));
    });
}

#[test]
fn a_base_that_is_none_or_damaged_is_named() {
    arrays(|| {
        let tiny = Tiny::new(Family::Llama);
        let base = tiny_model(&tiny);
        let set = load(&tiny_adapter(base.path(), &tiny, false, 4, 9));
        let nothing = tempfile::tempdir().unwrap();
        assert!(message(nothing.path(), &set).contains("config.json is missing"));
        let file = base.path().join("model.safetensors");
        let bytes = std::fs::read(&file).unwrap();
        std::fs::write(&file, &bytes[..bytes.len() - 100]).unwrap();
        let text = message(base.path(), &set);
        assert!(text.contains("model.safetensors") && text.contains("damaged"), "{text}");
    });
}

#[test]
fn a_fuse_that_is_stopped_leaves_nothing() {
    arrays(|| {
        let tiny = Tiny::new(Family::Llama);
        let base = tiny_model(&tiny);
        let set = load(&tiny_adapter(base.path(), &tiny, false, 4, 9));
        let parent = tempfile::tempdir().unwrap();
        let out = parent.path().join("fused");
        let old = tiny_model(&Tiny { seed: 5, ..tiny });
        std::fs::rename(old.path(), &out).unwrap();
        let before = tensors(&out);
        let stop = AtomicBool::new(false);
        let mut seen = 0;
        let options = FuseOptions { overwrite: true, ..options(Policy::Raise) };
        let result = fuse_into(base.path(), &set, &out, &options, &stop, &mut |event| {
            if let Event::Tensor { done, .. } = event {
                // In the middle there is a directory beside the target.
                assert_eq!(names(parent.path()).len(), 2);
                seen = done;
                stop.store(done == 9, Ordering::Relaxed);
            }
        });
        assert!(matches!(result, Err(Error::Stopped)));
        assert_eq!((seen, names(parent.path())), (9, vec!["fused".to_owned()]));
        assert!(tensors(&out) == before);
        let config: Value = read_json(&out.join("config.json"));
        assert_eq!(config["model_type"], "llama");
    });
}
