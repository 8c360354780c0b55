//! Recipes that give different modules different widths, as mlx_lm decides them.

use crate::Grid;

/// A low and a high width: `v_proj` and `down_proj` of some blocks and the head get the high one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recipe {
    /// 2 and 6 bits.
    Mixed2_6,
    /// 3 and 4 bits.
    Mixed3_4,
    /// 3 and 6 bits.
    Mixed3_6,
    /// 4 and 6 bits.
    Mixed4_6,
}

impl Recipe {
    /// All of them.
    pub const ALL: [Recipe; 4] = [Self::Mixed2_6, Self::Mixed3_4, Self::Mixed3_6, Self::Mixed4_6];

    /// mlx_lm's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mixed2_6 => "mixed_2_6",
            Self::Mixed3_4 => "mixed_3_4",
            Self::Mixed3_6 => "mixed_3_6",
            Self::Mixed4_6 => "mixed_4_6",
        }
    }

    /// The recipe of that name.
    pub fn from_name(name: &str) -> Option<Recipe> {
        Self::ALL.into_iter().find(|recipe| recipe.name() == name)
    }

    /// The low and the high width.
    pub fn bits(self) -> (i32, i32) {
        match self {
            Self::Mixed2_6 => (2, 6),
            Self::Mixed3_4 => (3, 4),
            Self::Mixed3_6 => (3, 6),
            Self::Mixed4_6 => (4, 6),
        }
    }

    /// The grid of module `path` in a model of `layers` blocks.
    ///
    /// The high width goes to the head, and to `v_proj` (`v_a_proj`, `v_b_proj`) and `down_proj` in the first and the
    /// last eighth of the blocks and in every third between them.
    pub fn grid(self, path: &str, layers: usize, group_size: i32) -> Grid {
        let index = layer_of(path).unwrap_or(0);
        let eighth = layers / 8;
        let chosen = index < eighth || index >= 7 * layers / 8 || (index - eighth) % 3 == 2;
        let wide = ["v_proj", "v_a_proj", "v_b_proj", "down_proj"].iter().any(|part| path.contains(part));
        let (low, high) = self.bits();
        Grid::affine(if (wide && chosen) || path.contains("lm_head") { high } else { low }, group_size)
    }
}

/// The first number in a path, which is that of its block.
pub fn layer_of(path: &str) -> Option<usize> {
    path.split('.').find_map(|part| part.parse().ok())
}
