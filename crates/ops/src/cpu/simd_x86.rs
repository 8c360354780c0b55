//! The vector operations in AVX-512 and in AVX2 with FMA.
#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "SAFETY, the same for every block: a value of these types exists only inside `run_avx512` and `run_avx2`, \
              whose callers have found the instructions; pointers are valid by the promises of `Simd`"
)]

use std::arch::x86_64::*;

use super::simd::{Kernel, Simd, Tile, eight_codes, tile};

/// AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

/// AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

/// # Safety
/// The processor must have the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512(()))
}

/// # Safety
/// The processor must have the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
pub(super) unsafe fn run_avx512_bf16<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512(()))
}

/// # Safety
/// The processor must have the instructions.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx2(()))
}

impl Simd for Avx512 {
    type V = __m512;
    type I = __m512i;
    type Block = [__m512; 2];
    const LANES: usize = 16;
    const LARGE_ROWS: usize = 12;
    const SMALL_ROWS: usize = 8;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m512) {
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn times_power_of_two(self, a: __m512, n: __m512) -> __m512 {
        unsafe { _mm512_scalef_ps(a, n) }
    }
    #[inline(always)]
    fn where_at_least(self, x: __m512, limit: __m512, value: __m512) -> __m512 {
        unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, limit), value) }
    }
    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        unsafe {
            let halves = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            sum8(halves)
        }
    }
    #[inline(always)]
    fn largest(self, a: __m512) -> f32 {
        unsafe { _mm512_reduce_max_ps(a) }
    }

    #[inline(always)]
    fn splat_int(self, x: u32) -> __m512i {
        unsafe { _mm512_set1_epi32(x as i32) }
    }
    #[inline(always)]
    unsafe fn gather(self, p: *const u32, stride: usize) -> __m512i {
        unsafe {
            let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            let at = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(stride as i32));
            _mm512_i32gather_epi32::<4>(at, p.cast())
        }
    }
    #[inline(always)]
    fn shift_right(self, a: __m512i, by: u32) -> __m512i {
        unsafe { _mm512_srl_epi32(a, _mm_cvtsi32_si128(by as i32)) }
    }
    #[inline(always)]
    fn shift_left(self, a: __m512i, by: u32) -> __m512i {
        unsafe { _mm512_sll_epi32(a, _mm_cvtsi32_si128(by as i32)) }
    }
    #[inline(always)]
    fn and(self, a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_and_si512(a, b) }
    }
    #[inline(always)]
    fn or(self, a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    fn as_float(self, a: __m512i) -> __m512 {
        unsafe { _mm512_castsi512_ps(a) }
    }
    #[inline(always)]
    fn pick(self, table: &[f32; 16], a: __m512i) -> __m512 {
        // A permutation looks at the lowest four bits of each index alone.
        unsafe { _mm512_permutexvar_ps(a, _mm512_loadu_ps(table.as_ptr())) }
    }
    #[inline(always)]
    fn to_float(self, a: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(a) }
    }
    #[inline(always)]
    unsafe fn codes(self, p: *const u8, bits: usize, end: *const u8) -> __m512i {
        unsafe {
            match bits {
                4 => {
                    let words = p.cast::<[i32; 2]>().read_unaligned();
                    let low = _mm512_castsi256_si512(_mm256_set1_epi32(words[0]));
                    let both = _mm512_inserti64x4::<1>(low, _mm256_set1_epi32(words[1]));
                    let by = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
                    _mm512_and_si512(_mm512_srlv_epi32(both, by), _mm512_set1_epi32(15))
                }
                8 => _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())),
                _ => {
                    let low = _mm512_castsi256_si512(eight_words(eight_codes(p, bits, end), bits));
                    let high = eight_words(eight_codes(p.add(bits), bits, end), bits);
                    _mm512_inserti64x4::<1>(low, high)
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn block4(self, p: *const u8, s: f32, b: f32) -> [__m512; 2] {
        unsafe {
            let places = _mm512_setr_ps(0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.);
            // The 16 weights that the group can have; a permutation looks at the lowest four bits of each index alone.
            let weights = _mm512_fmadd_ps(places, _mm512_set1_ps(s), _mm512_set1_ps(b));
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
            [
                _mm512_permutexvar_ps(bytes, weights),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), weights),
            ]
        }
    }
    #[inline(always)]
    unsafe fn block8(self, p: *const u8, s: f32, b: f32) -> [__m512; 2] {
        unsafe {
            let (s, b) = (_mm512_set1_ps(s), _mm512_set1_ps(b));
            let first = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
            let second = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.add(16).cast()));
            [
                _mm512_fmadd_ps(_mm512_cvtepi32_ps(first), s, b),
                _mm512_fmadd_ps(_mm512_cvtepi32_ps(second), s, b),
            ]
        }
    }
    #[inline(always)]
    unsafe fn block32(self, p: *const f32) -> [__m512; 2] {
        unsafe { [_mm512_loadu_ps(p), _mm512_loadu_ps(p.add(16))] }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> __m512 {
        unsafe {
            let halves = _mm256_loadu_si256(p.cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
        }
    }
    #[inline(always)]
    fn widen_f16(self, from: &[u16], to: &mut [f32]) {
        Avx2(()).widen_f16(from, to);
    }

    #[inline(always)]
    unsafe fn turn(self, from: *const f32, row: usize, to: *mut f32, to_row: usize) {
        unsafe { turn(from, row, to, to_row) }
    }
    #[inline(always)]
    unsafe fn large_tile(self, t: Tile) {
        unsafe { tile::<Avx512, 12, 2>(self, Tile { a_row: 1, a_k: 12, b_k: 32, ..t }) }
    }
    #[inline(always)]
    unsafe fn narrow_tile(self, t: Tile) {
        unsafe { tile::<Avx512, 12, 1>(self, Tile { a_row: 1, a_k: 12, b_k: 16, ..t }) }
    }
    #[inline(always)]
    unsafe fn small_tile(self, t: Tile) {
        unsafe { tile::<Avx512, 8, 2>(self, t) }
    }

    #[inline(always)]
    unsafe fn pair_columns(self, even: *const f32, odd: *const f32, to: *mut u32) {
        unsafe {
            let both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(odd), _mm512_loadu_ps(even));
            // The even row is in the lower half, the odd one in the upper: each column's two come together.
            let places = _mm512_set_epi16(
                31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
                3, 18, 2, 17, 1, 16, 0,
            );
            _mm512_storeu_si512(
                to.cast(),
                _mm512_permutexvar_epi16(places, std::mem::transmute::<__m512bh, __m512i>(both)),
            );
        }
    }
    #[inline(always)]
    unsafe fn pair_neighbours(self, from: *const f32, to: *mut u32) {
        unsafe {
            let halves = _mm512_cvtneps_pbh(_mm512_loadu_ps(from));
            _mm256_storeu_si256(to.cast(), std::mem::transmute::<__m256bh, __m256i>(halves));
        }
    }
    #[inline(always)]
    unsafe fn pair_tile<const NARROW: bool>(self, t: Tile) {
        unsafe {
            if NARROW {
                pair_tile::<12, 1>(Tile { a_row: 1, a_k: 12, b_k: 16, ..t });
            } else {
                pair_tile::<12, 2>(Tile { a_row: 1, a_k: 12, b_k: 32, ..t });
            }
        }
    }
}

