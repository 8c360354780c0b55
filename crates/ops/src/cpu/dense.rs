//! Products with dense weights, with the fixed order of sums that MLX's own product does not promise.

use std::ffi::CStr;

use super::gemm::{Matrix, product};
use super::packed::dense_times_transpose;
use super::primitive::{Backward, Op, Tensor, apply_one};
use crate::{Array, Dtype, Exception, Precision, Result};

/// x W^T, or x W if `transposed`, for W (out, in).
pub(crate) struct DenseMatmul {
    pub(crate) transposed: bool,
    pub(crate) precision: Precision,
}

impl DenseMatmul {
    pub(crate) fn apply(self, x: &Array, w: &Array) -> Result<Array> {
        let mut shape = x.shape().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = w.dim(if self.transposed { 1 } else { 0 });
        }
        let (out, inputs) = (w.dim(0) as usize, w.dim(1) as usize);
        let op = DenseRun { transposed: self.transposed, out, inputs, precision: self.precision };
        apply_one(op, &[x, w], &shape, Dtype::Float32)
    }
}

struct DenseRun {
    transposed: bool,
    out: usize,
    inputs: usize,
    precision: Precision,
}

impl Op for DenseRun {
    fn name(&self) -> &'static CStr {
        c"dense matmul"
    }

    fn run(&self, inputs: &[Tensor], outputs: &mut [Tensor]) {
        let (x, w, y) = (inputs[0].f32(), inputs[1].f32(), outputs[0].f32_mut());
        if self.transposed {
            let w = Matrix { data: w.as_ptr(), row: self.inputs, column: 1 };
            product(x, self.out, &w, self.inputs, y, self.precision);
        } else {
            dense_times_transpose(x, w, self.inputs, y, self.precision);
        }
    }

    fn gradients(&self, call: &Backward) -> Result<Vec<Array>> {
        let ([x, w], dy) = (&call.primals[..], &call.cotangents[0]) else {
            return Err(Exception::custom("a product has two inputs"));
        };
        let mut gradients = Vec::new();
        for &input in &call.wanted {
            gradients.push(if input == 0 {
                DenseMatmul { transposed: !self.transposed, precision: self.precision }.apply(dy, w)?
            } else {
                let (x, dy) = (x.reshape(&[-1, x.dim(-1)])?, dy.reshape(&[-1, dy.dim(-1)])?);
                let (left, right) = if self.transposed { (x, dy) } else { (dy, x) };
                left.transpose()?.matmul(&right)?
            });
        }
        Ok(gradients)
    }
}
