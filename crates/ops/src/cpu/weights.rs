//! What a product needs to know of a weight, whichever of the three forms it has.

use std::ffi::CStr;

use super::gemm::{Matrix, product};
use super::level::dispatch;
use super::packed::{self, Layout, Packed, Plain, UnpackRow};
use super::panels::{self, ArrangedRow, Arrangement, Panels};
use super::primitive::{Backward, Op, Tensor, apply_one};
use crate::{Array, Dtype, Exception, Precision, Result, WeightRef, precision};

/// W (out, in), without the weights.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Dense { out: usize, inputs: usize },
    Packed(Layout),
    Arranged(Arrangement),
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
        if matches!(self, Kind::Dense { .. }) { 1 } else { 3 }
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

    /// y = x W^T for x (m, in). `many` takes the path of many rows whatever their number.
    pub(crate) fn times_transpose(
        self,
        x: &[f32],
        parts: &[Tensor],
        y: &mut [f32],
        precision: Precision,
        many: bool,
    ) {
        match self {
            Kind::Dense { inputs, .. } => {
                packed::dense_times_transpose(x, parts[0].f32(), inputs, y, precision, many);
            }
            Kind::Packed(layout) => {
                packed::times_transpose(x, &Packed::new(layout, parts), y, precision, many)
            }
            Kind::Arranged(of) => panels::times_transpose(x, &Panels::new(of, parts), y, precision),
        }
    }

    /// y = x W for x (m, out), or y += x W if `add`.
    pub(crate) fn times(self, x: &[f32], parts: &[Tensor], y: &mut [f32], precision: Precision, add: bool) {
        match self {
            Kind::Dense { out, inputs } => {
                let w = Matrix { data: parts[0].f32().as_ptr(), row: inputs, column: 1 };
                product(x, out, &w, inputs, y, precision, add);
            }
            Kind::Packed(layout) => {
                let w = Packed::new(layout, parts);
                product(x, layout.out, &Plain(&w), layout.inputs, y, precision, add);
            }
            Kind::Arranged(_) => unreachable!("products of this kind are refused when the graph is built"),
        }
    }

    /// Row `row` of W.
    pub(crate) fn row(self, row: usize, parts: &[Tensor], to: &mut [f32]) {
        match self {
            Kind::Dense { inputs, .. } => to.copy_from_slice(&parts[0].f32()[row * inputs..][..inputs]),
            Kind::Packed(layout) => dispatch(UnpackRow { w: &Packed::new(layout, parts), id: row, to }),
            Kind::Arranged(of) => dispatch(ArrangedRow { w: &Panels::new(of, parts), row, to }),
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
        if self.transposed {
            self.kind.times(x, &inputs[1..], y, self.precision, false);
        } else {
            self.kind.times_transpose(x, &inputs[1..], y, self.precision, false);
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
        let rows = outputs[0].f32_mut().chunks_exact_mut(self.0.inputs());
        for (&id, to) in inputs[0].i32().iter().zip(rows) {
            match usize::try_from(id).ok().filter(|&id| id < self.0.out()) {
                Some(row) => self.0.row(row, &inputs[1..], to),
                None => to.fill(0.0),
            }
        }
    }
}
