//! Takes the SONAME out of a shared library, so that the linker records the path it was given instead.
//!
//! A program linked against such a library by its absolute path finds it at run time by that path, with no rpath.
//! An rpath would have to come from `rustflags`, which `RUSTFLAGS` in the environment replaces silently.

use anyhow::{Context, Result, ensure};

const PT_DYNAMIC: u64 = 2;
const DT_NULL: u64 = 0;
const DT_SONAME: u64 = 14;

/// Removes DT_SONAME from the dynamic section of a 64-bit little-endian ELF file, in place.
pub(crate) fn remove_soname(file: &mut [u8]) -> Result<()> {
    ensure!(file.get(..6) == Some(b"\x7fELF\x02\x01"), "not a 64-bit little-endian ELF file");
    let headers = word(file, 32, 8)?;
    let (size, count) = (word(file, 54, 2)?, word(file, 56, 2)?);
    for header in (0..count).map(|i| headers + i * size) {
        if word(file, header, 4)? != PT_DYNAMIC {
            continue;
        }
        let (start, bytes) = (word(file, header + 8, 8)?, word(file, header + 32, 8)?);
        let end = start + bytes;
        let mut at = start;
        while at < end && word(file, at, 8)? != DT_NULL {
            if word(file, at, 8)? == DT_SONAME {
                // The table ends at the first DT_NULL: what follows moves up by one entry of 16 bytes.
                file.copy_within(at as usize + 16..end as usize, at as usize);
                file[end as usize - 16..end as usize].fill(0);
                return Ok(());
            }
            at += 16;
        }
    }
    Ok(())
}

fn word(file: &[u8], at: u64, bytes: usize) -> Result<u64> {
    let at = usize::try_from(at)?;
    let slice =
        at.checked_add(bytes).and_then(|end| file.get(at..end)).context("the ELF file is cut short")?;
    Ok(slice.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
}
