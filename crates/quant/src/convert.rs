//! Converting a model directory or a GGUF file to a model directory, tensor by tensor.
//!
//! The packed words, and which modules are packed, are those of mlx_lm 0.32.2's `convert`. Only one tensor is in memory
//! at a time, whatever the model's size, and the output takes its place when it is complete.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use graft_ops::Array;
use serde_json::{Map, Value};

use crate::gguf::{Block, Gguf, HostPacked};
use crate::tensor::mlx_dtype;
use crate::{
    Checkpoint, DirWriter, Error, Grid, Packed, Quantization, Recipe, Result, StoredDtype, Tensor, round,
};

/// How dense weights are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packing {
    /// The grid of every module for which the recipe, if any, names no other.
    pub grid: Grid,
    /// Different widths for different modules.
    pub recipe: Option<Recipe>,
}

/// What to do with a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConvertOptions {
    /// Pack the dense linears and embeddings; not together with `dequantize`.
    pub pack: Option<Packing>,
    /// Make every packed weight dense.
    pub dequantize: bool,
    /// F16, BF16 or F32 for every float, scales and biases of packed weights too. None: config.json's `torch_dtype`
    /// (or `text_config.dtype`), else as stored; for GGUF, F16, which holds its scales exactly.
    pub dtype: Option<StoredDtype>,
}

/// What happens meanwhile.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A tensor was written.
    Tensor {
        /// Tensors done, of the source.
        done: usize,
        /// Tensors of the source.
        total: usize,
    },
    /// Something that the user should know.
    Warning(String),
}

/// What was done.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Modules packed here.
    pub packed: usize,
    /// Modules made dense here.
    pub dequantized: usize,
    /// Weights and other parameters, unpacked.
    pub parameters: u64,
    /// Bytes of the tensors written.
    pub bytes: u64,
    /// Tensors of the source that the result does not have.
    pub left_out: Vec<String>,
}

impl Report {
    /// Bits per parameter, scales, biases and norms included.
    pub fn bits_per_weight(&self) -> f64 {
        if self.parameters == 0 { 0.0 } else { self.bytes as f64 * 8.0 / self.parameters as f64 }
    }
}

/// Converts a model directory. `stop` is looked at between two tensors.
///
/// # Errors
/// When the source cannot be read, the target exists, the options contradict each other or the model, or `stop` was set.
pub fn convert(
    src: &Path,
    dst: &Path,
    options: &ConvertOptions,
    stop: &AtomicBool,
    on_event: &mut dyn FnMut(Event),
) -> Result<Report> {
    check(options)?;
    let checkpoint = Checkpoint::open(src)?;
    let config = checkpoint.config();
    let mut sink = Sink::new(dst, options, options.dtype.or_else(|| config_dtype(config)), stop, on_event)?;
    sink.quantization = checkpoint.quantization().clone();
    let already_packed = sink.quantization.default.is_some();
    sink.warn_of_packed(already_packed, src);
    if let Some(packing) = options.pack {
        if !already_packed {
            sink.quantization.default = Some(packing.grid);
        }
        sink.layers = layer_count(&checkpoint, packing.recipe)?;
        sink.fine_grained = already_packed;
    }
    let names: Vec<&String> = checkpoint.names().collect();
    let tied = config.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(false);
    for (done, name) in names.iter().enumerate() {
        if name.contains("rotary_emb.inv_freq") || (tied && name.starts_with("lm_head.")) {
            // Buffers of old exports, and the copy of the embedding that a tied model's head is: mlx_lm drops both.
            sink.report.left_out.push((*name).clone());
        } else if let Some(block) = read_block(&checkpoint, name)? {
            sink.put(name, block)?;
        }
        sink.advance(done + 1, names.len())?;
    }
    sink.finish(config.clone(), |writer| {
        for file in companion_files(src)? {
            let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            writer.copy_file(&file, name)?;
        }
        Ok(())
    })
}

/// A tensor's name in the result and the order of its rows (see [`Gguf::read`]); none if the result has no place for it.
pub type Names<'a> = dyn Fn(&str) -> Option<(String, Option<Vec<usize>>)> + 'a;

/// What surrounds the tensors of a GGUF file in a model directory; made by whoever knows the architecture.
pub struct GgufParts<'a> {
    /// config.json; the quantization block and `torch_dtype` are filled in here.
    pub config: Map<String, Value>,
    /// Other files by name (tokenizer.json, tokenizer_config.json, …).
    pub files: Vec<(String, Vec<u8>)>,
    /// Names of the tensors.
    pub names: &'a Names<'a>,
}

