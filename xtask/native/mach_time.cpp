// mlx-rs seeds its random state from this macOS clock; any monotonic clock in nanoseconds serves.
#include <chrono>
#include <cstdint>

extern "C" uint64_t mach_approximate_time() {
  auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}
