#include "tests/kernels/cuda_emulation/emulator.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/kernels/cuda_emulation/cuda_runtime.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

// Of the thread that runs; kernels read them as in CUDA.
Uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace atp::emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kMaxThreads = 1024;
constexpr int kLanes = 32;

// Accesses are told apart down to this: no element of a shared array is smaller.
constexpr size_t kGranule = 2;

// What happened last at one granule of shared memory. Epochs count barriers over all blocks ever run, so that
// an old record never meets a new one.
struct Record {
  uint64_t written = 0, read = 0;            // block epoch
  uint64_t warp_written = 0, warp_read = 0;  // warp epoch of the thread
  int16_t writer = -1, reader = -1;
  bool many_readers = false;     // since the warp epoch
  bool many_warps_read = false;  // since the block epoch
  bool atomic = false;           // the write was one
};

struct PendingCopy {
  std::byte* to;
  const void* from;
  size_t bytes;
  int index;
  int group;
};

struct Fiber {
  enum State { kReady, kAtBarrier, kInWarp, kDone };

  ucontext_t context;
  std::byte* stack = nullptr;
  bool started = false;
  State state = kReady;
  Uint3 index;
  const char* kind = "";  // of the barrier or exchange that it waits at
  const char* file = "";
  int line = 0;
  size_t bytes = 0;
  std::byte data[kMaxExchangeBytes];
  std::deque<PendingCopy> copies;
  int group = 0;
};

struct Warp {
  uint64_t epoch = 1;
  int waiting = 0;
  std::byte result[kLanes * kMaxExchangeBytes];
};

// Thrown through the kernel of the thread with a finding, up to where its fiber began.
struct Abandoned {};

class Machine {
 public:
  std::string Run(const char* name, const Index3& grid, const Index3& block, size_t shared_bytes,
                  const std::function<void()>& kernel);

  void SyncThreads(const char* file, int line) {
    Wait(Fiber::kAtBarrier, "__syncthreads", nullptr, 0, file, line);
  }
  const std::byte* Exchange(const char* kind, const void* data, size_t bytes, const char* file, int line);
  std::byte* TakeShared(size_t offset, size_t bytes);
  void Track(const std::byte* at, size_t bytes, Access access, int index);
  [[noreturn]] void Fail(const std::string& what);

  Fiber& current() { return fibers_[static_cast<size_t>(current_)]; }
  int current_thread() const { return current_; }

 private:
  static void Entry();
  void MakeStacks();
  void Start(int thread);
  void SwitchTo(int thread);
  void SwitchBack();
  void Wait(Fiber::State state, const char* kind, const void* data, size_t bytes, const char* file, int line);
  void RunBlock(bool forward);
  bool Release();
  bool ReleaseWarp(int warp);
  bool ReleaseBlock();
  std::string Stuck() const;
  int LanesOf(int warp) const { return std::min(kLanes, threads_ - warp * kLanes); }
  std::string Where(int thread) const;
  std::string WaitsAt(int thread) const;

  const std::function<void()>* kernel_ = nullptr;
  const char* name_ = "";
  std::string error_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::byte* stacks_ = nullptr;
  ucontext_t scheduler_;
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
  int threads_ = 0;
  int current_ = 0;

  // Exactly as large as the launch asked for, so that ASan sees a pointer that leaves it.
  std::unique_ptr<std::byte[]> shared_;
  size_t shared_bytes_ = 0;
  std::vector<Record> records_;
  uint64_t epoch_ = 1;
  uint64_t block_start_ = 1;  // the epoch in which the block began: what was written before is not there
};

Machine& TheMachine() {
  static Machine machine;
  return machine;
}

void Machine::MakeStacks() {
  fibers_.resize(kMaxThreads);
  void* memory = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  stacks_ = static_cast<std::byte*>(memory);
  for (int i = 0; i < kMaxThreads; ++i) {
    std::byte* stack = stacks_ + static_cast<size_t>(i) * kStackBytes;
    mprotect(stack, 4096, PROT_NONE);  // running over the end is a fault, not a neighbour's data
    fibers_[i].stack = stack + 4096;
  }
}

