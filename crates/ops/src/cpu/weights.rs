//! What a product needs to know of a weight, whichever of the three forms it has.

use std::ffi::CStr;
use std::ops::Range;

use super::few_rows;
use super::gemm::{LeftRows, Matrix, product};
use super::level::dispatch;
use super::packed::{self, Layout, Packed, Plain, UnpackRow};
use super::panels::{self, ArrangedRow, Arrangement, Panels, by_parts};
use super::primitive::{Backward, Op, Tensor, apply_one};
use crate::ffi::Mode;
use crate::pool::Shares;
use crate::{Array, Dtype, Exception, Precision, Result, WeightRef, precision};

/// W (out, in), without the weights.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Dense { out: usize, inputs: usize },
    Packed(Layout),
    Arranged(Arrangement),
}

/// How many arrays packed weights of a mode are made of.
pub(crate) fn mode_arrays(mode: Mode) -> usize {
    if mode == Mode::Affine { 3 } else { 2 }
}

impl Kind {
    pub(crate) fn of(w: WeightRef) -> Result<Kind> {
        let (out, inputs) = w.shape()?;
        Ok(match w {
            WeightRef::Dense(_) => Kind::Dense { out: out as usize, inputs: inputs as usize },
            WeightRef::Packed(packed) => Kind::Packed(Layout::new(packed, (out, inputs))),
            WeightRef::Arranged(w) => Kind::Arranged(w.arrangement),
        })
    }

    /// How many arrays it is made of.
    pub(crate) fn arrays(self) -> usize {
        match self {
            Kind::Dense { .. } => 1,
            Kind::Packed(Layout { mode, .. }) | Kind::Arranged(Arrangement { mode, .. }) => mode_arrays(mode),
        }
    }

    pub(crate) fn out(self) -> usize {
        match self {
            Kind::Dense { out, .. } => out,
            Kind::Packed(layout) => layout.out,
            Kind::Arranged(of) => of.out,
        }
    }

    pub(crate) fn inputs(self) -> usize {
        match self {
            Kind::Dense { inputs, .. } => inputs,
            Kind::Packed(layout) => layout.inputs,
            Kind::Arranged(of) => of.inputs,
        }
    }

    /// The weights in the memory of their parts.
    pub(crate) fn weights(self, parts: &[Tensor]) -> Weights<'_> {
        match self {
            Kind::Dense { inputs, .. } => Weights::Dense { w: parts[0].f32(), inputs },
            Kind::Packed(layout) => Weights::Packed(Packed::new(layout, parts)),
            Kind::Arranged(of) => Weights::Arranged(Panels::new(of, parts)),
        }
    }

    /// Fails for weights that have no transposed product, and so no gradient.
    pub(crate) fn check_gradient(self) -> Result<()> {
        match self {
            Kind::Arranged(_) => {
                Err(Exception::custom("weights laid out for inference have no transposed product"))
            }
            _ => Ok(()),
        }
    }
}

/// W (out, in) in memory.
#[derive(Clone, Copy)]
pub(crate) enum Weights<'a> {
    Dense { w: &'a [f32], inputs: usize },
    Packed(Packed<'a>),
    Arranged(Panels<'a>),
}

impl<'a> Weights<'a> {
    /// Some rows of W; they begin at a multiple of 16.
    pub(crate) fn rows(self, rows: Range<usize>) -> Weights<'a> {
        match self {
            Weights::Dense { w, inputs } => {
                Weights::Dense { w: &w[rows.start * inputs..rows.end * inputs], inputs }
            }
            Weights::Packed(w) => Weights::Packed(w.rows(rows)),
            Weights::Arranged(w) => Weights::Arranged(w.rows(rows)),
        }
    }

    /// y = x W^T for x (m, in). `many` takes the path of many rows whatever their number.
    pub(crate) fn times_transpose(self, x: &[f32], y: &mut [f32], precision: Precision, many: bool) {
        match self {
            Weights::Dense { w, inputs } => few_rows::dense_times_transpose(x, w, inputs, y, precision, many),
            Weights::Packed(w) => packed::times_transpose(x, &w, y, precision, many),
            Weights::Arranged(w) => panels::times_transpose(x, &w, y, precision),
        }
    }

    /// y = x W for x (m, out), or y += x W if `add`.
    pub(crate) fn times<'x>(
        self,
        x: impl Into<LeftRows<'x>>,
        y: &mut [f32],
        precision: Precision,
        add: bool,
    ) {
        match self {
            Weights::Dense { w, inputs } => {
                let right = Matrix { data: w.as_ptr(), row: inputs, column: 1 };
                product(x, w.len() / inputs.max(1), &right, inputs, y, precision, add);
            }
            Weights::Packed(w) => {
                product(x, w.layout.out, &Plain(&w), w.layout.inputs, y, precision, add);
            }
            Weights::Arranged(_) => unreachable!("products of this kind are refused when the graph is built"),
        }
    }

    /// Row `row` of W.
    pub(crate) fn row(self, row: usize, to: &mut [f32]) {
        match self {
            Weights::Dense { w, inputs } => to.copy_from_slice(&w[row * inputs..][..inputs]),
            Weights::Packed(w) => dispatch(UnpackRow { w: &w, id: row, to }),
            Weights::Arranged(w) => dispatch(ArrangedRow { w: &w, row, to }),
        }
    }
}