/// [`Simd::turn`].
#[inline(always)]
unsafe fn turn(from: *const f32, row: usize, to: *mut f32, to_row: usize) {
    unsafe {
        let (a, b) = (_mm_loadu_ps(from), _mm_loadu_ps(from.add(row)));
        let (c, d) = (_mm_loadu_ps(from.add(2 * row)), _mm_loadu_ps(from.add(3 * row)));
        let (ab, cd) = (_mm_unpacklo_ps(a, b), _mm_unpacklo_ps(c, d));
        _mm_storeu_ps(to, _mm_movelh_ps(ab, cd));
        _mm_storeu_ps(to.add(to_row), _mm_movehl_ps(cd, ab));
        let (ab, cd) = (_mm_unpackhi_ps(a, b), _mm_unpackhi_ps(c, d));
        _mm_storeu_ps(to.add(2 * to_row), _mm_movelh_ps(ab, cd));
        _mm_storeu_ps(to.add(3 * to_row), _mm_movehl_ps(cd, ab));
    }
}

/// As [`tile`], for words that are pairs of bf16.
#[inline(always)]
unsafe fn pair_tile<const R: usize, const N: usize>(t: Tile) {
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); N]; R];
        let (mut a, mut b) = (t.a.cast::<i32>(), t.b);
        for _ in 0..t.k {
            let mut row = [_mm512_setzero_si512(); N];
            for (j, v) in row.iter_mut().enumerate() {
                *v = _mm512_loadu_si512(b.add(j * 16).cast());
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let x = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(*a.add(i * t.a_row)));
                for (sum, &v) in sums.iter_mut().zip(&row) {
                    *sum = _mm512_dpbf16_ps(*sum, x, std::mem::transmute::<__m512i, __m512bh>(v));
                }
            }
            a = a.add(t.a_k);
            b = b.add(t.b_k);
        }
        for (i, sums) in sums.iter().enumerate() {
            for (j, &sum) in sums.iter().enumerate() {
                let c = t.c.add(i * t.c_row + j * 16);
                _mm512_storeu_ps(c, if t.add { _mm512_add_ps(_mm512_loadu_ps(c), sum) } else { sum });
            }
        }
    }
}

