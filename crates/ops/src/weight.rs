//! Weights W (out, in) of a linear, dense or packed, and the products with them.

use mlx_rs::ops;

#[cfg(graft_cpu)]
use crate::cpu::{
    packed::Layout,
    panels::{self, Arrangement},
    weights::{Lookup, Product},
};
use crate::ffi::{self, Mode};
#[cfg(graft_cpu)]
use crate::form::on_cpu;
use crate::{Array, Dtype, Exception, Result, form, precision};

/// Packed weights W (out, in), as MLX stores them: in group g of row o, W = scales[o, g] * code + biases[o, g] for codes that are
/// whole numbers ([`Mode::Affine`]), or W = scales[o, g] * code for codes that are floats of four or eight bits (the other modes).
#[derive(Clone, Copy)]
pub struct PackedRef<'a> {
    /// (out, in * bits / 32) u32: codes of `bits` bits, a little-endian bit stream by row.
    pub codes: &'a Array,
    /// (out, in / group_size) f32, f16 or bf16; of the modes of floats u8.
    pub scales: &'a Array,
    /// The same shape and type as `scales`; only the affine mode has them.
    pub biases: Option<&'a Array>,
    /// Inputs that share a scale and a bias: 32, 64 or 128, or the mode's own.
    pub group_size: i32,
    /// 2, 3, 4, 5, 6 or 8, or the mode's own.
    pub bits: i32,
    /// What codes and scales are.
    pub mode: Mode,
}

impl<'a> PackedRef<'a> {
    /// (out, in). Fails if the parts do not belong together.
    fn shape(&self) -> Result<(i32, i32)> {
        let wrong = |what: String| Err(Exception::custom(format!("packed weights: {what}")));
        let (codes, scales) = (self.codes.shape(), self.scales.shape());
        let (&[out, words], &[scale_rows, groups]) = (codes, scales) else {
            return wrong(format!(
                "codes and scales must have two dimensions, found {codes:?} and {scales:?}"
            ));
        };
        let own = (self.bits, self.group_size);
        match self.mode.fixed() {
            Some(fixed) if own != fixed => {
                let (found, mode) = (format!("{} bits in groups of {}", own.0, own.1), self.mode.name());
                return wrong(format!("{mode} has {} bits in groups of {}, found {found}", fixed.0, fixed.1));
            }
            None if !matches!(self.bits, 2 | 3 | 4 | 5 | 6 | 8)
                || !matches!(self.group_size, 32 | 64 | 128) =>
            {
                return wrong(format!(
                    "{} bits in groups of {} are not supported (2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128)",
                    self.bits, self.group_size
                ));
            }
            _ => {}
        }
        if self.codes.dtype() != Dtype::Uint32 {
            return wrong(format!("codes must be uint32, found {:?}", self.codes.dtype()));
        }
        let (kind, biases) = (self.scales.dtype(), self.biases.map(Array::dtype));
        let float = matches!(kind, Dtype::Float32 | Dtype::Float16 | Dtype::Bfloat16);
        if self.mode == Mode::Affine && (!float || biases != Some(kind)) {
            return wrong(format!(
                "scales and biases must share one float type, found {kind:?} and {biases:?}"
            ));
        }
        if self.mode != Mode::Affine && (kind != Dtype::Uint8 || biases.is_some()) {
            let mode = self.mode.name();
            return wrong(format!("{mode} has scales of uint8 and no biases, found {kind:?} and {biases:?}"));
        }
        let inputs = groups * self.group_size;
        if scale_rows != out
            || self.biases.is_some_and(|biases| biases.shape() != scales)
            || i64::from(words) * 32 != i64::from(inputs) * i64::from(self.bits)
        {
            return wrong(format!(
                "codes {codes:?}, scales {scales:?} and biases {:?} do not fit {} bits in groups of {}",
                self.biases.map(Array::shape),
                self.bits,
                self.group_size
            ));
        }
        Ok((out, inputs))
    }

    /// Codes, scales and, where there are any, biases.
    pub fn arrays(&self) -> impl Iterator<Item = &'a Array> + use<'a> {
        [self.codes, self.scales].into_iter().chain(self.biases)
    }
}

