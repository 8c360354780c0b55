//! Packed weights in memory, rows of them, and products: by rows for few rows ([`super::few_rows`]), by panels for many.
//!
//! With many rows a panel of W is widened and [`super::gemm`] does the rest. Either way an element of the result is summed in
//! an order that nothing else decides.

use std::ops::Range;

use super::codes::{Code, E2m1, E4m3, Whole};
use super::few_rows::few_rows;
use super::gemm::{Right, product};
use super::primitive::{Floats, Tensor};
use super::simd::{Kernel, Simd, vectors};
use crate::ffi::Mode;
use crate::minifloat;
use crate::{PackedRef, Precision};

/// Up to so many rows of x are multiplied by rows of W, more by panels.
pub(crate) const FEW: usize = 32;
/// Weights in a block of [`Simd::block4`] and its like.
pub(super) const BLOCK: usize = 32;

/// The widths of packed weights, without the weights.
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    pub(crate) out: usize,
    pub(crate) inputs: usize,
    pub(crate) group: usize,
    pub(crate) bits: usize,
    pub(crate) mode: Mode,
}

impl Layout {
    /// The layout of weights of that (out, in), whose parts were checked.
    pub(crate) fn new(w: PackedRef, (out, inputs): (i32, i32)) -> Layout {
        let (out, inputs) = (out as usize, inputs as usize);
        Layout { out, inputs, group: w.group_size as usize, bits: w.bits as usize, mode: w.mode }
    }

    /// Bytes of a row's codes.
    fn row_bytes(self) -> usize {
        self.inputs * self.bits / 8
    }

    /// Scales of a row.
    pub(super) fn groups(self) -> usize {
        self.inputs / self.group
    }
}

/// Packed weights in memory.
#[derive(Clone, Copy)]
pub(crate) struct Packed<'a> {
    pub(crate) layout: Layout,
    codes: &'a [u8],
    scales: Floats<'a>,
    /// Of the affine mode.
    biases: Option<Floats<'a>>,
}

/// Scales and, in the affine mode, biases in the memory of the parts after the codes.
pub(super) fn levels_of(mode: Mode, parts: &[Tensor]) -> (Floats<'_>, Option<Floats<'_>>) {
    match mode {
        Mode::Affine => (parts[0].floats(), Some(parts[1].floats())),
        Mode::Mxfp4 | Mode::Mxfp8 => (Floats::E8m0(parts[0].bytes()), None),
        Mode::Nvfp4 => (Floats::E4m3(parts[0].bytes()), None),
    }
}

