//! Models and adapters that are written as GGUF and read again, the files beside those of an independent maker, and what is
//! refused.
#![allow(clippy::unwrap_used, reason = "tests: a panic is the report")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use graft_adapters::{AdapterSet, Route};
use graft_model::{ChatTemplate, GgufAdapter, GgufExport, GgufImport, Model, Tokenizer, config_from_map};
use graft_ops::{Array, Rows};
use graft_quant::convert::{ConvertOptions, GgufParts, convert_gguf, dtype_from_name};
use graft_quant::gguf::{Block, Gguf, Value as Meta, export_gguf};
use graft_quant::{Checkpoint, Tensor};
use graft_testkit::tolerance::{EXACT, F32_DEEP};
use graft_testkit::{Dtype, Family, GgufMaker, Tiny, assert_close, mlx, tiny_adapter, tiny_gguf, tiny_model};
use serde_json::{Value, json};
use tempfile::TempDir;

/// As `graft export gguf` does it, with every matrix as it is.
fn export(model: &Path, file: &Path) -> Result<Vec<String>, String> {
    let run = || -> graft_model::Result<Vec<String>> {
        let checkpoint = Checkpoint::open(model)?;
        let export = GgufExport::new(&checkpoint, "tiny")?;
        export_gguf(&checkpoint, &export.parts, file, None, &false.into(), &mut |_| {})?;
        Ok(export.warnings)
    };
    mlx(run).map_err(|error| error.to_string())
}

/// As `graft convert` does it.
fn import(file: &Path, out: &Path, dtype: &str) {
    mlx(|| {
        let options = ConvertOptions { pack: None, dequantize: false, dtype: dtype_from_name(dtype) };
        let gguf = Gguf::open(file).unwrap();
        let GgufImport { config, files, names } = GgufImport::new(&gguf).unwrap();
        let parts = GgufParts { config, files, names: &|tensor| names.get(tensor).cloned() };
        convert_gguf(&gguf, &parts, out, &options, &false.into(), &mut |_| {}).unwrap();
    });
}

/// A model that was exported and imported again.
struct There {
    temp: TempDir,
}

impl There {
    #[track_caller]
    fn and_back(model: &Path, dtype: &str) -> Self {
        let temp = tempfile::tempdir().unwrap();
        export(model, &temp.path().join("m.gguf")).unwrap();
        let there = Self { temp };
        import(&there.file(), &there.back(), dtype);
        there
    }

    fn file(&self) -> PathBuf {
        self.temp.path().join("m.gguf")
    }

    fn back(&self) -> PathBuf {
        self.temp.path().join("back")
    }
}

fn tensors(dir: &Path) -> BTreeMap<String, Tensor> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    checkpoint.names().map(|name| (name.clone(), checkpoint.read(name).unwrap())).collect()
}

fn json_of(dir: &Path, name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join(name)).unwrap()).unwrap()
}

fn change(dir: &Path, name: &str, change: impl FnOnce(&mut Value)) {
    let mut value = json_of(dir, name);
    change(&mut value);
    std::fs::write(dir.join(name), value.to_string()).unwrap();
}

fn decoder(dir: &Path) -> graft_model::DecoderConfig {
    let map = json_of(dir, "config.json").as_object().unwrap().clone();
    let config = config_from_map(&dir.join("config.json"), &map).unwrap();
    // A Mistral is a Llama to llama.cpp.
    let model_type = config.model_type.replace("mistral", "llama");
    graft_model::DecoderConfig { model_type, ..config }
}

fn logits(dir: &Path, route: &Route) -> Array {
    let model = Model::load(dir, graft_ops::Dtype::Float32).unwrap();
    let ids: Vec<i32> = (0..23).map(|i| (i * 37 + i * i * 7) % 288).collect();
    let h = model.hidden(&Array::from_slice(&ids, &[23]), &Rows::new(vec![23]), None, route).unwrap();
    model.logits(&h, route).unwrap()
}

const TEXTS: [&str; 6] = [
    "hello the user",
    " über 😀\n\t",
    "<|im_start|>user\nhi<|im_end|>\n",
    "it's 2024, isn't it?  3.14",
    "",
    "the<|endoftext|>the",
];

