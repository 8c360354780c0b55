//! A base and an adapter to a model directory, one weight at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};

use graft_adapters::{
    ADAPTER_FILE, Adapter, AdapterSet, CONFIG_FILE, FineTuneType, Fingerprint, Kind, Origin, Provenance,
};
use graft_ops::{Array, Dtype};
use graft_quant::convert::{companion_files, is_float};
use graft_quant::recipe::layer_of;
use graft_quant::{Checkpoint, DirWriter, Hessian, Made, Quantization, Tensor, Weight};
use serde_json::{Map, Value, json};

use crate::layer::{Stored, Update, dense, fuse_weight};
use crate::output::described;
use crate::{Error, FuseReport, LayerReport, Plan, Policy, REPORT_FILE, Result, Totals};

/// How to fuse.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FuseOptions {
    /// What packed weights with an adapter become.
    pub policy: Policy,
    /// Make the whole model dense, untouched weights too, as mlx_lm's `--dequantize` does; the policy is then `dense`.
    pub dequantize: bool,
    /// Replace the model directory at the target, if there is one.
    pub overwrite: bool,
    /// Fuse the adapter of another model of the same shapes, too, with a warning.
    pub force: bool,
    /// The base is meant to be another precision of the one that the adapter was trained on: no warning then.
    pub other_precision: bool,
    /// What the report calls the base.
    pub base_name: String,
    /// What the report calls the adapter.
    pub adapter_name: String,
    /// Where the adapter's files are.
    pub adapter_dir: PathBuf,
    /// By which rows `same` rounds, for the provenance; null where it does not.
    pub observed: Value,
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

/// The moments of a module's inputs, asked for in the order of the blocks; none where they are not known.
pub type Inputs<'a> = dyn FnMut(&str) -> std::result::Result<Option<Rc<Hessian>>, Box<dyn std::error::Error + Send + Sync>>
    + 'a;

/// What a fuse is told and asked while it runs.
pub struct Watch<'a> {
    /// Looked at between two tensors.
    pub stop: &'a AtomicBool,
    /// Told of what happens.
    pub on_event: &'a mut dyn FnMut(Event),
    /// Asked by `same`.
    pub inputs: Option<&'a mut Inputs<'a>>,
}

/// Fuses `adapter` into the base at `model` and writes the result beside `out`, complete, for [`Sibling::place`].
///
/// `W' = W + s (A B)^T`, for DoRA with rows scaled to m, in f32 and rounded once. Biases are as before; a `full` adapter's
/// weights take the place of the base's. Dropped, the sibling leaves nothing behind.
///
/// # Errors
/// When the adapter was trained on another base or does not fit, when the base cannot be read, when the target is the base
/// or must not be replaced, when there is no room, or when the fuse was stopped.
pub fn fuse(
    model: &Path,
    adapter: &AdapterSet,
    out: &Path,
    options: &FuseOptions,
    watch: Watch,
) -> Result<Sibling> {
    let checkpoint = Checkpoint::open(model)?;
    for (input, what) in [(model, "base"), (&options.adapter_dir, "adapter")] {
        if out.canonicalize().is_ok_and(|target| input.canonicalize().is_ok_and(|input| input == target)) {
            return Err(Error::IntoInput { path: out.to_path_buf(), what });
        }
    }
    let policy = if options.dequantize { Policy::Dense } else { options.policy };
    if policy == Policy::Fold && adapter.config.fine_tune_type != FineTuneType::Dora {
        let kind = adapter.config.fine_tune_type.name().to_owned();
        return Err(Error::NothingToFold { kind, advice: "choose raise, same or dense".into() });
    }
    if policy == Policy::Fold {
        for path in adapter.adapters.keys() {
            if let Some(grid) = checkpoint.grid(path)?.filter(|grid| grid.is_float()) {
                return Err(Error::FloatScales { path: path.clone(), mode: grid.mode.name().into() });
            }
        }
    }
    let allowed = Allowed { other_model: options.force, other_precision: options.other_precision };
    check(&checkpoint, adapter, allowed, watch.on_event)?;
    let plan = Plan::of_fused(&checkpoint, adapter, policy, options.dequantize)?;
    let mut writer = DirWriter::create(out, options.overwrite)?.room(header_room(&checkpoint));
    let mut job = Job {
        checkpoint: &checkpoint,
        adapter,
        quantization: checkpoint.quantization().clone(),
        policy,
        floats: checkpoint.float_dtype(),
        dequantize: options.dequantize,
        layers: Vec::new(),
        rest: BTreeMap::new(),
        totals: Totals::default(),
        done: BTreeSet::new(),
        watch,
    };
    // Writing waits for the kernel and the hashes take a core for as long as the disk gives; the sums take what is left. A
    // tensor is handed over when the one before it is written.
    let (ran, written, base) = std::thread::scope(|scope| {
        let (ready, finished) = sync_channel::<(String, Tensor)>(0);
        let written = scope.spawn(move || -> Result<DirWriter> {
            for (name, tensor) in finished {
                writer.add(&name, &tensor)?;
            }
            Ok(writer)
        });
        let base = scope.spawn(|| Origin::of_model(&checkpoint, &options.base_name));
        let ran = job.run(&ready);
        drop(ready);
        (ran, written.join(), base.join())
    });
    // Where writing ended early, that is why the sums did.
    let writer = written.unwrap_or_else(|panic| resume_unwind(panic));
    let writer = writer.map_err(|error| error.with_size(plan.bytes))?;
    ran?;
    let base = base.unwrap_or_else(|panic| resume_unwind(panic))?;
    let sources = (base, Origin::of_adapter(&options.adapter_dir, &options.adapter_name)?);
    let bytes = plan.bytes;
    job.complete(writer, (out, options), plan, sources).map_err(|error| error.with_size(bytes))
}

