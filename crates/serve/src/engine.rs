//! The engine: one thread on which the model, the adapters and every array live and die, and the handle to it.
//!
//! The handle is what async code holds: names, numbers, the tokenizer and a channel; it holds no array.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use graft_adapters::{Fingerprint, Kind, Route, StoredAdapter, StoredSet};
use graft_model::{ChatTemplate, KvCache, MAX_TOGETHER, Model, Tokenizer};
use graft_ops::Dtype;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::generation::Generation;
use crate::residents::Adopted;
use crate::scheduler::{Limits, Scheduler};
use crate::tokens::{TokenTexts, Vocabulary};
use crate::{ApiError, EngineStats, Error, Job, LogSink, Result};

/// MLX evaluates a graph by recursion, and a prompt's graph is deep.
const STACK_BYTES: usize = 256 << 20;

/// What the engine loads and how much it takes on.
#[derive(Clone)]
pub struct EngineConfig {
    /// The base: weights, tokenizer, chat template.
    pub model_dir: PathBuf,
    /// Dtype of activations and of everything that is not packed.
    pub dtype: Dtype,
    /// Adapters by the name they are served under.
    pub adapters: Vec<(String, PathBuf)>,
    /// What the base is; an adapter that says it was made for another is refused.
    pub fingerprint: Option<Fingerprint>,
    /// Bytes that keys and values of all sequences, and of the prefixes that are kept, may take.
    pub kv_memory: usize,
    /// Text of a chat template to use instead of the model's own.
    pub chat_template: Option<String>,
    /// Longest sequence, prompt and answer together, if less than what the model was made for.
    pub max_context: Option<usize>,
    /// Sequences that run at a time, 1 to [`MAX_CONCURRENT`].
    pub max_concurrent: usize,
    /// Sequences that wait beyond these ([`MAX_QUEUE`] unless there is a reason).
    pub max_queue: usize,
    /// How long a reader may take nothing before its sequence is ended.
    pub stall_timeout: Duration,
    /// Told of failures.
    pub log: LogSink,
}

impl EngineConfig {
    pub(crate) fn limits(&self) -> Limits {
        Limits {
            max_concurrent: self.max_concurrent,
            kv_memory: self.kv_memory,
            prefix_memory: self.kv_memory,
            prompts_first: false,
            stall_timeout: self.stall_timeout,
            log: self.log.clone(),
        }
    }
}

/// Most sequences at a time.
pub const MAX_CONCURRENT: usize = MAX_TOGETHER;
/// A sensible number of sequences that wait.
pub const MAX_QUEUE: usize = 64;

/// What is known of the model without its arrays.
#[derive(Debug)]
pub struct Info {
    /// Text to ids and back.
    pub tokenizer: Tokenizer,
    /// Messages to text; none for a model without one.
    pub template: Option<ChatTemplate>,
    /// Token ids that the model knows are below this.
    pub vocab: usize,
    /// Tokens that a sequence may have.
    pub context: usize,
    /// The token that begins a text.
    pub start: Option<u32>,
    /// Ids that XTC spares.
    pub xtc_special_tokens: Vec<u32>,
    pub(crate) texts: TokenTexts,
    /// Shape and kind of each module on which an adapter may act.
    pub(crate) modules: HashMap<String, ((i32, i32), Kind)>,
    pub(crate) fingerprint: Option<Fingerprint>,
}

impl Info {
    pub(crate) fn words(&self) -> Vocabulary<'_> {
        Vocabulary::new(&self.tokenizer, self.vocab)
    }
}

/// What the thread is told.
pub(crate) enum Command {
    /// Generate.
    Run(Box<Job>),
    /// Take in an adapter, which has to fit the base.
    Adopt(u64, BTreeMap<String, StoredAdapter>, Adopted),
    /// Let an adapter go.
    Release(u64),
    /// End all sequences with this error.
    Abort(ApiError),
}

