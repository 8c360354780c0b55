//! A base and an adapter to a model directory, one weight at a time.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use graft_adapters::{AdapterSet, Fingerprint, Kind};
use graft_ops::Array;
use graft_quant::convert::{companion_files, is_float};
use graft_quant::{Checkpoint, DirWriter, Quantization, Tensor, Weight};
use serde_json::Value;

use crate::layer::{Stored, Update, dense, fuse_weight};
use crate::{Error, FuseReport, LayerReport, Policy, REPORT_FILE, Result, Totals};

/// How to fuse.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FuseOptions {
    /// What packed weights with an adapter become.
    pub policy: Policy,
    /// Make the whole model dense, untouched weights too, as mlx_lm's `--dequantize` does; the policy is then `dense`.
    pub dequantize: bool,
    /// Replace the model directory at the target, if there is one.
    pub overwrite: bool,
    /// What the report calls the base.
    pub base_name: String,
    /// What the report calls the adapter.
    pub adapter_name: String,
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
    /// Something that the user should know.
    Warning(String),
}

/// Above this share of the update the loss is worth a warning.
const LOSS: f64 = 0.1;

/// Fuses `adapter` into the base at `model` and writes the result to `out`, whole or not at all.
///
/// `W' = W + s (A B)^T`, for DoRA with rows scaled to m, in f32 and rounded once. Biases are as before; a `full` adapter's
/// weights take the place of the base's. The report is written beside the weights too. `stop` is looked at between two
/// tensors.
///
/// # Errors
/// When the adapter was trained on another base or does not fit, when the base cannot be read, when the target is the base
/// or must not be replaced, or when `stop` was set.
pub fn fuse(
    model: &Path,
    adapter: &AdapterSet,
    out: &Path,
    options: &FuseOptions,
    stop: &AtomicBool,
    on_event: &mut dyn FnMut(Event),
) -> Result<FuseReport> {
    let checkpoint = Checkpoint::open(model)?;
    if let (Ok(target), Ok(base)) = (out.canonicalize(), model.canonicalize())
        && target == base
    {
        return Err(Error::IntoBase { path: out.to_path_buf() });
    }
    check(&checkpoint, adapter, on_event)?;
    let mut job = Job {
        checkpoint: &checkpoint,
        adapter,
        writer: DirWriter::create(out, options.overwrite)?,
        quantization: checkpoint.quantization().clone(),
        policy: if options.dequantize { Policy::Dense } else { options.policy },
        dequantize: options.dequantize,
        layers: Vec::new(),
        totals: Totals::default(),
        done: BTreeSet::new(),
        on_event,
    };
    job.run(stop)?;
    job.finish(options)
}

