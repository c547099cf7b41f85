// Matrix products in fp32, one multiply-add after the other, for what tensor cores are not for (matmul.cu).
#include "kernels/cuda/launch.h"
#include "kernels/cuda/matmul_problem.cuh"
#include "kernels/cuda/stored_float.cuh"

namespace atp::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPlainTile = 32;  // rows and outputs of a block, and its depth

// fp32 products for every weight type and shape. A thread has one output of four rows.
template <class Weight>
__global__ void __launch_bounds__(kThreads) PlainKernel(MatMulProblem p) {
  constexpr int kStride = kPlainTile + 1, kRowsPerThread = kPlainTile * kPlainTile / kThreads;
  SharedArena arena;
  const Shared<float> xs = arena.Take<float>(kPlainTile * kStride);
  const Shared<float> ws = arena.Take<float>(kPlainTile * kStride);
  const int column = static_cast<int>(threadIdx.x) % kPlainTile,
            band = static_cast<int>(threadIdx.x) / kPlainTile;
  const int first_row = static_cast<int>(blockIdx.x) * kPlainTile,
            first_out = static_cast<int>(blockIdx.y) * kPlainTile;
  const auto* weight = static_cast<const typename Weight::Stored*>(p.weight.codes);
  float sums[kRowsPerThread] = {};
  for (int at = 0; at < p.in; at += kPlainTile) {
    const int k = at + column;
#pragma unroll
    for (int i = band; i < kPlainTile; i += kThreads / kPlainTile) {
      const int row = first_row + i, out = first_out + i;
      xs[i * kStride + column] = row < p.rows && k < p.in ? p.x[static_cast<int64_t>(row) * p.in + k] : 0.0f;
      ws[i * kStride + column] =
          out < p.out && k < p.in ? Weight::Value(weight[static_cast<int64_t>(out) * p.in + k]) : 0.0f;
    }
    __syncthreads();
    for (int d = 0; d < min(kPlainTile, p.in - at); ++d) {
      const float w = ws[column * kStride + d];
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) sums[r] += xs[(band * kRowsPerThread + r) * kStride + d] * w;
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    WriteOne(p, first_row + band * kRowsPerThread + r, first_out + column, sums[r]);
  }
}

template <class Weight>
cudaError_t Plain(const OpContext& context, const MatMulProblem& p) {
  const dim3 grid(static_cast<unsigned>(CeilDiv(p.rows, kPlainTile)),
                  static_cast<unsigned>(CeilDiv(p.out, kPlainTile)));
  return Launch("MatMul plain", PlainKernel<Weight>, grid, dim3(kThreads),
                2 * SharedBytes<float>(kPlainTile * (kPlainTile + 1)), context.stream, p);
}

}  // namespace

cudaError_t MatMulFloat(const OpContext& context, const MatMulProblem& problem, DType weight) {
  if (weight == DType::kBF16) return Plain<StoredBF16>(context, problem);
  return weight == DType::kF16 ? Plain<StoredF16>(context, problem) : Plain<StoredF32>(context, problem);
}

}  // namespace atp::cuda