// A fiber runs the kernel for one thread of one block after another.
void Machine::Entry() {
  Machine& machine = TheMachine();
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack_, &machine.scheduler_stack_bytes_);
#endif
  for (;;) {
    try {
      (*machine.kernel_)();
    } catch (const Abandoned&) {
    }
    machine.current().state = Fiber::kDone;
    machine.SwitchBack();
  }
}

void Machine::Start(int thread) {
  Fiber& fiber = fibers_[thread];
  fiber.state = Fiber::kReady;
  fiber.copies.clear();
  fiber.group = 0;
  if (fiber.started) return;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes - 4096;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &Machine::Entry, 0);
  fiber.started = true;
}

void Machine::SwitchTo(int thread) {
  current_ = thread;
  threadIdx = fibers_[thread].index;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&scheduler_fake_stack_, fibers_[thread].stack, kStackBytes - 4096);
#endif
  swapcontext(&scheduler_, &fibers_[thread].context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
#endif
}

void Machine::SwitchBack() {
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, scheduler_stack_, scheduler_stack_bytes_);
#endif
  swapcontext(&current().context, &scheduler_);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
}

std::string Machine::Where(int thread) const {
  const Uint3& t = fibers_[thread].index;
  return absl::StrCat("thread (", t.x, ",", t.y, ",", t.z, ")");
}

std::string Machine::WaitsAt(int thread) const {
  const Fiber& fiber = fibers_[thread];
  if (fiber.state == Fiber::kDone) return absl::StrCat(Where(thread), " has returned");
  return absl::StrCat(Where(thread), " waits at ", fiber.kind, " (", fiber.file, ":", fiber.line, ")");
}

void Machine::Fail(const std::string& what) {
  if (error_.empty()) {
    error_ = absl::StrCat("kernel ", name_, ", block (", blockIdx.x, ",", blockIdx.y, ",", blockIdx.z, "), ",
                          Where(current_), ": ", what);
  }
  throw Abandoned();
}

void Machine::Wait(Fiber::State state, const char* kind, const void* data, size_t bytes, const char* file,
                   int line) {
  Fiber& fiber = current();
  fiber.state = state;
  fiber.kind = kind;
  fiber.file = file;
  fiber.line = line;
  fiber.bytes = bytes;
  if (bytes != 0) std::memcpy(fiber.data, data, bytes);
  SwitchBack();
}

const std::byte* Machine::Exchange(const char* kind, const void* data, size_t bytes, const char* file,
                                   int line) {
  Warp& warp = warps_[static_cast<size_t>(current_ / kLanes)];
  Wait(Fiber::kInWarp, kind, data, bytes, file, line);
  return warp.result;
}

// All lanes are at the same call: hand out their data. False if some lane is not there yet.
bool Machine::ReleaseWarp(int w) {
  const int first = w * kLanes, lanes = LanesOf(w);
  const Fiber& leader = fibers_[first];
  for (int lane = 0; lane < lanes; ++lane) {
    const Fiber& fiber = fibers_[first + lane];
    if (fiber.state != Fiber::kInWarp || fiber.line != leader.line || fiber.kind != leader.kind ||
        fiber.file != leader.file) {
      return false;
    }
  }
  Warp& warp = warps_[static_cast<size_t>(w)];
  std::memset(warp.result, 0, kLanes * leader.bytes);
  for (int lane = 0; lane < lanes; ++lane) {
    Fiber& fiber = fibers_[first + lane];
    std::memcpy(warp.result + static_cast<size_t>(lane) * leader.bytes, fiber.data, leader.bytes);
    fiber.state = Fiber::kReady;
  }
  if (leader.bytes == 0) ++warp.epoch;  // __syncwarp; exchanges order no memory
  return true;
}

bool Machine::ReleaseBlock() {
  for (int t = 0; t < threads_; ++t) {
    if (fibers_[t].state != Fiber::kAtBarrier || fibers_[t].line != fibers_[0].line ||
        fibers_[t].file != fibers_[0].file) {
      return false;
    }
  }
  for (int t = 0; t < threads_; ++t) fibers_[t].state = Fiber::kReady;
  ++epoch_;
  return true;
}

