//! Our own operations for a CPU: kernels, and the MLX primitive that runs them.

pub(crate) mod gemm;
pub(crate) mod level;
pub(crate) mod scratch;
pub(crate) mod simd;
mod simd_portable;
#[cfg(target_arch = "x86_64")]
mod simd_x86;
