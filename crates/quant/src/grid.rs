//! The arithmetic of packed widths, which stands nowhere else.

use crate::{Error, Result};

/// How a weight is packed: affine codes of `bits` bits with a scale and a bias per `group_size` inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Grid {
    /// 2, 3, 4, 5, 6 or 8.
    pub bits: i32,
    /// 32, 64 or 128.
    pub group_size: i32,
}

impl Grid {
    /// The widths that exist.
    pub const BITS: [i32; 6] = [2, 3, 4, 5, 6, 8];
    /// The group sizes that exist.
    pub const GROUP_SIZES: [i32; 3] = [32, 64, 128];

    /// Fails unless both numbers are among those that exist.
    ///
    /// # Errors
    /// Names both numbers and what is possible.
    pub fn check(self) -> Result<()> {
        if Self::BITS.contains(&self.bits) && Self::GROUP_SIZES.contains(&self.group_size) {
            return Ok(());
        }
        Err(Error::Request(format!(
            "{} bits in groups of {} do not exist: bits are one of {:?}, groups one of {:?}",
            self.bits,
            self.group_size,
            Self::BITS,
            Self::GROUP_SIZES
        )))
    }

    /// Whether a row of `inputs` weights can be packed so.
    pub fn fits(self, inputs: usize) -> bool {
        inputs > 0 && inputs.is_multiple_of(self.group_size as usize)
    }

    /// 32-bit words in a packed row of `inputs` weights.
    pub fn words(self, inputs: usize) -> usize {
        inputs * self.bits as usize / 32
    }

    /// Scales (and biases) of a row of `inputs` weights.
    pub fn groups(self, inputs: usize) -> usize {
        inputs / self.group_size as usize
    }

    /// Weights in a row of `words` words, if they are a whole number.
    pub fn inputs(self, words: usize) -> Option<usize> {
        let bits = words.checked_mul(32)?;
        bits.is_multiple_of(self.bits as usize).then(|| bits / self.bits as usize)
    }

    /// Whether rows of `words` words and `groups` scales are packed so.
    pub fn matches(self, words: usize, groups: usize) -> bool {
        self.inputs(words).is_some_and(|inputs| inputs == groups * self.group_size as usize)
    }

    /// The grid of rows of `words` words and `groups` scales, `hint` wherever it fits.
    ///
    /// The two numbers alone decide `bits * group_size` only, so a hint's group size is preferred, then its bits.
    pub fn infer(words: usize, groups: usize, hint: Option<Grid>) -> Option<Grid> {
        let mut all: Vec<Grid> = Self::GROUP_SIZES
            .iter()
            .flat_map(|&group_size| Self::BITS.map(|bits| Grid { bits, group_size }))
            .filter(|grid| grid.matches(words, groups))
            .collect();
        all.sort_by_key(|grid| match hint {
            Some(hint) if *grid == hint => 0,
            Some(hint) if grid.group_size == hint.group_size => 1,
            Some(hint) if grid.bits == hint.bits => 2,
            _ => 3,
        });
        all.first().copied()
    }

    /// The highest code.
    pub(crate) fn top(self) -> f32 {
        ((1u32 << self.bits) - 1) as f32
    }

    /// Bits per weight with 16-bit scales and biases.
    pub fn bits_per_weight(self) -> f64 {
        f64::from(self.bits) + 32.0 / f64::from(self.group_size)
    }
}

impl std::fmt::Display for Grid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bits, groups of {}", self.bits, self.group_size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_agree_both_ways() {
        for bits in Grid::BITS {
            for group_size in Grid::GROUP_SIZES {
                let grid = Grid { bits, group_size };
                grid.check().unwrap();
                for inputs in [128, 384, 1536] {
                    assert_eq!(grid.inputs(grid.words(inputs)), Some(inputs));
                    assert!(grid.matches(grid.words(inputs), grid.groups(inputs)));
                    assert_eq!(Grid::infer(grid.words(inputs), grid.groups(inputs), Some(grid)), Some(grid));
                }
            }
        }
        assert!(Grid { bits: 7, group_size: 64 }.check().is_err());
        assert_eq!(Grid::infer(7, 3, None), None);
    }
}
