// Elements of weights and tables as they are stored, read as fp32.
#ifndef ATP_KERNELS_CUDA_STORED_FLOAT_CUH_
#define ATP_KERNELS_CUDA_STORED_FLOAT_CUH_

#include <cstdint>

#include "kernels/cuda/launch.h"

namespace atp::cuda {

struct StoredF32 {
  using Stored = float;
  static __device__ __forceinline__ float Value(float stored) { return stored; }
};
struct StoredBF16 {
  using Stored = uint16_t;
  static __device__ __forceinline__ float Value(uint16_t stored) { return BF16ToFloat(stored); }
};
struct StoredF16 {
  using Stored = uint16_t;
  static __device__ __forceinline__ float Value(uint16_t stored) { return F16ToFloat(stored); }
};

}  // namespace atp::cuda

#endif  // ATP_KERNELS_CUDA_STORED_FLOAT_CUH_
