//! An OpenAI-compatible server for a base and any number of unfused adapters.
//!
//! Arrays live and die on one thread ([`Engine`]); everything else is async code that sees ids, text, bytes and channels.
//! A request is checked before the engine sees it, so a request that is wrong costs a status code and nothing more.
//!
//! ```text
//! serve   listens, shuts down           api, params, messages, tools, fields   requests to checked values
//! http    routes, bodies, headers       anthropic, openapi      another form of a chat; what all of it looks like
//! auth    keys, hosts, origins          registry, generation    names to versions of adapters, and who holds them
//! answer  request to answer             lifecycle, loader       adapters that come and go
//! metrics, log, page, stats             prompt, guide           ids, and what the answer has to look like
//! engine  the thread and its handle     split, calls            thoughts and calls in an answer's text
//! reply, sse  events to JSON and streams
//! scheduler, pass, sequence, stop, tokens, prefixes, residents   what runs on the engine's thread
//! local   the same on the caller's thread, without a server
//! ```

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a panic is a test's report"))]

mod answer;
mod anthropic;
mod api;
mod auth;
mod calls;
mod engine;
mod error;
mod fields;
#[cfg(test)]
mod fuzz;
mod generation;
mod guide;
mod http;
mod job;
mod lifecycle;
mod loader;
mod local;
mod log;
mod messages;
mod metrics;
mod openapi;
mod page;
mod params;
mod pass;
mod prefixes;
mod prompt;
mod registry;
mod reply;
mod residents;
mod scheduler;
mod sequence;
mod serve;
mod split;
mod sse;
mod stall;
mod stats;
mod stop;
mod tokens;
mod tools;

pub use api::{ChatRequest, CompletionRequest, Prompt};
pub use auth::ApiKeys;
pub use engine::{Engine, EngineConfig, Info, MAX_CONCURRENT, MAX_QUEUE};
pub use error::{ApiError, Error, Result};
pub use generation::{Generation, Lease};
pub use guide::Guide;
pub use job::{Event, Finish, Job, Tally, TokenLogprob, TokenText, Usage};
pub use local::{Answered, Ask, Local};
pub use log::{LogEvent, LogSink, RequestLog};
pub use params::{Common, Defaults, Params};
pub use registry::{AdapterPolicy, DEFAULT_MODEL};
pub use serve::{MAX_BODY_BYTES, ServeConfig, serve, serve_blocking};
pub use stats::EngineStats;
pub use stop::{Matched, StopMatcher};
pub use tools::{Tool, ToolChoice};
