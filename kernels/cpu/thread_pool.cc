#include "kernels/cpu/thread_pool.h"

#include <stdexcept>
#include <system_error>

#include "absl/base/macros.h"
#include "absl/strings/str_cat.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace atp::cpu {
namespace {

// About 20 µs: longer than the gap between two ops of a step, short enough not to be seen as load between
// steps.
constexpr int kSpins = 1000;

void Pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Returns once `value` differs from `old`.
template <class T>
void WaitWhileEqual(const std::atomic<T>& value, T old) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (value.load(std::memory_order_acquire) != old) return;
    Pause();
  }
  value.wait(old, std::memory_order_acquire);
}

constexpr uint64_t kCountMask = 0xffffffffu;

}  // namespace

ThreadPool::ThreadPool(int threads) {
  ABSL_ASSERT(threads >= 1);
  workers_.reserve(threads - 1);
  for (int thread = 1; thread < threads; ++thread) {
    try {
      workers_.emplace_back([this, thread] { WorkerLoop(thread); });
    } catch (const std::system_error& error) {  // a limit on processes, mostly
      Stop();
      throw std::runtime_error(absl::StrCat("cannot start thread ", thread + 1, " of ", threads, ": ",
                                            error.code().message(), "; lower backend.threads (--threads)"));
    }
  }
}

ThreadPool::~ThreadPool() { Stop(); }

void ThreadPool::Stop() {
  stopping_.store(true, std::memory_order_relaxed);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::Run(int64_t parts, Function function, void* context) {
  ABSL_ASSERT(parts <= static_cast<int64_t>(kCountMask));
  function_ = function;
  context_ = context;
  parts_ = parts;
  unfinished_.store(static_cast<uint32_t>(parts), std::memory_order_relaxed);
  const uint64_t op = (tickets_.load(std::memory_order_relaxed) >> 32) + 1;
  tickets_.store((op << 32) | static_cast<uint64_t>(parts), std::memory_order_release);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  RunParts(0);
  uint32_t left;
  while ((left = unfinished_.load(std::memory_order_acquire)) != 0) WaitWhileEqual(unfinished_, left);
}

void ThreadPool::WorkerLoop(int thread) {
  uint32_t seen = 0;
  while (true) {
    WaitWhileEqual(epoch_, seen);
    seen = epoch_.load(std::memory_order_acquire);
    if (stopping_.load(std::memory_order_relaxed)) return;
    RunParts(thread);
  }
}

void ThreadPool::RunParts(int thread) {
  uint64_t tickets = tickets_.load(std::memory_order_acquire);
  while ((tickets & kCountMask) != 0) {
    if (!tickets_.compare_exchange_weak(tickets, tickets - 1, std::memory_order_acq_rel,
                                        std::memory_order_acquire)) {
      continue;
    }
    // The op cannot end before this part does, so its fields stay as they are until then.
    function_(context_, parts_ - static_cast<int64_t>(tickets & kCountMask), thread);
    if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
    tickets = tickets_.load(std::memory_order_acquire);
  }
}

}  // namespace atp::cpu
