//! GGUF files that are written: blocks that come back bit for bit, weights that no block holds exactly, with the error that
//! the report names, and what is refused.
#![allow(clippy::unwrap_used, reason = "tests: a panic is the report")]

use std::path::Path;

use graft_ops::{Array, Dtype};
use graft_quant::convert::{ConvertOptions, Event, GgufParts, convert_gguf};
use graft_quant::gguf::{
    Block, ExportParts, ExportReport, Field, Gguf, GgufWriter, Kind, Placed, Value, export_gguf,
};
use graft_quant::{
    Checkpoint, DirWriter, Error, Grid, Packed, Quantization, StoredDtype, Tensor, Weight, round,
};
use graft_testkit::{GgufMaker as Maker, mlx};
use half::f16;
use serde_json::Map;

const NAME: &str = "model.w.weight";

/// A model directory with one weight, and other tensors as they are.
fn checkpoint(dir: &Path, weight: &Weight, others: &[(&str, Tensor)]) -> Checkpoint {
    let mut writer = DirWriter::create(&dir.join("model"), false).unwrap();
    let mut config = Map::new();
    let host = |array: &Array| Tensor::from_array(array).unwrap();
    match weight {
        Weight::Packed(packed) => {
            for (part, array) in packed.parts() {
                writer.add(&format!("model.w.{part}"), &host(array)).unwrap();
            }
            Quantization { default: Some(packed.grid), ..Quantization::default() }.to_config(&mut config);
        }
        other => writer.add(NAME, &host(&other.dequantize(Dtype::Float32).unwrap())).unwrap(),
    }
    others.iter().for_each(|(name, tensor)| writer.add(name, tensor).unwrap());
    writer.write_config(&config).unwrap();
    writer.finish().unwrap();
    Checkpoint::open(&dir.join("model")).unwrap()
}

fn parts(names: &[&str]) -> ExportParts {
    let placed = |name: &&str| Placed { source: (*name).into(), name: (*name).into(), rows: None };
    let fields = vec![("general.architecture".into(), Field::Str("any".into()))];
    ExportParts { fields, tensors: names.iter().map(placed).collect(), extra: Vec::new() }
}

fn export(
    dir: &Path,
    checkpoint: &Checkpoint,
    parts: &ExportParts,
    kind: Option<Kind>,
) -> Result<(ExportReport, Gguf, Vec<Event>), Error> {
    let (file, mut events) = (dir.join("out.gguf"), Vec::new());
    let report = export_gguf(checkpoint, parts, &file, kind, &false.into(), &mut |event| events.push(event))?;
    assert_eq!(report.bytes, std::fs::metadata(&file).unwrap().len());
    Ok((report, Gguf::open(&file).unwrap(), events))
}

/// The values that a reader finds.
fn values(gguf: &Gguf, name: &str) -> Vec<f32> {
    match gguf.read(&gguf.tensors[name], None).unwrap() {
        Block::Dense(tensor) => tensor.to_f32().unwrap(),
        Block::Packed(packed) => floats(&Weight::Packed(packed.to_arrays().unwrap())),
    }
}

fn floats(weight: &Weight) -> Vec<f32> {
    Tensor::from_array(&weight.dequantize(Dtype::Float32).unwrap()).unwrap().to_f32().unwrap()
}

/// ||a - b|| / ||b||.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let squares = |all: &mut dyn Iterator<Item = f64>| all.map(|x| x * x).sum::<f64>();
    let gap = squares(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
    (gap / squares(&mut b.iter().map(|x| f64::from(*x)))).sqrt()
}

fn matrix(rows: i32, inputs: i32) -> Array {
    let value = |i: i32| ((i * 37 % 101) as f32 - 50.0) * 0.003 + ((i * 7 % 13) as f32) * 0.011;
    Array::from_iter((0..rows * inputs).map(value), &[rows, inputs])
}

/// A weight whose scales and biases have `dtype`.
fn packed(bits: i32, group_size: i32, dtype: Dtype) -> Weight {
    let w = matrix(6, 256).as_dtype(dtype).unwrap();
    Weight::Packed(round(&w, Grid::affine(bits, group_size), None).unwrap())
}

