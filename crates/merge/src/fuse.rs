//! A base and an adapter to a model directory, one weight at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use graft_adapters::{AdapterSet, Fingerprint, Kind, Target};
use graft_ops::Dtype;
use graft_quant::convert::companion_files;
use graft_quant::{Checkpoint, DirWriter, Packed, Quantization, StoredDtype, Tensor, Weight};

use crate::layer::{NOT_STORED, Update, fuse_weight};
use crate::{Error, FuseReport, LayerReport, Policy, REPORT_FILE, Result, Totals};

/// How to fuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FuseOptions {
    /// What packed weights with an adapter become.
    pub policy: Policy,
    /// Make the whole model dense, untouched weights too, as mlx_lm's `--dequantize` does; the policy is then `dense`.
    pub dequantize: bool,
    /// Replace the model directory at the target, if there is one.
    pub overwrite: bool,
}

/// What happens meanwhile.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A tensor of the base was dealt with.
    Tensor {
        /// Tensors done.
        done: usize,
        /// Tensors of the base.
        total: usize,
    },
    /// A weight was fused.
    Layer(LayerReport),
    /// Something that the user should know.
    Warning(String),
}

/// Above this share of the update the loss is worth a warning.
const LOSS: f64 = 0.1;

/// Fuses `adapter` into the base at `model` and writes the result to `out`, whole or not at all.
///
/// `W' = W + s (A B)^T`, for DoRA with rows scaled to m, in f32 and rounded once. Biases are as before; a `full` adapter's
/// weights take the place of the base's. The report is written beside the weights too.
///
/// # Errors
/// When the adapter was trained on another base or does not fit, when the base cannot be read, or when the target exists.
pub fn fuse(
    model: &Path,
    adapter: &AdapterSet,
    out: &Path,
    options: FuseOptions,
    on_event: &mut dyn FnMut(Event),
) -> Result<FuseReport> {
    let checkpoint = Checkpoint::open(model)?;
    check(&checkpoint, adapter)?;
    let policy = if options.dequantize { Policy::Dense } else { options.policy };
    let mut job = Job {
        checkpoint: &checkpoint,
        adapter,
        writer: DirWriter::create(out, options.overwrite)?,
        quantization: checkpoint.quantization().clone(),
        policy,
        dequantize: options.dequantize,
        layers: Vec::new(),
        copied: 0,
        tensors: 0,
        bytes: 0,
        done: BTreeSet::new(),
        on_event,
    };
    job.run()?;
    job.finish(model)
}

/// Refuses an adapter of another base, with everything that does not fit.
fn check(checkpoint: &Checkpoint, adapter: &AdapterSet) -> Result<()> {
    let model = checkpoint.dir();
    if let Some(trained) = Fingerprint::read(&adapter.config) {
        let base = Fingerprint::of(checkpoint, &model.display().to_string());
        if let Some(why) = trained.foreign_to(&base) {
            return Err(Error::Foreign { model: model.to_path_buf(), why });
        }
    }
    let shapes = checkpoint.module_shapes();
    // Stand-ins of the right shape: lazy, so that the check reads no weight.
    let mut targets = BTreeMap::new();
    for path in adapter.adapters.keys() {
        if let Some(&(rows, columns)) = shapes.get(path) {
            let weight = Weight::Dense(mlx_rs::ops::zeros::<f32>(&[rows as i32, columns as i32])?);
            targets.insert(path.as_str(), weight);
        }
    }
    adapter.check(model, |path| targets.get(path).map(|weight| Target { weight, kind: kind_of(path) }))?;
    let mut problems = Vec::new();
    for (name, tensor) in &adapter.weights {
        let Some(info) = checkpoint.info(name) else {
            problems.push(format!("{name}: the base has no such tensor"));
            continue;
        };
        let logical =
            name.strip_suffix(".weight").and_then(|path| shapes.get(path)).map(|&(a, b)| vec![a, b]);
        let verbatim = info.shape == tensor.shape && is_float(info.dtype) == is_float(tensor.dtype);
        if !verbatim && !(is_float(tensor.dtype) && logical.as_ref() == Some(&tensor.shape)) {
            problems.push(format!(
                "{name}: the adapter has {:?} of {:?}, the base {:?} of {:?}",
                tensor.shape,
                tensor.dtype,
                logical.as_ref().unwrap_or(&info.shape),
                info.dtype
            ));
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(Error::Mismatch { model: model.to_path_buf(), problems }) }
}

/// Which of the two orientations a module's adapter has; the base's names decide, as no network is built here.
fn kind_of(path: &str) -> Kind {
    if path.ends_with("embed_tokens") { Kind::Embedding } else { Kind::Linear }
}

fn is_float(dtype: StoredDtype) -> bool {
    matches!(dtype, StoredDtype::F32 | StoredDtype::F16 | StoredDtype::BF16 | StoredDtype::F64)
}

/// A fuse under way.
struct Job<'a> {
    checkpoint: &'a Checkpoint,
    adapter: &'a AdapterSet,
    writer: DirWriter,
    quantization: Quantization,
    policy: Policy,
    dequantize: bool,
    layers: Vec<LayerReport>,
    copied: usize,
    tensors: usize,
    bytes: u64,
    /// Parts of packed weights that were written, or left away, together with their codes.
    done: BTreeSet<String>,
    on_event: &'a mut dyn FnMut(Event),
}

