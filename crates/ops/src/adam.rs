//! One step of Adam, and the norm of all gradients that goes before it.

use std::collections::BTreeMap;

#[cfg(graft_cpu)]
use crate::cpu::adam::{Adam, SquaredNorm};
#[cfg(graft_cpu)]
use crate::form::on_cpu;
use crate::{Array, Exception, Result};

/// The numbers of a step.
#[derive(Debug, Clone, Copy)]
pub struct AdamStep {
    /// What of the old moments is kept.
    pub betas: (f32, f32),
    /// What of the new ones is added: 1 - beta, rounded once.
    pub shares: (f32, f32),
    /// Added to the root.
    pub eps: f32,
    /// The learning rate, with the first moment's correction.
    pub rate: f32,
    /// The second moment's correction, 1 / sqrt(1 - beta^t), if there is one.
    pub correction: Option<f32>,
    /// 1 - rate * decay, if weights decay.
    pub keep: Option<f32>,
}

/// `m' = b1 m + (1 - b1) g`, `v' = b2 v + (1 - b2) g^2`, `p' = keep p - rate m' / (correction sqrt(v') + eps)`: p', m' and v'
/// of p, g, m and v of one shape.
pub fn adam(p: &Array, g: &Array, m: &Array, v: &Array, step: AdamStep) -> Result<[Array; 3]> {
    if [g, m, v].iter().any(|x| x.shape() != p.shape()) {
        let shapes = [p, g, m, v].map(|x| x.shape());
        return Err(Exception::custom(format!("adam: p, g, m and v must have one shape, found {shapes:?}")));
    }
    #[cfg(graft_cpu)]
    if on_cpu(&[p, g, m, v]) {
        return Adam::apply(p, g, m, v, step);
    }
    let scalar = Array::from_f32;
    let AdamStep { betas, shares, eps, rate, correction, keep } = step;
    let m = m.multiply(scalar(betas.0))?.add(g.multiply(scalar(shares.0))?)?;
    let v = v.multiply(scalar(betas.1))?.add(g.square()?.multiply(scalar(shares.1))?)?;
    let mut root = v.sqrt()?;
    if let Some(correction) = correction {
        root = root.multiply(scalar(correction))?;
    }
    let kept = keep.map_or(Ok(p.clone()), |keep| p.multiply(scalar(keep)))?;
    let change = m.multiply(scalar(rate))?.divide(root.add(scalar(eps))?)?;
    Ok([kept.subtract(change)?, m, v])
}

/// The sum of the squares of all elements of all arrays, a scalar.
pub fn squared_norm(arrays: &[Array]) -> Result<Array> {
    #[cfg(graft_cpu)]
    if !arrays.is_empty() && on_cpu(&arrays.iter().collect::<Vec<_>>()) {
        return SquaredNorm::apply(arrays);
    }
    // By number of dimensions: sums that keep theirs are added without being reshaped, one primitive less for each array.
    let mut totals: BTreeMap<usize, Array> = BTreeMap::new();
    for x in arrays {
        let sum = x.square()?.sum(true)?;
        let total = totals.remove(&x.ndim()).map_or(Ok(sum.clone()), |total| total.add(&sum))?;
        totals.insert(x.ndim(), total);
    }
    totals.values().try_fold(Array::from_f32(0.0), |all, total| all.add(total.reshape(&[])?))
}
