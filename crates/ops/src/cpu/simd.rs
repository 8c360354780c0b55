//! The few vector operations that all kernels are written in, once for every level of instructions.
//!
//! A value of a type that implements [`Simd`] proves that the processor has its instructions. Kernels are generic over
//! it and inlined into one function for each level, so that the vectors stay in registers. What computes with vectors
//! must be `#[inline(always)]` all the way, and so cannot be a closure: that would be compiled for any processor, with a
//! call for each instruction.

use std::ops::IndexMut;

/// Vectors of f32 and of 32-bit integers.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// A vector of f32.
    type V: Copy;
    /// A vector of u32 with as many lanes.
    type I: Copy;
    /// 32 f32.
    type Block: Copy + IndexMut<usize, Output = Self::V>;
    /// f32 in a vector: 8 or 16.
    const LANES: usize;

    fn splat(self, x: f32) -> Self::V;
    /// # Safety
    /// `p` must be valid for reading LANES f32.
    unsafe fn load(self, p: *const f32) -> Self::V;
    /// # Safety
    /// `p` must be valid for writing LANES f32.
    unsafe fn store(self, p: *mut f32, v: Self::V);
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// The larger; b where one is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller; b where one is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// a * b + c, rounded once where the level can.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    fn round(self, a: Self::V) -> Self::V;
    /// a * 2^n for whole n from -126 to 127.
    fn times_power_of_two(self, a: Self::V, n: Self::V) -> Self::V;
    /// `value` where x >= limit or x is NaN, zero elsewhere.
    fn where_at_least(self, x: Self::V, limit: Self::V, value: Self::V) -> Self::V;
    /// The sum of the lanes, halves first.
    fn sum(self, a: Self::V) -> f32;
    /// The largest lane.
    fn largest(self, a: Self::V) -> f32;

    fn splat_int(self, x: u32) -> Self::I;
    /// LANES words, `stride` words apart.
    /// # Safety
    /// `p` must be valid for reading all of them, and (LANES - 1) * stride must fit an i32.
    unsafe fn gather(self, p: *const u32, stride: usize) -> Self::I;
    fn shift_right(self, a: Self::I, by: u32) -> Self::I;
    fn shift_left(self, a: Self::I, by: u32) -> Self::I;
    fn and(self, a: Self::I, b: Self::I) -> Self::I;
    fn or(self, a: Self::I, b: Self::I) -> Self::I;
    fn to_float(self, a: Self::I) -> Self::V;
    /// The f32 with these bits.
    fn as_float(self, a: Self::I) -> Self::V;
    /// Elements of the table by the lowest four bits of each lane.
    fn pick(self, table: &[f32; 16], a: Self::I) -> Self::V;
    /// LANES codes of `bits` bits in their order, from the first bit of `p` on.
    /// # Safety
    /// `p` must be valid for reading LANES * bits / 8 bytes, and `end` must be where what can be read ends.
    unsafe fn codes(self, p: *const u8, bits: usize, end: *const u8) -> Self::I;

    /// 32 weights s * code + b of 32 4-bit codes: those at even places first, then those at odd places.
    /// # Safety
    /// `p` must be valid for reading 16 bytes.
    unsafe fn block4(self, p: *const u8, s: f32, b: f32) -> Self::Block;
    /// 32 weights of 32 8-bit codes.
    /// # Safety
    /// `p` must be valid for reading 32 bytes.
    unsafe fn block8(self, p: *const u8, s: f32, b: f32) -> Self::Block;
    /// 32 f32.
    /// # Safety
    /// `p` must be valid for reading 32 f32.
    unsafe fn block32(self, p: *const f32) -> Self::Block;

    /// LANES bf16 numbers as f32.
    /// # Safety
    /// `p` must be valid for reading LANES of them.
    unsafe fn load_bf16(self, p: *const u16) -> Self::V;
    /// f16 bits as f32, as many as both hold.
    fn widen_f16(self, from: &[u16], to: &mut [f32]);

    /// One tile of the large products, see [`super::gemm`].
    /// # Safety
    /// As [`tile`].
    unsafe fn large_tile(self, t: Tile);
    /// The same with one vector instead of two, for narrow C.
    /// # Safety
    /// As [`tile`].
    unsafe fn narrow_tile(self, t: Tile);
    /// Rows of `large_tile`.
    const LARGE_ROWS: usize;
    /// Rounds 2 rows of LANES f32 to bf16: each column's pair becomes a word. Only with
    /// [`super::level::Instructions`] that multiply bf16, as the other operations on pairs.
    /// # Safety
    /// The pointers must be valid for reading, or writing, LANES elements.
    unsafe fn pair_columns(self, even: *const f32, odd: *const f32, to: *mut u32) {
        let _ = (even, odd, to);
        unreachable!("this level has no products of bf16");
    }
    /// Turns four rows of four numbers, `row` apart, to four rows `to_row` apart.
    /// # Safety
    /// The pointers must be valid for reading and writing these.
    #[inline(always)]
    unsafe fn turn(self, from: *const f32, row: usize, to: *mut f32, to_row: usize) {
        for i in 0..4 {
            for j in 0..4 {
                // SAFETY: the caller's promise.
                unsafe { *to.add(j * to_row + i) = *from.add(i * row + j) };
            }
        }
    }
    /// Rounds LANES f32 to bf16: neighbours become a word.
    /// # Safety
    /// The pointers must be valid for reading LANES f32, or writing half as many words.
    unsafe fn pair_neighbours(self, from: *const f32, to: *mut u32) {
        let _ = (from, to);
        unreachable!("this level has no products of bf16");
    }
    /// [`Simd::large_tile`], or [`Simd::narrow_tile`] if NARROW, for pairs of bf16: k counts words.
    /// # Safety
    /// As [`tile`].
    unsafe fn pair_tile<const NARROW: bool>(self, t: Tile) {
        let _ = t;
        unreachable!("this level has no products of bf16");
    }
    /// One tile of attention's products: SMALL_ROWS x 2 vectors.
    /// # Safety
    /// As [`tile`].
    unsafe fn small_tile(self, t: Tile);
    /// Rows of `small_tile`.
    const SMALL_ROWS: usize;
}

