// Buffers in the memory of this process: what the reference and cpu backends call device memory.
#ifndef ATP_KERNELS_HOST_MEMORY_H_
#define ATP_KERNELS_HOST_MEMORY_H_

#include <cstddef>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/buffer.h"
#include "kernels/tensor_view.h"

namespace atp {

// Zeroed, page-aligned (hence 64-byte aligned) anonymous memory; pages that nobody touches cost nothing.
// ResourceExhausted, naming the bytes, when the system refuses. Buffers that will be `full` are of huge pages
// from 8 MB on; others, of which a touched byte would cost a whole one, from 64 MB on.
absl::StatusOr<Buffer> AllocateHostMemory(size_t bytes, bool full = false);

// A view of `host` as it is; a copy in `dtype` where that differs, or where the address is not a multiple of
// the element size (offsets in a safetensors file need not be). InvalidArgument as Backend::LoadWeight says.
absl::StatusOr<Weight> LoadHostWeight(const TensorView& host, DType dtype);

// Whether `host` can be kept as `dtype`: InvalidArgument says why not.
absl::Status CheckConversion(const TensorView& host, DType dtype);

// memcpy, where no bytes may come from and go to nowhere (null).
void CopyHostMemory(void* to, const void* from, size_t bytes);

}  // namespace atp

#endif  // ATP_KERNELS_HOST_MEMORY_H_
