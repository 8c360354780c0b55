//! Adapters come from anywhere: whatever an adapter's directory holds, loading it is an answer or an error, no panic.

#![allow(clippy::unwrap_used, reason = "a panic is a test's report")]

use std::path::Path;
use std::sync::OnceLock;

use graft_adapters::AdapterSet;
use graft_testkit::{Family, Tiny, mlx, tiny_adapter, tiny_model};
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

const CONFIGS: &str = include_str!("corpus/configs.jsonl");

/// A sound adapter's two files.
fn sound() -> &'static (Value, Vec<u8>) {
    static FILES: OnceLock<(Value, Vec<u8>)> = OnceLock::new();
    FILES.get_or_init(|| {
        let tiny = Tiny { packed: Some((4, 32)), ..Tiny::new(Family::Llama) };
        let model = tiny_model(&tiny);
        let adapter = tiny_adapter(model.path(), &tiny, true, 2, 5);
        let read = |name: &str| std::fs::read(adapter.path().join(name)).unwrap();
        (serde_json::from_slice(&read("adapter_config.json")).unwrap(), read("adapters.safetensors"))
    })
}

fn configs() -> Vec<Value> {
    let corpus = CONFIGS.lines().map(|line| serde_json::from_str(line).unwrap());
    corpus.chain([sound().0.clone()]).collect()
}

/// Loads what is written; says whether it could be.
fn load(config: &[u8], tensors: &[u8], peft: bool) -> bool {
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("adapter_config.json"), config).unwrap();
    let name = if peft { "adapter_model.safetensors" } else { "adapters.safetensors" };
    std::fs::write(dir.path().join(name), tensors).unwrap();
    let path: &Path = dir.path();
    mlx(|| AdapterSet::load(path).is_ok())
}

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(|n| json!(n)),
        any::<String>().prop_map(Value::from),
        vec(any::<String>(), 0..3).prop_map(Value::from),
        Just(json!({})),
    ]
}

#[test]
fn the_corpus_is_read_and_a_sound_adapter_loads() {
    let (config, tensors) = sound();
    assert!(load(config.to_string().as_bytes(), tensors, false));
    for config in configs() {
        for peft in [false, true] {
            load(config.to_string().as_bytes(), tensors, peft);
        }
    }
    for bytes in [&b""[..], b"{", b"[]", b"\xff\xfe", &[0; 64], &[0xff; 64]] {
        assert!(!load(bytes, tensors, false) && !load(config.to_string().as_bytes(), bytes, false));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn no_config_panics(
        mut config in proptest::sample::select(configs()),
        field in any::<prop::sample::Index>(),
        inner in any::<prop::sample::Index>(),
        new in value(),
        peft in any::<bool>(),
    ) {
        let map = config.as_object_mut().unwrap();
        let at = field.index(map.len());
        let found = map.values_mut().nth(at).unwrap();
        match found {
            Value::Object(map) if !map.is_empty() => {
                let at = inner.index(map.len());
                *map.values_mut().nth(at).unwrap() = new;
            }
            other => *other = new,
        }
        load(config.to_string().as_bytes(), &sound().1, peft);
    }

    #[test]
    fn no_tensors_panic(
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        header in any::<bool>(),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let (config, tensors) = sound();
        let mut bytes = tensors.clone();
        // Most of the file is numbers; what can go wrong stands at its beginning.
        let reach = if header { bytes.len().min(2048) } else { bytes.len() };
        for (at, byte) in changes {
            bytes[at.index(reach)] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(tensors.len()));
        }
        load(config.to_string().as_bytes(), &bytes, false);
    }
}
