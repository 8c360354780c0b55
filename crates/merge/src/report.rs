//! fuse_report.json: what each layer became, how much of the adapter survived it, and whether that is enough.

use serde::Serialize;
use serde_json::{Value, json};

use graft_adapters::Provenance;

use crate::Plan;

/// The report's name in the fused directory.
pub const REPORT_FILE: &str = "fuse_report.json";
/// The share of an update, or of its effect, below which a fused model is not kept.
pub const ENOUGH: f64 = 0.9;
/// KL(adapter || base) in nats below which an adapter hardly changes the model: what remains of it is judged by the weights.
pub const HARDLY: f64 = 1e-5;

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
    /// The root of the mean square of W' - W in steps of the base's grid; none where the base is dense.
    pub delta_steps: Option<f64>,
    /// ||stored - W'|| / ||W' - W||; 0 where the update is nothing.
    pub relative_error: f64,
    /// The share of the update that survives, `1 - relative_error^2`: 1 is all of it, below 0 the rounding is the larger part.
    pub kept: f64,
    /// Cosine of stored - W and W' - W.
    pub cosine: f64,
    /// The share of elements that are stored as another number than the base's.
    pub codes_changed: f64,
    /// `sqrt(tr(D G D^T))` of the update D for inputs with moments G: its size at the output, by token; where inputs were observed.
    pub effect_norm: Option<f64>,
    /// The share of that which survives.
    pub effect_kept: Option<f64>,
    /// The share of rows whose errors were made good by later columns, where that was tried.
    pub compensated: Option<f64>,
    /// Why it has not the form that the policy names first.
    pub reason: Option<String>,
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
    /// Weights that have not the form that the policy names first.
    pub fallen_back: usize,
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
    /// The root of the mean square of [`LayerReport::delta_steps`] of the packed weights.
    pub delta_steps: Option<f64>,
    /// ||stored - W'|| / ||W' - W|| of all weights together.
    pub relative_error: f64,
    /// `1 - relative_error^2`.
    pub kept: f64,
    /// The share of the update's size at the outputs that survives, of the weights whose inputs were observed.
    pub effect_kept: Option<f64>,
    /// The weight that keeps the smallest share.
    pub worst: Option<String>,
}

/// A number and the two ends of its 95 % interval over rows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Estimated {
    /// The number.
    pub value: f64,
    /// Where the interval begins and ends.
    pub interval: [f64; 2],
}

/// How far one model is from the adapter on its base, by token.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Distance {
    /// Mean KL(adapter || model) in nats.
    pub kl: Estimated,
    /// Its 99th percentile over tokens.
    pub kl_p99: f64,
    /// The share of tokens at which both hold the same one for the most likely.
    pub agreement: f64,
}

/// A number of each of the three models.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Three {
    /// The base alone.
    pub base: f64,
    /// The base with the adapter beside it.
    pub adapter: f64,
    /// The fused model.
    pub fused: f64,
}

/// The score of `graft eval`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Scores {
    /// The metric's name.
    pub metric: String,
    /// Shares of right answers.
    pub score: Three,
    /// fused - adapter, paired by rows.
    pub difference: Estimated,
}

/// The whole model beside the adapter on its base, on rows that were not trained on.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelReport {
    /// The file of the rows.
    pub data: String,
    /// Rows and targets measured.
    pub rows: usize,
    /// Targets, which are the tokens measured.
    pub tokens: usize,
    /// The fused model.
    pub fused: Distance,
    /// The base, as a yardstick.
    pub base: Distance,
    /// `1 - KL(adapter || fused) / KL(adapter || base)`.
    pub kept: Estimated,
    /// exp of the mean loss of the targets.
    pub perplexity: Three,
    /// With `--base`: the fused model beside the adapter on the base that it was trained on.
    pub trained: Option<Distance>,
    /// Where a metric was given.
    pub scores: Option<Scores>,
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
    /// `raise`, `dense`, `same` or `fold`.
    pub policy: String,
    /// Whether every packed weight of the model was made dense.
    pub dequantize: bool,
    /// What `fold` left to an adapter: the number of weights with a low-rank part in the directory's adapters.safetensors.
    pub low_rank_left: usize,
    /// Sizes foreseen.
    pub plan: Plan,
    /// `model`, `layers` or `off`.
    pub verify: String,
    /// By what the result was judged: `model`, `effect`, `weights`, or nothing (`off`).
    pub judged_by: String,
    /// All layers together.
    pub totals: Totals,
    /// The whole model, where it was verified.
    pub model: Option<ModelReport>,
    /// Seconds, and the peak memory of the process in bytes.
    pub seconds: f64,
    /// As above.
    pub peak_memory_bytes: u64,
    /// From what it was made.
    pub provenance: Provenance,
    /// The weights the adapter names, by path.
    pub layers: Vec<LayerReport>,
}

