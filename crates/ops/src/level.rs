//! Which instructions our CPU operations use: chosen at run time, since one binary has to run on every processor.

use std::str::FromStr;
use std::sync::atomic::{AtomicU8, Ordering};

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

impl FromStr for Level {
    type Err = String;

    /// `portable`, `avx2` or `avx512`.
    fn from_str(text: &str) -> Result<Level, String> {
        match text {
            "portable" => Ok(Level::Portable),
            "avx2" => Ok(Level::Avx2),
            "avx512" => Ok(Level::Avx512),
            other => Err(format!("expected `avx512`, `avx2` or `portable`, found `{other}`")),
        }
    }
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

/// Makes all operations that run from now on use at most `level`; levels round differently. What is running may finish at
/// the level it began with or go on at the new one.
pub fn set_cpu_level(level: Level) {
    CHOSEN.store(level.min(best_cpu_level()) as u8, Ordering::Relaxed);
}
