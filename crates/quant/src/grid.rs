//! The arithmetic of packed widths, which stands nowhere else.

use graft_ops::ffi::Mode;

use crate::{Error, Result};

/// How a weight is packed: codes of `bits` bits with a scale (and, in the affine mode, a bias) per `group_size` inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Grid {
    /// 2, 3, 4, 5, 6 or 8; each mode of floats has one width.
    pub bits: i32,
    /// 32, 64 or 128; each mode of floats has one size.
    pub group_size: i32,
    /// What codes and scales are.
    pub mode: Mode,
}

impl Grid {
    /// Affine codes.
    pub const fn affine(bits: i32, group_size: i32) -> Grid {
        Grid { bits, group_size, mode: Mode::Affine }
    }

    /// What MLX packs to in a mode if nothing else is said.
    pub const fn of(mode: Mode) -> Grid {
        match mode.fixed() {
            Some((bits, group_size)) => Grid { bits, group_size, mode },
            None => Grid::affine(4, 64),
        }
    }

    /// Whether codes are floats, with scales of eight bits and no biases.
    pub fn is_float(self) -> bool {
        self.mode != Mode::Affine
    }

    /// Affine codes of at least `bits` bits in groups of the same size, or the smallest that exist.
    pub fn raised(self, bits: i32) -> Grid {
        let bits = if self.is_float() { bits } else { self.bits.max(bits) };
        Grid::affine(bits, self.group_size.max(Self::GROUP_SIZES[0]))
    }

    /// The widths that exist.
    pub const BITS: [i32; 6] = [2, 3, 4, 5, 6, 8];
    /// The group sizes that exist.
    pub const GROUP_SIZES: [i32; 3] = [32, 64, 128];

    /// Fails unless both numbers are among those that exist in the mode.
    ///
    /// # Errors
    /// Names both numbers and what is possible.
    pub fn check(self) -> Result<()> {
        if self.is_float() {
            let own = Grid::of(self.mode);
            return if self == own {
                Ok(())
            } else {
                Err(Error::Request(format!(
                    "{} has {} bits in groups of {}, not {} in groups of {}: give those, or neither",
                    self.mode.name(),
                    own.bits,
                    own.group_size,
                    self.bits,
                    self.group_size
                )))
            };
        }
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

    /// The grid of rows of `words` words and `groups` scales, which are bytes in the modes of floats; `hint` wherever it fits.
    ///
    /// The two numbers alone decide `bits * group_size` only, in which the modes of floats differ. Of affine grids a hint's
    /// group size is preferred, then its bits.
    pub fn infer(words: usize, groups: usize, bytes: bool, hint: Option<Grid>) -> Option<Grid> {
        let affine =
            || Self::GROUP_SIZES.iter().flat_map(|&size| Self::BITS.map(|bits| Grid::affine(bits, size)));
        let mut all: Vec<Grid> = Mode::ALL.into_iter().map(Grid::of).filter(|grid| grid.is_float()).collect();
        if !bytes {
            all = affine().collect();
        }
        all.retain(|grid| grid.matches(words, groups));
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

    /// The distance of two neighbouring weights in units of the scale; of floats, which have several, the one at a quarter of
    /// the largest.
    pub fn step(self) -> f32 {
        match self.mode {
            Mode::Affine => 1.0,
            Mode::Mxfp4 | Mode::Nvfp4 => 0.5,
            Mode::Mxfp8 => 8.0,
        }
    }

    /// Bits per weight with 16-bit scales and biases, or a scale of a byte.
    pub fn bits_per_weight(self) -> f64 {
        let level = if self.is_float() { 8.0 } else { 32.0 };
        f64::from(self.bits) + level / f64::from(self.group_size)
    }
}

impl std::fmt::Display for Grid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.is_float() {
            write!(f, "{}, ", self.mode.name())?;
        }
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
                let grid = Grid::affine(bits, group_size);
                grid.check().unwrap();
                for inputs in [128, 384, 1536] {
                    assert_eq!(grid.inputs(grid.words(inputs)), Some(inputs));
                    assert!(grid.matches(grid.words(inputs), grid.groups(inputs)));
                    let (words, groups) = (grid.words(inputs), grid.groups(inputs));
                    assert_eq!(Grid::infer(words, groups, false, Some(grid)), Some(grid));
                }
            }
        }
        assert!(Grid::affine(7, 64).check().is_err());
        assert_eq!(Grid::infer(7, 3, false, None), None);
    }

    #[test]
    fn modes_of_floats_are_told_by_their_tensors() {
        for grid in Mode::ALL.map(Grid::of).into_iter().filter(|grid| grid.is_float()) {
            grid.check().unwrap();
            assert!(Grid { group_size: 64, ..grid }.check().is_err());
            let (words, groups) = (grid.words(1536), grid.groups(1536));
            for hint in [None, Some(Grid::affine(4, 32)), Some(Grid::of(Mode::Nvfp4))] {
                assert_eq!(Grid::infer(words, groups, true, hint), Some(grid));
            }
            assert_eq!(grid.raised(8), Grid::affine(8, 32));
        }
        assert_eq!(Grid::affine(4, 128).raised(8), Grid::affine(8, 128));
        assert_eq!(Grid::infer(12, 1, true, None), None);
    }
}
