//! The engine without a server: its scheduler on the thread of whoever holds the model, for a program that asks the model
//! itself. Batches, prefixes and the choice of tokens are the server's, so both give the same answers.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use graft_adapters::Route;
use graft_model::{Error as ModelError, KvCache, MAX_TOGETHER, Model, Tokenizer};
use tokio::sync::{Semaphore, mpsc};

use crate::scheduler::{Limits, Scheduler};
use crate::tokens::Vocabulary;
use crate::{EngineStats, Error, Event, Finish, Job, LogEvent, Params, Result};

/// Most tokens of a sequence: positions are i32.
const MOST: usize = i32::MAX as usize;
/// A turn gives a sequence no more events than this, and all are taken after each.
const EVENTS: usize = 8;

/// Where what happens goes.
type Events = mpsc::Sender<(usize, Event)>;

/// One question.
#[derive(Debug, Clone)]
pub struct Ask {
    /// Token ids.
    pub prompt: Vec<u32>,
    /// How the answer is generated. Its `max_tokens` is held to nothing else: the model's context is the caller's to know.
    pub params: Params,
}

/// An answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Answered {
    /// Its text.
    pub text: String,
    /// Its ids, with the one that ended it.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// Until its first token.
    pub first: Duration,
    /// Until its last one.
    pub total: Duration,
}

/// A scheduler on the thread that calls. What it has read of prompts it keeps from call to call.
pub struct Local<'a> {
    scheduler: Scheduler<'a>,
    vocab: usize,
    together: usize,
    places: Arc<Semaphore>,
    failure: Arc<Mutex<Option<String>>>,
}

/// A question that is being answered.
struct Open {
    began: Instant,
    first: Option<Duration>,
    tokens: Vec<u32>,
    text: String,
}

impl<'a> Local<'a> {
    /// Up to `together` (1 to [`MAX_TOGETHER`]) answers side by side, all of them by `route`. Of prompts as much is kept as
    /// `prefix_tokens` tokens take, for prompts that begin alike.
    pub fn new(
        model: &'a Model,
        tokenizer: &'a Tokenizer,
        route: Route<'a>,
        together: usize,
        prefix_tokens: usize,
    ) -> Self {
        let together = together.clamp(1, MAX_TOGETHER);
        let failure = Arc::new(Mutex::new(None));
        let told = failure.clone();
        let limits = Limits {
            max_concurrent: together,
            // Whoever asks has no other user to leave memory for, and needs most of `max_tokens` rarely.
            kv_memory: usize::MAX,
            prefix_memory: KvCache::bytes_for(model, prefix_tokens.min(MOST)),
            prompts_first: true,
            stall_timeout: Duration::MAX,
            log: Arc::new(move |event| {
                if let LogEvent::Failure { message } = event {
                    *told.lock().unwrap_or_else(PoisonError::into_inner) = Some(message);
                }
            }),
        };
        let vocab = usize::try_from(model.config().vocab).unwrap_or(0);
        let scheduler = Scheduler::new(model, Vocabulary::new(tokenizer, vocab), route, limits);
        Self { scheduler, vocab, together, places: Arc::new(Semaphore::new(together)), failure }
    }

    /// What it has done so far.
    pub fn stats(&self) -> EngineStats {
        self.scheduler.stats()
    }

    /// Answers all, in their order; none if `go_on`, which is given the number of finished answers before each turn, said to
    /// stop. `said` is told what happens to the answer to each question, by its place.
    ///
    /// Neither the order of the questions nor how many run side by side changes an answer (on a CPU to the bit).
    ///
    /// # Errors
    /// When a prompt is empty or holds an id outside the vocabulary, a parameter is out of range, or the model fails.
    pub fn answer(
        &mut self,
        asks: &[Ask],
        said: &mut dyn FnMut(usize, &Event),
        go_on: &mut dyn FnMut(usize) -> bool,
    ) -> Result<Option<Vec<Answered>>> {
        asks.iter().try_for_each(|ask| self.check(ask))?;
        let (sender, mut events) = mpsc::channel(EVENTS * self.together);
        let result = self.run(asks, said, go_on, (&sender, &mut events));
        // However it ended, nothing of it goes on.
        drop(events);
        self.scheduler.sweep();
        result
    }

