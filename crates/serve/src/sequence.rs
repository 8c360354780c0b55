//! One sequence on the engine thread: what it has read and said, and what of that its client may see yet.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use graft_model::{KvCache, Model, Sampler, TextStream};
use tokio::sync::mpsc::error::TrySendError;

use crate::engine::Info;
use crate::stop::StopMatcher;
use crate::{ApiError, Event, Finish, Job, TokenLogprob, Usage};

/// A sequence that runs.
pub(crate) struct Sequence {
    pub(crate) job: Job,
    /// Keys and values of the first `cache.len()` tokens of `history`.
    pub(crate) cache: KvCache,
    /// Prompt and answer.
    pub(crate) history: Vec<u32>,
    /// It shares no pass with others, since one that it shared has failed.
    pub(crate) alone: bool,
    /// When it last had a turn to read its prompt.
    pub(crate) turn: u64,
    prompt: usize,
    sampler: Sampler,
    text: TextStream,
    stop: StopMatcher,
    /// Log-probabilities that wait for their text: each with the number of bytes up to the end of its text.
    logprobs: VecDeque<(usize, TokenLogprob)>,
    /// Bytes of text so far.
    said: usize,
    /// Of these, bytes that the client may see.
    shown: usize,
    outbox: VecDeque<Event>,
    stalled: Option<Instant>,
    ended: bool,
}

impl Sequence {
    /// Starts `job`; nothing is computed yet.
    pub(crate) fn new(model: &Model, info: &Info, job: Job, sampler: Sampler) -> Self {
        Self {
            cache: KvCache::new(model),
            history: job.prompt.clone(),
            alone: false,
            turn: 0,
            prompt: job.prompt.len(),
            sampler,
            text: info.tokenizer.stream(),
            stop: StopMatcher::new(&job.params.stop),
            logprobs: VecDeque::new(),
            said: 0,
            shown: 0,
            outbox: VecDeque::from([Event::Accepted]),
            stalled: None,
            ended: false,
            job,
        }
    }

    /// Tokens that are in the history and not in the cache.
    fn unread(&self) -> usize {
        self.history.len() - self.cache.len().max(0) as usize
    }

    /// The next pass reads (more of) the prompt, or reads all again after a failure.
    pub(crate) fn reads(&self) -> bool {
        self.runs() && !self.decodes()
    }

    /// The next pass takes the last token and gives one more.
    pub(crate) fn decodes(&self) -> bool {
        self.runs() && self.history.len() > self.prompt && self.unread() == 1
    }

    /// A reader that is behind makes its own sequence wait, no other.
    fn runs(&self) -> bool {
        !self.ended && self.outbox.is_empty()
    }

    /// Passes on what waits, as far as the reader takes it. False when the sequence is over: all said, its client gone,
    /// or its reader stuck for longer than `patience`.
    pub(crate) fn keep(&mut self, now: Instant, patience: Duration) -> bool {
        if self.job.events.is_closed() {
            return false;
        }
        while let Some(event) = self.outbox.pop_front() {
            match self.job.events.try_send((self.job.index, event)) {
                Ok(()) => self.stalled = None,
                Err(TrySendError::Full((_, event))) => {
                    self.outbox.push_front(event);
                    return now.duration_since(*self.stalled.get_or_insert(now)) < patience;
                }
                Err(TrySendError::Closed(_)) => return false,
            }
        }
        !self.ended
    }

    /// Chooses the next token from its logits (V,).
    pub(crate) fn choose(&mut self, logits: &[f32], info: &Info) -> Result<(), String> {
        let allowed;
        let logits = match self.job.guide.as_mut().map(|guide| guide.allowed(logits)) {
            None => logits,
            Some(Ok(masked)) => {
                allowed = masked;
                &allowed[..]
            }
            Some(Err(error)) => {
                self.fail(error);
                return Ok(());
            }
        };
        let (id, logprob) = if self.job.params.sampling.is_plain_greedy() {
            (Sampler::best(logits).map_err(|e| e.to_string())?, 0.0)
        } else {
            self.sampler.sample(logits, &self.history).map_err(|e| e.to_string())?
        };
        self.history.push(id);
        let complete = match self.job.guide.as_mut().map(|guide| guide.take(id)) {
            None => false,
            Some(Ok(complete)) => complete,
            Some(Err(error)) => {
                self.fail(error);
                return Ok(());
            }
        };
        if info.tokenizer.eos_ids().contains(&id) {
            return self.finish(String::new(), Finish::Stop);
        }
        let piece = self.text.push(id).map_err(|e| e.to_string())?;
        self.said += piece.len();
        if self.job.params.sampling.logprobs.is_some() {
            let text = |id: u32| info.texts.get(&info.tokenizer, id);
            let top = self.sampler.alternatives().iter().map(|(id, logprob)| (text(*id), *logprob)).collect();
            self.logprobs.push_back((self.said, TokenLogprob { token: text(id), logprob, top }));
        }
        let matched = self.stop.push(&piece);
        if let Some(index) = matched.stop {
            self.stopped(matched.text, index);
            return Ok(());
        }
        if complete {
            return self.finish(matched.text, Finish::Stop);
        }
        if self.history.len() - self.prompt >= self.job.params.max_tokens {
            return self.finish(matched.text, Finish::Length);
        }
        if !matched.text.is_empty() {
            self.emit(matched.text, false);
        }
        Ok(())
    }

    /// The answer is over: `text`, and what was held back after it, is said.
    fn finish(&mut self, text: String, finish: Finish) -> Result<(), String> {
        let rest = self.text.finish().map_err(|e| e.to_string())?;
        self.said += rest.len();
        let matched = self.stop.push(&rest);
        if let Some(index) = matched.stop {
            self.stopped(text + &matched.text, index);
            return Ok(());
        }
        let text = text + &matched.text + &self.stop.finish();
        self.emit(text, true);
        self.done(finish);
        Ok(())
    }

    /// The stop string `index` was met; `text` is what comes before it.
    fn stopped(&mut self, text: String, index: usize) {
        // A token that begins within the stop string is no part of the answer.
        let end = self.shown + text.len();
        let starts = std::iter::once(self.shown).chain(self.logprobs.iter().map(|(end, _)| *end));
        let kept = starts.zip(&self.logprobs).take_while(|(start, _)| *start < end).count();
        self.logprobs.truncate(kept);
        self.emit(text, true);
        self.done(Finish::StopString(index));
    }

    /// Says `text` with the log-probabilities of the tokens that it completes, or of all if nothing follows.
    fn emit(&mut self, text: String, last: bool) {
        self.shown += text.len();
        let mut logprobs = Vec::new();
        while self.logprobs.front().is_some_and(|(end, _)| last || *end <= self.shown) {
            logprobs.extend(self.logprobs.pop_front().map(|(_, logprob)| logprob));
        }
        if !text.is_empty() || !logprobs.is_empty() {
            self.outbox.push_back(Event::Piece { text, logprobs });
        }
    }

    fn done(&mut self, finish: Finish) {
        let completion = self.history.len() - self.prompt;
        let usage = Usage { prompt: self.prompt, completion, cached: 0 };
        self.outbox.push_back(Event::Done { finish, usage });
        self.ended = true;
    }

    /// It cannot go on.
    pub(crate) fn fail(&mut self, error: ApiError) {
        self.outbox.push_back(Event::Failed(error));
        self.ended = true;
    }

    /// Forgets what it computed, which a failed pass may have left half-written, and goes on by itself from what it
    /// has read and said.
    pub(crate) fn restart(&mut self, model: &Model) {
        self.cache = KvCache::new(model);
        self.alone = true;
    }
}
