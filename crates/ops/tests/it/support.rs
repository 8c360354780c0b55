//! What the tests share: random arrays, both forms, every level.

use graft_ops::{Array, Dtype, Form, Level, Result, best_cpu_level, ffi, set_cpu_level, set_form};
use graft_testkit::{Tolerance, assert_close, wanted};

/// Runs a test on the array thread, at the level that the environment asks for.
pub(crate) fn mlx<T: Send>(test: impl FnOnce() -> T + Send) -> T {
    graft_testkit::mlx(|| {
        set_cpu_level(highest());
        test()
    })
}

/// The best level of this processor, or a lower one that `GRAFT_CPU` asks for.
fn highest() -> Level {
    wanted("GRAFT_CPU").unwrap_or(Level::Avx512).min(best_cpu_level())
}

/// Says on which account a test had nothing to do.
#[allow(clippy::print_stderr, reason = "a test that is skipped must not look like one that passed")]
pub(crate) fn skipped(why: &str) {
    eprintln!("skipped: {why}");
}

/// Normal numbers, the same for the same seed and shape.
pub(crate) fn random(seed: u64, shape: &[i32]) -> Array {
    let key = mlx_rs::random::key(seed).unwrap();
    let x = mlx_rs::random::normal::<f32>(shape, None, None, &key).unwrap();
    x.eval().unwrap();
    x
}

/// The values in memory.
pub(crate) fn values(x: &Array) -> Vec<f32> {
    let bytes = ffi::array_bytes(&x.as_dtype(Dtype::Float32).unwrap()).unwrap();
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// The same bits.
pub(crate) fn bits(x: &Array) -> Vec<u32> {
    values(x).into_iter().map(f32::to_bits).collect()
}

/// What `f` gives in MLX's form.
pub(crate) fn mlx_form<T>(f: impl Fn() -> T) -> T {
    set_form(Form::Mlx);
    let value = f();
    set_form(Form::Cpu);
    value
}

/// Runs `f` at every level that this processor has, up to the one that is asked for.
pub(crate) fn every_level(f: impl Fn(Level)) {
    for level in [Level::Portable, Level::Avx2, Level::Avx512] {
        if level <= highest() {
            set_cpu_level(level);
            f(level);
        }
    }
    set_cpu_level(highest());
}

/// The value of f(args) and its gradients by all args, if the loss is sum(weights * value) for some fixed weights.
pub(crate) fn with_gradients(args: &[Array], f: impl Fn(&[Array]) -> Result<Array>) -> Vec<Array> {
    let value = f(args).unwrap();
    let weights = random(99, value.shape());
    let wanted: Vec<i32> = (0..args.len() as i32).collect();
    let loss = |args: &[Array]| Ok(vec![f(args)?.multiply(&weights)?.sum(false)?]);
    let (_, gradients) = ffi::value_and_grad(loss, args, &wanted).unwrap();
    let all: Vec<Array> = [value].into_iter().chain(gradients).collect();
    mlx_rs::transforms::eval(&all).unwrap();
    all
}

/// Value and gradients in our form, at every level, against those in MLX's.
pub(crate) fn check(tolerance: Tolerance, args: &[Array], f: impl Fn(&[Array]) -> Result<Array>) {
    let expected = mlx_form(|| with_gradients(args, &f));
    every_level(|level| {
        for (i, (ours, theirs)) in with_gradients(args, &f).iter().zip(&expected).enumerate() {
            if let Err(e) = graft_testkit::close(ours, theirs, tolerance) {
                panic!(
                    "{level:?}, {}: {e}",
                    if i == 0 { "value".into() } else { format!("gradient {}", i - 1) }
                );
            }
        }
    });
}

/// Gradients against central differences in directions of their own, whose error falls with the square of the step.
pub(crate) fn check_differences(args: &[Array], f: impl Fn(&[Array]) -> Result<Array>) {
    let gradients = with_gradients(args, &f);
    let weights = random(99, gradients[0].shape());
    let loss = |args: &[Array]| -> f64 {
        let y = f(args).unwrap();
        values(&y).iter().zip(values(&weights)).map(|(y, w)| f64::from(*y) * f64::from(w)).sum()
    };
    for (i, gradient) in gradients[1..].iter().enumerate() {
        let direction = random(7 + i as u64, args[i].shape());
        let step = 1e-2;
        let moved = |by: f32| {
            let mut args = args.to_vec();
            args[i] = args[i].add(direction.multiply(Array::from_f32(by)).unwrap()).unwrap();
            loss(&args)
        };
        let measured = (moved(step) - moved(-step)) / (2.0 * f64::from(step));
        let along: f64 =
            values(gradient).iter().zip(values(&direction)).map(|(g, d)| f64::from(*g) * f64::from(d)).sum();
        let (measured, along) = (Array::from_f32(measured as f32), Array::from_f32(along as f32));
        assert_close(&along, &measured, graft_testkit::tolerance::FINITE_DIFFERENCE);
    }
}
