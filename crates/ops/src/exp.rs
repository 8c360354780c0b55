//! Exponentials of many numbers on the host: a token that is drawn needs those of all logits, and one call of the C library
//! for each would cost as much as a small model.

#[cfg(graft_cpu)]
use crate::cpu::exp::exponentials_into;

/// `to[i] = e^(scale (x[i] - base))`, 0 below e^-87, and the sum of all. With `base` the largest of x none exceeds 1.
///
/// x are numbers or minus infinity, scale is positive and finite.
pub fn exponentials(x: &[f32], base: f32, scale: f32, to: &mut Vec<f32>) -> f64 {
    to.clear();
    to.resize(x.len(), 0.0);
    exponentials_into(x, base, scale, to)
}

#[cfg(not(graft_cpu))]
fn exponentials_into(x: &[f32], base: f32, scale: f32, to: &mut [f32]) -> f64 {
    let pairs = to.iter_mut().zip(x);
    pairs
        .map(|(to, x)| {
            *to = (scale * (x - base)).exp();
            f64::from(*to)
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Level, best_cpu_level, set_cpu_level};

    #[test]
    fn they_are_those_of_the_library() {
        for level in [Level::Portable, Level::Avx2, Level::Avx512] {
            set_cpu_level(level);
            for len in [0, 1, 7, 16, 49_153] {
                let mut x: Vec<f32> = (0..len).map(|i| (i * 37 % 1009) as f32 * -0.03).collect();
                if len > 5 {
                    (x[3], x[5]) = (f32::NEG_INFINITY, -3e38);
                }
                for (base, scale) in [(0.0, 1.0), (-1.0, 0.7), (0.0, f32::MAX)] {
                    let mut ours = Vec::new();
                    let sum = exponentials(&x, base, scale, &mut ours);
                    let mut expected = 0.0;
                    for (x, ours) in x.iter().zip(&ours) {
                        // The difference and the product are rounded to f32 as there.
                        let e = f64::from(scale * (x - base)).exp();
                        assert!((f64::from(*ours) - e).abs() <= 4e-7 * e + 1e-37, "{x}: {ours}, not {e}");
                        expected += e;
                    }
                    assert!((sum - expected).abs() <= 1e-6 * expected, "{sum}, not {expected}");
                }
            }
        }
        set_cpu_level(best_cpu_level());
    }
}
