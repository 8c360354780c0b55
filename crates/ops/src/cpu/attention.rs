//! Causal attention, block by block: the scores of some queries and 64 keys exist at a time, never those of all.
//!
//! For a block of queries the softmax runs along with the keys (online): the largest score so far, the sum of the
//! exponentials and the weighted sum of the values are corrected whenever a larger score appears. The backward pass
//! computes the probabilities again from the scores and their logsumexp. All heads that read one key head are taken
//! together, so that its keys and values are laid out once.

use std::ffi::CStr;
use std::sync::Arc;

use super::level::dispatch;
use super::primitive::{Backward, Op, Tensor, apply};
use super::rope::Angles;
use super::scratch::{PANEL, ROTATED, Scratch, scratch};
use super::simd::{Kernel, Simd, Tile, exp, tile, vectors};
use crate::pool::{self, Shares};
use crate::{Array, Dtype, Exception, Result};

/// Keys of a block; a multiple of two vectors at every level.
pub(crate) const KEYS: usize = 64;
/// Rows of scores at a time (queries times heads of a group), about.
const ROWS: usize = 96;

/// Heads and their width.
#[derive(Clone, Copy)]
pub(crate) struct Heads {
    /// H.
    pub(crate) heads: usize,
    /// K.
    pub(crate) kv_heads: usize,
    /// D.
    pub(crate) dim: usize,
    /// Factor of the scores.
    pub(crate) scale: f32,
}

impl Heads {
    /// Query heads that read one key head.
    fn group(self) -> usize {
        self.heads / self.kv_heads
    }

    /// D rounded up to whole tiles.
    pub(crate) fn width(self) -> usize {
        self.dim.next_multiple_of(32)
    }

    /// Queries whose scores are computed together.
    fn queries(self) -> usize {
        (ROWS / self.group()).max(1)
    }
}

/// Rows of one head: row i is `data[i * stride..][..dim]`.
#[derive(Clone, Copy)]
struct HeadRows<'a> {
    data: &'a [f32],
    stride: usize,
    dim: usize,
}

impl<'a> HeadRows<'a> {
    /// Head `head` of x (N, heads, dim) from token `start` on.
    fn new(x: &'a [f32], start: usize, heads: usize, head: usize, dim: usize) -> Self {
        HeadRows { data: &x[(start * heads + head) * dim..], stride: heads * dim, dim }
    }

    fn at(&self, i: usize) -> &'a [f32] {
        &self.data[i * self.stride..][..self.dim]
    }

    /// Rows `from`..`from + count` times `factor`, (count, width), with zeros in the other columns.
    fn pack(&self, from: usize, count: usize, factor: f32, width: usize, to: &mut [f32]) {
        for (i, to) in to.chunks_exact_mut(width).enumerate().take(count) {
            for (to, x) in to.iter_mut().zip(self.at(from + i)) {
                *to = factor * x;
            }
            to[self.dim..].fill(0.0);
        }
    }

    /// Rows `from`..`from + count`, at most KEYS, turned: (width, KEYS), with zeros elsewhere.
    fn pack_turned(&self, from: usize, count: usize, to: &mut [f32]) {
        to.fill(0.0);
        for i in 0..count {
            for (d, x) in self.at(from + i).iter().enumerate() {
                to[d * KEYS + i] = *x;
            }
        }
    }

    /// Rows `from`..`from + count`, at most KEYS: (KEYS, width), with zeros elsewhere.
    fn pack_block(&self, from: usize, count: usize, width: usize, to: &mut [f32]) {
        self.pack(from, count, 1.0, width, to);
        to[count * width..].fill(0.0);
    }
}

/// C (+)= A B: A (rows, k) by its strides, B (k, columns), C (rows, columns); columns are whole tiles.
#[derive(Clone, Copy)]
struct Product {
    rows: usize,
    columns: usize,
    k: usize,
    a_row: usize,
    a_k: usize,
    add: bool,
}

