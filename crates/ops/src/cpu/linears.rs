//! y = c (W x + s (x A) B) + b + h for one x and some linears, and the gradient.
//!
//! The side path has R columns, eight where W has hundreds: it is bound by reading x and y, so it runs over blocks of rows
//! while they are in the cache. A and B are laid out with whole vectors of R. For the gradient z = x A is kept, and of a
//! linear with a factor its output, from which W x + s (x A) B is (y - h - b) / c: of h and y others keep a copy anyway.

use std::ffi::CStr;

use super::level::dispatch;
use super::linears_gradient::{LinearsGradient, Wanted};
use super::primitive::{Backward, Op, Tensor, apply};
use super::scratch::{MADE, SIDE, scratch};
use super::simd::{Kernel, Simd};
use super::slim::{ROWS, Slim, by_blocks, pad_columns, whole_vectors};
use super::source::Source;
use super::weights::Kind;
use crate::linears::{Input, LinearRef};
use crate::pool::Shares;
use crate::{Array, Dtype, Exception, Precision, Result, precision};

/// One linear without its arrays.
#[derive(Clone)]
pub(super) struct Part {
    pub(super) kind: Kind,
    pub(super) bias: bool,
    pub(super) residual: bool,
    pub(super) side: Option<Side>,
}

/// Its side path.
#[derive(Clone, Copy)]
pub(super) struct Side {
    pub(super) rank: usize,
    pub(super) scale: f32,
    pub(super) factor: bool,
    pub(super) own_input: bool,
}

/// Where the arrays of a part are among the inputs, of which the first are what x comes out of.
pub(super) struct Places {
    pub(super) weight: usize,
    pub(super) bias: Option<usize>,
    pub(super) residual: Option<usize>,
    pub(super) a: usize,
    pub(super) b: usize,
    pub(super) factor: Option<usize>,
    pub(super) input: usize,
    pub(super) end: usize,
}

impl Part {
    /// The part of a linear, whose arrays are added to the inputs.
    pub(super) fn of<'a>(linear: &LinearRef<'a>, inputs: &mut Vec<&'a Array>) -> Result<Part> {
        inputs.extend(linear.weight.arrays());
        inputs.extend(linear.bias);
        inputs.extend(linear.residual);
        let mut side = None;
        if let Some(update) = &linear.low_rank {
            inputs.extend([update.a, update.b]);
            inputs.extend(update.factor);
            inputs.extend(update.input);
            side = Some(Side {
                rank: update.b.dim(0) as usize,
                scale: update.scale,
                factor: update.factor.is_some(),
                own_input: update.input.is_some(),
            });
        }
        let (bias, residual) = (linear.bias.is_some(), linear.residual.is_some());
        Ok(Part { kind: Kind::of(linear.weight)?, bias, residual, side })
    }

    fn places(&self, first: usize) -> Places {
        let mut next = first + self.kind.arrays();
        let mut take = |there: bool| {
            let place = there.then_some(next);
            next += usize::from(there);
            place
        };
        let side = self.side;
        let (bias, residual) = (take(self.bias), take(self.residual));
        let a = take(side.is_some()).unwrap_or(0);
        let b = take(side.is_some()).unwrap_or(0);
        let factor = take(side.is_some_and(|side| side.factor));
        let input = take(side.is_some_and(|side| side.own_input)).unwrap_or(0);
        Places { weight: first, bias, residual, a, b, factor, input, end: next }
    }
}

/// The places of each part, of which the first has its arrays from input `first` on.
pub(super) fn places(parts: &[Part], mut first: usize) -> Vec<Places> {
    parts
        .iter()
        .map(|part| {
            let places = part.places(first);
            first = places.end;
            places
        })
        .collect()
}

/// The outputs are every y, then z of every linear that has a side path.
pub(crate) struct Linears {
    source: Source,
    parts: Vec<Part>,
    precision: Precision,
}

impl Linears {
    pub(crate) fn apply(input: Input, linears: &[LinearRef]) -> Result<Vec<Array>> {
        let (source, mut inputs) = Source::of(input);
        let x = inputs[0];
        let mut parts = Vec::with_capacity(linears.len());
        for linear in linears {
            parts.push(Part::of(linear, &mut inputs)?);
        }
        let rows = x.size() as i32 / x.dim(-1).max(1);
        let mut shapes: Vec<Vec<i32>> = Vec::new();
        for part in &parts {
            let mut shape = x.shape().to_vec();
            shape.pop();
            shape.push(part.kind.out() as i32);
            shapes.push(shape);
        }
        shapes.extend(parts.iter().filter_map(|part| part.side).map(|side| vec![rows, side.rank as i32]));
        let outputs: Vec<(&[i32], Dtype)> = shapes.iter().map(|shape| (&shape[..], Dtype::Float32)).collect();
        let count = parts.len();
        let mut all = apply(Linears { source, parts, precision: precision() }, &inputs, &outputs)?;
        all.truncate(count);
        Ok(all)
    }
}

