//! Means with what is known of their chance: the bootstrap over rows, Student's interval over seeds, quantiles.

use crate::rng::Rng;

/// A number and the two ends of its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Estimate {
    /// The number.
    pub value: f64,
    /// Where the interval begins and ends.
    pub interval: [f64; 2],
}

impl Estimate {
    /// The interval; none where it has no width: values that are all the same do not tell what others would be.
    pub fn range(&self) -> Option<[f64; 2]> {
        Some(self.interval).filter(|[low, high]| low < high)
    }
}

/// The weighted mean of (value, weight) pairs, `sum(v w) / sum(w)`, with the 2.5 % and 97.5 % quantiles of the means of
/// `resamples` samples of as many pairs, drawn with replacement. For a paired comparison the values are differences.
///
/// The pairs are sorted first, so the order of the rows does not matter. Without pairs all is 0.
pub fn bootstrap(pairs: &[(f64, f64)], resamples: usize, seed: u64) -> Estimate {
    let mut pairs = pairs.to_vec();
    pairs.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
    let value = mean(pairs.iter().copied());
    let mut rng = Rng::new(seed);
    let count = pairs.len() as u64;
    let draw = |_| mean((0..count).map(|_| pairs[rng.below(count) as usize]));
    let means: Vec<f64> = (0..resamples).map(draw).collect();
    let end = |q| quantile(&means, q).unwrap_or(value);
    Estimate { value, interval: [end(0.025), end(0.975)] }
}

fn mean(pairs: impl Iterator<Item = (f64, f64)>) -> f64 {
    let (sum, weight) =
        pairs.fold((0.0, 0.0), |(sum, all), (value, weight)| (sum + value * weight, all + weight));
    if weight > 0.0 { sum / weight } else { 0.0 }
}

/// The `q`-quantile, 0 to 1, of values in any order, on a line between the two neighbours; none without values.
pub fn quantile(values: &[f64], q: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = q.clamp(0.0, 1.0) * sorted.len().saturating_sub(1) as f64;
    let (low, high) = (sorted.get(at.floor() as usize)?, sorted.get(at.ceil() as usize)?);
    Some(low + (high - low) * at.fract())
}

/// 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
const STUDENT: [f64; 20] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086,
];

/// The mean of a few independent values with Student's 95 % interval, `mean -+ t s / sqrt(n)`; none for fewer than two.
pub fn student(values: &[f64]) -> Option<Estimate> {
    let count = values.len() as f64;
    let t = STUDENT.get(values.len().checked_sub(2)?).copied().unwrap_or(2.09);
    let value = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|v| (v - value).powi(2)).sum::<f64>() / (count - 1.0);
    let half = t * (variance / count).sqrt();
    Some(Estimate { value, interval: [value - half, value + half] })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests: a panic is the report")]
mod tests {
    use super::*;

    #[test]
    fn the_bootstrap_finds_the_spread_of_a_mean_and_ignores_the_order() {
        // 40 of 100: the standard deviation of the mean is sqrt(0.4 * 0.6 / 100) = 0.049.
        let mut pairs: Vec<(f64, f64)> = (0..100).map(|i| (f64::from(i % 5 < 2), 1.0)).collect();
        let found = bootstrap(&pairs, 4000, 1);
        assert!((found.value - 0.4).abs() < 1e-12);
        let [low, high] = found.interval.map(|end| (end - 0.4).abs());
        assert!((0.085..0.11).contains(&low) && (0.085..0.11).contains(&high), "{found:?}");
        pairs.reverse();
        assert_eq!(bootstrap(&pairs, 4000, 1), found);
        assert_ne!(bootstrap(&pairs, 4000, 2), found);
        // Weights count, and what does not vary has no spread.
        assert_eq!(bootstrap(&[(1.0, 3.0), (5.0, 1.0)], 10, 0).value, 2.0);
        assert_eq!(bootstrap(&[(0.0, 1.0); 9], 100, 0).interval, [0.0, 0.0]);
        // 9 of 9 may be 95 of 100.
        assert_eq!(bootstrap(&[(1.0, 1.0); 9], 100, 0).range(), None);
        assert_eq!(found.range(), Some(found.interval));
        assert_eq!(bootstrap(&[], 10, 0), Estimate { value: 0.0, interval: [0.0, 0.0] });
    }

    #[test]
    fn quantiles_and_students_interval_are_those_of_the_books() {
        assert_eq!(quantile(&[4.0, 1.0, 3.0, 2.0], 0.5), Some(2.5));
        assert_eq!((quantile(&[7.0], 0.9), quantile(&[], 0.5)), (Some(7.0), None));
        // Mean 3, s = sqrt(2.5), n = 5: 3 -+ 2.776 * 0.7071.
        let found = student(&[1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
        assert!(found.value == 3.0 && (found.interval[1] - 4.963).abs() < 1e-3, "{found:?}");
        assert_eq!(student(&[1.0]), None);
    }
}
