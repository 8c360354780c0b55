//! Conversion of tiny models: what is packed, how exactly, and what is left alone.
#![allow(clippy::unwrap_used, reason = "tests: a panic is the report")]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use graft_quant::convert::{ConvertOptions, Event, GgufParts, Packing, Report, convert, convert_gguf};
use graft_quant::gguf::Gguf;
use graft_quant::{Checkpoint, Grid, Recipe, Result, StoredDtype};
use graft_testkit::{Dtype, Family, Tiny, tiny_model};

static GO_ON: AtomicBool = AtomicBool::new(false);
const AS_IS: ConvertOptions = ConvertOptions { pack: None, dequantize: false, dtype: None };

fn packing(bits: i32, group_size: i32) -> ConvertOptions {
    ConvertOptions { pack: Some(Packing { grid: Grid::affine(bits, group_size), recipe: None }), ..AS_IS }
}

struct Done {
    _temp: tempfile::TempDir,
    dir: PathBuf,
    report: Report,
    warnings: Vec<String>,
}

fn run(src: &Path, options: &ConvertOptions) -> Result<Done> {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("out");
    let mut warnings = Vec::new();
    let report = graft_testkit::mlx(|| {
        convert(src, &dir, options, &GO_ON, &mut |event| {
            if let Event::Warning(text) = event {
                warnings.push(text);
            }
        })
    })?;
    Ok(Done { _temp: temp, dir, report, warnings })
}

fn dense(checkpoint: &Checkpoint, path: &str) -> Vec<f32> {
    graft_testkit::mlx(|| {
        let w = checkpoint.weight(path).unwrap().dequantize(graft_ops::Dtype::Float32).unwrap();
        w.eval().unwrap();
        w.as_slice::<f32>().to_vec()
    })
}

#[test]
fn without_options_every_tensor_is_copied() {
    for packed in [None, Some((4, 32)), Some((3, 64))] {
        let src = tiny_model(&Tiny { packed, tied: false, dtype: Dtype::Bf16, ..Tiny::new(Family::Qwen3) });
        let done = run(src.path(), &AS_IS).unwrap();
        let (old, new) = (Checkpoint::open(src.path()).unwrap(), Checkpoint::open(&done.dir).unwrap());
        assert!(old.names().eq(new.names()));
        for name in old.names() {
            assert_eq!(old.read(name).unwrap(), new.read(name).unwrap(), "{name}");
        }
        assert_eq!(old.config().get("quantization"), new.config().get("quantization"));
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            assert_eq!(
                std::fs::read(src.path().join(file)).unwrap(),
                std::fs::read(done.dir.join(file)).unwrap()
            );
        }
        assert!(done.warnings.is_empty() && done.report.left_out.is_empty());
    }
}

#[test]
fn packed_weights_are_within_half_a_step() {
    let src = tiny_model(&Tiny { hidden: 128, head_dim: 32, ..Tiny::new(Family::Llama) });
    let old = Checkpoint::open(src.path()).unwrap();
    for bits in Grid::BITS {
        for group_size in Grid::GROUP_SIZES {
            let done = run(src.path(), &packing(bits, group_size)).unwrap();
            let new = Checkpoint::open(&done.dir).unwrap();
            assert_eq!(done.report.packed, 15);
            for path in ["model.embed_tokens", "model.layers.1.mlp.down_proj"] {
                assert_eq!(new.grid(path).unwrap(), Some(Grid::affine(bits, group_size)));
                let (a, b) = (dense(&old, path), dense(&new, path));
                for (a, b) in a.chunks(group_size as usize).zip(b.chunks(group_size as usize)) {
                    let (min, max) = a.iter().fold((f32::MAX, f32::MIN), |(l, h), x| (l.min(*x), h.max(*x)));
                    // The step is stretched so that one edge is met exactly: the other may lie up to half a step out,
                    // and with few codes the stretched step may be twice the plain one.
                    let step = (max - min) / (2_f32.powi(bits) - 1.0);
                    let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(
                        worst <= 1.01 * step + 1e-6,
                        "{path} {bits} {group_size}: {worst} of a step of {step}"
                    );
                }
            }
            let block = &new.config()["quantization"];
            assert_eq!(block, &new.config()["quantization_config"]);
            assert_eq!(
                (block["bits"].as_i64(), block["group_size"].as_i64()),
                (Some(bits.into()), Some(group_size.into()))
            );
        }
    }
}

