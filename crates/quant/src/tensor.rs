//! A tensor as bytes on the host, and whole files of them.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use graft_ops::{Array, Dtype, ffi};
use safetensors::Dtype as StoredDtype;
use safetensors::tensor::TensorView;

use crate::checkpoint::read_header;
use crate::{Error, Result};

/// A tensor's bytes, in the form of a safetensors file.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Element type.
    pub dtype: StoredDtype,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Elements, row-major and little-endian.
    pub data: Vec<u8>,
}

/// MLX's name of an element type, or none where MLX has no such type.
pub(crate) fn mlx_dtype(dtype: StoredDtype) -> Option<Dtype> {
    Some(match dtype {
        StoredDtype::BOOL => Dtype::Bool,
        StoredDtype::U8 => Dtype::Uint8,
        StoredDtype::I8 => Dtype::Int8,
        StoredDtype::U16 => Dtype::Uint16,
        StoredDtype::I16 => Dtype::Int16,
        StoredDtype::F16 => Dtype::Float16,
        StoredDtype::BF16 => Dtype::Bfloat16,
        StoredDtype::U32 => Dtype::Uint32,
        StoredDtype::I32 => Dtype::Int32,
        StoredDtype::F32 => Dtype::Float32,
        StoredDtype::U64 => Dtype::Uint64,
        StoredDtype::I64 => Dtype::Int64,
        StoredDtype::F64 => Dtype::Float64,
        _ => return None,
    })
}

fn stored_dtype(dtype: Dtype) -> Option<StoredDtype> {
    Some(match dtype {
        Dtype::Bool => StoredDtype::BOOL,
        Dtype::Uint8 => StoredDtype::U8,
        Dtype::Int8 => StoredDtype::I8,
        Dtype::Uint16 => StoredDtype::U16,
        Dtype::Int16 => StoredDtype::I16,
        Dtype::Float16 => StoredDtype::F16,
        Dtype::Bfloat16 => StoredDtype::BF16,
        Dtype::Uint32 => StoredDtype::U32,
        Dtype::Int32 => StoredDtype::I32,
        Dtype::Float32 => StoredDtype::F32,
        Dtype::Uint64 => StoredDtype::U64,
        Dtype::Int64 => StoredDtype::I64,
        Dtype::Float64 => StoredDtype::F64,
        Dtype::Complex64 => return None,
    })
}

impl Tensor {
    /// The array with these elements.
    ///
    /// # Errors
    /// When MLX has no such type, or the bytes do not fit the shape.
    pub fn to_array(&self) -> Result<Array> {
        let dtype = mlx_dtype(self.dtype).ok_or_else(|| {
            Error::Request(format!("a tensor of type {:?} has no counterpart in MLX", self.dtype))
        })?;
        let shape: Option<Vec<i32>> = self.shape.iter().map(|&d| i32::try_from(d).ok()).collect();
        let shape = shape.ok_or_else(|| {
            Error::Request(format!("a tensor of shape {:?} is too large for MLX", self.shape))
        })?;
        Ok(ffi::array_from_bytes(&self.data, &shape, dtype)?)
    }

    /// The elements of an array. Evaluates it.
    ///
    /// # Errors
    /// When it cannot be evaluated.
    pub fn from_array(array: &Array) -> Result<Tensor> {
        let dtype = stored_dtype(array.dtype())
            .ok_or_else(|| Error::Request(format!("arrays of type {:?} cannot be stored", array.dtype())))?;
        let shape = array.shape().iter().map(|&d| d as usize).collect();
        Ok(Tensor { dtype, shape, data: ffi::array_bytes(array)? })
    }

