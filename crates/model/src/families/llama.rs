//! Llama, Mistral and SmolLM2: the plain form of the graph.

use super::{Family, Fields, GgufFamily};
use crate::{DecoderConfig, Result};

pub(super) const FAMILY: Family = Family {
    names: &["llama", "mistral"],
    config,
    gguf: Some(GgufFamily { architecture: "llama", class: "LlamaForCausalLM", pairs: true, square: false }),
};

fn config(fields: &Fields) -> Result<DecoderConfig> {
    let bias = fields.bool_or("attention_bias", false)?;
    Ok(DecoderConfig {
        qkv_bias: bias,
        output_bias: bias,
        mlp_bias: fields.bool_or("mlp_bias", false)?,
        ..fields.common()?
    })
}
