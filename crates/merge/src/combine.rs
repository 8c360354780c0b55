//! Several adapters to one, module by module.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use graft_adapters::{AdapterSet, AdapterWriter, FineTuneType, Fingerprint, Kind, Origin, Provenance};
use graft_ops::Dtype;
use graft_quant::{Checkpoint, Weight};
use rayon::prelude::*;
use serde_json::json;

use crate::dense::{self, Elements};
use crate::fuse::{Allowed, check, kind_of};
use crate::module::{Module, Outcome, Part, STRIP, dot, padded};
use crate::output::{described, last_layers, layer_of, layers_of};
use crate::{
    Error, Event, MERGE_REPORT_FILE, MergeLayer, MergeReport, MergeTotals, Method, Result, Setting, Size,
    Sparsify,
};

/// An adapter that takes part.
#[derive(Debug)]
pub struct MergeSource {
    /// What it is called, and its hashes.
    pub origin: Origin,
    /// Its tensors.
    pub set: AdapterSet,
    /// w, the factor of its update.
    pub weight: Setting,
    /// p, the share of its elements that stays where the method drops some; above 0, at most 1.
    pub density: Setting,
}

/// The base that the adapters belong to.
#[derive(Debug)]
pub struct MergeBase<'a> {
    /// Its weights.
    pub checkpoint: &'a Checkpoint,
    /// What it is called, and its hashes.
    pub origin: Origin,
}

/// How to merge.
#[derive(Debug, Clone, PartialEq)]
pub struct MergeOptions {
    /// The method.
    pub method: Method,
    /// The rank of the result.
    pub size: Size,
    /// Divide by the sum of the weights; none is the method's own way.
    pub normalize: Option<bool>,
    /// Factor of the result.
    pub lambda: f64,
    /// Place on the arc of `slerp`, 0 the first and 1 the second; none is w2 / (w1 + w2).
    pub t: Option<Setting>,
    /// Seed of what is drawn.
    pub seed: u64,
    /// Take adapters of other models of the same shapes, too, with a warning.
    pub force: bool,
}

/// Merges adapters of one base to an adapter directory at `out`, whole or not at all.
///
/// A base is needed where one of them is DoRA; with one, all are checked against it. `stop` is looked at between modules.
///
/// # Errors
/// When an adapter is for another base, has another shape or has no low-rank form, when a setting has no meaning, when the
/// target exists, or when `stop` was set.
pub fn merge(
    sources: &[MergeSource],
    base: Option<&MergeBase>,
    options: &MergeOptions,
    out: &Path,
    stop: &AtomicBool,
    on_event: &mut dyn FnMut(Event),
) -> Result<MergeReport> {
    check_options(sources, options)?;
    check_sources(sources, base, options.force, on_event)?;
    let job = Job::new(sources, base, options)?;
    job.run(out, stop, on_event)
}

/// Settings that have a meaning.
fn check_options(sources: &[MergeSource], options: &MergeOptions) -> Result<()> {
    let refuse = |what: &str, expected: &str, found: String| {
        Err(Error::Recipe { what: what.into(), expected: expected.into(), found })
    };
    let count = sources.len();
    match options.method {
        Method::Slerp if !(1..=2).contains(&count) => {
            return refuse("slerp", "two adapters, the ends of an arc", format!("{count}"));
        }
        _ if count == 0 => return refuse("adapters", "at least one", "none".into()),
        Method::Cat if options.size != Size::Full => {
            return refuse(
                "cat",
                "no rank and no energy, since it loses nothing (svd cuts)",
                "one of them".into(),
            );
        }
        Method::Svd if options.size == Size::Full => {
            return refuse("svd", "a rank or an energy to cut to", "neither".into());
        }
        method if options.t.is_some() && method != Method::Slerp => {
            return refuse("t", "nothing, as it belongs to slerp", "a value".into());
        }
        Method::Slerp if options.normalize == Some(true) => {
            return refuse("normalize with slerp", "nothing, as an arc has no sum of weights", "true".into());
        }
        _ => {}
    }
    // The arithmetic is f32's.
    let is_finite = |x: f64| (x as f32).is_finite();
    for source in sources {
        if let Some(w) = source.weight.refused(is_finite) {
            return refuse(&format!("weight of {}", source.origin.name), "a finite number", w.to_string());
        }
        if let Some(p) = source.density.refused(|p| p > 0.0 && p <= 1.0) {
            return refuse(
                &format!("density of {}", source.origin.name),
                "above 0 and at most 1",
                p.to_string(),
            );
        }
        let thins = matches!(options.method, Method::Sum { sparsify, .. } if sparsify != Sparsify::None);
        if !thins && source.density.refused(|p| p == 1.0).is_some() {
            let what = format!("density with {}", options.method.name());
            return refuse(
                &what,
                "nothing, as this method drops no elements (ties, dare_.. do)",
                "a value".into(),
            );
        }
    }
    if let Some(t) = options.t.as_ref().and_then(|t| t.refused(|t| (0.0..=1.0).contains(&t))) {
        return refuse("t", "from 0 to 1", t.to_string());
    }
    if !is_finite(options.lambda) {
        return refuse("lambda", "a finite number", options.lambda.to_string());
    }
    options.size.check()
}

