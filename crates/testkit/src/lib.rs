//! What the tests of the other crates share: the array thread, tiny model and adapter directories, tolerances.
//!
//! Development only, and it uses no graft crate: a tiny checkpoint is written by MLX and by hand, so a test that reads
//! it back compares our reader with something else than our writer.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::missing_panics_doc,
    reason = "this crate runs in tests only, where a panic is the report"
)]

mod adapter;
mod chat;
mod compare;
mod files;
mod floats;
mod gguf;
mod random;
mod thread;
mod tiny;
mod tokenizer;
pub mod tolerance;

pub use adapter::tiny_adapter;
pub use chat::{CHAT_STYLES, ChatStyle};
pub use compare::{assert_close, close};
pub use gguf::{GgufMaker, gguf_text, tiny_gguf};
pub use thread::{mlx, wanted, wanted_form_is_mlx};
pub use tiny::{Dtype, Family, Tiny, tiny_dense_of, tiny_model};
pub use tokenizer::{CHAT_TEMPLATE, tokenizer_json};
pub use tolerance::Tolerance;
