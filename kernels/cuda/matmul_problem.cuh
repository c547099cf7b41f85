// One matrix product as its kernels get it.
#ifndef ATP_KERNELS_CUDA_MATMUL_PROBLEM_CUH_
#define ATP_KERNELS_CUDA_MATMUL_PROBLEM_CUH_

#include "kernels/cuda/launch.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/weight_planes.h"

namespace atp::cuda {

struct MatMulProblem {
  const float* x;        // [rows, in]
  const uint16_t* half;  // x as bf16, for kernels that read it so
  WeightPlanes weight;   // [out, in]
  const float* bias;     // [out] or null
  float* y;              // [rows, out]
  int rows, in, out;
  bool accumulate;
  uint8_t padding[3] = {};
};

__device__ __forceinline__ void WriteOne(const MatMulProblem& p, int row, int out, float sum) {
  if (row >= p.rows || out >= p.out) return;
  float* y = p.y + static_cast<int64_t>(row) * p.out + out;
  if (p.bias != nullptr) sum += p.bias[out];
  *y = p.accumulate ? *y + sum : sum;
}

// Of weights that are f32, f16 or bf16, and any shape (matmul_float.cu).
cudaError_t MatMulFloat(const OpContext& context, const MatMulProblem& problem, DType weight);

}  // namespace atp::cuda

#endif  // ATP_KERNELS_CUDA_MATMUL_PROBLEM_CUH_
