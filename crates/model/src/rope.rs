//! Rotary frequencies and their scalings; the rotation itself is an operation of `ops`.

use graft_ops::{Array, RopeTable};

use crate::{DecoderConfig, RopeScaling};

/// The frequencies (D/2,) of a model, radians per position.
pub(crate) fn table(config: &DecoderConfig) -> graft_ops::Result<RopeTable> {
    let frequencies = frequencies(config);
    RopeTable::new(&Array::from_slice(&frequencies, &[config.head_dim / 2]), config.rope.traditional)
}

/// theta^(-2i/D), then the scaling.
pub(crate) fn frequencies(config: &DecoderConfig) -> Vec<f32> {
    let plain = (0..config.head_dim / 2).map(|i| {
        let exponent = (2 * i) as f32 / config.head_dim as f32;
        1.0 / config.rope.base.powf(exponent)
    });
    match config.rope.scaling {
        RopeScaling::Default => plain.collect(),
        RopeScaling::Linear { factor } => plain.map(|f| f / factor).collect(),
        RopeScaling::Llama3 { factor, low, high, original } => plain
            .map(|f| {
                let wavelength = 2.0 * std::f32::consts::PI / f;
                if wavelength > original / low {
                    f / factor
                } else if wavelength < original / high {
                    f
                } else {
                    let smooth = (original / wavelength - low) / (high - low);
                    f * ((1.0 - smooth) / factor + smooth)
                }
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RopeConfig;

    fn config(scaling: RopeScaling) -> DecoderConfig {
        DecoderConfig {
            model_type: "llama".into(),
            hidden: 128,
            layers: 1,
            heads: 1,
            kv_heads: 1,
            head_dim: 128,
            feed_forward: 1,
            vocab: 1,
            norm_eps: 1e-5,
            rope: RopeConfig { base: 500_000.0, traditional: false, scaling },
            tied: true,
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            qk_norm: false,
            max_positions: 1,
        }
    }

    #[test]
    fn llama3_keeps_short_waves_and_divides_long_ones() {
        let plain = frequencies(&config(RopeScaling::Default));
        let scaling = RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 8192.0 };
        let scaled = frequencies(&config(scaling));
        assert_eq!(plain[0], scaled[0]);
        assert!((plain[63] / scaled[63] - 8.0).abs() < 1e-5);
        // Between the two borders the factor falls steadily from 8 to 1.
        let ratios: Vec<f32> = plain.iter().zip(&scaled).map(|(p, s)| p / s).collect();
        assert!(ratios.windows(2).all(|w| w[1] >= w[0] - 1e-6), "{ratios:?}");
        // mlx_lm 0.32.2's Llama3RoPE, where the step is.
        for (i, expected) in [
            (28, 0.003_211_446),
            (29, 0.002_166_570_6),
            (31, 0.000_856_751_5),
            (34, 0.000_178_507_79),
            (35, 9.556_212e-5),
        ] {
            assert!((scaled[i] / expected - 1.0_f32).abs() < 1e-5, "{i}: {} {expected}", scaled[i]);
        }
    }
}
