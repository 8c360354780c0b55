//! The methods that look at single elements: one dense matrix in memory, whatever the number of adapters.
//!
//! Updates are made dense a few rows at a time and combined on the host, so that a mask or an election is the same on every
//! machine. What is kept of an update t of density p: by magnitude the p n elements that are largest by absolute value (all
//! of those that equal the smallest of them), by chance element i where a hash of seed, module, adapter and i falls below p.

use graft_adapters::Kind;
use graft_ops::linalg::{Svd, svd, svd_leading};
use graft_ops::{Array, ffi};
use rayon::prelude::*;

use crate::module::{Cut, Module, Outcome, Part, oriented, squared};
use crate::{Result, Size, Sparsify};

/// Elements that one thread combines at a time: a few updates of them stay in its nearest cache.
const RUN: usize = 1 << 12;
/// A sum of weights nearer to zero than this divides nothing, as in mergekit.
const NO_DIVISOR: f32 = 1e-8;

/// What is to be done to each element.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Elements {
    pub(crate) sparsify: Sparsify,
    pub(crate) consensus: bool,
    pub(crate) normalize: bool,
    /// Factor of the result.
    pub(crate) lambda: f64,
    /// The weights of all sources together, those without an update of this module too.
    pub(crate) total_weight: f64,
    pub(crate) seed: u64,
}

/// Which elements of an update stay, and what becomes of them.
enum Keep {
    All,
    /// Those of at least this absolute value.
    AtLeast(f32),
    /// Those whose hash is below the limit; they are multiplied by the factor.
    Drawn {
        key: u64,
        limit: u64,
        factor: f32,
    },
}

/// Combines the updates of a module densely and factors the result.
pub(crate) fn combine(module: &Module, elements: Elements, size: Size) -> Result<Outcome> {
    let divisor = if elements.normalize { elements.total_weight } else { 1.0 };
    let divisor = if divisor.abs() < f64::from(NO_DIVISOR) { 1.0 } else { divisor };
    let shares: Vec<f64> = module.weights().iter().map(|w| w * elements.lambda / divisor).collect();
    // With magnitudes any c' will do, as L takes up the rest; this one leaves L nothing but what the low-rank parts give.
    let c = module.factor(&shares)?;
    let sum = merged(module, elements, c.as_ref())?;
    let size = if size == Size::Full { Size::Rank(module.rank()) } else { size };
    let cut = factored(module.kind, &sum, size, elements.seed)?;
    module.outcome(cut, c.as_ref())
}

/// The combined update, dense (rows, columns); with magnitudes L, what c' leaves of it.
fn merged(module: &Module, elements: Elements, c: Option<&Array>) -> Result<Array> {
    let (rows, columns) = module.shape();
    let mut keeps = Vec::new();
    for part in &module.parts {
        keeps.push(keep(module, part, elements)?);
    }
    let mut values = vec![0f32; rows as usize * columns as usize];
    let mut at = 0;
    for ids in module.blocks() {
        let base = module.base_rows(&ids)?;
        let mut updates = Vec::new();
        for part in &module.parts {
            updates.push(module.rows(part, &ids, base.as_ref())?);
        }
        ffi::eval(&updates)?;
        let mut slices = Vec::new();
        for update in &updates {
            slices.push(ffi::read::<f32>(update)?);
        }
        let end = at + slices.first().map_or(0, |s| s.len());
        let weights = module.weights();
        values[at..end].par_chunks_mut(RUN).enumerate().for_each(|(run, out)| {
            let from = run * RUN;
            let parts = slices.iter().zip(&keeps).zip(&weights);
            let parts = parts.map(|((s, keep), w)| (&s[from..from + out.len()], keep, *w as f32));
            mix(out, &parts.collect::<Vec<_>>(), (at + from) as u64, elements);
        });
        if let (Some(c), Some(base)) = (c, &base) {
            let c = c.take_axis(&ids, 0)?;
            let (c, base) = (ffi::read::<f32>(&c)?, ffi::read::<f32>(base)?);
            let width = columns as usize;
            let pairs = values[at..end].par_chunks_mut(width).zip(base.par_chunks(width)).zip(c);
            pairs.for_each(|((out, w), c)| {
                out.iter_mut().zip(w).for_each(|(t, w)| *t = (*t - (c - 1.0) * w) / c);
            });
        }
        at = end;
    }
    Ok(Array::from_slice(&values, &[rows, columns]))
}

