//! Low-rank adapters: the maths, the table that a model is handed, and the files.
//!
//! W is (out, in), x is (..., in), A is (in, R), B is (R, out), s the scale:
//!
//! - LoRA: `y = W x + b + s (x A) B`
//! - DoRA: `y = c * (W x + s (x A) B) + b`, with `c = m / n` and `n_o = ||W_o + s (A B)^T_o||`, no gradient through n
//! - embedding, E (V, E): rows `E[t] + s A[t] B`, tied head `x E^T + s (x B^T) A^T` with A (V, R), B (R, E)
//!
//! LoRA and DoRA are one struct, [`Adapter`]: a magnitude is there or it is not. A [`Linear`] owns no adapter;
//! each forward is handed a [`Route`]. Nothing here knows an architecture.

mod adapter;
mod config;
mod error;
mod fingerprint;
mod linear;
mod peft;
mod peft_write;
mod provenance;
mod route;
mod set;
mod stored;
mod writer;

pub use adapter::{Adapter, Kind};
pub use config::{AdapterConfig, FineTuneType, LoraParameters};
pub use error::{Error, Result};
pub use fingerprint::{Fingerprint, file_hash};
pub use linear::{Embedding, Linear, Norm};
pub use peft_write::export;
pub use provenance::{Origin, Provenance};
pub use route::{Dropout, Route, RouteRows, Site, Table};
pub use set::{ADAPTER_FILE, AdapterSet, CONFIG_FILE, Target};
pub use stored::{StoredAdapter, StoredSet};
pub use writer::AdapterWriter;
