#include "kernels/cpu/cores.h"

#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <fstream>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace atp::cpu {
namespace {

constexpr size_t kMostCpuSets = 64;  // of 1,024 CPUs each

std::string FirstLine(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// Quota over period in whole CPUs, rounded down: a thread that gets half a CPU stalls all others at the end
// of an op.
int WholeCpus(int64_t quota_us, int64_t period_us) {
  if (quota_us <= 0 || period_us <= 0) return 0;
  return static_cast<int>(std::clamp<int64_t>(quota_us / period_us, 1, 1 << 16));
}

int LimitV2(const std::string& folder) {
  const std::vector<std::string> fields = absl::StrSplit(FirstLine(folder + "/cpu.max"), ' ');
  int64_t quota = 0;
  int64_t period = 0;
  if (fields.size() != 2 || !absl::SimpleAtoi(fields[0], &quota) || !absl::SimpleAtoi(fields[1], &period))
    return 0;
  return WholeCpus(quota, period);
}

int LimitV1(const std::string& folder) {
  int64_t quota = 0;
  int64_t period = 0;
  if (!absl::SimpleAtoi(FirstLine(folder + "/cpu.cfs_quota_us"), &quota)) return 0;
  if (!absl::SimpleAtoi(FirstLine(folder + "/cpu.cfs_period_us"), &period)) return 0;
  return WholeCpus(quota, period);
}

// The tightest limit of `group` and its ancestors below `mount`. Inside a container the path may name a group
// of the host that is not mounted here; the walk then ends at the mount's root, which is the container's own
// group.
int TightestLimit(const std::string& mount, std::string group, int (*limit_of)(const std::string&)) {
  int tightest = 0;
  while (true) {
    const int limit = limit_of(mount + (group == "/" ? "" : group));
    if (limit > 0) tightest = tightest == 0 ? limit : std::min(tightest, limit);
    const size_t slash = group.rfind('/');
    if (group.empty() || slash == std::string::npos) return tightest;
    group.resize(slash);
  }
}

// One number per physical core: the first of the hyperthreads that share it, as sysfs lists them ("0,64" or
// "0-1").
int CoreOf(int cpu, const std::string& root) {
  const std::string list =
      FirstLine(absl::StrCat(root, "/sys/devices/system/cpu/cpu", cpu, "/topology/thread_siblings_list"));
  const std::string first = list.substr(0, list.find_first_of(",-"));
  int core = cpu;
  return absl::SimpleAtoi(first, &core) ? core : cpu;
}

}  // namespace

int CgroupCpuLimit(const std::string& root) {
  std::ifstream groups(root + "/proc/self/cgroup");
  int tightest = 0;
  for (std::string line; std::getline(groups, line);) {
    const std::vector<std::string> fields =
        absl::StrSplit(line, absl::MaxSplits(':', 2));  // id:controllers:path
    if (fields.size() != 3) continue;
    int limit = 0;
    if (fields[1].empty()) {
      limit = TightestLimit(root + "/sys/fs/cgroup", fields[2], LimitV2);
    } else {
      const std::vector<std::string> controllers = absl::StrSplit(fields[1], ',');
      if (std::find(controllers.begin(), controllers.end(), "cpu") == controllers.end()) continue;
      for (const char* mount : {"/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"}) {
        limit = std::max(limit, TightestLimit(root + mount, fields[2], LimitV1));
      }
    }
    if (limit > 0) tightest = tightest == 0 ? limit : std::min(tightest, limit);
  }
  return tightest;
}

int GrantedCores(const std::string& root) {
  // The kernel refuses sets that are smaller than its own, which may be larger than cpu_set_t.
  std::vector<cpu_set_t> allowed(1);
  while (sched_getaffinity(0, allowed.size() * sizeof(cpu_set_t), allowed.data()) != 0) {
    if (errno != EINVAL || allowed.size() == kMostCpuSets) return 1;
    allowed.resize(2 * allowed.size());
  }
  std::set<int> cores;
  for (size_t cpu = 0; cpu < allowed.size() * CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET_S(cpu, allowed.size() * sizeof(cpu_set_t), allowed.data()))
      cores.insert(CoreOf(static_cast<int>(cpu), root));
  }
  const int physical = std::max<int>(1, static_cast<int>(cores.size()));
  const int limit = CgroupCpuLimit(root);
  return limit > 0 ? std::min(physical, limit) : physical;
}

}  // namespace atp::cpu