/// Converts a GGUF file: its packed weights keep their codes, scales and biases exactly.
///
/// # Errors
/// As [`convert`], and when a tensor has a type that cannot be kept.
pub fn convert_gguf(
    gguf: &Gguf,
    parts: &GgufParts,
    dst: &Path,
    options: &ConvertOptions,
    stop: &AtomicBool,
    on_event: &mut dyn FnMut(Event),
) -> Result<Report> {
    check(options)?;
    let (mut named, mut left_out) = (Vec::new(), Vec::new());
    for info in gguf.tensors.values() {
        match (parts.names)(&info.name) {
            Some((name, rows)) => {
                gguf.readable(info)?;
                named.push((name, info, rows));
            }
            None => left_out.push(info.name.clone()),
        }
    }
    let mut sink = Sink::new(dst, options, Some(options.dtype.unwrap_or(StoredDtype::F16)), stop, on_event)?;
    sink.report.left_out = left_out;
    named.sort_by(|a, b| a.0.cmp(&b.0));
    sink.warn_of_packed(named.iter().any(|(_, info, _)| info.kind.grid().is_some()), gguf.path());
    if !options.dequantize {
        // The grid that most packed weights have is the block's default, so that few need an entry.
        let grids: Vec<Grid> = named.iter().filter_map(|(_, info, _)| info.kind.grid()).collect();
        let count = |grid: &Grid| grids.iter().filter(|other| *other == grid).count();
        sink.quantization.default = grids.iter().copied().max_by_key(|grid| (count(grid), grid.bits));
    }
    if let Some(packing) = options.pack {
        sink.fine_grained = sink.quantization.default.is_some();
        sink.quantization.default = sink.quantization.default.or(Some(packing.grid));
        sink.layers = layers_in(named.iter().map(|(name, ..)| name.as_str()));
    }
    let total = named.len();
    for (done, (name, info, rows)) in named.iter().enumerate() {
        let block = gguf.read(info, rows.as_deref())?;
        sink.put(name, block)?;
        sink.advance(done + 1, total)?;
    }
    sink.finish(parts.config.clone(), |writer| {
        parts.files.iter().try_for_each(|(name, bytes)| writer.write_file(name, bytes))
    })
}

/// The files of a model directory that go with its weights: tokenizer, template, generation settings, code, licence.
///
/// Weights in any form, their indexes, config.json, an adapter's config, reports, READMEs and hidden files are none of them.
///
/// # Errors
/// When the directory cannot be read.
pub fn companion_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        let kept = match extension {
            "json" => {
                !matches!(name, "config.json" | "adapter_config.json" | "fuse_report.json")
                    && !name.ends_with(".index.json")
            }
            "jinja" | "txt" | "model" | "py" | "tiktoken" => true,
            _ => name.starts_with("LICENSE") || name.starts_with("NOTICE"),
        };
        if kept && !name.starts_with('.') && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// The float type of that name, as config.json and `--dtype` write it.
pub fn dtype_from_name(name: &str) -> Option<StoredDtype> {
    match name {
        "float16" => Some(StoredDtype::F16),
        "bfloat16" => Some(StoredDtype::BF16),
        "float32" => Some(StoredDtype::F32),
        _ => None,
    }
}

/// The name of a float type in config.json.
pub fn dtype_name(dtype: StoredDtype) -> Option<&'static str> {
    match dtype {
        StoredDtype::F16 => Some("float16"),
        StoredDtype::BF16 => Some("bfloat16"),
        StoredDtype::F32 => Some("float32"),
        _ => None,
    }
}

/// Where mlx_lm looks for the type to convert to.
pub(crate) fn config_dtype(config: &Map<String, Value>) -> Option<StoredDtype> {
    let own = config.get("torch_dtype").filter(|value| !value.is_null());
    let text = || config.get("text_config").and_then(|text| text.get("dtype"));
    own.or_else(text).and_then(Value::as_str).and_then(dtype_from_name)
}

/// Options that contradict each other.
fn check(options: &ConvertOptions) -> Result<()> {
    if let Some(packing) = options.pack {
        packing.grid.check()?;
        if options.dequantize {
            return Err(Error::Request("quantize and dequantize exclude each other: choose one".into()));
        }
    }
    match options.dtype {
        Some(dtype) if dtype_name(dtype).is_none() => {
            Err(Error::Request(format!("{dtype:?} is no type of a model: expected F16, BF16 or F32")))
        }
        _ => Ok(()),
    }
}

