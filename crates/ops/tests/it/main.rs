//! Our CPU operations against MLX's own, at every level of instructions; their gradients; and the fixed order of sums.

#![cfg(graft_cpu)]
#![allow(clippy::unwrap_used, reason = "tests: a panic is the report")]

mod answers;
mod arranged;
mod attention;
mod blas;
mod cholesky;
mod empty;
mod fixed_order;
mod floats;
mod linalg;
mod linears;
mod loss;
mod packed;
mod rows;
mod support;
