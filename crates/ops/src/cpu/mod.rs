//! Our own operations for a CPU: kernels, and the MLX primitive that runs them.

pub(crate) mod attention;
pub(crate) mod dense;
pub(crate) mod gemm;
pub(crate) mod level;
pub(crate) mod loss;
pub(crate) mod norm;
pub(crate) mod packed;
pub(crate) mod panels;
pub(crate) mod primitive;
mod scratch;
mod simd;
mod simd_portable;
#[cfg(target_arch = "x86_64")]
mod simd_x86;
#[cfg(target_arch = "x86_64")]
mod vnni;
