//! MLX's quantization in every mode and with the result's type chosen; mlx-rs knows only the affine mode.

use std::ffi::CStr;

use super::{ArrayList, array_from, check, stream};
use crate::{Array, Dtype, Result};

/// How packed weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Codes times a scale plus a bias by group.
    Affine,
    /// 4-bit floats, groups of 32 with a power of two.
    Mxfp4,
    /// 8-bit floats, groups of 32 with a power of two.
    Mxfp8,
    /// 4-bit floats, groups of 16 with an 8-bit float.
    Nvfp4,
}

impl Mode {
    /// All of them.
    pub const ALL: [Mode; 4] = [Mode::Affine, Mode::Mxfp4, Mode::Nvfp4, Mode::Mxfp8];

    /// MLX's name of it.
    pub fn name(self) -> &'static str {
        self.c_name().to_str().unwrap_or_default()
    }

    /// The mode of that name.
    pub fn from_name(name: &str) -> Option<Mode> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }

    /// The bits and the group size of a mode that has one of each only.
    pub const fn fixed(self) -> Option<(i32, i32)> {
        match self {
            Mode::Affine => None,
            Mode::Mxfp4 => Some((4, 32)),
            Mode::Mxfp8 => Some((8, 32)),
            Mode::Nvfp4 => Some((4, 16)),
        }
    }

    fn c_name(self) -> &'static CStr {
        match self {
            Mode::Affine => c"affine",
            Mode::Mxfp4 => c"mxfp4",
            Mode::Mxfp8 => c"mxfp8",
            Mode::Nvfp4 => c"nvfp4",
        }
    }
}

fn some(value: i32) -> mlx_sys::mlx_optional_int {
    mlx_sys::mlx_optional_int { value, has_value: true }
}

fn no_array() -> Array {
    // SAFETY: an empty handle, which MLX takes as "none".
    unsafe { Array::from_ptr(mlx_sys::mlx_array_new()) }
}

/// Rounds `w` (out, in) to `bits` with one scale (and bias) per `group_size` inputs: codes, scales and, in the affine mode, biases.
pub fn quantize(w: &Array, group_size: i32, bits: i32, mode: Mode) -> Result<Vec<Array>> {
    let mut out = ArrayList::empty();
    let (global_scale, stream) = (no_array(), stream());
    // SAFETY: valid handles; `out` receives a list of its own.
    check(|| unsafe {
        mlx_sys::mlx_quantize(
            out.raw_mut(),
            w.as_ptr(),
            some(group_size),
            some(bits),
            mode.c_name().as_ptr(),
            global_scale.as_ptr(),
            stream.as_ptr(),
        )
    })?;
    out.to_vec()
}

/// The dense (out, in) weights of packed ones, in `dtype`.
pub fn dequantize(
    codes: &Array,
    scales: &Array,
    biases: Option<&Array>,
    group_size: i32,
    bits: i32,
    mode: Mode,
    dtype: Dtype,
) -> Result<Array> {
    let (none, stream) = (no_array(), stream());
    // SAFETY: valid handles, an empty one where there are no biases.
    array_from(|out| unsafe {
        mlx_sys::mlx_dequantize(
            out,
            codes.as_ptr(),
            scales.as_ptr(),
            biases.unwrap_or(&none).as_ptr(),
            some(group_size),
            some(bits),
            mode.c_name().as_ptr(),
            none.as_ptr(),
            mlx_sys::mlx_optional_dtype { value: dtype.into(), has_value: true },
            stream.as_ptr(),
        )
    })
}

/// `x W^T` (`transpose`) or `x W` with packed W (out, in), in any mode.
pub fn quantized_matmul(
    x: &Array,
    codes: &Array,
    scales: &Array,
    biases: Option<&Array>,
    transpose: bool,
    grid: (i32, i32),
    mode: Mode,
) -> Result<Array> {
    let (none, stream) = (no_array(), stream());
    let (group_size, bits) = grid;
    // SAFETY: valid handles, an empty one where there are no biases.
    array_from(|out| unsafe {
        mlx_sys::mlx_quantized_matmul(
            out,
            x.as_ptr(),
            codes.as_ptr(),
            scales.as_ptr(),
            biases.unwrap_or(&none).as_ptr(),
            transpose,
            some(group_size),
            some(bits),
            mode.c_name().as_ptr(),
            stream.as_ptr(),
        )
    })
}
