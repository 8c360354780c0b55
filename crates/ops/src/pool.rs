//! The one thread pool of the process. MLX runs a CPU stream on one thread; our operations spread each call over this pool.

use std::sync::{Arc, OnceLock, RwLock};

use rayon::{ThreadPool, ThreadPoolBuilder};

static POOL: OnceLock<RwLock<Option<Arc<ThreadPool>>>> = OnceLock::new();

fn cores() -> usize {
    // Counts the cores this process may use: affinity and cgroup quota included.
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn build(threads: usize) -> Option<Arc<ThreadPool>> {
    let builder = ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("graft-ops-{i}"));
    builder.build().ok().map(Arc::new)
}

fn slot() -> &'static RwLock<Option<Arc<ThreadPool>>> {
    POOL.get_or_init(|| RwLock::new(build(cores())))
}

/// The pool, or `None` if the system gave us no threads, in which case callers work alone.
pub(crate) fn pool() -> Option<Arc<ThreadPool>> {
    slot().read().ok().and_then(|pool| pool.clone())
}

/// Sets how many threads our operations use; the default is the number of cores the process may use.
/// Results do not depend on it.
pub fn set_threads(n: usize) {
    if n.max(1) == threads() {
        return;
    }
    if let Ok(mut pool) = slot().write() {
        *pool = build(n.max(1));
    }
}

/// How many threads our operations use.
pub fn threads() -> usize {
    pool().map_or(1, |pool| pool.current_num_threads())
}