/// Adapters that belong together, to the base, and to a merge.
fn check_sources(
    sources: &[MergeSource],
    base: Option<&MergeBase>,
    force: bool,
    on_event: &mut dyn FnMut(Event),
) -> Result<()> {
    let allowed = Allowed { other_model: force, other_precision: false };
    let mut seen: Option<(&MergeSource, Fingerprint)> = None;
    let mut shapes: BTreeMap<&str, ((i32, i32), &str)> = BTreeMap::new();
    let mut problems = Vec::new();
    for source in sources {
        let name = &source.origin.name;
        if source.set.config.fine_tune_type == FineTuneType::Full || !source.set.weights.is_empty() {
            let whole: Vec<&str> = source.set.weights.keys().map(String::as_str).take(3).collect();
            return Err(Error::Unsuited {
                purpose: "merged",
                name: name.clone(),
                what: format!("whole weights ({}..)", whole.join(", ")),
                why: "they are no low-rank update; graft adapter extract makes one of a fine-tuned model"
                    .into(),
            });
        }
        if let Some(base) = base {
            check(base.checkpoint, &source.set, allowed, on_event)
                .map_err(|error| Error::Input { name: name.clone(), source: Box::new(error) })?;
        } else if source.set.adapters.values().any(|adapter| adapter.magnitude.is_some()) {
            return Err(Error::NeedsBase { name: name.clone() });
        }
        match (Fingerprint::read(&source.set.config), &seen) {
            (Some(own), Some((first, other))) => {
                let other_model = own.other_model_than(other);
                if let Some(why) = other_model.as_ref().filter(|_| force && base.is_none()) {
                    on_event(Event::Warning(format!("{name} and {}: {why}", first.origin.name)));
                }
                let other_model =
                    other_model.filter(|_| !force).map(|why| format!("{why} (--force merges them)"));
                if let Some(why) = own.foreign_to(other).or(other_model) {
                    let why = format!("{why}; {} was trained on {}", first.origin.name, other.lineage);
                    return Err(Error::Unsuited {
                        purpose: "merged",
                        name: name.clone(),
                        what: "an adapter of another base".into(),
                        why,
                    });
                }
            }
            (Some(own), None) => seen = Some((source, own)),
            (None, _) => {}
        }
        for (path, adapter) in &source.set.adapters {
            let shape = (adapter.a.dim(0), adapter.b.dim(1));
            let (first, other) = shapes.entry(path).or_insert((shape, name));
            if *first != shape {
                problems.push(format!("{path}: {first:?} in {other}, {shape:?} in {name}"));
            }
        }
    }
    if problems.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = sources.iter().map(|s| s.origin.name.as_str()).collect();
    Err(Error::Unsuited {
        purpose: "merged",
        name: names.join(", "),
        what: "adapters of different shapes".into(),
        why: format!("they were trained on different bases\n  {}", problems.join("\n  ")),
    })
}

