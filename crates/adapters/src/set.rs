//! An adapter directory: read in mlx-lm's or PEFT's form, checked against a base, written in mlx-lm's form.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use graft_ops::Dtype;
use graft_quant::{StoredDtype, Tensor, Weight};
use serde_json::{Map, Value};

use crate::{Adapter, AdapterConfig, Error, FineTuneType, Fingerprint, Kind, Result, Site, Table, peft};

/// mlx-lm's name of the tensors.
pub const ADAPTER_FILE: &str = "adapters.safetensors";
/// The name of the config, mlx-lm's and PEFT's alike.
pub const CONFIG_FILE: &str = "adapter_config.json";

/// The key in graft's part of the config that names the whole weights beside low-rank updates.
pub(crate) const WHOLE: &str = "weights";
/// The key in a set's metadata, in memory only, under which types other than f32 stand by tensor.
const DTYPES: &str = "dtypes";

/// A module of a base that an adapter may act on.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// W or E.
    pub weight: &'a Weight,
    /// Which of the two.
    pub kind: Kind,
}

impl Target<'_> {
    /// (out, in) or (V, E).
    pub fn shape(&self) -> (i32, i32) {
        (self.weight.out_features(), self.weight.in_features())
    }
}

/// All that an adapter directory holds.
#[derive(Debug, Clone)]
pub struct AdapterSet {
    /// Low-rank updates by module path.
    pub adapters: BTreeMap<String, Adapter>,
    /// Whole weights by tensor name: all of a `full` fine-tune; beside low-rank updates, PEFT's `modules_to_save`.
    pub weights: BTreeMap<String, Tensor>,
    /// The config.
    pub config: AdapterConfig,
    /// Metadata of the tensor file; while in memory also the types of tensors that were not f32.
    pub metadata: BTreeMap<String, String>,
}

impl AdapterSet {
    /// Reads an adapter directory in mlx-lm's or PEFT's form.
    ///
    /// # Errors
    /// When a file is missing or damaged, or when the adapter uses what cannot be represented.
    pub fn load(dir: &Path) -> Result<Self> {
        let (file, raw) = read_config(dir)?;
        if raw.contains_key("peft_type") {
            return peft::load(dir, &file, &raw);
        }
        let config = AdapterConfig::from_map(&file, raw)?;
        let tensors = dir.join(ADAPTER_FILE);
        if !tensors.is_file() {
            return Err(Error::NotAnAdapter { dir: dir.to_path_buf(), missing: ADAPTER_FILE.into() });
        }
        Self::from_file(&tensors, config)
    }

    /// The base on which the adapter in `dir` was trained, where its config says so; no tensor is read.
    ///
    /// # Errors
    /// When there is no config, or it is no JSON object.
    pub fn trained_on(dir: &Path) -> Result<Option<Fingerprint>> {
        let (file, raw) = read_config(dir)?;
        if raw.contains_key("peft_type") {
            return Ok(None);
        }
        Ok(Fingerprint::read(&AdapterConfig::from_map(&file, raw)?))
    }

    /// Reads a file of tensors in mlx-lm's form under a given config (`--resume-adapter-file`).
    ///
    /// # Errors
    /// As for [`AdapterSet::load`].
    pub fn from_file(file: &Path, config: AdapterConfig) -> Result<Self> {
        let (mut tensors, mut metadata) = graft_quant::read_safetensors(file)?;
        let problems = unusable(&tensors);
        if !problems.is_empty() {
            return Err(Error::Mismatch { file: file.to_path_buf(), problems });
        }
        if config.fine_tune_type == FineTuneType::Full {
            return Ok(Self { adapters: BTreeMap::new(), weights: tensors, config, metadata });
        }
        let mut weights = BTreeMap::new();
        for name in config.extra(WHOLE).and_then(Value::as_array).into_iter().flatten() {
            weights.extend(name.as_str().and_then(|name| tensors.remove_entry(name)));
        }
        let adapters = collect(file, &tensors, &config)?;
        note_dtypes(&mut metadata, &tensors.iter().map(|(name, t)| (name.clone(), t.dtype)).collect());
        Ok(Self { adapters, weights, config, metadata })
    }