impl Product {
    #[inline(always)]
    fn run<S: Simd>(self, s: S, a: &[f32], b: &[f32], c: &mut [f32]) {
        let Product { rows, columns, k, a_row, a_k, add } = self;
        assert!(
            (rows - 1) * a_row + (k - 1) * a_k < a.len()
                && k * columns <= b.len()
                && rows * columns <= c.len()
        );
        let c = c.as_mut_ptr();
        // A few queries: as much of B's rows at a time as the registers hold, read once and in the order in which it lies in
        // memory, since reading B is all there is to do.
        let wide = if rows < S::SMALL_ROWS && columns.is_multiple_of(4 * S::LANES) { 4 } else { 2 };
        for column in (0..columns).step_by(wide * S::LANES) {
            let at = |row: usize| Tile {
                k,
                a: a[row * a_row..].as_ptr(),
                a_row,
                a_k,
                b: b[column..].as_ptr(),
                b_k: columns,
                // SAFETY: inside C by the assertion.
                c: unsafe { c.add(row * columns + column) },
                c_row: columns,
                add,
            };
            let mut row = 0;
            // SAFETY: the assertion covers every element that a tile reads or writes.
            unsafe {
                while wide == 4 && row < rows {
                    match rows - row {
                        1 => tile::<S, 1, 4>(s, at(row)),
                        2 => tile::<S, 2, 4>(s, at(row)),
                        3 => tile::<S, 3, 4>(s, at(row)),
                        _ => tile::<S, 4, 4>(s, at(row)),
                    }
                    row = (row + 4).min(rows);
                }
                while row + S::SMALL_ROWS <= rows {
                    s.small_tile(at(row));
                    row += S::SMALL_ROWS;
                }
                if rows - row >= 4 {
                    tile::<S, 4, 2>(s, at(row));
                    row += 4;
                }
                if rows - row >= 2 {
                    tile::<S, 2, 2>(s, at(row));
                    row += 2;
                }
                if rows - row >= 1 {
                    tile::<S, 1, 2>(s, at(row));
                }
            }
        }
    }
}

/// Where each row of a batch begins in N, and its length.
pub(crate) type Spans = Arc<Vec<(usize, usize)>>;

/// Some queries of a row and the key head that they read.
#[derive(Clone, Copy)]
pub(super) struct Part {
    /// Row of the batch.
    pub(super) row: usize,
    /// First query in N.
    pub(super) token: usize,
    /// Keys before the first query.
    pub(super) before: usize,
    /// Queries.
    pub(super) count: usize,
    pub(super) kv_head: usize,
}

/// All parts of rows given by (start, new tokens, tokens before).
pub(super) fn parts(rows: impl Iterator<Item = (usize, usize, usize)>, heads: Heads) -> Vec<Part> {
    let mut parts = Vec::new();
    for (row, (start, length, before)) in rows.enumerate() {
        for first in (0..length).step_by(heads.queries()) {
            let count = heads.queries().min(length - first);
            for kv_head in 0..heads.kv_heads {
                parts.push(Part { row, token: start + first, before: before + first, count, kv_head });
            }
        }
    }
    parts
}

/// Attention of whole rows: o (N, H D), and the logsumexp of each query's scores (N, H).
pub(crate) struct Causal {
    pub(crate) heads: Heads,
    pub(crate) rows: Spans,
    pub(crate) angles: Option<Angles>,
}

/// Queries and keys after their rotation. They are not kept for the backward pass, which rotates them again.
pub(super) struct Rotated {
    space: Scratch,
    queries: usize,
    keys: usize,
}

impl Rotated {
    /// q (N, H D) and k (N, K D) rotated; `position` says where each of the `tokens` stands.
    pub(super) fn new(
        angles: &Angles,
        [q, k]: [&[f32]; 2],
        tokens: usize,
        head_dim: usize,
        position: impl Fn(usize) -> usize + Sync + Copy,
    ) -> Rotated {
        let mut space = scratch(&ROTATED, q.len() + k.len());
        for (from, to) in [(q, 0..q.len()), (k, q.len()..q.len() + k.len())] {
            let to = &mut space[to];
            to.copy_from_slice(from);
            angles.rotate_all(to, tokens, head_dim, position, false);
        }
        Rotated { space, queries: q.len(), keys: k.len() }
    }

    pub(super) fn parts(&self) -> (&[f32], &[f32]) {
        let (q, k) = self.space.split_at(self.queries);
        (q, &k[..self.keys])
    }
}

/// The position of each token of rows that begin at 0.
fn positions(rows: &[(usize, usize)]) -> Vec<usize> {
    rows.iter().flat_map(|&(_, length)| 0..length).collect()
}

impl Causal {
    pub(crate) fn apply(self, q: &Array, k: &Array, v: &Array) -> Result<Array> {
        let sums = [q.dim(0), self.heads.heads as i32];
        let shapes = [(q.shape(), Dtype::Float32), (&sums[..], Dtype::Float32)];
        Ok(apply(self, &[q, k, v], &shapes)?.swap_remove(0))
    }
}

