//! One streamed answer of a model on the terminal, with the speeds that are reported after it.

use super::load::Loaded;
use crate::args::SamplingArgs;
use crate::ui;
use anyhow::{Result, bail};
use graft_adapters::Route;
use graft_model::{GenerateOptions, Generator, Sampling};
use std::collections::BTreeSet;
use std::time::Instant;

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

/// mlx_lm's `--max-tokens`, where a negative number is no limit.
pub(crate) fn max_tokens(given: i64) -> usize {
    usize::try_from(given).unwrap_or(usize::MAX)
}

/// The ids that end an answer: the model's, and tokens given by number or text; a number is an id, as in mlx_lm.
pub(crate) fn stop_ids(loaded: &Loaded, extra: &[String]) -> Result<BTreeSet<u32>> {
    let mut ids = loaded.tokenizer.eos_ids().clone();
    for token in extra {
        match token.trim().parse().ok().or_else(|| loaded.tokenizer.token_to_id(token)) {
            Some(id) => ids.insert(id),
            None => bail!(
                "--extra-eos-token {token}: the vocabulary of {} has no such token",
                loaded.dir.display()
            ),
        };
    }
    Ok(ids)
}

/// Generates, printing `opening` once nothing stands in the way, then the text as it comes.
pub(crate) fn answer(
    loaded: &Loaded,
    route: Route<'_>,
    prompt: &[u32],
    options: GenerateOptions,
    opening: &str,
) -> Result<Answer> {
    let start = Instant::now();
    let mut generator = Generator::new(&loaded.model, prompt, options, route)?;
    ui::print(opening);
    let mut stream = loaded.tokenizer.stream();
    let mut text = String::new();
    let mut show = |piece: String| {
        ui::print(&piece);
        text.push_str(&piece);
    };
    let (mut tokens, mut first) = (0, None);
    while let Some(token) = generator.step()? {
        first.get_or_insert_with(|| start.elapsed().as_secs_f64());
        tokens += 1;
        if !token.stop {
            show(stream.push(token.id)?);
        }
    }
    show(stream.finish()?);
    let total = start.elapsed().as_secs_f64();
    let prompt_seconds = first.unwrap_or(total);
    Ok(Answer { text, prompt_tokens: prompt.len(), prompt_seconds, tokens, seconds: total - prompt_seconds })
}
