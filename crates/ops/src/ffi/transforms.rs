//! Function transforms: value and gradient, checkpointing, compilation.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::{ArrayList, CLOSURE_ERROR, PANIC, check, vector_to_arrays};
use crate::{Array, Result};

thread_local! {
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// Whether the calling code runs inside the function given to [`value_and_grad`], that is, whether its results will
/// be differentiated. Operations use it to save what the gradient will need.
pub fn differentiating() -> bool {
    DEPTH.get() > 0
}

struct Depth;

impl Depth {
    fn enter() -> Depth {
        DEPTH.set(DEPTH.get() + 1);
        Depth
    }
}

impl Drop for Depth {
    fn drop(&mut self) {
        DEPTH.set(DEPTH.get() - 1);
    }
}

/// The outputs of `f(args)` and the gradients of its first output (a scalar) with respect to `args[argnums]`.
///
/// What is to be differentiated has to be passed in `args`: an array that `f` captures is a constant.
/// Nothing is evaluated. An error of `f`, or of a checkpointed part of it, comes back as it was.
pub fn value_and_grad(
    mut f: impl FnMut(&[Array]) -> Result<Vec<Array>>,
    args: &[Array],
    argnums: &[i32],
) -> Result<(Vec<Array>, Vec<Array>)> {
    let traced = |inputs: &[Array]| {
        let _depth = Depth::enter();
        f(inputs)
    };
    let outcome = mlx_rs::transforms::value_and_grad_with_argnums(traced, argnums)(args);
    // A checkpointed part fails, or panics, inside MLX's backward pass, where mlx-rs cannot see what went wrong.
    if let Some(panic) = PANIC.take() {
        std::panic::resume_unwind(panic);
    }
    let error = CLOSURE_ERROR.with_borrow_mut(Option::take);
    match (outcome, error) {
        (Err(_), Some(error)) => Err(error),
        (outcome, _) => outcome,
    }
}

/// A transformed function that MLX holds.
///
/// The Rust function behind it lives as long as any graph built with it, which is why it may borrow nothing.
pub struct Function(mlx_sys::mlx_closure);

impl Function {
    /// Applies the function to `args`.
    pub fn call(&self, args: &[Array]) -> Result<Vec<Array>> {
        let args = ArrayList::new(args)?;
        let mut out = ArrayList::empty();
        // SAFETY: valid handles; `out` receives a list of its own.
        check(|| unsafe { mlx_sys::mlx_closure_apply(out.raw_mut(), self.0, args.raw()) })?;
        out.to_vec()
    }

    fn new<F: Fn(&[Array]) -> Result<Vec<Array>> + 'static>(f: F) -> Function {
        let payload = Box::into_raw(Box::new(f)).cast::<c_void>();
        // SAFETY: MLX calls `trampoline::<F>` with this payload and `release::<F>` once, when the last copy is gone.
        Function(unsafe {
            mlx_sys::mlx_closure_new_func_payload(Some(trampoline::<F>), payload, Some(release::<F>))
        })
    }
}

impl Drop for Function {
    fn drop(&mut self) {
        // SAFETY: we own the handle and free it once.
        unsafe { mlx_sys::mlx_closure_free(self.0) };
    }
}

extern "C" fn trampoline<F: Fn(&[Array]) -> Result<Vec<Array>> + 'static>(
    out: *mut mlx_sys::mlx_vector_array,
    inputs: mlx_sys::mlx_vector_array,
    payload: *mut c_void,
) -> c_int {
    let run = || -> Result<()> {
        // SAFETY: the payload is the boxed `F` of `Function::new`, alive until `release`; only shared access is taken.
        let f = unsafe { &*payload.cast::<F>() };
        let outputs = ArrayList::new(&f(&vector_to_arrays(inputs)?)?)?;
        // SAFETY: `out` points to an empty handle of MLX's, which takes the list over.
        unsafe { *out = outputs.into_raw() };
        Ok(())
    };
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => 0,
        Ok(Err(error)) => {
            CLOSURE_ERROR.with_borrow_mut(|slot| *slot = Some(error));
            1
        }
        Err(panic) => {
            PANIC.set(Some(panic));
            1
        }
    }
}

extern "C" fn release<F>(payload: *mut c_void) {
    // SAFETY: called once by MLX with the box of `Function::new`. A panicking drop must not unwind into C++.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(unsafe { Box::from_raw(payload.cast::<F>()) })));
}

/// `f` as a function whose intermediate results are not kept for the gradient but computed again.
///
/// Gradients flow only to the arguments of the call: what is trained inside `f` must be among them, not captured.
pub fn checkpoint(f: impl Fn(&[Array]) -> Result<Vec<Array>> + 'static) -> Result<Function> {
    transform(f, |out, inner| {
        // SAFETY: valid handles.
        unsafe { mlx_sys::mlx_checkpoint(out, inner) }
    })
}

/// `f` compiled: traced once for each set of shapes and types, or once at all if `shapeless`.
pub fn compile(f: impl Fn(&[Array]) -> Result<Vec<Array>> + 'static, shapeless: bool) -> Result<Function> {
    transform(f, |out, inner| {
        // SAFETY: valid handles.
        unsafe { mlx_sys::mlx_compile(out, inner, shapeless) }
    })
}

fn transform(
    f: impl Fn(&[Array]) -> Result<Vec<Array>> + 'static,
    apply: impl FnOnce(*mut mlx_sys::mlx_closure, mlx_sys::mlx_closure) -> c_int,
) -> Result<Function> {
    let inner = Function::new(f);
    // SAFETY: an empty handle for MLX to fill; `Function` frees it.
    let mut outer = Function(unsafe { mlx_sys::mlx_closure_new() });
    check(|| apply(&mut outer.0, inner.0))?;
    Ok(outer)
}
