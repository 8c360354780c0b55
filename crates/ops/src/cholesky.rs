//! Cholesky's factor and the inverse of a triangle, which MLX has for a CPU alone.

use mlx_rs::{Device, DeviceType, Stream};

use crate::{Array, Exception, Result, ffi};

/// Rows of a matrix that MLX factors itself: larger ones are cut in half, so that most of the work is products, for which a CPU
/// has a faster form than MLX's library of decompositions.
const WHOLE: i32 = 128;

/// U, upper triangular, with `A^-1 = U^T U`, of a symmetric matrix A (n, n) in f32; none if A is not positive definite.
///
/// It is what error-compensated rounding asks of a Hessian: row c says how an error in column c is shared among the columns
/// after it. With J the reversed identity and `J A J = L L^T`, U is `J L^-1 J`, so that A^-1 itself is never formed. Evaluates.
///
/// # Errors
/// When A is no square matrix, or an array operation fails.
pub fn inverse_factor(a: &Array) -> Result<Option<Array>> {
    let &[n, columns] = a.shape() else { return Err(not_square(a)) };
    if n != columns || n == 0 {
        return Err(not_square(a));
    }
    let backwards = Array::from_iter((0..n).rev(), &[n]);
    let reversed = |x: &Array| x.take_axis(&backwards, 0)?.take_axis(&backwards, 1);
    on_cpu(|| {
        let Some(inverse) = lower(&reversed(a)?)? else { return Ok(None) };
        let inverse = reversed(&inverse)?;
        let sum = inverse.sum(false)?;
        ffi::eval([&inverse, &sum])?;
        Ok(ffi::read::<f32>(&sum)?.iter().all(|s| s.is_finite()).then_some(inverse))
    })
}

/// L^-1 of A = L L^T.
///
/// With A in quarters: `L21 = A21 L11^-T`, L22 is the factor of `A22 - L21 L21^T`, and the inverse of L has
/// `-L22^-1 L21 L11^-1` in its lower left.
fn lower(a: &Array) -> Result<Option<Array>> {
    let n = a.dim(0);
    if n <= WHOLE {
        let factor = mlx_rs::linalg::cholesky(a, Some(false))?;
        ffi::eval([&factor])?;
        // MLX says nothing of a matrix that has no factor: a pivot is then not positive, or no number.
        let pivots = mlx_rs::ops::diag(&factor, 0)?;
        if !ffi::read::<f32>(&pivots)?.iter().all(|p| p.is_finite() && *p > 0.0) {
            return Ok(None);
        }
        return Ok(Some(mlx_rs::linalg::tri_inv(&factor, Some(false))?));
    }
    let half = n / 2;
    let range = |from: i32, to: i32| Array::from_iter(from..to, &[to - from]);
    let (top, bottom) = (range(0, half), range(half, n));
    let quarter = |rows: &Array, columns: &Array| a.take_axis(rows, 0)?.take_axis(columns, 1);
    let Some(first) = lower(&quarter(&top, &top)?)? else { return Ok(None) };
    let below = quarter(&bottom, &top)?.matmul(first.transpose()?)?;
    let rest = quarter(&bottom, &bottom)?.subtract(below.matmul(below.transpose()?)?)?;
    let Some(second) = lower(&rest)? else { return Ok(None) };
    let left = second.matmul(below)?.matmul(&first)?.negative()?;
    let zeros = mlx_rs::ops::zeros::<f32>(&[half, n - half])?;
    let rows =
        [mlx_rs::ops::concatenate(&[&first, &zeros], 1)?, mlx_rs::ops::concatenate(&[&left, &second], 1)?];
    let inverse = mlx_rs::ops::concatenate(&rows, 0)?;
    ffi::eval([&inverse])?;
    Ok(Some(inverse))
}

fn not_square(a: &Array) -> Exception {
    Exception::custom(format!("expected a square matrix, found shape {:?}", a.shape()))
}

/// Builds operations for a CPU: on the default stream if that is one, else on one stream that each thread makes once.
fn on_cpu<T>(build: impl FnOnce() -> Result<T>) -> Result<T> {
    thread_local! {
        static CPU: Stream = Stream::new_with_device(&Device::cpu());
    }
    if matches!(Device::try_default()?.get_type()?, DeviceType::Cpu) {
        return build();
    }
    CPU.with(|stream| mlx_rs::with_stream(stream, build))
}
