#include "kernels/host_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace atp {

absl::StatusOr<Buffer> AllocateHostMemory(size_t bytes) {
  const size_t mapped_bytes = std::max<size_t>(bytes, 1);  // a mapping of no bytes is an error
  void* data = mmap(nullptr, mapped_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrCat("cannot allocate ", bytes, " bytes of host memory: ", std::strerror(errno)));
  }
#ifdef MADV_HUGEPAGE
  // Attention reads blocks in any order: with pages of 4 KiB it waits for address translation at every block.
  // Refused advice changes no result. Not for small buffers, which would take whole huge pages.
  constexpr size_t kHugePage = size_t{2} << 20;
  if (mapped_bytes >= 4 * kHugePage) madvise(data, mapped_bytes, MADV_HUGEPAGE);
#endif
  return Buffer(data, bytes, [mapped_bytes](void* memory) { munmap(memory, mapped_bytes); });
}

absl::StatusOr<Weight> LoadHostWeight(const TensorView& host) {
  Weight weight;
  weight.view = host;
  if (reinterpret_cast<uintptr_t>(host.data) %
          static_cast<size_t>(IsQuantized(host.dtype) ? 2 : BlockOf(host.dtype).bytes) ==
      0)
    return weight;
  absl::StatusOr<Buffer> copy = AllocateHostMemory(host.bytes());
  if (!copy.ok()) return copy.status();
  CopyHostMemory(copy->data(), host.data, host.bytes());
  weight.memory = *std::move(copy);
  weight.view.data = weight.memory.data();
  return weight;
}

void CopyHostMemory(void* to, const void* from, size_t bytes) {
  if (bytes != 0) std::memcpy(to, from, bytes);
}

}  // namespace atp