impl<'a> Packed<'a> {
    /// From the memory of codes, scales and, in the affine mode, biases.
    pub(crate) fn new(layout: Layout, parts: &'a [Tensor]) -> Packed<'a> {
        let words = parts[0].u32();
        assert_eq!(words.len() * 4, layout.out * layout.row_bytes(), "packed weights of another size");
        // SAFETY: the same memory as bytes, which is the order the codes are defined in on a little-endian machine.
        let codes = unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), words.len() * 4) };
        let (scales, biases) = levels_of(layout.mode, &parts[1..]);
        Packed { layout, codes, scales, biases }
    }

    /// Some rows of W.
    pub(crate) fn rows(self, rows: Range<usize>) -> Packed<'a> {
        let (bytes, groups) = (self.layout.row_bytes(), self.layout.groups());
        Packed {
            layout: Layout { out: rows.len(), ..self.layout },
            codes: &self.codes[rows.start * bytes..rows.end * bytes],
            scales: self.scales.part(rows.start * groups..rows.end * groups),
            biases: self.biases.map(|biases| biases.part(rows.start * groups..rows.end * groups)),
        }
    }

    /// Where the codes end.
    pub(super) fn end(&self) -> *const u8 {
        self.codes.as_ptr_range().end
    }

    /// Codes of row `row` from input `k` on, a multiple of 8.
    pub(super) fn codes(&self, row: usize, k: usize) -> *const u8 {
        self.codes[row * self.layout.row_bytes() + k * self.layout.bits / 8..].as_ptr()
    }

    /// The codes of row `row` in words of 32 bits, the first in the lowest bits.
    pub(super) fn words(&self, row: usize) -> impl Iterator<Item = u32> + '_ {
        let bytes = &self.codes[row * self.layout.row_bytes()..][..self.layout.row_bytes()];
        bytes.as_chunks::<4>().0.iter().map(|&word| u32::from_le_bytes(word))
    }

    /// Code `k` of row `row`.
    pub(super) fn code(&self, row: usize, k: usize) -> u8 {
        let (bits, row) =
            (self.layout.bits, &self.codes[row * self.layout.row_bytes()..][..self.layout.row_bytes()]);
        let (byte, shift) = (k * bits / 8, k * bits % 8);
        // A code may go on in the next byte.
        let next = if shift + bits > 8 { row[byte + 1] } else { 0 };
        ((u16::from(row[byte]) | u16::from(next) << 8) >> shift) as u8 & (((1_u16 << bits) - 1) as u8)
    }

    /// Scales and, where there are any, biases of row `row`, groups `from` and following.
    #[inline(always)]
    pub(super) fn levels<S: Simd>(
        &self,
        s: S,
        row: usize,
        from: usize,
        scales: &mut [f32],
        biases: &mut [f32],
    ) {
        let at = row * self.layout.groups() + from;
        widen(s, self.scales, at, scales);
        if let Some(own) = self.biases {
            widen(s, own, at, biases);
        }
    }

    /// Weights `k`..`k + to.len()` of a row, in order; `k` and the length are multiples of 16.
    #[inline(always)]
    pub(super) fn unpack<S: Simd>(&self, s: S, row: usize, k: usize, to: &mut [f32]) {
        match self.layout.mode {
            Mode::Affine => self.unpack_as(s, Whole, (row, k), to),
            Mode::Mxfp4 | Mode::Nvfp4 => self.unpack_as(s, E2m1, (row, k), to),
            Mode::Mxfp8 => self.unpack_as(s, E4m3, (row, k), to),
        }
    }

    #[inline(always)]
    fn unpack_as<S: Simd>(&self, s: S, code: impl Code, (row, k): (usize, usize), to: &mut [f32]) {
        let Layout { group, bits, .. } = self.layout;
        // A power of two, which the compiler does not know.
        let shift = group.trailing_zeros();
        let mut at = 0;
        while at < to.len() {
            let (g, inside) = ((k + at) >> shift, (k + at) & (group - 1));
            let run = (group - inside).min(to.len() - at);
            let (mut scale, mut bias) = ([0.0], [0.0]);
            self.levels(s, row, g, &mut scale, &mut bias);
            let codes = (self.codes(row, k + at), self.end(), bits);
            unpack_run(s, code, codes, (scale[0], bias[0]), &mut to[at..at + run]);
            at += run;
        }
    }
}

/// Weights of one group.
#[inline(always)]
fn unpack_run<S: Simd>(
    s: S,
    code: impl Code,
    (codes, end, bits): (*const u8, *const u8, usize),
    (scale, bias): (f32, f32),
    to: &mut [f32],
) {
    // Rows are multiples of 32, and so is what is asked for.
    assert!(to.len().is_multiple_of(S::LANES));
    let (scales, biases) = (s.splat(scale), s.splat(bias));
    for at in vectors::<S>(to.len()) {
        // SAFETY: codes `at` and following are in the row, by the caller's lengths, and `to` has room for them.
        unsafe {
            let codes = s.codes(codes.add(at * bits / 8), bits, end);
            s.store(to.as_mut_ptr().add(at), code.weights(s, codes, scales, biases));
        }
    }
}

/// Numbers `at` and following as f32.
#[inline(always)]
pub(super) fn widen<S: Simd>(s: S, from: Floats, at: usize, to: &mut [f32]) {
    let range = at..at + to.len();
    match from {
        Floats::F32(from) => to.copy_from_slice(&from[range]),
        Floats::F16(from) => s.widen_f16(&from[range], to),
        Floats::Bf16(from) => {
            for (to, &bits) in to.iter_mut().zip(&from[range]) {
                *to = f32::from_bits(u32::from(bits) << 16);
            }
        }
        Floats::E8m0(from) => {
            for (to, &code) in to.iter_mut().zip(&from[range]) {
                *to = minifloat::e8m0(code);
            }
        }
        Floats::E4m3(from) => {
            for (to, &code) in to.iter_mut().zip(&from[range]) {
                *to = minifloat::e4m3(code);
            }
        }
    }
}

/// y = x W^T for x (m, inputs); by panels if `many` or if m is.
pub(crate) fn times_transpose(x: &[f32], w: &Packed, y: &mut [f32], precision: Precision, many: bool) {
    let Layout { out, inputs, .. } = w.layout;
    // Rows of groups of 16 need not be whole blocks.
    if many || x.len() / inputs > FEW || !inputs.is_multiple_of(BLOCK) {
        product(x, inputs, &Transposed(w), out, y, precision, false);
    } else {
        few_rows(x, w, y);
    }
}

/// W^T as the right side: k are the inputs, n the outputs.
pub(crate) struct Transposed<'a>(pub(crate) &'a Packed<'a>);

