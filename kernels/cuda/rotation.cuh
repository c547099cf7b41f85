// Rotary positions. The angle, position · frequency, is exact in double (31 and 24 bits); only turns are
// taken off it there, the rest is single precision.
#ifndef ATP_KERNELS_CUDA_ROTATION_CUH_
#define ATP_KERNELS_CUDA_ROTATION_CUH_

#include "kernels/cuda/launch.h"

namespace atp::cuda {

// cos and sin of position · inverse_frequency: of half turns as a double in [-1, 1], where what the nearest
// float leaves of it is a first-order correction. Written out, so that all kernels round alike.
__device__ __forceinline__ float2 RotationOf(int32_t position, float inverse_frequency) {
  constexpr double kTurnsPerRadian = 0.15915494309189533577;
  constexpr float kPi = 3.14159265358979323846f;
  const double turns =
      static_cast<double>(position) * static_cast<double>(inverse_frequency) * kTurnsPerRadian;
  const double half_turns = 2.0 * (turns - rint(turns));
  const float head = static_cast<float>(half_turns);
  const float tail = static_cast<float>(half_turns - static_cast<double>(head)) * kPi;
  float sine, cosine;
  sincospif(head, &sine, &cosine);
  return make_float2(fmaf(-tail, sine, cosine), fmaf(tail, cosine, sine));
}

// The pair (a, b), rotated; written out for the same reason.
__device__ __forceinline__ float2 Rotated(float a, float b, float cosine, float sine) {
  return make_float2(fmaf(a, cosine, -__fmul_rn(b, sine)), fmaf(b, cosine, __fmul_rn(a, sine)));
}

}  // namespace atp::cuda

#endif  // ATP_KERNELS_CUDA_ROTATION_CUH_
