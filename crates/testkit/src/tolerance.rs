//! How far two computations of the same thing may be apart, each with the reason for its size.

/// A bound on `max|a - b|`: `absolute + relative * max|b|`.
///
/// The bound is relative to the largest element, not to each one: rounding in a sum scales with the terms of the sum,
/// and an element near zero is near zero because large terms cancelled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance {
    /// What the bound is for; it stands in the report.
    pub name: &'static str,
    /// Part that does not grow with the values.
    pub absolute: f32,
    /// Part that grows with the largest expected value.
    pub relative: f32,
}

/// Bytes that were copied or decoded: equal in every bit.
pub const EXACT: Tolerance = Tolerance { name: "exact", absolute: 0.0, relative: 0.0 };

/// One f32 operation, or the same sum in another order over up to some thousand terms: about 2^-24 * sqrt(4096) * 2.
pub const F32: Tolerance = Tolerance { name: "f32", absolute: 1e-6, relative: 1e-5 };

/// f32 through several layers of a network, where each layer adds the rounding of [`F32`] and softmax may double it.
pub const F32_DEEP: Tolerance = Tolerance { name: "f32, many layers", absolute: 1e-5, relative: 1e-4 };

/// One operation whose result is rounded to f16 (11 bits of mantissa: 2^-11), and its inputs too.
pub const F16: Tolerance = Tolerance { name: "f16", absolute: 1e-3, relative: 2e-3 };

/// One operation whose result is rounded to bf16 (8 bits of mantissa: 2^-8), and its inputs too.
pub const BF16: Tolerance = Tolerance { name: "bf16", absolute: 4e-3, relative: 1.6e-2 };

/// bf16 through several layers: the roundings of [`BF16`] add up as a random walk.
pub const BF16_DEEP: Tolerance = Tolerance { name: "bf16, many layers", absolute: 2e-2, relative: 6e-2 };

/// A gradient against central differences in f32: the step's truncation and the difference of two near values leave
/// about three digits.
pub const FINITE_DIFFERENCE: Tolerance =
    Tolerance { name: "finite difference", absolute: 1e-3, relative: 2e-2 };
