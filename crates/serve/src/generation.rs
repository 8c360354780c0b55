//! One version of an adapter, and the hold that a request has on it.
//!
//! A version is what its files said, known by the hash of that. It never changes: a name that is loaded anew stands for
//! another version, and what runs keeps the one it began with. Its arrays go when nobody holds it any more.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Weak};

use graft_adapters::StoredSet;

use crate::engine::Command;

/// A version of an adapter that the engine holds.
#[derive(Debug)]
pub struct Generation {
    content: String,
    slot: u64,
    dora: bool,
    rank: usize,
    nbytes: usize,
    leases: AtomicUsize,
    commands: Weak<Sender<Command>>,
}

impl Generation {
    /// The version that `stored` is, whose hash is `content`.
    pub(crate) fn new(
        slot: u64,
        content: String,
        stored: &StoredSet,
        commands: Weak<Sender<Command>>,
    ) -> Self {
        Self {
            content,
            slot,
            dora: stored.adapters.values().any(|adapter| adapter.magnitude.is_some()),
            rank: stored.rank(),
            nbytes: stored.nbytes(),
            leases: AtomicUsize::new(0),
            commands,
        }
    }

    /// SHA-256 in hex of what decides its answers.
    pub fn content(&self) -> &str {
        &self.content
    }

    /// `dora` if any of its modules has a magnitude, else `lora`.
    pub fn kind(&self) -> &'static str {
        if self.dora { "dora" } else { "lora" }
    }

    /// The largest rank of its modules.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Bytes of its arrays.
    pub fn nbytes(&self) -> usize {
        self.nbytes
    }

    /// Sequences, running or waiting, that hold it.
    pub fn leases(&self) -> usize {
        self.leases.load(Ordering::Relaxed)
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if let Some(commands) = self.commands.upgrade() {
            // If the thread has ended, its arrays have gone with it.
            let _ended = commands.send(Command::Release(self.slot));
        }
    }
}

/// Which update a pass applies: the engine's place of a version, and the bits of the scale that a request gave.
///
/// A place is never given twice, so it stands for the content that it was made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key {
    pub(crate) slot: u64,
    pub(crate) scale: u32,
}

impl Key {
    /// The factor on the adapter's own scale.
    pub(crate) fn scale(self) -> f32 {
        f32::from_bits(self.scale)
    }
}

/// A sequence's hold on a version, from its admission to its last token.
#[derive(Debug)]
pub struct Lease {
    generation: Arc<Generation>,
    scale: f32,
}

impl Lease {
    /// Holds `generation`, with `scale` times its own scale; 1 is the adapter as it was made, 0 the base.
    pub fn new(generation: &Arc<Generation>, scale: f32) -> Self {
        generation.leases.fetch_add(1, Ordering::Relaxed);
        Self { generation: generation.clone(), scale }
    }

    /// What is held.
    pub fn generation(&self) -> &Arc<Generation> {
        &self.generation
    }

    /// What the engine computes with; none is the base, which a scale of 0 is, too.
    pub(crate) fn key(&self) -> Option<Key> {
        // `+ 0.0` makes one zero of both.
        (self.scale != 0.0).then(|| Key { slot: self.generation.slot, scale: (self.scale + 0.0).to_bits() })
    }
}

impl Clone for Lease {
    fn clone(&self) -> Self {
        Self::new(&self.generation, self.scale)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.generation.leases.fetch_sub(1, Ordering::Relaxed);
    }
}
