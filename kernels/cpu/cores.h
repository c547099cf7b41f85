// How many threads are worth starting.
#ifndef ATP_KERNELS_CPU_CORES_H_
#define ATP_KERNELS_CPU_CORES_H_

#include <string>

namespace atp::cpu {

// Physical cores that this process may run on (sched_getaffinity; two hyperthreads of one core count once),
// limited by the CPU quota of its cgroup. At least 1. `root` is where /proc and /sys are found (tests pass
// another).
int GrantedCores(const std::string& root = "");

// The whole CPUs that the cgroup's quota grants, at least 1; 0 without a quota. cgroup v2 (cpu.max) or v1
// (cpu.cfs_quota_us); the tightest of the process's group and its ancestors.
int CgroupCpuLimit(const std::string& root = "");

}  // namespace atp::cpu

#endif  // ATP_KERNELS_CPU_CORES_H_
