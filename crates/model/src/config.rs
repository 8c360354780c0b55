//! The values in which the families of one decoder graph differ.

/// Frequencies of the rotary positions, before any scaling.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// theta.
    pub base: f32,
    /// Interleaved pairs (GPT-J) instead of halves (GPT-NeoX).
    pub traditional: bool,
    /// How the frequencies are stretched for long contexts.
    pub scaling: RopeScaling,
}

/// Scalings of rotary frequencies.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// Positions divided by a factor.
    Linear {
        /// The factor.
        factor: f32,
    },
    /// Llama 3: long wavelengths divided by `factor`, short ones kept, a smooth step between.
    Llama3 {
        /// The factor for long wavelengths.
        factor: f32,
        /// Wavelengths above `original / low` are long.
        low: f32,
        /// Wavelengths below `original / high` are short.
        high: f32,
        /// Context length of the pretrained model, tokens.
        original: f32,
    },
}

/// An attention + MLP decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// config.json's `model_type`.
    pub model_type: String,
    /// E.
    pub hidden: i32,
    /// Number of blocks.
    pub layers: i32,
    /// H.
    pub heads: i32,
    /// K.
    pub kv_heads: i32,
    /// D.
    pub head_dim: i32,
    /// F.
    pub feed_forward: i32,
    /// V, rows of the embedding.
    pub vocab: i32,
    /// Added to the mean square in each norm.
    pub norm_eps: f32,
    /// Rotary positions.
    pub rope: RopeConfig,
    /// The head is the embedding.
    pub tied: bool,
    /// q, k and v have biases.
    pub qkv_bias: bool,
    /// o has a bias.
    pub output_bias: bool,
    /// gate, up and down have biases.
    pub mlp_bias: bool,
    /// q and k are normed per head before the rotation.
    pub qk_norm: bool,
    /// Longest context the model was made for, tokens.
    pub max_positions: i32,
}
