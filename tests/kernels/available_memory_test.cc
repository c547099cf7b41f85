#include "kernels/available_memory.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

namespace atp {
namespace {

class AvailableMemoryTest : public ::testing::Test {
 protected:
  void SetUp() override {
    root_ = ::testing::TempDir() + "/memory_" + std::to_string(getpid()) + "_" +
            ::testing::UnitTest::GetInstance()->current_test_info()->name();
    Write("/proc/meminfo", "MemTotal: 9000 kB\nMemFree: 1 kB\nMemAvailable:    5000 kB\nBuffers: 3 kB\n");
  }
  void TearDown() override { std::filesystem::remove_all(root_); }
  void Write(const std::string& path, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(root_ + path).parent_path());
    std::ofstream(root_ + path) << text;
  }

  std::string root_;
};

TEST_F(AvailableMemoryTest, NoCgroup) { EXPECT_EQ(AvailableMemoryBytes(root_), 5000u * 1024); }

TEST_F(AvailableMemoryTest, Version2TakesTheTightestOfAllParents) {
  Write("/proc/self/cgroup", "0::/kube/pod/container\n");
  Write("/sys/fs/cgroup/kube/pod/container/memory.max", "max\n");
  Write("/sys/fs/cgroup/kube/pod/container/memory.current", "100\n");
  EXPECT_EQ(AvailableMemoryBytes(root_), 5000u * 1024);
  Write("/sys/fs/cgroup/kube/pod/memory.max", "1000000\n");
  Write("/sys/fs/cgroup/kube/pod/memory.current", "400000\n");
  EXPECT_EQ(AvailableMemoryBytes(root_), 600000u);
  Write("/sys/fs/cgroup/kube/pod/memory.stat",
        "anon 5\nfile 250000\ninactive_file 150000\nactive_file 100000\n");
  EXPECT_EQ(AvailableMemoryBytes(root_), 750000u);
  Write("/sys/fs/cgroup/kube/pod/container/memory.max", "300\n");
  EXPECT_EQ(AvailableMemoryBytes(root_), 200u);
  Write("/sys/fs/cgroup/kube/pod/container/memory.current", "301\n");
  EXPECT_EQ(AvailableMemoryBytes(root_), 0u);
}

TEST_F(AvailableMemoryTest, Version2InsideAContainer) {
  Write("/proc/self/cgroup", "0::/\n");
  Write("/sys/fs/cgroup/memory.max", "2000000\n");
  Write("/sys/fs/cgroup/memory.current", "500000\n");
  EXPECT_EQ(AvailableMemoryBytes(root_), 1500000u);
}

TEST_F(AvailableMemoryTest, Version1WithTheHostsPath) {
  Write("/proc/self/cgroup", "9:name=systemd:/\n5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n");
  Write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "3000000\n");
  Write("/sys/fs/cgroup/memory/memory.usage_in_bytes", "1000000\n");
  Write("/sys/fs/cgroup/memory/memory.stat", "cache 7\ninactive_file 1\ntotal_inactive_file 500000\n");
  EXPECT_EQ(AvailableMemoryBytes(root_), 2500000u);
  Write("/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "9223372036854771712\n");  // version 1's way to say none
  EXPECT_EQ(AvailableMemoryBytes(root_), 5000u * 1024);
}

TEST(AvailableMemory, OfThisMachine) {
  const size_t available = AvailableMemoryBytes();
  EXPECT_GT(available, 0u);
  EXPECT_LT(available, size_t{1} << 50);
}

}  // namespace
}  // namespace atp
