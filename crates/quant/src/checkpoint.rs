//! A model directory, read tensor by tensor.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use graft_ops::{Array, Dtype};
use safetensors::Dtype as StoredDtype;
use safetensors::tensor::Metadata;
use serde_json::{Map, Value};

use crate::convert::{config_dtype, dtype_from_name, dtype_name, is_float};
use crate::tensor::mlx_dtype;
use crate::{Error, Grid, Packed, Quantization, Result, Tensor, Weight};

/// Where a tensor stands and what it is.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    /// Element type.
    pub dtype: StoredDtype,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Index into [`Checkpoint::files`].
    pub file: usize,
    /// Its bytes in that file.
    pub range: Range<u64>,
}

/// An open model directory: config.json and the headers of its safetensors files.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: Map<String, Value>,
    quantization: Quantization,
    files: Vec<(PathBuf, File)>,
    tensors: BTreeMap<String, TensorInfo>,
}

/// The longest header the format allows.
const MAX_HEADER: u64 = 100_000_000;

impl Checkpoint {
    /// Opens a directory: reads config.json and every header, and checks that the headers describe the files.
    ///
    /// # Errors
    /// When a file is missing, truncated or lies about its contents.
    pub fn open(dir: &Path) -> Result<Checkpoint> {
        let missing = |what: &str, hint: &str| Error::Missing {
            dir: dir.to_path_buf(),
            what: what.into(),
            hint: hint.into(),
        };
        if !dir.is_dir() {
            return Err(missing("the directory itself", "give the path of a model directory"));
        }
        let config_file = dir.join("config.json");
        if !config_file.is_file() {
            return Err(missing("config.json", "a model directory holds config.json and model*.safetensors"));
        }
        let config = read_object(&config_file)?;
        let quantization = Quantization::from_config(&config_file, &config)?;
        let paths = shard_files(dir)?;
        if paths.is_empty() {
            return Err(missing("model*.safetensors", "give a directory with weights in safetensors form"));
        }
        let mut files = Vec::new();
        let mut tensors: BTreeMap<String, TensorInfo> = BTreeMap::new();
        for path in paths {
            let file = File::open(&path).map_err(Error::io(&path))?;
            for (name, info) in read_header(&path, &file, files.len())?.0 {
                if let Some(other) = tensors.get(&name) {
                    return Err(Error::Damaged {
                        file: path,
                        what: format!(
                            "tensor {name} is also in {}",
                            files.get(other.file).map_or_else(
                                || "the same file".to_owned(),
                                |(first, _): &(PathBuf, File)| first.display().to_string(),
                            )
                        ),
                    });
                }
                tensors.insert(name, info);
            }
            files.push((path, file));
        }
        check_index(dir, &tensors)?;
        Ok(Checkpoint { dir: dir.to_path_buf(), config, quantization, files, tensors })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// config.json.
    pub fn config(&self) -> &Map<String, Value> {
        &self.config
    }

    /// The config's quantization block.
    pub fn quantization(&self) -> &Quantization {
        &self.quantization
    }

    /// The safetensors files.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|(path, _)| path.as_path())
    }

    /// The type that config.json names, under its old name or the one of today, else that of the scales, else that of the
    /// floats.
    pub fn stored_dtype(&self) -> Option<StoredDtype> {
        let named = ["torch_dtype", "dtype"].iter().find_map(|key| self.config.get(*key)?.as_str());
        let of = |(_, info): (&String, &TensorInfo)| Some(info.dtype).filter(|dtype| is_float(*dtype));
        let scales = || self.tensors.iter().filter(|(name, _)| name.ends_with(".scales")).find_map(of);
        named.and_then(dtype_from_name).or_else(scales).or_else(|| self.tensors.iter().find_map(of))
    }

