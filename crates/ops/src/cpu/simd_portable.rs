//! The vector operations in plain Rust, for processors that we know nothing about; the compiler makes of them what it can.

use super::simd::{Simd, Tile, eight_codes, tile};

const N: usize = 8;

/// Plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct Portable(());

impl Portable {
    pub(crate) fn new() -> Portable {
        Portable(())
    }
}

#[inline(always)]
fn each(f: impl FnMut(usize) -> f32) -> [f32; N] {
    std::array::from_fn(f)
}

#[inline(always)]
fn each_int(f: impl FnMut(usize) -> u32) -> [u32; N] {
    std::array::from_fn(f)
}

impl Simd for Portable {
    type V = [f32; N];
    type I = [u32; N];
    type Block = [[f32; N]; 4];
    const LANES: usize = N;
    const LARGE_ROWS: usize = 4;
    const SMALL_ROWS: usize = 4;

    #[inline(always)]
    fn splat(self, x: f32) -> [f32; N] {
        [x; N]
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> [f32; N] {
        // SAFETY: the caller's promise; no alignment is asked for.
        unsafe { p.cast::<[f32; N]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: [f32; N]) {
        // SAFETY: the caller's promise; no alignment is asked for.
        unsafe { p.cast::<[f32; N]>().write_unaligned(v) }
    }
    #[inline(always)]
    fn add(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        each(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        each(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        each(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        each(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn max(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        each(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        each(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn fma(self, a: [f32; N], b: [f32; N], c: [f32; N]) -> [f32; N] {
        // Only an instruction that every processor of the architecture has is faster than two roundings.
        if cfg!(target_arch = "aarch64") {
            each(|i| a[i].mul_add(b[i], c[i]))
        } else {
            each(|i| a[i] * b[i] + c[i])
        }
    }
    #[inline(always)]
    fn round(self, a: [f32; N]) -> [f32; N] {
        // Adding 1.5 * 2^23 leaves no bits for a fraction.
        each(|i| (a[i] + 12_582_912.0) - 12_582_912.0)
    }
    #[inline(always)]
    fn times_power_of_two(self, a: [f32; N], n: [f32; N]) -> [f32; N] {
        each(|i| a[i] * f32::from_bits(((n[i] as i32 + 127) << 23) as u32))
    }
    #[inline(always)]
    fn where_at_least(self, x: [f32; N], limit: [f32; N], value: [f32; N]) -> [f32; N] {
        each(|i| if x[i] < limit[i] { 0.0 } else { value[i] })
    }
    #[inline(always)]
    fn sum(self, a: [f32; N]) -> f32 {
        let b: [f32; 4] = std::array::from_fn(|i| a[i] + a[i + 4]);
        (b[0] + b[2]) + (b[1] + b[3])
    }
    #[inline(always)]
    fn largest(self, a: [f32; N]) -> f32 {
        a.iter().fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m })
    }

    #[inline(always)]
    fn splat_int(self, x: u32) -> [u32; N] {
        [x; N]
    }
    #[inline(always)]
    unsafe fn gather(self, p: *const u32, stride: usize) -> [u32; N] {
        // SAFETY: the caller's promise.
        each_int(|i| unsafe { p.add(i * stride).read_unaligned() })
    }
    #[inline(always)]
    fn shift_right(self, a: [u32; N], by: u32) -> [u32; N] {
        each_int(|i| a[i] >> by)
    }
    #[inline(always)]
    fn shift_left(self, a: [u32; N], by: u32) -> [u32; N] {
        each_int(|i| a[i] << by)
    }
    #[inline(always)]
    fn and(self, a: [u32; N], b: [u32; N]) -> [u32; N] {
        each_int(|i| a[i] & b[i])
    }
    #[inline(always)]
    fn or(self, a: [u32; N], b: [u32; N]) -> [u32; N] {
        each_int(|i| a[i] | b[i])
    }
    #[inline(always)]
    fn as_float(self, a: [u32; N]) -> [f32; N] {
        each(|i| f32::from_bits(a[i]))
    }
    #[inline(always)]
    fn pick(self, table: &[f32; 16], a: [u32; N]) -> [f32; N] {
        each(|i| table[(a[i] & 15) as usize])
    }
    #[inline(always)]
    fn to_float(self, a: [u32; N]) -> [f32; N] {
        each(|i| a[i] as i32 as f32)
    }
    #[inline(always)]
    unsafe fn codes(self, p: *const u8, bits: usize, end: *const u8) -> [u32; N] {
        // SAFETY: the caller's promise.
        let word = unsafe { eight_codes(p, bits, end) };
        let mask = (1 << bits) - 1;
        each_int(|i| (word >> (i * bits)) as u32 & mask)
    }

    #[inline(always)]
    unsafe fn block4(self, p: *const u8, s: f32, b: f32) -> Self::Block {
        // SAFETY: the caller's promise.
        let bytes = unsafe { p.cast::<[u8; 16]>().read() };
        let weight = |code: u8| f32::from(code) * s + b;
        [
            each(|i| weight(bytes[i] & 15)),
            each(|i| weight(bytes[i + 8] & 15)),
            each(|i| weight(bytes[i] >> 4)),
            each(|i| weight(bytes[i + 8] >> 4)),
        ]
    }
    #[inline(always)]
    unsafe fn block8(self, p: *const u8, s: f32, b: f32) -> Self::Block {
        // SAFETY: the caller's promise.
        let bytes = unsafe { p.cast::<[u8; 32]>().read() };
        std::array::from_fn(|j| each(|i| f32::from(bytes[j * N + i]) * s + b))
    }
    #[inline(always)]
    unsafe fn block32(self, p: *const f32) -> Self::Block {
        // SAFETY: the caller's promise.
        std::array::from_fn(|j| unsafe { self.load(p.add(j * N)) })
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> [f32; N] {
        // SAFETY: the caller's promise.
        std::array::from_fn(|i| f32::from_bits(u32::from(unsafe { p.add(i).read() }) << 16))
    }
    #[inline(always)]
    fn widen_f16(self, from: &[u16], to: &mut [f32]) {
        for (to, &from) in to.iter_mut().zip(from) {
            *to = half::f16::from_bits(from).to_f32();
        }
    }

    #[inline(always)]
    unsafe fn large_tile(self, t: Tile) {
        // SAFETY: the caller's promise.
        unsafe { tile::<Portable, 4, 2>(self, Tile { a_row: 1, a_k: 4, b_k: 2 * N, ..t }) }
    }
    #[inline(always)]
    unsafe fn narrow_tile(self, t: Tile) {
        // SAFETY: the caller's promise.
        unsafe { tile::<Portable, 4, 1>(self, Tile { a_row: 1, a_k: 4, b_k: N, ..t }) }
    }
    #[inline(always)]
    unsafe fn small_tile(self, t: Tile) {
        // SAFETY: the caller's promise.
        unsafe { tile::<Portable, 4, 2>(self, t) }
    }
}
