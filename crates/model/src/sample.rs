//! Choosing the next token on the host.

use crate::{Error, Result};

/// How tokens are chosen.
#[derive(Debug, Clone, Default)]
pub struct Sampling {
    /// 0 takes the most likely token.
    pub temperature: f32,
}

impl Sampling {
    /// Whether the most likely token is taken, unchanged by any penalty.
    pub fn is_plain_greedy(&self) -> bool {
        self.temperature == 0.0
    }
}

/// Chooses tokens.
#[derive(Debug)]
pub struct Sampler;

impl Sampler {
    /// A sampler.
    pub fn new(_: &Sampling) -> Result<Self> {
        Ok(Self)
    }

    /// The most likely token.
    pub fn sample(&mut self, logits: &[f32], _: &[u32]) -> Result<(u32, f32)> {
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
        let best = best.ok_or_else(|| Error::Request("no logits".into()))?;
        Ok((best as u32, 0.0))
    }
}