/// Refuses an adapter of another base, with everything that does not fit.
///
/// # Errors
/// [`Error::Foreign`], [`Error::Mismatch`] or the adapter's own list.
pub fn check(checkpoint: &Checkpoint, adapter: &AdapterSet, on_event: &mut dyn FnMut(Event)) -> Result<()> {
    let model = checkpoint.dir();
    if let Some(trained) = Fingerprint::read(&adapter.config) {
        let base = Fingerprint::of(checkpoint, &model.display().to_string());
        if let Some(why) = trained.foreign_to(&base) {
            return Err(Error::Foreign { model: model.to_path_buf(), why });
        }
        if trained.precision != base.precision {
            on_event(Event::Warning(format!(
                "the adapter was trained on {} in another precision ({}) than {}: the sum differs from what was trained",
                trained.lineage,
                trained.precision,
                model.display()
            )));
        }
    }
    let mut shapes = checkpoint.module_shapes();
    if checkpoint.config().get("tie_word_embeddings").and_then(Value::as_bool) == Some(true) {
        // A tied model may carry a copy of its embedding as head, but nobody reads it.
        shapes.remove("lm_head");
    }
    adapter.check(model, |path| {
        shapes.get(path).map(|&(rows, columns)| ((rows as i32, columns as i32), kind_of(path)))
    })?;
    let mut problems = Vec::new();
    for (name, tensor) in &adapter.weights {
        let matrix = name.strip_suffix(".weight").and_then(|path| shapes.get(path)).map(|&(a, b)| vec![a, b]);
        let packed =
            name.rsplit_once('.').is_some_and(|(path, part)| part != "bias" && shapes.contains_key(path));
        let other = || checkpoint.info(name).filter(|info| is_float(info.dtype) && !packed);
        match matrix.or_else(|| other().map(|info| info.shape.clone())) {
            None => problems.push(format!("{name}: the base has no such weight")),
            Some(shape) if shape != tensor.shape => problems
                .push(format!("{name}: expected shape {shape:?} as in the base, found {:?}", tensor.shape)),
            Some(_) => {}
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(Error::Mismatch { model: model.to_path_buf(), problems }) }
}

/// Which of the two orientations a module's adapter has; the base's names decide, as no network is built here.
pub(crate) fn kind_of(path: &str) -> Kind {
    if path.ends_with("embed_tokens") { Kind::Embedding } else { Kind::Linear }
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
    totals: Totals,
    /// Parts of packed weights that were written, or left away, together with their codes.
    done: BTreeSet<String>,
    on_event: &'a mut dyn FnMut(Event),
}

impl<'a> Job<'a> {
    fn run(&mut self, stop: &AtomicBool) -> Result<()> {
        let checkpoint = self.checkpoint;
        // Weights first: whatever comes with one is then known to be dealt with.
        let (weights, others): (Vec<&String>, Vec<&String>) =
            checkpoint.names().partition(|name| name.ends_with(".weight"));
        let total = weights.len() + others.len();
        for (done, name) in weights.into_iter().chain(others).enumerate() {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::Stopped);
            }
            self.totals.base_bytes +=
                checkpoint.info(name).map_or(0, |info| info.range.end - info.range.start);
            if !self.done.remove(name) {
                self.tensor(name)?;
                // Buffers of the sizes just used are of no use to the next tensor.
                mlx_rs::memory::clear_cache()?;
            }
            (self.on_event)(Event::Tensor { done: done + 1, total });
        }
        Ok(())
    }

    /// One tensor of the base, with its scales and biases if it is a weight that changes.
    fn tensor(&mut self, name: &str) -> Result<()> {
        let path = name.strip_suffix(".weight").unwrap_or(name);
        let update = self.update(name, path)?;
        if update.is_none() && !self.dequantize {
            return self.copy(name);
        }
        let weight = match self.checkpoint.grid(path)? {
            None if update.is_none() => return self.copy(name),
            None => Weight::Dense(matrix(&self.checkpoint.array(name)?)?),
            Some(_) => self.checkpoint.weight(path)?,
        };
        let mut stored = None;
        if let Some(update) = update {
            let fused = fuse_weight(path, &weight, &update, self.policy)?;
            self.layers.push(fused.report);
            stored = fused.stored;
        }
        match (stored, weight) {
            (Some(stored), _) => self.write(name, path, stored),
            (None, Weight::Packed(packed)) if self.dequantize => self.write(name, path, dense(&packed)?),
            // Its scales and biases, if it has any, are copied when their turn comes.
            (None, _) => self.copy(name),
        }
    }

    /// What the adapter does to a tensor.
    fn update(&self, name: &str, path: &str) -> Result<Option<Update<'a>>> {
        if let Some(adapter) = self.adapter.adapters.get(path).filter(|_| name != path) {
            return Ok(Some(Update::LowRank(adapter, kind_of(path))));
        }
        let whole = self.adapter.weights.get(name);
        whole.map(|tensor| Ok(Update::Whole(matrix(&tensor.to_array()?)?))).transpose()
    }

    fn copy(&mut self, name: &str) -> Result<()> {
        self.totals.copied_tensors += 1;
        let tensor = self.checkpoint.read(name)?;
        self.add(name, &tensor)
    }

    /// A weight in its new form, and the form's entry in the config.
    fn write(&mut self, name: &str, path: &str, mut stored: Stored) -> Result<()> {
        let parts = [name.to_owned(), format!("{path}.scales"), format!("{path}.biases")];
        if self.checkpoint.grid(path)?.is_none() {
            if let (Some(tensor), Some(info)) = (stored.tensors.first_mut(), self.checkpoint.info(name)) {
                tensor.shape.clone_from(&info.shape);
            }
        } else {
            self.done.extend(parts[1..].iter().cloned());
            if self.quantization.grid_of(path) != stored.grid {
                self.quantization.paths.insert(path.to_owned(), stored.grid);
            }
        }
        parts.iter().zip(&stored.tensors).try_for_each(|(name, tensor)| self.add(name, tensor))
    }

    fn add(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        self.totals.tensors += 1;
        self.totals.bytes += tensor.data.len() as u64;
        Ok(self.writer.add(name, tensor)?)
    }

    /// Config, other files and the report; then the directory takes its place.
    fn finish(mut self, options: &FuseOptions) -> Result<FuseReport> {
        let model = self.checkpoint.dir();
        self.layers.sort_by(|a, b| a.path.cmp(&b.path));
        self.totals.sum_up(&self.layers);
        self.warn();
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
            version: env!("CARGO_PKG_VERSION").into(),
            base: options.base_name.clone(),
            adapter: options.adapter_name.clone(),
            fine_tune_type: self.adapter.config.fine_tune_type.name().into(),
            policy: self.policy.name().into(),
            dequantize: self.dequantize,
            totals: self.totals,
            layers: self.layers,
        };
        let json = serde_json::to_vec_pretty(&report).map_err(Error::Report)?;
        self.writer.write_file(REPORT_FILE, &json)?;
        self.writer.finish()?;
        Ok(report)
    }

    /// Says so when storing the sum cost a good part of the update.
    fn warn(&mut self) {
        let totals = &self.totals;
        let percent = 100.0 * totals.relative_error;
        let repacked =
            |layer: &&LayerReport| layer.changed() && layer.to == layer.from && layer.to.contains("bits");
        let repacked = self.layers.iter().filter(repacked).count();
        if self.policy == Policy::Same && repacked > 0 {
            (self.on_event)(Event::Warning(format!(
                "{repacked} packed weights were rounded to the bits they had, which may lose the adapter: the error is \
                 {percent:.1} % of the update; --policy raise stores them at 8 bits, --policy dense as floats"
            )));
        } else if totals.relative_error > LOSS {
            (self.on_event)(Event::Warning(format!(
                "storing the fused weights cost {percent:.1} % of the update (most in {}), which is small beside the steps \
                 in which they are stored: serve the adapter on its base instead, or fuse it into a base of finer steps",
                totals.worst.as_deref().unwrap_or("none")
            )));
        }
    }
}

/// A tensor of any shape as a matrix of its last dimension.
fn matrix(array: &Array) -> Result<Array> {
    Ok(array.reshape(&[-1, array.shape().last().copied().unwrap_or(1)])?)
}
