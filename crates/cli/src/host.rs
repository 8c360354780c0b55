//! Facts about the process and the machine, and its signals: with the atomic writer the only code that asks which system it runs on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Peak footprint of this process in bytes: VmHWM on Linux, the lifetime maximum of phys_footprint on macOS; 0 if unknown.
pub(crate) fn peak_memory() -> u64 {
    #[cfg(target_os = "macos")]
    {
        use libproc::libproc::pid_rusage::{RUsageInfoV4, pidrusage};
        let pid = i32::try_from(std::process::id()).unwrap_or_default();
        pidrusage::<RUsageInfoV4>(pid).map(|r| r.ri_lifetime_max_phys_footprint).unwrap_or_default()
    }
    #[cfg(not(target_os = "macos"))]
    proc_field("/proc/self/status", "VmHWM:").unwrap_or_default()
}

/// Memory of the machine and what of it programs can still take, in bytes; `None` if unknown.
pub(crate) fn memory() -> (Option<u64>, Option<u64>) {
    #[cfg(target_os = "macos")]
    {
        let output = std::process::Command::new("sysctl").args(["-n", "hw.memsize"]).output();
        let total = output.ok().and_then(|o| String::from_utf8_lossy(&o.stdout).trim().parse().ok());
        (total, None)
    }
    #[cfg(not(target_os = "macos"))]
    (proc_field("/proc/meminfo", "MemTotal:"), proc_field("/proc/meminfo", "MemAvailable:"))
}

/// A field of a /proc file, given there in kB, in bytes.
#[cfg(not(target_os = "macos"))]
fn proc_field(file: &str, field: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(field))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kb| kb * 1024)
}

/// Cores this process may use.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// A flag that the first interrupt or termination signal sets; the second ends the process at once with status 130.
/// `on_first` runs in the signals' thread.
pub(crate) fn stop_flag(on_first: impl Fn() + Send + 'static) -> Arc<AtomicBool> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let flag = Arc::new(AtomicBool::new(false));
    let set = flag.clone();
    // Fails only where the system has no such signals; then the default action ends the process.
    if let Ok(mut signals) = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP]) {
        std::thread::spawn(move || {
            for _ in signals.forever() {
                if set.swap(true, Ordering::SeqCst) {
                    exit(130);
                }
                on_first();
            }
        });
    }
    flag
}

/// Ends the process without its exit handlers. MLX takes its allocator down in one, while threads of its own may still
/// free arrays, and then the process aborts instead.
pub(crate) fn exit(status: u8) -> ! {
    signal_hook::low_level::exit(status.into())
}

#[cfg(test)]
mod tests {
    #[test]
    fn memory_is_known_here() {
        assert!(super::peak_memory() > 1 << 20);
        assert!(super::memory().0.is_some());
        assert!(super::cores() >= 1);
    }
}