impl Op for Linears {
    fn name(&self) -> &'static CStr {
        c"linears"
    }

    fn run(&self, inputs: &[Tensor], outputs: &mut [Tensor]) {
        let places = places(&self.parts, self.source.arrays());
        let width = self.parts.first().map_or(1, |part| part.kind.inputs());
        let mut made = scratch(&MADE, self.source.room(inputs[0].f32().len()));
        let x = self.source.make(inputs, width, &mut made);
        let (ys, zs) = outputs.split_at_mut(self.parts.len());
        for ((part, at), y) in self.parts.iter().zip(&places).zip(ys.iter_mut()) {
            part.kind.weights(&inputs[at.weight..]).times_transpose(x, y.f32_mut(), self.precision, false);
        }
        let mut zs = zs.iter_mut();
        for ((part, at), y) in self.parts.iter().zip(&places).zip(ys) {
            let bias = at.bias.map(|i| inputs[i].f32());
            let residual = at.residual.map(|i| inputs[i].f32());
            let factor = at.factor.map(|i| inputs[i].f32());
            let (inputs_wide, out) = (part.kind.inputs(), part.kind.out());
            let side = part.side;
            let z = match side.and_then(|_| zs.next()) {
                Some(z) => z.f32_mut(),
                None if bias.is_none() && residual.is_none() => continue,
                None => &mut [],
            };
            let width = side.map_or(0, |side| whole_vectors(side.rank));
            let mut padded = scratch(&SIDE, inputs_wide * width);
            if let Some(side) = side {
                pad_columns(inputs[at.a].f32(), side.rank, width, &mut padded);
            }
            let own = if side.is_some_and(|side| side.own_input) { inputs[at.input].f32() } else { x };
            let b = if side.is_some() { inputs[at.b].f32() } else { &[] };
            let y = y.f32_mut();
            let rows = y.len() / out.max(1);
            let (y, z) = (Shares::new(y), Shares::new(z));
            let rank = side.map_or(0, |side| side.rank);
            by_blocks(rows, (inputs_wide + out) * rank.max(1), |first, count| {
                // SAFETY: each block of rows belongs to one task.
                let (y, z) =
                    unsafe { (y.part(first * out, count * out), z.part(first * rank, count * rank)) };
                dispatch(Forward {
                    x: &own[first * inputs_wide..(first + count) * inputs_wide],
                    a: &padded,
                    width,
                    side,
                    b,
                    factor,
                    bias,
                    residual: residual.map(|h| &h[first * out..(first + count) * out]),
                    y,
                    z,
                    count,
                });
            });
        }
    }

    fn gradients(&self, call: &Backward) -> Result<Vec<Array>> {
        let wants = |input: usize| call.wanted.contains(&input);
        let sources = self.source.arrays();
        let wants_x = (0..sources).any(wants);
        if wants_x {
            self.parts.iter().try_for_each(|part| part.kind.check_gradient())?;
        }
        let places = places(&self.parts, sources);
        for (i, at) in places.iter().enumerate() {
            let weight = at.weight..at.weight + self.parts[i].kind.arrays();
            let frozen = [(weight.clone().any(wants), "weight"), (at.bias.is_some_and(wants), "bias")];
            if let Some((_, name)) = frozen.iter().find(|(wanted, _)| *wanted) {
                return Err(Exception::custom(format!(
                    "the {name} of linear {i} is frozen; expected a gradient by x, A, B, c, h or the side path's \
                     own input, found one by the {name}: differentiate `matmul` instead"
                )));
            }
        }
        let wanted: Vec<Wanted> = self
            .parts
            .iter()
            .zip(&places)
            .map(|(part, at)| Wanted {
                low_rank: part.side.is_some() && (wants(at.a) || wants(at.b)),
                factor: at.factor.is_some_and(wants),
                input: part.side.is_some_and(|side| side.own_input) && wants(at.input),
            })
            .collect();
        // The inputs, then z of each side path, then each y that a factor's gradient needs, then the slopes. What is not
        // read is left out, or it would be kept until here: x of a linear without an update, for one.
        let count = self.parts.len();
        let nothing = Array::from_slice::<f32>(&[], &[0]);
        let mut inputs: Vec<&Array> = call.primals.iter().collect();
        let mut zs: Vec<&Array> = call.outputs[count..].iter().collect();
        let sides = wanted.iter().zip(&self.parts).filter(|(_, part)| part.side.is_some());
        for (z, _) in zs.iter_mut().zip(sides).filter(|(_, (wanted, _))| !(wanted.low_rank || wanted.factor))
        {
            *z = &nothing;
        }
        let mut reads_x = false;
        for ((part, at), wanted) in self.parts.iter().zip(&places).zip(&wanted) {
            let own = part.side.is_some_and(|side| side.own_input);
            reads_x |= wanted.factor || wanted.low_rank && !own;
            if own && !wanted.low_rank {
                inputs[at.input] = &nothing;
            }
            for place in [at.bias, at.residual].into_iter().flatten().filter(|_| !wanted.factor) {
                inputs[place] = &nothing;
            }
        }
        if !reads_x {
            inputs[..sources].fill(&nothing);
        }
        inputs.extend(zs);
        let kept = wanted.iter().zip(&call.outputs).filter(|(wanted, _)| wanted.factor);
        inputs.extend(kept.map(|(_, y)| y));
        inputs.extend(&call.cotangents[..count]);
        let op = LinearsGradient {
            source: if reads_x { self.source } else { Source::Plain },
            sources,
            parts: self.parts.clone(),
            wanted,
            x: wants_x,
            precision: self.precision,
        };
        let shapes = op.shapes(&call.primals, &places);
        let outputs: Vec<(&[i32], Dtype)> = shapes.iter().map(|shape| (&shape[..], Dtype::Float32)).collect();
        let made = apply(op, &inputs, &outputs)?;
        // x, then A, B, c and the own input of each part: all of them, empty where not wanted.
        let mut gradients = vec![made[0].clone(); call.primals.len()];
        if wants_x {
            let from = self.source.gradients(&call.primals, &made[0], sources > 1 && wants(1))?;
            gradients[..from.len()].clone_from_slice(&from);
        }
        for (i, at) in places.iter().enumerate() {
            if let Some(residual) = at.residual {
                gradients[residual] = call.cotangents[i].clone();
            }
            for (place, gradient) in
                [Some(at.a), Some(at.b), at.factor, Some(at.input)].into_iter().zip(&made[1 + 4 * i..])
            {
                if let Some(place) = place.filter(|&place| place > 0) {
                    gradients[place] = gradient.clone();
                }
            }
        }
        call.choose(&gradients)
    }
}