#[track_caller]
fn same_text(a: &Path, b: &Path) {
    let (ours, theirs) = (Tokenizer::load(a).unwrap(), Tokenizer::load(b).unwrap());
    for text in TEXTS.into_iter().chain(["abc babc", "  a bcc", "é你"]) {
        for special in [true, false] {
            let ids = ours.encode(text, special).unwrap();
            assert_eq!(ids, theirs.encode(text, special).unwrap(), "{text}");
            assert_eq!(ours.decode(&ids, true).unwrap(), theirs.decode(&ids, true).unwrap());
        }
    }
    assert_eq!(ours.special_tokens(), theirs.special_tokens());
    assert_eq!(
        (ours.vocab_size(), ours.eos_ids(), ours.bos_id()),
        (theirs.vocab_size(), theirs.eos_ids(), theirs.bos_id())
    );
}

/// Every family, dense and packed, tied or not, with heads of the usual size and of another.
fn models() -> Vec<Tiny> {
    let mut all = Vec::new();
    for family in Family::ALL {
        let plain = Tiny::new(family);
        let packed = Tiny { packed: Some((4, 32)), dtype: Dtype::F16, ..plain.clone() };
        all.push(Tiny { tied: false, ..packed.clone() });
        all.push(Tiny { dtype: Dtype::Bf16, vocab: 300, ..plain.clone() });
        all.extend([plain, packed]);
        if family != Family::Qwen2 {
            all.push(Tiny { head_dim: 8, kv_heads: 4, ..Tiny::new(family) });
        }
    }
    all
}

#[test]
fn what_comes_back_is_what_was_there() {
    for tiny in models() {
        let model = tiny_model(&tiny);
        let dtype = match tiny.dtype {
            Dtype::F32 => "float32",
            Dtype::F16 => "float16",
            Dtype::Bf16 => "bfloat16",
        };
        let there = There::and_back(model.path(), dtype);
        assert_eq!(tensors(&there.back()), tensors(model.path()), "{tiny:?}");
        assert_eq!(decoder(&there.back()), decoder(model.path()));
        same_text(&there.back(), model.path());
        let template = |dir: &Path| ChatTemplate::load(dir).unwrap().source().to_owned();
        assert_eq!(template(&there.back()), template(model.path()));
        mlx(|| {
            assert_close(&logits(&there.back(), &Route::Base), &logits(model.path(), &Route::Base), EXACT);
        });
    }
}

#[test]
fn the_file_is_the_one_that_llama_cpps_converter_would_write() {
    for family in Family::ALL {
        let tiny = Tiny { packed: Some((4, 32)), dtype: Dtype::F16, tied: false, ..Tiny::new(family) };
        let temp = tempfile::tempdir().unwrap();
        let (ours, theirs) = (temp.path().join("ours.gguf"), temp.path().join("theirs.gguf"));
        export(tiny_model(&tiny).path(), &ours).unwrap();
        std::fs::write(&theirs, tiny_gguf(&tiny).bytes()).unwrap();
        let (ours, theirs) = (Gguf::open(&ours).unwrap(), Gguf::open(&theirs).unwrap());
        for (key, value) in &theirs.metadata {
            assert_eq!(ours.metadata.get(key), Some(value), "{key}");
        }
        let names = |gguf: &Gguf| gguf.tensors.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&ours), names(&theirs));
        for (name, info) in &theirs.tensors {
            let mine = &ours.tensors[name];
            assert_eq!((&mine.shape, mine.kind), (&info.shape, info.kind), "{name}");
            assert_eq!(ours.read(mine, None).unwrap(), theirs.read(info, None).unwrap(), "{name}");
        }
        let architecture =
            if matches!(family, Family::Llama | Family::Mistral) { "llama" } else { family.name() };
        for (key, value) in [
            ("general.type".to_owned(), Meta::Str("model".into())),
            ("general.file_type".to_owned(), Meta::U64(3)),
            ("tokenizer.ggml.add_bos_token".to_owned(), Meta::Bool(false)),
            (format!("{architecture}.rope.dimension_count"), Meta::U64(16)),
        ] {
            assert_eq!(ours.metadata.get(&key), Some(&value), "{key}");
        }
    }
}

