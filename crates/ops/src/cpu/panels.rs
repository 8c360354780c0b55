//! Packed weights laid out for inference: sixteen rows of W together, so that one instruction multiplies four inputs of
//! each of them with the same four numbers of x, which are whole numbers of 8 bits.
//!
//! Panel p holds rows 16 p to 16 p + 15 (rows beyond the last are zero). For every 32 inputs it has, of 4-bit codes, four
//! lines of 64 bytes: byte 4 r + j of line t is code 8 t + j of row r in its low half and code 8 t + 4 + j in its high
//! half; of 8-bit codes, eight lines, with code 4 t + j at byte 4 r + j of line t. Codes of 2 and 3 bits are stored as 4,
//! of 5 and 6 as 8. Scales and biases are (panels, groups, 16).
//!
//! A float of 4 bits is v = (c - 12) / 2 for a whole number c of at most 24: with the scale s / 2 and the bias -6 s it is
//! multiplied as the others are, once a table has made c of its code.
//!
//! x is rounded by blocks of 32 to two bytes, x = d (254 q + r) with d = max|x| / (127 * 254) and whole q and r of at most
//! 127: a single byte would move SmolLM2-135M by 3e-3 nats, two by less than f32's own order of sums. With codes c, scale s
//! and bias b of a group `y = sum over blocks of s d (254 sum(c q) + sum(c r)) + sum over groups of b sum(d (254 q + r))`;
//! the inner sums are exact. So the rounding of x is the only error, whatever the number of rows.

use std::ffi::CStr;
use std::ops::Range;

use super::gemm::{Right, product, share};
use super::packed::{Layout, Packed, levels_of};
use super::primitive::{Floats, Op, Tensor, apply};
#[cfg(target_arch = "x86_64")]
use super::rounded::{self, Job};
use super::simd::{Kernel, Simd};
use crate::ffi::Mode;
use crate::minifloat::E2M1;
use crate::pool::{self, Shares};
use crate::{Array, Dtype, PackedRef, Precision, Result};

/// Rows of a panel.
pub(crate) const ROWS: usize = 16;
/// Inputs that share a factor of x.
pub(crate) const BLOCK: usize = 32;

/// The sizes of arranged weights.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrangement {
    pub(crate) out: usize,
    pub(crate) inputs: usize,
    pub(crate) group: usize,
    /// Of the stored codes: 4 or 8.
    pub(crate) bits: usize,
    pub(crate) mode: Mode,
}

impl Arrangement {
    /// How weights of this layout are arranged.
    pub(crate) fn of(layout: Layout) -> Arrangement {
        let Layout { out, inputs, group, bits, mode } = layout;
        Arrangement { out, inputs, group, bits: if bits <= 4 { 4 } else { 8 }, mode }
    }

    /// What a stored code with its scale and bias stands for.
    #[inline(always)]
    fn weight(self, code: u8, scale: f32, bias: f32) -> f32 {
        match self.mode {
            Mode::Affine => f32::from(code) * scale + bias,
            Mode::Mxfp4 | Mode::Nvfp4 | Mode::Mxfp8 => E2M1[usize::from(code & 15)] * scale,
        }
    }

    pub(crate) fn panels(self) -> usize {
        self.out.div_ceil(ROWS)
    }

    /// Bytes of a panel's codes.
    pub(crate) fn panel_bytes(self) -> usize {
        ROWS * self.inputs * self.bits / 8
    }

    /// Groups of a row.
    pub(crate) fn groups(self) -> usize {
        self.inputs / self.group
    }

    /// Where code `k` of row `r` of a panel is: its byte, and the bits to shift it down.
    fn place(self, r: usize, k: usize) -> (usize, usize) {
        let (block, i) = (k / BLOCK, k % BLOCK);
        let block = block * ROWS * BLOCK * self.bits / 8;
        match self.bits {
            4 => (block + i / 8 * 64 + 4 * r + i % 4, i % 8 / 4 * 4),
            _ => (block + i / 4 * 64 + 4 * r + i % 4, 0),
        }
    }
}

