#include "kernels/host_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/quantized.h"

namespace atp {

absl::StatusOr<Buffer> AllocateHostMemory(size_t bytes, bool full) {
  const size_t mapped_bytes = std::max<size_t>(bytes, 1);  // a mapping of no bytes is an error
  void* data = mmap(nullptr, mapped_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrCat("cannot allocate ", bytes, " bytes of host memory: ", std::strerror(errno)));
  }
#ifdef MADV_HUGEPAGE
  // Attention reads blocks in any order, and matrix products pass over all weights: with pages of 4 KiB both
  // wait for address translation. Refused advice changes no result.
  constexpr size_t kMegabyte = size_t{1} << 20;
  if (mapped_bytes >= (full ? 8 : 64) * kMegabyte) madvise(data, mapped_bytes, MADV_HUGEPAGE);
#endif
  return Buffer(data, bytes, [mapped_bytes](void* memory) { munmap(memory, mapped_bytes); });
}

absl::Status CheckConversion(const TensorView& host, DType dtype) {
  for (const DType either : {host.dtype, dtype}) {
    if (host.cols % BlockOf(either).elements == 0) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("a row of ", host.cols, " elements is not whole blocks of ", BlockOf(either).elements,
                     ", which ", Name(either).data(), " needs"));
  }
  if (host.dtype == dtype || CanQuantizeTo(dtype)) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("weights stored as ", Name(host.dtype).data(),
                                                 " cannot be converted to ", Name(dtype).data(),
                                                 "; possible are f32, bf16, f16, q8_0, q4_0 and q4"));
}

absl::StatusOr<Weight> LoadHostWeight(const TensorView& host, DType dtype) {
  if (absl::Status possible = CheckConversion(host, dtype); !possible.ok()) return possible;
  Weight weight;
  weight.view = {host.data, dtype, host.rows, host.cols};
  const size_t alignment = IsQuantized(dtype) ? 1 : static_cast<size_t>(BlockOf(dtype).bytes);
  if (host.dtype == dtype && reinterpret_cast<uintptr_t>(host.data) % alignment == 0) return weight;
  absl::StatusOr<Buffer> copy = AllocateHostMemory(weight.view.bytes());
  if (!copy.ok()) return copy.status();
  if (host.dtype == dtype) {
    CopyHostMemory(copy->data(), host.data, host.bytes());
  } else {
    std::vector<float> values(static_cast<size_t>(host.cols));
    for (int64_t row = 0; row < host.rows; ++row) {
      const auto at = static_cast<size_t>(row);
      const std::byte* from = static_cast<const std::byte*>(host.data) + at * RowBytes(host.dtype, host.cols);
      DequantizeRow(host.dtype, from, host.cols, values.data());
      QuantizeRow(dtype, values.data(), host.cols, copy->data() + at * RowBytes(dtype, host.cols));
    }
  }
  weight.memory = *std::move(copy);
  weight.view.data = weight.memory.data();
  return weight;
}

void CopyHostMemory(void* to, const void* from, size_t bytes) {
  if (bytes != 0) std::memcpy(to, from, bytes);
}

}  // namespace atp
