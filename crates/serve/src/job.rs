//! What passes between the async side and the engine thread: ids, text, numbers and channels, no arrays.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{OwnedSemaphorePermit, mpsc};

use crate::{ApiError, Guide, Lease, Params};

/// One sequence to generate.
#[derive(Debug)]
pub struct Job {
    /// Token ids, at least one, all below the vocabulary, fewer than the context.
    pub prompt: Vec<u32>,
    /// How to generate.
    pub params: Params,
    /// What the answer has to look like.
    pub guide: Option<Guide>,
    /// The version of an adapter that answers, held from admission on; none is the base.
    pub adapter: Option<Lease>,
    /// Which choice of its request this is.
    pub index: usize,
    /// Where its events go. When the receiver is gone the sequence ends at the next step.
    pub events: mpsc::Sender<(usize, Event)>,
    /// What it has taken so far, for who is not told by its last event.
    pub tally: Arc<Tally>,
    /// The place it takes among running and waiting sequences; given back when the sequence ends.
    pub permit: OwnedSemaphorePermit,
}

/// What happens to a sequence, in this order: accepted, any number of pieces, then done or failed.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// It runs now.
    Accepted,
    /// More text.
    Piece {
        /// The text: whole characters, no part of a stop string; empty when only log-probabilities come.
        text: String,
        /// The tokens behind it, where they were asked for.
        logprobs: Vec<TokenLogprob>,
    },
    /// It ended.
    Done {
        /// Why.
        finish: Finish,
        /// What it took.
        usage: Usage,
    },
    /// It cannot go on; nothing follows.
    Failed(ApiError),
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// A stop token, or the answer is as complete as its schema allows.
    Stop,
    /// The stop string at this place of the request's list.
    StopString(usize),
    /// As many tokens as were allowed, or as the context holds.
    Length,
}

impl Finish {
    /// OpenAI's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop | Self::StopString(_) => "stop",
            Self::Length => "length",
        }
    }
}

/// Tokens that a request took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt as the model read it, template included.
    pub prompt: usize,
    /// Tokens generated, the stop token included.
    pub completion: usize,
    /// Tokens of the prompt that did not have to be computed.
    pub cached: usize,
}

impl Usage {
    /// Nothing yet.
    pub const ZERO: Self = Self { prompt: 0, completion: 0, cached: 0 };

    /// What the sequence `index` adds to its request's: a prompt counts once, however many `choices` it has.
    pub(crate) fn counted(self, index: usize, choices: usize) -> Self {
        match index % choices.max(1) {
            0 => self,
            _ => Self { prompt: 0, cached: 0, ..self },
        }
    }

    /// The sum over the choices of a request.
    pub fn add(&mut self, other: Self) {
        self.prompt += other.prompt;
        self.completion += other.completion;
        self.cached += other.cached;
    }
}

/// The tokens that a sequence has taken so far: the engine counts, and whoever asks while it runs is at most one pass behind.
#[derive(Debug, Default)]
pub struct Tally {
    prompt: AtomicUsize,
    completion: AtomicUsize,
    cached: AtomicUsize,
}

impl Tally {
    /// What has been taken; of the prompt, what has been read.
    pub fn usage(&self) -> Usage {
        Usage {
            prompt: self.prompt.load(Ordering::Relaxed),
            completion: self.completion.load(Ordering::Relaxed),
            cached: self.cached.load(Ordering::Relaxed),
        }
    }

    pub(crate) fn set(&self, usage: Usage) {
        // A prompt that is read again after a failure is not taken back.
        self.prompt.fetch_max(usage.prompt, Ordering::Relaxed);
        self.completion.store(usage.completion, Ordering::Relaxed);
        self.cached.store(usage.cached, Ordering::Relaxed);
    }
}

/// A token and its log-probability in nats.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// The token taken.
    pub token: TokenText,
    /// Its log-probability in the model's own distribution.
    pub logprob: f32,
    /// The likeliest tokens, most likely first, as many as were asked for.
    pub top: Vec<(TokenText, f32)>,
}

/// A token as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenText {
    /// Its text; where it is a part of a character, the replacement character.
    pub text: String,
    /// Its bytes, unless it is a part of a character and they are not known.
    pub bytes: Option<Vec<u8>>,
}
