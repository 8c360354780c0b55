//! A low-rank update as linears take it, and the form of it that answers read fastest.

use mlx_rs::ops;

use crate::{Array, Dtype, Exception, Result, WeightRef};

/// A low-rank update of a weight W (out, in): s A B beside it, and perhaps a factor of each row.
#[derive(Clone, Copy)]
pub struct LowRank<'a> {
    /// A (in, R) f32, or as [`arrange_update`] gives it.
    pub a: &'a Array,
    /// B (R, out) f32, or as [`arrange_update`] gives it.
    pub b: &'a Array,
    /// s.
    pub scale: f32,
    /// DoRA's c (out,) f32, not zero where a gradient is wanted.
    pub factor: Option<&'a Array>,
    /// What takes the place of x in the side path: x after dropout.
    pub input: Option<&'a Array>,
}

/// Outputs that stand together in an arranged B: as many as in a panel of arranged weights.
pub(crate) const COLUMNS: i32 = 16;

impl LowRank<'_> {
    /// Whether A and B are as [`arrange_update`] gives them.
    pub(crate) fn arranged(&self) -> bool {
        self.b.ndim() == 3
    }

    /// R.
    #[cfg(graft_cpu)]
    pub(crate) fn rank(&self) -> i32 {
        if self.arranged() { self.a.dim(0) } else { self.a.dim(1) }
    }

    /// Fails if A, B or c are not for a weight of (out, inputs).
    pub(crate) fn check(&self, out: i32, inputs: i32) -> Result<()> {
        let (a, b) = (self.a.shape(), self.b.shape());
        if a.contains(&0) || b.contains(&0) {
            return Err(Exception::custom(format!(
                "linear: A {a:?} and B {b:?} have rank 0; expected at least 1, or no update at all"
            )));
        }
        let fits = match (a, b) {
            (&[i, r], &[q, o]) => i == inputs && r == q && o == out,
            (&[r, i], &[panels, q, COLUMNS]) => i == inputs && r == q && panels == panels_of(out),
            _ => false,
        };
        if fits {
            return Ok(());
        }
        Err(Exception::custom(format!(
            "linear: A {a:?} and B {b:?} do not fit a weight of ({out}, {inputs})"
        )))
    }
}

fn panels_of(out: i32) -> i32 {
    (out + COLUMNS - 1) / COLUMNS
}

/// A (in, R) and B (R, out) of an update of `weight` in the form in which its answers read them: bf16, A turned to (R, in), B by
/// sixteen outputs (ceil(out / 16), R, 16). Nothing where `weight` is not arranged: they are then read as they are.
///
/// A token reads every A and B once, so their bytes count as W's do. Rounded to bf16 the update moves by 2^-9 of itself at
/// most, and much less in sum; c and all sums stay f32.
pub fn arrange_update(weight: WeightRef, a: &Array, b: &Array) -> Result<Option<(Array, Array)>> {
    if !matches!(weight, WeightRef::Arranged(_)) {
        return Ok(None);
    }
    let (out, inputs) = weight.shape()?;
    LowRank { a, b, scale: 1.0, factor: None, input: None }.check(out, inputs)?;
    let (rank, panels) = (b.dim(0), panels_of(out));
    let whole = ops::pad(b, &[(0, 0), (0, panels * COLUMNS - out)], None, None)?;
    let turned = whole.reshape(&[rank, panels, COLUMNS])?.transpose_axes(&[1, 0, 2])?;
    let stored = |array: &Array| array.as_dtype(Dtype::Bfloat16)?.contiguous();
    Ok(Some((stored(&a.transpose()?)?, stored(&turned)?)))
}
