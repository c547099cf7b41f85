// Rotates the pairs (i, i + head_dim/2) of every head, a block per row.
#include "kernels/cuda/kv_tables.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/rotation.cuh"

namespace atp::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    RopeKernel(float* x, const int32_t* positions, const float* inverse_frequency, int heads, int half) {
  SharedArena arena;
  const Shared<float> cosines = arena.Take<float>(half);
  const Shared<float> sines = arena.Take<float>(half);
  for (int i = static_cast<int>(threadIdx.x); i < half; i += kThreads) {
    const float2 rotation = RotationOf(positions[blockIdx.x], inverse_frequency[i]);
    cosines[i] = rotation.x;
    sines[i] = rotation.y;
  }
  __syncthreads();
  float* row = x + static_cast<int64_t>(blockIdx.x) * heads * half * 2;
  for (int pair = static_cast<int>(threadIdx.x); pair < heads * half; pair += kThreads) {
    const int i = pair % half;
    float* at = row + static_cast<int64_t>(pair / half) * 2 * half + i;
    const float2 rotated = Rotated(at[0], at[half], cosines[i], sines[i]);
    at[0] = rotated.x;
    at[half] = rotated.y;
  }
}

}  // namespace

cudaError_t Rope(const OpContext& context, const RopeArgs& args) {
  cudaError_t error;
  const int32_t* positions = PositionsOf(context, args.positions, &error);
  if (error != cudaSuccess) return error;
  const int half = args.head_dim / 2;
  return Launch("Rope", RopeKernel, dim3(static_cast<unsigned>(args.positions.size())), dim3(kThreads),
                2 * SharedBytes<float>(half), context.stream, args.x, positions, args.inverse_frequency,
                args.heads, half);
}

}  // namespace atp::cuda
