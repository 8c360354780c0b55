//! One sequence on the engine thread: what it has read and said, and what of that its client may see yet.

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

use graft_adapters::Table;
use graft_model::{KvCache, Model, Sampler, TextStream};
use tokio::sync::mpsc::error::TrySendError;

use crate::generation::Key;
use crate::stop::StopMatcher;
use crate::tokens::Vocabulary;
use crate::{ApiError, Event, Finish, Job, Lease, TokenLogprob, Usage};

/// What a sequence starts with.
pub(crate) struct Start {
    pub(crate) job: Job,
    pub(crate) sampler: Sampler,
    pub(crate) table: Option<Rc<Table>>,
    pub(crate) reserved: usize,
}

/// A sequence that runs.
pub(crate) struct Sequence {
    pub(crate) id: u64,
    pub(crate) job: Job,
    /// What the adapter that it holds changes; none is the base.
    pub(crate) table: Option<Rc<Table>>,
    /// Bytes that its keys and values may take, to the last token that it may answer.
    pub(crate) reserved: usize,
    /// Keys and values of the first `cache.len()` tokens of `history`.
    pub(crate) cache: KvCache,
    /// Prompt and answer.
    pub(crate) history: Vec<u32>,
    /// It shares no pass with others, since one that it shared has failed.
    pub(crate) alone: bool,
    /// When it last had a turn to read its prompt.
    pub(crate) turn: u64,
    /// Tokens that it was given.
    pub(crate) prompt: usize,
    /// Tokens of the prompt that were not computed for it.
    cached: usize,
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
    /// Starts a job; nothing is computed yet.
    pub(crate) fn new(model: &Model, words: &Vocabulary, start: Start, id: u64) -> Self {
        let Start { job, sampler, table, reserved } = start;
        Self {
            id,
            cache: KvCache::new(model),
            history: job.prompt.clone(),
            table,
            reserved,
            alone: false,
            turn: 0,
            prompt: job.prompt.len(),
            cached: 0,
            sampler,
            text: words.tokenizer.stream(),
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

    /// Which update its passes apply.
    pub(crate) fn key(&self) -> Option<Key> {
        self.job.adapter.as_ref().and_then(Lease::key)
    }

    /// The tokens that it has said.
    pub(crate) fn answer(&self) -> &[u32] {
        &self.history[self.prompt..]
    }

    /// The tokens that it was given.
    pub(crate) fn prompt(&self) -> &[u32] {
        &self.history[..self.prompt]
    }

    /// Takes over the keys and values of the first tokens of its prompt instead of reading them.
    /// Says how many it need not read.
    pub(crate) fn skip(&mut self, cache: KvCache) -> usize {
        let skipped = (cache.len() - self.cache.len()).max(0) as usize;
        self.cached += skipped;
        self.cache = cache;
        skipped
    }

    /// It has taken over what others had read.
    pub(crate) fn has_skipped(&self) -> bool {
        self.cached > 0
    }

    /// Nothing more is to be computed for it.
    pub(crate) fn is_over(&self) -> bool {
        self.ended
    }

    /// The largest logit is all that it asks for, so that its next token is known without the host.
    pub(crate) fn plain(&self) -> bool {
        self.job.params.sampling.is_plain_greedy() && self.job.guide.is_none() && self.unread() <= 1
    }

    /// After the token that is being computed it takes one more, unless that ends it.
    pub(crate) fn goes_on(&self) -> bool {
        self.history.len() - self.prompt + 1 < self.job.params.max_tokens
    }

    /// Tokens that are in the history and not in the cache.
    fn unread(&self) -> usize {
        self.history.len().saturating_sub(self.cache.len().max(0) as usize)
    }

    /// The next pass reads (more of) the prompt.
    pub(crate) fn reads(&self) -> bool {
        self.runs() && !self.decodes()
    }

    /// The next pass takes the first token that is not in the cache, usually the last one, and gives one more. The last one
    /// may still be computed; then all that is known is in the cache.
    pub(crate) fn decodes(&self) -> bool {
        let read = usize::try_from(self.cache.len()).is_ok_and(|read| read >= self.prompt);
        self.runs() && self.history.len() > self.prompt && read
    }

    /// The last pass took a token behind which others have been said already, so that nothing is to be chosen.
    pub(crate) fn repeats(&self) -> bool {
        self.unread() > 0
    }

    /// The token that the next pass takes, if it is known.
    pub(crate) fn next(&self) -> Option<u32> {
        self.history.get(usize::try_from(self.cache.len()).ok()?).copied()
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
    pub(crate) fn choose(&mut self, logits: &[f32], words: &Vocabulary) -> Result<(), String> {
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
        self.say(id, logprob, words)
    }

    /// Takes the token of the largest logit as its next one.
    pub(crate) fn take(&mut self, (id, best): (u32, f32), words: &Vocabulary) -> Result<(), String> {
        let id = Sampler::best_of(id, best).map_err(|e| e.to_string())?;
        self.say(id, 0.0, words)
    }

    fn say(&mut self, id: u32, logprob: f32, words: &Vocabulary) -> Result<(), String> {
        self.history.push(id);
        self.job.tally.set(self.usage());
        let complete = match self.job.guide.as_mut().map(|guide| guide.take(id)) {
            None => false,
            Some(Ok(complete)) => complete,
            Some(Err(error)) => {
                self.fail(error);
                return Ok(());
            }
        };
        if words.tokenizer.eos_ids().contains(&id) || self.job.params.stop_ids.contains(&id) {
            return self.finish(String::new(), Finish::Stop);
        }
        let piece = self.text.push(id).map_err(|e| e.to_string())?;
        self.said += piece.len();
        if self.job.params.sampling.logprobs.is_some() {
            let text = |id: u32| words.texts.get(words.tokenizer, id);
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
        self.outbox.push_back(Event::Done { finish, usage: self.usage() });
        self.ended = true;
    }

    /// What it has taken so far. A prompt of which a token has followed is read, whatever is read again.
    fn usage(&self) -> Usage {
        let completion = self.history.len() - self.prompt;
        let read = usize::try_from(self.cache.len()).unwrap_or(0).min(self.prompt);
        let prompt = if completion > 0 { self.prompt } else { read };
        Usage { prompt, completion, cached: self.cached }
    }

    /// More of its prompt has been read.
    pub(crate) fn has_read(&self) {
        self.job.tally.set(self.usage());
    }

    /// Its reader has been told how it ended.
    pub(crate) fn is_told(&self) -> bool {
        self.ended && self.outbox.is_empty()
    }

    /// It cannot go on.
    pub(crate) fn fail(&mut self, error: ApiError) {
        self.outbox.push_back(Event::Failed(error));
        self.ended = true;
    }

    /// Forgets what it computed, which a failed pass may have left half-written, and goes on by itself from what it
    /// has read and said. It reads its prompt again as a prompt, and what it has said token by token: read in one piece, that
    /// would differ in its last bits, and the answer would depend on who has failed beside it.
    pub(crate) fn restart(&mut self, model: &Model) {
        self.cache = KvCache::new(model);
        self.cached = 0;
        self.alone = true;
    }
}
