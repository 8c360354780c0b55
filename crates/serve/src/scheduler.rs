//! Which sequence runs next. Each turn decodes one token of every sequence that has read its prompt, then reads one
//! chunk of one prompt, so that a long prompt never holds the others up for longer than a chunk.

use std::any::Any;
use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use graft_adapters::{Route, Table};
use graft_model::{KvCache, Model, PREFILL_STEP, Sampler};
use graft_ops::{Array, Dtype, Rows, ffi};
use mlx_rs::ops::indexing::TryIndexOp as _;

use crate::engine::{Command, EngineConfig, Info};
use crate::log::LogEvent;
use crate::sequence::Sequence;
use crate::{ApiError, Event, Job, LogSink};

/// Pause when every sequence waits for its reader.
const PAUSE: Duration = Duration::from_millis(2);

/// The engine's loop.
pub(crate) struct Scheduler<'a> {
    model: &'a Model,
    tables: &'a [Table],
    info: &'a Info,
    max_concurrent: usize,
    stall_timeout: Duration,
    log: &'a LogSink,
    waiting: VecDeque<Job>,
    active: Vec<Sequence>,
    turn: u64,
}

impl<'a> Scheduler<'a> {
    pub(crate) fn new(
        model: &'a Model,
        tables: &'a [Table],
        info: &'a Info,
        config: &'a EngineConfig,
    ) -> Self {
        Self {
            model,
            tables,
            info,
            max_concurrent: config.max_concurrent,
            stall_timeout: config.stall_timeout,
            log: &config.log,
            waiting: VecDeque::new(),
            active: Vec::new(),
            turn: 0,
        }
    }

