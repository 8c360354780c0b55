//! GGUF files made byte by byte, against the formulas of the format; and files that lie.
#![allow(clippy::unwrap_used, reason = "tests: a panic is the report")]

use std::path::Path;

use graft_ops::Dtype;
use graft_quant::Error;
use graft_quant::gguf::{Block, Gguf, HostPacked, Kind, Value};
use graft_testkit::{GgufMaker as Maker, gguf_text as text};
use half::f16;

fn open(bytes: &[u8]) -> Result<Gguf, Error> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    Gguf::open(&path)
}

fn message(bytes: &[u8]) -> String {
    open(bytes).unwrap_err().to_string()
}

/// Bytes that repeat only after a long while.
fn noise(count: usize, seed: u32) -> Vec<u8> {
    let mut state = seed;
    let step = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..count).map(step).collect()
}

/// Blocks of random codes, and the weights by the format's own formulas.
fn blocks(kind: Kind, count: usize) -> (Vec<u8>, Vec<f32>) {
    let (mut bytes, mut weights) = (Vec::new(), Vec::new());
    for i in 0..count {
        let d = f16::from_f32(0.01 * (i as f32 + 1.0) * if i % 2 == 0 { 1.0 } else { -1.0 });
        let m = f16::from_f32(0.3 - 0.07 * i as f32);
        bytes.extend(d.to_le_bytes());
        if kind == Kind::Q4_1 {
            bytes.extend(m.to_le_bytes());
        }
        let (d, m) = (d.to_f32(), m.to_f32());
        if kind == Kind::Q8_0 {
            let codes = noise(32, i as u32);
            weights.extend(codes.iter().map(|&q| d * f32::from(q as i8)));
            bytes.extend(codes);
            continue;
        }
        let codes = noise(16, i as u32);
        let weight = |q: u8| if kind == Kind::Q4_0 { (f32::from(q) - 8.0) * d } else { f32::from(q) * d + m };
        weights.extend(codes.iter().map(|q| weight(q & 15)));
        weights.extend(codes.iter().map(|q| weight(q >> 4)));
        bytes.extend(codes);
    }
    (bytes, weights)
}

fn dequantized(packed: &HostPacked) -> Vec<f32> {
    graft_testkit::mlx(|| {
        let dense = packed.to_arrays().unwrap().dequantize(Dtype::Float32).unwrap();
        dense.eval().unwrap();
        dense.as_slice::<f32>().to_vec()
    })
}

#[test]
fn blocks_become_mlx_groups_without_loss() {
    for (kind, number) in [(Kind::Q4_0, 2), (Kind::Q4_1, 3), (Kind::Q8_0, 8)] {
        let (bytes, weights) = blocks(kind, 12);
        let mut maker = Maker::default();
        maker.tensor("w", &[6, 64], number, &bytes);
        let gguf = open(&maker.bytes()).unwrap();
        let info = &gguf.tensors["w"];
        assert_eq!((info.shape.as_slice(), info.kind), (&[6, 64][..], kind));
        let Block::Packed(packed) = gguf.read(info, None).unwrap() else { panic!("{kind} is packed") };
        for (found, expected) in dequantized(&packed).iter().zip(&weights) {
            // One multiplication and one addition in f32 against the format's own form.
            assert!(
                (found - expected).abs() <= 2e-6 * (expected.abs() + 10.0),
                "{kind}: {found} for {expected}"
            );
        }

        let order = [5, 0, 4, 1, 3, 2];
        let Block::Packed(moved) = gguf.read(info, Some(&order)).unwrap() else { panic!("{kind} is packed") };
        for (row, from) in order.into_iter().enumerate() {
            for (new, old) in [
                (&moved.codes, &packed.codes),
                (&moved.scales, &packed.scales),
                (moved.biases.as_ref().unwrap(), packed.biases.as_ref().unwrap()),
            ] {
                let width = new.data.len() / 6;
                assert_eq!(new.data[row * width..][..width], old.data[from * width..][..width]);
            }
        }
        for wrong in [&[0, 1, 2][..], &[0, 1, 2, 3, 4, 4], &[0, 1, 2, 3, 4, 6]] {
            assert!(gguf.read(info, Some(wrong)).unwrap_err().to_string().contains("tensor w"));
        }
    }
}

