//! Linears with a low-rank update: the frozen product, the side path, DoRA's factor and the bias, in one operation.

use mlx_rs::ops;

#[cfg(all(graft_cpu, target_arch = "x86_64"))]
use crate::cpu::answers::Answers;
#[cfg(graft_cpu)]
use crate::cpu::linears::Linears;
use crate::low_rank::LowRank;
use crate::weight::check_last;
use crate::{Array, Dtype, Exception, Result, WeightRef, matmul, rms_norm, swiglu};

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
        && linears.iter().any(Answers::fits)
    {
        linears.iter().try_for_each(|linear| check(like, linear).and_then(|()| check_f32(linear)))?;
        if linears.iter().all(Answers::fits) {
            let rows = like.size() as i32 / like.dim(-1).max(1);
            let updates = [(rows, linears.iter().map(|linear| linear.low_rank).collect())];
            return Answers::apply(input, linears, &updates);
        }
        // Some of a base's weights are arranged and some are not: each by itself.
        let x = input.array()?;
        let each = linears.iter().map(|linear| self::linears(&x, std::slice::from_ref(linear)));
        return each.map(|ys| ys.map(|ys| ys[0].clone())).collect();
    }
    #[cfg(graft_cpu)]
    if let Some(like) = input.like().filter(|like| linears.iter().all(|linear| linear.weight.on_cpu(like))) {
        linears.iter().try_for_each(|linear| check(like, linear).and_then(|()| check_f32(linear)))?;
        linears.iter().try_for_each(unarranged)?;
        return Linears::apply(input, linears);
    }
    let x = &input.array()?;
    linears.iter().try_for_each(|linear| check(x, linear).and_then(|()| unarranged(linear)))?;
    // Side paths that read x itself share its cast.
    let updates = linears.iter().filter_map(|linear| linear.low_rank.as_ref());
    let shared = updates.into_iter().any(|update| update.input.is_none());
    let x32 = if shared { x.as_dtype(Dtype::Float32)? } else { x.clone() };
    linears.iter().map(|linear| mlx_linear(x, &x32, linear)).collect()
}

/// Consecutive rows of x and what updates each linear for them.
pub type RowsUpdates<'a> = (i32, Vec<Option<LowRank<'a>>>);

/// [`linears`] of one x (N, in) whose rows have updates of their own. On a GPU and with arranged weights every W is read
/// once for all of them.
///
/// `groups` cover the rows in order. A row's result is that of [`linears`] with its group's updates. The linears themselves
/// carry none. No gradient is promised.
pub fn linears_of_rows<'a>(
    input: impl Into<Input<'a>>,
    linears: &[LinearRef],
    groups: &[RowsUpdates],
) -> Result<Vec<Array>> {
    let input = input.into();
    let x = &input.array()?;
    let rows = x.size() as i32 / x.dim(-1).max(1);
    let fits = groups.iter().all(|(rows, updates)| *rows > 0 && updates.len() == linears.len());
    if x.ndim() != 2 || groups.iter().map(|group| group.0).sum::<i32>() != rows || !fits {
        let found: Vec<_> = groups.iter().map(|(rows, updates)| (*rows, updates.len())).collect();
        return Err(Exception::custom(format!(
            "linears of rows: expected x (N, in) and groups of N rows in all with {} updates each, found x {:?} and \
             groups (rows, updates) {found:?}",
            linears.len(),
            x.shape()
        )));
    }
    for (linear, index) in linears.iter().zip(0..) {
        for (_, updates) in groups {
            check(x, &LinearRef { low_rank: updates[index], ..*linear })?;
        }
    }
    #[cfg(all(graft_cpu, target_arch = "x86_64"))]
    {
        let fits = |(_, updates): &RowsUpdates| {
            linears
                .iter()
                .zip(updates)
                .all(|(linear, &low_rank)| Answers::fits(&LinearRef { low_rank, ..*linear }))
        };
        if x.dtype() == Dtype::Float32 && !linears.is_empty() && groups.iter().all(fits) {
            linears.iter().try_for_each(check_f32)?;
            return Answers::apply(input, linears, groups);
        }
    }
    for (linear, index) in linears.iter().zip(0..) {
        for (_, updates) in groups {
            unarranged(&LinearRef { low_rank: updates[index], ..*linear })?;
        }
    }
    let mut each: Vec<Vec<Array>> = vec![Vec::with_capacity(groups.len()); linears.len()];
    #[cfg(graft_cpu)]
    if linears.iter().all(|linear| linear.weight.on_cpu(x)) {
        // Every W is read once a group, for the sums of a row must not depend on its neighbours.
        for ((_, updates), rows) in groups.iter().zip(ranges(groups)) {
            let own = x.take_axis(&rows, 0)?;
            let residuals =
                linears.iter().map(|linear| linear.residual.map(|h| h.take_axis(&rows, 0)).transpose());
            let residuals = residuals.collect::<Result<Vec<_>>>()?;
            let with = linears.iter().zip(updates).zip(&residuals).map(|((linear, &low_rank), residual)| {
                LinearRef { residual: residual.as_ref(), low_rank, ..*linear }
            });
            let ys = self::linears(&own, &with.collect::<Vec<_>>())?;
            each.iter_mut().zip(ys).for_each(|(parts, y)| parts.push(y));
        }
        return each.iter().map(|parts| ops::concatenate(parts, 0)).collect();
    }
    for (index, (linear, parts)) in linears.iter().zip(&mut each).enumerate() {
        let y = matmul(x, linear.weight)?;
        for ((_, updates), rows) in groups.iter().zip(ranges(groups)) {
            let mut part = y.take_axis(&rows, 0)?;
            if let Some(update) = &updates[index] {
                part = updated(&part, &x.take_axis(&rows, 0)?.as_dtype(Dtype::Float32)?, update)?;
            }
            parts.push(part);
        }
    }
    linears.iter().zip(&each).map(|(linear, parts)| finished(ops::concatenate(parts, 0)?, linear)).collect()
}

