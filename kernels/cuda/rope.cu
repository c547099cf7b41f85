// Rotates the pairs (i, i + head_dim/2) of every head, a block per row. The angle, position · frequency, is
// exact in double (31 and 24 bits); only turns are taken off it there, the rest is single precision.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ops.h"

namespace atp::cuda {
namespace {

constexpr int kThreads = 256;
constexpr double kTurnsPerRadian = 0.15915494309189533577;
constexpr float kPi = 3.14159265358979323846f;

// cos and sin of an angle given in half turns, as a double in [-1, 1]: what the nearest float leaves of it is
// a first-order correction.
__device__ __forceinline__ float2 CosSinOfHalfTurns(double half_turns) {
  const float head = static_cast<float>(half_turns);
  const float tail = static_cast<float>(half_turns - static_cast<double>(head)) * kPi;
  float sine, cosine;
  sincospif(head, &sine, &cosine);
  return make_float2(cosine - tail * sine, sine + tail * cosine);
}

__global__ void __launch_bounds__(kThreads)
    RopeKernel(float* x, const int32_t* positions, const float* inverse_frequency, int heads, int half) {
  SharedArena arena;
  const Shared<float> cosines = arena.Take<float>(half);
  const Shared<float> sines = arena.Take<float>(half);
  const double position = static_cast<double>(positions[blockIdx.x]);
  for (int i = static_cast<int>(threadIdx.x); i < half; i += kThreads) {
    const double turns = position * static_cast<double>(inverse_frequency[i]) * kTurnsPerRadian;
    const float2 rotation = CosSinOfHalfTurns(2.0 * (turns - rint(turns)));
    cosines[i] = rotation.x;
    sines[i] = rotation.y;
  }
  __syncthreads();
  float* row = x + static_cast<int64_t>(blockIdx.x) * heads * half * 2;
  for (int pair = static_cast<int>(threadIdx.x); pair < heads * half; pair += kThreads) {
    const int i = pair % half;
    float* at = row + static_cast<int64_t>(pair / half) * 2 * half + i;
    const float a = at[0], b = at[half], cosine = cosines[i], sine = sines[i];
    at[0] = a * cosine - b * sine;
    at[half] = b * cosine + a * sine;
  }
}

}  // namespace

cudaError_t Rope(const OpContext& context, const RopeArgs& args) {
  cudaError_t error;
  const int32_t* positions = context.staging->Upload(args.positions, context.stream, &error);
  if (error != cudaSuccess) return error;
  const int half = args.head_dim / 2;
  return Launch("Rope", RopeKernel, dim3(static_cast<unsigned>(args.positions.size())), dim3(kThreads),
                2 * SharedBytes<float>(half), context.stream, args.x, positions, args.inverse_frequency,
                args.heads, half);
}

}  // namespace atp::cuda
