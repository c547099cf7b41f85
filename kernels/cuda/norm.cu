// y = x / sqrt(mean(x²) + eps) · weight: a block per row. The row stays in registers between the sum and the
// product where it is short enough, so that it is read once.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ops.h"

namespace atp::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kHeld = 8;  // float4s of a row that a thread holds: rows up to 8192 are read once

// Sum over the block, in an order that depends on nothing but the number of threads. partial: [kWarps].
__device__ __forceinline__ float BlockSum(float value, const Shared<float>& partial) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  value = WarpSum(value);
  if (threadIdx.x % kWarpSize == 0) partial[warp] = value;
  __syncthreads();
  float total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += partial[w];
  return total;
}

__device__ __forceinline__ float InverseNorm(float squares, int dim, float epsilon) {
  return 1.0f / sqrtf(squares / static_cast<float>(dim) + epsilon);
}

__device__ __forceinline__ float SquaresOf(const float4& v) {
  return v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
}

// dim: a multiple of 4.
__global__ void __launch_bounds__(kThreads)
    RmsNormVectors(const float* x, const float* weight, float* y, int dim, float epsilon) {
  SharedArena arena;
  const Shared<float> partial = arena.Take<float>(kWarps);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * dim;
  const float4* in = reinterpret_cast<const float4*>(x + row);
  const float4* scale = reinterpret_cast<const float4*>(weight);
  float4* out = reinterpret_cast<float4*>(y + row);
  const int vectors = dim / 4, first = static_cast<int>(threadIdx.x);
  float4 held[kHeld];
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int at = first + i * kThreads;
    held[i] = at < vectors ? in[at] : make_float4(0, 0, 0, 0);
    squares += SquaresOf(held[i]);
  }
  for (int at = first + kHeld * kThreads; at < vectors; at += kThreads) squares += SquaresOf(in[at]);
  const float inverse = InverseNorm(BlockSum(squares, partial), dim, epsilon);
  const auto write = [&](int at, const float4& v) {
    const float4 w = scale[at];
    out[at] = make_float4(v.x * inverse * w.x, v.y * inverse * w.y, v.z * inverse * w.z, v.w * inverse * w.w);
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (first + i * kThreads < vectors) write(first + i * kThreads, held[i]);
  }
  for (int at = first + kHeld * kThreads; at < vectors; at += kThreads) write(at, in[at]);
}

__global__ void __launch_bounds__(kThreads)
    RmsNormElements(const float* x, const float* weight, float* y, int dim, float epsilon) {
  SharedArena arena;
  const Shared<float> partial = arena.Take<float>(kWarps);
  const float* in = x + static_cast<int64_t>(blockIdx.x) * dim;
  float* out = y + static_cast<int64_t>(blockIdx.x) * dim;
  float squares = 0;
  for (int i = static_cast<int>(threadIdx.x); i < dim; i += kThreads) squares += in[i] * in[i];
  const float inverse = InverseNorm(BlockSum(squares, partial), dim, epsilon);
  for (int i = static_cast<int>(threadIdx.x); i < dim; i += kThreads) out[i] = in[i] * inverse * weight[i];
}

}  // namespace

cudaError_t RmsNorm(const OpContext& context, const RmsNormArgs& args) {
  const dim3 grid(static_cast<unsigned>(args.rows));
  return Launch("RmsNorm", args.dim % 4 == 0 ? RmsNormVectors : RmsNormElements, grid, dim3(kThreads),
                SharedBytes<float>(kWarps), context.stream, args.x, args.weight, args.y,
                static_cast<int>(args.dim), args.epsilon);
}

}  // namespace atp::cuda
