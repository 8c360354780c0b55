//! Which form the operations take, and how many threads they use.

use std::sync::atomic::{AtomicU8, Ordering};

/// The form of the operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Our own CPU operations, for the types they know; MLX's operations for the others.
    Cpu,
    /// Plain MLX operations only, which also run on a GPU.
    Mlx,
}

const UNSET: u8 = 0;
const CPU: u8 = 1;
const MLX: u8 = 2;

static FORM: AtomicU8 = AtomicU8::new(UNSET);

/// The form in use: [`Form::Cpu`] where our CPU operations are compiled in, unless [`set_form`] chose otherwise.
pub fn form() -> Form {
    match FORM.load(Ordering::Relaxed) {
        CPU => Form::Cpu,
        MLX => Form::Mlx,
        _ if cfg!(graft_cpu) => Form::Cpu,
        _ => Form::Mlx,
    }
}

/// Chooses the form of all operations built from now on. Without CPU operations compiled in, the form stays [`Form::Mlx`].
pub fn set_form(form: Form) {
    let value = match form {
        Form::Cpu if cfg!(graft_cpu) => CPU,
        Form::Cpu | Form::Mlx => MLX,
    };
    FORM.store(value, Ordering::Relaxed);
}

/// How our CPU operations multiply. MLX's form follows the types of its arrays instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Precision {
    /// f32 throughout.
    F32,
    /// Products of many rows round both sides to bf16 and sum in f32, where the processor has instructions for that.
    Bf16,
    /// Products with weights laid out by [`crate::arrange`] round the other side to 16 bits by block, and sum blocks in
    /// integers, then in f32; all others are f32, so that a prompt is read as its answer is written. For inference only:
    /// such weights have no gradient.
    Int16,
}

static PRECISION: AtomicU8 = AtomicU8::new(0);

/// The precision in use: [`Precision::F32`] unless [`set_precision`] chose another.
pub fn precision() -> Precision {
    match PRECISION.load(Ordering::Relaxed) {
        1 => Precision::Bf16,
        2 => Precision::Int16,
        _ => Precision::F32,
    }
}

/// Chooses the precision of all operations built from now on.
pub fn set_precision(precision: Precision) {
    PRECISION.store(precision as u8, Ordering::Relaxed);
}

/// Builds some operations with another precision than the one in use.
pub fn with_precision<T>(precision: Precision, build: impl FnOnce() -> T) -> T {
    struct Back(u8);
    impl Drop for Back {
        fn drop(&mut self) {
            PRECISION.store(self.0, Ordering::Relaxed);
        }
    }
    let _back = Back(PRECISION.swap(precision as u8, Ordering::Relaxed));
    build()
}

/// Whether an operation on these floats takes our CPU form, which knows f32 alone.
#[cfg(graft_cpu)]
pub(crate) fn on_cpu(arrays: &[&crate::Array]) -> bool {
    form() == Form::Cpu && arrays.iter().all(|array| array.dtype() == crate::Dtype::Float32)
}

/// Settles how the process takes memory for arrays on a CPU: once, before there are any. Small ones share one heap, those of
/// 8 MB and more go back to the system when they are freed. Nothing where our CPU operations are not compiled in.
pub fn set_allocator() {
    #[cfg(graft_cpu)]
    crate::cpu::primitive::set_allocator();
}