/// Number of blocks, which a recipe needs; config.json's word, else what the names say.
fn layer_count(checkpoint: &Checkpoint, recipe: Option<Recipe>) -> Result<usize> {
    if recipe.is_some() && !checkpoint.names().any(|name| name.contains("down_proj")) {
        return Err(Error::Request(format!(
            "{}: a recipe chooses widths by v_proj and down_proj, and this model has no down_proj",
            checkpoint.dir().display()
        )));
    }
    let said = checkpoint.config().get("num_hidden_layers").and_then(Value::as_u64);
    let said = said.and_then(|n| usize::try_from(n).ok());
    Ok(said.unwrap_or_else(|| layers_in(checkpoint.names().map(String::as_str))))
}

/// One more than the highest number in the names.
fn layers_in<'a>(names: impl Iterator<Item = &'a str>) -> usize {
    names.filter_map(crate::recipe::layer_of).max().map_or(0, |last| last + 1)
}

/// The tensor `name`, with its scales and biases if it is packed; none for those, which come with their weight.
pub(crate) fn read_block(checkpoint: &Checkpoint, name: &str) -> Result<Option<Block>> {
    if let Some((path, part)) = name.rsplit_once('.') {
        let grid = match part {
            "weight" | "scales" | "biases" => checkpoint.grid(path)?,
            _ => None,
        };
        if let Some(grid) = grid {
            if part != "weight" {
                return Ok(None);
            }
            let read = |part: &str| checkpoint.read(&format!("{path}.{part}"));
            let biases = (!grid.is_float()).then(|| read("biases")).transpose()?;
            let (codes, scales) = (read("weight")?, read("scales")?);
            return Ok(Some(Block::Packed(HostPacked { codes, scales, biases, grid })));
        }
    }
    checkpoint.read(name).map(|tensor| Some(Block::Dense(tensor)))
}

/// Takes tensors as they come and writes them as the options say.
struct Sink<'a> {
    writer: DirWriter,
    options: &'a ConvertOptions,
    dtype: Option<StoredDtype>,
    /// The block of the result.
    quantization: Quantization,
    /// Every module packed here gets an entry of its own, since the default is another's.
    fine_grained: bool,
    layers: usize,
    report: Report,
    stop: &'a AtomicBool,
    on_event: &'a mut dyn FnMut(Event),
}

impl<'a> Sink<'a> {
    fn new(
        dst: &Path,
        options: &'a ConvertOptions,
        dtype: Option<StoredDtype>,
        stop: &'a AtomicBool,
        on_event: &'a mut dyn FnMut(Event),
    ) -> Result<Self> {
        Ok(Self {
            writer: DirWriter::create(dst, false)?,
            options,
            dtype,
            quantization: Quantization::default(),
            fine_grained: false,
            layers: 0,
            report: Report { packed: 0, dequantized: 0, parameters: 0, bytes: 0, left_out: Vec::new() },
            stop,
            on_event,
        })
    }

    /// One tensor more is done; nothing is left behind if that is all there shall be.
    fn advance(&mut self, done: usize, total: usize) -> Result<()> {
        (self.on_event)(Event::Tensor { done, total });
        if self.stop.load(Ordering::Relaxed) { Err(Error::Stopped) } else { Ok(()) }
    }

    fn warn(&mut self, text: String) {
        (self.on_event)(Event::Warning(text));
    }

    /// Says where what was asked for is done already.
    fn warn_of_packed(&mut self, packed: bool, src: &Path) {
        if packed && self.options.pack.is_some() {
            self.warn(format!(
                "{} is packed already: its packed weights stay as they are; to change their width, convert it with \
                 --dequantize first",
                src.display()
            ));
        }
        if !packed && self.options.dequantize {
            self.warn(format!("{} is not packed: there is nothing to make dense", src.display()));
        }
    }

    fn add(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        self.report.bytes += tensor.data.len() as u64;
        self.writer.add(name, tensor)
    }

    /// One tensor, or the three of a packed weight.
    fn put(&mut self, name: &str, block: Block) -> Result<()> {
        match block {
            Block::Dense(tensor) => self.put_dense(name, tensor),
            Block::Packed(packed) => self.put_packed(name, packed),
        }?;
        // Buffers of the sizes just used are of no use to the next tensor.
        Ok(mlx_rs::memory::clear_cache()?)
    }

    fn put_dense(&mut self, name: &str, tensor: Tensor) -> Result<()> {
        self.report.parameters += tensor.len() as u64;
        let tensor = self.cast(name, tensor)?;
        let path = name.strip_suffix(".weight").filter(|_| tensor.shape.len() == 2 && is_float(tensor.dtype));
        let grid = path.and_then(|path| self.grid_for(path, tensor.shape[1]));
        let (Some(path), Some(grid)) = (path, grid) else { return self.add(name, &tensor) };
        self.report.packed += 1;
        let packed = round(&tensor.to_array()?, grid, None)?;
        drop(tensor);
        self.add_packed(path, &packed)
    }