/// The side path of a block of rows, then factor, bias and what the result is added to.
struct Forward<'a> {
    x: &'a [f32],
    /// A (in, width), padded.
    a: &'a [f32],
    width: usize,
    side: Option<Side>,
    /// B (rank, out).
    b: &'a [f32],
    factor: Option<&'a [f32]>,
    bias: Option<&'a [f32]>,
    residual: Option<&'a [f32]>,
    y: &'a mut [f32],
    z: &'a mut [f32],
    count: usize,
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Forward { x, a, width, side, b, factor, bias, residual, y, z, count } = self;
        let out = y.len() / count.max(1);
        if let Some(Side { rank, scale, .. }) = side {
            let inputs = x.len() / count.max(1);
            let mut wide = [0.0; ROWS * 128];
            // More columns than fit are taken in turn.
            for first in (0..width).step_by(128) {
                let columns = 128.min(width - first);
                let product = Slim {
                    rows: count,
                    columns,
                    k: inputs,
                    a: x,
                    a_row: inputs,
                    a_k: 1,
                    b: &a[first..],
                    b_k: width,
                    c_row: columns,
                    add: false,
                };
                product.run(s, &mut wide);
                let valid = columns.min(rank - first.min(rank));
                for (z, wide) in z.chunks_exact_mut(rank).zip(wide.chunks_exact(columns)) {
                    z[first..first + valid].copy_from_slice(&wide[..valid]);
                }
            }
            let mut scaled = [0.0; ROWS * 128];
            for first in (0..rank).step_by(128) {
                let columns = 128.min(rank - first);
                for (scaled, z) in scaled.chunks_exact_mut(columns).zip(z.chunks_exact(rank)) {
                    for (scaled, z) in scaled.iter_mut().zip(&z[first..]) {
                        *scaled = scale * z;
                    }
                }
                let product = Slim {
                    rows: count,
                    columns: out,
                    k: columns,
                    a: &scaled,
                    a_row: columns,
                    a_k: 1,
                    b: &b[first * out..],
                    b_k: out,
                    c_row: out,
                    add: true,
                };
                product.run(s, y);
            }
        }
        for y in y.chunks_exact_mut(out) {
            if let Some(factor) = factor {
                y.iter_mut().zip(factor).for_each(|(y, c)| *y *= c);
            }
            if let Some(bias) = bias {
                y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
        }
        if let Some(residual) = residual {
            y.iter_mut().zip(residual).for_each(|(y, h)| *y += h);
        }
    }
}
