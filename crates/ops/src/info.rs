//! What this build runs on: for `graft doctor` and for bug reports.

use std::ffi::CStr;
use std::time::Instant;

use mlx_rs::{Array, Dtype, ops};

use crate::{Form, Result, form, threads};

/// What the operations of this process use.
#[derive(Clone, Debug)]
pub struct Info {
    /// MLX's version.
    pub mlx_version: String,
    /// The form in use.
    pub form: Form,
    /// Whether our CPU operations are compiled in.
    pub cpu_operations: bool,
    /// Features of this processor that our operations know.
    pub cpu_features: Vec<&'static str>,
    /// Threads of the pool.
    pub threads: usize,
}

/// How fast MLX multiplies dense matrices.
#[derive(Clone, Debug)]
pub struct BlasTest {
    /// Measured on a square f32 product, in 10^9 floating-point operations per second.
    pub gflops: f64,
    /// The file that provides `cblas_sgemm`, where the system can tell.
    pub origin: Option<String>,
}

/// What the operations of this process use.
pub fn info() -> Info {
    Info {
        mlx_version: mlx_version(),
        form: form(),
        cpu_operations: cfg!(graft_cpu),
        cpu_features: cpu_features(),
        threads: threads(),
    }
}

fn mlx_version() -> String {
    // SAFETY: a fresh string that MLX fills, read while it lives and freed once.
    unsafe {
        let mut text = mlx_sys::mlx_string_new();
        let status = mlx_sys::mlx_version(&mut text);
        let data = mlx_sys::mlx_string_data(text);
        let version = if status == 0 && !data.is_null() {
            CStr::from_ptr(data).to_string_lossy().into_owned()
        } else {
            "unknown".into()
        };
        mlx_sys::mlx_string_free(text);
        version
    }
}

fn cpu_features() -> Vec<&'static str> {
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        let known = [
            ("avx2", is_x86_feature_detected!("avx2")),
            ("fma", is_x86_feature_detected!("fma")),
            ("f16c", is_x86_feature_detected!("f16c")),
            ("avx512f", is_x86_feature_detected!("avx512f")),
            ("avx512bw", is_x86_feature_detected!("avx512bw")),
            ("avx512vnni", is_x86_feature_detected!("avx512vnni")),
            ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
        ];
        found.extend(known.iter().filter(|(_, present)| *present).map(|(name, _)| *name));
    }
    #[cfg(target_arch = "aarch64")]
    found.push("neon");
    found
}

/// Times an f32 matrix product of MLX's and says where its BLAS comes from.
pub fn blas_test() -> Result<BlasTest> {
    #[cfg(graft_cpu)]
    std::hint::black_box(crate::blas::linked());
    const SIZE: i32 = 1024;
    let a = ops::ones_dtype(&[SIZE, SIZE], Dtype::Float32)?;
    let b = ops::full::<f32>(&[SIZE, SIZE], Array::from_f32(0.5))?;
    let product = ops::matmul(&a, &b)?;
    product.eval()?;
    // The best of a few, since the first runs also wake threads and touch memory.
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let product = ops::matmul(&a, &b)?;
        let begin = Instant::now();
        product.eval()?;
        best = best.min(begin.elapsed().as_secs_f64());
    }
    let operations = 2.0 * f64::from(SIZE).powi(3);
    Ok(BlasTest { gflops: operations / best / 1e9, origin: symbol_origin(c"cblas_sgemm") })
}

/// The file in which the symbol that the dynamic linker would bind lives.
fn symbol_origin(symbol: &CStr) -> Option<String> {
    // SAFETY: looks a name up in what is loaded already; `found` is only read after dladdr has said it is filled.
    unsafe {
        let address = libc::dlsym(libc::RTLD_DEFAULT, symbol.as_ptr());
        if address.is_null() {
            return None;
        }
        let mut found: libc::Dl_info = std::mem::zeroed();
        if libc::dladdr(address, &mut found) == 0 || found.dli_fname.is_null() {
            return None;
        }
        Some(CStr::from_ptr(found.dli_fname).to_string_lossy().into_owned())
    }
}
