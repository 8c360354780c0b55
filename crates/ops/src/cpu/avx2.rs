//! The product of arranged weights with rounded rows in AVX2.
//!
//! A row's numbers v = 254 q + r are held as 16-bit integers, and one instruction multiplies two of them with the codes of two
//! inputs of each of eight rows of W. In a line of the layout, byte 4 r + j is of input j of row r, so that its words hold
//! the codes of inputs 0 and 1, then 2 and 3: with a shift and a mask they give a pair such as (0, 2). The numbers of every
//! eight inputs are therefore stored as 0, 2, 4, 6, 1, 3, 5, 7.
#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "SAFETY, the same for every block: the callers of the two functions have found the instructions, and the \
              pointers stay inside the slices whose lengths the sizes fix"
)]

use std::arch::x86_64::*;
use std::ops::Range;

use super::panels::{BLOCK, ROWS};
use super::rounded::{AHEAD, FINE, FLOATS, HALVES, Panel, Rounded, TABLE, WHOLE};
use crate::pool::Shares;

/// Lanes of a vector: half a panel.
const HALF: usize = 8;

/// Rounds one row.
///
/// # Safety
/// The processor must have the instructions.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn round_row(
    x: &[f32],
    q: &mut [f32],
    factors: &mut [f32],
    (sums, halves): (&mut [f32], &mut [f32]),
) {
    assert!(q.len() * 2 == x.len() && factors.len() * BLOCK == x.len() && sums.len() == factors.len());
    for (block, factor) in factors.iter_mut().enumerate() {
        unsafe {
            let from = x.as_ptr().add(block * BLOCK);
            let sign = _mm256_set1_ps(-0.0);
            let (mut most, mut all) = (_mm256_setzero_ps(), _mm256_setzero_ps());
            for part in 0..BLOCK / HALF {
                let part = _mm256_loadu_ps(from.add(part * HALF));
                most = _mm256_max_ps(most, _mm256_andnot_ps(sign, part));
                all = _mm256_add_ps(all, part);
            }
            let lanes: [f32; HALF] = std::mem::transmute(most);
            let most = lanes.into_iter().fold(0.0, f32::max);
            // Zero, unless a number is not finite: a maximum would lose it.
            let lanes: [f32; HALF] = std::mem::transmute(_mm256_mul_ps(all, _mm256_setzero_ps()));
            let broken: f32 = lanes.into_iter().sum();
            let step = most / 127.0;
            let inverse = _mm256_set1_ps(if most > 0.0 { 127.0 / most } else { 0.0 });
            let to = q.as_mut_ptr().cast::<i16>().add(block * BLOCK);
            // Inputs 0, 2, 4, 6, 1, 3, 5, 7 of eight.
            let order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
            let mut totals = [_mm256_setzero_si256(); 2];
            for part in 0..BLOCK / HALF {
                let steps = _mm256_mul_ps(_mm256_loadu_ps(from.add(part * HALF)), inverse);
                let coarse = _mm256_cvtps_epi32(steps);
                let rest = _mm256_sub_ps(steps, _mm256_cvtepi32_ps(coarse));
                let fine = _mm256_cvtps_epi32(_mm256_mul_ps(rest, _mm256_set1_ps(FINE)));
                let whole = _mm256_mullo_epi32(coarse, _mm256_set1_epi32(FINE as i32));
                let whole = _mm256_add_epi32(whole, fine);
                totals[part / 2] = _mm256_add_epi32(totals[part / 2], whole);
                let ordered = _mm256_permutevar8x32_epi32(whole, order);
                let low = _mm256_castsi256_si128(ordered);
                let high = _mm256_extracti128_si256::<1>(ordered);
                _mm_storeu_si128(to.add(part * HALF).cast(), _mm_packs_epi32(low, high));
            }
            let totals = totals.map(|total| {
                let lanes: [i32; HALF] = std::mem::transmute(total);
                lanes.into_iter().sum::<i32>()
            });
            *factor = step / FINE + broken;
            sums[block] = *factor * (totals[0] + totals[1]) as f32;
            if let Some(halves) = halves.as_chunks_mut::<2>().0.get_mut(block) {
                *halves = totals.map(|total| *factor * total as f32);
            }
        }
    }
}

