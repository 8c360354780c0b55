//! Which sequence runs next. Each turn decodes one token of every sequence that has read its prompt, then reads one
//! chunk of one prompt, so that a long prompt never holds the others up for longer than a chunk; then it does what a
//! linear of an adapter needs that is on its way.
//!
//! A sequence begins when there is a place, memory for all that it may say, and the adapter that it asks for. Of those that
//! wait, one whose adapter has the fewest running comes first, then one whose adapter began a sequence longest ago, then the
//! oldest; one that was chosen and only lacks memory lets nobody pass.

mod steps;

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use graft_adapters::{Route, Table};
use graft_model::{KvCache, Model, Sampler};

use crate::engine::Command;
use crate::log::LogEvent;
use crate::pass::Ahead;
use crate::prefixes::Prefixes;
use crate::residents::{Found, Residents};
use crate::sequence::{Sequence, Start};
use crate::tokens::Vocabulary;
use crate::{ApiError, EngineStats, Event, Job, Lease, LogSink};

/// Pause when every sequence waits for its reader.
const PAUSE: Duration = Duration::from_millis(2);

/// An adapter on its way takes one linear a turn, or this part of the turn's time if that is more.
const ADAPTING: u32 = 16;

/// How much a scheduler takes on, and in which order.
#[derive(Clone)]
pub(crate) struct Limits {
    /// Sequences that run at a time.
    pub(crate) max_concurrent: usize,
    /// Bytes that keys and values of all sequences, and of the prefixes that are kept, may take.
    pub(crate) kv_memory: usize,
    /// Of these, bytes that prefixes may take at most.
    pub(crate) prefix_memory: usize,
    /// All prompts are read before a token is decoded. The first tokens come later, and all of them sooner, since a pass over
    /// few rows takes nearly as long as one over many.
    pub(crate) prompts_first: bool,
    /// How long a reader may take nothing before its sequence is ended.
    pub(crate) stall_timeout: Duration,
    /// Told of failures.
    pub(crate) log: LogSink,
}

/// The engine's loop.
pub(crate) struct Scheduler<'a> {
    model: &'a Model,
    words: Vocabulary<'a>,
    /// What a sequence without an adapter of its own computes with.
    base: Route<'a>,
    limits: Limits,
    residents: Residents<'a>,
    prefixes: Prefixes,
    waiting: VecDeque<Job>,
    /// The next one to begin, as soon as there is memory.
    next: Option<Job>,
    active: Vec<Sequence>,
    ahead: Vec<Ahead>,
    turn: u64,
    begun: u64,
    /// The last sequence that each adapter (none is the base) began.
    last: HashMap<Option<u64>, u64>,
    stats: EngineStats,
}

impl<'a> Scheduler<'a> {
    pub(crate) fn new(model: &'a Model, words: Vocabulary<'a>, base: Route<'a>, limits: Limits) -> Self {
        Self {
            model,
            words,
            base,
            limits,
            residents: Residents::new(model),
            prefixes: Prefixes::default(),
            waiting: VecDeque::new(),
            next: None,
            active: Vec::new(),
            ahead: Vec::new(),
            turn: 0,
            begun: 0,
            last: HashMap::new(),
            stats: EngineStats::default(),
        }
    }

