// A typed, shaped pointer to memory that somebody else owns. Row-major, no strides.
#ifndef ATP_KERNELS_TENSOR_VIEW_H_
#define ATP_KERNELS_TENSOR_VIEW_H_

#include <cstddef>
#include <cstdint>

#include "kernels/dtype.h"

namespace atp {

// A matrix [rows, cols]; a vector is [1, cols]. Memory is on the device of the backend it is given to, unless
// a comment says host.
struct TensorView {
  const void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t rows = 0;
  int64_t cols = 0;
  // In a backend's own order, made by its LoadWeight: only that backend can read it.
  bool packed = false;

  size_t bytes() const { return static_cast<size_t>(rows) * RowBytes(dtype, cols); }
};

}  // namespace atp

#endif  // ATP_KERNELS_TENSOR_VIEW_H_