/// A merge under way.
struct Job<'a> {
    sources: &'a [MergeSource],
    base: Option<&'a MergeBase<'a>>,
    options: &'a MergeOptions,
    /// Whether the result has magnitudes: as soon as one of the sources has.
    dora: bool,
    paths: BTreeSet<&'a str>,
    /// Blocks of the base; where it is not given, up to the last that an adapter names.
    layers: usize,
}

impl<'a> Job<'a> {
    fn new(
        sources: &'a [MergeSource],
        base: Option<&'a MergeBase<'a>>,
        options: &'a MergeOptions,
    ) -> Result<Self> {
        let adapters = || sources.iter().flat_map(|s| &s.set.adapters);
        let paths: BTreeSet<&str> = adapters().map(|(path, _)| path.as_str()).collect();
        let dora = adapters().any(|(_, adapter)| adapter.magnitude.is_some());
        if let Some(path) = paths.iter().find(|path| dora && kind_of(path) == Kind::Embedding) {
            return Err(Error::Unsuited {
 purpose: "merged",
                name: (*path).to_owned(),
                what: "an embedding beside DoRA".into(),
                why: "an adapter directory is LoRA or DoRA as a whole, and embeddings have no DoRA: merge adapters without an update of \
                      it, or LoRA adapters alone"
                    .into(),
            });
        }
        let said = base.and_then(|b| layers_of(b.checkpoint));
        let named = paths.iter().filter_map(|path| layer_of(path)).max().map_or(0, |last| last + 1);
        Ok(Self { sources, base, options, dora, paths, layers: said.unwrap_or(named) })
    }