    /// All tensor names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.tensors.keys()
    }

    /// What a tensor is.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// Reads a tensor's bytes.
    ///
    /// # Errors
    /// When there is none of that name, or reading fails.
    pub fn read(&self, name: &str) -> Result<Tensor> {
        let info =
            self.tensors.get(name).ok_or_else(|| self.tensor_error(name, "to be there", "no such tensor"))?;
        let (path, file) = &self.files[info.file];
        let mut data = vec![0; (info.range.end - info.range.start) as usize];
        file.read_exact_at(&mut data, info.range.start).map_err(Error::io(path))?;
        Ok(Tensor { dtype: info.dtype, shape: info.shape.clone(), data })
    }

    /// A tensor as an array.
    ///
    /// # Errors
    /// As [`Checkpoint::read`], and when MLX has no such type.
    pub fn array(&self, name: &str) -> Result<Array> {
        self.read(name)?
            .to_array()
            .map_err(|error| self.tensor_error(name, "a type that MLX has", &error.to_string()))
    }

    /// The type of floats that are not packed: config.json's, else that of the first; BF16 where there are none.
    pub fn float_type(&self) -> StoredDtype {
        let usual = |dtype: &StoredDtype| dtype_name(*dtype).is_some();
        let stored = || self.tensors.values().map(|info| info.dtype).find(usual);
        config_dtype(&self.config).or_else(stored).unwrap_or(StoredDtype::BF16)
    }

    /// [`Checkpoint::float_type`] as arrays have it.
    pub fn float_dtype(&self) -> Dtype {
        mlx_dtype(self.float_type()).unwrap_or(Dtype::Bfloat16)
    }

    /// How the weight of module `path` is packed; none if it is dense.
    ///
    /// # Errors
    /// When its parts do not fit together, or config.json has no quantization block that explains them.
    pub fn grid(&self, path: &str) -> Result<Option<Grid>> {
        let weight = format!("{path}.weight");
        let Some(scales) = self.tensors.get(&format!("{path}.scales")) else {
            return match self.tensors.get(&weight) {
                Some(info) if info.dtype == StoredDtype::U32 => Err(self.tensor_error(
                    &format!("{path}.scales"),
                    "scales beside the packed weight",
                    "nothing",
                )),
                _ => Ok(None),
            };
        };
        let info = self
            .tensors
            .get(&weight)
            .ok_or_else(|| self.tensor_error(&weight, "to be there", "only scales"))?;
        let (&[_, words], &[_, groups]) = (&info.shape[..], &scales.shape[..]) else {
            let found = format!("{:?} and {:?}", info.shape, scales.shape);
            return Err(self.tensor_error(&weight, "a matrix of codes and a matrix of scales", &found));
        };
        let bytes = scales.dtype == StoredDtype::U8;
        let said = match self.quantization.paths.get(path) {
            Some(Some(own)) => Some(*own),
            _ => None,
        };
        let grid = match said {
            Some(own) => own.matches(words, groups).then_some(own),
            None if self.quantization.default.is_none() => {
                return Err(Error::Config {
                    file: self.dir.join("config.json"),
                    field: "quantization".into(),
                    expected: format!("group_size and bits, since {weight} is packed"),
                    found: "nothing".into(),
                });
            }
            None => Grid::infer(words, groups, bytes, self.quantization.default),
        };
        let grid = grid.ok_or_else(|| {
            let wanted = said.or(self.quantization.default);
            let expected = wanted.map_or_else(|| "a grid that exists".into(), |grid| grid.to_string());
            let found = format!("{words} words and {groups} scales ({:?}) in a row", scales.dtype);
            self.tensor_error(&weight, &expected, &found)
        })?;
        let biases = self.tensors.get(&format!("{path}.biases"));
        if bytes != grid.is_float() || !bytes && !is_float(scales.dtype) {
            let expected = if grid.is_float() { "U8" } else { "F16, BF16 or F32" };
            return Err(self.tensor_error(
                &format!("{path}.scales"),
                &format!("{expected} for {grid}"),
                &format!("{:?}", scales.dtype),
            ));
        }
        let fits = match biases {
            None => grid.is_float(),
            Some(biases) => !grid.is_float() && biases.shape == scales.shape && biases.dtype == scales.dtype,
        };
        if info.shape[0] != scales.shape[0] || !fits {
            let rows = info.shape[0];
            return Err(self.tensor_error(
                &format!("{path}.biases"),
                &if grid.is_float() {
                    format!("codes and scales of {rows} rows and no biases for {grid}")
                } else {
                    format!("codes, scales and biases of {rows} rows, the last two of one type")
                },
                &format!(
                    "scales {:?} {:?}, biases {:?}",
                    scales.dtype,
                    scales.shape,
                    biases.map(|biases| (biases.dtype, &biases.shape))
                ),
            ));
        }
        Ok(Some(grid))
    }

    /// The weight of module `path`, dense or packed, not yet evaluated.
    ///
    /// # Errors
    /// As [`Checkpoint::grid`] and [`Checkpoint::read`].
    pub fn weight(&self, path: &str) -> Result<Weight> {
        let array = |part: &str| self.array(&format!("{path}.{part}"));
        match self.grid(path)? {
            None => Ok(Weight::Dense(array("weight")?)),
            Some(grid) => {
                let biases = (!grid.is_float()).then(|| array("biases")).transpose()?;
                Ok(Weight::Packed(Packed { codes: array("weight")?, scales: array("scales")?, biases, grid }))
            }
        }
    }

    /// The logical shape (out, in) of every matrix `<path>.weight`, packed or not, by path. Broken ones are left out:
    /// reading them says what is wrong.
    pub fn module_shapes(&self) -> BTreeMap<String, (usize, usize)> {
        let mut shapes = BTreeMap::new();
        for (name, info) in &self.tensors {
            let (Some(path), &[out, columns]) = (name.strip_suffix(".weight"), &info.shape[..]) else {
                continue;
            };
            match self.grid(path) {
                Ok(None) => shapes.insert(path.to_owned(), (out, columns)),
                Ok(Some(grid)) => shapes.insert(path.to_owned(), (out, grid.inputs(columns).unwrap_or(0))),
                Err(_) => None,
            };
        }
        shapes
    }

    fn tensor_error(&self, name: &str, expected: &str, found: &str) -> Error {
        let file = self.tensors.get(name).map_or(&self.dir, |info| &self.files[info.file].0);
        Error::Tensor {
            file: file.clone(),
            name: name.to_owned(),
            expected: expected.to_owned(),
            found: found.to_owned(),
        }
    }
}

