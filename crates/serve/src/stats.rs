//! Figures of a running server, as one plain struct that any thread can ask for.

use serde_json::{Value, json};

/// What runs, what it holds, and what it has done since it was started.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct EngineStats {
    /// Sequences that wait for a place or for memory.
    pub waiting: usize,
    /// Sequences that read their prompt or answer.
    pub running: usize,
    /// Bytes that keys and values may take.
    pub kv_budget: usize,
    /// Of these, what running sequences have reserved: their prompt and as many tokens as they may answer.
    pub kv_reserved: usize,
    /// Of these, what prefixes take that no sequence needs at present.
    pub kv_cached: usize,
    /// Prefixes that are kept.
    pub prefixes: usize,
    /// Sequences that began with a prefix that was kept.
    pub prefix_hits: u64,
    /// Tokens of prompts that did not have to be computed.
    pub prefix_tokens: u64,
    /// Names under which adapters are served.
    pub adapters: usize,
    /// Versions of adapters in memory, retired ones included.
    pub generations: usize,
    /// Of these, versions without a name that end with the last answer that needs them.
    pub retired: usize,
    /// Sequences, running or waiting, that hold a version of an adapter.
    pub leases: usize,
    /// Bytes of all versions.
    pub adapter_bytes: usize,
    /// Passes through the model that gave tokens.
    pub steps: u64,
    /// Passes through the model that read a part of a prompt.
    pub chunks: u64,
    /// Tokens of prompts that were computed.
    pub prompt_tokens: u64,
    /// Tokens that were answered.
    pub completion_tokens: u64,
    /// Sequences that ended before they were over, running or waiting, since their reader left or stood still.
    pub canceled: u64,
    /// Of the tokens that were answered, those of such sequences.
    pub canceled_tokens: u64,
    /// Passes, and choices of a token, that failed.
    pub failures: u64,
    /// Seconds that the engine's thread had work.
    pub busy_seconds: f64,
    /// Of these, seconds in passes through the model.
    pub pass_seconds: f64,
}

impl EngineStats {
    /// The body of `/v1/stats`.
    pub(crate) fn body(&self) -> Value {
        json!({
            "sequences": {"running": self.running, "waiting": self.waiting, "canceled": self.canceled},
            "kv_bytes": {"budget": self.kv_budget, "reserved": self.kv_reserved, "cached": self.kv_cached},
            "prefixes": {"kept": self.prefixes, "hits": self.prefix_hits, "tokens": self.prefix_tokens},
            "adapters": {
                "served": self.adapters, "generations": self.generations, "retired": self.retired,
                "leases": self.leases, "bytes": self.adapter_bytes,
            },
            "passes": {"steps": self.steps, "chunks": self.chunks, "failures": self.failures},
            "tokens": {
                "prompt": self.prompt_tokens, "completion": self.completion_tokens,
                "canceled": self.canceled_tokens,
            },
            "seconds": {"busy": self.busy_seconds, "in_passes": self.pass_seconds},
        })
    }
}
