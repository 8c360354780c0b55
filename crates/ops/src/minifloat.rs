//! Floats of four and eight bits, as MLX's modes mxfp4, nvfp4 and mxfp8 pack weights and scales: what each stands for, and
//! which is nearest to a number.

/// What the codes of E2M1 stand for: sign, two bits of exponent, one of fraction.
pub const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];
/// The largest number of E2M1.
pub const E2M1_MAX: f32 = 6.0;
/// The largest number of E4M3.
pub const E4M3_MAX: f32 = 448.0;

/// 2^120: what an E4M3's bits in the place of an f32's exponent and fraction lack.
pub(crate) const E4M3_SHIFT: f32 = f32::from_bits(247 << 23);

/// E4M3: sign, four bits of exponent, three of fraction. The highest code of each sign, which means NaN and which nothing writes,
/// is 480 here as it is in MLX.
#[inline]
pub fn e4m3(code: u8) -> f32 {
    f32::from_bits(u32::from(code & 0x7f) << 20 | u32::from(code & 0x80) << 24) * E4M3_SHIFT
}

/// E8M0, a power of two: 2^(code - 127). The highest code is infinite here as it is in MLX.
#[inline]
pub fn e8m0(code: u8) -> f32 {
    // 2^-127 has no exponent of its own in f32.
    f32::from_bits(if code == 0 { 1 << 22 } else { u32::from(code) << 23 })
}

/// The code of E8M0 for a power of two: the exponent of `x`, rounded down where it is none.
#[inline]
pub fn to_e8m0(x: f32) -> u8 {
    (x.to_bits() >> 23) as u8
}

/// The code of E2M1 nearest to `x`, of two the even one; beyond the largest number the largest, and for NaN.
#[inline]
pub fn to_e2m1(x: f32) -> u8 {
    let magnitude = x.abs();
    let above = |border: f32| u8::from(magnitude > border);
    let reaches = |border: f32| u8::from(magnitude >= border);
    // Codes 1, 3, 5 and 7 are odd: the border below them belongs to their lower neighbour.
    let code =
        above(0.25) + reaches(0.75) + above(1.25) + reaches(1.75) + above(2.5) + reaches(3.5) + above(5.0);
    if x.is_nan() { 7 } else { code | u8::from(x.is_sign_negative()) << 3 }
}

/// The code of E4M3 nearest to `x`, of two the even one; beyond the largest number the largest, and for NaN.
#[inline]
pub fn to_e4m3(x: f32) -> u8 {
    let sign = u8::from(x.is_sign_negative()) << 7;
    let magnitude = x.abs();
    if magnitude.is_nan() || magnitude >= E4M3_MAX {
        return sign | 0x7e;
    }
    // Below 2^-6 the step stays 2^-9: a sum with 2^14, whose last bit that is, rounds to it.
    const LIFT: f32 = 16384.0;
    if magnitude < 0.015_625 {
        return sign | ((magnitude + LIFT).to_bits() - LIFT.to_bits()) as u8;
    }
    let bits = magnitude.to_bits();
    let rounded = bits - (120 << 23) + 0x7_ffff + (bits >> 20 & 1);
    sign | ((rounded >> 20) as u8).min(0x7e)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_its_own_nearest_and_borders_go_to_the_even_code() {
        for code in 0..16_u8 {
            assert_eq!(to_e2m1(E2M1[usize::from(code)]), code);
        }
        for code in (0..=255_u8).filter(|code| code & 0x7f != 0x7f) {
            assert_eq!(to_e4m3(e4m3(code)), code);
        }
        for (code, numbers) in (0_u8..).zip(E2M1[..8].windows(2)) {
            let middle = (numbers[0] + numbers[1]) / 2.0;
            assert_eq!(to_e2m1(middle), code + code % 2, "{middle}");
            assert_eq!(to_e2m1(-middle * 1.001), (code + 1) | 8, "{middle}");
        }
        for code in 0..0x7e_u8 {
            let middle = (e4m3(code) + e4m3(code + 1)) / 2.0;
            assert_eq!(to_e4m3(middle), code + code % 2, "{middle}");
            assert_eq!(to_e4m3(-middle * 1.001), (code + 1) | 0x80, "{middle}");
        }
        assert_eq!([to_e2m1(1e9), to_e4m3(1e9), to_e4m3(460.0)], [7, 0x7e, 0x7e]);
        assert_eq!([e8m0(0), e8m0(127), e8m0(130)], [2.0_f32.powi(-127), 1.0, 8.0]);
        assert!((0..=255_u8).all(|code| to_e8m0(e8m0(code)) == code));
    }
}