#[test]
fn floats_stay_as_they_are() {
    let floats: Vec<u8> = [1.5_f32, -2.0, 3.25, 1e-20].iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut maker = Maker::default();
    maker.tensor("norm", &[4], 0, &floats);
    maker.tensor("half", &[2, 3], 1, &noise(12, 3));
    maker.tensor("brain", &[2, 3], 30, &noise(12, 4));
    let gguf = open(&maker.bytes()).unwrap();
    for (name, bytes) in [("norm", floats), ("half", noise(12, 3)), ("brain", noise(12, 4))] {
        let Block::Dense(tensor) = gguf.read(&gguf.tensors[name], None).unwrap() else {
            panic!("{name} is dense")
        };
        assert_eq!(tensor.data, bytes);
    }
    let Block::Dense(moved) = gguf.read(&gguf.tensors["norm"], Some(&[3, 2, 1, 0])).unwrap() else {
        panic!()
    };
    assert_eq!(moved.to_f32().unwrap(), [1e-20, 3.25, -2.0, 1.5]);
}

#[test]
fn metadata_of_every_type() {
    let mut maker = Maker::default();
    maker.value("u8", 0, &[200]);
    maker.value("i8", 1, &[200]);
    maker.value("u16", 2, &65_000_u16.to_le_bytes());
    maker.value("i16", 3, &(-3_i16).to_le_bytes());
    maker.value("u32", 4, &4_000_000_000_u32.to_le_bytes());
    maker.value("i32", 5, &(-4_i32).to_le_bytes());
    maker.value("f32", 6, &0.5_f32.to_le_bytes());
    maker.value("bool", 7, &[1]);
    maker.value("text", 8, &text("Ġthe"));
    let list = [&8_u32.to_le_bytes()[..], &2_u64.to_le_bytes(), &text("a"), &text("")].concat();
    maker.value("list", 9, &list);
    maker.value("u64", 10, &u64::MAX.to_le_bytes());
    maker.value("i64", 11, &i64::MIN.to_le_bytes());
    maker.value("f64", 12, &0.1_f64.to_le_bytes());
    let metadata = open(&maker.bytes()).unwrap().metadata;
    assert_eq!(metadata["u8"].as_u64(), Some(200));
    assert_eq!(metadata["i8"], Value::I64(-56));
    assert_eq!(metadata["u16"].as_u64(), Some(65_000));
    assert_eq!(metadata["i16"].as_f64(), Some(-3.0));
    assert_eq!(metadata["i16"].as_u64(), None);
    assert_eq!(metadata["u32"], Value::U64(4_000_000_000));
    assert_eq!(metadata["i32"], Value::I64(-4));
    assert_eq!(metadata["f32"].as_f64(), Some(0.5));
    assert_eq!(metadata["bool"].as_bool(), Some(true));
    assert_eq!(metadata["text"].as_str(), Some("Ġthe"));
    assert_eq!(metadata["list"].as_array(), Some(&[Value::Str("a".into()), Value::Str(String::new())][..]));
    assert_eq!(metadata["u64"].as_u64(), Some(u64::MAX));
    assert_eq!(metadata["i64"], Value::I64(i64::MIN));
    assert_eq!(metadata["f64"].as_f64(), Some(0.1));
}

