//! Everything that a model directory means: the network, the tokenizer, the chat template, generation.
//!
//! Shape letters: B batch, L tokens of a row, N tokens of all rows concatenated, S cached tokens, H heads, K kv heads,
//! D head dim, E hidden, F feed-forward, V vocabulary, R rank. Rows of different length stand one after another in N;
//! [`graft_ops::Rows`] says where each begins, so that linears and norms see real tokens only.
//!
//! One decoder graph serves all families of attention + MLP; a family maps its config.json to [`DecoderConfig`].
//! The graph never names LoRA or bits: a linear is handed a [`graft_adapters::Route`].

mod cache;
mod chat;
mod config;
mod decoder;
mod error;
mod families;
mod fidelity;
mod generate;
mod gguf;
mod gguf_adapter;
mod gguf_export;
mod gguf_tokenizer;
mod gguf_vocabulary;
mod load;
mod observe;
mod python;
mod rope;
mod sample;
mod stream;
mod tokenizer;

pub use cache::KvCache;
pub use chat::ChatTemplate;
pub use config::{DecoderConfig, RopeConfig, RopeScaling};
pub use decoder::{HEAD_CHUNK, Model};
pub use error::{Error, Result};
pub use families::{Family, GgufFamily, config_from_map, family_names};
pub use fidelity::{Gap, Run, Text, compare};
pub use generate::{
    Completion, GenerateOptions, Generator, MAX_TOGETHER, PREFILL_STEP, Prefill, Token, generate_all,
    reusable, shareable,
};
pub use gguf::GgufImport;
pub use gguf_adapter::GgufAdapter;
pub use gguf_export::GgufExport;
pub use load::{Part, PartKind, parts};
pub use observe::Observer;
pub use sample::{Sampler, Sampling};
pub use stream::TextStream;
pub use tokenizer::{THINKING, Tokenizer};