/// The handle. Dropping it ends what still runs and waits for the thread.
#[derive(Debug)]
pub struct Engine {
    commands: Option<Arc<Sender<Command>>>,
    slots: AtomicU64,
    started: Mutex<Vec<(String, Arc<Generation>)>>,
    stats: Arc<Mutex<EngineStats>>,
    places: Arc<Semaphore>,
    limit: usize,
    share: usize,
    info: Arc<Info>,
    alive: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Engine {
    /// Starts the thread and returns once model and adapters are loaded on it.
    ///
    /// # Errors
    /// When a setting is out of range, a file cannot be used, or an adapter does not fit the base.
    pub fn start(config: EngineConfig) -> Result<Self> {
        if !(1..=MAX_CONCURRENT).contains(&config.max_concurrent) {
            let (field, found) = ("max_concurrent", config.max_concurrent.to_string());
            return Err(Error::Setting { field, expected: "a whole number from 1 to 32", found });
        }
        let limit = config.max_concurrent + config.max_queue;
        let share = limit - config.max_queue / 4;
        // The small files first: a mistake in them is found before the weights are read.
        let mut stored = Vec::with_capacity(config.adapters.len());
        for (name, path) in &config.adapters {
            stored.push((name.clone(), path.clone(), StoredSet::load(path).map_err(|e| unfit(name, e))?));
        }
        // It has no bound of its own: places bound the jobs, and adapters come one at a time.
        let (commands, received) = channel();
        let (report, loaded) = sync_channel(1);
        let alive = Arc::new(AtomicBool::new(true));
        let life = Life(alive.clone());
        let stats = Arc::new(Mutex::new(EngineStats::default()));
        let told = stats.clone();
        let thread = std::thread::Builder::new()
            .name("engine".into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let _life = life;
                run(&config, &received, &report, &told);
            })
            .map_err(|e| Error::Engine(format!("could not be started: {e}")))?;
        let info = match loaded.recv() {
            Ok(result) => result?,
            Err(_) => return Err(Error::Engine("ended while it loaded the model".into())),
        };
        let places = Arc::new(Semaphore::new(limit));
        let (commands, thread) = (Some(Arc::new(commands)), Mutex::new(Some(thread)));
        let (slots, started) = (AtomicU64::new(0), Mutex::default());
        let engine = Self { commands, slots, started, stats, places, limit, share, info, alive, thread };
        for (name, path, stored) in stored {
            let mut started = engine.started.lock().unwrap_or_else(PoisonError::into_inner);
            let content = stored.content();
            let known = started.iter().find(|(_, own)| own.content() == content).map(|(_, own)| own.clone());
            let generation = match known {
                Some(generation) => generation,
                None => engine.take_in(&path, stored, content).map_err(|e| unfit(&name, e))?,
            };
            started.push((name, generation));
        }
        Ok(engine)
    }

    /// The adapters that the engine was started with; whoever asks first gets them.
    pub(crate) fn started(&self) -> Vec<(String, Arc<Generation>)> {
        std::mem::take(&mut *self.started.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What the engine does and holds. Names and versions of adapters are counted by the server.
    pub fn stats(&self) -> EngineStats {
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why an adapter cannot be served on this base, whatever its arrays give.
    ///
    /// # Errors
    /// With all reasons.
    pub(crate) fn check(&self, origin: &Path, stored: &StoredSet) -> graft_adapters::Result<()> {
        let own = Fingerprint::read(&stored.config);
        if let (Some(own), Some(base)) = (own, &self.info.fingerprint)
            && let Some(why) = own.foreign_to(base)
        {
            let problems = vec![format!("it is for another base: {why}")];
            return Err(graft_adapters::Error::Mismatch { file: origin.to_path_buf(), problems });
        }
        stored.check(origin, |path| self.info.modules.get(path).copied())
    }

    /// Hands over an adapter that was checked, with its hash; `done` is told on the engine's thread when it can be used.
    /// Without the version that is returned the engine lets it go again.
    pub(crate) fn adopt(&self, stored: StoredSet, content: String, done: Adopted) -> Arc<Generation> {
        let slot = self.slots.fetch_add(1, Ordering::Relaxed);
        let commands = self.commands.as_ref().map(Arc::downgrade).unwrap_or_default();
        let generation = Arc::new(Generation::new(slot, content, &stored, commands));
        // If the thread has ended, `done` is dropped, which says so.
        let _ended = self.send(Command::Adopt(slot, stored.adapters, done));
        generation
    }

    /// Takes in an adapter and waits until it can be used.
    fn take_in(
        &self,
        origin: &Path,
        stored: StoredSet,
        content: String,
    ) -> graft_adapters::Result<Arc<Generation>> {
        self.check(origin, &stored)?;
        let (done, result) = sync_channel(1);
        let done = move |result| done.send(result).unwrap_or_default();
        let generation = self.adopt(stored, content, Box::new(done));
        match result.recv() {
            Ok(result) => result.map(|()| generation),
            Err(_) => {
                let ended = graft_ops::Exception::custom("the engine ended while it took the adapter in");
                Err(graft_adapters::Error::Array(ended))
            }
        }
    }

    /// What is known of the model.
    pub fn info(&self) -> &Arc<Info> {
        &self.info
    }

    /// The thread runs.
    pub fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Relaxed)
    }

    /// Sequences that run or wait.
    pub fn occupied(&self) -> usize {
        self.limit - self.places.available_permits()
    }

    /// Sequences that one adapter, or the base, may have running and waiting where there are others: a quarter of the queue
    /// is always theirs.
    pub(crate) fn share(&self) -> usize {
        self.share
    }

    /// Takes `count` places, before any work is done for them.
    ///
    /// # Errors
    /// 429 when there are too few, 400 when there never could be enough.
    pub fn admit(&self, count: usize) -> std::result::Result<Vec<OwnedSemaphorePermit>, ApiError> {
        if count > self.limit {
            let message = format!("`prompt` may hold at most {} prompts here", self.limit);
            return Err(ApiError::invalid("prompt", message));
        }
        let mut permits = Vec::with_capacity(count);
        for _ in 0..count {
            let permit = self.places.clone().try_acquire_owned();
            permits.push(permit.map_err(|_| ApiError::queue_full(self.limit))?);
        }
        Ok(permits)
    }

    /// Hands a job over; its events tell the rest.
    ///
    /// # Errors
    /// 503 when the thread has ended.
    pub fn submit(&self, job: Job) -> std::result::Result<(), ApiError> {
        self.send(Command::Run(Box::new(job)))
    }

    /// Ends all sequences, running or waiting, with `error`.
    pub fn abort(&self, error: &ApiError) {
        // If the thread has ended there is nothing to end.
        let _ended = self.send(Command::Abort(error.clone()));
    }

    fn send(&self, command: Command) -> std::result::Result<(), ApiError> {
        let dead = || ApiError::unavailable("engine_dead", "The engine has ended; restart the server.");
        self.commands.as_ref().ok_or_else(dead)?.send(command).map_err(|_| dead())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // It holds nothing that anyone could still want; a panic of it was seen through `is_alive`.
            let _ended = thread.join();
        }
    }
}

