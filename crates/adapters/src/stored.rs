//! An adapter directory as bytes: read and checked without an array, so on any thread, and turned into arrays module by
//! module. What decides its answers has one hash, by which a server tells two versions apart.

use std::collections::BTreeMap;
use std::path::Path;

use graft_quant::Tensor;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::set::{
    HEAD, WHOLE, array_f32, check_each, head_would_change, leaves_head, note_dtypes, read_config,
    refuse_whole,
};
use crate::{ADAPTER_FILE, Adapter, AdapterConfig, AdapterSet, Error, FineTuneType, Kind, Result, peft};

/// The update of one module as it is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredAdapter {
    /// A: (rows, R), or its transpose where `turned`.
    pub a: Tensor,
    /// B: (R, columns), or its transpose where `turned`.
    pub b: Tensor,
    /// A and B lie as PEFT has them.
    pub turned: bool,
    /// s.
    pub scale: f32,
    /// DoRA's m (out,).
    pub magnitude: Option<Tensor>,
}

impl StoredAdapter {
    /// R.
    pub fn rank(&self) -> usize {
        self.a.shape[usize::from(!self.turned)]
    }

    /// The shapes of A and B as [`Adapter`] has them.
    fn shapes(&self) -> [[i32; 2]; 2] {
        [&self.a, &self.b].map(|tensor| {
            let [first, second] = [0, 1].map(|i| i32::try_from(tensor.shape[i]).unwrap_or(i32::MAX));
            if self.turned { [second, first] } else { [first, second] }
        })
    }

    /// Bytes of its arrays in memory, at most. DoRA is held in two forms, since another scale needs A and B as they are.
    pub fn nbytes(&self) -> usize {
        let sides = self.a.len() + self.b.len();
        self.magnitude.as_ref().map_or(4 * sides, |m| 6 * sides + 8 * m.len())
    }

    /// The arrays.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn adapter(&self) -> Result<Adapter> {
        let array = |tensor: &Tensor| -> Result<_> {
            let array = array_f32(tensor)?;
            Ok(if self.turned { array.transpose()?.contiguous()? } else { array })
        };
        let magnitude = self.magnitude.as_ref().map(array_f32).transpose()?;
        Ok(Adapter { a: array(&self.a)?, b: array(&self.b)?, scale: self.scale, magnitude })
    }
}

/// All that an adapter directory holds, as bytes.
#[derive(Debug, Clone)]
pub struct StoredSet {
    /// Low-rank updates by module path.
    pub adapters: BTreeMap<String, StoredAdapter>,
    /// Whole weights by tensor name (`full` fine-tuning only).
    pub weights: BTreeMap<String, Tensor>,
    /// The config.
    pub config: AdapterConfig,
    /// Metadata of the tensor file.
    pub metadata: BTreeMap<String, String>,
}

impl StoredSet {
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

    /// Reads a file of tensors in mlx-lm's form under a given config.
    ///
    /// # Errors
    /// As for [`StoredSet::load`].
    pub fn from_file(file: &Path, config: AdapterConfig) -> Result<Self> {
        let (mut tensors, mut metadata) = graft_quant::read_safetensors(file)?;
        let whole = config.extra(WHOLE).and_then(Value::as_array).into_iter().flatten();
        let whole: Vec<&str> = whole.filter_map(Value::as_str).collect();
        let mut problems = unusable(&tensors);
        let missing = whole.iter().filter(|name| !tensors.contains_key(**name));
        problems.extend(missing.map(|name| format!("{name}: graft.{WHOLE} names it, but the file lacks it")));
        if !problems.is_empty() {
            return Err(Error::Mismatch { file: file.to_path_buf(), problems });
        }
        if config.fine_tune_type == FineTuneType::Full {
            return Ok(Self { adapters: BTreeMap::new(), weights: tensors, config, metadata });
        }
        let weights = whole.into_iter().filter_map(|name| tensors.remove_entry(name)).collect();
        let adapters = collect(file, &tensors, &config)?;
        note_dtypes(&mut metadata, &tensors.iter().map(|(name, t)| (name.clone(), t.dtype)).collect());
        Ok(Self { adapters, weights, config, metadata })
    }

    /// The same as arrays.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn arrays(self) -> Result<AdapterSet> {
        let adapters = self.adapters.iter().map(|(path, stored)| Ok((path.clone(), stored.adapter()?)));
        Ok(AdapterSet {
            adapters: adapters.collect::<Result<_>>()?,
            weights: self.weights,
            config: self.config,
            metadata: self.metadata,
        })
    }

    /// Whether it can be served on a base whose modules are given by shape and kind: each of its own must fit one, and a
    /// `full` fine-tune has no low-rank form.
    ///
    /// # Errors
    /// With all problems.
    pub fn check(&self, origin: &Path, module: impl Fn(&str) -> Option<((i32, i32), Kind)>) -> Result<()> {
        refuse_whole(origin, &self.config, self.weights.keys())?;
        if leaves_head(&self.config, &self.metadata, self.adapters.keys()) && module(HEAD).is_none() {
            return Err(head_would_change(origin));
        }
        let shape = |m: &Tensor| m.shape.iter().map(|n| i32::try_from(*n).unwrap_or(i32::MAX)).collect();
        let each = self
            .adapters
            .iter()
            .map(|(path, stored)| (path.as_str(), stored.shapes(), stored.magnitude.as_ref().map(shape)));
        check_each(origin, each, module)
    }

    /// The largest rank.
    pub fn rank(&self) -> usize {
        self.adapters.values().map(StoredAdapter::rank).max().unwrap_or(0)
    }

    /// Bytes of its arrays in memory.
    pub fn nbytes(&self) -> usize {
        self.adapters.values().map(StoredAdapter::nbytes).sum()
    }

    /// SHA-256 in hex over what decides an answer: paths, scales and tensors, nothing that only describes them.
    pub fn content(&self) -> String {
        let mut hash = Sha256::new();
        let tensor = |hash: &mut Sha256, tensor: &Tensor| {
            hash.update(format!("{:?} {:?} {}\n", tensor.dtype, tensor.shape, tensor.data.len()));
            hash.update(&tensor.data);
        };
        for (path, stored) in &self.adapters {
            let (scale, dora) = (stored.scale.to_bits(), stored.magnitude.is_some());
            // With the length of the path, no two lists are the same bytes.
            hash.update(format!("{} {path} {scale:08x} {} {dora}\n", path.len(), stored.turned));
            [&stored.a, &stored.b].into_iter().chain(&stored.magnitude).for_each(|t| tensor(&mut hash, t));
        }
        for (name, weight) in &self.weights {
            hash.update(format!("{} {name}\n", name.len()));
            tensor(&mut hash, weight);
        }
        crate::fingerprint::hex(&hash.finalize())
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
) -> Result<BTreeMap<String, StoredAdapter>> {
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
        if config.fine_tune_type == FineTuneType::Lora && m.is_some() {
            problems.push(format!("{path}: fine_tune_type is lora, but DoRA's m is there"));
        }
        let (a, b, magnitude) = (a.clone(), b.clone(), m.cloned());
        let stored = StoredAdapter { a, b, turned: false, scale: config.scale_of(path), magnitude };
        adapters.insert(path.to_owned(), stored);
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