/// Eight codes of `bits` bits, one after another in `word`, as words.
#[inline(always)]
unsafe fn eight_words(word: u64, bits: usize) -> __m256i {
    unsafe {
        let b = bits as i64;
        let by = _mm512_setr_epi64(0, b, 2 * b, 3 * b, 4 * b, 5 * b, 6 * b, 7 * b);
        let codes = _mm512_srlv_epi64(_mm512_set1_epi64(word as i64), by);
        _mm512_cvtepi64_epi32(_mm512_and_si512(codes, _mm512_set1_epi64((1 << b) - 1)))
    }
}

/// scale * code + bias
#[inline(always)]
unsafe fn weights8(codes: __m256i, (scale, bias): (__m256, __m256)) -> __m256 {
    unsafe { _mm256_fmadd_ps(_mm256_cvtepi32_ps(codes), scale, bias) }
}

/// Eight bytes as words.
#[inline(always)]
unsafe fn bytes8(p: *const u8) -> __m256i {
    unsafe { _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())) }
}

#[inline(always)]
unsafe fn sum8(a: __m256) -> f32 {
    unsafe {
        let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
        _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps::<1>(a, a)))
    }
}

impl Simd for Avx2 {
    type V = __m256;
    type I = __m256i;
    type Block = [__m256; 4];
    const LANES: usize = 8;
    const LARGE_ROWS: usize = 6;
    const SMALL_ROWS: usize = 4;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m256) {
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_min_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn times_power_of_two(self, a: __m256, n: __m256) -> __m256 {
        unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)))
        }
    }
    #[inline(always)]
    fn where_at_least(self, x: __m256, limit: __m256, value: __m256) -> __m256 {
        unsafe { _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(x, limit), value) }
    }
    #[inline(always)]
    fn sum(self, a: __m256) -> f32 {
        unsafe { sum8(a) }
    }
    #[inline(always)]
    fn largest(self, a: __m256) -> f32 {
        unsafe {
            let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_max_ss(a, _mm_shuffle_ps::<1>(a, a)))
        }
    }

    #[inline(always)]
    fn splat_int(self, x: u32) -> __m256i {
        unsafe { _mm256_set1_epi32(x as i32) }
    }
    #[inline(always)]
    unsafe fn gather(self, p: *const u32, stride: usize) -> __m256i {
        unsafe {
            let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let at = _mm256_mullo_epi32(lanes, _mm256_set1_epi32(stride as i32));
            _mm256_i32gather_epi32::<4>(p.cast(), at)
        }
    }
    #[inline(always)]
    fn shift_right(self, a: __m256i, by: u32) -> __m256i {
        unsafe { _mm256_srl_epi32(a, _mm_cvtsi32_si128(by as i32)) }
    }
    #[inline(always)]
    fn shift_left(self, a: __m256i, by: u32) -> __m256i {
        unsafe { _mm256_sll_epi32(a, _mm_cvtsi32_si128(by as i32)) }
    }
    #[inline(always)]
    fn and(self, a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_and_si256(a, b) }
    }
    #[inline(always)]
    fn or(self, a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_or_si256(a, b) }
    }
    #[inline(always)]
    fn as_float(self, a: __m256i) -> __m256 {
        unsafe { _mm256_castsi256_ps(a) }
    }
    #[inline(always)]
    fn pick(self, table: &[f32; 16], a: __m256i) -> __m256 {
        unsafe {
            let (low, high) = (_mm256_loadu_ps(table.as_ptr()), _mm256_loadu_ps(table.as_ptr().add(8)));
            // A permutation looks at the lowest three bits of each index, the choice between two at a sign.
            let fourth = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(a));
            _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, a), _mm256_permutevar8x32_ps(high, a), fourth)
        }
    }
    #[inline(always)]
    fn to_float(self, a: __m256i) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(a) }
    }
    #[inline(always)]
    unsafe fn codes(self, p: *const u8, bits: usize, end: *const u8) -> __m256i {
        unsafe {
            match bits {
                4 => {
                    let word = _mm256_set1_epi32(p.cast::<i32>().read_unaligned());
                    let by = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
                    _mm256_and_si256(_mm256_srlv_epi32(word, by), _mm256_set1_epi32(15))
                }
                8 => bytes8(p),
                _ => {
                    let b = bits as i64;
                    let word = _mm256_set1_epi64x(eight_codes(p, bits, end) as i64);
                    let mask = _mm256_set1_epi64x((1 << b) - 1);
                    let low = _mm256_srlv_epi64(word, _mm256_setr_epi64x(0, b, 2 * b, 3 * b));
                    let high = _mm256_srlv_epi64(word, _mm256_setr_epi64x(4 * b, 5 * b, 6 * b, 7 * b));
                    let (low, high) = (_mm256_and_si256(low, mask), _mm256_and_si256(high, mask));
                    // The even words of both, low before high in each half, then the middle quarters exchanged.
                    let mixed = _mm256_shuffle_ps::<0b10_00_10_00>(
                        _mm256_castsi256_ps(low),
                        _mm256_castsi256_ps(high),
                    );
                    _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_castps_si256(mixed))
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn block4(self, p: *const u8, s: f32, b: f32) -> [__m256; 4] {
        unsafe {
            let levels = (_mm256_set1_ps(s), _mm256_set1_ps(b));
            let (first, second) = (bytes8(p), bytes8(p.add(8)));
            let low = _mm256_set1_epi32(15);
            [
                weights8(_mm256_and_si256(first, low), levels),
                weights8(_mm256_and_si256(second, low), levels),
                weights8(_mm256_srli_epi32::<4>(first), levels),
                weights8(_mm256_srli_epi32::<4>(second), levels),
            ]
        }
    }
    #[inline(always)]
    unsafe fn block8(self, p: *const u8, s: f32, b: f32) -> [__m256; 4] {
        unsafe {
            let levels = (_mm256_set1_ps(s), _mm256_set1_ps(b));
            [
                weights8(bytes8(p), levels),
                weights8(bytes8(p.add(8)), levels),
                weights8(bytes8(p.add(16)), levels),
                weights8(bytes8(p.add(24)), levels),
            ]
        }
    }
    #[inline(always)]
    unsafe fn block32(self, p: *const f32) -> [__m256; 4] {
        unsafe { [self.load(p), self.load(p.add(8)), self.load(p.add(16)), self.load(p.add(24))] }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> __m256 {
        unsafe {
            let halves = _mm_loadu_si128(p.cast());
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
        }
    }
    #[inline(always)]
    fn widen_f16(self, from: &[u16], to: &mut [f32]) {
        let n = from.len().min(to.len());
        let whole = n / 8 * 8;
        for at in (0..whole).step_by(8) {
            unsafe {
                let bits = _mm_loadu_si128(from.as_ptr().add(at).cast());
                _mm256_storeu_ps(to.as_mut_ptr().add(at), _mm256_cvtph_ps(bits));
            }
        }
        for at in whole..n {
            to[at] = unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(from[at])))) };
        }
    }

    #[inline(always)]
    unsafe fn turn(self, from: *const f32, row: usize, to: *mut f32, to_row: usize) {
        unsafe { turn(from, row, to, to_row) }
    }
    #[inline(always)]
    unsafe fn large_tile(self, t: Tile) {
        unsafe { tile::<Avx2, 6, 2>(self, Tile { a_row: 1, a_k: 6, b_k: 16, ..t }) }
    }
    #[inline(always)]
    unsafe fn narrow_tile(self, t: Tile) {
        unsafe { tile::<Avx2, 6, 1>(self, Tile { a_row: 1, a_k: 6, b_k: 8, ..t }) }
    }
    #[inline(always)]
    unsafe fn small_tile(self, t: Tile) {
        unsafe { tile::<Avx2, 4, 2>(self, t) }
    }
}