/// The panel's columns of rows `rows` of y (m, out).
///
/// # Safety
/// The processor must have the instructions, and nobody else may use these columns.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn multiply(panel: &Panel, x: &Rounded, rows: Range<usize>, y: &Shares<f32>) {
    let read = x.reading(panel, &rows);
    unsafe {
        match (panel.w.arrangement.bits, read) {
            (8, _) => by_rows::<8, WHOLE>(panel, x, rows, y),
            (_, WHOLE) => by_rows::<4, WHOLE>(panel, x, rows, y),
            (_, FLOATS) => by_rows::<4, FLOATS>(panel, x, rows, y),
            _ => by_rows::<4, HALVES>(panel, x, rows, y),
        }
    }
}

/// Tiles of four rows with the whole panel: half of it would keep the float sums in registers as well, and spread every pair of
/// numbers twice, which costs more.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn by_rows<const BITS: usize, const READ: u8>(
    panel: &Panel,
    x: &Rounded,
    rows: Range<usize>,
    y: &Shares<f32>,
) {
    let mut at = rows.start;
    unsafe {
        while rows.end - at >= 4 {
            tile::<BITS, READ, 4>(panel, x, at, y);
            at += 4;
        }
        match rows.end - at {
            3 => tile::<BITS, READ, 3>(panel, x, at, y),
            2 => tile::<BITS, READ, 2>(panel, x, at, y),
            1 => tile::<BITS, READ, 1>(panel, x, at, y),
            _ => (),
        }
    }
}

