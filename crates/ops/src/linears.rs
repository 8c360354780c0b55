//! Linears with a low-rank update: the frozen product, the side path, DoRA's factor and the bias, in one operation.

use mlx_rs::ops;

#[cfg(all(graft_cpu, target_arch = "x86_64"))]
use crate::cpu::answers::Answers;
#[cfg(graft_cpu)]
use crate::cpu::linears::Linears;
use crate::weight::check_last;
use crate::{Array, Dtype, Exception, Result, WeightRef, matmul, rms_norm, swiglu};

/// A low-rank update of a weight W (out, in): s A B beside it, and perhaps a factor of each row.
#[derive(Clone, Copy)]
pub struct LowRank<'a> {
    /// A (in, R) f32.
    pub a: &'a Array,
    /// B (R, out) f32.
    pub b: &'a Array,
    /// s.
    pub scale: f32,
    /// DoRA's c (out,) f32, not zero where a gradient is wanted.
    pub factor: Option<&'a Array>,
    /// What takes the place of x in the side path: x after dropout.
    pub input: Option<&'a Array>,
}

/// y = c (W x + s (x A) B) + b + h; without an update y = W x + b + h.
#[derive(Clone, Copy)]
pub struct LinearRef<'a> {
    /// W (out, in), frozen.
    pub weight: WeightRef<'a>,
    /// b (out,), frozen, in x's type.
    pub bias: Option<&'a Array>,
    /// h (..., out), what the result is added to.
    pub residual: Option<&'a Array>,
    /// The update.
    pub low_rank: Option<LowRank<'a>>,
}

/// What the x (..., in) of linears comes out of: where that pays, it is computed as a part of them.
#[derive(Clone, Copy)]
pub enum Input<'a> {
    /// x itself.
    Plain(&'a Array),
    /// [`rms_norm`] of x.
    Norm {
        /// x (..., in)
        x: &'a Array,
        /// w (in,)
        weight: &'a Array,
        /// Added to the mean square.
        eps: f32,
    },
    /// [`swiglu`].
    Swiglu {
        /// (..., in)
        gate: &'a Array,
        /// (..., in)
        up: &'a Array,
    },
}

impl<'a> From<&'a Array> for Input<'a> {
    fn from(x: &'a Array) -> Self {
        Self::Plain(x)
    }
}

impl Input<'_> {
    /// x as an operation of its own.
    pub fn array(&self) -> Result<Array> {
        match *self {
            Self::Plain(x) => Ok(x.clone()),
            Self::Norm { x, weight, eps } => rms_norm(x, weight, eps),
            Self::Swiglu { gate, up } => swiglu(gate, up),
        }
    }

    /// An array of x's shape and type, where what is given fits together.
    #[cfg(graft_cpu)]
    fn like(&self) -> Option<&Array> {
        match *self {
            Self::Plain(x) => Some(x),
            Self::Norm { x, weight, .. } => (weight.ndim() == 1
                && x.shape().last() == Some(&weight.dim(0))
                && weight.dtype() == x.dtype())
            .then_some(x),
            Self::Swiglu { gate, up } => {
                (gate.shape() == up.shape() && gate.dtype() == up.dtype()).then_some(gate)
            }
        }
    }
}

/// Each linear's y (..., out) for one x (..., in), in the type of x. The side path is summed in f32 and rounded before it
/// meets W x. Differentiable in x, A, B, c, h and the side path's own input.
pub fn linears<'a>(input: impl Into<Input<'a>>, linears: &[LinearRef]) -> Result<Vec<Array>> {
    let input = input.into();
    #[cfg(all(graft_cpu, target_arch = "x86_64"))]
    if let Some(like) = input.like().filter(|like| like.dtype() == Dtype::Float32)
        && !linears.is_empty()
        && Answers::fits(linears)
    {
        linears.iter().try_for_each(|linear| check(like, linear).and_then(|()| check_f32(linear)))?;
        return Answers::apply(input, linears);
    }
    #[cfg(graft_cpu)]
    if let Some(like) = input.like().filter(|like| linears.iter().all(|linear| linear.weight.on_cpu(like))) {
        linears.iter().try_for_each(|linear| check(like, linear).and_then(|()| check_f32(linear)))?;
        return Linears::apply(input, linears);
    }
    let x = &input.array()?;
    for linear in linears {
        check(x, linear)?;
    }
    // Side paths that read x itself share its cast.
    let updates = linears.iter().filter_map(|linear| linear.low_rank.as_ref());
    let shared = updates.into_iter().any(|update| update.input.is_none());
    let x32 = if shared { x.as_dtype(Dtype::Float32)? } else { x.clone() };
    linears.iter().map(|linear| mlx_linear(x, &x32, linear)).collect()
}