#[test]
fn rows_that_the_group_does_not_divide_stay_dense() {
    let src = tiny_model(&Tiny::new(Family::Llama));
    let done = run(src.path(), &packing(4, 128)).unwrap();
    let new = Checkpoint::open(&done.dir).unwrap();
    // E is 64, F is 128: only down_proj has rows of 128.
    assert_eq!(done.report.packed, 2);
    assert!(new.grid("model.layers.0.mlp.down_proj").unwrap().is_some());
    assert!(new.grid("model.layers.0.mlp.up_proj").unwrap().is_none());
}

#[test]
fn dequantized_is_what_the_packed_weights_say() {
    let src = tiny_model(&Tiny { packed: Some((4, 32)), dtype: Dtype::F16, ..Tiny::new(Family::Qwen2) });
    let options = ConvertOptions { dequantize: true, dtype: Some(StoredDtype::F32), ..AS_IS };
    let done = run(src.path(), &options).unwrap();
    let (old, new) = (Checkpoint::open(src.path()).unwrap(), Checkpoint::open(&done.dir).unwrap());
    assert!(!new.config().contains_key("quantization") && !new.config().contains_key("quantization_config"));
    assert_eq!(new.config()["torch_dtype"], "float32");
    for path in old.module_shapes().keys() {
        assert_eq!(new.info(&format!("{path}.weight")).unwrap().dtype, StoredDtype::F32);
        assert_eq!(dense(&old, path), dense(&new, path), "{path}");
    }
    assert!(new.names().all(|name| !name.ends_with(".scales")));
}

#[test]
fn the_copy_of_a_tied_head_is_left_out() {
    let src = tiny_model(&Tiny { tied: false, ..Tiny::new(Family::Llama) });
    let file = src.path().join("config.json");
    let config = std::fs::read_to_string(&file).unwrap();
    let tied = config.replace("\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true");
    assert_ne!(config, tied);
    std::fs::write(&file, tied).unwrap();
    let done = run(src.path(), &packing(4, 32)).unwrap();
    assert_eq!(done.report.left_out, ["lm_head.weight"]);
    assert!(Checkpoint::open(&done.dir).unwrap().info("lm_head.weight").is_none());
}

#[test]
fn a_packed_model_is_not_packed_again() {
    let src = tiny_model(&Tiny { packed: Some((4, 32)), ..Tiny::new(Family::Llama) });
    let done = run(src.path(), &packing(8, 64)).unwrap();
    let (old, new) = (Checkpoint::open(src.path()).unwrap(), Checkpoint::open(&done.dir).unwrap());
    assert_eq!(old.config()["quantization"], new.config()["quantization"]);
    assert!(done.warnings[0].contains("packed already"), "{:?}", done.warnings);
}