/// Combines a run of elements that begins at element `first` of the matrix.
fn mix(out: &mut [f32], parts: &[(&[f32], &Keep, f32)], first: u64, elements: Elements) {
    let mut kept = vec![0f32; out.len() * parts.len()];
    for (t, (update, keep, weight)) in kept.chunks_exact_mut(out.len()).zip(parts) {
        thin(t, update, keep, first);
        for (t, out) in t.iter_mut().zip(out.iter_mut()) {
            *t *= weight;
            *out += *t;
        }
    }
    let lambda = elements.lambda as f32;
    if !elements.consensus {
        let total = elements.total_weight as f32;
        let divide = elements.normalize && total.abs() >= NO_DIVISOR;
        let factor = if divide { lambda / total } else { lambda };
        out.iter_mut().for_each(|x| *x *= factor);
        return;
    }
    // Update by update, so that many elements are dealt with at once.
    let (mut sums, mut weights) = (vec![0f32; out.len()], vec![0f32; out.len()]);
    for (t, (_, _, weight)) in kept.chunks_exact(out.len()).zip(parts) {
        for (((t, elected), sum), total) in t.iter().zip(&*out).zip(&mut sums).zip(&mut weights) {
            let up = *elected >= 0.0;
            let agrees = (up & (*t > 0.0)) | (!up & (*t < 0.0));
            *sum += pick(agrees, *t, 0.0);
            *total += pick(agrees, *weight, 0.0);
        }
    }
    for ((x, sum), total) in out.iter_mut().zip(sums).zip(weights) {
        let divide = elements.normalize && total.abs() >= NO_DIVISOR;
        *x = lambda * sum / pick(divide, total, 1.0);
    }
}

/// `a` where `yes`, else `b`, without a branch: whether signs agree and elements stay is chance, and half of the guesses of a
/// processor would be wrong.
#[inline]
fn pick(yes: bool, a: f32, b: f32) -> f32 {
    let mask = u32::from(yes).wrapping_neg();
    f32::from_bits((a.to_bits() & mask) | (b.to_bits() & !mask))
}

/// An update without what is dropped.
fn thin(out: &mut [f32], update: &[f32], keep: &Keep, first: u64) {
    match keep {
        Keep::All => out.copy_from_slice(update),
        Keep::AtLeast(limit) => {
            out.iter_mut().zip(update).for_each(|(out, t)| *out = pick(t.abs() >= *limit, *t, 0.0));
        }
        Keep::Drawn { key, limit, factor } => {
            for (i, (out, t)) in (first..).zip(out.iter_mut().zip(update)) {
                *out = pick(scramble(key.wrapping_add(i)) < *limit, t * factor, 0.0);
            }
        }
    }
}

/// What stays of a part's update.
fn keep(module: &Module, part: &Part, elements: Elements) -> Result<Keep> {
    if part.density >= 1.0 {
        return Ok(Keep::All);
    }
    Ok(match elements.sparsify {
        Sparsify::None => Keep::All,
        Sparsify::Magnitude => Keep::AtLeast(threshold(module, part)?),
        Sparsify::Random => Keep::Drawn {
            key: key(elements.seed, module.path, part.source),
            limit: (part.density * u64::MAX as f64) as u64,
            factor: (1.0 / part.density) as f32,
        },
    })
}

/// Where the random numbers of an update begin: one number for seed, path and the place of the adapter in the recipe.
fn key(seed: u64, path: &str, source: usize) -> u64 {
    let start = scramble(seed ^ scramble(source as u64 + 1));
    path.bytes().fold(start, |key, byte| scramble(key ^ u64::from(byte)))
}

