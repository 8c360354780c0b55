//! Products with packed weights, which stay packed.

use mlx_rs::ops;

#[cfg(graft_cpu)]
use crate::cpu::{
    dense::DenseMatmul,
    packed::{Layout, Lookup, Matmul},
    primitive::apply_one,
};
use crate::ffi::{self, Mode};
#[cfg(graft_cpu)]
use crate::form::{on_cpu, precision};
use crate::{Array, Dtype, Exception, Result};

/// Affine packed weights W (out, in), as MLX stores them: in group g of row o, W = scales[o, g] * code + biases[o, g].
#[derive(Clone, Copy)]
pub struct PackedRef<'a> {
    /// (out, in * bits / 32) u32: codes of `bits` bits, a little-endian bit stream by row.
    pub codes: &'a Array,
    /// (out, in / group_size) f32, f16 or bf16.
    pub scales: &'a Array,
    /// The same shape and type as `scales`.
    pub biases: &'a Array,
    /// Inputs that share a scale and a bias: 32, 64 or 128.
    pub group_size: i32,
    /// 2, 3, 4, 5, 6 or 8.
    pub bits: i32,
}

impl PackedRef<'_> {
    /// (out, in). Fails if the parts do not belong together.
    pub(crate) fn shape(&self) -> Result<(i32, i32)> {
        let wrong = |what: String| Err(Exception::custom(format!("packed weights: {what}")));
        let (codes, scales, biases) = (self.codes.shape(), self.scales.shape(), self.biases.shape());
        let (&[out, words], &[scale_rows, groups]) = (codes, scales) else {
            return wrong(format!(
                "codes and scales must have two dimensions, found {codes:?} and {scales:?}"
            ));
        };
        if !matches!(self.bits, 2 | 3 | 4 | 5 | 6 | 8) || !matches!(self.group_size, 32 | 64 | 128) {
            return wrong(format!(
                "{} bits in groups of {} are not supported (2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128)",
                self.bits, self.group_size
            ));
        }
        if self.codes.dtype() != Dtype::Uint32 {
            return wrong(format!("codes must be uint32, found {:?}", self.codes.dtype()));
        }
        let float = matches!(self.scales.dtype(), Dtype::Float32 | Dtype::Float16 | Dtype::Bfloat16);
        if !float || self.biases.dtype() != self.scales.dtype() {
            return wrong(format!(
                "scales and biases must share one float type, found {:?} and {:?}",
                self.scales.dtype(),
                self.biases.dtype()
            ));
        }
        let inputs = groups * self.group_size;
        if scale_rows != out
            || biases != scales
            || i64::from(words) * 32 != i64::from(inputs) * i64::from(self.bits)
        {
            return wrong(format!(
                "codes {codes:?}, scales {scales:?} and biases {biases:?} do not fit {} bits in groups of {}",
                self.bits, self.group_size
            ));
        }
        Ok((out, inputs))
    }
}

fn check_last(name: &str, x: &Array, expected: i32) -> Result<()> {
    match x.shape().last() {
        Some(&found) if found == expected => Ok(()),
        _ => Err(Exception::custom(format!(
            "{name}: the last dimension must be {expected}, found shape {:?}",
            x.shape()
        ))),
    }
}

/// y = x W^T for x (..., in): (..., out), in the type of x. Differentiable in x.
pub fn packed_matmul(x: &Array, w: PackedRef) -> Result<Array> {
    let (_, inputs) = w.shape()?;
    check_last("packed matmul", x, inputs)?;
    #[cfg(graft_cpu)]
    if on_cpu(&[x]) {
        return Matmul { layout: Layout::of(w)?, transposed: false, precision: precision() }
            .apply(x, w.codes, w.scales, w.biases);
    }
    mlx_matmul(x, w, true)
}

/// y = x W for x (..., out): (..., in), in the type of x. Differentiable in x.
pub fn packed_matmul_t(x: &Array, w: PackedRef) -> Result<Array> {
    let (outputs, _) = w.shape()?;
    check_last("transposed packed matmul", x, outputs)?;
    #[cfg(graft_cpu)]
    if on_cpu(&[x]) {
        return Matmul { layout: Layout::of(w)?, transposed: true, precision: precision() }
            .apply(x, w.codes, w.scales, w.biases);
    }
    mlx_matmul(x, w, false)
}

fn mlx_matmul(x: &Array, w: PackedRef, transpose: bool) -> Result<Array> {
    let y = ops::quantized_matmul(x, w.codes, w.scales, w.biases, transpose, w.group_size, w.bits)?;
    // MLX promotes over x and the scales, which need not have x's type.
    if y.dtype() == x.dtype() { Ok(y) } else { y.as_dtype(x.dtype()) }
}

/// y = x W^T for dense W (out, in) and x (..., in): (..., out), in the type of x. Differentiable in both.
pub fn dense_matmul(x: &Array, w: &Array) -> Result<Array> {
    let &[_, inputs] = w.shape() else {
        return Err(Exception::custom(format!(
            "matmul: the weight must be (out, in), found {:?}",
            w.shape()
        )));
    };
    check_last("matmul", x, inputs)?;
    #[cfg(graft_cpu)]
    if on_cpu(&[x, w]) {
        return DenseMatmul { transposed: false, precision: precision() }.apply(x, w);
    }
    ops::matmul(x, w.transpose()?)
}

/// y = x W for dense W (out, in) and x (..., out): (..., in), in the type of x. Differentiable in both.
pub fn dense_matmul_t(x: &Array, w: &Array) -> Result<Array> {
    let &[outputs, _] = w.shape() else {
        return Err(Exception::custom(format!(
            "matmul: the weight must be (out, in), found {:?}",
            w.shape()
        )));
    };
    check_last("transposed matmul", x, outputs)?;
    #[cfg(graft_cpu)]
    if on_cpu(&[x, w]) {
        return DenseMatmul { transposed: true, precision: precision() }.apply(x, w);
    }
    ops::matmul(x, w)
}

/// Rows `ids` (N,) of W as (N, in) in `dtype`. An id outside 0..out is undefined in the MLX form, zero in ours.
pub fn packed_rows(ids: &Array, w: PackedRef, dtype: Dtype) -> Result<Array> {
    w.shape()?;
    if ids.ndim() != 1 {
        return Err(Exception::custom(format!(
            "packed rows: ids must have one dimension, found {:?}",
            ids.shape()
        )));
    }
    #[cfg(graft_cpu)]
    if on_cpu(&[]) && dtype == Dtype::Float32 && ids.dtype() == Dtype::Int32 {
        let layout = Layout::of(w)?;
        let shape = [ids.dim(0), layout.inputs as i32];
        return apply_one(Lookup { layout }, &[ids, w.codes, w.scales, w.biases], &shape, dtype);
    }
    let codes = w.codes.take_axis(ids, 0)?;
    // In the scales' own type MLX would round each product to it, also where more is wanted.
    let scales = w.scales.take_axis(ids, 0)?.as_dtype(Dtype::Float32)?;
    let biases = w.biases.take_axis(ids, 0)?.as_dtype(Dtype::Float32)?;
    ffi::dequantize(&codes, &scales, Some(&biases), w.group_size, w.bits, Mode::Affine, dtype)
}