#[test]
fn scalings_of_positions_and_biases_come_back() {
    let llama3 = |original: f32| {
        json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": original}})
    };
    let linear = json!({"rope_scaling": {"rope_type": "linear", "factor": 2.5}});
    let pairs = json!({"rope_traditional": true});
    for (family, extra) in
        [(Family::Llama, llama3(8192.0)), (Family::Mistral, llama3(4096.0)), (Family::Qwen3, linear)]
    {
        let extra = extra.as_object().unwrap().clone();
        let tiny = Tiny { rope_theta: 500_000.0, head_dim: 64, extra, ..Tiny::new(family) };
        let model = tiny_model(&tiny);
        let there = There::and_back(model.path(), "float32");
        assert_eq!(decoder(&there.back()), decoder(model.path()));
        mlx(|| {
            assert_close(&logits(&there.back(), &Route::Base), &logits(model.path(), &Route::Base), F32_DEEP);
        });
    }
    // What is in pairs already keeps its rows, and comes back in halves that compute the same.
    let extra = pairs.as_object().unwrap().clone();
    let model = tiny_model(&Tiny { extra, ..Tiny::new(Family::Llama) });
    let there = There::and_back(model.path(), "float32");
    assert_ne!(tensors(&there.back()), tensors(model.path()));
    mlx(|| assert_close(&logits(&there.back(), &Route::Base), &logits(model.path(), &Route::Base), F32_DEEP));
}

/// A file of sentencepiece's kind: three special tokens, 256 bytes, pieces with scores, and what fills the embedding up.
fn sentencepiece() -> GgufMaker {
    let mut maker = tiny_gguf(&Tiny::new(Family::Llama));
    for key in ["pre", "merges", "padding_token_id"] {
        maker.remove(&format!("tokenizer.ggml.{key}"));
    }
    let mut all: Vec<(String, i32, f32)> =
        [("<unk>", 2), ("<s>", 3), ("</s>", 3)].map(|(t, k)| (t.to_owned(), k, 0.0)).into();
    all.extend((0..256).map(|byte| (format!("<0x{byte:02X}>"), 6, 0.0)));
    let pieces = ["▁a", "bc", "abc", "ab", "▁abc", "cc", "▁▁", "▁▁▁", "▁", "a", "b", "c", "é"];
    let scores = [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -7.0, -20.0, -21.0, -22.0, -23.0, -24.0];
    all.extend(pieces.iter().zip(scores).map(|(piece, score)| ((*piece).to_owned(), 1, score)));
    all.extend((all.len()..288).map(|id| (format!("[PAD{id}]"), 5, 0.0)).collect::<Vec<_>>());
    maker.text("tokenizer.ggml.model", "llama");
    maker.texts("tokenizer.ggml.tokens", &all.iter().map(|t| t.0.as_str()).collect::<Vec<_>>());
    maker.i32s("tokenizer.ggml.token_type", &all.iter().map(|t| t.1).collect::<Vec<_>>());
    maker.f32s("tokenizer.ggml.scores", &all.iter().map(|t| t.2).collect::<Vec<_>>());
    maker.u32("tokenizer.ggml.bos_token_id", 1);
    maker.u32("tokenizer.ggml.eos_token_id", 2);
    maker
}