fn check(x: &Array, linear: &LinearRef) -> Result<()> {
    let (out, inputs) = linear.weight.shape()?;
    check_last("linear", x, inputs)?;
    let vector = |name: &str, v: Option<&Array>| match v {
        Some(v) if v.shape() != [out] => {
            let found = v.shape();
            Err(Exception::custom(format!("linear: {name} of {out} outputs has shape {found:?}")))
        }
        _ => Ok(()),
    };
    vector("the bias", linear.bias)?;
    if let Some(h) = linear.residual
        && (h.shape().last() != Some(&out) || h.size() / out as usize != x.size() / inputs.max(1) as usize)
    {
        let (h, x) = (h.shape(), x.shape());
        return Err(Exception::custom(format!("linear: {out} outputs of {x:?} cannot be added to {h:?}")));
    }
    let Some(update) = &linear.low_rank else { return Ok(()) };
    vector("the factor", update.factor)?;
    let (a, b) = (update.a.shape(), update.b.shape());
    if let (&[inputs, 0], &[0, out]) = (a, b) {
        return Err(Exception::custom(format!(
            "linear: A ({inputs}, 0) and B (0, {out}) have rank 0; expected at least 1, or no update at all"
        )));
    }
    let fits = matches!((a, b), (&[i, r], &[q, o]) if i == inputs && r == q && o == out);
    if !fits || update.input.is_some_and(|own| own.shape() != x.shape()) {
        return Err(Exception::custom(format!(
            "linear: A {a:?} and B {b:?} (and what x {:?} becomes by dropout) do not fit a weight of ({out}, {inputs})",
            x.shape()
        )));
    }
    Ok(())
}

/// What stands beside the weight in our CPU form, which knows f32 alone.
#[cfg(graft_cpu)]
fn check_f32(linear: &LinearRef) -> Result<()> {
    let update = linear.low_rank.as_ref();
    let parts = [
        ("the bias", linear.bias),
        ("the residual", linear.residual),
        ("A", update.map(|update| update.a)),
        ("B", update.map(|update| update.b)),
        ("the factor", update.and_then(|update| update.factor)),
        ("the side path's own input", update.and_then(|update| update.input)),
    ];
    for (name, part) in parts {
        if let Some(part) = part.filter(|part| part.dtype() != Dtype::Float32) {
            let found = part.dtype();
            return Err(Exception::custom(format!("linear: {name} must be f32 as x is, found {found:?}")));
        }
    }
    Ok(())
}

fn mlx_linear(x: &Array, x32: &Array, linear: &LinearRef) -> Result<Array> {
    let mut y = matmul(x, linear.weight)?;
    if let Some(update) = &linear.low_rank {
        let own = update.input.map(|own| own.as_dtype(Dtype::Float32)).transpose()?;
        // The scale where it costs least: at R columns.
        let z =
            ops::matmul(own.as_ref().unwrap_or(x32), update.a)?.multiply(Array::from_f32(update.scale))?;
        y = y.add(ops::matmul(&z, update.b)?.as_dtype(y.dtype())?)?;
        if let Some(c) = update.factor {
            y = y.multiply(c.as_dtype(y.dtype())?)?;
        }
    }
    if let Some(bias) = linear.bias {
        y = y.add(bias)?;
    }
    linear.residual.map_or(Ok(y.clone()), |h| h.add(&y))
}
