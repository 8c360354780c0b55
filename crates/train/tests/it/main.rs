//! Training against independent references: finite differences, MLX's own optimizers, and itself by another way.
#![allow(clippy::unwrap_used, clippy::excessive_precision, reason = "tests: a panic is the report")]

mod check;
mod data;
mod evaluations;
mod golden;
mod gradients;
mod memory;
mod optimizers;
mod runs;
mod support;
