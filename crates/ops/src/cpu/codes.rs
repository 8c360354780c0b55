//! What packed codes stand for: whole numbers with a scale and a bias, or small floats with a scale.

use super::simd::Simd;
use crate::minifloat::{E2M1, E4M3_SHIFT};

/// A way from codes to weights.
pub(super) trait Code: Copy {
    /// The weights of codes with their scales and, if they have any, biases.
    fn weights<S: Simd>(self, s: S, codes: S::I, scale: S::V, bias: S::V) -> S::V;
}

/// Whole numbers: the affine mode.
#[derive(Clone, Copy)]
pub(super) struct Whole;

/// Floats of four bits: mxfp4 and nvfp4.
#[derive(Clone, Copy)]
pub(super) struct E2m1;

/// Floats of eight bits: mxfp8.
#[derive(Clone, Copy)]
pub(super) struct E4m3;

impl Code for Whole {
    #[inline(always)]
    fn weights<S: Simd>(self, s: S, codes: S::I, scale: S::V, bias: S::V) -> S::V {
        s.fma(s.to_float(codes), scale, bias)
    }
}

impl Code for E2m1 {
    #[inline(always)]
    fn weights<S: Simd>(self, s: S, codes: S::I, scale: S::V, _: S::V) -> S::V {
        s.mul(s.pick(&E2M1, codes), scale)
    }
}

impl Code for E4m3 {
    #[inline(always)]
    fn weights<S: Simd>(self, s: S, codes: S::I, scale: S::V, _: S::V) -> S::V {
        // Exponent and fraction go where f32 has the low bits of its own; a product brings the exponent to its size.
        let magnitude = s.shift_left(s.and(codes, s.splat_int(0x7f)), 20);
        let sign = s.shift_left(s.and(codes, s.splat_int(0x80)), 24);
        s.mul(s.mul(s.as_float(s.or(magnitude, sign)), s.splat(E4M3_SHIFT)), scale)
    }
}
