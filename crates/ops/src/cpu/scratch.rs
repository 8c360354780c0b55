//! Memory that a thread uses again and again: allocating and faulting in panels would cost as much as filling them.

use std::cell::RefCell;

/// Floats between two cache lines.
const LINE: usize = 16;

/// What is larger than this (in floats) is given back after its use.
const KEEP: usize = 4 << 20;

#[derive(Default)]
pub(crate) struct Scratch(RefCell<Vec<f32>>);

impl Scratch {
    pub(crate) const fn new() -> Scratch {
        Scratch(RefCell::new(Vec::new()))
    }

    /// Calls `f` with `len` floats at the start of a cache line, holding whatever was there.
    pub(crate) fn with<T>(&self, len: usize, f: impl FnOnce(&mut [f32]) -> T) -> T {
        // Taken out for the call: a nested use would find an empty one and allocate, not fail.
        let mut floats = self.0.take();
        if floats.len() < len + LINE {
            floats = vec![0.0; len + LINE];
        }
        let from = floats.as_ptr().align_offset(LINE * 4).min(LINE);
        let value = f(&mut floats[from..from + len]);
        if floats.len() <= KEEP {
            self.0.replace(floats);
        }
        value
    }
}

thread_local! {
    /// The left side of a product, cut into panels; used by the thread that calls.
    pub(crate) static LEFT: Scratch = const { Scratch::new() };
    /// A panel of the right side, or what else a task needs.
    pub(crate) static PANEL: Scratch = const { Scratch::new() };
    /// Logits of some rows.
    pub(crate) static LOGITS: Scratch = const { Scratch::new() };
}
