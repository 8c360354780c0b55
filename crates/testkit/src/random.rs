//! Seeded normal numbers on the host: the same on every machine and in every version of MLX.

/// A stream of pseudo-random numbers (splitmix64).
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// A stream of its own for every `name`, so that adding a tensor does not change the others.
    pub(crate) fn new(seed: u64, name: &str) -> Self {
        // FNV-1a spreads the names.
        let hash = name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        Self(hash ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in (0, 1].
    fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// `n` values of N(mean, std^2) (Box-Muller).
    pub(crate) fn normal(&mut self, n: usize, mean: f32, std: f32) -> Vec<f32> {
        let one = |r: &mut Self| {
            let (u, v) = (r.uniform(), r.uniform());
            (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
        };
        (0..n).map(|_| mean + std * one(self) as f32).collect()
    }
}