#[test]
fn sentencepiece_comes_back_by_its_scores() {
    for prefix in [true, false] {
        let mut maker = sentencepiece();
        maker.bool("tokenizer.ggml.add_space_prefix", prefix);
        let temp = tempfile::tempdir().unwrap();
        let (file, model) = (temp.path().join("in.gguf"), temp.path().join("model"));
        std::fs::write(&file, maker.bytes()).unwrap();
        import(&file, &model, "float32");
        let there = There::and_back(&model, "float32");
        assert_eq!(json_of(&there.back(), "tokenizer.json"), json_of(&model, "tokenizer.json"));
        same_text(&there.back(), &model);
        let (first, second) = (Gguf::open(&file).unwrap(), Gguf::open(&there.file()).unwrap());
        for key in ["tokens", "token_type", "model", "add_space_prefix", "bos_token_id", "eos_token_id"] {
            let key = format!("tokenizer.ggml.{key}");
            assert_eq!(first.metadata[&key], second.metadata[&key], "{key}");
        }
        assert_eq!(second.metadata["tokenizer.ggml.add_bos_token"], Meta::Bool(true));

        // As newer files have it: the space is only before what stands at the beginning.
        change(&model, "tokenizer.json", |t| {
            t["normalizer"] = Value::Null;
            t["pre_tokenizer"] =
                json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
        });
        let warnings = export(&model, &temp.path().join("w.gguf")).unwrap();
        assert!(warnings[0].contains("begins without a space"), "{warnings:?}");
        change(&model, "tokenizer.json", |t| t["model"]["merges"].as_array_mut().unwrap().reverse());
        let error = export(&model, &temp.path().join("x.gguf")).unwrap_err();
        assert!(error.contains("the order of model.merges"), "{error}");
    }
}

#[test]
fn every_way_to_split_is_known_again() {
    let letters = |digits: &str| {
        format!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    };
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": use_regex});
    let split = |expression: String| {
        let first = json!({"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": false});
        json!({"type": "Sequence", "pretokenizers": [first, bytes(false)]})
    };
    let digits = json!({"type": "Digits", "individual_digits": true});
    let digits = json!({"type": "Sequence", "pretokenizers": [digits, bytes(true)]});
    for (name, pre, nfc, whole) in [
        ("gpt-2", bytes(true), false, false),
        ("smollm", digits, false, false),
        ("qwen2", split(letters("")), true, false),
        ("llama-bpe", split(letters("{1,3}")), false, true),
    ] {
        let model = tiny_model(&Tiny::new(Family::Llama));
        change(model.path(), "tokenizer.json", |t| {
            t["pre_tokenizer"] = pre;
            t["normalizer"] = if nfc { json!({"type": "NFC"}) } else { Value::Null };
            t["model"]["ignore_merges"] = whole.into();
        });
        let there = There::and_back(model.path(), "float32");
        let gguf = Gguf::open(&there.file()).unwrap();
        assert_eq!(gguf.metadata["tokenizer.ggml.pre"], Meta::Str(name.into()));
        same_text(&there.back(), model.path());
        change(model.path(), "tokenizer.json", |t| t["model"]["ignore_merges"] = (!whole).into());
        let error = export(model.path(), &there.temp.path().join("x.gguf")).unwrap_err();
        assert!(error.contains(&format!("model.ignore_merges of a {name} tokenizer")), "{error}");
    }
}