bool Machine::Release() {
  bool released = false;
  for (int w = 0; w < static_cast<int>(warps_.size()); ++w) released |= ReleaseWarp(w);
  return released || ReleaseBlock();
}

std::string Machine::Stuck() const {
  int waiting = 0;
  while (fibers_[waiting].state == Fiber::kDone) ++waiting;
  for (int t = 0; t < threads_; ++t) {
    const Fiber &a = fibers_[waiting], &b = fibers_[t];
    if (a.state == Fiber::kInWarp && t / kLanes != waiting / kLanes) continue;
    if (b.state != a.state || b.line != a.line || b.file != a.file || b.kind != a.kind) {
      return absl::StrCat("barrier not reached by all threads: ", WaitsAt(waiting), ", but ", WaitsAt(t));
    }
  }
  return absl::StrCat("barrier not reached by all threads: ", WaitsAt(waiting));
}

void Machine::RunBlock(bool forward) {
  for (int t = 0; t < threads_; ++t) Start(t);
  warps_.resize(static_cast<size_t>((threads_ + kLanes - 1) / kLanes));
  ++epoch_;
  block_start_ = epoch_;
  for (;;) {
    int done = 0;
    for (int i = 0; i < threads_ && error_.empty(); ++i) {
      const int t = forward ? i : threads_ - 1 - i;
      if (fibers_[t].state == Fiber::kReady) SwitchTo(t);
      done += fibers_[t].state == Fiber::kDone;
    }
    if (!error_.empty() || done == threads_) break;
    if (!Release()) {
      error_ = absl::StrCat("kernel ", name_, ", block (", blockIdx.x, ",", blockIdx.y, ",", blockIdx.z,
                            "): ", Stuck());
    }
  }
  if (!error_.empty()) {
    for (int t = 0; t < threads_; ++t) fibers_[t].started = false;
  }
}

std::string Machine::Run(const char* name, const Index3& grid, const Index3& block, size_t shared_bytes,
                         const std::function<void()>& kernel) {
  if (stacks_ == nullptr) MakeStacks();
  threads_ = static_cast<int>(block.x * block.y * block.z);
  if (threads_ <= 0 || threads_ > kMaxThreads || shared_bytes > kMaxSharedBytes || grid.y > 65535 ||
      grid.z > 65535) {
    return absl::StrCat("kernel ", name, ": cannot launch ", threads_, " threads with ", shared_bytes,
                        " bytes of shared memory in a grid of ", grid.x, " x ", grid.y, " x ", grid.z);
  }
  name_ = name;
  kernel_ = &kernel;
  error_.clear();
  blockDim = dim3(block.x, block.y, block.z);
  gridDim = dim3(grid.x, grid.y, grid.z);
  shared_.reset(new std::byte[shared_bytes]);
  shared_bytes_ = shared_bytes;
  if (records_.size() * kGranule < shared_bytes) records_.resize(shared_bytes / kGranule + 1);
  for (int t = 0; t < threads_; ++t) {
    const unsigned i = static_cast<unsigned>(t);
    fibers_[t].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
  }
  bool forward = true;
  for (unsigned z = grid.z; z-- > 0;) {
    for (unsigned y = grid.y; y-- > 0;) {
      for (unsigned x = grid.x; x-- > 0 && error_.empty(); forward = !forward) {
        blockIdx = {x, y, z};
        RunBlock(forward);
      }
    }
  }
  return error_;
}

std::byte* Machine::TakeShared(size_t offset, size_t bytes) {
  if (offset + bytes > shared_bytes_) {
    Fail(absl::StrCat("out of bounds: takes ", bytes, " bytes at ", offset,
                      " of shared memory; the launch asked for ", shared_bytes_));
  }
  return shared_.get() + offset;
}

