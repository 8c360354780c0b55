//! Qwen 2 (biases on q, k, v) and Qwen 3 (norms on q and k, a head dim of its own).

use super::{Family, Fields, GgufFamily};
use crate::{DecoderConfig, Result};

pub(super) const QWEN2: Family = Family {
    names: &["qwen2"],
    config: qwen2,
    gguf: Some(GgufFamily { architecture: "qwen2", class: "Qwen2ForCausalLM", pairs: false, square: true }),
};
pub(super) const QWEN3: Family = Family {
    names: &["qwen3"],
    config: qwen3,
    gguf: Some(GgufFamily { architecture: "qwen3", class: "Qwen3ForCausalLM", pairs: false, square: false }),
};

fn qwen2(fields: &Fields) -> Result<DecoderConfig> {
    Ok(DecoderConfig { qkv_bias: true, ..fields.common()? })
}

fn qwen3(fields: &Fields) -> Result<DecoderConfig> {
    Ok(DecoderConfig { qk_norm: true, ..fields.common()? })
}