    /// The elements as f32, whatever float type they have.
    ///
    /// # Errors
    /// When the type is no float type.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let halves = || self.data.as_chunks::<2>().0.iter();
        Ok(match self.dtype {
            StoredDtype::F32 => self.data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            StoredDtype::F16 => halves().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
            StoredDtype::BF16 => halves().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
            StoredDtype::F64 => {
                self.data.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b) as f32).collect()
            }
            other => return Err(Error::Request(format!("expected a float tensor, found {other:?}"))),
        })
    }

    /// The elements in another float type, named as in a safetensors header, where that holds each of them exactly; as they
    /// are where it does not.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn as_stored(&self, dtype: &str) -> Result<Tensor> {
        let wanted = [StoredDtype::F16, StoredDtype::BF16, StoredDtype::F32].into_iter();
        let Some(dtype) = wanted.into_iter().find(|own| own.to_string() == dtype).and_then(mlx_dtype) else {
            return Ok(self.clone());
        };
        let narrow = Tensor::from_array(&self.to_array()?.as_dtype(dtype)?)?;
        Ok(if narrow.to_f32()? == self.to_f32()? { narrow } else { self.clone() })
    }

    /// How many elements it has.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The tensors and the metadata of a file.
pub type TensorFile = (BTreeMap<String, Tensor>, BTreeMap<String, String>);

/// Reads a whole safetensors file.
///
/// # Errors
/// When it cannot be read, or its header does not describe it.
pub fn read_safetensors(path: &Path) -> Result<TensorFile> {
    let file = File::open(path).map_err(Error::io(path))?;
    let (infos, metadata) = read_header(path, &file, 0)?;
    let mut tensors = BTreeMap::new();
    // One by one, so that no second copy of the file is held.
    for (name, info) in infos {
        let mut data = vec![0; (info.range.end - info.range.start) as usize];
        file.read_exact_at(&mut data, info.range.start).map_err(Error::io(path))?;
        tensors.insert(name, Tensor { dtype: info.dtype, shape: info.shape, data });
    }
    Ok((tensors, metadata))
}

/// What a header says of one tensor: name, type, shape and bytes.
pub(crate) type Entry = (String, StoredDtype, Vec<usize>, u64);

/// The beginning of a safetensors file whose tensors follow in the order of `entries`: length and JSON, with blanks up to
/// `room` bytes in all if it takes fewer.
pub(crate) fn header(entries: &[Entry], metadata: &BTreeMap<String, String>, room: usize) -> Result<Vec<u8>> {
    let mut map = serde_json::Map::new();
    if !metadata.is_empty() {
        map.insert("__metadata__".into(), serde_json::json!(metadata));
    }
    let mut at = 0;
    for (name, dtype, shape, bytes) in entries {
        let value = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [at, at + bytes]});
        map.insert(name.clone(), value);
        at += bytes;
    }
    let mut json = serde_json::to_vec(&map)
        .map_err(|error| Error::Request(format!("cannot describe the tensors: {error}")))?;
    // The data begins at a multiple of eight.
    json.resize(json.len().max(room.saturating_sub(8)).next_multiple_of(8), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend(json);
    Ok(bytes)
}

/// The bytes of a safetensors file with these tensors: the same tensors and metadata always give the same bytes.
///
/// # Errors
/// When a tensor's bytes do not fit its shape.
pub fn safetensors_bytes(
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>> {
    let mut all: Vec<(&String, &Tensor)> = tensors.iter().collect();
    // Wide elements first, so that each tensor is aligned for its type.
    all.sort_by_key(|(name, tensor)| (std::cmp::Reverse(tensor.dtype.bitsize()), *name));
    let mut entries = Vec::with_capacity(all.len());
    for (name, tensor) in &all {
        TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.data)
            .map_err(|error| Error::Request(format!("tensor {name} cannot be stored: {error}")))?;
        entries.push(((*name).clone(), tensor.dtype, tensor.shape.clone(), tensor.data.len() as u64));
    }
    let mut bytes = header(&entries, metadata, 0)?;
    for (_, tensor) in all {
        bytes.extend_from_slice(&tensor.data);
    }
    Ok(bytes)
}
