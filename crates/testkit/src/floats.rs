//! MLX's modes of floats, by the definition of each number: slow, and written apart from what it is to check.

/// What a code stands for: a sign, bits of exponent and bits of fraction, with subnormal numbers below the smallest exponent.
fn number(code: u32, (exponent, fraction): (u32, u32)) -> f32 {
    let sign = if code >> (exponent + fraction) & 1 == 1 { -1.0 } else { 1.0 };
    let power = code >> fraction & ((1 << exponent) - 1);
    let part = (code & ((1 << fraction) - 1)) as f32 / (1 << fraction) as f32;
    let bias = (1 << (exponent - 1)) - 1;
    match power {
        0 => sign * part * 2_f32.powi(1 - bias),
        power => sign * (1.0 + part) * 2_f32.powi(power as i32 - bias),
    }
}

const E2M1: (u32, u32) = (2, 1);
const E4M3: (u32, u32) = (4, 3);

/// A mode: bits, group size, and the form of its codes.
fn mode(name: &str) -> (u32, usize, (u32, u32)) {
    match name {
        "mxfp4" => (4, 32, E2M1),
        "nvfp4" => (4, 16, E2M1),
        "mxfp8" => (8, 32, E4M3),
        other => panic!("{other} is no mode of floats"),
    }
}

/// What the byte of a scale stands for.
fn scale(name: &str, byte: u8) -> f32 {
    if name == "nvfp4" { number(u32::from(byte), E4M3) } else { 2_f32.powi(i32::from(byte) - 127) }
}

/// The index of the nearest of `numbers`, the first of two.
fn nearest(numbers: &[f32], to: f32) -> u8 {
    let gap = |i: &usize| (numbers[*i] - to).abs();
    (0..numbers.len()).min_by(|a, b| gap(a).total_cmp(&gap(b))).expect("numbers") as u8
}

/// Words and scales of a matrix whose rows are whole groups.
pub(crate) fn pack(values: &[f32], name: &str) -> (Vec<u32>, Vec<u8>) {
    let (bits, group, form) = mode(name);
    // The highest code of E4M3 is no number.
    let count = if bits == 8 { 127 } else { 8 };
    let numbers: Vec<f32> = (0..count).map(|code| number(code, form)).collect();
    let scales: Vec<f32> =
        (0..if name == "nvfp4" { 127 } else { 255 }).map(|byte| scale(name, byte)).collect();
    let (mut stream, mut levels) = (Vec::new(), Vec::new());
    for values in values.chunks(group) {
        let most = values.iter().fold(0_f32, |most, x| most.max(x.abs()));
        // The smallest with which the largest number of the group is in reach.
        let least = most / numbers[numbers.len() - 1];
        levels.push(scales.iter().position(|scale| *scale >= least).expect("a scale") as u8);
        let step = scales[usize::from(levels[levels.len() - 1])];
        for x in values {
            let code = nearest(&numbers, if step > 0.0 { x.abs() / step } else { 0.0 });
            stream.push(u32::from(code) | u32::from(x.is_sign_negative()) << (bits - 1));
        }
    }
    let in_word = (32 / bits) as usize;
    let word = |codes: &[u32]| codes.iter().zip(0..).fold(0, |word, (code, i)| word | code << (i * bits));
    (stream.chunks(in_word).map(word).collect(), levels)
}

/// The values of words and scales.
pub(crate) fn unpack(words: &[u32], scales: &[u8], name: &str) -> Vec<f32> {
    let (bits, group, form) = mode(name);
    let codes =
        words.iter().flat_map(|word| (0..32 / bits).map(move |i| word >> (i * bits) & ((1 << bits) - 1)));
    codes.enumerate().map(|(i, code)| number(code, form) * scale(name, scales[i / group])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_those_of_the_formats() {
        let all: Vec<f32> = (0..8).map(|code| number(code, E2M1)).collect();
        assert_eq!(all, [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]);
        assert_eq!(
            [1, 0x38, 0x7e, 0xfe].map(|code| number(code, E4M3)),
            [2_f32.powi(-9), 1.0, 448.0, -448.0]
        );
    }

    #[test]
    fn what_is_on_a_grid_comes_back() {
        for name in ["mxfp4", "nvfp4", "mxfp8"] {
            let values: Vec<f32> = (0..64).map(|i| (i as f32 * 1.7).sin() * 0.3).collect();
            let (words, scales) = pack(&values, name);
            let once = unpack(&words, &scales, name);
            let worst = values.iter().zip(&once).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst > 0.0 && worst < if name == "mxfp8" { 0.05 } else { 0.15 }, "{name}: {worst}");
            let (words, scales) = pack(&once, name);
            assert_eq!(unpack(&words, &scales, name), once, "{name}");
        }
    }
}