    /// mlx-lm's tensors: `<path>.lora_a`, `.lora_b`, `.m`, and the whole weights; in the types they were read in, where
    /// those still hold the values.
    ///
    /// # Errors
    /// When an array cannot be evaluated.
    pub fn tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors = self.weights.clone();
        for (path, adapter) in &self.adapters {
            tensors.insert(format!("{path}.lora_a"), Tensor::from_array(&adapter.a)?);
            tensors.insert(format!("{path}.lora_b"), Tensor::from_array(&adapter.b)?);
            if let Some(m) = &adapter.magnitude {
                tensors.insert(format!("{path}.m"), Tensor::from_array(m)?);
            }
        }
        let types: BTreeMap<String, String> =
            self.metadata.get(DTYPES).and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
        for (name, dtype) in types {
            if let Some(tensor) = tensors.get_mut(&name) {
                *tensor = tensor.as_stored(&dtype)?;
            }
        }
        Ok(tensors)
    }

    /// The metadata that goes into a file.
    pub(crate) fn file_metadata(&self) -> BTreeMap<String, String> {
        let mut metadata = self.metadata.clone();
        metadata.remove(DTYPES);
        metadata
    }

    /// Writes the config and the tensors, each atomically, the config first: tensors without a config have no meaning.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<()> {
        std::fs::create_dir_all(dir).map_err(|source| Error::Io { path: dir.to_path_buf(), source })?;
        self.save_config(dir)?;
        let bytes = graft_quant::safetensors_bytes(&self.tensors()?, &self.file_metadata())?;
        Ok(graft_quant::write_atomic(&dir.join(ADAPTER_FILE), &bytes)?)
    }

    /// Writes the config alone.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save_config(&self, dir: &Path) -> Result<()> {
        let file = dir.join(CONFIG_FILE);
        let text = graft_quant::pretty(&Value::Object(self.config.to_map()))?;
        Ok(graft_quant::write_atomic(&file, &text)?)
    }

    /// Checks each adapter against the base's modules, given by shape and kind: a list of every path that the base lacks
    /// and every shape that differs.
    ///
    /// # Errors
    /// [`Error::Mismatch`] with all problems.
    pub fn check(&self, origin: &Path, module: impl Fn(&str) -> Option<((i32, i32), Kind)>) -> Result<()> {
        let mut problems = Vec::new();
        for (path, adapter) in &self.adapters {
            let Some((shape, kind)) = module(path) else {
                problems.push(format!("{path}: the base has no such linear or embedding"));
                continue;
            };
            if adapter.kind(path, shape) != Some(kind) {
                problems.push(format!(
                    "{path}: A is {:?} and B is {:?}, but the base's weight is ({}, {}): trained on another base",
                    adapter.a.shape(),
                    adapter.b.shape(),
                    shape.0,
                    shape.1
                ));
            } else if adapter.magnitude.is_some() && kind == Kind::Embedding {
                problems.push(format!("{path}: DoRA on an embedding is not supported; train it as LoRA"));
            } else if adapter.magnitude.as_ref().is_some_and(|m| m.shape() != [shape.0]) {
                problems.push(format!(
                    "{path}: m has another length than the {} rows of the base's weight",
                    shape.0
                ));
            }
        }
        if problems.is_empty() {
            Ok(())
        } else {
            Err(Error::Mismatch { file: origin.to_path_buf(), problems })
        }
    }

    /// The table for serving: checked, DoRA's factor computed once, everything evaluated.
    ///
    /// # Errors
    /// When the adapter does not fit the base, or is a `full` one, which has no low-rank form.
    pub fn table<'a>(&self, origin: &Path, target: impl Fn(&str) -> Option<Target<'a>>) -> Result<Table> {
        if self.config.fine_tune_type == FineTuneType::Full {
            return Err(Error::Unsupported {
                file: origin.to_path_buf(),
                what: "a full fine-tune".into(),
                why: "it holds whole weights, no low-rank update: fuse it into the base first (graft fuse)"
                    .into(),
            });
        }
        if let Some(name) = self.weights.keys().next() {
            return Err(Error::Unsupported {
                file: origin.to_path_buf(),
                what: format!("{name}, a whole weight beside the low-rank updates,"),
                why:
                    "it takes the place of the base's own: fuse the adapter into the base first (graft fuse)"
                        .into(),
            });
        }
        self.check(origin, |path| target(path).map(|t| (t.shape(), t.kind)))?;
        let mut sites = HashMap::new();
        for (path, adapter) in &self.adapters {
            let Some(found) = target(path) else { continue };
            let factor = adapter.factor(found.weight)?;
            let (a, b) = (adapter.a.clone(), adapter.b.clone());
            sites.insert(path.clone(), Site { a, b, scale: adapter.scale, factor, dropout: None });
        }
        let table = Table { sites };
        graft_ops::ffi::eval(table.arrays())?;
        Ok(table)
    }
}