impl Job<'_> {
    fn run(&mut self) -> Result<()> {
        let checkpoint = self.checkpoint;
        let names: Vec<&String> = checkpoint.names().collect();
        // Weights first: whatever comes with one is then known to be dealt with.
        let (weights, others): (Vec<&String>, Vec<&String>) =
            names.into_iter().partition(|name| name.ends_with(".weight"));
        let total = weights.len() + others.len();
        for (done, name) in weights.into_iter().chain(others).enumerate() {
            if !self.done.remove(name) {
                self.tensor(name)?;
                mlx_rs::memory::clear_cache()?;
            }
            (self.on_event)(Event::Tensor { done: done + 1, total });
        }
        Ok(())
    }

    /// One tensor of the base, with its scales and biases if it is a weight that changes.
    fn tensor(&mut self, name: &str) -> Result<()> {
        let path = name.strip_suffix(".weight");
        let whole = self.adapter.weights.get(name);
        if let Some(path) = path {
            let low_rank = self.adapter.adapters.get(path);
            if let Some(adapter) = low_rank {
                return self.weight(path, &Update::LowRank(adapter, kind_of(path)));
            }
            if let Some(tensor) = whole.filter(|tensor| is_float(tensor.dtype) && tensor.shape.len() == 2) {
                return self.weight(path, &Update::Whole(tensor.to_array()?.as_dtype(Dtype::Float32)?));
            }
            if self.dequantize && self.checkpoint.grid(path)?.is_some() {
                let Weight::Packed(packed) = self.checkpoint.weight(path)? else { return self.copy(name) };
                let dense = packed.dequantize(packed.scales.dtype())?;
                return self.write(path, &Weight::Dense(dense));
            }
        }
        match whole {
            Some(tensor) => {
                let own = self.checkpoint.info(name).map_or(tensor.dtype, |info| info.dtype);
                let array = tensor.to_array()?;
                let like = match own {
                    StoredDtype::F32 => array.as_dtype(Dtype::Float32)?,
                    StoredDtype::F16 => array.as_dtype(Dtype::Float16)?,
                    StoredDtype::BF16 => array.as_dtype(Dtype::Bfloat16)?,
                    _ => array,
                };
                self.add(name, &Tensor::from_array(&like)?)
            }
            None => self.copy(name),
        }
    }

    fn copy(&mut self, name: &str) -> Result<()> {
        self.copied += 1;
        let tensor = self.checkpoint.read(name)?;
        self.add(name, &tensor)
    }

    /// A weight that the adapter names.
    fn weight(&mut self, path: &str, update: &Update) -> Result<()> {
        let weight = self.checkpoint.weight(path)?;
        let fused = fuse_weight(path, &weight, update, self.policy)?;
        (self.on_event)(Event::Layer(fused.report.clone()));
        self.layers.push(fused.report);
        match (fused.stored, &weight) {
            (Some(stored), _) => self.write(path, &stored),
            (None, Weight::Packed(packed)) if self.dequantize => {
                let dense = packed.dequantize(packed.scales.dtype())?;
                self.write(path, &Weight::Dense(dense))
            }
            // Its scales and biases, if it has any, are copied when their turn comes.
            (None, _) => self.copy(&format!("{path}.weight")),
        }
    }

    /// A weight in its new form, and the form's entry in the config.
    fn write(&mut self, path: &str, weight: &Weight) -> Result<()> {
        let part = |part: &str| format!("{path}.{part}");
        let was_packed = self.checkpoint.grid(path)?.is_some();
        if was_packed {
            self.done.extend([part("scales"), part("biases")]);
        }
        match weight {
            Weight::Dense(w) => {
                if was_packed {
                    self.quantization.paths.insert(path.to_owned(), None);
                }
                self.add(&part("weight"), &Tensor::from_array(w)?)
            }
            Weight::Packed(Packed { codes, scales, biases, grid }) => {
                if self.quantization.grid_of(path) != Some(*grid) {
                    self.quantization.paths.insert(path.to_owned(), Some(*grid));
                }
                self.add(&part("weight"), &Tensor::from_array(codes)?)?;
                self.add(&part("scales"), &Tensor::from_array(scales)?)?;
                self.add(&part("biases"), &Tensor::from_array(biases)?)
            }
            Weight::Arranged(_) => Err(graft_quant::Error::Request(format!("{path}: {NOT_STORED}")).into()),
        }
    }

    fn add(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        self.tensors += 1;
        self.bytes += tensor.data.len() as u64;
        Ok(self.writer.add(name, tensor)?)
    }

    /// Config, other files and the report; then the directory takes its place.
    fn finish(mut self, model: &Path) -> Result<FuseReport> {
        self.layers.sort_by(|a, b| a.path.cmp(&b.path));
        let totals = Totals::of(&self.layers, self.copied, self.tensors, self.bytes);
        self.warn(&totals);
        if self.dequantize {
            self.quantization = Quantization::default();
        }
        if self.quantization == *self.checkpoint.quantization() {
            self.writer.copy_file(&model.join("config.json"), "config.json")?;
        } else {
            let mut config = self.checkpoint.config().clone();
            self.quantization.to_config(&mut config);
            self.writer.write_config(&config)?;
        }
        for file in companion_files(model)? {
            let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            self.writer.copy_file(&file, name)?;
        }
        let report = FuseReport {
            schema: 1,
            kind: "fuse".into(),
            base: model.display().to_string(),
            adapter: self.adapter.config.fine_tune_type.name().into(),
            policy: self.policy.name().into(),
            dequantize: self.dequantize,
            totals,
            layers: self.layers,
        };
        let json = serde_json::to_vec_pretty(&report).map_err(Error::Report)?;
        self.writer.write_file(REPORT_FILE, &json)?;
        self.writer.finish()?;
        Ok(report)
    }

    /// Says so when storing the sum cost a good part of the update.
    fn warn(&mut self, totals: &Totals) {
        let packed = |layer: &LayerReport| layer.changed() && layer.to.contains("bits");
        let repacked = self.layers.iter().filter(|layer| packed(layer) && layer.to == layer.from).count();
        let percent = 100.0 * totals.relative_error;
        if self.policy == Policy::Same && repacked > 0 {
            (self.on_event)(Event::Warning(format!(
                "{repacked} packed layers were rounded to the bits they had, at an error of {percent:.1} % of the \
                 update; --policy raise stores them at 8 bits, --policy dense as floats"
            )));
        } else if totals.relative_error > LOSS {
            (self.on_event)(Event::Warning(format!(
                "storing the fused weights cost {percent:.1} % of the update (most in {}): it is small beside the \
                 steps of the weights; serve the adapter on its base instead, or train it further",
                totals.worst.as_deref().unwrap_or("none")
            )));
        }
    }
}
