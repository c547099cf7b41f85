// kernels/walsh_hadamard.h by the lanes of a warp, to the same bits.
#ifndef ATP_KERNELS_CUDA_WALSH_HADAMARD_CUH_
#define ATP_KERNELS_CUDA_WALSH_HADAMARD_CUH_

#include "kernels/cuda/launch.h"
#include "kernels/cuda/ops.h"
#include "kernels/walsh_hadamard.h"

namespace atp::cuda {

// Elements of a head that each lane of a warp has.
inline constexpr int kHeadVectors = kMaxHeadDim / kWarpSize;

// Vectors of d elements, each of kLanes neighbouring lanes: x[k] of lane l is element l % kLanes + k ·
// kLanes, or anything from d on.
template <int kLanes, int kCount>
__device__ __forceinline__ void WarpWalshHadamard(float (&x)[kCount], int d) {
  static_assert((kLanes & (kLanes - 1)) == 0 && (kCount & (kCount - 1)) == 0);
  int lane = static_cast<int>(threadIdx.x) % kLanes;
#ifndef ATP_CUDA_EMULATION
  // What follows from these is worth no register for as long as a kernel runs; compilers would move it out of
  // loops.
  asm volatile("" : "+r"(d), "+r"(lane));
#endif
  const int size = WalshHadamardBlock(d);
#pragma unroll
  for (int h = 1; h < kLanes; h *= 2) {
    if (h >= size) continue;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const float other = __shfl_xor_sync(kWarpMask, x[k], h);
      x[k] = (lane & h) != 0 ? other - x[k] : x[k] + other;
    }
  }
#pragma unroll
  for (int h = 1; h < kCount; h *= 2) {
    if (h * kLanes >= size) continue;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if ((k & h) != 0) continue;
      const float a = x[k], b = x[k + h];
      x[k] = a + b;
      x[k + h] = a - b;
    }
  }
  const float scale = 1.0f / sqrtf(static_cast<float>(size));
#pragma unroll
  for (int k = 0; k < kCount; ++k) x[k] *= scale;
}

}  // namespace atp::cuda

#endif  // ATP_KERNELS_CUDA_WALSH_HADAMARD_CUH_
