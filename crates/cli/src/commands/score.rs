//! Answers to rows of data, and whether they are right: what `eval` reports, and `fuse` and `merge` judge by.

use super::load::Loaded;
use crate::ui;
use anyhow::Result;
use graft_adapters::Route;
use graft_model::Sampling;
use graft_serve::{Ask, Finish, Local, Params};
use graft_train::{Metric, Question};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};

/// How questions are asked and judged.
pub(crate) struct Scorer<'a> {
    pub(crate) metric: &'a Metric,
    /// Most tokens of an answer; a prompt that leaves less room in the model's context gets less.
    pub(crate) max_tokens: usize,
    /// Answers side by side; it changes none of them.
    pub(crate) together: usize,
    /// How the answer to a prompt is chosen.
    pub(crate) sampling: &'a dyn Fn(&[u32]) -> Sampling,
    pub(crate) stop: &'a AtomicBool,
}

/// An answer, 1 if it is right, else 0, and whether a limit ended it.
pub(crate) struct Scored {
    pub(crate) answer: String,
    pub(crate) score: f64,
    pub(crate) cut: bool,
}

impl Scorer<'_> {
    /// Answers all with one adapter, in the order of the questions; none if it was stopped. `title` is what the progress
    /// calls it.
    pub(crate) fn score(
        &self,
        loaded: &Loaded,
        route: Route,
        questions: &[Question],
        title: &str,
    ) -> Result<Option<Vec<Scored>>> {
        let context = usize::try_from(loaded.model.config().max_positions).unwrap_or(0);
        let ask = |question: &Question| Ask {
            prompt: question.prompt.clone(),
            params: Params {
                max_tokens: context.saturating_sub(question.prompt.len()).clamp(1, self.max_tokens),
                sampling: (self.sampling)(&question.prompt),
                stop: Vec::new(),
                stop_ids: BTreeSet::new(),
            },
        };
        let asks: Vec<Ask> = questions.iter().map(ask).collect();
        // Rows often begin alike; the last ones say how.
        let kept = 2 * questions.iter().map(|question| question.prompt.len()).max().unwrap_or(0);
        let mut engine = Local::new(&loaded.model, &loaded.tokenizer, route, self.together, kept);
        let progress = ui::Progress::new(asks.len() as u64, title);
        let found = engine.answer(&asks, &mut |_, _| {}, &mut |done| {
            progress.at(done as u64, String::new());
            !self.stop.load(Ordering::Relaxed)
        })?;
        progress.done();
        let judged = |(question, found): (&Question, graft_serve::Answered)| Scored {
            score: f64::from(u8::from(self.metric.is_right(&found.text, &question.answer))),
            answer: found.text,
            cut: found.finish == Finish::Length,
        };
        Ok(found.map(|found| questions.iter().zip(found).map(judged).collect()))
    }
}
