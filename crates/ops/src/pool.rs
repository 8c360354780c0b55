//! The one pool of threads. MLX runs a CPU stream on one thread; our operations spread each call over this pool.
//!
//! A decoded token is some hundred calls of a few microseconds, so the calling thread works too, and the others look
//! for the next call for a moment before they go to sleep. Who does which task is left to chance; what a task
//! computes never depends on it.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a thread looks for the next call before it sleeps: longer than what happens between two calls of one token, for
/// waking a thread costs as much as a call.
const PATIENCE: Duration = Duration::from_micros(200);
/// Looks between two glances at the clock, after which another thread may have the core.
const LOOKS: u32 = 64;

static POOL: OnceLock<RwLock<Arc<Pool>>> = OnceLock::new();

struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held by the call that uses the workers; another call at the same time works alone.
    turn: Mutex<()>,
}

struct Shared {
    /// Counts the calls; a change is what workers look for.
    calls: AtomicU64,
    current: Mutex<Option<Call>>,
    /// Workers inside the current call.
    inside: AtomicUsize,
    asleep: Mutex<usize>,
    wake: Condvar,
    stop: AtomicBool,
}

/// One call: a function for each task number, and the next number to be done.
#[derive(Clone, Copy)]
struct Call {
    work: *const Work<'static>,
}

struct Work<'a> {
    run: &'a (dyn Fn(usize) + Sync),
    tasks: usize,
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn std::any::Any + Send>>>,
}

// SAFETY: the pointer is only followed between `enter` and the matching decrement of `inside`, which the caller,
// who owns the target, waits for.
unsafe impl Send for Call {}

impl Work<'_> {
    fn work(&self) {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let task = self.next.fetch_add(1, Ordering::Relaxed);
                if task >= self.tasks {
                    return;
                }
                (self.run)(task);
            }
        }));
        if let Err(panic) = outcome {
            self.next.store(self.tasks, Ordering::Relaxed);
            *lock(&self.panic) = Some(panic);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn worker(&self) {
        let mut seen = 0;
        loop {
            let mut looks = 0;
            let mut since = None;
            loop {
                let calls = self.calls.load(Ordering::Acquire);
                if calls != seen {
                    seen = calls;
                    break;
                }
                looks += 1;
                if looks % LOOKS != 0 {
                    std::hint::spin_loop();
                    continue;
                }
                if since.get_or_insert_with(Instant::now).elapsed() < PATIENCE {
                    std::thread::yield_now();
                    continue;
                }
                since = None;
                let mut asleep = lock(&self.asleep);
                while self.calls.load(Ordering::SeqCst) == seen {
                    *asleep += 1;
                    asleep = self.wake.wait(asleep).unwrap_or_else(PoisonError::into_inner);
                    *asleep -= 1;
                }
            }
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            let call = {
                let current = lock(&self.current);
                if current.is_some() {
                    self.inside.fetch_add(1, Ordering::Relaxed);
                }
                *current
            };
            if let Some(call) = call {
                // SAFETY: the caller withdraws the call and then waits until nobody is inside before its work ends.
                unsafe { (*call.work).work() };
                self.inside.fetch_sub(1, Ordering::Release);
            }
        }
    }

    fn announce(&self) {
        self.calls.fetch_add(1, Ordering::SeqCst);
        // A thread that goes to sleep checks the count again under this lock, so none misses the change.
        let asleep = lock(&self.asleep);
        if *asleep > 0 {
            self.wake.notify_all();
        }
    }
}