/// adapter_config.json of an adapter directory: its path and its keys.
fn read_config(dir: &Path) -> Result<(PathBuf, Map<String, Value>)> {
    let file = dir.join(CONFIG_FILE);
    if !file.is_file() {
        return Err(Error::NotAnAdapter { dir: dir.to_path_buf(), missing: CONFIG_FILE.into() });
    }
    let bytes = std::fs::read(&file).map_err(|source| Error::Io { path: file.clone(), source })?;
    let json: Value =
        serde_json::from_slice(&bytes).map_err(|source| Error::Json { path: file.clone(), source })?;
    match json {
        Value::Object(raw) => Ok((file, raw)),
        _ => Err(Error::Config {
            file,
            field: "(whole file)".into(),
            expected: "an object".into(),
            found: "another JSON value".into(),
        }),
    }
}

/// Remembers the types that are not f32, by our names of the tensors.
pub(crate) fn note_dtypes(metadata: &mut BTreeMap<String, String>, dtypes: &BTreeMap<String, StoredDtype>) {
    let others = dtypes.iter().filter(|(_, dtype)| **dtype != StoredDtype::F32);
    let others: BTreeMap<&String, String> = others.map(|(name, dtype)| (name, dtype.to_string())).collect();
    if !others.is_empty() {
        metadata.insert(DTYPES.into(), serde_json::json!(others).to_string());
    }
}

/// A sentence on each tensor that holds no floats, or not only finite ones.
pub(crate) fn unusable(tensors: &BTreeMap<String, Tensor>) -> Vec<String> {
    let problem = |(name, tensor): (&String, &Tensor)| match tensor.to_f32() {
        Ok(values) if values.iter().all(|x| x.is_finite()) => None,
        Ok(_) => Some(format!("{name}: holds values that are not finite")),
        Err(_) => Some(format!("{name}: expected floats, found {:?}", tensor.dtype)),
    };
    tensors.iter().filter_map(problem).collect()
}

/// mlx-lm's tensors to adapters: every tensor must be one of the three, every path complete.
fn collect(
    file: &Path,
    tensors: &BTreeMap<String, Tensor>,
    config: &AdapterConfig,
) -> Result<BTreeMap<String, Adapter>> {
    let mut problems = Vec::new();
    let mut paths: BTreeMap<&str, [Option<&Tensor>; 3]> = BTreeMap::new();
    for (name, tensor) in tensors {
        let part = name.rsplit_once('.').and_then(|(path, last)| {
            ["lora_a", "lora_b", "m"].iter().position(|p| *p == last).map(|i| (path, i))
        });
        match part {
            Some((path, i)) => paths.entry(path).or_default()[i] = Some(tensor),
            None => problems.push(format!("{name}: expected a name ending in .lora_a, .lora_b or .m")),
        }
    }
    let mut adapters = BTreeMap::new();
    for (path, [a, b, m]) in paths {
        let (Some(a), Some(b)) = (a, b) else {
            problems.push(format!("{path}: lora_a and lora_b must come together"));
            continue;
        };
        let fits = a.shape.len() == 2 && b.shape.len() == 2 && a.shape[1] == b.shape[0];
        if !fits || a.shape.contains(&0) || b.shape.contains(&0) {
            problems.push(format!(
                "{path}: expected lora_a (in, r) and lora_b (r, out), at least 1 of each, found {:?} and {:?}",
                a.shape, b.shape
            ));
            continue;
        }
        if config.fine_tune_type == FineTuneType::Dora && m.is_none() {
            problems.push(format!("{path}: fine_tune_type is dora, but m is missing"));
        }
        let magnitude = m.map(array_f32).transpose()?;
        let adapter = Adapter { a: array_f32(a)?, b: array_f32(b)?, scale: config.scale_of(path), magnitude };
        adapters.insert(path.to_owned(), adapter);
    }
    if adapters.is_empty() && problems.is_empty() {
        problems.push("the file holds no tensors".into());
    }
    if problems.is_empty() {
        Ok(adapters)
    } else {
        Err(Error::Mismatch { file: file.to_path_buf(), problems })
    }
}

/// The tensor as an f32 array.
pub(crate) fn array_f32(tensor: &Tensor) -> Result<graft_ops::Array> {
    Ok(tensor.to_array()?.as_dtype(Dtype::Float32)?)
}
