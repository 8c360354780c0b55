//! Prompt in, tokens out, one at a time. Text begins at the tokenizer; this knows ids only. What all generations share stands
//! here; [`Generator`] and [`generate_all`] are for a model that is being trained and for tests. Whoever asks a model that
//! does not change has the engine of serve.

use std::collections::BTreeSet;

use graft_adapters::Route;
use graft_ops::{Array, Dtype, KeyValues, Rows, ffi};

use crate::cache::rows_of;
use crate::{Error, KvCache, Model, Result, Sampler, Sampling};

/// Tokens per chunk of a prompt. The borders are fixed, so an answer depends neither on how a prompt arrived nor on
/// what was generated beside it.
pub const PREFILL_STEP: usize = 512;

/// Most generations that are decoded together. Up to this many rows take the same path through every operation on a CPU,
/// so that the sums of one do not depend on what runs beside it.
pub const MAX_TOGETHER: usize = 32;

/// How many of the first `read` tokens of a prompt of `total`, which were read in chunks, may serve other prompts that
/// begin with the same tokens: those that were read together with more than [`MAX_TOGETHER`] rows, in whole steps.
pub fn shareable(read: usize, total: usize) -> usize {
    let chunk = total.saturating_sub(1) / PREFILL_STEP * PREFILL_STEP;
    let usable = if read > chunk && total - chunk <= MAX_TOGETHER { chunk } else { read };
    usable / sharing_step() * sharing_step()
}

/// How many tokens of a prompt of `total`, of which the first `common` are kept by [`shareable`], need not be read: so many
/// that what is left is read to the bit as if nothing had been kept.
///
/// On a CPU a row's sums depend only on whether its pass has few rows or many, so a chunk may begin anywhere if many are
/// left of it, or if it would begin there anyway. On a GPU only whole chunks are sure.
pub fn reusable(common: usize, total: usize) -> usize {
    let step = sharing_step();
    let kept = common.min(total.saturating_sub(1)) / step * step;
    let end = total.min((kept / PREFILL_STEP + 1) * PREFILL_STEP);
    if kept.is_multiple_of(PREFILL_STEP) || end - kept > MAX_TOGETHER { kept } else { kept - step }
}

/// The tokens of which [`shareable`] takes a multiple: on a CPU a block of the cache, so that blocks are shared whole.
fn sharing_step() -> usize {
    if graft_ops::form() == graft_ops::Form::Cpu { KeyValues::step(Dtype::Float32) } else { PREFILL_STEP }
}

/// How long to generate and how to choose.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// At most this many tokens, the stop token included.
    pub max_tokens: usize,
    /// Ids that end the answer; the one that did is returned as the last token.
    pub stop_ids: BTreeSet<u32>,
    /// How each token is chosen.
    pub sampling: Sampling,
}

/// One generated token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Token {
    /// The id.
    pub id: u32,
    /// Log-probability (nats) in the model's own distribution, before penalties and temperature; none where it was not
    /// computed (greedy without [`Sampling::logprobs`]).
    pub logprob: Option<f32>,
    /// It is one of the stop ids.
    pub stop: bool,
}

/// How far the prompt has been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefill {
    /// Tokens read.
    pub done: usize,
    /// Tokens of the prompt.
    pub total: usize,
}

/// A running generation: [`Generator::prefill`] until the prompt is read, then [`Generator::step`].
#[derive(Debug)]
pub struct Generator<'a> {
    model: &'a Model,
    route: Route<'a>,
    cache: KvCache,
    history: Vec<u32>,
    prompt: usize,
    read: usize,
    produced: usize,
    finished: bool,
    options: GenerateOptions,
    sampler: Sampler,
    pending: Option<Pending>,
}

/// What the next step starts from.
#[derive(Debug)]
enum Pending {
    /// Greedy: the next id (1,), already being computed, so that the graph of one token is built while another runs.
    Id(Array),
    /// Otherwise: the logits (1, V) that the sampler reads on the host.
    Logits(Array),
}

impl Pending {
    fn array(&self) -> &Array {
        let (Self::Id(array) | Self::Logits(array)) = self;
        array
    }
}

