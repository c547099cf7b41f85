#include "kernels/cpu/cores.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "gtest/gtest.h"

namespace atp::cpu {
namespace {

// A made-up /proc and /sys below a temporary folder.
class Cores : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = ::testing::TempDir() + "/cores_XXXXXX";
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    root_ = pattern;
  }
  void TearDown() override { std::filesystem::remove_all(root_); }

  void Write(const std::string& path, const std::string& text) {
    const std::filesystem::path full = root_ + path;
    std::filesystem::create_directories(full.parent_path());
    std::ofstream(full) << text << "\n";
  }

  std::string root_;
};

TEST_F(Cores, NoCgroupIsNoLimit) {
  EXPECT_EQ(CgroupCpuLimit(root_), 0);
  EXPECT_GE(GrantedCores(root_), 1);
}

TEST_F(Cores, V2QuotaOfTheGroup) {
  Write("/proc/self/cgroup", "0::/pod/container");
  Write("/sys/fs/cgroup/pod/container/cpu.max", "300000 100000");
  EXPECT_EQ(CgroupCpuLimit(root_), 3);
}

TEST_F(Cores, V2TightestAncestorCounts) {
  Write("/proc/self/cgroup", "0::/pod/container");
  Write("/sys/fs/cgroup/pod/container/cpu.max", "max 100000");
  Write("/sys/fs/cgroup/pod/cpu.max", "250000 100000");
  Write("/sys/fs/cgroup/cpu.max", "800000 100000");
  EXPECT_EQ(CgroupCpuLimit(root_), 2);
}

TEST_F(Cores, V2InsideAContainerTheRootIsTheGroup) {
  Write("/proc/self/cgroup", "0::/");
  Write("/sys/fs/cgroup/cpu.max", "150000 100000");
  EXPECT_EQ(CgroupCpuLimit(root_), 1);
}

TEST_F(Cores, LessThanOneCpuIsOneThread) {
  Write("/proc/self/cgroup", "0::/");
  Write("/sys/fs/cgroup/cpu.max", "20000 100000");
  EXPECT_EQ(CgroupCpuLimit(root_), 1);
  EXPECT_EQ(GrantedCores(root_), 1);
}

TEST_F(Cores, V1Quota) {
  Write("/proc/self/cgroup", "4:memory:/pod\n3:cpu,cpuacct:/pod");
  Write("/sys/fs/cgroup/cpu/pod/cpu.cfs_quota_us", "200000");
  Write("/sys/fs/cgroup/cpu/pod/cpu.cfs_period_us", "100000");
  EXPECT_EQ(CgroupCpuLimit(root_), 2);
}

TEST_F(Cores, V1WithoutQuota) {
  Write("/proc/self/cgroup", "3:cpu:/");
  Write("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1");
  Write("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000");
  EXPECT_EQ(CgroupCpuLimit(root_), 0);
}

TEST_F(Cores, HyperthreadsOfOneCoreCountOnce) {
  for (int cpu = 0; cpu < 1024; ++cpu) {
    Write("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list", "0-1023");
  }
  EXPECT_EQ(GrantedCores(root_), 1);
}

}  // namespace
}  // namespace atp::cpu