impl Pool {
    fn new(threads: usize) -> Pool {
        let shared = Arc::new(Shared {
            calls: AtomicU64::new(0),
            current: Mutex::new(None),
            inside: AtomicUsize::new(0),
            asleep: Mutex::new(0),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        let mut workers = Vec::new();
        for i in 1..threads {
            let shared = Arc::clone(&shared);
            let builder = std::thread::Builder::new().name(format!("graft-ops-{i}"));
            // A system that gives us fewer threads only makes us slower.
            if let Ok(worker) = builder.spawn(move || shared.worker()) {
                workers.push(worker);
            }
        }
        Pool { shared, workers, turn: Mutex::new(()) }
    }

    fn run(&self, tasks: usize, run: &(dyn Fn(usize) + Sync)) {
        let work = Work { run, tasks, next: AtomicUsize::new(0), panic: Mutex::new(None) };
        let turn = if tasks > 1 && !self.workers.is_empty() { self.turn.try_lock().ok() } else { None };
        if turn.is_none() {
            work.work();
        } else {
            *lock(&self.shared.current) = Some(Call { work: (&raw const work).cast() });
            self.shared.announce();
            work.work();
            *lock(&self.shared.current) = None;
            wait_until(|| self.shared.inside.load(Ordering::Acquire) == 0);
        }
        drop(turn);
        if let Some(panic) = work.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.announce();
        for worker in self.workers.drain(..) {
            // A worker's panics are caught with its work.
            let _ = worker.join();
        }
    }
}

fn cores() -> usize {
    // Counts the cores this process may use: affinity and cgroup quota included.
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn slot() -> &'static RwLock<Arc<Pool>> {
    POOL.get_or_init(|| RwLock::new(Arc::new(Pool::new(cores()))))
}

fn pool() -> Arc<Pool> {
    Arc::clone(&slot().read().unwrap_or_else(PoisonError::into_inner))
}

/// Looks until something is so, for what takes no longer than a task.
pub(crate) fn wait_until(done: impl Fn() -> bool) {
    let mut looks = 0;
    while !done() {
        looks += 1;
        if looks % LOOKS == 0 { std::thread::yield_now() } else { std::hint::spin_loop() }
    }
}

/// Calls `run` once with each number below `tasks`, on all threads, and returns when all calls have. Numbers are handed out in
/// their order, one at a time, so a task may wait for what tasks of lower numbers do; after a panic no more are handed out.
#[cfg_attr(not(graft_cpu), allow(dead_code, reason = "only our CPU operations have work to share"))]
pub(crate) fn run(tasks: usize, run: impl Fn(usize) + Sync) {
    match tasks {
        0 => {}
        1 => run(0),
        _ => pool().run(tasks, &run),
    }
}

/// Sets how many threads our operations use; the default is the number of cores the process may use.
/// Results do not depend on it.
pub fn set_threads(n: usize) {
    let n = n.max(1);
    if n == threads() {
        return;
    }
    *slot().write().unwrap_or_else(PoisonError::into_inner) = Arc::new(Pool::new(n));
}

/// How many threads our operations use.
pub fn threads() -> usize {
    pool().workers.len() + 1
}

/// A mutable slice whose parts different tasks write.
#[cfg_attr(not(graft_cpu), allow(dead_code, reason = "only our CPU operations have work to share"))]
pub(crate) struct Shares<'a, T>(&'a [UnsafeCell<T>]);

// SAFETY: `part` is unsafe and asks for disjoint parts, which makes sharing the same as splitting the slice; `read` asks that
// nobody writes, which makes it the same as lending it.
unsafe impl<T: Send + Sync> Sync for Shares<'_, T> {}

#[cfg_attr(not(graft_cpu), allow(dead_code, reason = "only our CPU operations have work to share"))]
impl<'a, T> Shares<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Shares<'a, T> {
        let pointer = slice.as_mut_ptr().cast::<UnsafeCell<T>>();
        // SAFETY: UnsafeCell<T> has T's layout, and the exclusive borrow is ours for 'a.
        Shares(unsafe { std::slice::from_raw_parts(pointer, slice.len()) })
    }

    /// A part of the slice.
    ///
    /// # Safety
    /// No two parts that live at the same time may overlap.
    #[allow(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    pub(crate) unsafe fn part(&self, from: usize, len: usize) -> &mut [T] {
        let cells = &self.0[from..from + len];
        // SAFETY: within bounds by the indexing above; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(cells.as_ptr().cast_mut().cast::<T>(), len) }
    }

    /// A part of the slice, to be read.
    ///
    /// # Safety
    /// Nobody may write to it while the result lives.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        allow(dead_code, reason = "only arranged weights share what is computed")
    )]
    pub(crate) unsafe fn read(&self, from: usize, len: usize) -> &[T] {
        let cells = &self.0[from..from + len];
        // SAFETY: within bounds by the indexing above; unchanged by the caller's promise.
        unsafe { std::slice::from_raw_parts(cells.as_ptr().cast::<T>(), len) }
    }

    /// Whether there is nothing to share.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Where the slice begins, for writers with strides of their own; the same promise holds.
    pub(crate) fn pointer(&self) -> *mut T {
        self.0.as_ptr().cast_mut().cast::<T>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_may_wait_for_lower_ones_also_where_one_of_those_panics() {
        struct Ended<'a>(&'a AtomicUsize);
        impl Drop for Ended<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Release);
            }
        }
        let pool = Pool::new(3);
        for panics in [false, true] {
            let (left, waited) = (AtomicUsize::new(3), AtomicUsize::new(0));
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.run(9, &|task| {
                    if task < 3 {
                        let _ended = Ended(&left);
                        std::thread::sleep(Duration::from_millis(20));
                        assert!(!panics || task != 1, "as it should");
                    } else {
                        wait_until(|| left.load(Ordering::Acquire) == 0);
                        waited.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }));
            assert_eq!(outcome.is_err(), panics);
            assert!(panics || waited.into_inner() == 6);
        }
    }
}
