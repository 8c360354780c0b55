//! One streamed answer of a model on the terminal, with the speeds that are reported after it.

use super::load::Loaded;
use crate::args::SamplingArgs;
use crate::ui;
use anyhow::{Result, bail};
use graft_model::Sampling;
use graft_serve::{Ask, Event, Local, Params};
use std::collections::BTreeSet;

/// What was generated and how fast.
pub(crate) struct Answer {
    pub(crate) text: String,
    pub(crate) prompt_tokens: usize,
    pub(crate) prompt_seconds: f64,
    pub(crate) tokens: usize,
    pub(crate) seconds: f64,
}

impl Answer {
    /// Tokens of the prompt a second.
    pub(crate) fn prompt_speed(&self) -> f64 {
        self.prompt_tokens as f64 / self.prompt_seconds.max(1e-9)
    }

    /// Generated tokens a second.
    pub(crate) fn speed(&self) -> f64 {
        self.tokens as f64 / self.seconds.max(1e-9)
    }
}

/// The sampling of generate and chat.
pub(crate) fn sampling(args: &SamplingArgs, loaded: &Loaded, seed: Option<u64>) -> Result<Sampling> {
    Ok(Sampling {
        temperature: args.temp,
        top_p: args.top_p,
        xtc_probability: args.xtc_probability,
        xtc_threshold: args.xtc_threshold,
        xtc_special_tokens: loaded.tokenizer.xtc_special_tokens()?,
        seed,
        ..Sampling::greedy()
    })
}

/// What is asked: `max_tokens` as mlx_lm means it, a negative number being no limit; ids that end the answer beside the
/// model's own, given by number or text (a number is an id, as in mlx_lm).
pub(crate) fn params(
    loaded: &Loaded,
    max_tokens: i64,
    stop_tokens: &[String],
    sampling: Sampling,
) -> Result<Params> {
    sampling.check()?;
    let mut stop_ids = BTreeSet::new();
    for token in stop_tokens {
        match token.trim().parse().ok().or_else(|| loaded.tokenizer.token_to_id(token)) {
            Some(id) => stop_ids.insert(id),
            None => bail!(
                "--extra-eos-token {token}: the vocabulary of {} has no such token",
                loaded.dir.display()
            ),
        };
    }
    let max_tokens = usize::try_from(max_tokens).unwrap_or(usize::MAX);
    Ok(Params { max_tokens, sampling, stop: Vec::new(), stop_ids })
}

/// Asks, printing `opening` once nothing stands in the way, then the text as it comes.
pub(crate) fn answer(engine: &mut Local, ask: Ask, opening: &str) -> Result<Answer> {
    let prompt_tokens = ask.prompt.len();
    let mut show = |_: usize, event: &Event| match event {
        Event::Accepted => ui::print(opening),
        Event::Piece { text, .. } => ui::print(text),
        Event::Done { .. } | Event::Failed(_) => {}
    };
    let found = engine.answer(&[ask], &mut show, &mut |_| true)?;
    let Some(found) = found.and_then(|mut all| all.pop()) else { bail!("there is no answer") };
    Ok(Answer {
        text: found.text,
        prompt_tokens,
        prompt_seconds: found.first.as_secs_f64(),
        tokens: found.tokens.len(),
        seconds: (found.total - found.first).as_secs_f64(),
    })
}
