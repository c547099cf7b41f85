// Linked into the tests that use gRPC, in the preset cpu-tsan only. ThreadSanitizer does not see the atomics
// and the absl::Mutex inside Debian's gRPC, which is compiled without it, so that whatever gRPC hands from
// one thread to another looks like a race in our code and in gRPC's headers. Suppressions cannot tell these
// from races of ours: each callback has a frame of gRPC on its stack. So these functions stand before gRPC's
// and absl's own and tell ThreadSanitizer that all that gRPC does is ordered as if by one lock. Races of ours
// are still found between two such points; what runs without gRPC (engine, REST, queues) is not touched at
// all.
#include <dlfcn.h>
#include <grpc/grpc.h>

#include <cstdlib>

#include "absl/synchronization/mutex.h"

extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);

namespace {

char all_of_grpc;  // its address stands for the one lock

class Ordered {
 public:
  Ordered() { Order(); }
  ~Ordered() { Order(); }
  Ordered(const Ordered&) = delete;
  Ordered& operator=(const Ordered&) = delete;

 private:
  static void Order() {
    __tsan_acquire(&all_of_grpc);
    __tsan_release(&all_of_grpc);
  }
};

template <typename Function>
Function* Real(const char* symbol) {
  void* const found = dlsym(RTLD_NEXT, symbol);
  if (found == nullptr) std::abort();  // another version of the library
  return reinterpret_cast<Function*>(found);
}

}  // namespace

void absl::Mutex::Lock() {
  static auto* const real = Real<void(absl::Mutex*)>("_ZN4absl7debian35Mutex4LockEv");
  const Ordered ordered;
  real(this);
}

void absl::Mutex::Unlock() {
  static auto* const real = Real<void(absl::Mutex*)>("_ZN4absl7debian35Mutex6UnlockEv");
  const Ordered ordered;
  real(this);
}

bool absl::Mutex::TryLock() {
  static auto* const real = Real<bool(absl::Mutex*)>("_ZN4absl7debian35Mutex7TryLockEv");
  const Ordered ordered;
  return real(this);
}

// The tag of a batch: what starts it has happened before what its end runs, in another thread.
extern "C" grpc_call_error grpc_call_start_batch(grpc_call* call, const grpc_op* ops, size_t count, void* tag,
                                                 void* reserved) {
  static auto* const real = Real<decltype(grpc_call_start_batch)>("grpc_call_start_batch");
  const Ordered ordered;
  return real(call, ops, count, tag, reserved);
}

extern "C" void grpc_call_unref(grpc_call* call) {
  static auto* const real = Real<decltype(grpc_call_unref)>("grpc_call_unref");
  const Ordered ordered;
  real(call);
}

// The threads that run callbacks wait here for the next one.
extern "C" grpc_event grpc_completion_queue_next(grpc_completion_queue* queue, gpr_timespec deadline,
                                                 void* reserved) {
  static auto* const real = Real<decltype(grpc_completion_queue_next)>("grpc_completion_queue_next");
  const Ordered ordered;
  return real(queue, deadline, reserved);
}

// And calls that block, here.
extern "C" grpc_event grpc_completion_queue_pluck(grpc_completion_queue* queue, void* tag,
                                                  gpr_timespec deadline, void* reserved) {
  static auto* const real = Real<decltype(grpc_completion_queue_pluck)>("grpc_completion_queue_pluck");
  const Ordered ordered;
  return real(queue, tag, deadline, reserved);
}
