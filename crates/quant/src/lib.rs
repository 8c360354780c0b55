//! Checkpoints and packed weights: tensors and bytes, no layers.
//!
//! A packed weight W (out, in) keeps `bits` per element and one scale and one bias per `group_size` inputs of a row:
//! `W[o, i] = scales[o, i / group] * code[o, i] + biases[o, i / group]`; in the modes mxfp4, nvfp4 and mxfp8 codes are floats, scales
//! have eight bits and there are no biases. Reading is by position in the file, so that a
//! model of any size takes the memory of the tensors in use; writing is atomic, so that nothing ever holds half a model.

mod checkpoint;
pub mod convert;
mod error;
pub mod gguf;
mod grid;
mod hessian;
mod nearest;
mod quantization;
pub mod recipe;
mod round;
mod tensor;
mod weight;
mod writer;

pub use checkpoint::{Checkpoint, TensorInfo};
pub use error::{Error, Result};
pub use graft_ops::ffi::Mode;
pub use grid::Grid;
pub use hessian::{Hessian, round_compensated};
pub use nearest::{Levels, round_nearest};
pub use quantization::Quantization;
pub use recipe::Recipe;
pub use round::round;
pub use safetensors::Dtype as StoredDtype;
pub use tensor::{Tensor, TensorFile, read_safetensors, safetensors_bytes};
pub use weight::{Packed, Weight};
pub use writer::{DirWriter, Made, check_writable, pretty, write_atomic};
