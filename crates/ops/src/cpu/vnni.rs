//! The product of arranged weights with rounded rows in AVX-512 VNNI.
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
use crate::{Level, cpu_level};

/// Whether this processor has the instructions, and the level in use allows them.
pub(crate) fn available() -> bool {
    cpu_level() == Level::Avx512 && is_x86_feature_detected!("avx512vnni")
}

/// Rounds one row: its bytes q, then its bytes r.
///
/// # Safety
/// The processor must have the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
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
            let parts = [_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(16))];
            let most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(parts[0]), _mm512_abs_ps(parts[1])));
            // Zero, unless a number is not finite: a maximum would lose it.
            let broken =
                _mm512_reduce_add_ps(_mm512_mul_ps(_mm512_add_ps(parts[0], parts[1]), _mm512_setzero_ps()));
            let step = most / 127.0;
            let inverse = _mm512_set1_ps(if most > 0.0 { 127.0 / most } else { 0.0 });
            let to = q.as_mut_ptr().cast::<u8>().add(block * BLOCK);
            let mut totals = [_mm512_setzero_si512(); 2];
            for (i, part) in parts.into_iter().enumerate() {
                let steps = _mm512_mul_ps(part, inverse);
                let coarse = _mm512_cvtps_epi32(steps);
                let rest = _mm512_sub_ps(steps, _mm512_cvtepi32_ps(coarse));
                let fine = _mm512_cvtps_epi32(_mm512_mul_ps(rest, _mm512_set1_ps(FINE)));
                _mm_storeu_si128(to.add(16 * i).cast(), _mm512_cvtsepi32_epi8(coarse));
                _mm_storeu_si128(to.add(x.len() + 16 * i).cast(), _mm512_cvtsepi32_epi8(fine));
                let whole = _mm512_mullo_epi32(coarse, _mm512_set1_epi32(FINE as i32));
                totals[i] = _mm512_add_epi32(whole, fine);
            }
            *factor = step / FINE + broken;
            sums[block] = *factor * _mm512_reduce_add_epi32(_mm512_add_epi32(totals[0], totals[1])) as f32;
            if let Some(halves) = halves.as_chunks_mut::<2>().0.get_mut(block) {
                *halves = totals.map(|total| *factor * _mm512_reduce_add_epi32(total) as f32);
            }
        }
    }
}

/// The panel's columns of rows `rows` of y (m, out).
///
/// # Safety
/// The processor must have the instructions, and nobody else may use these columns.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c")]
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

/// Tiles of as many rows as the registers hold.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c")]
unsafe fn by_rows<const BITS: usize, const READ: u8>(
    panel: &Panel,
    x: &Rounded,
    rows: Range<usize>,
    y: &Shares<f32>,
) {
    let mut at = rows.start;
    unsafe {
        while rows.end - at >= 8 {
            tile::<BITS, READ, 8>(panel, x, at, y);
            at += 8;
        }
        while rows.end - at >= 2 {
            tile::<BITS, READ, 2>(panel, x, at, y);
            at += 2;
        }
        if at < rows.end {
            tile::<BITS, READ, 1>(panel, x, at, y);
        }
    }
}

