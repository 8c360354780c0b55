//! `--verify model`: the adapter on its base, the base and the fused model on rows that were not trained on, one model in
//! memory at a time.

use super::fuse_rows::Rows;
use super::load::Loaded;
use super::score::Scorer;
use crate::errors::Interrupted;
use crate::ui;
use anyhow::{Result, bail};
use graft_adapters::Route;
use graft_merge::{Distance, Estimated, ModelReport, Scores, Three};
use graft_model::{Gap, Run, Sampling, compare};
use graft_train::{DataConfig, Metric, Question, bootstrap, quantile};
use std::sync::atomic::{AtomicBool, Ordering};

/// Samples of the bootstrap over rows.
const RESAMPLES: usize = 2000;
/// Rows answered together.
const TOGETHER: usize = 16;

/// What is measured.
pub(crate) struct Verify<'a> {
    /// The base into which the adapter was fused.
    pub(crate) base: &'a str,
    /// The base it was trained on, if that is another.
    pub(crate) trained: Option<&'a str>,
    pub(crate) adapter: &'a str,
    /// The fused model, and an adapter beside it, if one was left.
    pub(crate) fused: (&'a str, Option<&'a str>),
    pub(crate) rows: &'a Rows,
    pub(crate) metric: Option<(&'a str, Metric, usize)>,
    pub(crate) stop: &'a AtomicBool,
}

/// A run, and whether each answer was right where a metric is given.
struct Measured {
    run: Run,
    right: Vec<f64>,
}