impl<'a> Generator<'a> {
    /// Prepares a generation after `prompt`; nothing is computed yet.
    ///
    /// # Errors
    /// When the prompt is empty or holds an id outside the vocabulary.
    pub fn new(model: &'a Model, prompt: &[u32], options: GenerateOptions, route: Route<'a>) -> Result<Self> {
        let vocab = model.config().vocab as u32;
        if prompt.is_empty() {
            return Err(Error::Request("the prompt has no tokens: give at least one".into()));
        }
        if let Some(id) = prompt.iter().find(|id| **id >= vocab) {
            return Err(Error::Request(format!("token id {id} is outside the vocabulary of {vocab}")));
        }
        let sampler = Sampler::new(&options.sampling)?;
        Ok(Self {
            model,
            route,
            cache: KvCache::new(model),
            history: prompt.to_vec(),
            prompt: prompt.len(),
            read: 0,
            produced: 0,
            finished: options.max_tokens == 0,
            options,
            sampler,
            pending: None,
        })
    }

    /// Reads the next chunk of the prompt and says how far it is.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn prefill(&mut self) -> Result<Prefill> {
        let end = (self.read + PREFILL_STEP).min(self.prompt);
        if self.read < end {
            let ids: Vec<i32> = self.history[self.read..end].iter().map(|id| *id as i32).collect();
            let tokens = Array::from_slice(&ids, &[ids.len() as i32]);
            let hidden = self.forward(&tokens)?;
            self.read = end;
            if end == self.prompt {
                let last = rows_of(&hidden, hidden.dim(0) - 1, hidden.dim(0))?;
                self.pending = Some(self.prepare(&last)?);
            }
            // The caches are what later steps need; without this the whole prompt would be one graph.
            ffi::eval(self.cache.arrays())?;
        }
        Ok(Prefill { done: self.read, total: self.prompt })
    }

    /// The next token, or none when the generation has ended.
    ///
    /// # Errors
    /// When an array operation fails or, where the sampler reads the logits (anything but plain greedy), one of them is not
    /// a number.
    pub fn step(&mut self) -> Result<Option<Token>> {
        while !self.finished && self.read < self.prompt {
            self.prefill()?;
        }
        if self.finished {
            return Ok(None);
        }
        let Some(pending) = self.pending.take() else { return Ok(None) };
        if let Pending::Id(id) = &pending
            && self.produced + 1 < self.options.max_tokens
        {
            // The token after this one is computed while this one travels to the caller.
            let hidden = self.forward(id)?;
            self.pending = Some(self.prepare(&hidden)?);
        }
        let token = self.choose(pending)?;
        if !self.finished && self.pending.is_none() {
            let hidden = self.forward(&Array::from_slice(&[token.id as i32], &[1]))?;
            self.pending = Some(self.prepare(&hidden)?);
        }
        Ok(Some(token))
    }

    /// The sampler, for what it keeps of the last choice (alternatives and their log-probabilities).
    pub fn sampler(&self) -> &Sampler {
        &self.sampler
    }

    /// Takes a token out of what was computed for it.
    fn choose(&mut self, pending: Pending) -> Result<Token> {
        let (id, logprob) = match pending {
            Pending::Id(id) => (ffi::read::<i32>(&id)?[0] as u32, None),
            Pending::Logits(logits) => {
                let row = logits.as_dtype(Dtype::Float32)?;
                let (id, logprob) = self.sampler.sample(ffi::read(&row)?, &self.history)?;
                (id, Some(logprob))
            }
        };
        self.produced += 1;
        self.history.push(id);
        let stop = self.options.stop_ids.contains(&id);
        self.finished = stop || self.produced >= self.options.max_tokens;
        Ok(Token { id, logprob, stop })
    }

    fn forward(&mut self, tokens: &Array) -> Result<Array> {
        let rows = Rows { lengths: vec![tokens.dim(0)], starts: vec![self.cache.len()] };
        self.model.hidden(tokens, &rows, Some(&mut [&mut self.cache]), &self.route)
    }

    /// Starts the computation of what the next step needs, from the hidden state (1, E) of the last token.
    fn prepare(&self, hidden: &Array) -> Result<Pending> {
        let logits = self.model.logits(hidden, &self.route)?;
        let pending = self.pending_of(logits)?;
        ffi::async_eval([pending.array()])?;
        Ok(pending)
    }

    fn pending_of(&self, logits: Array) -> Result<Pending> {
        if !self.options.sampling.is_plain_greedy() {
            return Ok(Pending::Logits(logits));
        }
        let id = mlx_rs::ops::indexing::argmax_axis(&logits, -1, false)?;
        Ok(Pending::Id(id.as_dtype(Dtype::Int32)?))
    }

    /// What was answered so far, the stop token left out.
    fn completion(&self) -> Completion {
        let mut tokens = self.history[self.prompt..].to_vec();
        let stopped = tokens.last().is_some_and(|id| self.options.stop_ids.contains(id));
        if stopped {
            tokens.pop();
        }
        Completion { tokens, stopped }
    }
}

