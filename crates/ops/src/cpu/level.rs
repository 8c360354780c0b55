//! Runs kernels at a level of instructions.

use super::simd::Kernel;
use super::simd_portable::Portable;
use crate::{Level, cpu_level};

/// Instructions that this processor has: a level, with or without products of bf16. What has sizes or layouts that depend
/// on the instructions asks once and runs all its kernels with the answer, since another thread may choose another level
/// meanwhile.
#[derive(Clone, Copy)]
pub(crate) struct Instructions {
    level: Level,
    bf16: bool,
}

impl Instructions {
    /// Those in use.
    pub(crate) fn now() -> Instructions {
        Instructions { level: cpu_level(), bf16: false }
    }

    /// Those in use, and products of bf16 if the level has them.
    pub(crate) fn with_bf16() -> Instructions {
        let now = Instructions::now();
        #[cfg(target_arch = "x86_64")]
        let now = Instructions {
            bf16: now.level == Level::Avx512 && is_x86_feature_detected!("avx512bf16"),
            ..now
        };
        now
    }

    /// Whether they multiply bf16: a kernel has to know.
    pub(crate) fn bf16(self) -> bool {
        self.bf16
    }

    /// Runs a kernel with them.
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.level {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the processor has the instructions, as `with_bf16` found.
            Level::Avx512 if self.bf16 => unsafe { super::simd_x86::run_avx512_bf16(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the level in use is at most the best one, so the processor has the instructions.
            Level::Avx512 => unsafe { super::simd_x86::run_avx512(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::Avx2 => unsafe { super::simd_x86::run_avx2(kernel) },
            _ => kernel.run(Portable::new()),
        }
    }
}

/// Runs a kernel whose memory has one layout at every level, with the instructions in use.
pub(crate) fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    Instructions::now().run(kernel)
}
