#include "kernels/cpu/thread_pool.h"

#include <pthread.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <fstream>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace atp::cpu {
namespace {

TEST(ThreadPool, EveryPartOnceForManyOps) {
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.threads(), threads);
    for (int op = 0; op < 500; ++op) {
      const int64_t parts = op % 23;
      std::vector<int> runs(parts,
                            0);  // not atomic on purpose: a part run twice at once is a race that TSan sees
      std::atomic<bool> thread_in_range{true};
      pool.ParallelFor(parts, [&](int64_t part, int thread) {
        ++runs[part];
        if (thread < 0 || thread >= threads) thread_in_range = false;
      });
      EXPECT_EQ(runs, std::vector<int>(parts, 1));
      EXPECT_TRUE(thread_in_range);
    }
  }
}

TEST(ThreadPool, WorkIsDoneWhenTheCallReturns) {
  ThreadPool pool(4);
  int64_t plain = 0;  // written by parts, read by the caller without a lock
  for (int op = 0; op < 200; ++op) {
    std::vector<int64_t> results(16);
    pool.ParallelFor(16, [&](int64_t part, int) { results[part] = part + op; });
    plain += std::accumulate(results.begin(), results.end(), int64_t{0});
  }
  EXPECT_EQ(plain, 200 * 120 + 16 * (199 * 200 / 2));
}

TEST(ThreadPool, WakesAfterWorkersHaveParked) {
  ThreadPool pool(3);
  for (int op = 0; op < 5; ++op) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    std::atomic<int> runs{0};
    pool.ParallelFor(64, [&](int64_t, int) { ++runs; });
    EXPECT_EQ(runs, 64);
  }
}

TEST(ThreadPool, OneThreadNeverHasTwoPartsAtOnce) {
  ThreadPool pool(4);
  std::vector<int> busy(4, 0);  // per-thread scratch in miniature
  std::atomic<bool> overlap{false};
  for (int op = 0; op < 100; ++op) {
    pool.ParallelFor(32, [&](int64_t, int thread) {
      if (++busy[thread] != 1) overlap = true;
      --busy[thread];
    });
  }
  EXPECT_FALSE(overlap);
}

TEST(ThreadPool, ALongPartDoesNotHoldBackTheOthers) {
  ThreadPool pool(2);
  std::atomic<int> others{0};
  pool.ParallelFor(9, [&](int64_t part, int) {
    if (part == 0) {
      // Returns only because the other thread takes all other parts meanwhile.
      while (others < 8) std::this_thread::yield();
    } else {
      ++others;
    }
  });
  EXPECT_EQ(others, 8);
}

// As under a limit on processes: here the stacks are what the system has no room for.
TEST(ThreadPool, AThreadThatCannotStartIsAnErrorThatSaysWhatToChange) {
  pthread_attr_t before, huge;
  ASSERT_EQ(pthread_getattr_default_np(&before), 0);
  ASSERT_EQ(pthread_attr_init(&huge), 0);
  ASSERT_EQ(pthread_attr_setstacksize(&huge, size_t{1} << 46), 0);
  ASSERT_EQ(pthread_setattr_default_np(&huge), 0);
  std::string message;
  try {
    ThreadPool pool(8);
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  ASSERT_EQ(pthread_setattr_default_np(&before), 0);
  EXPECT_NE(message.find("of 8: "), std::string::npos) << message;
  EXPECT_NE(message.find("--threads"), std::string::npos) << message;
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // which need address space of their own
// In a process of its own, with address space for a few of the threads only: those end, too.
TEST(ThreadPool, ThreadsThatHaveStartedEndWhereAnotherCannot) {
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    int64_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    const rlim_t limit = static_cast<rlim_t>(pages * sysconf(_SC_PAGESIZE)) + (rlim_t{100} << 20);
    const rlimit space = {limit, limit};
    if (setrlimit(RLIMIT_AS, &space) != 0) _exit(2);
    try {
      ThreadPool pool(512);
    } catch (const std::runtime_error& error) {
      _exit(std::string(error.what()).find("cannot start thread 2 ") == std::string::npos ? 0 : 3);
    }
    _exit(4);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status)) << "signal " << WTERMSIG(status);
  EXPECT_EQ(WEXITSTATUS(status), 0);
}
#endif

TEST(ThreadPool, PoolsLiveSideBySide) {
  for (int round = 0; round < 20; ++round) {
    ThreadPool a(2);
    ThreadPool b(3);
    std::atomic<int> runs{0};
    a.ParallelFor(7, [&](int64_t, int) { ++runs; });
    b.ParallelFor(7, [&](int64_t, int) { ++runs; });
    EXPECT_EQ(runs, 14);
  }
}

}  // namespace
}  // namespace atp::cpu
