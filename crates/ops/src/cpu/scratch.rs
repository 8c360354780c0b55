//! Memory that a thread uses again and again: allocating and faulting in panels would cost as much as filling them.

use std::cell::Cell;
use std::ops::{Deref, DerefMut};
use std::thread::LocalKey;

/// Floats between two cache lines.
const LINE: usize = 16;

/// What is larger than this (in floats) is given back after its use.
const KEEP: usize = 4 << 20;

/// A place that keeps a thread's memory between two uses.
pub(crate) type Place = LocalKey<Cell<Vec<f32>>>;

thread_local! {
    /// The left side of a product, cut into panels; used by the thread that calls.
    pub(crate) static LEFT: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    /// A panel of the right side, or what else a task needs.
    pub(crate) static PANEL: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    /// Turned or padded factors of a side path, or slopes with a factor.
    pub(crate) static SIDE: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    /// What linears multiply, where it is made with them.
    pub(crate) static MADE: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    /// Rotated queries and keys.
    pub(crate) static ROTATED: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    /// Logits of some rows.
    pub(crate) static LOGITS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Floats at the start of a cache line, holding whatever was there; they go back to their place in the end.
///
/// A value, not a closure that is called with it: a closure would not be compiled for a kernel's instructions.
pub(crate) struct Scratch {
    floats: Vec<f32>,
    from: usize,
    len: usize,
    place: &'static Place,
}

/// `len` floats from a place. A nested use finds the place empty and allocates.
pub(crate) fn scratch(place: &'static Place, len: usize) -> Scratch {
    let mut floats = place.take();
    if floats.len() < len + LINE {
        floats = vec![0.0; len + LINE];
    }
    let from = floats.as_ptr().align_offset(LINE * 4).min(LINE);
    Scratch { floats, from, len, place }
}

impl Deref for Scratch {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.floats[self.from..self.from + self.len]
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.floats[self.from..self.from + self.len]
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.floats.len() <= KEEP {
            self.place.set(std::mem::take(&mut self.floats));
        }
    }
}