/// The answer to one prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    /// Its ids, without the stop token.
    pub tokens: Vec<u32>,
    /// It ended by itself, not at `max_tokens`.
    pub stopped: bool,
}

/// Answers every prompt, up to `together` (1 to [`MAX_TOGETHER`]) side by side; none if `go_on`, which is given the number
/// of finished answers before each token and each chunk of a prompt, said to stop.
///
/// Each prompt is read alone, in chunks with fixed borders, and on a CPU all numbers of rows that may be decoded together
/// take one path: so neither `together` nor the order of the prompts changes an answer.
///
/// # Errors
/// As [`Generator::new`] and [`Generator::step`].
pub fn generate_all(
    model: &Model,
    prompts: &[(Vec<u32>, GenerateOptions)],
    together: usize,
    route: &Route,
    go_on: &mut dyn FnMut(usize) -> bool,
) -> Result<Option<Vec<Completion>>> {
    let mut answers: Vec<Option<Completion>> = vec![None; prompts.len()];
    let mut waiting = prompts.iter().enumerate();
    let mut active: Vec<(usize, Generator)> = Vec::new();
    let mut finished = 0;
    loop {
        while active.len() < together.clamp(1, MAX_TOGETHER)
            && let Some((index, (prompt, options))) = waiting.next()
        {
            let mut generator = Generator::new(model, prompt, options.clone(), *route)?;
            while !generator.finished && generator.read < generator.prompt {
                if !go_on(finished) {
                    return Ok(None);
                }
                generator.prefill()?;
            }
            active.push((index, generator));
        }
        if active.is_empty() {
            return Ok(Some(answers.into_iter().flatten().collect()));
        }
        if !go_on(finished) {
            return Ok(None);
        }
        step_together(model, active.iter_mut().map(|(_, generator)| generator), route)?;
        active.retain(|(index, generator)| {
            if generator.finished {
                answers[*index] = Some(generator.completion());
                finished += 1;
            }
            !generator.finished
        });
    }
}

/// One token for each generation whose prompt is read, and what the next one needs in a single pass.
fn step_together<'a, 'b: 'a>(
    model: &Model,
    generators: impl Iterator<Item = &'a mut Generator<'b>>,
    route: &Route,
) -> Result<()> {
    let mut going = Vec::new();
    for generator in generators {
        if let Some(pending) = generator.pending.take() {
            generator.choose(pending)?;
        }
        if !generator.finished {
            going.push(generator);
        }
    }
    if going.is_empty() {
        return Ok(());
    }
    let ids: Vec<i32> = going.iter().filter_map(|g| g.history.last()).map(|id| *id as i32).collect();
    let tokens = Array::from_slice(&ids, &[ids.len() as i32]);
    let rows = Rows { lengths: vec![1; ids.len()], starts: going.iter().map(|g| g.cache.len()).collect() };
    let mut caches: Vec<&mut KvCache> = going.iter_mut().map(|g| &mut g.cache).collect();
    let hidden = model.hidden(&tokens, &rows, Some(&mut caches), route)?;
    let logits = model.logits(&hidden, route)?;
    for (index, generator) in (0..).zip(&mut going) {
        generator.pending = Some(generator.pending_of(rows_of(&logits, index, index + 1)?)?);
    }
    let pending = going.iter().filter_map(|g| g.pending.as_ref()).map(Pending::array);
    ffi::eval(going.iter().flat_map(|g| g.cache.arrays()).chain(pending))?;
    Ok(())
}
