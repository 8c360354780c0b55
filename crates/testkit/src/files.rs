//! Host tensors and the files of a model directory, written without our own writer.

use std::collections::BTreeMap;
use std::path::Path;

use half::{bf16, f16};
use mlx_rs::Array;
use safetensors::tensor::{Dtype as Stored, SafeTensors, TensorView};

use crate::Dtype;

/// A tensor on the host.
#[derive(Debug, Clone)]
pub(crate) struct Tensor {
    pub(crate) dtype: Stored,
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Vec<u8>,
}

impl Tensor {
    /// Values rounded to `dtype`.
    pub(crate) fn floats(values: &[f32], shape: &[usize], dtype: Dtype) -> Self {
        let (stored, data) = match dtype {
            Dtype::F32 => (Stored::F32, values.iter().flat_map(|v| v.to_le_bytes()).collect()),
            Dtype::F16 => {
                (Stored::F16, values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect())
            }
            Dtype::Bf16 => {
                (Stored::BF16, values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect())
            }
        };
        Self { dtype: stored, shape: shape.to_vec(), data }
    }

    /// Packed words.
    pub(crate) fn words(values: &[u32], shape: &[usize]) -> Self {
        let data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { dtype: Stored::U32, shape: shape.to_vec(), data }
    }

    /// Bytes, such as scales of eight bits.
    pub(crate) fn bytes(data: Vec<u8>, shape: &[usize]) -> Self {
        Self { dtype: Stored::U8, shape: shape.to_vec(), data }
    }

    /// Packed words, as [`Tensor::words`] takes them.
    pub(crate) fn to_words(&self) -> Vec<u32> {
        self.data.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    /// The values of a float tensor.
    pub(crate) fn to_f32(&self) -> Vec<f32> {
        let pairs = || self.data.chunks_exact(2).map(|b| [b[0], b[1]]);
        match self.dtype {
            Stored::F32 => {
                self.data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
            Stored::F16 => pairs().map(|b| f16::from_le_bytes(b).to_f32()).collect(),
            Stored::BF16 => pairs().map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
            other => panic!("{other:?} is not a float type"),
        }
    }

    /// An f32 array of a float tensor, a u32 array of packed words.
    pub(crate) fn to_array(&self) -> Array {
        let shape: Vec<i32> = self.shape.iter().map(|n| *n as i32).collect();
        if self.dtype == Stored::U32 {
            return Array::from_slice(&self.to_words(), &shape);
        }
        Array::from_slice(&self.to_f32(), &shape)
    }
}

/// Tensors by name.
pub(crate) type Tensors = BTreeMap<String, Tensor>;

/// Writes one safetensors file as MLX does (`format: mlx`).
pub(crate) fn write_safetensors(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, t)| {
        (name, TensorView::new(t.dtype, t.shape.clone(), &t.data).expect("a tensor of its size"))
    });
    let metadata = [("format".to_owned(), "mlx".to_owned())].into_iter().collect();
    let bytes = safetensors::serialize(views, Some(metadata)).expect("serializable tensors");
    std::fs::write(path, bytes).expect("a writable directory");
}

/// Reads one safetensors file.
pub(crate) fn read_safetensors(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let tensor =
        |v: TensorView| Tensor { dtype: v.dtype(), shape: v.shape().to_vec(), data: v.data().to_vec() };
    file.iter().map(|(name, view)| (name.to_owned(), tensor(view))).collect()
}

/// Writes pretty JSON.
pub(crate) fn write_json(path: &Path, value: &serde_json::Value) {
    let text = serde_json::to_string_pretty(value).expect("serializable JSON");
    std::fs::write(path, text + "\n").expect("a writable directory");
}

/// Reads JSON.
pub(crate) fn read_json(path: &Path) -> serde_json::Value {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}
