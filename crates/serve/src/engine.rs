//! The engine: one thread on which the model, the adapters and every array live and die, and the handle to it.
//!
//! The handle is what async code holds: names, numbers, the tokenizer and a channel; it holds no array.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use graft_adapters::{AdapterSet, Table};
use graft_model::{ChatTemplate, MAX_TOGETHER, Model, Tokenizer};
use graft_ops::Dtype;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::scheduler::Scheduler;
use crate::tokens::TokenTexts;
use crate::{ApiError, Error, Job, LogSink, Result};

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
    /// Names of the adapters, by index.
    pub adapters: Vec<String>,
    pub(crate) texts: TokenTexts,
}

/// What the thread is told.
#[derive(Debug)]
pub(crate) enum Command {
    /// Generate.
    Run(Box<Job>),
    /// End all sequences with this error.
    Abort(ApiError),
}

/// The handle. Dropping it ends what still runs and waits for the thread.
#[derive(Debug)]
pub struct Engine {
    commands: Option<SyncSender<Command>>,
    places: Arc<Semaphore>,
    limit: usize,
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
        // As many commands as there are places, and one to end them all: sending never waits.
        let (commands, received) = sync_channel(limit + 1);
        let (report, loaded) = sync_channel(1);
        let alive = Arc::new(AtomicBool::new(true));
        let life = Life(alive.clone());
        let thread = std::thread::Builder::new()
            .name("engine".into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let _life = life;
                run(&config, &received, &report);
            })
            .map_err(|e| Error::Engine(format!("could not be started: {e}")))?;
        let info = match loaded.recv() {
            Ok(result) => result?,
            Err(_) => return Err(Error::Engine("ended while it loaded the model".into())),
        };
        let places = Arc::new(Semaphore::new(limit));
        Ok(Self { commands: Some(commands), places, limit, info, alive, thread: Mutex::new(Some(thread)) })
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
        self.commands.as_ref().ok_or_else(dead)?.try_send(command).map_err(|_| dead())
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
fn run(config: &EngineConfig, commands: &Receiver<Command>, report: &SyncSender<Result<Arc<Info>>>) {
    let loaded = load(config);
    // If nobody waits for the report, the handle is gone, and the scheduler ends at once.
    match loaded {
        Ok((model, tables, info)) => {
            let info = Arc::new(info);
            let _gone = report.send(Ok(info.clone()));
            Scheduler::new(&model, &tables, &info, config).run(commands);
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

/// Reads everything; on the thread that will keep it.
pub(crate) fn load(config: &EngineConfig) -> Result<(Model, Vec<Table>, Info)> {
    let dir = &config.model_dir;
    // The small files first: a mistake in them is found before the weights are read.
    let tokenizer = Tokenizer::load(dir)?;
    let template = template(config, &tokenizer)?;
    let mut sets = Vec::with_capacity(config.adapters.len());
    for (name, path) in &config.adapters {
        let set = AdapterSet::load(path);
        sets.push(set.map_err(|e| unfit(name, e))?);
    }
    let model = Model::load(dir, config.dtype)?;
    let mut tables = Vec::with_capacity(sets.len());
    for (set, (name, path)) in sets.iter().zip(&config.adapters) {
        let table = set.table(path, |module| model.target(module));
        tables.push(table.map_err(|e| unfit(name, e))?);
    }
    let most = usize::try_from(model.config().max_positions).unwrap_or(0).max(1);
    let info = Info {
        start: tokenizer.bos_id().or(tokenizer.eos_id()),
        xtc_special_tokens: tokenizer.xtc_special_tokens()?,
        texts: TokenTexts::new(&tokenizer),
        tokenizer,
        template,
        vocab: usize::try_from(model.config().vocab).unwrap_or(0),
        context: config.max_context.map_or(most, |limit| limit.min(most)),
        adapters: config.adapters.iter().map(|(name, _)| name.clone()).collect(),
    };
    Ok((model, tables, info))
}
