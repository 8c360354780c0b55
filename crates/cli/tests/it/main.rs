//! The `graft` binary from outside, on tiny models: what it writes, prints and answers, and how it refuses.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a panic is a test's report")]

mod compare;
mod convert;
mod data_show;
mod eval;
mod export;
mod facts;
mod fuse;
mod fuse_large;
mod generate;
mod gguf;
mod http;
mod lora;
mod merge;
mod modes;
mod perplexity;
mod pipeline;
mod server;
mod setting;
mod usage;