#[test]
fn what_we_cannot_hold_exactly_is_named() {
    let mut maker = Maker::default();
    maker.tensor("blk.0.attn_v.weight", &[2, 256], 14, &noise(420, 1));
    maker.tensor("odd", &[4], 77, &[]);
    let gguf = open(&maker.bytes()).unwrap();
    let error = gguf.read(&gguf.tensors["blk.0.attn_v.weight"], None).unwrap_err().to_string();
    assert!(error.contains("blk.0.attn_v.weight") && error.contains("Q6_K"), "{error}");
    let error = gguf.read(&gguf.tensors["odd"], None).unwrap_err().to_string();
    assert!(error.contains("type 77"), "{error}");

    // -128 d overflows 16 bits; a scale that is no number is damage.
    for d in [f16::from_f32(1000.0), f16::NAN] {
        let mut maker = Maker::default();
        maker.tensor("w", &[1, 32], 8, &[&d.to_le_bytes()[..], &[0; 32]].concat());
        let gguf = open(&maker.bytes()).unwrap();
        let error = gguf.read(&gguf.tensors["w"], None).unwrap_err().to_string();
        assert!(error.contains("tensor w") && error.contains("finite"), "{error}");
    }
}

fn sample() -> Vec<u8> {
    let mut maker = Maker::default();
    maker.value("general.architecture", 8, &text("llama"));
    maker.value("list", 9, &[&4_u32.to_le_bytes()[..], &1_u64.to_le_bytes(), &7_u32.to_le_bytes()].concat());
    maker.tensor("w", &[2, 32], 2, &blocks(Kind::Q4_0, 2).0);
    maker.tensor("norm", &[4], 0, &noise(16, 1));
    maker.bytes()
}

#[test]
fn every_truncation_is_an_error() {
    let whole = sample();
    assert!(open(&whole).is_ok());
    for length in 0..whole.len() {
        let error = message(&whole[..length]);
        assert!(error.contains("model.gguf"), "{length} bytes: {error}");
    }
}

#[test]
fn no_byte_makes_the_reader_panic() {
    let whole = sample();
    for at in 0..whole.len() {
        for byte in [0, 1, 0x7f, 0x80, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] = byte;
            if let Ok(gguf) = open(&bytes) {
                for info in gguf.tensors.values() {
                    let _ = gguf.read(info, None);
                }
            }
        }
    }
}

#[test]
fn lies_are_named() {
    assert!(message(b"GG\xfeL....").contains("begins with \"GG\\xfeL\", not with \"GGUF\""));
    assert!(message(&[&b"GGUF"[..], &1_u32.to_le_bytes()].concat()).contains("version 1"));
    assert!(message(&[&b"GGUF"[..], &3_u32.to_be_bytes()].concat()).contains("big-endian"));

    let lie = |key: &str, kind: u32, bytes: &[u8]| {
        let mut maker = Maker::default();
        maker.value(key, kind, bytes);
        message(&maker.bytes())
    };
    assert!(lie("k", 8, &u64::MAX.to_le_bytes()).contains("k at byte"));
    assert!(lie("k", 9, &[&0_u32.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat()).contains("k at byte"));
    let nested = [&9_u32.to_le_bytes()[..], &1_u64.to_le_bytes()].concat();
    assert!(lie("k", 9, &nested.repeat(10_000)).contains("nested"));
    assert!(lie("k", 13, &[]).contains("type 13"));
    assert!(lie("general.alignment", 4, &0_u32.to_le_bytes()).contains("general.alignment"));
    let mut maker = Maker::default();
    maker.value("k", 0, &[1]);
    maker.value("k", 0, &[2]);
    assert!(message(&maker.bytes()).contains("twice"));

    for (shape, kind) in
        [(&[1 << 40, 32][..], 0), (&[1 << 30, 1 << 30, 1 << 30], 0), (&[2, 33], 2), (&[4; 5], 0)]
    {
        let mut maker = Maker::default();
        maker.tensor("w", shape, kind, &[0; 64]);
        assert!(message(&maker.bytes()).contains("tensor w"));
    }
    let mut maker = Maker::default();
    maker.tensor("w", &[1024], 0, &[0; 64]);
    assert!(message(&maker.bytes()).contains("tensor w: 4096 bytes"));
    assert!(Gguf::open(Path::new("/nowhere.gguf")).unwrap_err().to_string().contains("/nowhere.gguf"));
}
