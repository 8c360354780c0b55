//! The one thread on which tests touch arrays, and which form of the operations they should ask for.
//!
//! MLX keeps streams and pending graphs by thread, and evaluation recurses through a graph, so tests use a single long
//! lived thread with a large stack instead of the short ones of the test harness.

use std::fmt::Debug;
use std::str::FromStr;
use std::sync::{Mutex, OnceLock, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

const STACK_BYTES: usize = 256 << 20;

static ARRAY_THREAD: OnceLock<ThreadPool> = OnceLock::new();
static TURN: Mutex<()> = Mutex::new(());

/// Runs `f` on the array thread and returns its value; a panic of `f` goes on in the caller.
///
/// A call from the array thread itself just runs `f`.
pub fn mlx<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    // A pool of one thread is a thread with a stack size, borrowed closures and panics that travel, without unsafe code.
    let pool = ARRAY_THREAD.get_or_init(|| {
        let builder = ThreadPoolBuilder::new().num_threads(1).stack_size(STACK_BYTES);
        builder.thread_name(|_| "arrays".to_owned()).build().expect("the array thread starts")
    });
    if pool.current_thread_index().is_some() {
        return f();
    }
    // One test at a time: a worker that waits for another pool would otherwise begin the next test on top of this one.
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    pool.install(f)
}

/// Whether the tests should run with plain MLX operations: `GRAFT_OPS=mlx`.
pub fn wanted_form_is_mlx() -> bool {
    std::env::var("GRAFT_OPS").is_ok_and(|v| v == "mlx")
}

/// What the environment asks for: `GRAFT_CPU=avx2` for a level of instructions, which each crate's tests choose where they
/// choose the form.
pub fn wanted<T: FromStr<Err: Debug>>(variable: &str) -> Option<T> {
    let text = std::env::var(variable).ok().filter(|text| !text.is_empty())?;
    Some(text.parse().unwrap_or_else(|e| panic!("{variable}: {e:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_back_and_nesting_is_allowed() {
        let text = String::from("borrowed");
        assert_eq!(mlx(|| mlx(|| text.len())), 8);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_thread_survives() {
        let caught = std::panic::catch_unwind(|| mlx(|| panic!("from the array thread")));
        assert_eq!(*caught.unwrap_err().downcast::<&str>().unwrap(), "from the array thread");
        assert_eq!(mlx(|| 3), 3);
    }

    #[test]
    fn every_call_runs_on_the_same_thread() {
        let ids: Vec<_> =
            (0..4).map(|_| std::thread::spawn(|| mlx(|| std::thread::current().id()))).collect();
        let mut ids: Vec<_> = ids.into_iter().map(|t| t.join().unwrap()).collect();
        ids.dedup();
        assert_eq!(ids.len(), 1);
    }
}