#[test]
fn recipes_choose_as_mlx_lm() {
    // The blocks whose v_proj and down_proj get the high width, from mlx_lm's predicate.
    let cases: [(usize, &[usize]); 3] = [
        (2, &[1]),
        (16, &[0, 1, 4, 7, 10, 13, 14, 15]),
        (30, &[0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]),
    ];
    for (layers, high) in cases {
        for layer in 0..layers {
            let grid =
                |part: &str| Recipe::Mixed3_6.grid(&format!("model.layers.{layer}.{part}"), layers, 32).bits;
            let expected = if high.contains(&layer) { 6 } else { 3 };
            assert_eq!(
                (grid("self_attn.v_proj"), grid("mlp.down_proj")),
                (expected, expected),
                "{layer} of {layers}"
            );
            assert_eq!((grid("self_attn.q_proj"), grid("mlp.up_proj")), (3, 3));
        }
    }
    assert_eq!(Recipe::Mixed2_6.grid("lm_head", 16, 64), Grid::affine(6, 64));
    assert_eq!(Recipe::Mixed2_6.grid("model.embed_tokens", 2, 64), Grid::affine(2, 64));
    for recipe in Recipe::ALL {
        assert_eq!(Recipe::from_name(recipe.name()), Some(recipe));
    }

    let src = tiny_model(&Tiny { tied: false, ..Tiny::new(Family::Llama) });
    let grid = Grid::affine(4, 32);
    let done = run(
        src.path(),
        &ConvertOptions { pack: Some(Packing { grid, recipe: Some(Recipe::Mixed2_6) }), ..AS_IS },
    );
    let new = Checkpoint::open(&done.unwrap().dir).unwrap();
    for path in new.module_shapes().keys() {
        assert_eq!(new.grid(path).unwrap(), Some(Recipe::Mixed2_6.grid(path, 2, 32)), "{path}");
        assert!(new.config()["quantization"].get(path).is_some(), "{path} has an entry");
    }
}

#[test]
fn a_value_beyond_float16_is_said() {
    let src = tiny_model(&Tiny::new(Family::Llama));
    let (mut tensors, metadata) =
        graft_quant::read_safetensors(&src.path().join("model.safetensors")).unwrap();
    tensors.get_mut("model.norm.weight").unwrap().data[..4].copy_from_slice(&1e6_f32.to_le_bytes());
    let bytes = graft_quant::safetensors_bytes(&tensors, &metadata).unwrap();
    std::fs::write(src.path().join("model.safetensors"), bytes).unwrap();
    let done = run(src.path(), &ConvertOptions { dtype: Some(StoredDtype::F16), ..AS_IS }).unwrap();
    assert!(done.warnings[0].contains("model.norm.weight"), "{:?}", done.warnings);
}

#[test]
fn a_conversion_that_is_stopped_leaves_nothing() {
    let src = tiny_model(&Tiny::new(Family::Llama));
    let place = tempfile::tempdir().unwrap();
    let stop = AtomicBool::new(false);
    let result = graft_testkit::mlx(|| {
        convert(src.path(), &place.path().join("out"), &packing(4, 32), &stop, &mut |event| {
            if let Event::Tensor { done: 5, .. } = event {
                let part = std::fs::read_dir(place.path()).unwrap().flatten().next().unwrap();
                assert!(part.file_name().to_string_lossy().starts_with(".out.part-"));
                stop.store(true, Ordering::Relaxed);
            }
        })
    });
    assert!(matches!(result, Err(graft_quant::Error::Stopped)));
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 0);
}

#[test]
fn contradictions_and_full_targets_are_errors() {
    let src = tiny_model(&Tiny::new(Family::Llama));
    let error = |options: &ConvertOptions| run(src.path(), options).err().unwrap().to_string();
    assert!(error(&ConvertOptions { dequantize: true, ..packing(4, 64) }).contains("exclude"));
    assert!(error(&packing(7, 64)).contains("7 bits"));
    assert!(error(&ConvertOptions { dtype: Some(StoredDtype::U8), ..AS_IS }).contains("U8"));

    let target = tempfile::tempdir().unwrap();
    std::fs::write(target.path().join("notes.txt"), "mine").unwrap();
    let go = || convert(src.path(), target.path(), &AS_IS, &GO_ON, &mut |_| {});
    let error_there = graft_testkit::mlx(go).unwrap_err();
    assert!(error_there.to_string().contains("exists already"), "{error_there}");
    assert_eq!(std::fs::read_to_string(target.path().join("notes.txt")).unwrap(), "mine");
    let missing = target.path().join("no-model");
    assert!(run(&missing, &AS_IS).err().unwrap().to_string().contains("no-model"));
}

