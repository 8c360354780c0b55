//! The server: listens, hands connections to tasks, and ends in order.

use std::convert::Infallible;
use std::future::Future;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::guide::Guides;
use crate::http::handle;
use crate::metrics::Metrics;
use crate::registry::Registry;
use crate::stall::Stall;
use crate::{
    AdapterPolicy, ApiError, ApiKeys, Defaults, Engine, EngineStats, Error, Lease, LogEvent, LogSink, Result,
};

/// Pause after the system refuses a connection (too many open files), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// For sequences to learn that they were ended, and their connections to say so.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Where and how to serve.
#[derive(Clone)]
pub struct ServeConfig {
    /// Address to listen on; port 0 takes a free one.
    pub addr: SocketAddr,
    /// The base's name.
    pub model_id: String,
    /// The adapter for requests that name no model.
    pub default_adapter: Option<String>,
    /// Which adapters may come while the server runs.
    pub adapters: AdapterPolicy,
    /// Origins whose pages may call (`*`: all). Empty: none.
    pub allowed_origins: Vec<String>,
    /// Keys of which a request has to show one; without any, everybody may ask.
    pub api_keys: ApiKeys,
    /// Names that a request may call this server by, beside the machine's own, while it listens on the loopback only and
    /// asks for no key (`*`: any).
    pub allowed_hosts: Vec<String>,
    /// Largest body, in bytes ([`MAX_BODY_BYTES`] unless there is a reason).
    pub max_body_bytes: usize,
    /// For a request's headers to arrive; also how long an idle connection stays open.
    pub header_timeout: Duration,
    /// For a request's body to arrive.
    pub body_timeout: Duration,
    /// For the client to take what is written to it.
    pub write_timeout: Duration,
    /// Silence on a stream after which a comment is sent.
    pub ping_interval: Duration,
    /// For running requests to finish once shutdown was asked for.
    pub drain_timeout: Duration,
    /// Connections at a time; further ones wait to be accepted.
    pub max_connections: usize,
    /// What requests get where they name nothing.
    pub defaults: Defaults,
    /// Seed of what requests without a seed draw from.
    pub seed: u64,
    /// Told of each request and failure.
    pub log: LogSink,
}

/// Largest body that is sensible for text: 32 MiB.
pub const MAX_BODY_BYTES: usize = 32 << 20;

/// What all connections share.
pub(crate) struct State {
    pub(crate) config: ServeConfig,
    pub(crate) engine: Engine,
    pub(crate) registry: Registry,
    pub(crate) guides: Guides,
    pub(crate) metrics: Arc<Metrics>,
    /// Counts what it is told, then tells the caller.
    pub(crate) log: LogSink,
    /// The address listened on.
    pub(crate) addr: SocketAddr,
    draining: AtomicBool,
    drawn: AtomicU64,
}

impl State {
    /// Whether new work is taken.
    pub(crate) fn available(&self) -> std::result::Result<(), ApiError> {
        if self.draining.load(Ordering::Relaxed) {
            return Err(ApiError::unavailable("draining", "The server is shutting down."));
        }
        if !self.engine.is_alive() {
            return Err(ApiError::unavailable("engine_dead", "The engine has ended; restart the server."));
        }
        Ok(())
    }

    /// Whether one adapter (or the base) may have `count` sequences more, which are admitted already: where several are
    /// served, none may fill the part of the queue that is kept for the others.
    pub(crate) fn fair(&self, lease: Option<&Lease>, count: usize) -> std::result::Result<(), ApiError> {
        let held = self.registry.holding(lease, self.engine.occupied().saturating_sub(count));
        let share = self.engine.share();
        if self.registry.has_adapters() && held + count > share {
            return Err(ApiError::queue_full(share));
        }
        Ok(())
    }

    /// What the engine and the registry do and hold.
    pub(crate) fn stats(&self) -> EngineStats {
        let mut stats = self.engine.stats();
        self.registry.count(&mut stats);
        stats
    }