#[test]
fn what_llama_cpp_has_no_form_for_is_refused_by_name() {
    let refused = |tiny: &Tiny, spoil: &dyn Fn(&Path), parts: &[&str]| {
        let model = tiny_model(tiny);
        spoil(model.path());
        let temp = tempfile::tempdir().unwrap();
        let error = export(model.path(), &temp.path().join("m.gguf")).unwrap_err();
        for part in parts {
            assert!(error.contains(part), "{part:?} is not in {error}");
        }
        assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0, "{error}");
    };
    let with = |family: Family, extra: Value| Tiny {
        extra: extra.as_object().unwrap().clone(),
        ..Tiny::new(family)
    };
    let nothing = |_: &Path| {};
    let scaling = json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}});
    refused(&with(Family::Qwen2, scaling), &nothing, &["rope_scaling.rope_type", "llama.cpp's qwen2"]);
    refused(
        &with(Family::Qwen3, json!({"rope_traditional": true})),
        &nothing,
        &["rope_traditional", "halves"],
    );
    refused(&Tiny { head_dim: 8, ..Tiny::new(Family::Qwen2) }, &nothing, &["head_dim", "llama.cpp's qwen2"]);

    let llama = Tiny::new(Family::Llama);
    let tokenizer = |parts: &[&str], spoil: &dyn Fn(&mut Value)| {
        let all = [&["tokenizer.json", "convert_hf_to_gguf.py"][..], parts].concat();
        refused(&llama, &|dir| change(dir, "tokenizer.json", spoil), &all);
    };
    tokenizer(&["pre_tokenizer", "Whitespace"], &|t| t["pre_tokenizer"] = json!({"type": "Whitespace"}));
    tokenizer(&["pre_tokenizer"], &|t| t["pre_tokenizer"]["add_prefix_space"] = true.into());
    tokenizer(&["normalizer", "NFKC"], &|t| t["normalizer"] = json!({"type": "NFKC"}));
    tokenizer(&["normalizer of a gpt-2 tokenizer"], &|t| t["normalizer"] = json!({"type": "NFC"}));
    tokenizer(&["lstrip of the token"], &|t| t["added_tokens"][0]["lstrip"] = true.into());
    tokenizer(&["model.dropout"], &|t| t["model"]["dropout"] = json!(0.1));
    let unigram = json!({"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0], ["<|im_end|>", 0.0]]});
    tokenizer(&["model.type", "Unigram"], &|t| t["model"] = unigram.clone());
    let small = Tiny { vocab: 288, ..llama.clone() };
    let more = |dir: &Path| {
        change(dir, "tokenizer.json", |t| {
            let mut token = t["added_tokens"][0].clone();
            (token["id"], token["content"]) = (288.into(), "<more>".into());
            t["added_tokens"].as_array_mut().unwrap().push(token);
        });
    };
    refused(&small, &more, &["<more>", "the id 288 of a model of 288"]);
    refused(
        &llama,
        &|dir| std::fs::remove_file(dir.join("tokenizer.json")).unwrap(),
        &["tokenizer.json: missing"],
    );
}

/// A file's tensor as f32, row-major, and its shape.
fn floats(gguf: &Gguf, name: &str) -> (Vec<f32>, Vec<usize>) {
    let info = gguf.tensors.get(name).unwrap_or_else(|| panic!("{name}: {:?}", gguf.tensors.keys()));
    let Block::Dense(tensor) = gguf.read(info, None).unwrap() else { panic!("{name} is packed") };
    (tensor.to_f32().unwrap(), tensor.shape)
}

fn adapter(model: &Path, dir: &Path, file: &Path) -> Result<(f32, usize), String> {
    let run = || -> graft_model::Result<(f32, usize)> {
        let (checkpoint, set) = (Checkpoint::open(model)?, AdapterSet::load(dir)?);
        let adapter = GgufAdapter::new(&checkpoint, &set, dir, "mine")?;
        assert_eq!(adapter.write(file)?, std::fs::metadata(file).unwrap().len());
        Ok((adapter.alpha, adapter.folded))
    };
    mlx(run).map_err(|error| error.to_string())
}

#[test]
fn an_adapter_says_the_same_update() {
    for family in Family::ALL {
        let tiny = Tiny::new(family);
        let model = tiny_model(&tiny);
        let dir = tiny_adapter(model.path(), &tiny, false, 4, 9);
        // One module has a scale of its own.
        let odd = "model.layers.1.self_attn.k_proj";
        change(dir.path(), "adapter_config.json", |c| c["graft"] = json!({"scales": {odd: 0.7}}));
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("a.gguf");
        assert_eq!(adapter(model.path(), dir.path(), &file).unwrap(), (8.0, 1));
        let gguf = Gguf::open(&file).unwrap();
        let text = |text: &str| Meta::Str(text.into());
        let architecture =
            if matches!(family, Family::Llama | Family::Mistral) { "llama" } else { family.name() };
        for (key, value) in [
            ("general.architecture", text(architecture)),
            ("general.type", text("adapter")),
            ("adapter.type", text("lora")),
            ("adapter.lora.alpha", Meta::F64(8.0)),
        ] {
            assert_eq!(gguf.metadata[key], value, "{key}");
        }
        assert_eq!(gguf.tensors.len(), 28);
        let set = mlx(|| AdapterSet::load(dir.path()).unwrap().tensors().unwrap());
        for (path, name, out, inputs) in [
            ("model.layers.0.self_attn.q_proj", "blk.0.attn_q", 64, 64),
            (odd, "blk.1.attn_k", 32, 64),
            ("model.layers.1.self_attn.o_proj", "blk.1.attn_output", 64, 64),
            ("model.layers.1.mlp.down_proj", "blk.1.ffn_down", 64, 128),
        ] {
            let (a, a_shape) = floats(&gguf, &format!("{name}.weight.lora_a"));
            let (b, b_shape) = floats(&gguf, &format!("{name}.weight.lora_b"));
            assert_eq!((a_shape, b_shape), (vec![4, inputs], vec![out, 4]), "{name}");
            let part = |part: &str| set[&format!("{path}.{part}")].to_f32().unwrap();
            let (ours_a, ours_b) = (part("lora_a"), part("lora_b"));
            let scale = if path == odd { 0.7 } else { 2.0 };
            let paired =
                architecture == "llama" && ["attn_q", "attn_k"].iter().any(|end| name.ends_with(end));
            for row in 0..out {
                // Heads of 16: the file has rows 0, 8, 1, 9, .. of a head.
                let from = if paired { row / 16 * 16 + row % 2 * 8 + row % 16 / 2 } else { row };
                for input in 0..inputs {
                    let theirs: f32 = (0..4).map(|r| b[row * 4 + r] * a[r * inputs + input]).sum();
                    let ours: f32 = (0..4).map(|r| ours_b[r * out + from] * ours_a[input * 4 + r]).sum();
                    let (theirs, ours) = (8.0 / 4.0 * theirs, scale * ours);
                    assert!((theirs - ours).abs() <= 1e-6, "{name} {row} {input}: {theirs} {ours}");
                }
            }
        }
    }
}

#[test]
fn adapters_that_are_no_lora_are_refused_with_the_way_to_go() {
    let tiny = Tiny::new(Family::Qwen3);
    let model = tiny_model(&tiny);
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("a.gguf");
    let dora = tiny_adapter(model.path(), &tiny, true, 4, 9);
    let error = adapter(model.path(), dora.path(), &file).unwrap_err();
    assert!(error.contains("DoRA") && error.contains("graft fuse --export-gguf"), "{error}");

    // An update of the embedding, which is the head, too.
    let lora = tiny_adapter(model.path(), &tiny, false, 4, 9);
    let plain = mlx(|| AdapterSet::load(lora.path()).unwrap().tensors().unwrap());
    let with = |path: &str, a: [usize; 2], b: [usize; 2], dir: &Path| {
        let mut tensors = plain.clone();
        for (part, shape) in [("lora_a", a), ("lora_b", b)] {
            let data = (0..shape[0] * shape[1]).flat_map(|i| (i as f32 * 0.01).to_le_bytes()).collect();
            let tensor = Tensor { dtype: graft_quant::StoredDtype::F32, shape: shape.to_vec(), data };
            tensors.insert(format!("{path}.{part}"), tensor);
        }
        let bytes = graft_quant::safetensors_bytes(&tensors, &BTreeMap::new()).unwrap();
        std::fs::write(dir.join("adapters.safetensors"), bytes).unwrap();
    };
    with("model.embed_tokens", [288, 2], [2, 64], lora.path());
    let error = adapter(model.path(), lora.path(), &file).unwrap_err();
    assert!(error.contains("model.embed_tokens") && error.contains("output head"), "{error}");
    assert!(!file.exists());
    // Of a head of its own, it is A as it is and B turned.
    let untied = tiny_model(&Tiny { tied: false, ..tiny.clone() });
    adapter(untied.path(), lora.path(), &file).unwrap();
    let gguf = Gguf::open(&file).unwrap();
    let (a, shape) = floats(&gguf, "token_embd.weight.lora_a");
    assert!((a[3] - 0.03).abs() < 1e-6 && shape == [288, 2], "{} {shape:?}", a[3]);
    let (b, shape) = floats(&gguf, "token_embd.weight.lora_b");
    // Its rank is half that of the others, so alpha / R is twice the scale.
    let near = b.iter().zip([0.0, 0.32, 0.005, 0.325]).all(|(x, y): (&f32, f32)| (x - y).abs() < 1e-6);
    assert!(near && shape == [64, 2], "{:?} {shape:?}", &b[..4]);

    let other = tiny_model(&Tiny { hidden: 128, heads: 8, tied: false, ..tiny });
    let error = adapter(other.path(), lora.path(), &file).unwrap_err();
    assert!(error.contains("trained on another base"), "{error}");
}