/// SplitMix64's output function: a hash of 64 bits.
fn scramble(x: u64) -> u64 {
    let z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Bits of an absolute value that the first count tells apart: sign left out, exponent and seven bits of fraction.
const HIGH: u32 = 16;
/// The rest.
const LOW: u32 = 31 - HIGH;

/// The absolute value of the element that is the last to stay, exactly: counted by its high bits first, then by its low
/// ones, so that no second dense copy and no sort is needed.
fn threshold(module: &Module, part: &Part) -> Result<f32> {
    let (rows, columns) = module.shape();
    let all = rows as usize * columns as usize;
    let stays = ((part.density * all as f64) as usize).clamp(1, all);
    let high = count(module, part, 1 << HIGH, |bits| Some(bits >> LOW))?;
    let (bin, above) = bin(&high, stays);
    let low = count(module, part, 1 << LOW, |bits| (bits >> LOW == bin).then_some(bits & ((1 << LOW) - 1)))?;
    let (rest, _) = self::bin(&low, stays - above);
    Ok(f32::from_bits((bin << LOW) | rest))
}

/// The bin in which the element stands that has `place - 1` larger ones, and how many stand above that bin.
fn bin(counts: &[u64], place: usize) -> (u32, usize) {
    let mut above = 0;
    for (bin, count) in counts.iter().enumerate().rev() {
        if above + *count as usize >= place {
            return (bin as u32, above);
        }
        above += *count as usize;
    }
    (0, above)
}

/// How many elements of an update fall into each bin.
fn count(
    module: &Module,
    part: &Part,
    bins: usize,
    bin: impl Fn(u32) -> Option<u32> + Sync,
) -> Result<Vec<u64>> {
    let mut counts = vec![0u64; bins];
    for ids in module.blocks() {
        let base = module.base_rows(&ids)?;
        let update = module.rows(part, &ids, base.as_ref())?;
        let values = ffi::read::<f32>(&update)?;
        // One table for each thread, not for each run: they are large.
        let share = values.len().div_ceil(rayon::current_num_threads()).max(1);
        let tables: Vec<Vec<u32>> = values
            .par_chunks(share)
            .map(|run| {
                let mut table = vec![0u32; bins];
                for bin in run.iter().filter_map(|t| bin(t.abs().to_bits())) {
                    table[bin as usize] += 1;
                }
                table
            })
            .collect();
        for table in tables {
            counts.iter_mut().zip(table).for_each(|(sum, n)| *sum += u64::from(n));
        }
    }
    Ok(counts)
}

/// Factors of a dense matrix in the rank that is asked for; the error is measured.
pub(crate) fn factored(kind: Kind, matrix: &Array, size: Size, seed: u64) -> Result<Cut> {
    let values = ffi::read::<f32>(matrix)?;
    let total: f64 = values.par_chunks(RUN).map(squared).collect::<Vec<_>>().into_iter().sum();
    let found = leading(matrix, size, total, seed)?;
    let (a, b) = oriented(kind, &found)?;
    ffi::eval([&a, &b])?;
    let (rows, columns) = (matrix.dim(0), matrix.dim(1));
    let step = (RUN as i32 * 256 / columns.max(1)).max(1);
    let (left, right) = found.factors()?;
    let mut lost = 0.0;
    for from in (0..rows).step_by(step as usize) {
        let to = (from + step).min(rows);
        let product = left.take_axis(Array::from_iter(from..to, &[to - from]), 0)?.matmul(&right)?;
        let product = ffi::read::<f32>(&product)?;
        let rest = &values[from as usize * columns as usize..][..product.len()];
        let runs = product.par_chunks(RUN).zip(rest.par_chunks(RUN));
        let runs = runs.map(|(p, t)| p.iter().zip(t).map(|(p, t)| f64::from(p - t).powi(2)).sum::<f64>());
        lost += runs.collect::<Vec<_>>().into_iter().sum::<f64>();
    }
    let error = if total > 0.0 { (lost / total).sqrt() } else { 0.0 };
    Ok(Cut { a, b, norm: total.sqrt(), error })
}

/// The rank at which the search for an energy begins.
const FIRST: i32 = 16;

/// The leading part of a matrix, as much of it as is asked for.
fn leading(matrix: &Array, size: Size, total: f64, seed: u64) -> Result<Svd> {
    let all = matrix.dim(0).min(matrix.dim(1));
    let mut rank = match size {
        Size::Rank(rank) => return Ok(svd_leading(matrix, rank.min(all), seed)?),
        Size::Full => return Ok(svd(matrix)?),
        Size::Energy(_) => FIRST.min(all),
    };
    loop {
        let found = svd_leading(matrix, rank, seed)?;
        let enough = size.pick(ffi::read::<f32>(&found.s)?, total);
        match enough {
            Some(rank) => return Ok(found.leading(rank.max(1))?),
            None if rank == all => return Ok(found),
            None => rank = (2 * rank).min(all),
        }
    }
}