/// W (out, in) of packed weights in `dtype`, computed in f32 and rounded once: MLX's own operation, whatever the form.
pub fn dequantize(w: PackedRef, dtype: Dtype) -> Result<Array> {
    w.shape()?;
    let (scales, biases) =
        (wide(w.scales, w.mode)?, w.biases.map(|biases| wide(biases, w.mode)).transpose()?);
    ffi::dequantize(w.codes, &scales, biases.as_ref(), w.group_size, w.bits, w.mode, Dtype::Float32)?
        .as_dtype(dtype)
}

/// Packed weights W (out, in) in the layout that our CPU products of [`crate::Precision::Int16`] read. Made by [`arrange`].
#[derive(Debug, Clone)]
pub struct Arranged {
    /// Codes, scales and, in the affine mode, biases.
    parts: Vec<Array>,
    shape: (i32, i32),
    #[cfg(graft_cpu)]
    pub(crate) arrangement: Arrangement,
}

impl Arranged {
    /// (out, in)
    pub fn shape(&self) -> (i32, i32) {
        self.shape
    }

    /// The arrays, for evaluation and for counting bytes.
    pub fn arrays(&self) -> &[Array] {
        &self.parts
    }
}

/// W laid out anew, if that pays here: our CPU form, the precision [`crate::Precision::Int16`], a processor that multiplies
/// bytes. The result takes as much memory, or somewhat more where W has 2, 3, 5 or 6 bits; W is not needed any more. Floats of
/// eight bits are no whole numbers of a byte and stay as they are; so do rows that are not whole blocks of 32.
pub fn arrange(w: PackedRef) -> Result<Option<Arranged>> {
    let shape = w.shape()?;
    #[cfg(graft_cpu)]
    if w.mode != Mode::Mxfp8
        && shape.1 % panels::BLOCK as i32 == 0
        && form() == crate::Form::Cpu
        && precision() == crate::Precision::Int16
        && panels::pays()
    {
        let layout = Layout::new(w, shape);
        let (parts, arrangement) = (panels::arrange(w, layout)?, Arrangement::of(layout));
        return Ok(Some(Arranged { parts, shape, arrangement }));
    }
    let _ = (shape, form(), precision());
    Ok(None)
}

