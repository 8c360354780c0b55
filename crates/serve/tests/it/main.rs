//! The server from outside: bytes on loopback in, bytes out, compared with what the model says without a server.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a panic is a test's report")]

mod answers;
mod client;
mod dialect;
mod guarded;
mod life;
mod lifecycle;
mod local;
mod refusals;
mod server;
mod shaped;
mod sharing;
mod swapping;
