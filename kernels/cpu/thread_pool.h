// Runs the independent parts of one op on all cores, and nothing else. Its own, because an op takes tens of
// microseconds: workers spin briefly for the next op before they park, and a call allocates nothing.
#ifndef ATP_KERNELS_CPU_THREAD_POOL_H_
#define ATP_KERNELS_CPU_THREAD_POOL_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

namespace atp::cpu {

class ThreadPool {
 public:
  // threads >= 1, counting the caller of ParallelFor: threads - 1 workers are started. Throws
  // std::runtime_error, with none of them left, where the system refuses one.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(part, thread) once for each part in [0, parts), thread in [0, threads()), and returns when all
  // are done. What a part is must not depend on who runs it: parts go to whoever is free. One caller at a
  // time; not reentrant; body must not throw.
  template <class Body>
  void ParallelFor(int64_t parts, Body&& body) {
    if (parts <= 1 || workers_.empty()) {
      for (int64_t part = 0; part < parts; ++part) body(part, 0);
      return;
    }
    using Plain = std::remove_reference_t<Body>;
    Run(
        parts, [](void* context, int64_t part, int thread) { (*static_cast<Plain*>(context))(part, thread); },
        const_cast<std::remove_const_t<Plain>*>(std::addressof(body)));
  }

 private:
  using Function = void (*)(void* context, int64_t part, int thread);

  void Run(int64_t parts, Function function, void* context);
  void Stop();
  void WorkerLoop(int thread);
  void RunParts(int thread);

  // High 32 bits: which op; low 32: how many of its parts are not claimed yet. A part is claimed by counting
  // this down, which fails when the op is over: a worker that wakes late can neither take a part of an op it
  // did not see nor touch function_ and context_ while the next op is being set.
  alignas(64) std::atomic<uint64_t> tickets_{0};
  alignas(64) std::atomic<uint32_t> unfinished_{0};
  alignas(64) std::atomic<uint32_t> epoch_{
      0};  // what idle workers wait on: changes with every op, and at the end
  std::atomic<bool> stopping_{false};
  Function function_ = nullptr;
  void* context_ = nullptr;
  int64_t parts_ = 0;
  std::vector<std::thread> workers_;
};

}  // namespace atp::cpu

#endif  // ATP_KERNELS_CPU_THREAD_POOL_H_