    /// Runs until the other end of `commands` is gone.
    pub(crate) fn run(mut self, commands: &Receiver<Command>, stats: &Mutex<EngineStats>) {
        loop {
            self.tell(stats);
            if !self.listen(commands) {
                return;
            }
            let began = Instant::now();
            let moved = self.turn();
            self.stats.busy_seconds += began.elapsed().as_secs_f64();
            if !moved && !self.active.is_empty() {
                match commands.recv_timeout(PAUSE) {
                    Ok(command) => self.obey(command),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        }
    }

    /// One step of everything. False if there was nothing to do but to wait.
    pub(crate) fn turn(&mut self) -> bool {
        let now = Instant::now();
        self.sweep();
        self.start();
        // Those that begin are told so at once: nothing is done for one that still has something to be told.
        self.deliver();
        let waits = self.limits.prompts_first && self.active.iter().any(Sequence::reads);
        let decoded = !waits && self.decode();
        let read = self.read();
        decoded | read | self.adapt(now.elapsed() / ADAPTING)
    }

    /// Lets go of all whose reader has left, running or waiting, and of what is over.
    pub(crate) fn sweep(&mut self) {
        let waited = self.queued();
        self.waiting.retain(|job| !job.events.is_closed());
        self.next = self.next.take().filter(|job| !job.events.is_closed());
        self.stats.canceled += (waited - self.queued()) as u64;
        self.deliver();
    }

    /// Hands out what has been said, and lets go of sequences that are over.
    pub(crate) fn deliver(&mut self) {
        let (now, patience) = (Instant::now(), self.limits.stall_timeout);
        let stats = &mut self.stats;
        self.active.retain_mut(|sequence| {
            let kept = sequence.keep(now, patience);
            if !kept && !sequence.is_told() {
                stats.canceled += 1;
                stats.canceled_tokens += sequence.answer().len() as u64;
            }
            kept
        });
    }

    /// Jobs that wait.
    fn queued(&self) -> usize {
        self.waiting.len() + usize::from(self.next.is_some())
    }

    /// What it has done so far.
    pub(crate) fn stats(&self) -> EngineStats {
        self.stats
    }

    /// Takes a job in.
    pub(crate) fn queue(&mut self, job: Job) {
        self.waiting.push_back(job);
    }

    /// The sequences that run.
    pub(crate) fn running(&self) -> &[Sequence] {
        &self.active
    }

    /// Bytes that prefixes may take beside sequences that have reserved `reserved`.
    fn room(&self, reserved: usize) -> usize {
        self.limits.kv_memory.saturating_sub(reserved).min(self.limits.prefix_memory)
    }

    fn tell(&mut self, stats: &Mutex<EngineStats>) {
        self.stats.waiting = self.queued();
        self.stats.running = self.active.len();
        self.stats.kv_budget = self.limits.kv_memory;
        self.stats.kv_reserved = self.reserved();
        self.stats.kv_cached = self.prefixes.bytes();
        self.stats.prefixes = self.prefixes.len();
        *stats.lock().unwrap_or_else(PoisonError::into_inner) = self.stats;
    }

    /// Takes all commands, waiting for one only if there is nothing to do. False when none can come any more.
    fn listen(&mut self, commands: &Receiver<Command>) -> bool {
        let idle = self.active.is_empty() && self.waiting.is_empty() && self.next.is_none();
        if idle && !self.residents.busy() {
            match commands.recv() {
                Ok(command) => self.obey(command),
                Err(_) => return false,
            }
        }
        loop {
            match commands.try_recv() {
                Ok(command) => self.obey(command),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Run(job) => self.queue(*job),
            Command::Adopt(slot, stored, done) => self.residents.adopt(slot, stored, done),
            Command::Release(slot) => {
                self.residents.release(slot);
                self.prefixes.forget(slot);
                self.last.remove(&Some(slot));
            }
            Command::Abort(error) => {
                for job in self.waiting.drain(..).chain(self.next.take()) {
                    refuse(&job, error.clone());
                }
                // One that has ended and is only read slowly has nothing to lose.
                for sequence in self.active.iter_mut().filter(|sequence| !sequence.is_over()) {
                    sequence.fail(error.clone());
                }
            }
        }
    }

    /// Bytes that running sequences have reserved.
    fn reserved(&self) -> usize {
        self.active.iter().map(|sequence| sequence.reserved).sum()
    }

    /// Lets waiting sequences run.
    fn start(&mut self) {
        while self.active.len() < self.limits.max_concurrent {
            let Some(job) = self.next.take().or_else(|| self.choose()) else { return };
            let sampler = match Sampler::new(&job.params.sampling) {
                Ok(sampler) if !job.prompt.is_empty() => sampler,
                Ok(_) => {
                    refuse(&job, ApiError::server("the request cannot be run"));
                    continue;
                }
                Err(e) => {
                    refuse(&job, ApiError::request(400, "invalid_value", e.to_string()));
                    continue;
                }
            };
            let table = match self.table(&job) {
                Ok(Some(table)) => table,
                // Its scale was made and has been dropped for others meanwhile.
                Ok(None) => {
                    self.waiting.push_front(job);
                    return;
                }
                Err(error) => {
                    refuse(&job, error);
                    continue;
                }
            };
            let reserved = KvCache::bytes_for(self.model, job.prompt.len() + job.params.max_tokens);
            let taken = self.reserved();
            if reserved > self.limits.kv_memory {
                let message =
                    "The prompt and `max_tokens` need more memory than this server has for a sequence.";
                refuse(&job, ApiError { param: Some("max_tokens".into()), ..ApiError::invalid("", message) });
                continue;
            }
            if taken + reserved > self.limits.kv_memory {
                self.next = Some(job);
                return;
            }
            let room = self.room(taken + reserved);
            self.prefixes.shrink(room);
            self.begun += 1;
            self.last.insert(slot(&job), self.begun);
            let start = Start { job, sampler, table, reserved };
            self.active.push(Sequence::new(self.model, &self.words, start, self.begun));
        }
    }

    /// Takes the waiting job whose turn it is out of the queue; those whose adapter is still being made are passed over.
    fn choose(&mut self) -> Option<Job> {
        let mut ready = Vec::with_capacity(self.waiting.len());
        for (at, job) in self.waiting.iter().enumerate() {
            let key = job.adapter.as_ref().and_then(Lease::key);
            if !key.is_some_and(|key| matches!(self.residents.find(key), Found::Soon)) {
                let rivals = self.active.iter().filter(|other| slot(&other.job) == slot(job)).count();
                ready.push((rivals, self.last.get(&slot(job)).copied().unwrap_or(0), at));
            }
        }
        let (_, _, at) = ready.into_iter().min()?;
        self.waiting.remove(at)
    }

    /// The arrays of a job's adapter; none if they are being made.
    fn table(&mut self, job: &Job) -> Result<Option<Option<Rc<Table>>>, ApiError> {
        let Some(key) = job.adapter.as_ref().and_then(Lease::key) else { return Ok(Some(None)) };
        match self.residents.find(key) {
            Found::Ready(table) => Ok(Some(Some(table))),
            Found::Soon => Ok(None),
            Found::Never(why) => {
                (self.limits.log)(LogEvent::Failure { message: format!("an adapter cannot be used: {why}") });
                Err(ApiError::server("The adapter cannot be used; the server's log says why."))
            }
        }
    }

    /// Does what one linear of an adapter needs, and further ones within `time`.
    fn adapt(&mut self, time: Duration) -> bool {
        let began = Instant::now();
        let mut any = false;
        loop {
            if !self.residents.advance() {
                return any;
            }
            any = true;
            if began.elapsed() >= time {
                return true;
            }
        }
    }
}

/// The adapter that a job is for, whatever its scale; none is the base.
fn slot(job: &Job) -> Option<u64> {
    job.adapter.as_ref().and_then(Lease::key).map(|key| key.slot)
}

fn refuse(job: &Job, error: ApiError) {
    // If the channel is closed, nobody is left to tell; if other choices have filled it, its end will tell.
    let _left = job.events.try_send((job.index, Event::Failed(error)));
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;
    use std::sync::Arc;

    use graft_model::Sampling;
    use graft_ops::Dtype;
    use graft_testkit::{Family, Tiny, mlx, tiny_model};
    use tokio::sync::{Semaphore, mpsc};

    use super::*;
    use crate::Params;
    use crate::engine::{EngineConfig, load};

    fn config(dir: &Path) -> EngineConfig {
        EngineConfig {
            model_dir: dir.to_path_buf(),
            dtype: Dtype::Float32,
            adapters: Vec::new(),
            fingerprint: None,
            kv_memory: 1 << 20,
            chat_template: None,
            max_context: None,
            max_concurrent: 8,
            max_queue: 0,
            stall_timeout: Duration::from_secs(1),
            log: Arc::new(|_| {}),
        }
    }

    /// What a sequence said: its text, the bits of its log-probabilities, and whether it came to its end.
    type Said = (String, Vec<u32>, bool);

    /// Runs three sequences side by side; before turn `failing` the shared pass "fails". What they said.
    fn said(
        dir: &Path,
        temperature: f32,
        logprobs: Option<usize>,
        failing: Option<usize>,
    ) -> BTreeMap<usize, Said> {
        let config = config(dir);
        let (model, info) = load(&config).unwrap();
        let mut scheduler = Scheduler::new(&model, info.words(), Route::Base, config.limits());
        let places = Arc::new(Semaphore::new(3));
        let (sender, mut events) = mpsc::channel(1024);
        for index in 0..3 {
            let prompt = vec![5 + index as u32; 3 + 40 * index];
            let mut sampling = Sampling { seed: Some(1), temperature, logprobs, ..Sampling::greedy() };
            if logprobs.is_some() {
                let ends = info.tokenizer.eos_ids().iter();
                sampling.logit_bias = ends.map(|id| (*id, f32::NEG_INFINITY)).collect();
            }
            let params = Params { max_tokens: 60, sampling, stop: Vec::new(), stop_ids: [].into() };
            let (permit, events) = (places.clone().try_acquire_owned().unwrap(), sender.clone());
            let tally = Arc::default();
            scheduler.queue(Job { prompt, params, guide: None, adapter: None, index, events, tally, permit });
        }
        for turn in 0..250 {
            if failing == Some(turn) {
                let members: Vec<u64> = scheduler.active.iter().map(|s| s.id).collect();
                assert_eq!(members.len(), 3);
                scheduler.settle(&members, &Err("injected".into()));
            }
            scheduler.turn();
        }
        assert!(scheduler.active.is_empty());
        assert_eq!(places.available_permits(), 3, "every place is given back");
        let mut all = BTreeMap::new();
        while let Ok((index, event)) = events.try_recv() {
            let (text, bits, done) = all.entry(index).or_insert((String::new(), Vec::new(), false));
            match event {
                Event::Accepted => {}
                Event::Piece { text: piece, logprobs } => {
                    text.push_str(&piece);
                    bits.extend(logprobs.iter().map(|token| token.logprob.to_bits()));
                }
                Event::Done { .. } => *done = true,
                Event::Failed(error) => panic!("{error:?}"),
            }
        }
        all
    }

    #[test]
    fn sequences_that_shared_a_failed_pass_go_on_alone_where_they_were() {
        let dir = tiny_model(&Tiny { packed: Some((4, 32)), ..Tiny::new(Family::Qwen3) });
        // Drawn tokens need the logits; the most probable ones are computed ahead. By turn 45 more has been said than a pass
        // of few rows takes, and its last bits would tell.
        for (temperature, logprobs, turns) in
            [(1.0, None, &[8][..]), (0.0, None, &[8]), (1.0, Some(0), &[8, 45])]
        {
            let undisturbed = mlx(|| said(dir.path(), temperature, logprobs, None));
            assert!(undisturbed.len() == 3 && undisturbed.values().all(|(.., done)| *done));
            for turn in turns {
                assert_eq!(
                    mlx(|| said(dir.path(), temperature, logprobs, Some(*turn))),
                    undisturbed,
                    "{turn}"
                );
            }
        }
    }

    #[test]
    fn what_has_ended_does_not_fail_when_all_is_ended() {
        let dir = tiny_model(&Tiny::new(Family::Qwen3));
        let config = config(dir.path());
        mlx(|| {
            let (model, info) = load(&config).unwrap();
            let mut scheduler = Scheduler::new(&model, info.words(), Route::Base, config.limits());
            let places = Arc::new(Semaphore::new(1));
            // A reader that takes one event and then nothing more.
            let (events, mut reader) = mpsc::channel(1);
            let (permit, tally) = (places.clone().try_acquire_owned().unwrap(), Arc::default());
            let sampling = Sampling { logit_bias: vec![(40, 100.0)], ..Sampling::greedy() };
            let params = Params { max_tokens: 1, sampling, stop: Vec::new(), stop_ids: [].into() };
            let (prompt, index) = (vec![5], 0);
            scheduler.queue(Job { prompt, params, guide: None, adapter: None, index, events, tally, permit });
            for _ in 0..3 {
                scheduler.turn();
            }
            assert_eq!(reader.try_recv(), Ok((0, Event::Accepted)));
            for _ in 0..3 {
                scheduler.turn();
            }
            scheduler.obey(Command::Abort(ApiError::server("over")));
            let mut ends = Vec::new();
            for _ in 0..6 {
                scheduler.turn();
                ends.extend(
                    reader.try_recv().ok().filter(|(_, event)| !matches!(event, Event::Piece { .. })),
                );
            }
            assert!(matches!(ends[..], [(0, Event::Done { .. })]), "{ends:?}");
        });
    }
}