void Machine::Track(const std::byte* at, size_t bytes, Access access, int index) {
  const int me = current_, warp = me / kLanes;
  const uint64_t warp_epoch = warps_[static_cast<size_t>(warp)].epoch;
  const size_t offset = static_cast<size_t>(at - shared_.get());
  const auto race = [&](const char* what, const char* other, int thread) {
    Fail(absl::StrCat("race in shared memory: ", what, " index ", index, " (byte ", offset, "), which ",
                      thread >= 0 ? Where(thread) : "another thread", " ", other, " since the last barrier"));
  };
  const char* what = access == Access::kRead ? "reads" : "writes";
  for (size_t i = 0; i < bytes; i += kGranule) {
    Record& record = records_[(offset + i) / kGranule];
    const bool is_read = access == Access::kRead;
    if (access != Access::kWrite && record.written < block_start_) {
      Fail(absl::StrCat("uninitialised shared memory: reads index ", index, " (byte ", offset + i,
                        "), which no thread of the block has written"));
    }
    if (record.written == epoch_ && record.writer != me && !(record.atomic && access == Access::kAtomic)) {
      const bool ordered = record.writer / kLanes == warp && record.warp_written < warp_epoch;
      if (!ordered) race(what, "wrote", record.writer);
    }
    if (!is_read && record.read == epoch_) {
      if (record.many_warps_read || record.reader / kLanes != warp)
        race(what, "read", record.reader / kLanes == warp ? -1 : record.reader);
      if (record.warp_read == warp_epoch && (record.many_readers || record.reader != me)) {
        race(what, "read", record.reader == me ? -1 : record.reader);
      }
    }
    if (is_read) {
      const bool same_block_epoch = record.read == epoch_;
      const bool same_warp = same_block_epoch && record.reader / kLanes == warp;
      const bool same_warp_epoch = same_warp && record.warp_read == warp_epoch;
      record.many_warps_read = same_block_epoch && (record.many_warps_read || !same_warp);
      record.many_readers = same_warp_epoch && (record.many_readers || record.reader != me);
      record.read = epoch_, record.warp_read = warp_epoch, record.reader = static_cast<int16_t>(me);
    } else {
      record.written = epoch_, record.warp_written = warp_epoch, record.writer = static_cast<int16_t>(me);
      record.atomic = access == Access::kAtomic;
    }
  }
}

}  // namespace

std::string Run(const char* name, const Index3& grid, const Index3& block, size_t shared_bytes,
                const std::function<void()>& kernel) {
  static std::mutex mutex;  // there is one machine
  const std::lock_guard<std::mutex> lock(mutex);
  return TheMachine().Run(name, grid, block, shared_bytes, kernel);
}

void SyncThreads(const char* file, int line) { TheMachine().SyncThreads(file, line); }
void SyncWarp(const char* file, int line) { TheMachine().Exchange("__syncwarp", nullptr, 0, file, line); }
const std::byte* Exchange(const char* kind, const void* data, size_t bytes, const char* file, int line) {
  return TheMachine().Exchange(kind, data, bytes, file, line);
}
int Lane() { return TheMachine().current_thread() % kLanes; }
std::byte* TakeShared(size_t offset, size_t bytes) { return TheMachine().TakeShared(offset, bytes); }
void TrackShared(const std::byte* at, size_t bytes, Access access, int index) {
  TheMachine().Track(at, bytes, access, index);
}
void OutOfBounds(int index, int size) {
  TheMachine().Fail(absl::StrCat("out of bounds: index ", index, " of a shared array of ", size));
}

void Misaligned(int index, size_t bytes) {
  TheMachine().Fail(absl::StrCat("misaligned: ", bytes, " bytes at index ", index, " of a shared array"));
}

void CopyLater(std::byte* to, const void* from, size_t bytes, int index) {
  Machine& machine = TheMachine();
  machine.Track(to, bytes, Access::kWrite, index);  // from now on nobody else may be at it
  Fiber& fiber = machine.current();
  std::memset(to, 0xff, bytes);  // what is read before the wait is NaN
  fiber.copies.push_back({to, from, bytes, index, fiber.group});
}

void CommitCopies() { ++TheMachine().current().group; }

void WaitForCopies(int pending_groups) {
  Machine& machine = TheMachine();
  Fiber& fiber = machine.current();
  while (!fiber.copies.empty() && fiber.copies.front().group < fiber.group - pending_groups) {
    const PendingCopy copy = fiber.copies.front();
    fiber.copies.pop_front();
    machine.Track(copy.to, copy.bytes, Access::kWrite, copy.index);
    if (copy.from == nullptr) {
      std::memset(copy.to, 0, copy.bytes);
    } else {
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
}

}  // namespace atp::emulation