/// A panel, as two halves, times rows `at`..`at + C` of x. Each result is one chain of sums, whatever the tile.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile<const BITS: usize, const READ: u8, const C: usize>(
    panel: &Panel,
    x: &Rounded,
    at: usize,
    y: &Shares<f32>,
) {
    let of = panel.w.arrangement;
    let (blocks, groups) = (of.inputs / BLOCK, of.inputs / of.group);
    let mut sums = [[_mm256_setzero_ps(); C]; 2];
    unsafe {
        let mut codes = panel.w.panel(panel.index).as_ptr();
        // Pairs of numbers.
        let mut q = x.q.as_ptr().cast::<i32>().add(at * of.inputs / 2);
        let (mut factors, mut totals) =
            (x.factors.as_ptr().add(at * blocks), x.sums.as_ptr().add(at * blocks));
        // The sums that biases meet: of groups, or of halves of blocks.
        let each = if READ == HALVES { 2 } else { 1 };
        let mut halves = x.halves.as_ptr().wrapping_add(2 * at * blocks);
        for g in 0..groups {
            let (scales, biases) = (panel.scales.as_ptr().add(g * ROWS), panel.biases.as_ptr().add(g * ROWS));
            for _ in 0..(of.group / BLOCK).max(1) {
                let mut products = [[_mm256_setzero_si256(); C]; 2];
                for t in 0..BLOCK * BITS / 32 / each {
                    // With few rows reading W is all there is to do, and it lies in one piece up to the task's last panel.
                    _mm_prefetch::<_MM_HINT_T0>(codes.wrapping_add(64 * t + AHEAD).cast());
                    let halves = [codes.add(64 * t), codes.add(64 * t + 32)];
                    let lines = halves.map(|half| _mm256_loadu_si256(half.cast()));
                    // A pair of numbers is spread over a vector once, for both halves: what the loop does is what it costs.
                    let (first, step) = pairs::<BITS>(t);
                    for i in 0..16 / BITS {
                        let words = [word::<BITS, READ>(lines[0], i), word::<BITS, READ>(lines[1], i)];
                        for c in 0..C {
                            let pair = _mm256_set1_epi32(*q.add(c * of.inputs / 2 + first + i * step));
                            for (&words, products) in words.iter().zip(&mut products) {
                                let sum = _mm256_add_epi32(products[c], _mm256_madd_epi16(words, pair));
                                products[c] = in_order(sum);
                            }
                        }
                    }
                }
                codes = codes.add(ROWS * BLOCK * BITS / 8 / each);
                for (h, sums) in sums.iter_mut().enumerate() {
                    let (scale, bias) =
                        (_mm256_loadu_ps(scales.add(h * HALF)), _mm256_loadu_ps(biases.add(h * HALF)));
                    for (c, sum) in sums.iter_mut().enumerate() {
                        let whole = _mm256_cvtepi32_ps(products[h][c]);
                        let factor = _mm256_set1_ps(*factors.add(c * blocks));
                        let total = if READ == HALVES {
                            *halves.add(2 * c * blocks)
                        } else {
                            *totals.add(c * blocks)
                        };
                        *sum = _mm256_fmadd_ps(_mm256_mul_ps(whole, factor), scale, *sum);
                        *sum = _mm256_fmadd_ps(bias, _mm256_set1_ps(total), *sum);
                    }
                }
                q = q.add(BLOCK / 2 / each);
                // The second half of a block has the block's step.
                if READ != HALVES || g % 2 == 1 {
                    factors = factors.add(1);
                    totals = totals.add(1);
                }
                halves = halves.wrapping_add(1);
            }
        }
        for (h, sums) in sums.into_iter().enumerate() {
            let column = panel.index * ROWS + h * HALF;
            let columns = HALF.min(of.out.saturating_sub(column));
            for (c, sum) in sums.into_iter().enumerate() {
                if columns == HALF {
                    _mm256_storeu_ps(y.pointer().add((at + c) * of.out + column), sum);
                } else if columns > 0 {
                    let lanes: [f32; HALF] = std::mem::transmute(sum);
                    y.part((at + c) * of.out + column, columns).copy_from_slice(&lanes[..columns]);
                }
            }
        }
    }
}

/// Half of a line as words of 16 bits, a code each: vector `i` of four with 4-bit codes, of two with 8-bit codes.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn word<const BITS: usize, const READ: u8>(line: __m256i, i: usize) -> __m256i {
    // The bytes that hold the code: two to a vector of 8-bit codes, and of floats once their codes are looked up.
    let (bytes, high) = if BITS == 8 {
        (line, i == 1)
    } else if READ == WHOLE {
        let shifted = match i {
            0 => line,
            1 => _mm256_srli_epi16::<4>(line),
            2 => _mm256_srli_epi16::<8>(line),
            _ => return _mm256_srli_epi16::<12>(line),
        };
        return _mm256_and_si256(shifted, _mm256_set1_epi16(15));
    } else {
        let table = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(TABLE.as_ptr().cast()) });
        let codes = if i.is_multiple_of(2) { line } else { _mm256_srli_epi16::<4>(line) };
        (_mm256_shuffle_epi8(table, _mm256_and_si256(codes, _mm256_set1_epi8(15))), i >= 2)
    };
    if high { _mm256_srli_epi16::<8>(bytes) } else { _mm256_and_si256(bytes, _mm256_set1_epi16(255)) }
}

/// Keeps the compiler from adding products to each other before they meet the sum, for which it would run out of registers.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn in_order(mut sum: __m256i) -> __m256i {
    unsafe {
        std::arch::asm!("/* {} */", inout(ymm_reg) sum, options(pure, nomem, nostack, preserves_flags))
    };
    sum
}

/// Where the pair of numbers for the first word of line `t` of a block is, and how far apart the next.
const fn pairs<const BITS: usize>(t: usize) -> (usize, usize) {
    if BITS == 4 { (4 * t, 1) } else { (t / 2 * 4 + t % 2, 2) }
}