    /// The next of a sequence of well-mixed numbers (splitmix64 over a counter).
    pub(crate) fn random(&self) -> u64 {
        let n = self.drawn.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        mixed(self.config.seed.wrapping_add(n.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }

    /// An id that no other answer has, of this run or another.
    pub(crate) fn unique(&self, prefix: &str) -> String {
        let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
        format!("{prefix}{:016x}{:016x}", mixed(nanos), self.random())
    }

    /// Seconds since 1970.
    pub(crate) fn seconds(&self) -> u64 {
        seconds()
    }
}

fn seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// One number to another, so that neighbours have nothing in common (splitmix64).
pub(crate) fn mixed(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Serves until `shutdown` completes: then no new connection is taken, running requests may finish within
/// `drain_timeout`, and what is left is told and ended. `on_ready` gets the address once it is listened on.
///
/// # Errors
/// When a name or a setting is invalid, or the address cannot be listened on.
pub async fn serve(
    config: ServeConfig,
    engine: Engine,
    on_ready: impl FnOnce(SocketAddr),
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    check(&config)?;
    let default = config.default_adapter.as_deref();
    let (started, policy) = (engine.started(), config.adapters.clone());
    let registry = Registry::new(&config.model_id, started, default, policy, seconds())?;
    let (listener, addr) = listen(config.addr).await?;
    let drain_timeout = config.drain_timeout;
    let places = Arc::new(Semaphore::new(config.max_connections));
    let metrics = Arc::new(Metrics::new().map_err(|e| Error::Metrics(e.to_string()))?);
    let (counting, told) = (metrics.clone(), config.log.clone());
    let log: LogSink = Arc::new(move |event| {
        if let LogEvent::Request(request) = &event {
            counting.count(request);
        }
        told(event);
    });
    let state = Arc::new(State {
        config,
        engine,
        registry,
        guides: Guides::default(),
        metrics,
        log,
        addr,
        draining: AtomicBool::new(false),
        drawn: AtomicU64::new(0),
    });
    on_ready(addr);

    let (drain, draining) = watch::channel(false);
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            Some(_) = connections.join_next() => {}
            accepted = accept(&listener, &places) => {
                if let Some((stream, place)) = accepted {
                    let connection = connection(stream, state.clone(), draining.clone());
                    connections.spawn(async move {
                        connection.await;
                        drop(place);
                    });
                } else {
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
    drop(listener);
    state.draining.store(true, Ordering::Relaxed);
    drain.send_replace(true);
    if tokio::time::timeout(drain_timeout, join_all(&mut connections)).await.is_err() {
        state.engine.abort(&ApiError::unavailable("draining", "The server is shutting down."));
        // What does not even read this is cut off when the set is dropped.
        let _cut = tokio::time::timeout(LAST_WORDS, join_all(&mut connections)).await;
    }
    Ok(())
}

/// [`serve`] on a runtime of its own, for a caller that is not asynchronous.
///
/// # Errors
/// As for [`serve`], or when the runtime cannot be started.
pub fn serve_blocking(
    config: ServeConfig,
    engine: Engine,
    on_ready: impl FnOnce(SocketAddr),
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| Error::Engine(format!("found no runtime to answer to: {e}")))?;
    runtime.block_on(serve(config, engine, on_ready, shutdown))
}

fn check(config: &ServeConfig) -> Result<()> {
    let positive = |field: &'static str, holds: bool| {
        let (expected, found) = ("more than 0", "0".to_owned());
        if holds { Ok(()) } else { Err(Error::Setting { field, expected, found }) }
    };
    positive("max_body_bytes", config.max_body_bytes > 0)?;
    positive("max_connections", config.max_connections > 0)?;
    positive("max_tokens", config.defaults.max_tokens > 0)?;
    positive("header_timeout", !config.header_timeout.is_zero())?;
    positive("write_timeout", !config.write_timeout.is_zero())?;
    positive("ping_interval", !config.ping_interval.is_zero())
}

async fn listen(addr: SocketAddr) -> Result<(TcpListener, SocketAddr)> {
    let failed = |source: std::io::Error| match source.kind() {
        ErrorKind::AddrInUse => Error::PortInUse { addr },
        _ => Error::Bind { addr, source },
    };
    let listener = TcpListener::bind(addr).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> Option<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let place = places.clone().acquire_owned().await.ok()?;
    let (stream, _) = listener.accept().await.ok()?;
    Some((stream, place))
}

async fn join_all(connections: &mut JoinSet<()>) {
    while connections.join_next().await.is_some() {}
}

async fn connection(stream: TcpStream, state: Arc<State>, mut draining: watch::Receiver<bool>) {
    // A token is smaller than a packet; without this the system would wait for more.
    let _unsupported = stream.set_nodelay(true);
    let header_timeout = state.config.header_timeout;
    let stream = Stall::new(stream, state.config.write_timeout);
    let service = service_fn(move |request| {
        let state = state.clone();
        async move { Ok::<_, Infallible>(handle(request, state).await) }
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .serve_connection(TokioIo::new(stream), service);
    let mut serving = pin!(serving);
    tokio::select! {
        // A connection that breaks concerns nobody else; its request's record says that it was canceled.
        _broken = serving.as_mut() => return,
        _ = draining.wait_for(|now| *now) => {}
    }
    serving.as_mut().graceful_shutdown();
    let _broken = serving.await;
}