/// The numbers of each group's rows.
fn ranges(groups: &[RowsUpdates]) -> impl Iterator<Item = Array> {
    groups.iter().scan(0, |first, (rows, _)| {
        let from = *first;
        *first += rows;
        Some(Array::from_slice(&(from..*first).collect::<Vec<i32>>(), &[*rows]))
    })
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
    update.check(out, inputs)?;
    match update.input.filter(|own| own.shape() != x.shape()) {
        Some(own) => Err(Exception::custom(format!(
            "linear: what x {:?} becomes by dropout has shape {:?}",
            x.shape(),
            own.shape()
        ))),
        None => Ok(()),
    }
}

/// Only the operation for arranged weights reads arranged updates.
fn unarranged(linear: &LinearRef) -> Result<()> {
    match &linear.low_rank {
        Some(update) if update.arranged() => Err(Exception::custom(
            "linear: the update is arranged for answers in the precision int16, and this is not such a product: give A \
             and B as they are",
        )),
        _ => Ok(()),
    }
}

/// What stands beside the weight in our CPU form, which knows f32 alone.
#[cfg(graft_cpu)]
fn check_f32(linear: &LinearRef) -> Result<()> {
    let update = linear.low_rank.as_ref();
    let stored = update.filter(|update| !update.arranged());
    let parts = [
        ("the bias", linear.bias),
        ("the residual", linear.residual),
        ("A", stored.map(|update| update.a)),
        ("B", stored.map(|update| update.b)),
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
        y = updated(&y, own.as_ref().unwrap_or(x32), update)?;
    }
    finished(y, linear)
}

/// c (y + s (x A) B) for y = W x; the scale where it costs least, at R columns.
fn updated(y: &Array, x32: &Array, update: &LowRank) -> Result<Array> {
    let z = ops::matmul(x32, update.a)?.multiply(Array::from_f32(update.scale))?;
    let y = y.add(ops::matmul(&z, update.b)?.as_dtype(y.dtype())?)?;
    match update.factor {
        Some(c) => y.multiply(c.as_dtype(y.dtype())?),
        None => Ok(y),
    }
}

/// y + b + h.
fn finished(mut y: Array, linear: &LinearRef) -> Result<Array> {
    if let Some(bias) = linear.bias {
        y = y.add(bias)?;
    }
    linear.residual.map_or(Ok(y.clone()), |h| h.add(&y))
}