    /// The grid in which a dense weight is to be packed, and its entry in the block.
    fn grid_for(&mut self, path: &str, inputs: usize) -> Option<Grid> {
        let packing = self.options.pack?;
        // As in mlx_lm the common group size decides what can be packed, and a row that it does not divide stays dense.
        if !packing.grid.fits(inputs) {
            return None;
        }
        let grid = packing
            .recipe
            .map_or(packing.grid, |recipe| recipe.grid(path, self.layers, packing.grid.group_size));
        if self.fine_grained || packing.recipe.is_some() {
            self.quantization.paths.insert(path.to_owned(), Some(grid));
        }
        Some(grid)
    }

    fn put_packed(&mut self, name: &str, packed: HostPacked) -> Result<()> {
        let path = name.strip_suffix(".weight").unwrap_or(name);
        let inputs = packed.scales.len() as u64 * packed.grid.group_size as u64;
        self.report.parameters += inputs;
        if self.options.dequantize {
            self.report.dequantized += 1;
            let dtype = self.dtype.unwrap_or(if packed.grid.is_float() {
                StoredDtype::BF16
            } else {
                packed.scales.dtype
            });
            let dtype = mlx_dtype(dtype)
                .ok_or_else(|| Error::Request(format!("{name}: scales of type {dtype:?}")))?;
            let packed = packed.to_arrays()?;
            let dense = Tensor::from_array(&packed.dequantize(dtype)?)?;
            drop(packed);
            self.warn_if_overflown(name, &dense);
            return self.add(name, &dense);
        }
        if self.quantization.grid_of(path) != Some(packed.grid) {
            self.quantization.paths.insert(path.to_owned(), Some(packed.grid));
        }
        self.add(name, &packed.codes)?;
        let biases = packed.biases.map(|biases| ("biases", biases));
        for (part, tensor) in [("scales", packed.scales)].into_iter().chain(biases) {
            let name = format!("{path}.{part}");
            let tensor = self.cast(&name, tensor)?;
            self.add(&name, &tensor)?;
        }
        Ok(())
    }

    fn add_packed(&mut self, path: &str, packed: &Packed) -> Result<()> {
        for (part, array) in packed.parts() {
            self.add(&format!("{path}.{part}"), &Tensor::from_array(array)?)?;
        }
        Ok(())
    }

    /// Floats in the type of the result; the bytes as they are where that is their type already.
    fn cast(&mut self, name: &str, tensor: Tensor) -> Result<Tensor> {
        let Some(dtype) = self.dtype.filter(|dtype| is_float(tensor.dtype) && *dtype != tensor.dtype) else {
            return Ok(tensor);
        };
        let Some(target) = mlx_dtype(dtype) else { return Ok(tensor) };
        let array: Array = tensor.to_array()?.as_dtype(target)?;
        drop(tensor);
        let cast = Tensor::from_array(&array)?;
        self.warn_if_overflown(name, &cast);
        Ok(cast)
    }

    /// F16 ends at 65504; what was larger is infinite now.
    fn warn_if_overflown(&mut self, name: &str, tensor: &Tensor) {
        let infinite = |bytes: &[u8; 2]| half::f16::from_le_bytes(*bytes).is_infinite();
        if tensor.dtype == StoredDtype::F16 && tensor.data.as_chunks::<2>().0.iter().any(infinite) {
            self.warn(format!(
                "{name} holds values beyond 65504, which float16 cannot: convert with --dtype bfloat16"
            ));
        }
    }

    /// Config, other files, and the directory into its place.
    fn finish(
        mut self,
        mut config: Map<String, Value>,
        others: impl FnOnce(&mut DirWriter) -> Result<()>,
    ) -> Result<Report> {
        if self.options.dequantize {
            self.quantization = Quantization::default();
        }
        if self.options.dequantize || self.quantization.default.is_some() {
            self.quantization.to_config(&mut config);
        }
        if let Some(name) = self.dtype.and_then(dtype_name) {
            // mlx_lm leaves the old name, and the next to load the model casts it back.
            for key in ["torch_dtype", "dtype"] {
                if config.contains_key(key) || key == "torch_dtype" {
                    config.insert(key.into(), name.into());
                }
            }
        }
        config.remove("_name_or_path");
        config.remove("vision_config");
        others(&mut self.writer)?;
        self.writer.write_config(&config)?;
        self.writer.finish()?;
        Ok(self.report)
    }
}

/// Whether a tensor of this type holds floats.
pub fn is_float(dtype: StoredDtype) -> bool {
    matches!(dtype, StoredDtype::F16 | StoredDtype::BF16 | StoredDtype::F32 | StoredDtype::F64)
}