    /// Runs until the other end of `commands` is gone.
    pub(crate) fn run(mut self, commands: &Receiver<Command>) {
        while self.listen(commands) {
            self.waiting.retain(|job| !job.events.is_closed());
            let (now, patience) = (Instant::now(), self.stall_timeout);
            self.active.retain_mut(|sequence| sequence.keep(now, patience));
            self.start();
            let decoded = self.decode();
            let read = self.read();
            if !decoded && !read && !self.active.is_empty() {
                match commands.recv_timeout(PAUSE) {
                    Ok(command) => self.obey(command),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        }
    }

    /// Takes all commands, waiting for one only if there is nothing to do. False when none can come any more.
    fn listen(&mut self, commands: &Receiver<Command>) -> bool {
        if self.active.is_empty() && self.waiting.is_empty() {
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
            Command::Run(job) => self.waiting.push_back(*job),
            Command::Abort(error) => {
                for job in self.waiting.drain(..) {
                    refuse(&job, error.clone());
                }
                for sequence in &mut self.active {
                    sequence.fail(error.clone());
                }
            }
        }
    }

    /// Lets waiting sequences run, in the order in which they came.
    fn start(&mut self) {
        while self.active.len() < self.max_concurrent {
            let Some(job) = self.waiting.pop_front() else { return };
            if job.adapter.is_some_and(|index| index >= self.tables.len()) || job.prompt.is_empty() {
                refuse(&job, ApiError::server("the request cannot be run"));
                continue;
            }
            match Sampler::new(&job.params.sampling) {
                Ok(sampler) => self.active.push(Sequence::new(self.model, self.info, job, sampler)),
                Err(e) => refuse(&job, ApiError::request(400, "invalid_value", e.to_string())),
            }
        }
    }

    /// One token for each sequence that can take one. Those of one adapter share a pass.
    fn decode(&mut self) -> bool {
        let mut groups: BTreeMap<(Option<usize>, usize), Vec<&mut Sequence>> = BTreeMap::new();
        for (index, sequence) in self.active.iter_mut().enumerate().filter(|(_, s)| s.decodes()) {
            let company = if sequence.alone { index + 1 } else { 0 };
            groups.entry((sequence.job.adapter, company)).or_default().push(sequence);
        }
        let any = !groups.is_empty();
        for ((adapter, _), mut group) in groups {
            let tokens: Vec<i32> =
                group.iter().filter_map(|s| s.history.last()).map(|id| *id as i32).collect();
            let lengths = vec![1; group.len()];
            let (model, route) = (self.model, route(self.tables, adapter));
            let result = caught(|| {
                let mut caches: Vec<&mut KvCache> = group.iter_mut().map(|s| &mut s.cache).collect();
                let rows = Rows { lengths, starts: caches.iter().map(|c| c.len()).collect() };
                let tokens = Array::from_slice(&tokens, &[tokens.len() as i32]);
                let hidden = model.hidden(&tokens, &rows, Some(&mut caches), &route).map_err(words)?;
                logits(model, &hidden, &route, &caches)
            });
            let vocab = self.info.vocab;
            settle(self.model, self.info, self.log, &mut group, result, vocab);
        }
        any
    }

    /// One chunk of the prompt whose turn it is.
    fn read(&mut self) -> bool {
        let Some(sequence) = self.active.iter_mut().filter(|s| s.reads()).min_by_key(|s| s.turn) else {
            return false;
        };
        self.turn += 1;
        sequence.turn = self.turn;
        let start = sequence.cache.len().max(0) as usize;
        let end = (start + PREFILL_STEP).min(sequence.history.len());
        let last = end == sequence.history.len();
        let (model, route) = (self.model, route(self.tables, sequence.job.adapter));
        let result = caught(|| {
            let tokens: Vec<i32> = sequence.history[start..end].iter().map(|id| *id as i32).collect();
            let count = tokens.len() as i32;
            let rows = Rows { lengths: vec![count], starts: vec![start as i32] };
            let tokens = Array::from_slice(&tokens, &[count]);
            let mut caches = [&mut sequence.cache];
            let hidden = model.hidden(&tokens, &rows, Some(&mut caches), &route).map_err(words)?;
            if last {
                let hidden = hidden.try_index(count - 1..count).map_err(words)?;
                return logits(model, &hidden, &route, &caches);
            }
            // Without this the whole prompt would be one graph.
            ffi::eval(caches.iter().flat_map(|c| c.arrays())).map_err(words)?;
            Ok(Vec::new())
        });
        if last || result.is_err() {
            let vocab = self.info.vocab;
            settle(self.model, self.info, self.log, &mut [sequence], result, vocab);
        }
        true
    }
}

/// Hands each sequence of a pass its logits. If the pass failed, those that shared it go on alone, since one of them
/// may be the cause; one that was alone ends.
fn settle(
    model: &Model,
    info: &Info,
    log: &LogSink,
    group: &mut [&mut Sequence],
    result: Result<Vec<f32>, String>,
    vocab: usize,
) {
    let fail = |sequence: &mut Sequence, message: String| {
        log(LogEvent::Failure { message });
        sequence.fail(ApiError::server("The model failed on this request; the server's log says why."));
    };
    match result {
        Ok(rows) => {
            for (sequence, row) in group.iter_mut().zip(rows.chunks_exact(vocab)) {
                match caught(|| sequence.choose(row, info)) {
                    Ok(()) => {}
                    Err(message) => fail(sequence, message),
                }
            }
        }
        Err(message) => {
            let shared = group.len() > 1;
            for sequence in group {
                if shared {
                    sequence.restart(model);
                } else {
                    fail(sequence, message.clone());
                }
            }
        }
    }
}

/// Logits (M, V) of hidden states (M, E) as f32 on the host; keys and values are computed with them.
fn logits(model: &Model, hidden: &Array, route: &Route, caches: &[&mut KvCache]) -> Result<Vec<f32>, String> {
    let logits = model.logits(hidden, route).map_err(words)?.as_dtype(Dtype::Float32).map_err(words)?;
    let logits = logits.contiguous().map_err(words)?;
    let arrays = caches.iter().flat_map(|cache| cache.arrays());
    ffi::eval(arrays.chain([&logits])).map_err(words)?;
    Ok(ffi::read::<f32>(&logits).map_err(words)?.to_vec())
}

fn route(tables: &[Table], adapter: Option<usize>) -> Route<'_> {
    adapter.and_then(|index| tables.get(index)).map_or(Route::Base, Route::Table)
}

fn refuse(job: &Job, error: ApiError) {
    // The channel is empty: nothing was sent before. If it is closed, nobody is left to tell.
    let _left = job.events.try_send((job.index, Event::Failed(error)));
}

fn words(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Runs a part of a step; a panic in it is a failure of that part, not the end of the thread.
fn caught<T>(part: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(part)).unwrap_or_else(|panic| Err(panic_message(&*panic)))
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a message".into())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;
    use std::sync::Arc;

    use graft_model::Sampling;
    use graft_testkit::{Family, Tiny, mlx, tiny_model};
    use tokio::sync::{Semaphore, mpsc};

    use super::*;
    use crate::Params;
    use crate::engine::load;

    /// Runs three sequences side by side; before turn `failing` the shared pass "fails". Their texts and how they ended.
    fn texts(dir: &Path, failing: Option<usize>) -> BTreeMap<usize, (String, bool)> {
        let config = EngineConfig {
            model_dir: dir.to_path_buf(),
            dtype: Dtype::Float32,
            adapters: Vec::new(),
            chat_template: None,
            max_context: None,
            max_concurrent: 8,
            max_queue: 0,
            stall_timeout: Duration::from_secs(1),
            log: Arc::new(|_| {}),
        };
        let (model, tables, info) = load(&config).unwrap();
        let mut scheduler = Scheduler::new(&model, &tables, &info, &config);
        let places = Arc::new(Semaphore::new(3));
        let (sender, mut events) = mpsc::channel(256);
        for index in 0..3 {
            let prompt = vec![5 + index as u32; 3 + 2 * index];
            let sampling = Sampling { seed: Some(1), temperature: 1.0, ..Sampling::greedy() };
            let params = Params { max_tokens: 20, sampling, stop: Vec::new() };
            let (permit, events) = (places.clone().try_acquire_owned().unwrap(), sender.clone());
            scheduler.waiting.push_back(Job {
                prompt,
                params,
                guide: None,
                adapter: None,
                index,
                events,
                permit,
            });
        }
        for turn in 0..60 {
            let now = Instant::now();
            scheduler.active.retain_mut(|s| s.keep(now, config.stall_timeout));
            scheduler.start();
            if failing == Some(turn) {
                let mut group: Vec<_> = scheduler.active.iter_mut().collect();
                assert_eq!(group.len(), 3);
                settle(&model, &info, &config.log, &mut group, Err("injected".into()), info.vocab);
            }
            scheduler.decode();
            scheduler.read();
        }
        assert!(scheduler.active.is_empty());
        assert_eq!(places.available_permits(), 3, "every place is given back");
        let mut texts = BTreeMap::new();
        while let Ok((index, event)) = events.try_recv() {
            let (text, done) = texts.entry(index).or_insert((String::new(), false));
            match event {
                Event::Accepted => {}
                Event::Piece { text: piece, .. } => text.push_str(&piece),
                Event::Done { .. } => *done = true,
                Event::Failed(error) => panic!("{error:?}"),
            }
        }
        texts
    }

    #[test]
    fn sequences_that_shared_a_failed_pass_go_on_alone_where_they_were() {
        let dir = tiny_model(&Tiny { packed: Some((4, 32)), ..Tiny::new(Family::Qwen3) });
        let undisturbed = mlx(|| texts(dir.path(), None));
        assert!(undisturbed.len() == 3 && undisturbed.values().all(|(_, done)| *done));
        assert_eq!(mlx(|| texts(dir.path(), Some(8))), undisturbed);
    }

    #[test]
    fn a_panic_is_a_failure_of_its_part() {
        assert_eq!(caught::<()>(|| panic!("at {}", 3)), Err("at 3".into()));
        assert_eq!(caught(|| Ok(3)), Ok(3));
    }
}
