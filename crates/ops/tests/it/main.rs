//! Our CPU operations against MLX's own, at every level of instructions; their gradients; and the fixed order of sums.

#![cfg(graft_cpu)]

mod arranged;
mod attention;
mod blas;
mod loss;
mod packed;
mod rows;
mod support;
