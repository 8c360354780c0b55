//! Adapters grafted into a base for good, merged into one another, and taken out of a fine-tuned model: tensors in, tensors
//! out, no network.
//!
//! A model of any size is fused in the memory of its largest weight. What the adapter does not touch is copied byte for
//! byte, and the result stands beside its place until whoever asked for it has looked at it.

mod combine;
mod dense;
mod error;
mod extract;
mod fuse;
mod layer;
mod method;
mod module;
mod output;
mod plan;
mod recipe;
mod report;
mod sums;

pub use combine::{MergeBase, MergeOptions, MergeSource, merge};
pub use error::{Error, Result};
pub use extract::{ExtractOptions, extract, resize};
pub use fuse::{Allowed, Event, FuseOptions, Inputs, Sibling, Watch, check, fuse};
pub use layer::Policy;
pub use method::{Filtered, Method, Setting, Size, Sparsify};
pub use plan::Plan;
pub use recipe::{InputParameters, MergeRecipe, RecipeInput, RecipeParameters};
pub use report::{
    Distance, ENOUGH, Estimated, FuseReport, HARDLY, LayerReport, MERGE_REPORT_FILE, MergeLayer, MergeReport,
    MergeTotals, ModelReport, REPORT_FILE, Scores, Three, Totals,
};
