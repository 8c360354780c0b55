//! fuse_report.json: what each layer became, and how much of the adapter survived it.

use serde::Serialize;

/// The report's name in the fused directory.
pub const REPORT_FILE: &str = "fuse_report.json";

/// One weight that the adapter names.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerReport {
    /// Module path; the tensor's name if it is no `.weight`.
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
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Totals {
    /// Weights that were written anew.
    pub changed: usize,
    /// Weights whose update is nothing, left as they were.
    pub unchanged: usize,
    /// Tensors copied byte for byte.
    pub copied_tensors: usize,
    /// Tensors written.
    pub tensors: usize,
    /// Bytes of the base's tensors.
    pub base_bytes: u64,
    /// Bytes of the tensors written.
    pub bytes: u64,
    /// ||W' - W|| of all weights together.
    pub delta_norm: f64,
    /// ||stored - W'|| / ||W' - W|| of all weights together.
    pub relative_error: f64,
    /// <stored - W, W' - W> / ||W' - W||^2 of all weights together.
    pub survival: f64,
    /// The weight with the greatest `relative_error`.
    pub worst: Option<String>,
}

/// The whole report.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FuseReport {
    /// Version of this form: 1.
    pub schema: u32,
    /// `fuse`.
    pub kind: String,
    /// Version of graft.
    pub version: String,
    /// The base, as given.
    pub base: String,
    /// The adapter, as given.
    pub adapter: String,
    /// `lora`, `dora` or `full`.
    pub fine_tune_type: String,
    /// `raise`, `dense` or `same`.
    pub policy: String,
    /// Whether every packed weight of the model was made dense.
    pub dequantize: bool,
    /// All layers together.
    pub totals: Totals,
    /// The weights the adapter names, by path.
    pub layers: Vec<LayerReport>,
}

impl Totals {
    /// Adds up what the layers say.
    pub(crate) fn sum_up(&mut self, layers: &[LayerReport]) {
        let sum = |f: fn(&LayerReport) -> f64| layers.iter().map(f).sum::<f64>();
        let squared = sum(|l| l.delta_norm.powi(2));
        let share = |part: f64, none: f64| if squared > 0.0 { part / squared } else { none };
        self.changed = layers.iter().filter(|l| l.changed()).count();
        self.unchanged = layers.len() - self.changed;
        self.delta_norm = squared.sqrt();
        self.relative_error = share(sum(|l| (l.delta_norm * l.relative_error).powi(2)), 0.0).sqrt();
        self.survival = share(sum(|l| l.delta_norm.powi(2) * l.survival), 1.0);
        let worst = layers.iter().filter(|l| l.changed());
        let worst = worst.max_by(|a, b| a.relative_error.total_cmp(&b.relative_error));
        self.worst = worst.map(|l| l.path.clone());
    }
}

/// The report's name in an adapter directory that was merged, extracted or resized.
pub const MERGE_REPORT_FILE: &str = "merge_report.json";

/// What a merge, an extraction or a cut made of one module.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MergeLayer {
    /// Module path.
    pub path: String,
    /// R of the result.
    pub rank: i32,
    /// Which of the adapters have an update of it, by their place; empty where there is but one input.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<usize>,
    /// ||sum||, the Frobenius norm of the combined update before it is cut to a rank; for DoRA, of its low-rank part.
    pub norm: f64,
    /// ||result - sum|| / ||sum||: what cutting it to a rank cost.
    pub error: f64,
}

/// All modules together.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct MergeTotals {
    /// How many there are.
    pub modules: usize,
    /// ||sum|| of all together.
    pub norm: f64,
    /// ||result - sum|| / ||sum|| of all together.
    pub error: f64,
    /// The module with the greatest `error`.
    pub worst: Option<String>,
}

impl MergeTotals {
    /// Adds up what the layers say.
    pub(crate) fn of(layers: &[MergeLayer]) -> Self {
        let squared: f64 = layers.iter().map(|l| l.norm.powi(2)).sum();
        let lost: f64 = layers.iter().map(|l| (l.norm * l.error).powi(2)).sum();
        let worst = layers.iter().filter(|l| l.error > 0.0).max_by(|a, b| a.error.total_cmp(&b.error));
        Self {
            modules: layers.len(),
            norm: squared.sqrt(),
            error: if squared > 0.0 { (lost / squared).sqrt() } else { 0.0 },
            worst: worst.map(|l| l.path.clone()),
        }
    }
}

/// The whole report.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MergeReport {
    /// Version of this form: 1.
    pub schema: u32,
    /// `merge`, `extract` or `resize`.
    pub kind: String,
    /// Version of graft.
    pub version: String,
    /// The method's name.
    pub method: String,
    /// `lora`, or `dora` as soon as one of the adapters is.
    pub fine_tune_type: String,
    /// The base, as given; none where it was not needed.
    pub base: Option<String>,
    /// The adapters, as given; of an extraction the fine-tuned model.
    pub adapters: Vec<String>,
    /// Tensors that changed and have no low-rank form, which an extraction did without.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<String>,
    /// All modules together.
    pub totals: MergeTotals,
    /// Each module, by path.
    pub layers: Vec<MergeLayer>,
}
