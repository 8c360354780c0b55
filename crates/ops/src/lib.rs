//! Array operations that mlx-rs lacks, or whose best form depends on where they run.
//!
//! Every operation is one public function with two forms that compute the same: plain MLX operations, which is what a
//! GPU wants, and on a CPU an operation of our own with its gradient, because MLX's CPU backend is scalar and
//! single-threaded. [`form()`] says which is in use. All C++ and all unsafe code of the workspace stand here.
//!
//! Shapes are written in these letters: N tokens (all rows of a batch, concatenated), H heads, K key/value heads,
//! D head dimension, E hidden, V vocabulary, M rows of a matrix.
#![allow(unsafe_code, reason = "this is the crate that talks to MLX and to the processor")]

mod adam;
mod attention;
#[cfg(graft_cpu)]
mod blas;
mod cholesky;
#[cfg(graft_cpu)]
mod cpu;
mod dora;
mod exp;
pub mod ffi;
mod form;
pub mod info;
mod level;
pub mod linalg;
mod linears;
mod loss;
mod low_rank;
pub mod minifloat;
mod norm;
mod pool;
mod rope;
mod rows;
mod weight;

pub use adam::{AdamStep, adam, squared_norm};
pub use attention::{Head, KeyValues, attention, attention_cached};
pub use cholesky::inverse_factor;
pub use dora::{row_factor, row_norms, row_squares};
pub use exp::exponentials;
pub use form::{Form, Precision, form, precision, set_allocator, set_form, set_precision, with_precision};
pub use level::{Level, best_cpu_level, cpu_level, set_cpu_level};
pub use linears::{Input, LinearRef, RowsUpdates, linears, linears_of_rows};
pub use loss::{cross_entropy, linear_cross_entropy};
pub use low_rank::{LowRank, arrange_update};
pub use mlx_rs::error::Exception;
pub use mlx_rs::{Array, Dtype};
pub use norm::{rms_norm, swiglu};
pub use pool::{set_threads, threads};
pub use rope::{RopeTable, rope};

pub use rows::Rows;
pub use weight::{Arranged, PackedRef, WeightRef, arrange, dequantize, matmul, matmul_t, rows};

/// The result of an operation: an array, or what is wrong with the request.
pub type Result<T> = std::result::Result<T, Exception>;
