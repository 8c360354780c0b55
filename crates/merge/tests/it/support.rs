//! Models, adapters and fuses that several tests share.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use graft_adapters::{AdapterSet, Route};
use graft_merge::{Event, FuseOptions, FuseReport, Policy, Result, Watch, fuse};
use graft_model::Model;
use graft_ops::{Array, Dtype, Form, Rows};
use graft_quant::{StoredDtype, Tensor, read_safetensors, safetensors_bytes};
use graft_testkit::{Family, Tiny, mlx, wanted, wanted_form_is_mlx};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Tensors by name.
pub(crate) type Tensors = BTreeMap<String, Tensor>;

/// Runs on the array thread, in the form that the environment asks for.
pub(crate) fn arrays<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    mlx(|| {
        if wanted_form_is_mlx() {
            graft_ops::set_form(Form::Mlx);
        }
        if let Some(level) = wanted("GRAFT_CPU") {
            graft_ops::set_cpu_level(level);
        }
        body()
    })
}

/// A fuse that went well.
pub(crate) struct Fused {
    pub(crate) dir: PathBuf,
    pub(crate) report: FuseReport,
    pub(crate) warnings: Vec<String>,
    _parent: TempDir,
}

pub(crate) fn options(policy: Policy) -> FuseOptions {
    FuseOptions {
        policy,
        dequantize: false,
        overwrite: false,
        force: false,
        other_precision: false,
        base_name: "the base".into(),
        adapter_name: "the adapter".into(),
        adapter_dir: PathBuf::new(),
        observed: serde_json::Value::Null,
    }
}

/// Fuses and puts the result in its place.
pub(crate) fn fuse_into(
    base: &Path,
    set: &AdapterSet,
    out: &Path,
    options: &FuseOptions,
    stop: &AtomicBool,
    on_event: &mut dyn FnMut(Event),
) -> Result<FuseReport> {
    fuse(base, set, out, options, Watch { stop, on_event, inputs: None })?.place()
}

/// Fuses into a directory of its own; on the array thread.
pub(crate) fn fused_with(base: &Path, set: &AdapterSet, options: &FuseOptions) -> Result<Fused> {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("fused");
    let mut warnings = Vec::new();
    let report = fuse_into(base, set, &dir, options, &AtomicBool::new(false), &mut |event| {
        if let Event::Warning(text) = event {
            warnings.push(text);
        }
    })?;
    Ok(Fused { dir, report, warnings, _parent: parent })
}

pub(crate) fn fused(base: &Path, adapter: &Path, policy: Policy) -> Fused {
    fused_with(base, &AdapterSet::load(adapter).unwrap(), &options(policy)).unwrap()
}

/// All tensors of a model directory, whatever files they are in.
pub(crate) fn tensors(dir: &Path) -> Tensors {
    let mut all = Tensors::new();
    for name in names(dir) {
        if name.starts_with("model") && name.ends_with(".safetensors") {
            all.extend(read_safetensors(&dir.join(name)).unwrap().0);
        }
    }
    all
}

/// What stands in a directory.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

pub(crate) fn write_tensors(file: &Path, tensors: &Tensors) {
    std::fs::write(file, safetensors_bytes(tensors, &BTreeMap::new()).unwrap()).unwrap();
}

pub(crate) fn read_json(file: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

pub(crate) fn floats(values: &[f32], shape: &[usize]) -> Tensor {
    let data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    Tensor { dtype: StoredDtype::F32, shape: shape.to_vec(), data }
}

/// Values in ±1 that no formula here could produce by itself.
pub(crate) fn wave(shape: &[usize], seed: f32) -> Tensor {
    let n: usize = shape.iter().product();
    floats(&(0..n).map(|i| ((i as f32 + 1.0) * (seed + 0.37)).sin()).collect::<Vec<_>>(), shape)
}

/// An adapter directory in mlx-lm's form, s = 0.5.
pub(crate) fn adapter_dir(kind: &str, tensors: &Tensors) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({
        "fine_tune_type": kind, "num_layers": -1,
        "lora_parameters": {"rank": 4, "scale": 0.5, "dropout": 0.0},
    });
    std::fs::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
    write_tensors(&dir.path().join("adapters.safetensors"), tensors);
    dir
}

/// The families, dense and packed at several widths, tied and not.
pub(crate) fn every_model() -> impl Iterator<Item = Tiny> {
    let affine = Family::ALL.into_iter().flat_map(|family| {
        let forms = [(None, true), (None, false), (Some((4, 32)), true), (Some((3, 64)), false)];
        let wide = [(Some((2, 32)), true), (Some((6, 32)), false), (Some((8, 64)), true)];
        let wide = wide.into_iter().filter(move |_| family == Family::Llama);
        forms.into_iter().chain(wide).map(move |(packed, tied)| Tiny { packed, tied, ..Tiny::new(family) })
    });
    affine.chain(["mxfp4", "nvfp4", "mxfp8"].map(|mode| Tiny::new(Family::Llama).in_mode(mode)))
}

pub(crate) fn load(dir: &Path) -> Model {
    Model::load(dir, Dtype::Float32).unwrap()
}

/// Logits (L, V) of a text that is always the same.
pub(crate) fn logits(model: &Model, route: &Route) -> Array {
    let ids: Vec<i32> = (0..24).map(|i| (i * 37 + i * i * 7) % 250).collect();
    let tokens = Array::from_slice(&ids, &[24]);
    let hidden = model.hidden(&tokens, &Rows::new(vec![24]), None, route).unwrap();
    let logits = model.logits(&hidden, route).unwrap();
    logits.eval().unwrap();
    logits
}

/// Logits of the base with the adapter beside it.
pub(crate) fn unfused_logits(base: &Path, adapter: &Path) -> Array {
    let (model, set) = (load(base), AdapterSet::load(adapter).unwrap());
    let table = set.table(adapter, |path| model.target(path)).unwrap();
    logits(&model, &Route::Table(&table))
}

/// The greatest difference of two arrays' elements.
pub(crate) fn gap(a: &Array, b: &Array) -> f64 {
    assert_eq!(a.shape(), b.shape());
    let values = |x: &Array| Tensor::from_array(x).unwrap().to_f32().unwrap();
    values(a).iter().zip(values(b)).map(|(x, y)| f64::from((x - y).abs())).fold(0.0, f64::max)
}