/// A computation that can run at every level.
pub(crate) trait Kernel {
    type Output;
    /// Implementations are `#[inline(always)]`, or they would not be compiled for the level.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// C (+)= A B for a small tile of C: A (rows, k) by its strides, B (k, columns) and C (rows, columns) with rows apart.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    pub(crate) k: usize,
    pub(crate) a: *const f32,
    pub(crate) a_row: usize,
    pub(crate) a_k: usize,
    pub(crate) b: *const f32,
    pub(crate) b_k: usize,
    pub(crate) c: *mut f32,
    pub(crate) c_row: usize,
    /// Add to C instead of replacing it.
    pub(crate) add: bool,
}

/// The tile of R rows and N vectors. Each element of C is one chain of multiply-adds in the order of k, whatever the
/// tile's size, which is why results do not depend on how a matrix is cut.
///
/// # Safety
/// All elements named by `t` for R rows and N * LANES columns must be valid, and C must not overlap A or B.
#[inline(always)]
pub(crate) unsafe fn tile<S: Simd, const R: usize, const N: usize>(s: S, t: Tile) {
    let mut sums = [[s.splat(0.0); N]; R];
    let (mut a, mut b) = (t.a, t.b);
    for _ in 0..t.k {
        // SAFETY: within A and B by the caller's promise.
        unsafe {
            let mut row = [s.splat(0.0); N];
            for (j, v) in row.iter_mut().enumerate() {
                *v = s.load(b.add(j * S::LANES));
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let x = s.splat(*a.add(i * t.a_row));
                for (sum, &v) in sums.iter_mut().zip(&row) {
                    *sum = s.fma(x, v, *sum);
                }
            }
            a = a.add(t.a_k);
            b = b.add(t.b_k);
        }
    }
    for (i, sums) in sums.iter().enumerate() {
        for (j, &sum) in sums.iter().enumerate() {
            // SAFETY: within C by the caller's promise.
            unsafe {
                let c = t.c.add(i * t.c_row + j * S::LANES);
                s.store(c, if t.add { s.add(s.load(c), sum) } else { sum });
            }
        }
    }
}

/// e^x to about one unit in the last place; zero below -87.3, and the largest value at 88.3 stays finite.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    let lowest = s.splat(-87.3);
    // The order of the operands lets NaN through.
    let y = s.min(s.splat(88.3), s.max(lowest, x));
    let n = s.round(s.mul(y, s.splat(std::f32::consts::LOG2_E)));
    // ln 2 in two parts, the first with few bits, so that n times it is exact.
    let r = s.fma(n, s.splat(-355.0 / 512.0), y);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    // The Taylor series to the seventh power: |r| <= 0.347, so what is left out is below 6e-9.
    let mut p = s.splat(1.0 / 5040.0);
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = s.fma(p, r, s.splat(c));
    }
    s.where_at_least(x, lowest, s.times_power_of_two(p, n))
}

/// Asks for the line at `p`, where the processor can be asked. Nothing is read.
#[inline(always)]
pub(crate) fn prefetch<T>(p: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: every processor of this kind has the instruction, and any address will do.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// Where whole vectors of `len` elements begin.
#[inline(always)]
pub(crate) fn vectors<S: Simd>(len: usize) -> impl Iterator<Item = usize> {
    (0..len / S::LANES * S::LANES).step_by(S::LANES)
}

/// Eight codes of `bits` bits take as many bytes; they come in the low bits of a word, of which only those are valid.
///
/// # Safety
/// `p` must be valid for reading `bits` bytes, and `end` must be where what can be read ends.
#[inline(always)]
pub(crate) unsafe fn eight_codes(p: *const u8, bits: usize, end: *const u8) -> u64 {
    // SAFETY: the caller's promise; eight bytes are only read where there are as many.
    unsafe {
        if end.addr() - p.addr() >= 8 {
            return p.cast::<u64>().read_unaligned();
        }
        let mut bytes = [0; 8];
        std::ptr::copy_nonoverlapping(p, bytes.as_mut_ptr(), bits);
        u64::from_le_bytes(bytes)
    }
}
