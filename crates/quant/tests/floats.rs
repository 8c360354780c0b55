//! The modes of floats: read strictly, rounded to levels that are kept, converted both ways, exported.
#![allow(clippy::unwrap_used, reason = "tests: a panic is the report")]

use std::path::Path;

use graft_ops::ffi::quantize;
use graft_ops::{Array, Dtype};
use graft_quant::convert::{ConvertOptions, Packing, Report, convert};
use graft_quant::gguf::Kind;
use graft_quant::{
    Checkpoint, Grid, Hessian, Levels, Mode, Packed, StoredDtype, Tensor, read_safetensors, round,
    round_compensated, round_nearest, safetensors_bytes,
};
use graft_testkit::{Family, Tiny, tiny_dense_of, tiny_model};
use serde_json::{Value, json};

const MODES: [Mode; 3] = [Mode::Mxfp4, Mode::Nvfp4, Mode::Mxfp8];
const INPUTS: i32 = 256;

fn normal(shape: &[i32], seed: u64) -> Array {
    let key = mlx_rs::random::key(seed).unwrap();
    mlx_rs::random::normal::<f32>(shape, None, None, &key).unwrap()
}

fn sum(array: &Array) -> f32 {
    array.sum(false).unwrap().item_cast::<f32>()
}

fn bytes(packed: &Packed) -> Vec<Vec<u8>> {
    packed.parts().map(|(_, array)| Tensor::from_array(array).unwrap().data).collect()
}

fn tiny(mode: Mode) -> Tiny {
    Tiny::new(Family::Llama).in_mode(mode.name())
}

fn run(src: &Path, options: &ConvertOptions) -> (tempfile::TempDir, Report) {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("out");
    let report = graft_testkit::mlx(|| convert(src, &dir, options, &false.into(), &mut |_| {})).unwrap();
    (temp, report)
}

const AS_IS: ConvertOptions = ConvertOptions { pack: None, dequantize: false, dtype: None };

#[test]
fn a_directory_reads_as_what_its_numbers_are() {
    for mode in MODES {
        let dir = tiny_model(&tiny(mode));
        let dense = tiny_dense_of(dir.path());
        let (packed, dense) =
            (Checkpoint::open(dir.path()).unwrap(), Checkpoint::open(dense.path()).unwrap());
        for (path, shape) in packed.module_shapes() {
            assert_eq!(packed.grid(&path).unwrap(), Some(Grid::of(mode)), "{path}");
            graft_testkit::mlx(|| {
                let w = packed.weight(&path).unwrap();
                assert_eq!((w.out_features() as usize, w.in_features() as usize), shape);
                let found = Tensor::from_array(&w.dequantize(Dtype::Float32).unwrap()).unwrap();
                assert_eq!(found, dense.read(&format!("{path}.weight")).unwrap(), "{mode:?} {path}");
                let norms = Tensor::from_array(&w.row_norms_squared().unwrap()).unwrap();
                assert_eq!(norms.shape, [shape.0]);
            });
        }
    }
}

/// The error of a model directory after a change of one tensor or of the config.
fn broken(
    mode: Mode,
    change: impl Fn(&mut std::collections::BTreeMap<String, Tensor>, &mut Value),
) -> String {
    let dir = tiny_model(&tiny(mode));
    let file = dir.path().join("model.safetensors");
    let (mut tensors, metadata) = read_safetensors(&file).unwrap();
    let config = dir.path().join("config.json");
    let mut value: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    change(&mut tensors, &mut value);
    std::fs::write(&file, safetensors_bytes(&tensors, &metadata).unwrap()).unwrap();
    std::fs::write(&config, value.to_string()).unwrap();
    let open = Checkpoint::open(dir.path());
    open.and_then(|checkpoint| checkpoint.grid("model.layers.0.mlp.up_proj")).unwrap_err().to_string()
}