    fn run(
        &mut self,
        asks: &[Ask],
        said: &mut dyn FnMut(usize, &Event),
        go_on: &mut dyn FnMut(usize) -> bool,
        (sender, events): (&Events, &mut mpsc::Receiver<(usize, Event)>),
    ) -> Result<Option<Vec<Answered>>> {
        let mut waiting = asks.iter().enumerate();
        let mut open: Vec<Option<Open>> = asks.iter().map(|_| None).collect();
        let mut answers: Vec<Option<Answered>> = vec![None; asks.len()];
        let (mut running, mut finished) = (0, 0);
        loop {
            while running < self.together
                && let Some((index, ask)) = waiting.next()
            {
                let begun = Open::new();
                if ask.params.max_tokens == 0 {
                    said(index, &Event::Accepted);
                    answers[index] = Some(begun.done(Finish::Length));
                    finished += 1;
                    continue;
                }
                open[index] = Some(begun);
                self.queue(index, ask, sender.clone())?;
                running += 1;
            }
            if running == 0 {
                return Ok(Some(answers.into_iter().flatten().collect()));
            }
            if !go_on(finished) {
                return Ok(None);
            }
            self.scheduler.turn();
            for sequence in self.scheduler.running() {
                if let Some(open) = open.get_mut(sequence.job.index).and_then(Option::as_mut) {
                    open.see(sequence.answer());
                }
            }
            self.scheduler.deliver();
            while let Ok((index, event)) = events.try_recv() {
                said(index, &event);
                match event {
                    Event::Accepted => {}
                    Event::Piece { text, .. } => {
                        open.get_mut(index).into_iter().flatten().for_each(|o| o.text += &text)
                    }
                    Event::Done { finish, .. } => {
                        answers[index] = open[index].take().map(|open| open.done(finish));
                        running -= 1;
                        finished += 1;
                    }
                    Event::Failed(error) => {
                        let cause = self.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
                        return Err(Error::Answer(cause.unwrap_or(error.message)));
                    }
                }
            }
        }
    }

    fn check(&self, ask: &Ask) -> Result<()> {
        if ask.prompt.is_empty() {
            return Err(ModelError::Request("the prompt has no tokens: give at least one".into()).into());
        }
        if let Some(id) = ask.prompt.iter().find(|id| **id as usize >= self.vocab) {
            let why = format!("token id {id} is outside the vocabulary of {}", self.vocab);
            return Err(ModelError::Request(why).into());
        }
        Ok(ask.params.sampling.check()?)
    }

    fn queue(&mut self, index: usize, ask: &Ask, events: Events) -> Result<()> {
        let permit = self.places.clone().try_acquire_owned();
        let permit = permit.map_err(|_| Error::Engine("has no place for another sequence".into()))?;
        let mut params = ask.params.clone();
        params.max_tokens = params.max_tokens.min(MOST - ask.prompt.len().min(MOST));
        let prompt = ask.prompt.clone();
        let tally = Arc::default();
        self.scheduler.queue(Job {
            prompt,
            params,
            guide: None,
            adapter: None,
            index,
            events,
            tally,
            permit,
        });
        Ok(())
    }
}

impl Open {
    fn new() -> Self {
        Self { began: Instant::now(), first: None, tokens: Vec::new(), text: String::new() }
    }

    /// What it has said after a turn.
    fn see(&mut self, tokens: &[u32]) {
        if !tokens.is_empty() {
            self.first.get_or_insert_with(|| self.began.elapsed());
        }
        self.tokens.extend_from_slice(&tokens[self.tokens.len().min(tokens.len())..]);
    }

    fn done(self, finish: Finish) -> Answered {
        let total = self.began.elapsed();
        let first = self.first.unwrap_or(total);
        Answered { text: self.text, tokens: self.tokens, finish, first, total }
    }
}
