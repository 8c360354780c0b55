//! Fusing tiny models, merging adapters of them: against the unfused network, against the formulas in f64, against the base's own bytes; and what
//! is refused.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a panic is a test's report")]

mod bytes;
mod combine;
mod equal;
mod extract;
mod fold;
mod formulas;
mod refusals;
mod support;
