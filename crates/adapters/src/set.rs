//! An adapter directory: read in mlx-lm's or PEFT's form, checked against a base, written in mlx-lm's form.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use graft_ops::Dtype;
use graft_quant::{StoredDtype, Tensor, Weight};
use serde_json::{Map, Value};

use crate::{Adapter, AdapterConfig, Error, FineTuneType, Fingerprint, Kind, Result, StoredSet, Table, peft};

/// mlx-lm's name of the tensors.
pub const ADAPTER_FILE: &str = "adapters.safetensors";
/// The name of the config, mlx-lm's and PEFT's alike.
pub const CONFIG_FILE: &str = "adapter_config.json";

/// The key in graft's part of the config that names the whole weights beside low-rank updates.
pub(crate) const WHOLE: &str = "weights";
/// The key in graft's part of the config that says that the update of the embedding leaves a tied head as it was.
pub(crate) const UNTIED_HEAD: &str = "untied_head";
/// How the path of an embedding ends; the names decide, as no network is built here.
pub(crate) const EMBEDDING: &str = "embed_tokens";
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
        StoredSet::load(dir)?.arrays()
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
        StoredSet::from_file(file, config)?.arrays()
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

    /// Whether it updates an embedding, or replaces it, and leaves the head that is tied to it as it was, as PEFT does: with a
    /// base whose head is the embedding we would change both.
    pub fn leaves_head(&self) -> bool {
        leaves_head(&self.config, &self.metadata, self.adapters.keys().chain(self.weights.keys()))
    }

    /// Says so of a set that was made of such ones.
    pub fn leave_head(&mut self) {
        self.config.set_extra(UNTIED_HEAD, true.into());
    }

    /// The adapters of some modules, without whole weights and metadata. Whether the base's head may stay as it was is no
    /// question of a part: whoever has the whole asks it.
    pub fn only(&self, keep: impl Fn(&str) -> bool) -> AdapterSet {
        let adapters = self.adapters.iter().filter(|(path, _)| keep(path));
        let adapters = adapters.map(|(path, adapter)| (path.clone(), adapter.clone())).collect();
        let mut config = self.config.clone();
        config.set_extra(UNTIED_HEAD, false.into());
        AdapterSet { adapters, weights: BTreeMap::new(), config, metadata: BTreeMap::new() }
    }

    /// The metadata that goes into a file.
    pub fn file_metadata(&self) -> BTreeMap<String, String> {
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
        let each = self.adapters.iter().map(|(path, adapter)| {
            let shapes = [&adapter.a, &adapter.b].map(|side| [side.dim(0), side.dim(1)]);
            (path.as_str(), shapes, adapter.magnitude.as_ref().map(|m| m.shape().to_vec()))
        });
        if self.leaves_head() && module(HEAD).is_none() {
            return Err(head_would_change(origin));
        }
        check_each(origin, each, module)
    }

    /// The table for serving: checked, DoRA's factor computed once, everything evaluated.
    ///
    /// # Errors
    /// When the adapter does not fit the base, or is a `full` one, which has no low-rank form.
    pub fn table<'a>(&self, origin: &Path, target: impl Fn(&str) -> Option<Target<'a>>) -> Result<Table> {
        refuse_whole(origin, &self.config, self.weights.keys())?;
        self.check(origin, |path| target(path).map(|t| (t.shape(), t.kind)))?;
        let mut sites = HashMap::new();
        for (path, adapter) in &self.adapters {
            let Some(found) = target(path) else { continue };
            sites.insert(path.clone(), adapter.site(&found)?);
        }
        let table = Table { sites };
        graft_ops::ffi::eval(table.arrays())?;
        Ok(table)
    }
}

/// The path of a head that is not the embedding.
pub(crate) const HEAD: &str = "lm_head";

/// Whether modules or weights of these names are those of an embedding.
pub(crate) fn updates_embedding<'a>(mut names: impl Iterator<Item = &'a String>) -> bool {
    names.any(|name| name.strip_suffix(".weight").unwrap_or(name).ends_with(EMBEDDING))
}

/// As [`AdapterSet::leaves_head`]; adapters imported before there was the mark remember PEFT's config.
pub(crate) fn leaves_head<'a>(
    config: &AdapterConfig,
    metadata: &BTreeMap<String, String>,
    names: impl Iterator<Item = &'a String>,
) -> bool {
    let peft = || serde_json::from_str::<Map<String, Value>>(metadata.get(peft::PEFT_CONFIG)?).ok();
    let marked = || config.extra(UNTIED_HEAD).and_then(Value::as_bool) == Some(true);
    updates_embedding(names) && (marked() || peft().is_some_and(|raw| !peft::ties_head(&raw)))
}

/// Why an update that leaves the head cannot be used with a base whose head is the embedding.
pub(crate) fn head_would_change(origin: &Path) -> Error {
    Error::Unsupported {
        file: origin.to_path_buf(),
        what: "an update of the embedding that leaves the head as it was".into(),
        why: "the head of this base is its embedding, which would change with it, and the answers would be others than in \
              PEFT; train it with ensure_weight_tying=True, or merge it with PEFT and convert the result"
            .into(),
    }
}

/// adapter_config.json of an adapter directory: its path and its keys.
pub(crate) fn read_config(dir: &Path) -> Result<(PathBuf, Map<String, Value>)> {
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

/// A full fine-tune has no low-rank form, and neither have whole weights beside one.
pub(crate) fn refuse_whole<'a>(
    origin: &Path,
    config: &AdapterConfig,
    mut weights: impl Iterator<Item = &'a String>,
) -> Result<()> {
    let unsupported = |what: String, why: &str| {
        let why = format!("{why}: fuse it into the base first (graft fuse)");
        Err(Error::Unsupported { file: origin.to_path_buf(), what, why })
    };
    if config.fine_tune_type == FineTuneType::Full {
        return unsupported("a full fine-tune".into(), "it holds whole weights, no low-rank update");
    }
    match weights.next() {
        Some(name) => {
            let what = format!("{name}, a whole weight beside the low-rank updates,");
            unsupported(what, "it takes the place of the base's own")
        }
        None => Ok(()),
    }
}

/// Checks updates, given by path, the shapes of A and B, and m's shape, against the modules of a base.
pub(crate) fn check_each<'a>(
    origin: &Path,
    each: impl Iterator<Item = (&'a str, [[i32; 2]; 2], Option<Vec<i32>>)>,
    module: impl Fn(&str) -> Option<((i32, i32), Kind)>,
) -> Result<()> {
    let mut problems = Vec::new();
    for (path, [a, b], magnitude) in each {
        let Some((shape, kind)) = module(path) else {
            problems.push(format!("{path}: the base has no such linear or embedding"));
            continue;
        };
        if Kind::of(path, (a[0], b[1]), shape) != Some(kind) {
            problems.push(format!(
                "{path}: A is {a:?} and B is {b:?}, but the base's weight is ({}, {}): trained on another base",
                shape.0, shape.1
            ));
        } else if magnitude.is_some() && kind == Kind::Embedding {
            problems.push(format!("{path}: DoRA on an embedding is not supported; train it as LoRA"));
        } else if magnitude.is_some_and(|m| m != [shape.0]) {
            problems
                .push(format!("{path}: m has another length than the {} rows of the base's weight", shape.0));
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(Error::Mismatch { file: origin.to_path_buf(), problems }) }
}

/// The tensor as an f32 array.
pub(crate) fn array_f32(tensor: &Tensor) -> Result<graft_ops::Array> {
    Ok(tensor.to_array()?.as_dtype(Dtype::Float32)?)
}