/// x W^T, or x W if `transposed`.
pub(crate) struct Product {
    kind: Kind,
    transposed: bool,
    precision: Precision,
}

impl Product {
    pub(crate) fn new(w: WeightRef, transposed: bool) -> Result<Product> {
        let kind = Kind::of(w)?;
        if transposed {
            kind.check_gradient()?;
        }
        Ok(Product { kind, transposed, precision: precision() })
    }

    pub(crate) fn apply(self, x: &Array, weights: &[&Array]) -> Result<Array> {
        let columns = if self.transposed { self.kind.inputs() } else { self.kind.out() };
        let mut shape = x.shape().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = columns as i32;
        }
        let inputs: Vec<&Array> = std::iter::once(x).chain(weights.iter().copied()).collect();
        apply_one(self, &inputs, &shape, Dtype::Float32)
    }
}

impl Op for Product {
    fn name(&self) -> &'static CStr {
        c"matmul"
    }

    fn run(&self, inputs: &[Tensor], outputs: &mut [Tensor]) {
        let (x, y) = (inputs[0].f32(), outputs[0].f32_mut());
        let w = self.kind.weights(&inputs[1..]);
        if self.transposed {
            w.times(x, y, self.precision, false);
        } else {
            w.times_transpose(x, y, self.precision, false);
        }
    }

    fn gradients(&self, call: &Backward) -> Result<Vec<Array>> {
        self.kind.check_gradient()?;
        let (x, dy) = (&call.primals[0], &call.cotangents[0]);
        let mut gradients = Vec::new();
        for &input in &call.wanted {
            gradients.push(match (input, self.kind) {
                (0, _) => {
                    let weights: Vec<&Array> = call.primals[1..].iter().collect();
                    Product { transposed: !self.transposed, ..*self }.apply(dy, &weights)?
                }
                (_, Kind::Dense { .. }) => {
                    // The rows in figures: -1 cannot be told from no elements at all.
                    let rows = |x: &Array| x.reshape(&[x.size() as i32 / x.dim(-1).max(1), x.dim(-1)]);
                    let (x, dy) = (rows(x)?, rows(dy)?);
                    let (left, right) = if self.transposed { (x, dy) } else { (dy, x) };
                    left.transpose()?.matmul(&right)?
                }
                _ => return Err(Exception::custom("packed weights have no gradient")),
            });
        }
        Ok(gradients)
    }
}

/// Elements from which on rows are looked up on all threads.
const MANY: usize = 1 << 16;

/// Rows of a packed weight by id.
pub(crate) struct Lookup(Kind);

impl Lookup {
    pub(crate) fn apply(ids: &Array, w: WeightRef) -> Result<Array> {
        let shape = [ids.dim(0), w.shape()?.1];
        let inputs: Vec<&Array> = std::iter::once(ids).chain(w.arrays()).collect();
        apply_one(Lookup(Kind::of(w)?), &inputs, &shape, Dtype::Float32)
    }
}

impl Op for Lookup {
    fn name(&self) -> &'static CStr {
        c"rows of a weight"
    }

    fn run(&self, inputs: &[Tensor], outputs: &mut [Tensor]) {
        let (w, ids, width) = (self.0.weights(&inputs[1..]), inputs[0].i32(), self.0.inputs());
        let to = Shares::new(outputs[0].f32_mut());
        by_parts(ids.len(), ids.len() * width >= MANY, |rows| {
            for row in rows {
                // SAFETY: each row belongs to one task.
                let to = unsafe { to.part(row * width, width) };
                match usize::try_from(ids[row]).ok().filter(|&id| id < self.0.out()) {
                    Some(id) => w.row(id, to),
                    None => to.fill(0.0),
                }
            }
        });
    }
}
