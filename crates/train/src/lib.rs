//! Fine-tuning: data, batches, loss, optimizers, the loop, and a state from which a run goes on exactly.
//!
//! What is differentiated are the tensors of a table (LoRA, DoRA) or dense weights (`full`); packed codes are never
//! written. Shape letters: B batch, L tokens of a row, N tokens of all rows concatenated, M targets, E hidden,
//! V vocabulary, R rank.
//!
//! [`run()`] trains; [`Data::load`] makes its rows, [`Data::warnings`] says what is wrong with them, [`test()`] and [`evaluate`] measure.

mod batch;
mod check;
mod config;
mod data;
mod encode;
mod error;
mod event;
mod fault;
mod graph;
mod loss;
mod message;
mod metrics;
mod optim;
mod params;
mod question;
mod rng;
mod run;
mod schedule;
mod score;
mod state;
mod stats;
mod step;

pub use batch::{Batch, Position, Walk, fixed_groups, groups};

pub use config::TrainConfig;
pub use data::{Data, DataConfig, Encoder, Example, Marks, Row, RowResult, Split, read_rows};
pub use encode::ModelEncoder;
pub use error::{Error, NOT_FINITE, Result};
pub use event::{Event, TrainReport};
pub use fault::{Fault, Warning};
pub use graph::Graph;
pub use loss::{Evaluation, batch_loss, evaluate, test};
pub use message::is_invisible;
pub use optim::{Adafactor, Optimizer, OptimizerState, Slot, clip_factor, global_norm};
pub use params::{OwnedRoute, Params, SiteSpec};
pub use question::Question;
pub use rng::{Rng, mix};
pub use run::{Outcome, Summary, run};
pub use schedule::{Curve, Schedule, Warmup};
pub use score::Metric;
pub use state::{Progress, RunKey, States, Window};
pub use stats::{Estimate, bootstrap, quantile, student};
pub use step::{StepResult, Trainer, TrainerSettings};
