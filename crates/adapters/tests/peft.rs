//! PEFT's form and back: the same bytes both ways, and what has no form there is refused by name.
#![allow(clippy::unwrap_used, reason = "tests: a panic is the report")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use graft_adapters::{AdapterSet, AdapterWriter, Fingerprint, Kind, Provenance, StoredSet, export};
use graft_ops::{Array, Dtype};
use graft_quant::{Checkpoint, Tensor, read_safetensors, safetensors_bytes};
use graft_testkit::{Dtype as Stored, Family, Tiny, mlx, tiny_adapter, tiny_model};
use serde_json::{Value, json};
use tempfile::TempDir;

const Q: &str = "model.layers.0.self_attn.q_proj";
const UP: &str = "model.layers.1.mlp.up_proj";

fn wave(shape: &[i32], seed: f32, dtype: Dtype) -> Tensor {
    let n: i32 = shape.iter().product();
    let values: Vec<f32> = (0..n).map(|i| ((i as f32 + 1.0) * (seed + 0.37)).sin()).collect();
    Tensor::from_array(&Array::from_slice(&values, shape).as_dtype(dtype).unwrap()).unwrap()
}

/// adapter_config.json as PEFT writes it, byte by byte.
fn config(extra: Value) -> String {
    let mut all = json!({
        "alpha_pattern": {}, "base_model_name_or_path": "some/base", "bias": "none", "fan_in_fan_out": false,
        "inference_mode": true, "init_lora_weights": true, "lora_alpha": 7, "lora_dropout": 0.05, "modules_to_save": null,
        "peft_type": "LORA", "r": 4, "rank_pattern": {}, "target_modules": ["q_proj", "up_proj"],
        "task_type": "CAUSAL_LM", "use_dora": false, "use_rslora": false,
    });
    let Value::Object(extra) = extra else { panic!("an object") };
    all.as_object_mut().unwrap().extend(extra);
    // PEFT's floats may have forms that ours have not.
    format!("{all:#}").replace("0.05", "5e-02")
}

