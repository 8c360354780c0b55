//! [`crate::exponentials`] in vectors.

use super::level::dispatch;
use super::simd::{Kernel, Simd, exp};

/// Numbers whose sum is an f32: more would lose digits.
const CHUNK: usize = 256;

pub(crate) fn exponentials_into(x: &[f32], base: f32, scale: f32, to: &mut [f32]) -> f64 {
    dispatch(Exponentials { x, base, scale, to })
}

struct Exponentials<'a> {
    x: &'a [f32],
    base: f32,
    scale: f32,
    to: &'a mut [f32],
}

impl Kernel for Exponentials<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f64 {
        let (base, scale) = (s.splat(self.base), s.splat(self.scale));
        let mut total = 0.0;
        for (x, to) in self.x.chunks(CHUNK).zip(self.to.chunks_mut(CHUNK)) {
            // The last chunk goes on with numbers that give 0.
            let (mut from, mut made) = ([f32::NEG_INFINITY; CHUNK], [0.0; CHUNK]);
            from[..x.len()].copy_from_slice(x);
            let mut sum = s.splat(0.0);
            for at in (0..CHUNK).step_by(S::LANES) {
                // SAFETY: whole vectors of both arrays.
                unsafe {
                    let e = exp(s, s.mul(scale, s.sub(s.load(from.as_ptr().add(at)), base)));
                    s.store(made.as_mut_ptr().add(at), e);
                    sum = s.add(sum, e);
                }
            }
            to.copy_from_slice(&made[..to.len()]);
            total += f64::from(s.sum(sum));
        }
        total
    }
}
