//! The methods that look at single elements: one dense matrix in memory, whatever the number of adapters.
//!
//! Updates are made dense a few rows at a time and combined on the host, so that a mask or an election is the same on every
//! machine. What is kept of an update t of density p: by magnitude the p n elements that are largest by absolute value (all
//! of those that equal the smallest of them), by chance element i where a hash of seed, module, adapter and i falls below p.

use graft_adapters::Kind;
use graft_ops::linalg::{HostMatrix, Search, Svd, svd_leading};
use graft_ops::{Array, ffi};
use rayon::prelude::*;

use crate::module::{BLOCK, Cut, Module, Outcome, Part, RUN, STRIP, oriented, squared};
use crate::{Result, Size, Sparsify};

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

/// Combines the updates of a module densely, in `room`, and factors the result.
pub(crate) fn combine(
    module: &Module,
    elements: Elements,
    size: Size,
    room: &mut Vec<f32>,
) -> Result<Outcome> {
    let divisor = if elements.normalize { elements.total_weight } else { 1.0 };
    let divisor = if divisor.abs() < f64::from(NO_DIVISOR) { 1.0 } else { divisor };
    let shares: Vec<f64> = module.weights().iter().map(|w| w * elements.lambda / divisor).collect();
    // With magnitudes any c' will do, as L takes up the rest; this one leaves L nothing but what the low-rank parts give.
    let c = module.factor(&shares)?;
    merged(module, elements, c.as_ref(), room)?;
    let size = if size == Size::Full { Size::Rank(module.rank()) } else { size };
    let matrix = HostMatrix { values: room, columns: module.shape().1 };
    // What is thinned or elected still leans towards the updates that it was made of.
    let cut = factored(module.kind, matrix, size, Some(&module.span()?), elements.seed)?;
    module.outcome(cut, c.as_ref())
}

/// The combined update, dense (rows, columns), in `room`; with magnitudes L, what c' leaves of it.
fn merged(module: &Module, elements: Elements, c: Option<&Array>, room: &mut Vec<f32>) -> Result<()> {
    let (rows, columns) = module.shape();
    let keeps = keeps(module, elements)?;
    let weights = module.weights();
    let parts: Vec<(&Keep, f32)> = keeps.iter().zip(weights).map(|(keep, w)| (keep, w as f32)).collect();
    let c = c.map(ffi::read::<f32>).transpose()?;
    room.resize(rows as usize * columns as usize, 0.0);
    module.each_block(|rows| {
        let columns = rows.columns;
        let block = rows.first * columns..(rows.first + rows.count) * columns;
        let strips = room[block].par_chunks_mut(STRIP * columns).enumerate();
        strips.for_each_init(Vec::new, |room, (strip, out)| {
            let first = strip * STRIP;
            rows.each_run(first..first + out.len() / columns, room, |row, from, updates| {
                let width = updates.len() / parts.len();
                let at = ((rows.first + row) * columns + from) as u64;
                mix(&mut out[(row - first) * columns + from..][..width], updates, &parts, at, elements);
            });
            for (row, out) in (first..).zip(out.chunks_mut(columns)) {
                if let (Some(c), Some(base)) = (c, rows.base(row)) {
                    let c = c[rows.first + row];
                    out.iter_mut().zip(base).for_each(|(t, w)| *t = (*t - (c - 1.0) * w) / c);
                }
            }
        });
        Ok(())
    })
}