impl Right for Transposed<'_> {
    fn depth_unit(&self) -> usize {
        self.0.layout.group
    }

    #[inline(always)]
    fn panel<S: Simd>(
        &self,
        s: S,
        (k, depth): (usize, usize),
        (n, columns): (usize, usize),
        width: usize,
        panel: &mut [f32],
    ) {
        let w = self.0;
        let Layout { inputs, group, bits, mode, .. } = w.layout;
        if columns < width {
            panel.fill(0.0);
        }
        let vectors = if 32 % bits == 0 { columns / S::LANES } else { 0 };
        for v in 0..vectors {
            let (at, to) = ((k, depth, n + v * S::LANES), &mut panel[v * S::LANES..]);
            match mode {
                Mode::Affine => self.vectors(s, Whole, at, to, width),
                Mode::Mxfp4 | Mode::Nvfp4 => self.vectors(s, E2m1, at, to, width),
                Mode::Mxfp8 => self.vectors(s, E4m3, at, to, width),
            }
        }
        // What is left is widened row by row and turned.
        let mut weights = [0.0; 128];
        let weights = &mut weights[..group];
        for j in vectors * S::LANES..columns {
            for at in (k..(k + depth).min(inputs)).step_by(group) {
                w.unpack(s, n + j, at, weights);
                for (i, &weight) in weights.iter().enumerate() {
                    panel[(at - k + i) * width + j] = weight;
                }
            }
        }
    }
}

impl Transposed<'_> {
    /// Columns `n`..`n + LANES`, whose codes lie so in words that one word of each row gives 32 / bits rows of the panel.
    #[inline(always)]
    fn vectors<S: Simd>(
        &self,
        s: S,
        code: impl Code,
        (k, depth, n): (usize, usize, usize),
        panel: &mut [f32],
        width: usize,
    ) {
        let w = self.0;
        let Layout { group, bits, .. } = w.layout;
        let (mut scales, mut biases) = ([[0.0; 16]; GROUPS], [[0.0; 16]; GROUPS]);
        let groups = depth / group;
        for lane in 0..S::LANES {
            let (mut scale, mut bias) = ([0.0; GROUPS], [0.0; GROUPS]);
            w.levels(s, n + lane, k / group, &mut scale[..groups], &mut bias[..groups]);
            for g in 0..groups {
                scales[g][lane] = scale[g];
                biases[g][lane] = bias[g];
            }
        }
        let (stride, mask) = (w.layout.row_bytes() / 4, s.splat_int((1 << bits) - 1));
        let in_word = 32 / bits;
        for g in 0..groups {
            // SAFETY: sixteen floats are at least LANES.
            let (scale, bias) = unsafe { (s.load(scales[g].as_ptr()), s.load(biases[g].as_ptr())) };
            let codes = w.codes(n, k + g * group).cast::<u32>();
            for word in 0..group / in_word {
                // SAFETY: rows n..n + LANES are rows of W, `stride` words apart, and have this word.
                let mut codes = unsafe { s.gather(codes.add(word), stride) };
                for i in 0..in_word {
                    let weights = code.weights(s, s.and(codes, mask), scale, bias);
                    let row = &mut panel[(g * group + word * in_word + i) * width..][..S::LANES];
                    // SAFETY: the slice has LANES elements.
                    unsafe { s.store(row.as_mut_ptr(), weights) };
                    codes = s.shift_right(codes, bits as u32);
                }
            }
        }
    }
}

/// Groups in the depth of a panel at most.
const GROUPS: usize = super::gemm::DEEPEST.div_ceil(16) + 1;

/// W as the right side: k are the outputs, n the inputs.
pub(crate) struct Plain<'a>(pub(crate) &'a Packed<'a>);

impl Right for Plain<'_> {
    fn depth_unit(&self) -> usize {
        1
    }

    #[inline(always)]
    fn panel<S: Simd>(
        &self,
        s: S,
        (k, depth): (usize, usize),
        (n, columns): (usize, usize),
        width: usize,
        panel: &mut [f32],
    ) {
        if columns < width {
            panel.fill(0.0);
        }
        for (i, row) in panel.chunks_exact_mut(width).enumerate().take(depth) {
            self.0.unpack(s, k + i, n, &mut row[..columns]);
        }
    }
}

/// Row `id` of W.
pub(crate) struct UnpackRow<'a> {
    pub(crate) w: &'a Packed<'a>,
    pub(crate) id: usize,
    pub(crate) to: &'a mut [f32],
}
impl Kernel for UnpackRow<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.w.unpack(s, self.id, 0, self.to);
    }
}
