// What the machine and the container still have: what caches and scratch are sized by.
#ifndef ATP_KERNELS_AVAILABLE_MEMORY_H_
#define ATP_KERNELS_AVAILABLE_MEMORY_H_

#include <cstddef>
#include <string>

namespace atp {

// Bytes that this process may still take: the least of MemAvailable and, for its cgroup (v2 or v1) and each
// parent that has a limit, that limit less its use. `root` is where /proc and /sys are, for tests.
size_t AvailableMemoryBytes(const std::string& root = "");

}  // namespace atp

#endif  // ATP_KERNELS_AVAILABLE_MEMORY_H_
