// States of an unfinished softmax that can be merged (Milakov & Gimelshein 2018; FlashAttention, Dao et al.
// 2022): of some of the entries, per query, the largest exponent, the sum of weights relative to it, and the
// weighted sum of values. Exponents are of base 2.
//
// Attention is a fold of a fixed shape, whatever kernel computes it: entries in tiles within units, units
// within chunks, chunks of the principal part and then of the exact part. A query meets the same tiles, units
// and chunks in the same order alone or in a batch, so that its result does not depend on the others to the
// last bit. Every product and sum is written out, so that no compiler fuses them one way here, another there.
#ifndef ATP_KERNELS_CUDA_ONLINE_SOFTMAX_CUH_
#define ATP_KERNELS_CUDA_ONLINE_SOFTMAX_CUH_

#include "kernels/cuda/launch.h"

namespace atp::cuda {

inline constexpr int kTileEntries = 64;                // that a warp's matrix products take at once
inline constexpr int kUnitEntries = 2 * kTileEntries;  // that one warp goes through alone
inline constexpr int kChunkUnits = 4;                  // warps of a block
inline constexpr int kChunkEntries = kChunkUnits * kUnitEntries;

inline constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ float MinusInfinity() { return __int_as_float(static_cast<int>(0xff800000u)); }

// What both sides' sums are multiplied by when `next` comes behind a state.
struct Merge {
  float maximum;
  float before, next;

  __device__ __forceinline__ Merge(float maximum_before, float maximum_next)
      : maximum(fmaxf(maximum_before, maximum_next)),
        before(exp2f(maximum_before - maximum)),
        next(exp2f(maximum_next - maximum)) {}

  __device__ __forceinline__ float operator()(float sum_before, float sum_next) const {
    return fmaf(sum_before, before, __fmul_rn(sum_next, next));
  }
};

// A state of which no entry is visible changes nothing; it must not be merged (its maximum is -inf).
__device__ __forceinline__ bool IsEmpty(float maximum) { return maximum == MinusInfinity(); }

}  // namespace atp::cuda

#endif  // ATP_KERNELS_CUDA_ONLINE_SOFTMAX_CUH_
