//! The one door through which arrays are evaluated and read, so that evaluations can be counted and their graphs seen.
//!
//! MLX counts neither. What is behind this door is what the proxies of a GPU are made of (docs/proxies.md); that nothing
//! goes around it is a house rule with a test.

use std::cell::RefCell;
use std::ffi::c_int;
use std::time::{Duration, Instant};

use mlx_rs::ArrayElement;

use super::{ArrayList, check};
use crate::{Array, Exception, Result};

/// An evaluation as [`record`] saw it, before it began.
#[derive(Debug, Clone)]
pub struct Evaluation {
    /// The graph of all that was still to be computed, as MLX exports it to Graphviz's DOT.
    pub dot: String,
    /// The same as MLX prints it, with shapes and types.
    pub text: String,
    /// What the host did since the evaluation before it (or since the recording began): building the graph.
    pub building: Duration,
}

impl Evaluation {
    /// How many primitives the graph has: the boxes that MLX draws.
    pub fn primitives(&self) -> usize {
        self.dot.matches("shape=rectangle").count()
    }
}

struct Recording {
    evaluations: Vec<Evaluation>,
    since: Instant,
}

thread_local! {
    static RECORDING: RefCell<Option<Recording>> = const { RefCell::new(None) };
}

/// What `f` gives, and every evaluation that it started on this thread, in order. One that found nothing left to compute is
/// none. Not to be nested.
pub fn record<T>(f: impl FnOnce() -> T) -> (T, Vec<Evaluation>) {
    struct End;
    impl Drop for End {
        fn drop(&mut self) {
            RECORDING.set(None);
        }
    }
    // Also when `f` panics: every later evaluation would write its graph.
    let _end = End;
    RECORDING.set(Some(Recording { evaluations: Vec::new(), since: Instant::now() }));
    let result = f();
    (result, RECORDING.take().map_or_else(Vec::new, |recording| recording.evaluations))
}

/// Evaluates arrays.
pub fn eval<'a>(arrays: impl IntoIterator<Item = &'a Array>) -> Result<()> {
    evaluate(arrays, |list| {
        // SAFETY: a valid list.
        unsafe { mlx_sys::mlx_eval(list) }
    })
}

/// Begins to evaluate arrays and returns at once.
pub fn async_eval<'a>(arrays: impl IntoIterator<Item = &'a Array>) -> Result<()> {
    evaluate(arrays, |list| {
        // SAFETY: a valid list.
        unsafe { mlx_sys::mlx_async_eval(list) }
    })
}

/// The elements of an array in row-major order; evaluates it.
pub fn read<T: ArrayElement>(array: &Array) -> Result<&[T]> {
    eval([array])?;
    array.try_as_slice::<T>().map_err(|e| Exception::custom(e.to_string()))
}

fn evaluate<'a>(
    arrays: impl IntoIterator<Item = &'a Array>,
    run: impl FnOnce(mlx_sys::mlx_vector_array) -> c_int,
) -> Result<()> {
    let list = ArrayList::new(arrays)?;
    see(&list)?;
    let outcome = check(|| run(list.raw()));
    RECORDING.with_borrow_mut(|recording| {
        if let Some(recording) = recording {
            recording.since = Instant::now();
        }
    });
    outcome
}

/// Adds the graph of `list` to a recording, if there is one.
fn see(list: &ArrayList) -> Result<()> {
    RECORDING.with_borrow_mut(|recording| {
        let Some(recording) = recording else { return Ok(()) };
        let building = recording.since.elapsed();
        // SAFETY: makes an empty table of names that we own, freed below.
        let names = unsafe { mlx_sys::mlx_node_namer_new() };
        let written = || -> Result<(String, String)> {
            // SAFETY: valid handles, and a stream that is open during the call.
            let dot = written(|file| unsafe { mlx_sys::mlx_export_to_dot(file, names, list.raw()) })?;
            // SAFETY: the same.
            let text = written(|file| unsafe { mlx_sys::mlx_print_graph(file, names, list.raw()) })?;
            Ok((dot, text))
        };
        let outcome = written();
        // SAFETY: ours, and freed once.
        unsafe { mlx_sys::mlx_node_namer_free(names) };
        let (dot, text) = outcome?;
        let evaluation = Evaluation { dot, text, building };
        if evaluation.primitives() > 0 {
            recording.evaluations.push(evaluation);
        }
        Ok(())
    })
}

/// What a call writes to the C stream it is given.
fn written(call: impl FnOnce(*mut mlx_sys::FILE) -> c_int) -> Result<String> {
    let failed =
        || Exception::custom(format!("a graph cannot be written: {}", std::io::Error::last_os_error()));
    // SAFETY: an open temporary file of ours, or null, which is checked; it is used by this thread only, closed once, and
    // `bytes` is as long as the read is allowed to be.
    unsafe {
        let file = libc::tmpfile();
        if file.is_null() {
            return Err(failed());
        }
        let outcome = check(|| call(file.cast()));
        let length = libc::ftell(file);
        libc::rewind(file);
        let mut bytes = vec![0u8; usize::try_from(length).unwrap_or(0)];
        let read = libc::fread(bytes.as_mut_ptr().cast(), 1, bytes.len(), file);
        libc::fclose(file);
        outcome?;
        if length < 0 || read != bytes.len() {
            return Err(failed());
        }
        String::from_utf8(bytes).map_err(|e| Exception::custom(e.to_string()))
    }
}
