//! Fusing tiny models: against the unfused network, against the formulas in f64, against the base's own bytes; and what
//! is refused.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a panic is a test's report")]

mod bytes;
mod equal;
mod fold;
mod formulas;
mod refusals;
mod support;