impl Op for Causal {
    fn name(&self) -> &'static CStr {
        c"causal attention"
    }

    fn run(&self, inputs: &[Tensor], outputs: &mut [Tensor]) {
        let (q, k, v) = (inputs[0].f32(), inputs[1].f32(), inputs[2].f32());
        let rotated = self.angles.as_ref().map(|angles| {
            let positions = positions(&self.rows);
            Rotated::new(angles, [q, k], positions.len(), self.heads.dim, |token| positions[token])
        });
        let (q, k) = rotated.as_ref().map_or((q, k), Rotated::parts);
        let [o, sums] = outputs else { return };
        let (o, sums) = (Shares::new(o.f32_mut()), Shares::new(sums.f32_mut()));
        let heads = self.heads;
        let parts = parts(self.rows.iter().map(|&(start, length)| (start, length, 0)), heads);
        pool::run(parts.len(), |i| {
            let part = parts[i];
            let (start, length) = self.rows[part.row];
            let of = |x| HeadRows::new(x, start, heads.kv_heads, part.kv_head, heads.dim);
            let source = Loose { keys: of(k), values: of(v), length, width: heads.width() };
            dispatch(Forward { heads, q, part, source, o: &o, sums: Some(&sums) });
        });
    }

    fn gradients(&self, call: &Backward) -> Result<Vec<Array>> {
        let [q, k, v] = &call.primals[..] else {
            return Err(Exception::custom("attention has three inputs"));
        };
        let op =
            CausalGradient { heads: self.heads, rows: Arc::clone(&self.rows), angles: self.angles.clone() };
        let shapes = [q, k, v].map(|x| (x.shape(), Dtype::Float32));
        let (o, sums) = (&call.outputs[0], &call.outputs[1]);
        call.choose(&apply(op, &[q, k, v, o, sums, &call.cotangents[0]], &shapes)?)
    }
}

/// Keys and values by block.
pub(super) trait Source: Copy {
    /// Floats of scratch memory that `block` needs.
    fn scratch(&self) -> usize;
    /// Block `index`: keys turned (width, KEYS) and values (KEYS, width); beyond the last key is anything.
    fn block<'a>(&'a self, index: usize, scratch: &'a mut [f32]) -> (&'a [f32], &'a [f32]);
}

/// Keys and values that lie among those of other heads.
#[derive(Clone, Copy)]
struct Loose<'a> {
    keys: HeadRows<'a>,
    values: HeadRows<'a>,
    length: usize,
    width: usize,
}

impl Source for Loose<'_> {
    fn scratch(&self) -> usize {
        2 * KEYS * self.width
    }

    fn block<'a>(&'a self, index: usize, scratch: &'a mut [f32]) -> (&'a [f32], &'a [f32]) {
        let (keys, values) = scratch.split_at_mut(KEYS * self.width);
        let count = KEYS.min(self.length - index * KEYS);
        self.keys.pack_turned(index * KEYS, count, keys);
        self.values.pack_block(index * KEYS, count, self.width, values);
        (keys, values)
    }
}

/// One part of the forward pass.
pub(super) struct Forward<'a, B> {
    pub(super) heads: Heads,
    pub(super) q: &'a [f32],
    pub(super) part: Part,
    pub(super) source: B,
    pub(super) o: &'a Shares<'a, f32>,
    pub(super) sums: Option<&'a Shares<'a, f32>>,
}

impl<B: Source> Kernel for Forward<'_, B> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (heads, part, width) = (self.heads, self.part, self.heads.width());
        let (group, count) = (heads.group(), part.count);
        let rows = group * count;
        let sizes = [self.source.scratch(), rows * width, rows * width, rows * KEYS, rows, rows];
        let mut scratch = scratch(&PANEL, sizes.iter().sum());
        let [space, q, o, scores, largest, total] = cut(&mut scratch, sizes);
        // Row g * count + i is query i of the group's head g.
        for (g, q) in q.chunks_exact_mut(count * width).enumerate() {
            let head = part.kv_head * group + g;
            let queries = HeadRows::new(self.q, part.token, heads.heads, head, heads.dim);
            queries.pack(0, count, heads.scale, width, q);
        }
        o.fill(0.0);
        largest.fill(f32::NEG_INFINITY);
        total.fill(0.0);
        for block in 0..(part.before + count).div_ceil(KEYS) {
            let (keys, values) = self.source.block(block, space);
            let product = Product { rows, columns: KEYS, k: width, a_row: width, a_k: 1, add: false };
            product.run(s, q, keys, scores);
            for row in 0..rows {
                let seen = part.before + row % count + 1;
                let seen = seen.saturating_sub(block * KEYS).min(KEYS);
                let scores = &mut scores[row * KEYS..][..KEYS];
                let output = &mut o[row * width..][..width];
                softmax_step(s, scores, seen, &mut largest[row], &mut total[row], output);
            }
            // Up to the last key only: what a block holds beyond may be no number, which a weight of zero does not undo.
            let k = KEYS.min(part.before + count - block * KEYS);
            let product = Product { rows, columns: width, k, a_row: KEYS, a_k: 1, add: true };
            product.run(s, scores, values, o);
        }
        for row in 0..rows {
            let at = (part.token + row % count) * heads.heads + part.kv_head * group + row / count;
            // SAFETY: each query of each head belongs to one part.
            let to = unsafe { self.o.part(at * heads.dim, heads.dim) };
            for (to, x) in to.iter_mut().zip(&o[row * width..]) {
                *to = x / total[row];
            }
            if let Some(sums) = self.sums {
                // SAFETY: as above.
                unsafe { sums.part(at, 1)[0] = largest[row] + total[row].ln() };
            }
        }
    }
}