#[test]
fn what_does_not_fit_a_mode_is_refused_by_name() {
    const PATH: &str = "model.layers.0.mlp.up_proj";
    for mode in MODES {
        let name = |part: &str| format!("{PATH}.{part}");
        let e = broken(mode, |all, _| {
            let scales = all[&name("scales")].clone();
            all.insert(name("biases"), scales);
        });
        assert!(e.contains(&name("biases")) && e.contains("no biases"), "{e}");
        let e = broken(mode, |all, _| {
            let scales = all.get_mut(&name("scales")).unwrap();
            scales.dtype = StoredDtype::F16;
            scales.data = scales.data.iter().flat_map(|_| [0, 60]).collect();
        });
        assert!(e.contains(PATH), "{e}");
        let e = broken(mode, |all, _| {
            let scales = all.get_mut(&name("scales")).unwrap();
            scales.shape[0] -= 1;
            scales.data.truncate(scales.shape.iter().product());
        });
        assert!(e.contains("codes and scales of 128 rows and no biases"), "{e}");
        let e = broken(mode, |all, _| {
            let scales = all.get_mut(&name("scales")).unwrap();
            scales.shape = vec![scales.shape[0] / 8, scales.shape[1] * 8];
        });
        assert!(e.contains(&name("weight")) && e.contains("scales (U8) in a row"), "{e}");
        let other = if mode == Mode::Mxfp8 { "mxfp4" } else { "mxfp8" };
        let e = broken(mode, |_, config| {
            let bits = if other == "mxfp8" { 8 } else { 4 };
            config["quantization"][PATH] = json!({"group_size": 32, "bits": bits, "mode": other});
        });
        assert!(e.contains(&name("weight")) && e.contains(other), "{e}");
        let e = broken(mode, |_, config| {
            config["quantization"][PATH] = json!({"group_size": 64, "bits": 4, "mode": mode.name()})
        });
        assert!(e.contains("groups of 64") && e.contains(mode.name()), "{e}");
    }
}

#[test]
fn values_on_a_grid_keep_every_byte_and_the_nearest_is_never_worse_than_mlxs() {
    graft_testkit::mlx(|| {
        for mode in MODES {
            let grid = Grid::of(mode);
            let w = normal(&[16, INPUTS], 1);
            let old = round(&w, grid, None).unwrap();
            let on_grid = old.dequantize(Dtype::Float32).unwrap();
            let kept = round_nearest(&on_grid, grid, &[Levels::from(&old)]).unwrap();
            assert_eq!(bytes(&kept), bytes(&old), "{mode:?}");
            let error = |packed: &Packed| {
                sum(&w.subtract(packed.dequantize(Dtype::Float32).unwrap()).unwrap().square().unwrap())
            };
            let fresh = Levels::fresh(&w, grid, Dtype::Bfloat16).unwrap();
            let ours = round_nearest(&w, grid, &[fresh]).unwrap();
            assert!(error(&ours) <= error(&old) * (1.0 + 1e-5), "{mode:?}");
            // In eight affine bits values of four floating ones in groups of 32 lie on the grid as well.
            let raised = grid.raised(8);
            match Levels::finer(&old, 8, Dtype::Bfloat16).unwrap() {
                Some(levels) => {
                    let finer = round_nearest(&on_grid, raised, &[levels]).unwrap();
                    let back = finer.dequantize(Dtype::Float32).unwrap();
                    let values = |x: &Array| Tensor::from_array(x).unwrap().to_f32().unwrap();
                    assert_eq!(values(&back), values(&on_grid));
                }
                None => assert!(mode != Mode::Mxfp4),
            }
        }
    });
}

#[test]
fn errors_are_made_good_by_later_columns() {
    graft_testkit::mlx(|| {
        let mixed = normal(&[1024, 32], 1).matmul(normal(&[32, INPUTS], 2)).unwrap();
        let x = mixed.add(normal(&[1024, INPUTS], 3)).unwrap();
        let gram = x.transpose().unwrap().matmul(&x).unwrap().divide(Array::from_f32(1024.0)).unwrap();
        let hessian = Hessian::new(gram).unwrap();
        for mode in MODES {
            let grid = Grid::of(mode);
            let base = round(&normal(&[48, INPUTS], 7), grid, None).unwrap();
            let w = base.dequantize(Dtype::Float32).unwrap();
            let levels = Levels::from(&base);
            let kept = round_compensated(&w, grid, &levels, &hessian).unwrap();
            assert_eq!(bytes(&kept), bytes(&base), "{mode:?}");
            let step = sum(&base.steps().unwrap()) / base.scales.size() as f32;
            let update = normal(&[48, 4], 8).matmul(normal(&[4, INPUTS], 9)).unwrap();
            let update = update.multiply(Array::from_f32(0.125 * step)).unwrap();
            let target = w.add(&update).unwrap();
            let cost = |packed: &Packed| {
                let error = packed.dequantize(Dtype::Float32).unwrap().subtract(&target).unwrap();
                sum(&hessian.cost(&error).unwrap()) / sum(&hessian.cost(&update).unwrap())
            };
            let ours = cost(&round_compensated(&target, grid, &levels, &hessian).unwrap());
            let plain = cost(&round_nearest(&target, grid, &[levels]).unwrap());
            assert!(ours < 0.6 * plain, "{mode:?}: {ours}, plain {plain}");
        }
    });
}

