//! Adapters grafted into a base for good: tensors in, tensors out, no network.
//!
//! A model of any size is fused in the memory of its largest weight. What the adapter does not touch is copied byte for
//! byte, and the result takes its place when it is complete.

mod error;
mod fuse;
mod layer;
mod report;

pub use error::{Error, Result};
pub use fuse::{Event, FuseOptions, fuse};
pub use layer::Policy;
pub use report::{FuseReport, LayerReport, REPORT_FILE, Totals};
