//! Rounding that knows the inputs: an error in one column is made good in the columns after it.
//!
//! For inputs x with second moments `G = E[x x^T]` an error E of W costs `tr(E G E^T)` at the linear's output, not
//! `||E||^2`. Columns are rounded one after another; the error of each is spread over those that are still to come with the
//! row of the inverse factor that says how (Frantar et al., GPTQ, 2022). Scales and biases stay as they are given: a weight
//! that lies on its grid already, with no update, keeps every code.

use graft_ops::ffi::{Mode, read};
use graft_ops::{Array, Dtype, inverse_factor};

use crate::nearest::{Affine, E2m1, E4m3, Rule, pack, shape_for};
use crate::{Error, Grid, Levels, Packed, Result};

/// Columns rounded before their errors are passed on to all the others in one product.
const BLOCK: usize = 64;
/// Added to the diagonal of G, in parts of its mean, until G has a factor.
const DAMPING: [f32; 4] = [0.01, 0.1, 1.0, 10.0];

/// The second moments of a linear's inputs, and what rounding needs of them.
#[derive(Debug)]
pub struct Hessian {
    gram: Array,
    /// The columns in the order in which they are rounded: those whose errors cost most come first.
    order: Vec<usize>,
    /// U of [`inverse_factor`] of the damped G, its rows and columns in `order`.
    factor: Array,
}

impl Hessian {
    /// Of G (in, in) f32, `X^T X` over the number of tokens. Evaluates.
    ///
    /// # Errors
    /// When G is no matrix of moments: not square, not finite, or all zero.
    pub fn new(gram: Array) -> Result<Hessian> {
        let &[n, columns] = gram.shape() else {
            return Err(Error::Request(format!("expected second moments, found shape {:?}", gram.shape())));
        };
        if n != columns {
            return Err(Error::Request(format!("expected square second moments, found {n} x {columns}")));
        }
        let diagonal = read::<f32>(&mlx_rs::ops::diag(&gram, 0)?.contiguous()?)?.to_vec();
        let mean = diagonal.iter().sum::<f32>() / diagonal.len().max(1) as f32;
        if !(mean.is_finite() && mean > 0.0) {
            return Err(Error::Request("the inputs that were observed are all zero, or no numbers".into()));
        }
        let mut order: Vec<usize> = (0..diagonal.len()).collect();
        order.sort_by(|a, b| diagonal[*b].total_cmp(&diagonal[*a]).then(a.cmp(b)));
        let ids = Array::from_iter(order.iter().map(|i| *i as i32), &[n]);
        let sorted = gram.take_axis(&ids, 0)?.take_axis(&ids, 1)?;
        let identity = mlx_rs::ops::eye::<f32>(n, None, None)?;
        for damping in DAMPING {
            let damped = sorted.add(identity.multiply(Array::from_f32(damping * mean))?)?;
            if let Some(factor) = inverse_factor(&damped)? {
                return Ok(Hessian { gram, order, factor });
            }
        }
        Err(Error::Request("the moments of the inputs that were observed have no Cholesky factor".into()))
    }

    /// What the errors E (rows, in) of a weight cost at the output, by rows: the diagonal of `E G E^T`, f32 (rows,).
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn cost(&self, error: &Array) -> Result<Array> {
        // Rounding may leave a sum of nothing a little below it.
        let cost = error.matmul(&self.gram)?.multiply(error)?.sum_axis(1, false)?;
        Ok(mlx_rs::ops::maximum(&cost, Array::from_f32(0.0))?)
    }
}

/// Rounds W (out, in) to the given levels, each column's error spread over the columns after it. Evaluates.
///
/// # Errors
/// When grid, levels and Hessian do not fit W.
pub fn round_compensated(w: &Array, grid: Grid, levels: &Levels, hessian: &Hessian) -> Result<Packed> {
    match grid.mode {
        Mode::Affine => compensated(w, grid, levels, hessian, Affine { top: grid.top() }),
        Mode::Mxfp4 | Mode::Nvfp4 => compensated(w, grid, levels, hessian, E2m1),
        Mode::Mxfp8 => compensated(w, grid, levels, hessian, E4m3),
    }
}

fn compensated(w: &Array, grid: Grid, levels: &Levels, hessian: &Hessian, rule: impl Rule) -> Result<Packed> {
    let (out, input) = shape_for(w, grid)?;
    if hessian.order.len() != input {
        return Err(Error::Request(format!(
            "the moments of {} inputs do not fit a weight with {input}",
            hessian.order.len()
        )));
    }
    let (group, groups) = (grid.group_size as usize, grid.groups(input));
    let [scales, biases] = levels.host(grid.mode)?;
    let ids = Array::from_iter(hessian.order.iter().map(|i| *i as i32), &[input as i32]);
    // Columns are taken one by one, so that they lie as rows.
    let columns = w.as_dtype(Dtype::Float32)?.transpose()?.take_axis(&ids, 0)?;
    let factor = hessian.factor.contiguous()?;
    let factor = read::<f32>(&factor)?;
    let mut codes = vec![0u8; out * input];
    let mut errors = vec![0f32; input * out];
    for start in (0..input).step_by(BLOCK) {
        let end = (start + BLOCK).min(input);
        let range = |from: usize, to: usize| Array::from_iter(from as i32..to as i32, &[(to - from) as i32]);
        let mut block = columns.take_axis(range(start, end), 0)?;
        if start > 0 {
            let before = Array::from_slice(&errors[..start * out], &[start as i32, out as i32]);
            let share = hessian.factor.take_axis(range(0, start), 0)?.take_axis(range(start, end), 1)?;
            block = block.subtract(share.transpose()?.matmul(before)?)?;
        }
        let mut block = read::<f32>(&block.contiguous()?)?.to_vec();
        for column in start..end {
            let (own, later) = block.split_at_mut((column - start + 1) * out);
            let own = &own[(column - start) * out..];
            let share = &factor[column * input..(column + 1) * input];
            let place = hessian.order[column];
            let error = &mut errors[column * out..(column + 1) * out];
            for (row, (w, error)) in own.iter().zip(error.iter_mut()).enumerate() {
                let at = row * groups + place / group;
                let (code, weight) = rule.nearest(*w, scales[at], biases[at]);
                codes[row * input + place] = code;
                *error = (w - weight) / share[column];
            }
            for (later, share) in later.chunks_exact_mut(out).zip(&share[column + 1..end]) {
                for (w, error) in later.iter_mut().zip(error.iter()) {
                    *w -= share * error;
                }
            }
        }
    }
    Ok(Packed {
        codes: pack(&codes, out, input, grid)?,
        scales: levels.scales.clone(),
        biases: levels.biases.clone(),
        grid,
    })
}
