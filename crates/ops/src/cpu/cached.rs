//! Attention over a cache: keys and values lie in blocks of 64 tokens that are appended to in place.

use std::cell::UnsafeCell;
use std::ffi::CStr;
use std::sync::Arc;

use super::attention::{Forward, Heads, KEYS, Rotated, Source, parts};
use super::gemm::share;
use super::level::dispatch;
use super::primitive::{Op, Tensor};
use super::rope::Angles;
use crate::pool::{self, Shares};

/// Keys and values of up to 64 tokens of one sequence, for all its key heads, laid out as the products read them: by head
/// the keys (width, 64), then the values (64, width), where width is D rounded up.
///
/// This memory is not MLX's, since it has to stay where it is while one step is computed and the next one is planned.
/// It is written by operations on MLX's stream thread only, which runs them in the order in which they were evaluated, and a
/// token is written before anything reads it.
pub(crate) struct KvBlock(Box<[UnsafeCell<f32>]>);

// SAFETY: see above; other threads only hold and drop references.
unsafe impl Send for KvBlock {}
// SAFETY: as above.
unsafe impl Sync for KvBlock {}

impl KvBlock {
    /// An empty block.
    pub(crate) fn new(heads: Heads) -> KvBlock {
        KvBlock((0..heads.kv_heads * KvBlock::part(heads)).map(|_| UnsafeCell::new(0.0)).collect())
    }

    /// Bytes of a block.
    pub(crate) fn nbytes(&self) -> usize {
        self.0.len() * 4
    }

    /// Floats of one head.
    fn part(heads: Heads) -> usize {
        2 * KEYS * heads.width()
    }

    /// Keys and values of one head.
    ///
    /// # Safety
    /// Nobody writes the block meanwhile.
    unsafe fn head(&self, heads: Heads, head: usize) -> (&[f32], &[f32]) {
        let cells = &self.0[head * KvBlock::part(heads)..][..KvBlock::part(heads)];
        // SAFETY: UnsafeCell<f32> has the layout of f32; the caller's promise.
        let floats = unsafe { std::slice::from_raw_parts(cells.as_ptr().cast::<f32>(), cells.len()) };
        floats.split_at(cells.len() / 2)
    }

    /// Writes one token of one head.
    ///
    /// # Safety
    /// Nobody uses the block meanwhile.
    unsafe fn write(&self, heads: Heads, head: usize, place: usize, key: &[f32], value: &[f32]) {
        let cells = &self.0[head * KvBlock::part(heads)..][..KvBlock::part(heads)];
        let (keys, values) = cells.split_at(cells.len() / 2);
        for (d, (key, value)) in key.iter().zip(value).enumerate() {
            // SAFETY: the caller's promise.
            unsafe {
                *keys[d * KEYS + place].get() = *key;
                *values[place * heads.width() + d].get() = *value;
            }
        }
    }

    /// Takes over what `from` holds.
    ///
    /// # Safety
    /// Nobody uses this block or writes the other meanwhile.
    unsafe fn copy_from(&self, from: &KvBlock) {
        for (to, from) in self.0.iter().zip(&from.0) {
            // SAFETY: the caller's promise.
            unsafe { *to.get() = *from.get() };
        }
    }
}

/// Appends the new tokens of each sequence to its blocks and attends to all of them: q, k and v of the new tokens
/// give o. The other inputs and the other output are empty and only say what comes before what.
pub(crate) struct Cached {
    pub(crate) heads: Heads,
    pub(crate) angles: Option<Angles>,
    pub(crate) sequences: Vec<CachedSequence>,
}

/// One sequence of [`Cached`].
pub(crate) struct CachedSequence {
    /// Its new tokens.
    pub(crate) length: usize,
    /// Tokens before them.
    pub(crate) before: usize,
    /// Blocks for all of them.
    pub(crate) blocks: Vec<Arc<KvBlock>>,
    /// A block that was shared and of which this sequence needs one of its own: the last one before the new tokens.
    pub(crate) copied: Option<Arc<KvBlock>>,
}

impl Op for Cached {
    fn name(&self) -> &'static CStr {
        c"cached attention"
    }

    fn run(&self, inputs: &[Tensor], outputs: &mut [Tensor]) {
        let [q, k, v] = [0, 1, 2].map(|i| inputs[i].f32());
        let Heads { kv_heads, dim, .. } = self.heads;
        let rotated = self.angles.as_ref().map(|angles| {
            let new = self.sequences.iter().flat_map(|s| s.before..s.before + s.length);
            let positions: Vec<usize> = new.collect();
            Rotated::new(angles, [q, k], positions.len(), dim, |token| positions[token])
        });
        let (q, k) = rotated.as_ref().map_or((q, k), Rotated::parts);
        let mut start = 0;
        let mut spans = Vec::with_capacity(self.sequences.len());
        for sequence in &self.sequences {
            spans.push((start, sequence.length, sequence.before));
            start += sequence.length;
            if let (Some(from), Some(to)) = (&sequence.copied, sequence.blocks.get(sequence.before / KEYS)) {
                // SAFETY: this is the stream's thread, and `to` is new.
                unsafe { to.copy_from(from) };
            }
        }
        // Keys are turned as they are written: a line of memory for each number.
        share(k.len() + v.len() >= 1 << 12, spans.len() * kv_heads, |task| {
            let (row, head) = (task / kv_heads, task % kv_heads);
            let (start, length, before) = spans[row];
            for (i, at) in (before..before + length).enumerate() {
                let from = ((start + i) * kv_heads + head) * dim;
                let (key, value) = (&k[from..from + dim], &v[from..from + dim]);
                let block = &self.sequences[row].blocks[at / KEYS];
                // SAFETY: each head of a sequence belongs to one task, and nobody reads before all tasks have ended.
                unsafe { block.write(self.heads, head, at % KEYS, key, value) };
            }
        });
        let o = Shares::new(outputs[0].f32_mut());
        let parts = parts(spans.iter().copied(), self.heads);
        pool::run(parts.len(), |i| {
            let part = parts[i];
            let source =
                InBlocks { blocks: &self.sequences[part.row].blocks, heads: self.heads, head: part.kv_head };
            dispatch(Forward { heads: self.heads, q, part, source, o: &o, sums: None });
        });
    }
}

/// Keys and values of one head as blocks hold them.
#[derive(Clone, Copy)]
struct InBlocks<'a> {
    blocks: &'a [Arc<KvBlock>],
    heads: Heads,
    head: usize,
}

impl Source for InBlocks<'_> {
    fn scratch(&self) -> usize {
        0
    }

    fn block<'a>(&'a self, index: usize, _: &'a mut [f32]) -> (&'a [f32], &'a [f32]) {
        // SAFETY: an operation attends when it has written, and no other one runs meanwhile.
        unsafe { self.blocks[index].head(self.heads, self.head) }
    }
}