/// The parts of W arranged anew: codes (panels x bytes / 4,) u32, scales and, in the affine mode, biases (panels, groups, 16).
pub(crate) fn arrange(w: PackedRef, layout: Layout) -> Result<Vec<Array>> {
    let to = Arrangement::of(layout);
    let codes = [(to.panels() * to.panel_bytes() / 4) as i32];
    let levels = [to.panels() as i32, to.groups() as i32, ROWS as i32];
    let dtype = w.scales.dtype();
    let inputs: Vec<&Array> = w.arrays().collect();
    let mut outputs = vec![(&levels[..], dtype); inputs.len()];
    outputs[0] = (&codes[..], Dtype::Uint32);
    apply(Arrange { from: layout, to }, &inputs, &outputs)
}

/// Bytes of a line.
const LINE: usize = 64;

/// Eight codes of 4 bits, c0 in the lowest, as the four bytes c0 + 16 c4 to c3 + 16 c7.
fn fours(word: u32) -> u32 {
    let bytes = |codes: u32| {
        let pairs = (codes | codes << 8) & 0x00ff_00ff;
        (pairs | pairs << 4) & 0x0f0f_0f0f
    };
    bytes(word & 0xffff) | bytes(word >> 16) << 4
}

struct Arrange {
    from: Layout,
    to: Arrangement,
}

impl Op for Arrange {
    fn name(&self) -> &'static CStr {
        c"arrangement of packed weights"
    }

    fn lasts(&self) -> bool {
        true
    }

    fn run(&self, inputs: &[Tensor], outputs: &mut [Tensor]) {
        let (from, to) = (Packed::new(self.from, inputs), self.to);
        let Some((codes, levels)) = outputs.split_first_mut() else { return };
        let codes = Shares::new(codes.bytes_mut());
        pool::run(to.panels(), |panel| {
            // SAFETY: each panel belongs to one task.
            let bytes = unsafe { codes.part(panel * to.panel_bytes(), to.panel_bytes()) };
            bytes.fill(0);
            for r in 0..ROWS.min(to.out - panel * ROWS) {
                let row = panel * ROWS + r;
                if self.from.bits == to.bits {
                    for (i, word) in from.words(row).enumerate() {
                        let word = if to.bits == 4 { fours(word) } else { word };
                        bytes[LINE * i + 4 * r..][..4].copy_from_slice(&word.to_le_bytes());
                    }
                    continue;
                }
                for k in 0..to.inputs {
                    let (byte, shift) = to.place(r, k);
                    bytes[byte] |= from.code(row, k) << shift;
                }
            }
        });
        for (source, target) in inputs[1..].iter().zip(levels) {
            let size = target.bytes().len() / (to.panels() * to.groups() * ROWS);
            let (source, target) = (source.bytes(), target.bytes_mut());
            target.fill(0);
            for row in 0..to.out {
                for g in 0..to.groups() {
                    let at = ((row / ROWS * to.groups() + g) * ROWS + row % ROWS) * size;
                    let from = (row * to.groups() + g) * size;
                    target[at..at + size].copy_from_slice(&source[from..from + size]);
                }
            }
        }
    }
}

/// Arranged weights in memory.
#[derive(Clone, Copy)]
pub(crate) struct Panels<'a> {
    pub(crate) arrangement: Arrangement,
    pub(crate) codes: &'a [u8],
    pub(crate) scales: Floats<'a>,
    /// Of the affine mode.
    pub(crate) biases: Option<Floats<'a>>,
}

impl<'a> Panels<'a> {
    /// From the memory of codes, scales and, in the affine mode, biases.
    pub(crate) fn new(arrangement: Arrangement, parts: &'a [Tensor]) -> Panels<'a> {
        let codes = parts[0].bytes();
        let len = arrangement.panels() * arrangement.panel_bytes();
        assert_eq!(codes.len(), len, "arranged weights of another size");
        let (scales, biases) = levels_of(arrangement.mode, &parts[1..]);
        Panels { arrangement, codes, scales, biases }
    }

    /// Some rows of W, of which the first is the first of a panel.
    pub(crate) fn rows(self, rows: Range<usize>) -> Panels<'a> {
        assert!(rows.start.is_multiple_of(ROWS));
        let arrangement = Arrangement { out: rows.len(), ..self.arrangement };
        let panels = rows.start / ROWS..rows.start / ROWS + arrangement.panels();
        let (bytes, levels) = (arrangement.panel_bytes(), arrangement.groups() * ROWS);
        Panels {
            arrangement,
            codes: &self.codes[panels.start * bytes..panels.end * bytes],
            scales: self.scales.part(panels.start * levels..panels.end * levels),
            biases: self.biases.map(|biases| biases.part(panels.start * levels..panels.end * levels)),
        }
    }

