//! An OpenAI-compatible server for a base and any number of unfused adapters.
//!
//! Arrays live and die on one thread ([`Engine`]); everything else is async code that sees ids, text, bytes and channels.
//! A request is checked before the engine sees it, so a request that is wrong costs a status code and nothing more.
//!
//! ```text
//! serve   listens, shuts down           api, messages, fields   requests to checked values
//! http    routes, bodies, headers       registry, generation    names to versions of adapters, and who holds them
//! answer  request to answer             lifecycle, loader       adapters that come and go
//! stats   figures                       reply, sse              events to JSON and to a stream
//! engine  the thread and its handle     scheduler, pass, sequence, stop, tokens, prefixes, residents   what runs on it
//! ```

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a panic is a test's report"))]

mod answer;
mod api;
mod engine;
mod error;
mod fields;
mod generation;
mod http;
mod job;
mod lifecycle;
mod loader;
mod log;
mod messages;
mod pass;
mod prefixes;
mod registry;
mod reply;
mod residents;
mod scheduler;
mod sequence;
mod serve;
mod sse;
mod stats;
mod stop;
mod tokens;

pub use api::{ChatRequest, Common, CompletionRequest, Defaults, Params, Prompt};
pub use engine::{Engine, EngineConfig, Info, MAX_CONCURRENT, MAX_QUEUE};
pub use error::{ApiError, Error, Result};
pub use generation::{Generation, Lease};
pub use job::{Event, Finish, Job, TokenLogprob, TokenText, Usage};
pub use log::{LogEvent, LogSink, RequestLog};
pub use registry::{AdapterPolicy, DEFAULT_MODEL};
pub use serve::{MAX_BODY_BYTES, ServeConfig, serve, serve_blocking};
pub use stats::EngineStats;
pub use stop::{Matched, StopMatcher};
