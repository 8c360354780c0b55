//! Prompt in, tokens out, one at a time. Text begins at the tokenizer; this knows ids only.

use std::collections::BTreeSet;

use graft_adapters::Route;
use graft_ops::{Array, Dtype, Rows, ffi};

use crate::cache::rows_of;
use crate::{Error, KvCache, Model, Result, Sampler, Sampling};

/// Tokens per chunk of a prompt. The borders are fixed, so an answer depends neither on how a prompt arrived nor on
/// what was generated beside it.
pub const PREFILL_STEP: usize = 512;

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
        let last = self.produced + 1 >= self.options.max_tokens;
        let Some(pending) = self.pending.take() else { return Ok(None) };
        let (id, logprob) = match pending {
            Pending::Id(id) => {
                // The token after this one is computed while this one travels to the caller.
                if !last {
                    let hidden = self.forward(&id)?;
                    self.pending = Some(self.prepare(&hidden)?);
                }
                (ffi::read::<i32>(&id)?[0] as u32, None)
            }
            Pending::Logits(logits) => {
                let row = logits.as_dtype(Dtype::Float32)?;
                let (id, logprob) = self.sampler.sample(ffi::read(&row)?, &self.history)?;
                (id, Some(logprob))
            }
        };
        self.produced += 1;
        self.history.push(id);
        let stop = self.options.stop_ids.contains(&id);
        self.finished = stop || last;
        if !self.finished && self.pending.is_none() {
            let hidden = self.forward(&Array::from_slice(&[id as i32], &[1]))?;
            self.pending = Some(self.prepare(&hidden)?);
        }
        Ok(Some(Token { id, logprob, stop }))
    }

    /// The sampler, for what it keeps of the last choice (alternatives and their log-probabilities).
    pub fn sampler(&self) -> &Sampler {
        &self.sampler
    }

    fn forward(&mut self, tokens: &Array) -> Result<Array> {
        let rows = Rows { lengths: vec![tokens.dim(0)], starts: vec![self.cache.len()] };
        self.model.hidden(tokens, &rows, Some(&mut [&mut self.cache]), &self.route)
    }

    /// Starts the computation of what the next step needs, from the hidden state (1, E) of the last token.
    fn prepare(&self, hidden: &Array) -> Result<Pending> {
        let logits = self.model.logits(hidden, &self.route)?;
        let pending = if self.options.sampling.is_plain_greedy() {
            Pending::Id(mlx_rs::ops::indexing::argmax_axis(&logits, -1, false)?.as_dtype(Dtype::Int32)?)
        } else {
            Pending::Logits(logits)
        };
        let (Pending::Id(array) | Pending::Logits(array)) = &pending;
        ffi::async_eval([array])?;
        Ok(pending)
    }
}