/// Turns the scores of a block, of which the first `seen` count, into weights relative to the largest score so far, and
/// corrects what was summed under a smaller one.
#[inline(always)]
fn softmax_step<S: Simd>(
    s: S,
    scores: &mut [f32],
    seen: usize,
    largest: &mut f32,
    total: &mut f32,
    output: &mut [f32],
) {
    scores[seen..].fill(f32::NEG_INFINITY);
    let mut most = s.splat(*largest);
    for i in vectors::<S>(KEYS) {
        // SAFETY: whole vectors of a block.
        most = s.max(most, unsafe { s.load(scores.as_ptr().add(i)) });
    }
    let most = s.largest(most);
    if most > *largest {
        let shrink = (*largest - most).exp();
        *largest = most;
        *total *= shrink;
        output.iter_mut().for_each(|x| *x *= shrink);
    }
    let (base, mut sum) = (s.splat(most), s.splat(0.0));
    for i in vectors::<S>(KEYS) {
        // SAFETY: whole vectors of a block.
        let weight = exp(s, s.sub(unsafe { s.load(scores.as_ptr().add(i)) }, base));
        // SAFETY: as above.
        unsafe { s.store(scores.as_mut_ptr().add(i), weight) };
        sum = s.add(sum, weight);
    }
    *total += s.sum(sum);
}

/// Disjoint parts of a slice.
fn cut<const N: usize>(mut slice: &mut [f32], sizes: [usize; N]) -> [&mut [f32]; N] {
    sizes.map(|size| {
        let (part, rest) = std::mem::take(&mut slice).split_at_mut(size);
        slice = rest;
        part
    })
}

/// dq, dk and dv of [`Causal`], from q, k, v, o, the logsumexp and do.
struct CausalGradient {
    heads: Heads,
    rows: Spans,
    angles: Option<Angles>,
}

impl Op for CausalGradient {
    fn name(&self) -> &'static CStr {
        c"gradient of causal attention"
    }

    fn run(&self, inputs: &[Tensor], outputs: &mut [Tensor]) {
        let [q, k, v, o, sums, d_o] = [0, 1, 2, 3, 4, 5].map(|i| inputs[i].f32());
        let positions = positions(&self.rows);
        let position = |token: usize| positions[token];
        let rotated = self
            .angles
            .as_ref()
            .map(|angles| Rotated::new(angles, [q, k], positions.len(), self.heads.dim, position));
        let (q, k) = rotated.as_ref().map_or((q, k), Rotated::parts);
        let [dq, dk, dv] = &mut outputs[..] else { return };
        let [dq, dk, dv] = [dq, dk, dv].map(|x| Shares::new(x.f32_mut()));
        let kv_heads = self.heads.kv_heads;
        pool::run(self.rows.len() * kv_heads, |task| {
            let ((start, length), kv_head) = (self.rows[task / kv_heads], task % kv_heads);
            if length > 0 {
                let (dq, dk, dv) = (&dq, &dk, &dv);
                dispatch(BackwardPart {
                    heads: self.heads,
                    start,
                    length,
                    kv_head,
                    q,
                    k,
                    v,
                    o,
                    sums,
                    d_o,
                    dq,
                    dk,
                    dv,
                });
            }
        });
        if let Some(angles) = &self.angles {
            for gradient in outputs.iter_mut().take(2) {
                angles.rotate_all(gradient.f32_mut(), positions.len(), self.heads.dim, position, true);
            }
        }
    }
}

/// The backward pass of one row and one key head, with all heads that read it.
///
/// With P = exp(scale q k^T - lse): dv = P^T do, dP = do v^T, dS = scale P (dP - rowsum(do o)), dq = dS k, dk = dS^T q.
struct BackwardPart<'a> {
    heads: Heads,
    start: usize,
    length: usize,
    kv_head: usize,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    o: &'a [f32],
    sums: &'a [f32],
    d_o: &'a [f32],
    dq: &'a Shares<'a, f32>,
    dk: &'a Shares<'a, f32>,
    dv: &'a Shares<'a, f32>,
}