/// W (out, in) in any of its forms.
#[derive(Clone, Copy)]
pub enum WeightRef<'a> {
    /// Of any float type.
    Dense(&'a Array),
    /// Packed.
    Packed(PackedRef<'a>),
    /// Packed, laid out for inference.
    Arranged(&'a Arranged),
}

impl<'a> WeightRef<'a> {
    /// (out, in), neither of them 0. Fails if the parts do not belong together.
    pub fn shape(&self) -> Result<(i32, i32)> {
        let (out, inputs) = match self {
            WeightRef::Packed(w) => w.shape()?,
            WeightRef::Arranged(w) => w.shape,
            WeightRef::Dense(w) => match w.shape() {
                &[out, inputs] => (out, inputs),
                other => {
                    return Err(Exception::custom(format!("a weight must be (out, in), found {other:?}")));
                }
            },
        };
        if out == 0 || inputs == 0 {
            return Err(Exception::custom(format!(
                "a weight must be (out, in) with at least 1 of each, found ({out}, {inputs})"
            )));
        }
        Ok((out, inputs))
    }

    /// The arrays that it is made of.
    #[cfg(graft_cpu)]
    pub(crate) fn arrays(&self) -> Vec<&'a Array> {
        match *self {
            WeightRef::Dense(w) => vec![w],
            WeightRef::Packed(w) => w.arrays().collect(),
            WeightRef::Arranged(w) => w.parts.iter().collect(),
        }
    }

    /// Whether products of x with it take our CPU form.
    #[cfg(graft_cpu)]
    pub(crate) fn on_cpu(&self, x: &Array) -> bool {
        match self {
            WeightRef::Dense(w) => on_cpu(&[x, w]),
            WeightRef::Packed(_) => on_cpu(&[x]),
            WeightRef::Arranged(_) => x.dtype() == Dtype::Float32,
        }
    }
}

/// Weights laid out for our CPU operations have no other.
fn not_here() -> Exception {
    Exception::custom("weights laid out for our CPU operations take f32 activations only")
}

pub(crate) fn check_last(name: &str, x: &Array, expected: i32) -> Result<()> {
    match x.shape().last() {
        Some(&found) if found == expected => Ok(()),
        _ => {
            let found = x.shape();
            Err(Exception::custom(format!(
                "{name}: the last dimension must be {expected}, found shape {found:?}"
            )))
        }
    }
}

/// y = x W^T for x (..., in): (..., out), in the type of x. Differentiable in x, and in W where it is dense. With
/// [`crate::Precision::Int16`] arranged weights round x to 16 bits by blocks of 32.
pub fn matmul(x: &Array, w: WeightRef) -> Result<Array> {
    check_last("matmul", x, w.shape()?.1)?;
    #[cfg(graft_cpu)]
    if w.on_cpu(x) {
        return Product::new(w, false)?.apply(x, &w.arrays());
    }
    match w {
        WeightRef::Dense(w) => ops::matmul(x, w.transpose()?),
        WeightRef::Packed(w) => mlx_matmul(x, w, true),
        WeightRef::Arranged(_) => Err(not_here()),
    }
}

/// y = x W for x (..., out): (..., in), in the type of x. Differentiable in x, and in W where it is dense. Arranged weights
/// have no such product.
pub fn matmul_t(x: &Array, w: WeightRef) -> Result<Array> {
    check_last("transposed matmul", x, w.shape()?.0)?;
    #[cfg(graft_cpu)]
    if w.on_cpu(x) {
        return Product::new(w, true)?.apply(x, &w.arrays());
    }
    match w {
        WeightRef::Dense(w) => ops::matmul(x, w),
        WeightRef::Packed(w) => mlx_matmul(x, w, false),
        WeightRef::Arranged(_) => Err(not_here()),
    }
}

fn mlx_matmul(x: &Array, w: PackedRef, transpose: bool) -> Result<Array> {
    let y = ffi::quantized_matmul(x, w.codes, w.scales, w.biases, transpose, (w.group_size, w.bits), w.mode)?;
    // MLX promotes over x and the scales, which need not have x's type.
    if y.dtype() == x.dtype() { Ok(y) } else { y.as_dtype(x.dtype()) }
}

/// Rows `ids` (N,) of W as (N, in) in `dtype`. An id outside 0..out is undefined in the MLX form, zero in ours.
pub fn rows(ids: &Array, w: WeightRef, dtype: Dtype) -> Result<Array> {
    w.shape()?;
    if ids.ndim() != 1 {
        let found = ids.shape();
        return Err(Exception::custom(format!("rows: ids must have one dimension, found {found:?}")));
    }
    #[cfg(graft_cpu)]
    if !matches!(w, WeightRef::Dense(_)) && (on_cpu(&[]) || matches!(w, WeightRef::Arranged(_))) {
        return Lookup::apply(&ids.as_dtype(Dtype::Int32)?, w)?.as_dtype(dtype);
    }
    match w {
        WeightRef::Dense(w) => w.take_axis(ids, 0)?.as_dtype(dtype),
        WeightRef::Packed(w) => {
            let codes = w.codes.take_axis(ids, 0)?;
            let scales = wide(&w.scales.take_axis(ids, 0)?, w.mode)?;
            let biases = w.biases.map(|biases| wide(&biases.take_axis(ids, 0)?, w.mode)).transpose()?;
            ffi::dequantize(&codes, &scales, biases.as_ref(), w.group_size, w.bits, w.mode, dtype)
        }
        WeightRef::Arranged(_) => Err(not_here()),
    }
}

/// Scales or biases of the affine mode in f32: in their own type MLX would round each product to it, also where more is wanted.
fn wide(levels: &Array, mode: Mode) -> Result<Array> {
    if mode == Mode::Affine { levels.as_dtype(Dtype::Float32) } else { Ok(levels.clone()) }
}