impl Totals {
    /// Adds up what the layers say.
    pub(crate) fn sum_up(&mut self, layers: &[LayerReport]) {
        let sum = |f: &dyn Fn(&LayerReport) -> f64| layers.iter().map(f).sum::<f64>();
        let squared = sum(&|l| l.delta_norm.powi(2));
        let share = |part: f64| if squared > 0.0 { part / squared } else { 0.0 };
        self.changed = layers.iter().filter(|l| l.changed()).count();
        self.unchanged = layers.len() - self.changed;
        self.fallen_back = layers.iter().filter(|l| l.reason.is_some()).count();
        self.delta_norm = squared.sqrt();
        let lost = share(sum(&|l| (l.delta_norm * l.relative_error).powi(2)));
        (self.relative_error, self.kept) = (lost.sqrt(), 1.0 - lost);
        let effect = sum(&|l| l.effect_norm.unwrap_or(0.0).powi(2));
        let kept = sum(&|l| l.effect_norm.unwrap_or(0.0).powi(2) * l.effect_kept.unwrap_or(0.0));
        self.effect_kept = (effect > 0.0).then(|| kept / effect);
        let steps: Vec<f64> = layers.iter().filter_map(|l| l.delta_steps).collect();
        let mean = steps.iter().map(|s| s * s).sum::<f64>() / steps.len() as f64;
        self.delta_steps = (!steps.is_empty()).then(|| mean.sqrt());
        let worst = layers.iter().filter(|l| l.changed());
        let worst = worst.min_by(|a, b| a.kept.total_cmp(&b.kept));
        self.worst = worst.map(|l| l.path.clone());
    }
}

impl FuseReport {
    /// The few numbers that go into the fused model itself.
    pub fn summary(&self) -> Value {
        let totals = &self.totals;
        let mut summary =
            json!({"changed": totals.changed, "kept": totals.kept, "effect_kept": totals.effect_kept});
        if let Some(model) = &self.model {
            summary["model"] = json!({
                "tokens": model.tokens, "kl": model.fused.kl.value, "kl_of_base": model.base.kl.value, "kept": model.kept.value,
            });
        }
        summary
    }

    /// By what the result is judged, and the most that may have been kept by that measure.
    pub fn judge(&self) -> (&'static str, f64) {
        let effect = self.layers.iter().all(|l| !l.changed() || l.effect_kept.is_some());
        match (&self.model, self.totals.effect_kept) {
            _ if self.verify == "off" => ("", 1.0),
            (Some(model), _) if model.base.kl.value >= HARDLY => ("model", model.kept.interval[1]),
            (_, Some(kept)) if effect => ("effect", kept),
            _ => ("weights", self.totals.kept),
        }
    }

    /// Why the result is not worth keeping, and what to do; none if it is.
    pub fn shortfall(&self) -> Option<String> {
        let (by, most) = self.judge();
        if self.totals.changed == 0 || most >= ENOUGH {
            return None;
        }
        let what = match by {
            "model" => "the adapter's effect on the model's answers",
            "effect" => "the update's effect on the outputs of its weights",
            _ => "the update",
        };
        let lost =
            format!("at most {:.1} % of {what} was kept, {:.0} % are wanted", 100.0 * most, 100.0 * ENOUGH);
        let unfused = "serve the adapter unfused (graft server --adapter), or train it further";
        // A reason says that floats were tried, too.
        let untried =
            |layer: &LayerReport| layer.changed() && layer.reason.is_none() && layer.to.contains("bits");
        let packed = self.layers.iter().any(untried);
        let advice = match self.policy.as_str() {
            "same" => "--policy raise keeps more, with 8 bits".to_owned(),
            _ if packed => "--policy dense keeps more, in floats".to_owned(),
            _ => format!(
                "even the floats of this base are too coarse for so small an update: {unfused}, or fuse it into a base of finer numbers (--base)"
            ),
        };
        Some(format!("{lost}; {advice}; --force keeps the result all the same"))
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
