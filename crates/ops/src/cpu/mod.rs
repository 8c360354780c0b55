//! Our own operations for a CPU: kernels, and the MLX primitive that runs them.

pub(crate) mod adam;
#[cfg(target_arch = "x86_64")]
pub(crate) mod answers;
pub(crate) mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
pub(crate) mod cached;
mod codes;
pub(crate) mod dora;
pub(crate) mod exp;
mod few_rows;
pub(crate) mod gemm;
pub(crate) mod level;
pub(crate) mod linears;
mod linears_gradient;
pub(crate) mod loss;
pub(crate) mod norm;
pub(crate) mod packed;
pub(crate) mod panels;
pub(crate) mod primitive;
pub(crate) mod rope;
#[cfg(target_arch = "x86_64")]
mod rounded;
mod scratch;
mod simd;
mod simd_portable;
#[cfg(target_arch = "x86_64")]
mod simd_x86;
mod slim;
mod source;
pub(crate) mod tall;
#[cfg(target_arch = "x86_64")]
mod vnni;
pub(crate) mod weights;