/// A PEFT directory with q_proj of rank 4 and up_proj of `rank`.
fn peft_dir(extra: Value, rank: i32, dtype: Dtype, more: &[(&str, Tensor)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let at = |path: &str, part: &str| format!("base_model.model.{path}.{part}");
    let mut tensors = BTreeMap::from([
        (at(Q, "lora_A.weight"), wave(&[4, 64], 0.1, dtype)),
        (at(Q, "lora_B.weight"), wave(&[64, 4], 0.2, dtype)),
        (at(UP, "lora_A.weight"), wave(&[rank, 64], 0.3, dtype)),
        (at(UP, "lora_B.weight"), wave(&[128, rank], 0.4, dtype)),
    ]);
    tensors.extend(more.iter().map(|(name, t)| (format!("base_model.model.{name}"), t.clone())));
    write(dir.path(), &config(extra), &tensors);
    dir
}

fn write(dir: &Path, config: &str, tensors: &BTreeMap<String, Tensor>) {
    std::fs::write(dir.join("adapter_config.json"), config).unwrap();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    std::fs::write(dir.join("adapter_model.safetensors"), safetensors_bytes(tensors, &metadata).unwrap())
        .unwrap();
}

fn made_of() -> Provenance {
    Provenance {
        graft: "0".into(),
        operation: "adapter export".into(),
        base: None,
        inputs: vec![],
        recipe: Value::Null,
        summary: Value::Null,
    }
}

/// Reads `dir`, writes it in mlx-lm's form, reads that, and writes it in PEFT's: the two new directories.
fn both_ways(dir: &Path) -> (TempDir, PathBuf, PathBuf) {
    let out = tempfile::tempdir().unwrap();
    let (ours, theirs) = (out.path().join("ours"), out.path().join("theirs"));
    AdapterWriter::write(&AdapterSet::load(dir).unwrap(), &ours).unwrap();
    export(&AdapterSet::load(&ours).unwrap(), &ours, &made_of(), &theirs).unwrap();
    (out, ours, theirs)
}

fn same_file(a: &Path, b: &Path, name: &str) {
    let [a, b] = [a, b].map(|dir| std::fs::read(dir.join(name)).unwrap());
    assert!(a == b, "{name}: {} and {}", String::from_utf8_lossy(&a), String::from_utf8_lossy(&b));
}

#[test]
fn peft_through_our_form_is_the_same_bytes() {
    mlx(|| {
        let m = |n: i32| wave(&[n], 0.9, Dtype::Float32);
        let magnitudes = [
            ("model.layers.0.self_attn.q_proj.lora_magnitude_vector", m(64)),
            ("model.layers.1.mlp.up_proj.lora_magnitude_vector", m(128)),
        ];
        let old = [
            ("model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight", m(64)),
            ("model.layers.1.mlp.up_proj.lora_magnitude_vector", m(128)),
        ];
        let embedding = [
            ("model.embed_tokens.lora_embedding_A", wave(&[4, 288], 0.5, Dtype::Float32)),
            ("model.embed_tokens.lora_embedding_B", wave(&[64, 4], 0.6, Dtype::Float32)),
        ];
        let whole = [
            ("lm_head.weight", wave(&[288, 64], 0.7, Dtype::Bfloat16)),
            ("model.norm.weight", wave(&[64], 0.8, Dtype::Float16)),
        ];
        let saved = json!({"modules_to_save": ["lm_head", "norm"]});
        let patterns = json!({"rank_pattern": {"up_proj": 6}, "alpha_pattern": {".*.1.mlp.up_proj": 5}});
        for (extra, rank, dtype, more) in [
            (json!({}), 4, Dtype::Float32, &[][..]),
            (json!({"use_rslora": true}), 4, Dtype::Float32, &[]),
            (json!({"use_rslora": true}), 4, Dtype::Bfloat16, &[]),
            (patterns, 6, Dtype::Float16, &[]),
            (json!({"use_dora": true}), 4, Dtype::Bfloat16, &magnitudes),
            (json!({"use_dora": true}), 4, Dtype::Float32, &old),
            (json!({"target_modules": ["q_proj", "up_proj", "embed_tokens"]}), 4, Dtype::Float32, &embedding),
            (saved, 4, Dtype::Float32, &whole),
            (json!({"a_key_of_tomorrow": {"x": [1, 2.50]}}), 4, Dtype::Float32, &[]),
        ] {
            let dir = peft_dir(extra, rank, dtype, more);
            let (_out, ours, theirs) = both_ways(dir.path());
            same_file(dir.path(), &theirs, "adapter_config.json");
            same_file(dir.path(), &theirs, "adapter_model.safetensors");
            // In our form the types are kept, too.
            let stored = read_safetensors(&ours.join("adapters.safetensors")).unwrap().0;
            let name = |d: &Tensor| d.dtype.to_string();
            let wanted =
                Tensor::from_array(&Array::from_slice(&[0f32], &[1]).as_dtype(dtype).unwrap()).unwrap();
            assert_eq!(name(&stored[&format!("{Q}.lora_a")]), name(&wanted));
        }
    });
}

#[test]
fn scales_come_from_rank_alpha_and_their_patterns() {
    mlx(|| {
        let patterns = json!({"rank_pattern": {"up_proj": 6}, "alpha_pattern": {"mlp.up_proj": 5}});
        let dir = peft_dir(patterns, 6, Dtype::Float32, &[]);
        let (_out, ours, _) = both_ways(dir.path());
        let set = AdapterSet::load(&ours).unwrap();
        assert_eq!((set.adapters[Q].scale, set.adapters[UP].scale), (7.0 / 4.0, 5.0 / 6.0));
        assert_eq!((set.adapters[Q].rank(), set.adapters[UP].rank()), (4, 6));
        let dir = peft_dir(json!({"use_rslora": true}), 4, Dtype::Float32, &[]);
        assert_eq!(AdapterSet::load(dir.path()).unwrap().adapters[Q].scale, 3.5);
    });
}

#[test]
fn our_form_through_peft_is_the_same_bytes() {
    mlx(|| {
        let tiny = Tiny::new(Family::Llama);
        let base = tiny_model(&tiny);
        for dora in [false, true] {
            for mixed in [false, true] {
                let first = tiny_adapter(base.path(), &tiny, dora, 4, 9);
                let mut set = AdapterSet::load(first.path()).unwrap();
                if mixed {
                    // A rank and a scale of their own, of which alpha / r is not exact in decimals.
                    let wide = tiny_adapter(base.path(), &tiny, dora, 7, 3);
                    let wide = AdapterSet::load(wide.path()).unwrap().adapters[Q].clone();
                    set.adapters.insert(Q.into(), graft_adapters::Adapter { scale: 0.1, ..wide });
                    set.config.scales.insert(Q.into(), 0.1);
                }
                set.config.set_extra(
                    "base",
                    json!({"model_type": "llama", "shapes": "s", "vocabulary": "",
                    "precision": "float32", "lineage": "some/base"}),
                );
                let out = tempfile::tempdir().unwrap();
                let [ours, theirs, again] = ["ours", "theirs", "again"].map(|name| out.path().join(name));
                AdapterWriter::write(&set, &ours).unwrap();
                export(&AdapterSet::load(&ours).unwrap(), &ours, &made_of(), &theirs).unwrap();
                AdapterWriter::write(&AdapterSet::load(&theirs).unwrap(), &again).unwrap();
                for name in ["adapter_config.json", "adapters.safetensors"] {
                    same_file(&ours, &again, name);
                }
                let text = std::fs::read(theirs.join("adapter_config.json")).unwrap();
                let config: Value = serde_json::from_slice(&text).unwrap();
                assert_eq!((&config["r"], &config["lora_alpha"]), (&json!(4), &json!(8)));
                assert_eq!(config["base_model_name_or_path"], "some/base");
                assert_eq!((&config["use_dora"], &config["use_rslora"]), (&json!(dora), &json!(false)));
                assert_eq!(config["rank_pattern"].get(Q).is_some(), mixed);
                assert_eq!(config["target_modules"].as_array().unwrap().len(), 14);
                // Without what we left in the metadata it is the same adapter.
                let file = theirs.join("adapter_model.safetensors");
                let (tensors, metadata) = read_safetensors(&file).unwrap();
                assert!(metadata["graft_provenance"].contains("adapter export"));
                std::fs::write(&file, safetensors_bytes(&tensors, &BTreeMap::new()).unwrap()).unwrap();
                let bare = AdapterSet::load(&theirs).unwrap();
                assert_eq!(bare.tensors().unwrap(), set.tensors().unwrap());
                for (path, adapter) in &bare.adapters {
                    assert_eq!(adapter.scale, set.adapters[path].scale, "{path}");
                }
            }
        }
    });
}

#[test]
fn a_scale_that_changed_since_makes_another_config() {
    mlx(|| {
        let dir = peft_dir(json!({"use_rslora": true}), 4, Dtype::Float32, &[]);
        let mut set = AdapterSet::load(dir.path()).unwrap();
        for (scale, alpha) in [(0.75, "3"), (-2.0, "-8"), (0.0, "0")] {
            for adapter in set.adapters.values_mut() {
                adapter.scale = scale;
            }
            set.config.parameters.as_mut().unwrap().scale = scale;
            let out = tempfile::tempdir().unwrap();
            let theirs = out.path().join("theirs");
            export(&set, dir.path(), &made_of(), &theirs).unwrap();
            let back = AdapterSet::load(&theirs).unwrap();
            assert_eq!(back.adapters[Q].scale, scale);
            let text = std::fs::read_to_string(theirs.join("adapter_config.json")).unwrap();
            assert!(text.contains("\"use_rslora\": false"), "{text}");
            assert!(text.contains(&format!("\"lora_alpha\": {alpha},")), "{text}");
        }
    });
}

/// A PEFT directory with an update of the embedding; `head` puts the copies beside it that PEFT makes of a tied head.
fn embedding_dir(tying: bool, head: bool) -> TempDir {
    let (a, b) = (wave(&[4, 288], 0.5, Dtype::Float32), wave(&[64, 4], 0.6, Dtype::Float32));
    let turned =
        |tensor: &Tensor| Tensor::from_array(&tensor.to_array().unwrap().transpose().unwrap()).unwrap();
    let mut more = vec![
        ("model.embed_tokens.lora_embedding_A", a.clone()),
        ("model.embed_tokens.lora_embedding_B", b.clone()),
    ];
    if head {
        more.extend([("lm_head.lora_A.weight", turned(&b)), ("lm_head.lora_B.weight", turned(&a))]);
    }
    let targets =
        json!({"target_modules": ["q_proj", "up_proj", "embed_tokens"], "ensure_weight_tying": tying});
    peft_dir(targets, 4, Dtype::Float32, &more)
}

/// Checks a set against a base whose head is, or is not, its embedding.
fn check_on(set: &AdapterSet, tied: bool) -> Result<(), String> {
    let module = |path: &str| match path {
        Q => Some(((64, 64), Kind::Linear)),
        UP => Some(((128, 64), Kind::Linear)),
        "model.embed_tokens" => Some(((288, 64), Kind::Embedding)),
        "lm_head" if !tied => Some(((288, 64), Kind::Linear)),
        _ => None,
    };
    set.check(Path::new("dir"), module).map_err(|error| error.to_string())
}

#[test]
fn an_embedding_without_its_tied_head_is_another_adapter() {
    mlx(|| {
        let refused = "an update of the embedding that leaves the head as it was";
        let dir = embedding_dir(false, false);
        let (_out, ours, _) = both_ways(dir.path());
        // As PEFT has it, and imported.
        for dir in [dir.path(), &ours] {
            let set = AdapterSet::load(dir).unwrap();
            assert!(set.leaves_head() && check_on(&set, false).is_ok());
            let text = check_on(&set, true).unwrap_err();
            assert!(text.contains(refused) && text.contains("ensure_weight_tying=True"), "{text}");
            // What is read as bytes for a server, too.
            let stored = StoredSet::load(dir).unwrap();
            let module = |path: &str| (path != "lm_head").then_some(((1, 1), Kind::Linear));
            assert!(stored.check(dir, module).unwrap_err().to_string().contains(refused));
        }
        // One that was imported before there was the mark.
        let mut old = AdapterSet::load(&ours).unwrap();
        old.config.raw.remove("graft");
        assert!(check_on(&old, true).unwrap_err().contains(refused));
        // A whole embedding.
        let whole = [("model.embed_tokens.weight", wave(&[288, 64], 0.7, Dtype::Float32))];
        let saved = |tying: bool| json!({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": tying});
        let set = AdapterSet::load(peft_dir(saved(false), 4, Dtype::Float32, &whole).path()).unwrap();
        assert!(check_on(&set, true).unwrap_err().contains(refused));
        let both = [whole[0].clone(), ("lm_head.weight", whole[0].1.clone())];
        let dir = peft_dir(saved(true), 4, Dtype::Float32, &both);
        let set = AdapterSet::load(dir.path()).unwrap();
        assert!(check_on(&set, true).is_ok() && set.weights.len() == 1);
        let (_out, _, theirs) = both_ways(dir.path());
        same_file(dir.path(), &theirs, "adapter_model.safetensors");
        // Without an update of the embedding there is nothing to leave.
        assert!(!AdapterSet::load(peft_dir(json!({}), 4, Dtype::Float32, &[]).path()).unwrap().leaves_head());
    });
}

#[test]
fn a_tied_head_stands_once_here_and_twice_in_peft() {
    mlx(|| {
        let dir = embedding_dir(true, true);
        let set = AdapterSet::load(dir.path()).unwrap();
        assert!(check_on(&set, true).is_ok() && !set.adapters.contains_key("lm_head"));
        let (_out, ours, theirs) = both_ways(dir.path());
        same_file(dir.path(), &theirs, "adapter_config.json");
        same_file(dir.path(), &theirs, "adapter_model.safetensors");
        // One of ours says so to PEFT, with the copies that PEFT looks for.
        let mut own = AdapterSet::load(&ours).unwrap();
        own.metadata.clear();
        let out = tempfile::tempdir().unwrap();
        let target = out.path().join("own");
        export(&own, &ours, &made_of(), &target).unwrap();
        let read = |dir: &Path| read_safetensors(&dir.join("adapter_model.safetensors")).unwrap().0;
        assert_eq!(read(&target), read(dir.path()));
        let text = std::fs::read_to_string(target.join("adapter_config.json")).unwrap();
        assert!(text.contains("\"ensure_weight_tying\": true"), "{text}");
        assert!(check_on(&AdapterSet::load(&target).unwrap(), true).is_ok());
        // A head of its own stays.
        let mut other = read(dir.path());
        other.insert("base_model.model.lm_head.lora_A.weight".into(), wave(&[4, 64], 0.9, Dtype::Float32));
        write(dir.path(), &std::fs::read_to_string(dir.path().join("adapter_config.json")).unwrap(), &other);
        assert!(AdapterSet::load(dir.path()).unwrap().adapters.contains_key("lm_head"));
    });
}

#[test]
fn what_the_config_names_must_be_there_and_fit_it() {
    mlx(|| {
        let message = |dir: &Path| AdapterSet::load(dir).unwrap_err().to_string();
        let norm = [("model.norm.weight", wave(&[64], 0.8, Dtype::Float32))];
        let dir = peft_dir(json!({"modules_to_save": ["lm_head", "norm"]}), 4, Dtype::Float32, &norm);
        let text = message(dir.path());
        assert!(text.contains("lm_head: modules_to_save names it, but the file has no weight"), "{text}");
        assert!(!text.contains("norm: modules"), "{text}");
        let good = peft_dir(json!({"modules_to_save": ["norm"]}), 4, Dtype::Float32, &norm);
        let (_out, ours, _) = both_ways(good.path());
        let file = ours.join("adapters.safetensors");
        let (mut tensors, metadata) = read_safetensors(&file).unwrap();
        tensors.remove("model.norm.weight");
        std::fs::write(&file, safetensors_bytes(&tensors, &metadata).unwrap()).unwrap();
        let text = message(&ours);
        assert!(text.contains("model.norm.weight: graft.weights names it, but the file lacks it"), "{text}");
        // Magnitudes that the config does not know of.
        let m = [("model.layers.0.self_attn.q_proj.lora_magnitude_vector", wave(&[64], 0.9, Dtype::Float32))];
        let text = message(peft_dir(json!({}), 4, Dtype::Float32, &m).path());
        assert!(text.contains("lora_magnitude_vector is there, but use_dora is not set"), "{text}");
        let tiny = Tiny::new(Family::Llama);
        let base = tiny_model(&tiny);
        let dora = tiny_adapter(base.path(), &tiny, true, 4, 9);
        let file = dora.path().join("adapter_config.json");
        let config = std::fs::read_to_string(&file).unwrap().replace("\"dora\"", "\"lora\"");
        std::fs::write(file, config).unwrap();
        let text = message(dora.path());
        assert!(text.contains("q_proj: fine_tune_type is lora, but DoRA's m is there"), "{text}");
    });
}

#[test]
fn a_base_is_known_by_its_norms_in_every_precision() {
    mlx(|| {
        let tiny = Tiny::new(Family::Qwen3);
        let of = |tiny: &Tiny| {
            let dir = tiny_model(tiny);
            Fingerprint::of(&Checkpoint::open(dir.path()).unwrap(), "the base")
        };
        let own = of(&tiny);
        let packed = Tiny { packed: Some((4, 32)), ..tiny.clone() };
        for dtype in [Stored::F32, Stored::F16, Stored::Bf16] {
            for same in [Tiny { dtype, ..tiny.clone() }, Tiny { dtype, ..packed.clone() }] {
                let same = of(&same);
                assert!(
                    own.foreign_to(&same).is_none() && own.other_model_than(&same).is_none(),
                    "{dtype:?}"
                );
                assert!(same.other_model_than(&own).is_none(), "{dtype:?}");
            }
        }
        let other = of(&Tiny { seed: 2, ..packed });
        assert!(own.foreign_to(&other).is_none());
        let why = own.other_model_than(&other).unwrap();
        assert!(why.contains("the base, another model of the same shapes"), "{why}");
        // Without the mark nothing is known, and nothing is written.
        let unmarked = Fingerprint { norms: String::new(), ..own.clone() };
        assert!(unmarked.other_model_than(&other).is_none() && other.other_model_than(&unmarked).is_none());
        assert!(!serde_json::to_string(&unmarked).unwrap().contains("norms"));
        // transformers 5 calls the type by another name.
        let dir = tiny_model(&tiny);
        let file = dir.path().join("config.json");
        let text = std::fs::read_to_string(&file).unwrap().replace("torch_dtype", "dtype");
        std::fs::write(file, text).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert!(checkpoint.config().get("torch_dtype").is_none());
        assert_eq!(Fingerprint::of(&checkpoint, "").precision, "float32");
    });
}

#[test]
fn what_has_no_counterpart_is_refused_by_name() {
    mlx(|| {
        let message = |dir: &TempDir| AdapterSet::load(dir.path()).unwrap_err().to_string();
        let one = |name: &'static str, shape: &[i32]| [(name, wave(shape, 0.5, Dtype::Float32))];
        let dir =
            peft_dir(json!({}), 4, Dtype::Float32, &one("model.embed_tokens.base_layer.weight", &[288, 64]));
        assert!(message(&dir).contains("embed_tokens.base_layer.weight: a copy of the base's own weight"));
        let dir = peft_dir(json!({}), 4, Dtype::Float32, &one("model.layers.0.mlp.lora_B.bias", &[4]));
        assert!(message(&dir).contains("lora_B.bias: not a LoRA or DoRA tensor"), "{}", message(&dir));
        let tiny = Tiny::new(Family::Llama);
        let base = tiny_model(&tiny);
        let first = tiny_adapter(base.path(), &tiny, true, 4, 9);
        let mut set = AdapterSet::load(first.path()).unwrap();
        let target = first.path().join("none");
        set.adapters.get_mut(UP).unwrap().magnitude = None;
        let text = export(&set, first.path(), &made_of(), &target).unwrap_err().to_string();
        assert!(text.contains("DoRA on some modules only") && text.contains(UP), "{text}");
        assert!(!target.exists());
        // Whole weights beside an adapter are kept, but not run.
        let dir = peft_dir(
            json!({"modules_to_save": ["norm"]}),
            4,
            Dtype::Float32,
            &one("model.norm.weight", &[64]),
        );
        let set = AdapterSet::load(dir.path()).unwrap();
        let text = set.table(dir.path(), |_| None).unwrap_err().to_string();
        assert!(text.contains("model.norm.weight, a whole weight") && text.contains("graft fuse"), "{text}");
    });
}