#[test]
fn gguf_keeps_its_codes() {
    // One Q4_0 matrix of two rows, one Q8_0 row of the same length, a norm, and a tensor without a counterpart.
    let d = half::f16::from_f32(0.5).to_le_bytes();
    let row4 = |byte: u8| [&d[..], &[byte; 16]].concat();
    let tensors: [(&str, &[u64], u32, Vec<u8>); 5] = [
        ("a", &[2, 32], 2, [row4(0x10), row4(0x32)].concat()),
        ("b", &[2, 32], 2, [row4(0x54), row4(0x76)].concat()),
        ("c", &[1, 32], 8, [&d[..], &[0xff; 32]].concat()),
        ("norm", &[2], 0, [2.0_f32, 3.0].iter().flat_map(|x| x.to_le_bytes()).collect()),
        ("rope_freqs", &[1], 0, vec![0; 4]),
    ];
    let (mut header, mut data) = (b"GGUF".to_vec(), Vec::new());
    header.extend(3_u32.to_le_bytes());
    header.extend([&5_u64.to_le_bytes()[..], &0_u64.to_le_bytes()].concat());
    for (name, shape, kind, bytes) in &tensors {
        header.extend((name.len() as u64).to_le_bytes());
        header.extend(name.as_bytes());
        header.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|dim| header.extend(dim.to_le_bytes()));
        header.extend(kind.to_le_bytes());
        header.extend((data.len() as u64).to_le_bytes());
        data.extend(bytes);
        data.resize(data.len().next_multiple_of(32), 0);
    }
    header.resize(header.len().next_multiple_of(32), 0);
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("m.gguf");
    std::fs::write(&file, [header, data].concat()).unwrap();

    let gguf = Gguf::open(&file).unwrap();
    let names = |name: &str| match name {
        "a" => Some(("model.a.weight".to_owned(), Some(vec![1, 0]))),
        "norm" => Some(("model.norm.weight".to_owned(), None)),
        "rope_freqs" => None,
        other => Some((format!("model.{other}.weight"), None)),
    };
    let config = serde_json::json!({"model_type": "llama"}).as_object().unwrap().clone();
    let files = vec![("tokenizer.json".to_owned(), b"{}".to_vec())];
    let out = temp.path().join("out");
    let report = graft_testkit::mlx(|| {
        let parts = GgufParts { config, files, names: &names };
        convert_gguf(&gguf, &parts, &out, &AS_IS, &GO_ON, &mut |_| {})
    });
    let report = report.unwrap();
    assert_eq!(report.left_out, ["rope_freqs"]);
    let made = Checkpoint::open(&out).unwrap();
    assert_eq!(std::fs::read(out.join("tokenizer.json")).unwrap(), b"{}");
    assert_eq!(made.config()["torch_dtype"], "float16");
    assert_eq!(made.grid("model.a").unwrap(), Some(Grid::affine(4, 32)));
    assert_eq!(made.grid("model.c").unwrap(), Some(Grid::affine(8, 32)));
    let halves = |low: f32, high: f32| [[low; 16], [high; 16]].concat();
    // (code - 8) / 2, the second row first.
    assert_eq!(dense(&made, "model.a"), [halves(-3.0, -2.5), halves(-4.0, -3.5)].concat());
    assert_eq!(dense(&made, "model.b"), [halves(-2.0, -1.5), halves(-1.0, -0.5)].concat());
    assert_eq!(dense(&made, "model.c"), [-0.5; 32]);
    assert_eq!(made.read("model.norm.weight").unwrap().to_f32().unwrap(), [2.0, 3.0]);
    assert_eq!(made.info("model.norm.weight").unwrap().dtype, StoredDtype::F16);
}