/// A panel times rows `at`..`at + C` of x. Each result is one chain of sums, whatever C.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c")]
unsafe fn tile<const BITS: usize, const READ: u8, const C: usize>(
    panel: &Panel,
    x: &Rounded,
    at: usize,
    y: &Shares<f32>,
) {
    let of = panel.w.arrangement;
    let (blocks, groups) = (of.inputs / BLOCK, of.inputs / of.group);
    let mut sums = [_mm512_setzero_ps(); C];
    unsafe {
        let mut codes = panel.w.panel(panel.index).as_ptr();
        let mut q = x.q.as_ptr().cast::<i32>().add(at * of.inputs / 2);
        let (mut factors, mut totals) =
            (x.factors.as_ptr().add(at * blocks), x.sums.as_ptr().add(at * blocks));
        let mut halves = x.halves.as_ptr().wrapping_add(2 * at * blocks);
        // Two groups at a time where a block has two.
        let together = if READ == HALVES { 2 } else { 1 };
        for g in (0..groups).step_by(together) {
            let (scales, biases) = (panel.scales.as_ptr().add(g * ROWS), panel.biases.as_ptr().add(g * ROWS));
            let next = (together - 1) * ROWS;
            let both = [
                (_mm512_loadu_ps(scales), _mm512_loadu_ps(biases)),
                (_mm512_loadu_ps(scales.add(next)), _mm512_loadu_ps(biases.add(next))),
            ];
            let (scale, bias) = both[0];
            for _ in 0..(of.group / BLOCK).max(1) {
                let mut lines = [_mm512_setzero_si512(); 8];
                // With few rows reading W is all there is to do, and it lies in one piece up to the task's last panel.
                for t in 0..ROWS * BLOCK * BITS / 8 / 64 {
                    _mm_prefetch::<_MM_HINT_T0>(codes.wrapping_add(64 * t + AHEAD).cast());
                }
                if BITS == 4 {
                    let low = _mm512_set1_epi8(15);
                    for t in 0..4 {
                        let both = _mm512_loadu_si512(codes.add(64 * t).cast());
                        lines[2 * t] = _mm512_and_si512(both, low);
                        lines[2 * t + 1] = _mm512_and_si512(_mm512_srli_epi16::<4>(both), low);
                    }
                    if READ != WHOLE {
                        let table = _mm512_broadcast_i32x4(_mm_loadu_si128(TABLE.as_ptr().cast()));
                        for line in &mut lines {
                            *line = _mm512_shuffle_epi8(table, *line);
                        }
                    }
                } else {
                    for (t, line) in lines.iter_mut().enumerate() {
                        *line = _mm512_loadu_si512(codes.add(64 * t).cast());
                    }
                }
                codes = codes.add(ROWS * BLOCK * BITS / 8);
                for (c, sum) in sums.iter_mut().enumerate() {
                    let q = q.add(c * of.inputs / 2);
                    let r = q.add(of.inputs / 4);
                    // Several chains, or a single row would wait for each product.
                    let zero = _mm512_setzero_si512();
                    let (mut coarse, mut fine) = ([zero; 2], [zero; 2]);
                    for (t, line) in lines.into_iter().enumerate() {
                        // The first lines are of the first half of the inputs.
                        let chain = if READ == HALVES { t / 4 } else { t % 2 };
                        coarse[chain] =
                            _mm512_dpbusd_epi32(coarse[chain], line, _mm512_set1_epi32(*q.add(t)));
                        fine[chain] = _mm512_dpbusd_epi32(fine[chain], line, _mm512_set1_epi32(*r.add(t)));
                    }
                    let factor = _mm512_set1_ps(*factors.add(c * blocks));
                    if READ == HALVES {
                        for half in 0..2 {
                            let (coarse, fine) =
                                (_mm512_cvtepi32_ps(coarse[half]), _mm512_cvtepi32_ps(fine[half]));
                            let whole = _mm512_fmadd_ps(coarse, _mm512_set1_ps(FINE), fine);
                            let (scale, bias) = both[half];
                            *sum = _mm512_fmadd_ps(_mm512_mul_ps(whole, factor), scale, *sum);
                            *sum = _mm512_fmadd_ps(
                                bias,
                                _mm512_set1_ps(*halves.add(2 * c * blocks + half)),
                                *sum,
                            );
                        }
                        continue;
                    }
                    let coarse = _mm512_cvtepi32_ps(_mm512_add_epi32(coarse[0], coarse[1]));
                    let fine = _mm512_cvtepi32_ps(_mm512_add_epi32(fine[0], fine[1]));
                    let whole = _mm512_fmadd_ps(coarse, _mm512_set1_ps(FINE), fine);
                    *sum = _mm512_fmadd_ps(_mm512_mul_ps(whole, factor), scale, *sum);
                    *sum = _mm512_fmadd_ps(bias, _mm512_set1_ps(*totals.add(c * blocks)), *sum);
                }
                q = q.add(BLOCK / 4);
                factors = factors.add(1);
                totals = totals.add(1);
                halves = halves.wrapping_add(2);
            }
        }
        let column = panel.index * ROWS;
        let mask = ((1_u32 << ROWS.min(of.out - column)) - 1) as u16;
        for (c, sum) in sums.into_iter().enumerate() {
            _mm512_mask_storeu_ps(y.pointer().add((at + c) * of.out + column), mask, sum);
        }
    }
}
