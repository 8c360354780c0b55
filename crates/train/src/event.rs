//! What a run tells its caller while it runs.

use std::path::PathBuf;

/// One thing that happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Everything is set up; training begins or goes on.
    Started {
        /// Numbers that are trained.
        trainable: u64,
        /// Numbers of the whole model, adapters not counted.
        total: u64,
        /// Modules with an adapter, or whole tensors for `full`.
        modules: usize,
        /// Iterations done already (0 unless resumed).
        iter: u64,
        /// Iterations in all.
        iters: u64,
        /// Batches of one pass over the data.
        batches_per_pass: usize,
    },
    /// Something the user should know.
    Warning {
        /// One sentence.
        text: String,
    },
    /// An iteration is done.
    Step {
        /// Iterations done.
        iter: u64,
    },
    /// A report over the iterations since the last one.
    Train(TrainReport),
    /// A validation goes on.
    ValidProgress {
        /// Batches done.
        done: usize,
        /// Batches in all.
        of: usize,
    },
    /// A validation is done.
    Valid {
        /// Iterations done.
        iter: u64,
        /// Token-weighted mean loss.
        loss: f64,
        /// Targets.
        tokens: u64,
        /// How long it took.
        seconds: f64,
    },
    /// [`crate::TrainConfig::samples`] were answered.
    Samples {
        /// Iterations done.
        iter: u64,
        /// The ids of the answers, without those that end them.
        answers: Vec<Vec<u32>>,
    },
    /// The adapter was saved.
    Saved {
        /// Iterations done.
        iter: u64,
        /// The checkpoint file.
        file: PathBuf,
    },
}

/// One line of metrics.jsonl.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct TrainReport {
    /// Iterations done.
    pub iter: u64,
    /// Token-weighted mean since the last report.
    pub loss: f64,
    /// The last update's rate.
    pub learning_rate: f64,
    /// Norm of the last update's gradient, before clipping.
    pub grad_norm: f64,
    /// Trained targets since the start.
    pub tokens: u64,
    /// Trained targets per second since the last report, evaluation and saving not counted.
    pub tokens_per_second: f64,
    /// Mean seconds of an iteration since the last report, evaluation and saving not counted.
    pub step_seconds: f64,
    /// Peak memory of the process.
    pub peak_memory_bytes: u64,
    /// Peak memory of MLX.
    pub mlx_peak_bytes: u64,
}