/// Reads a JSON file that must hold an object.
pub(crate) fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::Config {
            file: path.to_path_buf(),
            field: "(whole file)".into(),
            expected: "an object".into(),
            found: "another JSON value".into(),
        }),
        Err(source) => Err(Error::Json { path: path.to_path_buf(), source }),
    }
}

/// `model*.safetensors`, sorted: mlx-lm goes by this pattern too and does not consult the index.
fn shard_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with("model") && name.ends_with(".safetensors") {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// What a header says: the tensors, and the metadata beside them.
type Header = (Vec<(String, TensorInfo)>, BTreeMap<String, String>);

/// The header of one file, after a check against its size.
pub(crate) fn read_header(path: &Path, file: &File, index: usize) -> Result<Header> {
    let damaged = |what: String| Error::Damaged { file: path.to_path_buf(), what };
    let size = file.metadata().map_err(Error::io(path))?.len();
    if size < 8 {
        return Err(damaged(format!("{size} bytes are too few for a safetensors file")));
    }
    let mut head = vec![0; 8];
    file.read_exact_at(&mut head, 0).map_err(Error::io(path))?;
    let length = head.iter().rev().fold(0u64, |n, &byte| (n << 8) | u64::from(byte));
    if length > MAX_HEADER || length + 8 > size {
        return Err(damaged(format!("its header claims {length} bytes, the file has {size}")));
    }
    head.resize(8 + length as usize, 0);
    file.read_exact_at(&mut head, 0).map_err(Error::io(path))?;
    let header: Metadata =
        serde_json::from_slice(&head[8..]).map_err(|error| damaged(format!("its header: {error}")))?;
    let start = 8 + length;
    if start + header.data_len() as u64 != size {
        return Err(damaged(format!(
            "its header describes {} bytes of tensors, the file holds {}",
            header.data_len(),
            size - start
        )));
    }
    let mut tensors = Vec::new();
    for (name, info) in header.tensors() {
        let (from, to) = info.data_offsets;
        let range = start + from as u64..start + to as u64;
        tensors.push((name, TensorInfo { dtype: info.dtype, shape: info.shape.clone(), file: index, range }));
    }
    let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
    Ok((tensors, metadata))
}

/// An index that names a shard or tensor which is not there means that the download stopped half-way.
fn check_index(dir: &Path, tensors: &BTreeMap<String, TensorInfo>) -> Result<()> {
    let path = dir.join("model.safetensors.index.json");
    if !path.is_file() {
        return Ok(());
    }
    let index = read_object(&path)?;
    let Some(Value::Object(map)) = index.get("weight_map") else { return Ok(()) };
    let absent: BTreeSet<&str> = map
        .iter()
        .filter(|(name, _)| !tensors.contains_key(*name))
        .filter_map(|(_, file)| file.as_str())
        .filter(|file| !dir.join(file).is_file())
        .collect();
    if absent.is_empty() {
        return Ok(());
    }
    Err(Error::Missing {
        dir: dir.to_path_buf(),
        what: absent.into_iter().collect::<Vec<_>>().join(", "),
        hint: "model.safetensors.index.json names it: the download is not complete".into(),
    })
}