/// Says that the thread has ended, however it did.
struct Life(Arc<AtomicBool>);

impl Drop for Life {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// The thread: loads, reports, runs until the handle is gone.
fn run(
    config: &EngineConfig,
    commands: &Receiver<Command>,
    report: &SyncSender<Result<Arc<Info>>>,
    stats: &Mutex<EngineStats>,
) {
    let loaded = load(config);
    // If nobody waits for the report, the handle is gone, and the scheduler ends at once.
    match loaded {
        Ok((model, info)) => {
            let info = Arc::new(info);
            let _gone = report.send(Ok(info.clone()));
            Scheduler::new(&model, info.words(), Route::Base, config.limits()).run(commands, stats);
        }
        Err(e) => {
            let _gone = report.send(Err(e));
        }
    }
}

fn template(config: &EngineConfig, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>> {
    let dir = &config.model_dir;
    let Some(text) = &config.chat_template else {
        return Ok(if ChatTemplate::exists(dir)? { Some(ChatTemplate::load(dir)?) } else { None });
    };
    let token = |id: Option<u32>| id.and_then(|id| tokenizer.id_to_token(id));
    let named = [("bos_token", token(tokenizer.bos_id())), ("eos_token", token(tokenizer.eos_id()))];
    let tokens =
        named.into_iter().filter_map(|(name, token)| Some((name.to_owned(), token?.into()))).collect();
    let templates = [("default".to_owned(), text.clone())];
    Ok(Some(ChatTemplate::new(PathBuf::from("--chat-template"), &templates, tokens)?))
}

fn unfit(name: &str, source: graft_adapters::Error) -> Error {
    Error::Adapter { name: name.to_owned(), source: Box::new(source) }
}

/// Reads everything but adapters; on the thread that will keep it.
pub(crate) fn load(config: &EngineConfig) -> Result<(Model, Info)> {
    let dir = &config.model_dir;
    let tokenizer = Tokenizer::load(dir)?;
    let template = template(config, &tokenizer)?;
    let model = Model::load(dir, config.dtype)?;
    let most = usize::try_from(model.config().max_positions).unwrap_or(0).max(1);
    let most = config.max_context.map_or(most, |limit| limit.min(most));
    let (held, least) = (KvCache::capacity(&model, config.kv_memory), KvCache::bytes_for(&model, 1));
    if held < 2 {
        return Err(Error::Memory { given: config.kv_memory, least });
    }
    let embedding = model.embedding().path.as_str();
    let paths = model.linears().map(|linear| linear.path.as_str()).chain([embedding]);
    let module =
        |path: &str| model.target(path).map(|target| (path.to_owned(), (target.shape(), target.kind)));
    let info = Info {
        start: tokenizer.bos_id().or(tokenizer.eos_id()),
        xtc_special_tokens: tokenizer.xtc_special_tokens()?,
        texts: TokenTexts::new(&tokenizer),
        tokenizer,
        template,
        vocab: usize::try_from(model.config().vocab).unwrap_or(0),
        // What could never be held is refused as what the model could not read.
        context: most.min(held),
        modules: paths.filter_map(module).collect(),
        fingerprint: config.fingerprint.clone(),
    };
    Ok((model, info))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_panics_is_seen_to_have_ended() {
        let alive = Arc::new(AtomicBool::new(true));
        let life = Life(alive.clone());
        let thread = std::thread::spawn(move || {
            let life = life;
            assert!(!life.0.load(Ordering::Relaxed), "as if the model had panicked");
        });
        assert!(thread.join().is_err());
        assert!(!alive.load(Ordering::Relaxed));
    }
}
