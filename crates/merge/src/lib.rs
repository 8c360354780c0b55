//! Adapters grafted into a base for good: tensors in, tensors out, no network.
//!
//! A model of any size is fused in the memory of its largest weight. What the adapter does not touch is copied byte for
//! byte, and the result stands beside its place until whoever asked for it has looked at it.

mod error;
mod fuse;
mod layer;
mod plan;
mod provenance;
mod report;
mod sums;

pub use error::{Error, Result};
pub use fuse::{Event, FuseOptions, Inputs, Sibling, Watch, fuse};
pub use layer::Policy;
pub use plan::Plan;
pub use provenance::{Provenance, Source};
pub use report::{
    Distance, ENOUGH, Estimated, FuseReport, HARDLY, LayerReport, ModelReport, REPORT_FILE, Scores, Three,
    Totals,
};
