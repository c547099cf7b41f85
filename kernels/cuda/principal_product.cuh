// Matrix products in fp64 on the tensor cores: the fit's pivots and masses are as good as the digits they
// come from, and these products are nearly all of its arithmetic.
#ifndef ATP_KERNELS_CUDA_PRINCIPAL_PRODUCT_CUH_
#define ATP_KERNELS_CUDA_PRINCIPAL_PRODUCT_CUH_

#include "kernels/cuda/launch.h"

namespace atp::cuda {

// c += a·b: a [8 x 4], b [4 x 8], c [8 x 8]. Lane 4 g + t holds a[g][t], b[t][g], c[g][2 t] and c[g][2 t +
// 1].
#ifndef ATP_CUDA_EMULATION
__device__ __forceinline__ void MmaF64(double (&c)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
               : "+d"(c[0]), "+d"(c[1])
               : "d"(a), "d"(b));
}
#else
inline void MmaF64(double (&c)[2], double a, double b) {
  const double mine[2] = {a, b};
  double all[2 * kWarpSize];
  std::memcpy(all, emulation::Exchange("mma.f64", mine, sizeof(mine), __FILE__, __LINE__), sizeof(all));
  const int g = static_cast<int>(threadIdx.x) % kWarpSize / 4, t = static_cast<int>(threadIdx.x) % 4;
  for (int i = 0; i < 2; ++i) {
    for (int k = 0; k < 4; ++k)
      c[i] = std::fma(all[2 * (4 * g + k)], all[2 * (4 * (2 * t + i) + k) + 1], c[i]);
  }
}
#endif

// A matrix [size, inner] in memory; element (i, k) at i · stride + k · inner_stride.
struct Operand {
  const double* data;
  int stride, inner_stride;
};

// out[i][j] = add[i][j] + sign · Σ_k a(i, k)·b(j, k); out, add: [size_a, size_b].
struct Product {
  Operand a, b;
  int size_a, size_b, inner;
  const double* add;  // or null: 0
  double sign;
  double* out;
};

inline constexpr int kProductWarps = 4;
inline constexpr int kProductThreads = kProductWarps * kWarpSize;
inline constexpr int kWarpTile = 32;              // rows and columns of out per warp,
inline constexpr int kBlockTile = 2 * kWarpTile;  // and per block

// Tiles of `out` that blocks take.
__host__ __device__ inline int TilesOf(int size_a, int size_b) {
  return CeilDiv(size_a, kBlockTile) * CeilDiv(size_b, kBlockTile);
}

// One tile by a block of kProductThreads. Operands come straight from the first-level cache, where the
// warps' tiles meet; each element is summed in the order of k.
__device__ __forceinline__ void MultiplyTile(const Product& p, int tile) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize,
            warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const int columns = CeilDiv(p.size_b, kBlockTile);
  const int i0 = tile / columns * kBlockTile + warp / 2 * kWarpTile;
  const int j0 = tile % columns * kBlockTile + warp % 2 * kWarpTile;
  if (i0 >= p.size_a || j0 >= p.size_b) return;  // the whole warp; no barrier follows
  const double *a[4], *b[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    a[r] = i0 + 8 * r + g < p.size_a ? p.a.data + static_cast<int64_t>(i0 + 8 * r + g) * p.a.stride : nullptr;
    b[r] = j0 + 8 * r + g < p.size_b ? p.b.data + static_cast<int64_t>(j0 + 8 * r + g) * p.b.stride : nullptr;
  }
  double sum[4][4][2] = {};
#pragma unroll 2
  for (int k0 = 0; k0 < p.inner; k0 += 4) {
    const int k = k0 + t;
    double x[4], y[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      x[r] = a[r] != nullptr && k < p.inner ? a[r][static_cast<int64_t>(k) * p.a.inner_stride] : 0.0;
      y[r] = b[r] != nullptr && k < p.inner ? b[r][static_cast<int64_t>(k) * p.b.inner_stride] : 0.0;
    }
#pragma unroll
    for (int r = 0; r < 16; ++r) MmaF64(sum[r / 4][r % 4], x[r / 4], y[r % 4]);
  }
#pragma unroll
  for (int r = 0; r < 32; ++r) {
    const int i = i0 + r / 8 * 8 + g, j = j0 + r / 2 % 4 * 8 + 2 * t + r % 2;
    if (i >= p.size_a || j >= p.size_b) continue;
    const int64_t at = static_cast<int64_t>(i) * p.size_b + j;
    p.out[at] = (p.add != nullptr ? p.add[at] : 0.0) + p.sign * sum[r / 8][r / 2 % 4][r % 2];
  }
}

}  // namespace atp::cuda

#endif  // ATP_KERNELS_CUDA_PRINCIPAL_PRODUCT_CUH_
