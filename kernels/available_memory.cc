#include "kernels/available_memory.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <optional>
#include <string_view>

#include "absl/strings/str_cat.h"

namespace atp {
namespace {

// The number a one-line file of the kernel holds; nothing for "max" or no such file.
std::optional<size_t> ReadNumber(const std::string& path) {
  std::ifstream file(path);
  size_t value = 0;
  if (file >> value) return value;
  return std::nullopt;
}

// The value after `key` in a file of "key value" lines: memory.stat ("inactive_file 123"), meminfo
// ("MemAvailable: 123 kB").
std::optional<size_t> ReadKey(const std::string& path, std::string_view key) {
  std::ifstream file(path);
  std::string name;
  size_t value = 0;
  while (file >> name) {
    if (name == key && file >> value) return value;
    file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
  return std::nullopt;
}

struct CgroupFiles {
  const char* limit;
  const char* usage;
  const char* inactive;  // key in memory.stat
};
constexpr CgroupFiles kCgroupV2 = {"memory.max", "memory.current", "inactive_file"};
constexpr CgroupFiles kCgroupV1 = {"memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"};

// What the group at `path` below `mount` and each of its parents leave. Inside a container the path may be
// the host's, which is not there: the walk then ends at the mount itself, the container's own group.
size_t CgroupAvailable(const std::string& mount, std::string path, const CgroupFiles& names) {
  size_t available = std::numeric_limits<size_t>::max();
  while (true) {
    while (!path.empty() && path.back() == '/') path.pop_back();
    const std::string group = absl::StrCat(mount, path, "/");
    const std::optional<size_t> limit = ReadNumber(group + names.limit);
    const std::optional<size_t> usage = ReadNumber(group + names.usage);
    if (limit.has_value() && usage.has_value()) {
      // Usage counts cached file pages, such as the mapped weights; the inactive ones are given back on
      // demand.
      const size_t inactive = ReadKey(group + "memory.stat", names.inactive).value_or(0);
      const size_t held = *usage - std::min(*usage, inactive);
      available = std::min(available, *limit - std::min(*limit, held));
    }
    if (path.empty()) return available;
    path.resize(path.rfind('/') == std::string::npos ? 0 : path.rfind('/'));
  }
}

}  // namespace

size_t AvailableMemoryBytes(const std::string& root) {
  size_t available = std::numeric_limits<size_t>::max();
  if (const std::optional<size_t> kib = ReadKey(root + "/proc/meminfo", "MemAvailable:"))
    available = *kib * 1024;
  std::ifstream groups(root + "/proc/self/cgroup");
  // Lines "hierarchy:controllers:path"; version 2 is hierarchy 0 without controllers.
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = absl::StrCat(",", line.substr(first + 1, second - first - 1), ",");
    const std::string path = line.substr(second + 1);
    if (controllers == ",,") {
      available = std::min(available, CgroupAvailable(root + "/sys/fs/cgroup", path, kCgroupV2));
    } else if (controllers.find(",memory,") != std::string::npos) {
      available = std::min(available, CgroupAvailable(root + "/sys/fs/cgroup/memory", path, kCgroupV1));
    }
  }
  return available;
}

}  // namespace atp