    /// Codes of a panel.
    pub(crate) fn panel(&self, panel: usize) -> &'a [u8] {
        let bytes = self.arrangement.panel_bytes();
        &self.codes[panel * bytes..(panel + 1) * bytes]
    }

    /// Scale and bias, 0 where there is none, of each row of a panel in a group.
    #[inline(always)]
    pub(crate) fn levels<S: Simd>(&self, s: S, panel: usize, group: usize) -> ([f32; ROWS], [f32; ROWS]) {
        let at = (panel * self.arrangement.groups() + group) * ROWS;
        let (mut scales, mut biases) = ([0.0; ROWS], [0.0; ROWS]);
        super::packed::widen(s, self.scales, at, &mut scales);
        if let Some(own) = self.biases {
            super::packed::widen(s, own, at, &mut biases);
        }
        (scales, biases)
    }
}

/// y = x W^T for x (m, inputs): in integers if `precision` and the processor allow, else by panels of floats.
pub(crate) fn times_transpose(x: &[f32], w: &Panels, y: &mut [f32], precision: Precision) {
    #[cfg(target_arch = "x86_64")]
    if precision == Precision::Int16 && rounded::available() {
        rounded::products(x, &[Job { w: *w, y: Shares::new(y), after: Default::default() }]);
        return;
    }
    product(x, w.arrangement.inputs, w, w.arrangement.out, y, precision, false);
}

/// Calls `run` with ranges that cover `0..count`, on all threads if it is worth it.
pub(crate) fn by_parts(count: usize, worth_it: bool, run: impl Fn(Range<usize>) + Sync) {
    let each = each_part(count, worth_it);
    share(worth_it, count.div_ceil(each), |task| run(task * each..((task + 1) * each).min(count)));
}

/// How long each of these ranges is.
pub(crate) fn each_part(count: usize, worth_it: bool) -> usize {
    if worth_it { count.div_ceil(4 * pool::threads()).max(1) } else { count.max(1) }
}

impl Right for Panels<'_> {
    fn depth_unit(&self) -> usize {
        self.arrangement.group
    }

    #[inline(always)]
    fn panel<S: Simd>(
        &self,
        s: S,
        (k, depth): (usize, usize),
        (n, columns): (usize, usize),
        width: usize,
        to: &mut [f32],
    ) {
        let of = self.arrangement;
        to.fill(0.0);
        let mut j = 0;
        while j < columns {
            let (panel, first) = ((n + j) / ROWS, (n + j) % ROWS);
            let count = (ROWS - first).min(columns - j);
            let codes = self.panel(panel);
            for at in (0..depth).step_by(of.group) {
                let (scales, biases) = self.levels(s, panel, (k + at) / of.group);
                for i in at..at + of.group {
                    for r in 0..count {
                        let (byte, shift) = of.place(first + r, k + i);
                        let code = codes[byte] >> shift & if of.bits == 4 { 15 } else { 255 };
                        to[i * width + j + r] = of.weight(code, scales[first + r], biases[first + r]);
                    }
                }
            }
            j += count;
        }
    }
}

/// Whether the processor has the instructions that this layout is for.
pub(crate) fn pays() -> bool {
    #[cfg(target_arch = "x86_64")]
    return rounded::available();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Row `row` of W.
pub(crate) struct ArrangedRow<'a> {
    pub(crate) w: &'a Panels<'a>,
    pub(crate) row: usize,
    pub(crate) to: &'a mut [f32],
}

impl Kernel for ArrangedRow<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let of = self.w.arrangement;
        let (panel, r) = (self.row / ROWS, self.row % ROWS);
        let codes = self.w.panel(panel);
        for (g, to) in self.to.chunks_exact_mut(of.group).enumerate() {
            let (scales, biases) = self.w.levels(s, panel, g);
            for (i, to) in to.iter_mut().enumerate() {
                let (byte, shift) = of.place(r, g * of.group + i);
                let code = codes[byte] >> shift & if of.bits == 4 { 15 } else { 255 };
                *to = of.weight(code, scales[r], biases[r]);
            }
        }
    }
}