    fn run(&self, out: &Path, stop: &AtomicBool, on_event: &mut dyn FnMut(Event)) -> Result<MergeReport> {
        let mut writer = AdapterWriter::create(out)?;
        let pad = self.common_rank();
        // A dense matrix is made in it, one after the other.
        let mut room = Vec::new();
        let mut layers = Vec::new();
        for (done, path) in self.paths.iter().enumerate() {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::Stopped);
            }
            let (module, mut outcome) = self.module(path, &mut room)?;
            if let Some(rank) = pad {
                outcome.adapter = padded(outcome.adapter, rank)?;
            }
            writer.add(path, &outcome.adapter)?;
            layers.push(MergeLayer {
                path: (*path).to_owned(),
                rank: outcome.adapter.rank(),
                adapters: module.parts.iter().map(|part| part.source).collect(),
                norm: outcome.norm,
                error: outcome.error,
            });
            drop((module, outcome));
            mlx_rs::memory::clear_cache()?;
            on_event(Event::Tensor { done: done + 1, total: self.paths.len() });
        }
        let report = self.report(layers);
        self.warn(&report, on_event);
        let text = serde_json::to_vec_pretty(&report).map_err(Error::Report)?;
        writer.file(MERGE_REPORT_FILE, &text)?;
        let mut set = self.described(&report, pad)?;
        self.provenance(&report).write(&mut set)?;
        writer.finish(&set)?;
        Ok(report)
    }

    /// One module, and what it becomes.
    fn module(&self, path: &'a str, room: &mut Vec<f32>) -> Result<(Module<'a>, Outcome)> {
        let depth = layer_of(path).map_or(f64::from(u8::from(kind_of(path) == Kind::Linear)), |layer| {
            layer as f64 / self.layers.saturating_sub(1).max(1) as f64
        });
        let base = match self.base.filter(|_| self.dora) {
            Some(base) => {
                // Floats of 16 bits would be widened for each product anew.
                let weight = match base.checkpoint.weight(path)? {
                    Weight::Dense(w) => Weight::Dense(w.as_dtype(Dtype::Float32)?),
                    packed => packed,
                };
                let norms = weight.row_norms_squared()?;
                Some((weight, norms))
            }
            None => None,
        };
        let mut module = Module { path, kind: kind_of(path), parts: Vec::new(), base };
        let mut total = 0.0;
        for (index, source) in self.sources.iter().enumerate() {
            let value = |setting: &Setting, what: &str| {
                value(setting, (path, depth), || format!("{what} of {}", source.origin.name))
            };
            let (weight, density) = (value(&source.weight, "weight")?, value(&source.density, "density")?);
            total += weight;
            if let Some(adapter) = source.set.adapters.get(path) {
                let factor = module.base.as_ref().map(|(w, n0)| adapter.factor_with(w, n0));
                let factor = factor.transpose()?.flatten();
                module.parts.push(Part { adapter, factor, weight, density, source: index });
            }
        }
        let normalize = self.options.normalize.unwrap_or(self.options.method.normalizes());
        let (lambda, size) = (self.options.lambda, self.options.size);
        if let Method::Sum { sparsify, consensus } = self.options.method
            && self.options.method.is_dense()
        {
            let seed = self.options.seed;
            let elements = Elements { sparsify, consensus, normalize, lambda, total_weight: total, seed };
            let outcome = dense::combine(&module, elements, size, room)?;
            return Ok((module, outcome));
        }
        let mut weights =
            if self.options.method == Method::Slerp { self.arc(&module, depth)? } else { module.weights() };
        let divisor = if normalize && total.abs() > 1e-8 { total } else { 1.0 };
        weights.iter_mut().for_each(|w| *w *= lambda / divisor);
        let outcome = module.sum(&weights, size)?;
        Ok((module, outcome))
    }

    /// The weights that put the result on the arc between two updates: sin((1 - t) o) / sin o and sin(t o) / sin o with o the
    /// angle between them, or 1 - t and t where they lie on a line. An update that is not there is zero.
    fn arc(&self, module: &Module, depth: f64) -> Result<Vec<f64>> {
        if self.sources.len() == 1 {
            return Ok(module.weights());
        }
        let at = (module.path, depth);
        let place = self.options.t.as_ref().map(|t| value(t, at, || "t".into())).transpose()?;
        let weight = |i: usize| {
            let source: &MergeSource = &self.sources[i];
            value(&source.weight, at, || format!("weight of {}", source.origin.name))
        };
        let (first, second) = (weight(0)?, weight(1)?);
        let t = place.unwrap_or(second / (first + second));
        if !(0.0..=1.0).contains(&t) {
            return Err(Error::Recipe {
                what: "weights of slerp".into(),
                expected: "two that are not negative, one of them above 0, or t".into(),
                found: format!("{first} and {second}"),
            });
        }
        if module.parts.len() < 2 {
            return Ok(module.parts.iter().map(|part| if part.source == 0 { 1.0 - t } else { t }).collect());
        }
        let mut sums = [0.0; 3];
        module.each_block(|rows| {
            let strips = (0..rows.count).into_par_iter().step_by(STRIP).map_init(Vec::new, |room, first| {
                let mut sums = [0.0; 3];
                rows.each_run(first..rows.count.min(first + STRIP), room, |_, _, updates| {
                    let (x, y) = updates.split_at(updates.len() / 2);
                    sums = [sums[0] + dot(x, x), sums[1] + dot(y, y), sums[2] + dot(x, y)];
                });
                sums
            });
            // Added in one order, whatever the number of threads.
            for strip in strips.collect::<Vec<_>>() {
                sums.iter_mut().zip(strip).for_each(|(sum, strip)| *sum += strip);
            }
            Ok(())
        })?;
        let [x, y, product] = sums;
        let cosine = product / (x.sqrt() * y.sqrt());
        // Also where one of them is nothing and the cosine no number.
        if cosine.is_nan() || cosine.abs() > ON_A_LINE {
            return Ok(vec![1.0 - t, t]);
        }
        let angle = cosine.acos();
        Ok(vec![((1.0 - t) * angle).sin() / angle.sin(), (t * angle).sin() / angle.sin()])
    }

    /// The rank that all modules get, where it is known beforehand; mlx-lm has one for a directory.
    fn common_rank(&self) -> Option<i32> {
        let ranks = self.paths.iter().map(|path| {
            let adapters = || self.sources.iter().filter_map(|s| s.set.adapters.get(*path));
            let all: i32 = adapters().map(graft_adapters::Adapter::rank).sum();
            let most = adapters().next().map_or(0, |a| a.a.dim(0).min(a.b.dim(1)));
            match self.options.size {
                Size::Full if self.options.method.is_dense() => all.min(most),
                Size::Full => all,
                Size::Rank(rank) if self.options.method.is_dense() => rank.min(most),
                Size::Rank(rank) => rank.min(all),
                Size::Energy(_) => 0,
            }
        });
        ranks.max().filter(|rank| *rank > 0)
    }

    fn report(&self, layers: Vec<MergeLayer>) -> MergeReport {
        let options = self.options;
        MergeReport {
            schema: 1,
            kind: "merge".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            method: options.method.name().into(),
            fine_tune_type: if self.dora { "dora" } else { "lora" }.into(),
            base: self.base.map(|b| b.origin.name.clone()),
            adapters: self.sources.iter().map(|s| s.origin.name.clone()).collect(),
            left_out: Vec::new(),
            totals: MergeTotals::of(&layers),
            layers,
        }
    }

    fn warn(&self, report: &MergeReport, on_event: &mut dyn FnMut(Event)) {
        let partial = report.layers.iter().filter(|l| l.adapters.len() < self.sources.len()).count();
        if partial > 0 {
            on_event(Event::Warning(format!(
                "{partial} of {} modules have no update in some of the adapters: there it counts as zero",
                report.layers.len()
            )));
        }
        if report.totals.error > LOSS {
            on_event(Event::Warning(format!(
                "cutting the merged update to its rank lost {:.1} % of it (most in {}): a larger --rank keeps more",
                100.0 * report.totals.error,
                report.totals.worst.as_deref().unwrap_or("none")
            )));
        }
    }

    /// The set without its tensors: config and metadata of the result.
    fn described(&self, report: &MergeReport, pad: Option<i32>) -> Result<AdapterSet> {
        let rank = pad.or_else(|| report.layers.iter().map(|l| l.rank).max()).unwrap_or(1);
        let all = |s: &MergeSource| s.set.config.num_layers <= 0;
        let paths = || self.paths.iter().copied();
        // Without the base nobody knows how many blocks there are: what the adapters say must do.
        let num_layers = match self.base {
            Some(_) => last_layers(self.layers, paths()),
            None if self.sources.iter().any(all) => -1,
            None => self.sources.iter().map(|s| s.set.config.num_layers).max().unwrap_or(-1),
        };
        let kind = if self.dora { FineTuneType::Dora } else { FineTuneType::Lora };
        let trained = || self.sources.iter().find_map(|s| Fingerprint::read(&s.set.config));
        let base = self.base.map(|b| Fingerprint::of(b.checkpoint, &b.origin.name));
        let mut set = described(kind, num_layers, rank, paths(), base.or_else(trained))?;
        if self.sources.iter().any(|s| s.set.leaves_head()) {
            set.leave_head();
        }
        Ok(set)
    }

    fn provenance(&self, report: &MergeReport) -> Provenance {
        let options = self.options;
        let setting = |s: &Setting| serde_json::to_value(s).unwrap_or_default();
        let input = |s: &MergeSource| json!({"weight": setting(&s.weight), "density": setting(&s.density)});
        Provenance {
            graft: env!("CARGO_PKG_VERSION").into(),
            operation: "merge".into(),
            base: self.base.map(|b| b.origin.clone()),
            inputs: self.sources.iter().map(|s| s.origin.clone()).collect(),
            recipe: json!({
                "merge_method": options.method.name(), "size": options.size.to_json(), "lambda": options.lambda, "seed": options.seed,
                "normalize": options.normalize.unwrap_or(options.method.normalizes()),
                "t": options.t.as_ref().map(setting),
                "adapters": self.sources.iter().map(input).collect::<Vec<_>>(),
            }),
            summary: serde_json::to_value(&report.totals).unwrap_or_default(),
        }
    }
}

/// A setting's value for a module at a depth; a filter must name it.
fn value(setting: &Setting, (path, depth): (&str, f64), what: impl Fn() -> String) -> Result<f64> {
    setting.at(path, depth).ok_or_else(|| Error::Recipe {
        what: what(),
        expected: format!("a value for {path} (a filter `*` is for the rest)"),
        found: "none".into(),
    })
}

/// Above this cosine two updates lie on a line, as in mergekit.
const ON_A_LINE: f64 = 0.9995;
/// Above this share of the update the cut to a rank is worth a warning.
const LOSS: f64 = 0.1;
