// kernels/key_rounding.h for one job of FitPrincipalKeys, by a block of kFitThreads and to the same bits:
// sums in the same order, nothing fused.
#ifndef ATP_KERNELS_CUDA_KEY_ROUNDING_CUH_
#define ATP_KERNELS_CUDA_KEY_ROUNDING_CUH_

#include "kernels/cuda/principal_job.cuh"
#include "kernels/cuda/principal_pages.cuh"
#include "kernels/cuda/walsh_hadamard.cuh"
#include "kernels/key_rounding.h"

namespace atp::cuda {

__device__ __forceinline__ float MinusProduct(float x, float a, float b) {
  return __fadd_rn(x, -__fmul_rn(a, b));
}

// A row of the job's [.., d] matrices by a warp, lane after lane, in the Walsh–Hadamard basis.
__device__ __forceinline__ void LoadTransformed(const double* row, int d, float (&x)[kHeadVectors]) {
#pragma unroll
  for (int k = 0; k < kHeadVectors; ++k) {
    const int c = static_cast<int>(threadIdx.x) % kWarpSize + k * kWarpSize;
    x[k] = c < d ? static_cast<float>(row[c]) : 0.0f;
  }
  WarpWalshHadamard<kWarpSize>(x, d);
}
__device__ __forceinline__ void StoreRow(const float (&x)[kHeadVectors], int d, double* row) {
#pragma unroll
  for (int k = 0; k < kHeadVectors; ++k) {
    const int c = static_cast<int>(threadIdx.x) % kWarpSize + k * kWarpSize;
    if (c < d) row[c] = x[k];
  }
}

// job.rounding: the factor [d, d], row i of it U_ij for j > i, and room for H. Overwrites the queries it
// takes.
__device__ __forceinline__ void PrepareRounding(const FitJob& job, int d, const Shared<double>& room) {
  const int me = static_cast<int>(threadIdx.x);
  float *factor = job.rounding, *gram = factor + d * d;
  const int step = CeilDiv(job.m, kKeyRoundingQueries), count = CeilDiv(job.m, step);
  double* const queries = job.queries_rotated;
  const int64_t stride = static_cast<int64_t>(step) * d;
#pragma unroll 1
  for (int q = me / kWarpSize; q < count; q += kFitWarps) {
    float x[kHeadVectors];
    LoadTransformed(queries + q * stride, d, x);
    StoreRow(x, d, queries + q * stride);
  }
  __syncthreads();
#pragma unroll 1
  for (int at = me; at < d * d; at += kFitThreads) {
    const int i = at / d, j = at % d;
    if (j > i) continue;
    float sum = 0;
    for (int q = 0; q < count; ++q) {
      const double* query = queries + q * stride;
      sum = __fadd_rn(sum, __fmul_rn(static_cast<float>(query[i]), static_cast<float>(query[j])));
    }
    gram[at] = sum;
  }
  __syncthreads();
  float trace = 0;
  for (int i = 0; i < d; ++i) trace = __fadd_rn(trace, gram[i * (d + 1)]);
  const float damping = fmaxf(__fmul_rn(kKeyRoundingDamping, trace) / static_cast<float>(d), 1e-20f);
  __syncthreads();
  for (int i = me; i < d; i += kFitThreads) gram[i * (d + 1)] = __fadd_rn(gram[i * (d + 1)], damping);
  __syncthreads();
  double wrong = 0;
#pragma unroll 1
  for (int j = d - 1; j > 0; --j) {
    const float* pivot = gram + j * d;
    const float inverse = 1.0f / pivot[j];
    for (int i = me; i < j; i += kFitThreads) {
      const float u = __fmul_rn(pivot[i], inverse);
      factor[i * d + j] = u;
      wrong += fabsf(u) <= 3.402823466e38f ? 0.0 : 1.0;
    }
    __syncthreads();
#pragma unroll 1
    for (int at = me; at < j * j; at += kFitThreads) {
      const int i = at / j, k = at % j;
      if (k <= i) gram[i * d + k] = MinusProduct(gram[i * d + k], factor[i * d + j], pivot[k]);
    }
    __syncthreads();
  }
  if (BlockSum(wrong, room) == 0) return;
  for (int at = me; at < d * d; at += kFitThreads) factor[at] = 0;
  __syncthreads();
}

// A key by a warp, in place.
__device__ __forceinline__ void RoundKey(const float* factor, int d, float scale, int top,
                                         float (&key)[kHeadVectors]) {
  if (scale == 0) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const float inverse = 1.0f / scale;
  float cost[kHeadVectors] = {};
#pragma unroll
  for (int k = 0; k < kHeadVectors; ++k) {
#pragma unroll 1
    for (int l = 0; l < kWarpSize && k * kWarpSize + l < d; ++l) {
      const int i = k * kWarpSize + l;
      const float steps = rintf(__fmul_rn(__fadd_rn(key[k], -cost[k]), inverse));
      const float rounded =
          __fmul_rn(fminf(fmaxf(steps, static_cast<float>(-top - 1)), static_cast<float>(top)), scale);
      const float error = __shfl_sync(kWarpMask, __fadd_rn(rounded, -key[k]), l);
      if (lane == l) key[k] = rounded;
#pragma unroll
      for (int other = k; other < kHeadVectors; ++other) {
        const int j = other * kWarpSize + lane;
        if (j > i && j < d) cost[other] = __fadd_rn(cost[other], __fmul_rn(factor[i * d + j], error));
      }
    }
  }
}

}  // namespace atp::cuda

#endif  // ATP_KERNELS_CUDA_KEY_ROUNDING_CUH_