/// Combines a run of elements that begins at element `first` of the matrix; `updates` are those of all parts, one after the
/// other, and are thinned in place.
fn mix(out: &mut [f32], updates: &mut [f32], parts: &[(&Keep, f32)], first: u64, elements: Elements) {
    out.fill(0.0);
    for (t, (keep, weight)) in updates.chunks_exact_mut(out.len()).zip(parts) {
        thin(t, keep, first);
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
    let (mut sums, mut weights) = ([0f32; RUN], [0f32; RUN]);
    for (t, (_, weight)) in updates.chunks_exact(out.len()).zip(parts) {
        for (((t, elected), sum), total) in t.iter().zip(&*out).zip(&mut sums).zip(&mut weights) {
            let up = *elected >= 0.0;
            let agrees = (up & (*t > 0.0)) | (!up & (*t < 0.0));
            *sum += pick(agrees, *t, 0.0);
            *total += pick(agrees, *weight, 0.0);
        }
    }
    for ((x, sum), total) in out.iter_mut().zip(&sums).zip(&weights) {
        let divide = elements.normalize & (total.abs() >= NO_DIVISOR);
        *x = lambda * sum / pick(divide, *total, 1.0);
    }
}

/// `a` where `yes`, else `b`, without a branch: whether signs agree and elements stay is chance, and half of the guesses of a
/// processor would be wrong.
#[inline]
fn pick(yes: bool, a: f32, b: f32) -> f32 {
    let mask = u32::from(yes).wrapping_neg();
    f32::from_bits((a.to_bits() & mask) | (b.to_bits() & !mask))
}

/// Drops elements of a run that begins at element `first` of the matrix.
fn thin(run: &mut [f32], keep: &Keep, first: u64) {
    match keep {
        Keep::All => {}
        Keep::AtLeast(limit) => run.iter_mut().for_each(|t| *t = pick(t.abs() >= *limit, *t, 0.0)),
        Keep::Drawn { key, limit, factor } => {
            for (i, t) in (first..).zip(run) {
                *t = pick(scramble(key.wrapping_add(i)) < *limit, *t * factor, 0.0);
            }
        }
    }
}

/// What stays of each part's update.
fn keeps(module: &Module, elements: Elements) -> Result<Vec<Keep>> {
    if elements.sparsify == Sparsify::Magnitude {
        return thresholds(module);
    }
    let keep = |part: &Part| {
        if elements.sparsify == Sparsify::None || part.density >= 1.0 {
            return Keep::All;
        }
        Keep::Drawn {
            key: key(elements.seed, module.path, part.source),
            limit: (part.density * u64::MAX as f64) as u64,
            factor: (1.0 / part.density) as f32,
        }
    };
    Ok(module.parts.iter().map(keep).collect())
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

/// For each part the absolute value of the element that is the last to stay, exactly: counted by its high bits first, then by
/// its low ones, so that no dense copy and no sort is needed.
fn thresholds(module: &Module) -> Result<Vec<Keep>> {
    let (rows, columns) = module.shape();
    let all = rows as usize * columns as usize;
    let stays = |part: &Part| ((part.density * all as f64) as usize).clamp(1, all);
    let parts: Vec<usize> = (0..module.parts.len()).filter(|i| module.parts[*i].density < 1.0).collect();
    let mut keeps: Vec<Keep> = module.parts.iter().map(|_| Keep::All).collect();
    if parts.is_empty() {
        return Ok(keeps);
    }
    let high = counts(module, &parts, None)?;
    let bins: Vec<(u32, usize)> =
        parts.iter().zip(&high).map(|(part, high)| bin(high, stays(&module.parts[*part]))).collect();
    let low = counts(module, &parts, Some(&bins))?;
    for ((part, low), (high, above)) in parts.iter().zip(&low).zip(&bins) {
        let (rest, _) = bin(low, stays(&module.parts[*part]) - above);
        keeps[*part] = Keep::AtLeast(f32::from_bits((high << LOW) | rest));
    }
    Ok(keeps)
}

/// The bin in which the element stands that has `place - 1` larger ones, and how many stand above that bin.
fn bin(counts: &[u32], place: usize) -> (u32, usize) {
    let mut above = 0;
    for (bin, count) in counts.iter().enumerate().rev() {
        if above + *count as usize >= place {
            return (bin as u32, above);
        }
        above += *count as usize;
    }
    (0, above)
}

/// How many elements of the updates of some parts have which high bits of their absolute value; or, of those in a bin of the
/// high bits, which low bits.
fn counts(module: &Module, parts: &[usize], within: Option<&[(u32, usize)]>) -> Result<Vec<Vec<u32>>> {
    let bins = 1 << if within.is_none() { HIGH } else { LOW };
    let all = module.parts.len();
    // Tables of each thread's own.
    let mut tables = vec![vec![vec![0u32; bins]; parts.len()]; rayon::current_num_threads()];
    module.each_block(|rows| {
        let share = rows.count.div_ceil(tables.len());
        tables.par_iter_mut().enumerate().for_each(|(thread, tables)| {
            let rows_of = (thread * share).min(rows.count)..((thread + 1) * share).min(rows.count);
            rows.each_run(rows_of, &mut Vec::new(), |_, _, updates| {
                let width = updates.len() / all;
                for (place, table) in tables.iter_mut().enumerate() {
                    let run = &updates[parts[place] * width..][..width];
                    let bits = |t: &f32| t.abs().to_bits();
                    let Some((high, _)) = within.map(|within| within[place]) else {
                        run.iter().for_each(|t| table[(bits(t) >> LOW) as usize] += 1);
                        continue;
                    };
                    // Few are in the bin, so that many are passed over at once.
                    for some in run.chunks(16) {
                        if some.iter().fold(false, |any, t| any | (bits(t) >> LOW == high)) {
                            let inside = some.iter().map(bits).filter(|bits| bits >> LOW == high);
                            inside.for_each(|bits| table[(bits & ((1 << LOW) - 1)) as usize] += 1);
                        }
                    }
                }
            });
        });
        Ok(())
    })?;
    let mut tables = tables.into_iter();
    let mut sums = tables.next().unwrap_or_default();
    for (place, table) in tables.flat_map(|tables| tables.into_iter().enumerate()) {
        sums[place].iter_mut().zip(table).for_each(|(sum, n)| *sum += n);
    }
    Ok(sums)
}

/// Factors of a dense matrix in the rank that is asked for; the error is measured. `known` are vectors (columns, K) near whose
/// span the leading right ones lie.
pub(crate) fn factored(
    kind: Kind,
    matrix: HostMatrix,
    size: Size,
    known: Option<&Array>,
    seed: u64,
) -> Result<Cut> {
    let sums: Vec<f64> = matrix.values.par_chunks(RUN).map(squared).collect();
    let total = sums.into_iter().sum();
    let found = leading(matrix, size, Search { rank: FIRST, total, known, seed })?;
    let (a, b) = oriented(kind, &found)?;
    ffi::eval([&a, &b])?;
    let (rows, columns) = matrix.shape();
    let step = (BLOCK / columns.max(1)).max(1);
    let (left, right) = found.factors()?;
    let mut lost = 0.0;
    for from in (0..rows).step_by(step as usize) {
        let to = (from + step).min(rows);
        let product = left.take_axis(Array::from_iter(from..to, &[to - from]), 0)?.matmul(&right)?;
        let product = ffi::read::<f32>(&product)?;
        let rest = &matrix.values[from as usize * columns as usize..][..product.len()];
        let runs = product.par_chunks(RUN).zip(rest.par_chunks(RUN)).map(|(p, t)| {
            let mut rest = [0f32; RUN];
            rest.iter_mut().zip(p).zip(t).for_each(|((rest, p), t)| *rest = p - t);
            squared(&rest)
        });
        lost += runs.collect::<Vec<_>>().into_iter().sum::<f64>();
    }
    let error = if total > 0.0 { (lost / total).sqrt() } else { 0.0 };
    Ok(Cut { a, b, norm: total.sqrt(), error })
}

/// The rank at which the search for an energy begins.
const FIRST: i32 = 16;

/// The leading part of a matrix, as much of it as is asked for.
fn leading(matrix: HostMatrix, size: Size, mut search: Search) -> Result<Svd> {
    let (rows, columns) = matrix.shape();
    let all = rows.min(columns);
    search.rank = match size {
        Size::Rank(rank) => return Ok(svd_leading(matrix, Search { rank: rank.min(all), ..search })?),
        Size::Full => all,
        Size::Energy(_) => FIRST.min(all),
    };
    loop {
        let found = svd_leading(matrix, search)?;
        match size.pick(ffi::read::<f32>(&found.s)?, search.total) {
            Some(rank) => return Ok(found.leading(rank.max(1))?),
            None if search.rank == all => return Ok(found),
            None => search.rank = (2 * search.rank).min(all),
        }
    }
}
