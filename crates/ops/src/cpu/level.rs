//! Which instructions the kernels use: chosen at run time, since one binary has to run on every processor.

use std::sync::atomic::{AtomicU8, Ordering};

use super::simd::Kernel;
use super::simd_portable::Portable;

/// Instructions that the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What every processor of the architecture has.
    Portable,
    /// AVX2, FMA and F16C on x86-64.
    Avx2,
    /// AVX-512 (F, BW, DQ, VL) on x86-64.
    Avx512,
}

static CHOSEN: AtomicU8 = AtomicU8::new(u8::MAX);

/// The best level of this processor.
pub fn best_cpu_level() -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        if avx2 && avx512 {
            return Level::Avx512;
        }
        if avx2 {
            return Level::Avx2;
        }
    }
    Level::Portable
}

/// The level in use: the best one unless [`set_cpu_level`] chose a lower.
pub fn cpu_level() -> Level {
    match CHOSEN.load(Ordering::Relaxed) {
        0 => Level::Portable,
        1 => Level::Avx2,
        2 => Level::Avx512,
        _ => {
            let best = best_cpu_level();
            CHOSEN.store(best as u8, Ordering::Relaxed);
            best
        }
    }
}

/// Makes all operations use at most `level`, so that tests reach every one; levels round differently.
pub fn set_cpu_level(level: Level) {
    CHOSEN.store(level.min(best_cpu_level()) as u8, Ordering::Relaxed);
}

/// Whether the level in use multiplies bf16.
pub(crate) fn has_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return cpu_level() == Level::Avx512 && is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Runs a kernel that multiplies bf16 if [`has_bf16`], else one that does not: it has to know which it is.
pub(crate) fn dispatch_bf16<K: Kernel>(kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    if has_bf16() {
        // SAFETY: the processor has the instructions.
        return unsafe { super::simd_x86::run_avx512_bf16(kernel) };
    }
    dispatch(kernel)
}

/// Runs a kernel at the level in use.
pub(crate) fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    match cpu_level() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level in use is at most the best one, so the processor has the instructions.
        Level::Avx512 => unsafe { super::simd_x86::run_avx512(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2 => unsafe { super::simd_x86::run_avx2(kernel) },
        _ => kernel.run(Portable::new()),
    }
}