#[test]
fn blocks_that_were_imported_are_written_bit_for_bit() {
    let mut state = 1_u32;
    let mut byte = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    let mut maker = Maker::default();
    let mut expected = Vec::new();
    for (name, number, floats, codes) in [("a", 2, 1, 16), ("b", 3, 2, 16), ("c", 8, 1, 32)] {
        let mut bytes = Vec::new();
        for block in 0..24 {
            for part in 0..floats {
                // Negative, tiny, and zero scales among them: a zero one keeps its codes, too.
                let d = [0.02, -0.013, 0.0, 6.1e-5, 3e-7, 40.0][block % 6] * (part as f32 * -3.0 + 1.0);
                bytes.extend(f16::from_f32(d).to_le_bytes());
            }
            bytes.extend((0..codes).map(|_| byte()));
        }
        maker.tensor(&format!("model.{name}.weight"), &[6, 128], number, &bytes);
        expected.push((format!("model.{name}.weight"), number, bytes));
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("in.gguf");
    std::fs::write(&file, maker.bytes()).unwrap();
    mlx(|| {
        let options = ConvertOptions { pack: None, dequantize: false, dtype: None };
        let names = |name: &str| Some((name.to_owned(), None));
        let parts_in = GgufParts { config: Map::new(), files: Vec::new(), names: &names };
        let gguf = Gguf::open(&file).unwrap();
        let model = dir.path().join("model");
        convert_gguf(&gguf, &parts_in, &model, &options, &false.into(), &mut |_| {}).unwrap();
        let checkpoint = Checkpoint::open(&model).unwrap();
        let names: Vec<&str> = expected.iter().map(|e| e.0.as_str()).collect();
        let (report, out, _) = export(dir.path(), &checkpoint, &parts(&names), None).unwrap();
        assert!(report.matrices.iter().all(|m| m.relative_error == 0.0), "{report:?}");
        let bytes = std::fs::read(out.path()).unwrap();
        for (name, number, block) in &expected {
            let info = &out.tensors[name];
            let kind = [Kind::Q4_0, Kind::Q4_1, Kind::Q8_0].into_iter().find(|k| {
                ["Q4_0", "Q4_1", "Q8_0"][[2, 3, 8].iter().position(|n| n == number).unwrap()] == k.to_string()
            });
            assert_eq!((Some(info.kind), &info.shape[..]), (kind, &[6, 128][..]));
            let from = info.offset as usize;
            assert_eq!(&bytes[from..from + info.bytes as usize], &block[..], "{name}");
        }
        assert_eq!(out.metadata["general.quantization_version"], Value::U64(2));
        assert_eq!(out.metadata["general.architecture"], Value::Str("any".into()));
    });
}

#[test]
fn narrow_codes_stay_as_they_are_whatever_their_group() {
    mlx(|| {
        for bits in [2, 3, 4] {
            for group in Grid::GROUP_SIZES {
                let dir = tempfile::tempdir().unwrap();
                let weight = packed(bits, group, Dtype::Float16);
                let checkpoint = checkpoint(dir.path(), &weight, &[]);
                let (report, gguf, _) = export(dir.path(), &checkpoint, &parts(&[NAME]), None).unwrap();
                let one = &report.matrices[0];
                assert_eq!((one.to, one.relative_error), (Kind::Q4_1, 0.0));
                assert_eq!(one.from, format!("{bits} bits, groups of {group}"));
                assert_eq!(gguf.metadata["general.file_type"], Value::U64(3));
                assert_eq!(values(&gguf, NAME), floats(&weight), "{bits} bits, groups of {group}");
            }
        }
    });
}

#[test]
fn what_is_rounded_is_measured() {
    mlx(|| {
        let (q8, q4) = (Some(Kind::Q8_0), Some(Kind::Q4_1));
        let dense = Weight::Dense(matrix(6, 256));
        for (weight, asked, kind, at_least, at_most) in [
            // Scales of 32 bits that 16 do not hold.
            (packed(4, 32, Dtype::Float32), None, Kind::Q4_1, 1e-6, 3e-3),
            (packed(5, 64, Dtype::Float16), None, Kind::Q8_0, 1e-6, 1e-2),
            (packed(6, 32, Dtype::Float16), None, Kind::Q8_0, 1e-6, 1e-2),
            (packed(8, 128, Dtype::Bfloat16), None, Kind::Q8_0, 1e-6, 1e-2),
            (packed(4, 64, Dtype::Float16), q8, Kind::Q8_0, 1e-6, 1e-2),
            (packed(8, 64, Dtype::Float16), q4, Kind::Q4_1, 1e-3, 1e-1),
            (dense.clone(), q8, Kind::Q8_0, 1e-6, 1e-2),
            (dense.clone(), q4, Kind::Q4_1, 1e-3, 1e-1),
            (dense.clone(), Some(Kind::F16), Kind::F16, 1e-7, 1e-3),
            (dense.clone(), Some(Kind::BF16), Kind::BF16, 1e-6, 1e-2),
            (packed(4, 64, Dtype::Float16), Some(Kind::F16), Kind::F16, 1e-7, 1e-3),
            (packed(3, 64, Dtype::Float16), Some(Kind::F32), Kind::F32, 0.0, 0.0),
            (dense, None, Kind::F32, 0.0, 0.0),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let checkpoint = checkpoint(dir.path(), &weight, &[]);
            let (report, gguf, _) = export(dir.path(), &checkpoint, &parts(&[NAME]), asked).unwrap();
            let one = &report.matrices[0];
            let real = distance(&values(&gguf, NAME), &floats(&weight));
            let said = format!("{} to {}: {real}, said {}", one.from, one.to, one.relative_error);
            assert_eq!((one.to, gguf.tensors[NAME].kind), (kind, kind), "{said}");
            assert!((one.relative_error - real).abs() <= 1e-3 * real, "{said}");
            assert!((at_least..=at_most).contains(&real), "{said}");
        }
    });
}

/// 8 bits whose biases are -128 times their scales in most groups, as fusing leaves them: those groups stay exact.
#[test]
fn groups_of_eight_bits_are_exact_one_by_one() {
    mlx(|| {
        let grid = Grid::affine(8, 64);
        let codes = Array::from_iter((0..4 * 64_u32).map(|i| i.wrapping_mul(2_654_435_761)), &[4, 64]);
        let scales: Vec<f32> = (0..16).map(|i| 2_f32.powi(-8) * (i + 1) as f32).collect();
        let biases: Vec<f32> =
            scales.iter().enumerate().map(|(i, s)| if i == 5 { -77.5 * s } else { -128.0 * s }).collect();
        let part = |all: &[f32]| Array::from_slice(all, &[4, 4]).as_dtype(Dtype::Float16).unwrap();
        let weight =
            Weight::Packed(Packed { codes, scales: part(&scales), biases: Some(part(&biases)), grid });
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = checkpoint(dir.path(), &weight, &[]);
        let (report, gguf, _) = export(dir.path(), &checkpoint, &parts(&[NAME]), None).unwrap();
        let (found, wanted) = (values(&gguf, NAME), floats(&weight));
        for (group, (found, wanted)) in found.chunks(64).zip(wanted.chunks(64)).enumerate() {
            assert_eq!(found == wanted, group != 5, "group {group}");
        }
        assert!(report.matrices[0].relative_error > 0.0 && report.matrices[0].relative_error < 1e-2);
    });
}

#[test]
fn rows_change_their_order_and_vectors_are_wide() {
    mlx(|| {
        let dir = tempfile::tempdir().unwrap();
        let bias =
            Tensor::from_array(&matrix(1, 6).reshape(&[6]).unwrap().as_dtype(Dtype::Bfloat16).unwrap());
        let bias = bias.unwrap();
        let wide = bias.to_f32().unwrap();
        let weight = packed(4, 32, Dtype::Float16);
        let checkpoint = checkpoint(dir.path(), &weight, &[("model.w.bias", bias)]);
        let order = vec![3, 0, 5, 1, 4, 2];
        let mut parts = parts(&[NAME, "model.w.bias"]);
        parts.tensors.iter_mut().for_each(|placed| placed.rows = Some(order.clone()));
        let extra = Tensor { dtype: StoredDtype::F32, shape: vec![1], data: 2.5_f32.to_le_bytes().into() };
        parts.extra.push(("extra".into(), extra));
        let (_, gguf, _) = export(dir.path(), &checkpoint, &parts, None).unwrap();
        assert_eq!((gguf.tensors["model.w.bias"].kind, values(&gguf, "extra")), (Kind::F32, vec![2.5]));
        let (found, whole) = (values(&gguf, NAME), floats(&weight));
        for (row, from) in order.iter().enumerate() {
            assert_eq!(found[row * 256..][..256], whole[from * 256..][..256]);
            assert_eq!(values(&gguf, "model.w.bias")[row], wide[*from]);
        }
        parts.tensors[0].rows = Some(vec![0; 6]);
        let error = export(dir.path(), &checkpoint, &parts, None).unwrap_err().to_string();
        assert!(error.contains(NAME) && error.contains("each row once"), "{error}");
    });
}

#[test]
fn what_cannot_be_written_is_refused_and_leaves_nothing() {
    mlx(|| {
        let dir = tempfile::tempdir().unwrap();
        let large = Weight::Dense(matrix(2, 64).multiply(Array::from_f32(1e6)).unwrap());
        let checkpoint = checkpoint(dir.path(), &large, &[]);
        let names = || -> Vec<_> {
            std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect()
        };
        for kind in [Kind::F16, Kind::Q4_1] {
            let error = export(dir.path(), &checkpoint, &parts(&[NAME]), Some(kind)).unwrap_err().to_string();
            for part in [NAME, &format!("values that {kind} can hold"), "bf16 or f32"] {
                assert!(error.contains(part), "{error}");
            }
            assert_eq!(names(), ["model"]);
        }
        let error =
            export(dir.path(), &checkpoint, &parts(&["absent.weight"]), None).unwrap_err().to_string();
        assert!(error.contains("absent.weight") && error.contains("none of that name"), "{error}");
        let stop = std::sync::atomic::AtomicBool::new(true);
        let file = dir.path().join("out.gguf");
        let stopped = export_gguf(&checkpoint, &parts(&[NAME]), &file, None, &stop, &mut |_| {});
        assert!(matches!(stopped, Err(Error::Stopped)));
        assert_eq!(names(), ["model"]);
    });
}

#[test]
fn rows_that_are_no_whole_blocks_are_16_bits() {
    mlx(|| {
        let dir = tempfile::tempdir().unwrap();
        let weight = Weight::Dense(matrix(4, 48));
        let checkpoint = checkpoint(dir.path(), &weight, &[]);
        let (report, _, events) = export(dir.path(), &checkpoint, &parts(&[NAME]), Some(Kind::Q8_0)).unwrap();
        assert_eq!(report.matrices[0].to, Kind::F16);
        let warned = |event: &Event| matches!(event, Event::Warning(text) if text.contains("rows of 48"));
        assert!(events.iter().any(warned), "{events:?}");
    });
}

#[test]
fn a_writer_takes_what_its_header_says() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.gguf");
    let plan = [("a".to_owned(), vec![2, 3], Kind::F32), ("b".to_owned(), vec![32], Kind::Q8_0)];
    let mut writer = GgufWriter::create(&path, &[], &plan).unwrap();
    let error = writer.add(&[0; 23]).unwrap_err().to_string();
    assert!(error.contains("23 bytes"), "{error}");
    let mut writer = GgufWriter::create(&path, &[], &plan).unwrap();
    writer.add(&[1; 24]).unwrap();
    let error = writer.finish().unwrap_err().to_string();
    assert!(error.contains("tensor b was not written"), "{error}");
    assert!(!path.exists());
    let odd = [("a".to_owned(), vec![2, 33], Kind::Q8_0)];
    let error = GgufWriter::create(&path, &[], &odd).unwrap_err().to_string();
    assert!(error.contains("tensor a: [2, 33] cannot be written as Q8_0"), "{error}");
    // Every type of value comes back.
    let fields: Vec<(String, Field)> = [
        ("u", Field::U32(7)),
        ("f", Field::F32(0.25)),
        ("b", Field::Bool(true)),
        ("s", Field::Str("ü".into())),
        ("ss", Field::Strs(vec!["a".into(), String::new()])),
        ("is", Field::I32s(vec![-1, 3])),
        ("fs", Field::F32s(vec![-0.5])),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into();
    let mut writer = GgufWriter::create(&path, &fields, &plan[..1]).unwrap();
    writer.add(&[1; 24]).unwrap();
    assert_eq!(writer.finish().unwrap(), std::fs::metadata(&path).unwrap().len());
    let back = Gguf::open(&path).unwrap();
    let text = |text: &str| Value::Str(text.into());
    for (key, value) in [
        ("u", Value::U64(7)),
        ("f", Value::F64(0.25)),
        ("b", Value::Bool(true)),
        ("s", text("ü")),
        ("ss", Value::Array(vec![text("a"), text("")])),
        ("is", Value::Array(vec![Value::I64(-1), Value::I64(3)])),
        ("fs", Value::Array(vec![Value::F64(-0.5)])),
    ] {
        assert_eq!(back.metadata[key], value, "{key}");
    }
    assert_eq!(back.tensors["a"].shape, [2, 3]);
    // What came to be there meanwhile is not replaced.
    let before = std::fs::read(&path).unwrap();
    let mut writer = GgufWriter::create(&path, &[], &plan[..1]).unwrap();
    writer.add(&[2; 24]).unwrap();
    let error = writer.finish().unwrap_err().to_string();
    assert!(error.contains("w.gguf") && error.contains("exists"), "{error}");
    assert!(std::fs::read(&path).unwrap() == before);
}
