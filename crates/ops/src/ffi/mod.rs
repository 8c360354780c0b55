//! Safe wrappers over the parts of MLX's C interface that mlx-rs leaves out.
//!
//! mlx-rs keeps the text of MLX's last error to itself, so a raw call that fails could only say that it failed.
//! The handler installed here keeps a copy and passes the text on to the handler of mlx-rs, so both work side by side.

mod arrays;
mod evaluate;
mod quantize;
mod transforms;

use std::cell::{Cell, RefCell};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::Once;

pub use arrays::{array_bytes, array_from_bytes, depends};
pub use evaluate::{Evaluation, async_eval, eval, read, record};
pub use mlx_rs::memory;
pub use quantize::{Mode, dequantize, quantize, quantized_matmul};
pub use transforms::{Function, checkpoint, compile, differentiating, value_and_grad};

use crate::{Array, Exception, Result};

unsafe extern "C" {
    /// The error handler of mlx-rs, which its own functions read the message from.
    fn default_mlx_error_handler(message: *const c_char, data: *mut c_void);
}

thread_local! {
    static LAST_MESSAGE: RefCell<Option<String>> = const { RefCell::new(None) };
    static PANIC: Cell<Option<Box<dyn std::any::Any + Send>>> = const { Cell::new(None) };
    static CLOSURE_ERROR: RefCell<Option<Exception>> = const { RefCell::new(None) };
}

extern "C" fn keep_message(message: *const c_char, data: *mut c_void) {
    // SAFETY: MLX passes a NUL-terminated string that lives for the duration of the call.
    let text = unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned();
    LAST_MESSAGE.with_borrow_mut(|last| *last = Some(text));
    // SAFETY: the same two arguments MLX gave us; the callee copies the text.
    unsafe { default_mlx_error_handler(message, data) };
}

fn install_handler() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // mlx-rs installs its handler with its first call, once: that call has to come before ours.
        let _ = mlx_rs::memory::active_memory();
        // SAFETY: the handler is a plain function without state, valid for the life of the process.
        unsafe { mlx_sys::mlx_set_error_handler(Some(keep_message), std::ptr::null_mut(), None) };
    });
}

/// Turns the status of a raw call into a `Result` that carries MLX's message, or the error of a Rust closure that MLX called.
pub(crate) fn check(call: impl FnOnce() -> c_int) -> Result<()> {
    install_handler();
    LAST_MESSAGE.with_borrow_mut(|last| *last = None);
    let status = call();
    if status == 0 {
        return Ok(());
    }
    if let Some(panic) = PANIC.take() {
        std::panic::resume_unwind(panic);
    }
    let message = LAST_MESSAGE.with_borrow_mut(Option::take);
    match CLOSURE_ERROR.with_borrow_mut(Option::take) {
        Some(error) => Err(error),
        None => Err(Exception::custom(message.unwrap_or_else(|| "mlx failed without a message".into()))),
    }
}

/// Runs a raw call that writes one array.
pub(crate) fn array_from(call: impl FnOnce(*mut mlx_sys::mlx_array) -> c_int) -> Result<Array> {
    // SAFETY: an empty handle; the call either fills it or leaves it empty, and `Array` frees both kinds.
    let mut handle = unsafe { mlx_sys::mlx_array_new() };
    let outcome = check(|| call(&mut handle));
    // SAFETY: `handle` is owned by us alone.
    let array = unsafe { Array::from_ptr(handle) };
    outcome.map(|()| array)
}

/// A list of arrays as MLX's C interface takes it.
pub(crate) struct ArrayList(mlx_sys::mlx_vector_array);

impl ArrayList {
    pub(crate) fn empty() -> Self {
        // SAFETY: makes an empty list that we own.
        ArrayList(unsafe { mlx_sys::mlx_vector_array_new() })
    }

    pub(crate) fn new<'a>(arrays: impl IntoIterator<Item = &'a Array>) -> Result<Self> {
        let list = ArrayList::empty();
        for array in arrays {
            // SAFETY: both handles are valid; the list takes a reference of its own.
            check(|| unsafe { mlx_sys::mlx_vector_array_append_value(list.0, array.as_ptr()) })?;
        }
        Ok(list)
    }

    /// The handle, borrowed.
    pub(crate) fn raw(&self) -> mlx_sys::mlx_vector_array {
        self.0
    }

    /// A place for MLX to write a list to.
    pub(crate) fn raw_mut(&mut self) -> *mut mlx_sys::mlx_vector_array {
        &mut self.0
    }

    /// Gives the handle away.
    pub(crate) fn into_raw(self) -> mlx_sys::mlx_vector_array {
        let raw = self.0;
        std::mem::forget(self);
        raw
    }

    pub(crate) fn to_vec(&self) -> Result<Vec<Array>> {
        vector_to_arrays(self.0)
    }
}

impl Drop for ArrayList {
    fn drop(&mut self) {
        // SAFETY: we own the handle and free it once.
        unsafe { mlx_sys::mlx_vector_array_free(self.0) };
    }
}

/// New references to the arrays of a list that stays its owner's.
pub(crate) fn vector_to_arrays(list: mlx_sys::mlx_vector_array) -> Result<Vec<Array>> {
    // SAFETY: the caller's handle is valid.
    let count = unsafe { mlx_sys::mlx_vector_array_size(list) };
    (0..count)
        .map(|i| {
            // SAFETY: i is below the size; the array read is a reference of its own.
            array_from(|out| unsafe { mlx_sys::mlx_vector_array_get(out, list, i) })
        })
        .collect()
}

pub(crate) fn stream() -> mlx_rs::Stream {
    mlx_rs::Stream::thread_local_or_default()
}
