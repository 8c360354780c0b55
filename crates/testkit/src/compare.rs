//! Comparing arrays.

use mlx_rs::{Array, Dtype};

use crate::Tolerance;

/// Whether `a` is `b` within `tol`: same shape, every value finite or equal, `max|a - b| <= absolute + relative max|b|`.
///
/// # Errors
/// A sentence with the worst element.
pub fn close(a: &Array, b: &Array, tol: Tolerance) -> Result<(), String> {
    if a.shape() != b.shape() {
        return Err(format!("shapes differ: {:?} and {:?}", a.shape(), b.shape()));
    }
    let (x, y) = (host(a), host(b));
    let largest = y.iter().filter(|v| v.is_finite()).fold(0.0_f32, |m, v| m.max(v.abs()));
    let bound = tol.absolute + tol.relative * largest;
    let mut worst: Option<(usize, f32)> = None;
    for (i, (p, q)) in x.iter().zip(&y).enumerate() {
        let gap = if p == q { 0.0 } else { (p - q).abs() };
        let gap = if gap.is_nan() { f32::INFINITY } else { gap };
        if worst.is_none_or(|(_, w)| gap > w) {
            worst = Some((i, gap));
        }
    }
    match worst {
        Some((i, gap)) if gap > bound => Err(format!(
            "element {i} of {:?}: {} and {} differ by {gap:e}, allowed {bound:e} ({}, largest value {largest})",
            a.shape(),
            x[i],
            y[i],
            tol.name
        )),
        _ => Ok(()),
    }
}

/// Panics where [`close`] fails.
#[track_caller]
pub fn assert_close(a: &Array, b: &Array, tol: Tolerance) {
    if let Err(e) = close(a, b, tol) {
        panic!("{e}");
    }
}

/// The values as f32, row-major.
pub(crate) fn host(a: &Array) -> Vec<f32> {
    let a = a.as_dtype(Dtype::Float32).expect("a cast to f32");
    // A transposed view has its elements in another order than its shape says; flattening settles it.
    let flat = a.reshape(&[-1]).expect("a flat copy");
    flat.to_vec_cast::<f32>().expect("values of an evaluated array")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{mlx, tolerance};

    #[test]
    fn finds_the_worst_element() {
        mlx(|| {
            let a = Array::from_slice(&[1.0_f32, 2.0, 3.0], &[3]);
            let b = Array::from_slice(&[1.0_f32, 2.5, 3.1], &[3]);
            assert_close(&a, &a, tolerance::EXACT);
            assert!(close(&a, &b, tolerance::F32).unwrap_err().starts_with("element 1"));
            assert!(close(&a, &b.reshape(&[3, 1]).unwrap(), tolerance::F32).unwrap_err().contains("shapes"));
            let nan = Array::from_slice(&[1.0_f32, f32::NAN, 3.0], &[3]);
            assert!(close(&nan, &a, tolerance::BF16).is_err());
            assert!(close(&a, &nan, tolerance::BF16).is_err());
            let view = Array::from_slice(&[1.0_f32, 2.0, 3.0, 4.0], &[2, 2]).transpose().unwrap();
            assert_eq!(host(&view), [1.0, 3.0, 2.0, 4.0]);
        });
    }
}