/// Where tensors go that are ready to be written.
type Ready = SyncSender<(String, Tensor)>;

/// Bytes that will do for the header of a file with all tensors of a checkpoint, and for what is said of their making.
fn header_room(checkpoint: &Checkpoint) -> usize {
    /// Type, shape and place of a tensor, in JSON.
    const ENTRY: usize = 112;
    checkpoint.names().map(|name| name.len() + ENTRY).sum::<usize>() + (16 << 10)
}

/// What an adapter may have been trained on besides the base at hand.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Allowed {
    /// Another model of the same shapes; that is warned of then, and refused otherwise.
    pub other_model: bool,
    /// Another precision, which is warned of otherwise.
    pub other_precision: bool,
}

/// Refuses an adapter of another base, with everything that does not fit.
///
/// # Errors
/// [`Error::Foreign`], [`Error::Mismatch`] or the adapter's own list.
pub fn check(
    checkpoint: &Checkpoint,
    adapter: &AdapterSet,
    allowed: Allowed,
    on_event: &mut dyn FnMut(Event),
) -> Result<()> {
    let model = checkpoint.dir();
    if let Some(trained) = Fingerprint::read(&adapter.config) {
        let base = Fingerprint::of(checkpoint, &model.display().to_string());
        if let Some(why) = trained.foreign_to(&base) {
            return Err(Error::Foreign { model: model.to_path_buf(), why });
        }
        match trained.other_model_than(&base) {
            Some(why) if allowed.other_model => {
                let model = model.display();
                on_event(Event::Warning(format!("the adapter does not belong to {model}: {why}")));
            }
            Some(why) => {
                let why = format!("{why}; give the model it was trained on, or --force to take this one");
                return Err(Error::Foreign { model: model.to_path_buf(), why });
            }
            None => {}
        }
        // Adapters of before say nothing where config.json said nothing.
        let other = trained.precision != base.precision && !trained.precision.is_empty();
        if other && !allowed.other_precision {
            on_event(Event::Warning(format!(
                "the adapter was trained on {} in another precision ({}) than {}: the sum differs from what was trained",
                trained.lineage,
                trained.precision,
                model.display()
            )));
        }
    }
    let mut shapes = checkpoint.module_shapes();
    let tied = checkpoint.config().get("tie_word_embeddings").and_then(Value::as_bool) == Some(true);
    if tied {
        // A tied model may carry a copy of its embedding as head, but nobody reads it.
        shapes.remove("lm_head");
    }
    adapter.check(model, |path| {
        shapes.get(path).map(|&(rows, columns)| ((rows as i32, columns as i32), kind_of(path)))
    })?;
    let mut problems = Vec::new();
    for (name, tensor) in &adapter.weights {
        if tied && name.starts_with("lm_head.") {
            problems.push(format!(
                "{name}: the head of this base is its embedding, and nobody reads a weight of its own"
            ));
            continue;
        }
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
struct Job<'a, 'w> {
    checkpoint: &'a Checkpoint,
    adapter: &'a AdapterSet,
    quantization: Quantization,
    policy: Policy,
    /// The type of floats that are not packed.
    floats: Dtype,
    dequantize: bool,
    layers: Vec<LayerReport>,
    /// What `fold` leaves to an adapter.
    rest: BTreeMap<String, Adapter>,
    totals: Totals,
    /// Parts of packed weights that were written, or left away, together with their codes.
    done: BTreeSet<String>,
    watch: Watch<'w>,
}

impl<'a> Job<'a, '_> {
    fn run(&mut self, ready: &Ready) -> Result<()> {
        let checkpoint = self.checkpoint;
        // Weights first: whatever comes with one is then known to be dealt with. Block by block, as inputs are observed; the
        // head, which has no number, last.
        let (mut weights, others): (Vec<&String>, Vec<&String>) =
            checkpoint.names().partition(|name| name.ends_with(".weight"));
        weights.sort_by_key(|name| {
            layer_of(name).unwrap_or(if name.contains("embed_tokens") { 0 } else { usize::MAX })
        });
        let total = weights.len() + others.len();
        for (done, name) in weights.into_iter().chain(others).enumerate() {
            if self.watch.stop.load(Ordering::Relaxed) {
                return Err(Error::Stopped);
            }
            self.totals.base_bytes +=
                checkpoint.info(name).map_or(0, |info| info.range.end - info.range.start);
            if !self.done.remove(name) {
                self.tensor(name, ready)?;
                // Buffers of the sizes just used are of no use to the next tensor.
                mlx_rs::memory::clear_cache()?;
            }
            (self.watch.on_event)(Event::Tensor { done: done + 1, total });
        }
        Ok(())
    }

    /// One tensor of the base, with its scales and biases if it is a weight that changes.
    fn tensor(&mut self, name: &str, ready: &Ready) -> Result<()> {
        let path = name.strip_suffix(".weight").unwrap_or(name);
        let update = self.update(name, path)?;
        if update.is_none() && !self.dequantize {
            return self.copy(name, ready);
        }
        let grid = self.checkpoint.grid(path)?;
        let weight = match grid {
            None if update.is_none() => return self.copy(name, ready),
            None => Weight::Dense(matrix(&self.checkpoint.array(name)?)?),
            Some(_) => self.checkpoint.weight(path)?,
        };
        let mut stored = None;
        if let Some(update) = update {
            let hessian = if grid.is_some() { self.hessian(path, &update)? } else { None };
            let how = (self.policy, self.floats);
            let fused = fuse_weight(path, &weight, &update, how, hessian.as_deref())?;
            self.layers.push(fused.report);
            self.rest.extend(fused.rest.map(|rest| (path.to_owned(), rest)));
            stored = fused.stored;
        }
        if let (None, Weight::Packed(packed), true) = (&stored, &weight, self.dequantize) {
            stored = Some(dense(packed, self.floats)?);
        }
        // Not kept while what it became waits to be written.
        drop(weight);
        match stored {
            Some(stored) => self.write((name, path), stored, ready),
            // Its scales and biases, if it has any, are copied when their turn comes.
            None => self.copy(name, ready),
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

    /// The moments of the inputs of a linear that keeps its bits.
    fn hessian(&mut self, path: &str, update: &Update) -> Result<Option<Rc<Hessian>>> {
        let wanted = self.policy == Policy::Same && matches!(update, Update::LowRank(_, Kind::Linear));
        match &mut self.watch.inputs {
            Some(inputs) if wanted => {
                inputs(path).map_err(|source| Error::Inputs { path: path.to_owned(), source })
            }
            _ => Ok(None),
        }
    }

    fn copy(&mut self, name: &str, ready: &Ready) -> Result<()> {
        self.totals.copied_tensors += 1;
        let tensor = self.checkpoint.read(name)?;
        self.add(name, tensor, ready)
    }

    /// A weight in its new form, and the form's entry in the config.
    fn write(&mut self, (name, path): (&str, &str), mut stored: Stored, ready: &Ready) -> Result<()> {
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
        parts.iter().zip(stored.tensors).try_for_each(|(name, tensor)| self.add(name, tensor, ready))
    }

    fn add(&mut self, name: &str, tensor: Tensor, ready: &Ready) -> Result<()> {
        self.totals.tensors += 1;
        self.totals.bytes += tensor.data.len() as u64;
        // Whoever writes went because of an error of its own, which is told instead.
        ready.send((name.to_owned(), tensor)).map_err(|_| Error::Stopped)
    }

    /// Config and other files; then the directory is complete but for its report.
    fn complete(
        mut self,
        mut writer: DirWriter,
        (out, options): (&Path, &FuseOptions),
        plan: Plan,
        sources: (Origin, Origin),
    ) -> Result<Sibling> {
        let model = self.checkpoint.dir();
        self.layers.sort_by(|a, b| a.path.cmp(&b.path));
        self.totals.sum_up(&self.layers);
        if self.dequantize {
            self.quantization = Quantization::default();
        }
        let mut config = self.checkpoint.config().clone();
        if self.quantization != *self.checkpoint.quantization() {
            self.quantization.to_config(&mut config);
        }
        for file in companion_files(model)? {
            let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            writer.copy_file(&file, name)?;
        }
        let (base, adapter) = sources;
        let provenance = Provenance {
            graft: env!("CARGO_PKG_VERSION").into(),
            operation: "fuse".into(),
            base: Some(base),
            inputs: vec![adapter],
            recipe: json!({"policy": self.policy.name(), "dequantize": self.dequantize, "other_precision": options.other_precision, "observed": options.observed}),
            summary: Value::Null,
        };
        let report = FuseReport {
            schema: 1,
            kind: "fuse".into(),
            version: provenance.graft.clone(),
            base: options.base_name.clone(),
            adapter: options.adapter_name.clone(),
            fine_tune_type: self.adapter.config.fine_tune_type.name().into(),
            policy: self.policy.name().into(),
            dequantize: self.dequantize,
            low_rank_left: self.rest.len(),
            plan,
            verify: "layers".into(),
            judged_by: String::new(),
            totals: self.totals,
            model: None,
            seconds: 0.0,
            peak_memory_bytes: 0,
            provenance,
            layers: self.layers,
        };
        let made_of = Provenance { summary: report.summary(), ..report.provenance.clone() };
        let left = (std::mem::take(&mut self.rest), made_of.clone());
        writer.describe(Provenance::METADATA, serde_json::to_string(&made_of).map_err(Error::Report)?);
        writer.write_config(&config)?;
        let mut sibling = Sibling { made: writer.complete()?, report, config };
        sibling.write_rest(self.adapter, left, out)?;
        Ok(sibling)
    }
}

/// A fused model that stands complete beside its place.
#[derive(Debug)]
pub struct Sibling {
    made: Made,
    config: Map<String, Value>,
    /// The report so far; whoever verifies the model adds what was found.
    pub report: FuseReport,
}

impl Sibling {
    /// Where it is for now: a model directory, and the adapter that `fold` left, if it did.
    pub fn path(&self) -> &Path {
        self.made.path()
    }

    /// Writes the report and puts the model in its place.
    ///
    /// # Errors
    /// When writing or renaming fails; what stood at the target is then untouched.
    pub fn place(mut self) -> Result<FuseReport> {
        self.report.judged_by = self.report.judge().0.into();
        self.report.provenance.summary = self.report.summary();
        self.made
            .write_file(REPORT_FILE, &serde_json::to_vec_pretty(&self.report).map_err(Error::Report)?)?;
        let (key, provenance) = self.report.provenance.entry()?;
        self.config.insert(key, provenance);
        let sorted: BTreeMap<&String, &Value> = self.config.iter().collect();
        self.made.write_file("config.json", &graft_quant::pretty(&json!(sorted))?)?;
        self.made.place()?;
        Ok(self.report)
    }

    /// The low-rank part that `fold` left, as an adapter in the same directory, on the model in it.
    fn write_rest(
        &mut self,
        adapter: &AdapterSet,
        (rest, made_of): (BTreeMap<String, Adapter>, Provenance),
        out: &Path,
    ) -> Result<()> {
        if rest.is_empty() {
            return Ok(());
        }
        let folded = Fingerprint::of(&Checkpoint::open(self.path())?, &out.display().to_string());
        let (paths, trained) = (rest.keys().map(String::as_str), &adapter.config);
        let mut set = described(FineTuneType::Lora, trained.num_layers, 1, paths, Some(folded))?;
        // What training asked for is not what this one is; its form is.
        set.config.parameters.clone_from(&trained.parameters);
        set.config.scales.clone_from(&trained.scales);
        set.config.raw.insert("model".into(), out.display().to_string().into());
        set.adapters = rest;
        made_of.write(&mut set)?;
        let bytes = graft_quant::safetensors_bytes(&set.tensors()?, &set.file_metadata())?;
        self.made.write_file(ADAPTER_FILE, &bytes)?;
        Ok(self.made.write_file(CONFIG_FILE, &graft_quant::pretty(&Value::Object(set.config.to_map()))?)?)
    }
}

/// A tensor of any shape as a matrix of its last dimension.
fn matrix(array: &Array) -> Result<Array> {
    Ok(array.reshape(&[-1, array.shape().last().copied().unwrap_or(1)])?)
}
