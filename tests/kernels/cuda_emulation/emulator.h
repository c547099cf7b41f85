// CUDA's execution model on the host: the threads of a block are fibers, run block by block. Each access to
// shared memory goes through Shared<T> (cuda_runtime.h beside this file) and is held against every other
// access that no barrier orders, which finds what a GPU hides:
//   - two threads at one byte of shared memory, one of them writing, with no barrier between (a race),
//   - a barrier or a warp function that some thread does not reach,
//   - an index outside its array, and a read of shared memory that nobody in this block has written.
// The first finding ends the launch and names kernel, block, thread and index. Blocks run last to first, and
// threads now in one order and now in the other, so that code that relies on an order fails.
#ifndef ATP_TESTS_KERNELS_CUDA_EMULATION_EMULATOR_H_
#define ATP_TESTS_KERNELS_CUDA_EMULATION_EMULATOR_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace atp::emulation {

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

// What a shipped GPU of the smallest kind that we build for has (sm_89): kernels that need more fail here.
inline constexpr size_t kMaxSharedBytes = 99 * 1024;
inline constexpr int kMultiprocessors = 4;

// Runs `kernel` once per thread of the grid. Empty, or what was found.
std::string Run(const char* name, const Index3& grid, const Index3& block, size_t shared_bytes,
                const std::function<void()>& kernel);

// --- What a thread of the running block calls. file, line: of the call.

void SyncThreads(const char* file, int line);
void SyncWarp(const char* file, int line);

// Every lane of the warp gives `bytes` of data and gets those of all 32 lanes, one after another; lanes that
// do not exist give zeros. The pointer is good until the thread's next exchange. kind: for messages.
inline constexpr size_t kMaxExchangeBytes = 48;
const std::byte* Exchange(const char* kind, const void* data, size_t bytes, const char* file, int line);
int Lane();

// Shared memory of the block: `bytes` at `offset` were asked for by this thread. Ends the launch if the
// launch asked for less.
std::byte* TakeShared(size_t offset, size_t bytes);
enum class Access { kRead, kWrite, kAtomic };
// [at, at + bytes) is about to be accessed. index, size: in and of the array, for messages; at + bytes lies
// in shared memory.
void TrackShared(const std::byte* at, size_t bytes, Access access, int index);
[[noreturn]] void OutOfBounds(int index, int size);
[[noreturn]] void Misaligned(int index, size_t bytes);

// cp.async: the bytes arrive at the thread's wait, not before.
void CopyLater(std::byte* to, const void* from, size_t bytes, int index);
void CommitCopies();
void WaitForCopies(int pending_groups);

}  // namespace atp::emulation

#endif  // ATP_TESTS_KERNELS_CUDA_EMULATION_EMULATOR_H_