impl Verify<'_> {
    /// Runs everything and compares.
    pub(crate) fn run(&self) -> Result<ModelReport> {
        let (base, adapter) = {
            let loaded = Loaded::open(self.base)?;
            let route = loaded.route(Some(self.adapter))?;
            (self.measure(&loaded, &Route::Base, "base")?, self.measure(&loaded, &route.route(), "adapter")?)
        };
        let to_base = self.gaps(&adapter.run, &base.run)?;
        let base_right = base.right;
        drop(base.run);
        let trained = match self.trained {
            None => None,
            Some(trained) => {
                let loaded = Loaded::open(trained)?;
                let route = loaded.route(Some(self.adapter))?;
                Some(self.measure(&loaded, &route.route(), "adapter on its base")?.run)
            }
        };
        let fused = {
            let (dir, left) = self.fused;
            let loaded = Loaded::open(dir)?;
            let route = loaded.route(left)?;
            self.measure(&loaded, &route.route(), "fused")?
        };
        let to_fused = self.gaps(&adapter.run, &fused.run)?;
        let to_trained = match &trained {
            None => None,
            Some(trained) => Some(self.gaps(trained, &fused.run)?),
        };
        let kl = |gaps: &[Gap]| -> Vec<(f64, f64)> {
            let mut at = 0;
            let row = |text: &graft_model::Text| {
                let own = &gaps[at..at + text.targets.len()];
                at += own.len();
                (own.iter().map(|gap| gap.kl).sum::<f64>(), own.len() as f64)
            };
            self.rows.texts.iter().map(row).collect()
        };
        let (lost, whole) = (kl(&to_fused), kl(&to_base));
        // A ratio of sums is a mean of the rows' ratios, weighted by what they are divided by.
        let ratios: Vec<_> =
            lost.iter().zip(&whole).filter(|(_, w)| w.0 > 0.0).map(|(l, w)| (l.0 / w.0, w.0)).collect();
        let ratio = bootstrap(&ratios, RESAMPLES, 0);
        let loss = |gaps: &[Gap], side: usize| {
            (gaps.iter().map(|gap| gap.losses[side]).sum::<f64>() / gaps.len() as f64).exp()
        };
        Ok(ModelReport {
            data: self.rows.file.display().to_string(),
            rows: self.rows.texts.len(),
            tokens: to_fused.len(),
            fused: distance(&to_fused, &lost),
            base: distance(&to_base, &whole),
            kept: Estimated {
                value: 1.0 - ratio.value,
                interval: [1.0 - ratio.interval[1], 1.0 - ratio.interval[0]],
            },
            perplexity: Three {
                base: loss(&to_base, 1),
                adapter: loss(&to_base, 0),
                fused: loss(&to_fused, 1),
            },
            trained: to_trained.map(|gaps| distance(&gaps, &kl(&gaps))),
            scores: self.scores([base_right, adapter.right, fused.right]),
        })
    }

    fn measure(&self, loaded: &Loaded, route: &Route, name: &str) -> Result<Measured> {
        let texts = &self.rows.texts;
        let progress = ui::Progress::new(texts.len() as u64, &format!("verifying: {name}"));
        let run = Run::of(&loaded.model, route, texts, &mut |done| {
            progress.at(done as u64, String::new());
            !self.stop.load(Ordering::Relaxed)
        })?;
        progress.done();
        let Some(run) = run else { bail!(stopped()) };
        Ok(Measured { run, right: self.answers(loaded, route, name)? })
    }

    fn gaps(&self, first: &Run, second: &Run) -> Result<Vec<Gap>> {
        let go_on = &mut || !self.stop.load(Ordering::Relaxed);
        let Some(gaps) = compare(first, second, &self.rows.texts, go_on)? else { bail!(stopped()) };
        Ok(gaps)
    }

    /// 1 for each row that is answered right, 0 for the others; nothing without a metric.
    fn answers(&self, loaded: &Loaded, route: &Route, name: &str) -> Result<Vec<f64>> {
        let Some((_, metric, limit)) = &self.metric else { return Ok(Vec::new()) };
        let form = DataConfig { mask_prompt: false, max_seq_length: usize::MAX, ..self.rows.form.clone() };
        let questions = Question::from_rows(&self.rows.file, &self.rows.rows, &loaded.encoder(), &form)?;
        let scorer = Scorer {
            metric,
            max_tokens: *limit,
            together: TOGETHER,
            sampling: &|_| Sampling::greedy(),
            stop: self.stop,
        };
        let found = scorer.score(loaded, *route, &questions, &format!("answering: {name}"))?;
        let Some(found) = found else { bail!(stopped()) };
        Ok(found.into_iter().map(|found| found.score).collect())
    }

    fn scores(&self, [base, adapter, fused]: [Vec<f64>; 3]) -> Option<Scores> {
        let (name, ..) = self.metric.as_ref()?;
        let mean = |right: &[f64]| right.iter().sum::<f64>() / right.len().max(1) as f64;
        let pairs: Vec<_> = fused.iter().zip(&adapter).map(|(f, a)| (f - a, 1.0)).collect();
        let found = bootstrap(&pairs, RESAMPLES, 0);
        Some(Scores {
            metric: (*name).to_owned(),
            score: Three { base: mean(&base), adapter: mean(&adapter), fused: mean(&fused) },
            difference: Estimated { value: found.value, interval: found.interval },
        })
    }
}

/// Of all tokens, with an interval over rows, which are (sum, tokens) each.
fn distance(gaps: &[Gap], rows: &[(f64, f64)]) -> Distance {
    let means: Vec<_> = rows.iter().map(|(sum, tokens)| (sum / tokens, *tokens)).collect();
    let kl = bootstrap(&means, RESAMPLES, 0);
    let all: Vec<f64> = gaps.iter().map(|gap| gap.kl).collect();
    Distance {
        kl: Estimated { value: kl.value, interval: kl.interval },
        kl_p99: quantile(&all, 0.99).unwrap_or(0.0),
        agreement: gaps.iter().filter(|gap| gap.agree).count() as f64 / gaps.len().max(1) as f64,
    }
}

fn stopped() -> Interrupted {
    Interrupted("Interrupted before the fused model was verified; nothing was written.".into())
}