/// Queries of a block of the backward pass.
const BACK: usize = 32;

impl Kernel for BackwardPart<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Heads { heads, kv_heads, dim, scale } = self.heads;
        let (width, group, length) = (self.heads.width(), self.heads.group(), self.length);
        let (block, queries, scores) = (KEYS * width, BACK * width, BACK * KEYS);
        let sizes =
            [block, block, block, block, block, queries, queries, queries, scores, scores, group * length];
        let of_key = |x| HeadRows::new(x, self.start, kv_heads, self.kv_head, dim);
        let of_query = |x, g| HeadRows::new(x, self.start, heads, self.kv_head * group + g, dim);
        let place = |i: usize, g: usize| (self.start + i) * heads + self.kv_head * group + g;
        let mut scratch = scratch(&PANEL, sizes.iter().sum());
        let [k_turned, v_turned, k, dk, dv, q, d_o, dq, weights, slopes, along] = cut(&mut scratch, sizes);
        for g in 0..group {
            for i in 0..length {
                let pairs = of_query(self.d_o, g).at(i).iter().zip(of_query(self.o, g).at(i));
                along[g * length + i] = pairs.map(|(a, b)| a * b).sum();
                // SAFETY: this part's heads of this row, here and below.
                unsafe { self.dq.part(place(i, g) * dim, dim) }.fill(0.0);
            }
        }
        for first_key in (0..length).step_by(KEYS) {
            let keys = KEYS.min(length - first_key);
            of_key(self.k).pack_turned(first_key, keys, k_turned);
            of_key(self.v).pack_turned(first_key, keys, v_turned);
            of_key(self.k).pack_block(first_key, keys, width, k);
            dk.fill(0.0);
            dv.fill(0.0);
            for g in 0..group {
                for first in (first_key / BACK * BACK..length).step_by(BACK) {
                    let count = BACK.min(length - first);
                    of_query(self.q, g).pack(first, count, 1.0, width, q);
                    of_query(self.d_o, g).pack(first, count, 1.0, width, d_o);
                    let score =
                        Product { rows: count, columns: KEYS, k: width, a_row: width, a_k: 1, add: false };
                    score.run(s, q, k_turned, weights);
                    score.run(s, d_o, v_turned, slopes);
                    for i in 0..count {
                        let seen = (first + i + 1).saturating_sub(first_key).min(keys);
                        let (weights, slopes) =
                            (&mut weights[i * KEYS..][..KEYS], &mut slopes[i * KEYS..][..KEYS]);
                        weights[seen..].fill(f32::NEG_INFINITY);
                        let lse = s.splat(self.sums[place(first + i, g)]);
                        let along = s.splat(along[g * length + first + i]);
                        for at in vectors::<S>(KEYS) {
                            // SAFETY: whole vectors of a block.
                            unsafe {
                                let score = s.mul(s.load(weights.as_ptr().add(at)), s.splat(scale));
                                let weight = exp(s, s.sub(score, lse));
                                let slope = s.sub(s.load(slopes.as_ptr().add(at)), along);
                                s.store(weights.as_mut_ptr().add(at), weight);
                                s.store(
                                    slopes.as_mut_ptr().add(at),
                                    s.mul(s.mul(weight, slope), s.splat(scale)),
                                );
                            }
                        }
                    }
                    let turned =
                        Product { rows: KEYS, columns: width, k: count, a_row: 1, a_k: KEYS, add: true };
                    turned.run(s, weights, d_o, dv);
                    turned.run(s, slopes, q, dk);
                    let plain =
                        Product { rows: count, columns: width, k: KEYS, a_row: KEYS, a_k: 1, add: false };
                    plain.run(s, slopes, k, dq);
                    for i in 0..count {
                        // SAFETY: this part's query heads of this row.
                        let to = unsafe { self.dq.part(place(first + i, g) * dim, dim) };
                        to.iter_mut().zip(&dq[i * width..]).for_each(|(to, x)| *to += x);
                    }
                }
            }
            for i in 0..keys {
                let at = ((self.start + first_key + i) * kv_heads + self.kv_head) * dim;
                // SAFETY: this part's key head of this row.
                unsafe {
                    self.dk.part(at, dim).copy_from_slice(&dk[i * width..][..dim]);
                    self.dv.part(at, dim).copy_from_slice(&dv[i * width..][..dim]);
                }
            }
        }
    }
}
