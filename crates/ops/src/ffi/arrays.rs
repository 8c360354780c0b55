//! Arrays from and to plain bytes, for every element type, and ordering without data flow.

use super::{ArrayList, check, eval};
use crate::{Array, Dtype, Exception, Result};

/// The size of one element in bytes.
fn item_size(dtype: Dtype) -> usize {
    match dtype {
        Dtype::Bool | Dtype::Uint8 | Dtype::Int8 => 1,
        Dtype::Uint16 | Dtype::Int16 | Dtype::Float16 | Dtype::Bfloat16 => 2,
        Dtype::Uint32 | Dtype::Int32 | Dtype::Float32 => 4,
        Dtype::Uint64 | Dtype::Int64 | Dtype::Float64 | Dtype::Complex64 => 8,
    }
}

/// An array of `shape` and `dtype` with a copy of `bytes`, which hold the elements in row-major order and the
/// machine's byte order. Fails if the number of bytes does not fit the shape.
pub fn array_from_bytes(bytes: &[u8], shape: &[i32], dtype: Dtype) -> Result<Array> {
    let mut expected = item_size(dtype);
    for &dim in shape {
        let dim = usize::try_from(dim)
            .map_err(|_| Exception::custom(format!("shape {shape:?} has a negative dimension")))?;
        expected = expected
            .checked_mul(dim)
            .ok_or_else(|| Exception::custom(format!("shape {shape:?} is too large for this machine")))?;
    }
    if expected != bytes.len() {
        return Err(Exception::custom(format!(
            "an array of shape {shape:?} and type {dtype:?} takes {expected} bytes, found {}",
            bytes.len()
        )));
    }
    // MLX reads the elements through a typed pointer, so a slice from the middle of a file has to be aligned first.
    let aligned: Vec<u64>;
    let data = if bytes.as_ptr().align_offset(8) == 0 {
        bytes.as_ptr()
    } else {
        let mut words = vec![0u64; bytes.len().div_ceil(8)];
        // SAFETY: the words hold at least as many bytes, and the two buffers are distinct.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), words.as_mut_ptr().cast::<u8>(), bytes.len());
        }
        aligned = words;
        aligned.as_ptr().cast::<u8>()
    };
    // SAFETY: `data` points to exactly the bytes that shape and dtype ask for, aligned for any element type; MLX copies them.
    Ok(unsafe { Array::from_raw_data(data.cast(), shape, dtype) })
}

/// The elements of `array` in row-major order and the machine's byte order. Evaluates the array.
pub fn array_bytes(array: &Array) -> Result<Vec<u8>> {
    if array.size() == 0 {
        return Ok(Vec::new());
    }
    // A byte view of a row-major copy: the same bytes, whatever the element type.
    let bytes = array.reshape(&[-1])?.contiguous()?;
    let bytes = if array.dtype() == Dtype::Bool { bytes } else { bytes.view_dtype(Dtype::Uint8)? };
    eval([&bytes])?;
    // SAFETY: evaluated, row-major, of one-byte elements; the buffer lives as long as `bytes`, and is copied here.
    unsafe {
        let data: *const u8 = if array.dtype() == Dtype::Bool {
            mlx_sys::mlx_array_data_bool(bytes.as_ptr()).cast()
        } else {
            mlx_sys::mlx_array_data_uint8(bytes.as_ptr())
        };
        if data.is_null() {
            return Err(Exception::custom("the array has no data after its evaluation"));
        }
        Ok(std::slice::from_raw_parts(data, bytes.nbytes()).to_vec())
    }
}

/// `arrays` unchanged, but evaluated only after `after`. Gives a graph an order where no value flows.
pub fn depends(arrays: &[Array], after: &[Array]) -> Result<Vec<Array>> {
    let arrays = ArrayList::new(arrays)?;
    let after = ArrayList::new(after)?;
    let mut out = ArrayList::empty();
    // SAFETY: valid lists; `out` receives a list of its own.
    check(|| unsafe { mlx_sys::mlx_depends(out.raw_mut(), arrays.raw(), after.raw()) })?;
    out.to_vec()
}