#[test]
fn what_is_packed_has_mlxs_bytes_and_what_is_made_dense_its_values() {
    for mode in MODES {
        let src = tiny_model(&Tiny { tied: false, ..Tiny::new(Family::Qwen2) });
        let pack = Some(Packing { grid: Grid::of(mode), recipe: None });
        let (once, report) = run(src.path(), &ConvertOptions { pack, ..AS_IS });
        assert_eq!(report.packed, 16);
        let once = once.path().join("out");
        let packed = Checkpoint::open(&once).unwrap();
        let block = json!({"group_size": Grid::of(mode).group_size, "bits": Grid::of(mode).bits, "mode": mode.name()});
        assert_eq!(packed.config()["quantization"], block);
        assert_eq!(packed.config()["quantization_config"], block);
        assert!(packed.names().all(|name| !name.ends_with(".biases")));
        let (dense, report) = run(&once, &ConvertOptions { dequantize: true, ..AS_IS });
        assert_eq!(report.dequantized, 16);
        let dense = dense.path().join("out");
        let dense = Checkpoint::open(&dense).unwrap();
        assert!(!dense.config().contains_key("quantization"));
        let source = Checkpoint::open(src.path()).unwrap();
        graft_testkit::mlx(|| {
            for path in packed.module_shapes().keys() {
                let name = format!("{path}.weight");
                let grid = Grid::of(mode);
                let wanted =
                    quantize(&source.array(&name).unwrap(), grid.group_size, grid.bits, mode).unwrap();
                for (part, wanted) in ["weight", "scales"].into_iter().zip(&wanted) {
                    let stored = packed.read(&format!("{path}.{part}")).unwrap();
                    assert_eq!(stored, Tensor::from_array(wanted).unwrap(), "{mode:?} {path}.{part}");
                }
                let values = packed.weight(path).unwrap().dequantize(Dtype::Float32).unwrap();
                assert_eq!(
                    dense.read(&name).unwrap(),
                    Tensor::from_array(&values).unwrap(),
                    "{mode:?} {path}"
                );
            }
        });
        // As it is, whatever type its floats get.
        let (copied, _) = run(&once, &ConvertOptions { dtype: Some(StoredDtype::F16), ..AS_IS });
        let copied = Checkpoint::open(&copied.path().join("out")).unwrap();
        for name in packed.names().filter(|name| packed.info(name).unwrap().dtype != StoredDtype::F32) {
            assert_eq!(packed.read(name).unwrap(), copied.read(name).unwrap(), "{mode:?} {name}");
        }
    }
}

#[test]
fn llama_cpps_nearest_type_has_eight_bits_and_holds_mxfp4_exactly() {
    use graft_quant::gguf::{ExportParts, Field, Gguf, Placed, export_gguf};
    for mode in MODES {
        let src = tiny_model(&tiny(mode));
        let checkpoint = Checkpoint::open(src.path()).unwrap();
        let name = "model.layers.0.mlp.up_proj.weight";
        let parts = ExportParts {
            fields: vec![("general.architecture".into(), Field::Str("any".into()))],
            tensors: vec![Placed { source: name.into(), name: name.into(), rows: None }],
            extra: Vec::new(),
        };
        let file = src.path().join("out.gguf");
        let report = graft_testkit::mlx(|| {
            export_gguf(&checkpoint, &parts, &file, None, &false.into(), &mut |_| {}).unwrap()
        });
        let matrix = &report.matrices[0];
        assert_eq!((matrix.to, matrix.from.as_str()), (Kind::Q8_0, Grid::of(mode).to_string().as_str()));
        assert_eq!(matrix.relative_error == 0.0, mode == Mode::Mxfp4, "{mode:?}: {}", matrix.relative_error);
        assert!(matrix.relative_error < 0.01, "{mode:?}: {}", matrix.relative_error);
        assert_eq!(Gguf::open(&file).unwrap().tensors[name].kind, Kind::Q8_0);
    }
}
