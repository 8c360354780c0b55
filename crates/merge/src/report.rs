//! fuse_report.json: what each layer became, and how much of the adapter survived it.

use serde::Serialize;

/// The report's name in the fused directory.
pub const REPORT_FILE: &str = "fuse_report.json";

/// One touched weight.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerReport {
    /// Module path.
    pub path: String,
    /// `lora`, `dora` or `full`.
    pub kind: String,
    /// R; none for whole weights.
    pub rank: Option<i32>,
    /// s; none for whole weights.
    pub scale: Option<f32>,
    /// How the base stores it (`4 bits, groups of 64`, or a float type).
    pub from: String,
    /// How the result stores it.
    pub to: String,
    /// ||W||, the Frobenius norm of the base's weight.
    pub weight_norm: f64,
    /// ||W' - W||, of the exact update.
    pub delta_norm: f64,
    /// ||stored - W'|| / ||W' - W||: the share of the update that storing it cost; 0 where the update is nothing.
    pub relative_error: f64,
    /// <stored - W, W' - W> / ||W' - W||^2: how much of the update is there, 1 is all of it; 1 where it is nothing.
    pub survival: f64,
}

impl LayerReport {
    /// Whether the weight was written anew; an update of nothing leaves the base's bytes in place.
    pub fn changed(&self) -> bool {
        self.delta_norm > 0.0
    }
}

/// All layers together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Totals {
    /// Layers that were written anew.
    pub changed: usize,
    /// Layers whose update is nothing, left as they were.
    pub unchanged: usize,
    /// Tensors copied byte for byte.
    pub copied_tensors: usize,
    /// Tensors written.
    pub tensors: usize,
    /// Bytes of the tensors written.
    pub bytes: u64,
    /// Root of the sum of the squared `delta_norm`.
    pub delta_norm: f64,
    /// The same of the errors, over `delta_norm`.
    pub relative_error: f64,
    /// The layer with the greatest `relative_error`.
    pub worst: Option<String>,
}

/// The whole report.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FuseReport {
    /// Version of this form: 1.
    pub schema: u32,
    /// `fuse`.
    pub kind: String,
    /// The base, as given.
    pub base: String,
    /// `lora`, `dora` or `full`.
    pub adapter: String,
    /// `raise`, `dense` or `same`.
    pub policy: String,
    /// Whether every packed weight of the model was made dense.
    pub dequantize: bool,
    /// All layers together.
    pub totals: Totals,
    /// The layers the adapter names, by path.
    pub layers: Vec<LayerReport>,
}

impl Totals {
    /// The totals of `layers`; the counts of tensors are the writer's.
    pub(crate) fn of(layers: &[LayerReport], copied_tensors: usize, tensors: usize, bytes: u64) -> Self {
        let root = |f: fn(&LayerReport) -> f64| layers.iter().map(|l| f(l).powi(2)).sum::<f64>().sqrt();
        let delta = root(|l| l.delta_norm);
        let error = root(|l| l.delta_norm * l.relative_error);
        let worst = layers
            .iter()
            .filter(|l| l.changed())
            .max_by(|a, b| a.relative_error.total_cmp(&b.relative_error));
        let changed = layers.iter().filter(|l| l.changed()).count();
        Self {
            changed,
            unchanged: layers.len() - changed,
            copied_tensors,
            tensors,
            bytes,
            delta_norm: delta,
            relative_error: if delta > 0.0 { error / delta } else { 0.0 },
            worst: worst.map(|l| l.path.clone()),
        }
    }
}
