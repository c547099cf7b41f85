// Small dense products and systems of the principal fit, once per target. Matrices are row-major and 64-byte
// aligned, rows padded with zeros to multiples of kPad.
#if defined(ATP_KERNELS_CPU_DENSE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ATP_KERNELS_CPU_DENSE_INL_H_
#undef ATP_KERNELS_CPU_DENSE_INL_H_
#else
#define ATP_KERNELS_CPU_DENSE_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "kernels/cpu/load-inl.h"

HWY_BEFORE_NAMESPACE();
namespace atp::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

constexpr size_t kPad = 32;  // two vectors of every target

using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;
using D64 = hn::ScalableTag<double>;
using V64 = hn::Vec<D64>;
using DHalf = hn::Rebind<float, D64>;

// Rows of a register tile of Product: twice as many vectors of sums as rows.
#if HWY_TARGET <= HWY_AVX3
constexpr int kTile = 8;
#else
constexpr int kTile = 4;
#endif

// out[a][c] += sign · Σ_b row(a)[b · step] · x[b][c] for a < rows, b < inner, c < cols (a multiple of kPad).
// Sums of kChunk products at a time, which keeps x in the first-level cache and rounding errors short.
// triangle: of a symmetric product only the elements on the diagonal and behind it are wanted.
template <class Row>
HWY_INLINE void Product(const Row& row, size_t step, const float* HWY_RESTRICT x, size_t x_stride, int rows,
                        int inner, size_t cols, float* HWY_RESTRICT out, size_t out_stride,
                        bool triangle = false, float sign = 1.0f) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  const V signs = hn::Set(d, sign);
  constexpr int kChunk = 32;
  for (int b0 = 0; b0 < inner; b0 += kChunk) {
    const size_t chunk = static_cast<size_t>(std::min(kChunk, inner - b0));
    for (int a0 = 0; a0 < rows; a0 += kTile) {
      const int tile = std::min(kTile, rows - a0);
      const float* factor[kTile];
      for (int a = 0; a < kTile; ++a) factor[a] = row(a0 + std::min(a, tile - 1)) + b0 * step;
      for (size_t c = triangle ? a0 / kPad * kPad : 0; c < cols; c += 2 * lanes) {
        V sum[kTile][2];
        ATP_UNROLL
        for (int a = 0; a < kTile; ++a) sum[a][0] = sum[a][1] = hn::Zero(d);
        const float* HWY_RESTRICT in = x + b0 * x_stride + c;
        for (size_t b = 0; b < chunk; ++b, in += x_stride) {
          const V x0 = hn::Load(d, in), x1 = hn::Load(d, in + lanes);
          ATP_UNROLL
          for (int a = 0; a < kTile; ++a) {
            const V f = hn::Set(d, factor[a][b * step]);
            sum[a][0] = hn::MulAdd(f, x0, sum[a][0]);
            sum[a][1] = hn::MulAdd(f, x1, sum[a][1]);
          }
        }
        ATP_UNROLL
        for (int a = 0; a < kTile; ++a) {
          if (a >= tile) break;
          float* to = out + (a0 + a) * out_stride + c;
          hn::Store(hn::MulAdd(signs, sum[a][0], hn::Load(d, to)), d, to);
          hn::Store(hn::MulAdd(signs, sum[a][1], hn::Load(d, to + lanes)), d, to + lanes);
        }
      }
    }
  }
}

// x[0..size) *= factor of 1 / Σ x; the sum.
HWY_INLINE float Normalize(float* HWY_RESTRICT x, size_t size, float least) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  V sum = hn::Zero(d);
  for (size_t i = 0; i < size; i += lanes) sum = hn::Add(sum, hn::Load(d, x + i));
  const float total = hn::GetLane(hn::SumOfLanes(d, sum));
  const V scale = hn::Set(d, 1.0f / std::max(total, least));
  for (size_t i = 0; i < size; i += lanes) hn::Store(hn::Mul(hn::Load(d, x + i), scale), d, x + i);
  return total;
}

// x := exp(x - max x)
HWY_INLINE void Exponentials(float* HWY_RESTRICT x, size_t size) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  V top = hn::Load(d, x);
  for (size_t i = lanes; i < size; i += lanes) top = hn::Max(top, hn::Load(d, x + i));
  top = hn::MaxOfLanes(d, top);
  for (size_t i = 0; i < size; i += lanes) hn::Store(hn::Exp(d, hn::Sub(hn::Load(d, x + i), top)), d, x + i);
}

// kVectors vectors of y := matrix x, for a symmetric matrix [r, stride].
template <int kVectors>
HWY_INLINE void MultiplyColumns(const float* HWY_RESTRICT matrix, const float* HWY_RESTRICT x, int r,
                                size_t stride, float* HWY_RESTRICT y) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  V sum[kVectors];
  ATP_UNROLL
  for (int v = 0; v < kVectors; ++v) sum[v] = hn::Zero(d);
  for (int j = 0; j < r; ++j, matrix += stride) {
    const V f = hn::Set(d, x[j]);
    ATP_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[v] = hn::MulAdd(f, hn::Load(d, matrix + v * lanes), sum[v]);
  }
  ATP_UNROLL
  for (int v = 0; v < kVectors; ++v) hn::Store(sum[v], d, y + v * lanes);
}

// y := matrix x, for a symmetric matrix [r, stride]; x and y are padded.
HWY_INLINE void Multiply(const float* HWY_RESTRICT matrix, const float* HWY_RESTRICT x, int r, size_t stride,
                         float* HWY_RESTRICT y) {
  const size_t lanes = hn::Lanes(D());
  size_t c = 0;
  for (; c + 8 * lanes <= stride; c += 8 * lanes) MultiplyColumns<8>(matrix + c, x, r, stride, y + c);
  for (; c + 4 * lanes <= stride; c += 4 * lanes) MultiplyColumns<4>(matrix + c, x, r, stride, y + c);
  for (; c < stride; c += 2 * lanes) MultiplyColumns<2>(matrix + c, x, r, stride, y + c);
}

// to[j] -= factor · from[j], j in [begin, size), and perhaps some before begin.
HWY_INLINE void Subtract(float* HWY_RESTRICT to, float factor, const float* HWY_RESTRICT from, size_t begin,
                         size_t size) {
  const D d;
  const V f = hn::Set(d, factor);
  for (size_t j = begin / hn::Lanes(d) * hn::Lanes(d); j < size; j += hn::Lanes(d))
    hn::Store(hn::NegMulAdd(f, hn::Load(d, from + j), hn::Load(d, to + j)), d, to + j);
}

// Cholesky of the upper triangle of a matrix [r, stride] in place, matrix = UᵀU, kPad rows at a time; false
// when it is not positive definite.
HWY_INLINE bool Factorize(float* matrix, int r, size_t stride) {
  for (int begin = 0; begin < r; begin += kPad) {
    const int end = std::min<int>(r, begin + kPad);
    for (int k = begin; k < end; ++k) {
      float* row = matrix + k * stride;
      if (!(row[k] > 0)) return false;
      const float scale = 1 / std::sqrt(row[k]);
      for (size_t j = k; j < stride; ++j) row[j] *= scale;
      for (int i = k + 1; i < end; ++i) Subtract(matrix + i * stride, row[i], row, i, stride);
    }
    const float* rows = matrix + begin * stride + end;
    Product([&](int i) { return rows + i; }, stride, rows, stride, r - end, end - begin, stride - end,
            matrix + end * stride + end, stride, /*triangle=*/true, /*sign=*/-1.0f);
  }
  return true;
}

// x [r, width] := (UᵀU)⁻¹ x.
HWY_INLINE void Solve(const float* factor, int r, size_t stride, float* x, size_t width) {
  const auto scale = [&](int i) {
    const float by = 1 / factor[i * stride + i];
    for (size_t c = 0; c < width; ++c) x[i * width + c] *= by;
  };
  for (int begin = 0; begin < r; begin += kPad) {
    const int end = std::min<int>(r, begin + kPad);
    Product([&](int i) { return factor + begin + i; }, stride, x, width, end - begin, begin, width,
            x + begin * width, width, /*triangle=*/false, /*sign=*/-1.0f);
    for (int i = begin; i < end; ++i) {
      for (int k = begin; k < i; ++k)
        Subtract(x + i * width, factor[k * stride + i], x + k * width, 0, width);
      scale(i);
    }
  }
  for (int begin = (r - 1) / static_cast<int>(kPad) * static_cast<int>(kPad); begin >= 0; begin -= kPad) {
    const int end = std::min<int>(r, begin + kPad);
    Product([&](int i) { return factor + (begin + i) * stride + end; }, 1, x + end * width, width,
            end - begin, r - end, width, x + begin * width, width, /*triangle=*/false, /*sign=*/-1.0f);
    for (int i = end - 1; i >= begin; --i) {
      for (int k = i + 1; k < end; ++k)
        Subtract(x + i * width, factor[i * stride + k], x + k * width, 0, width);
      scale(i);
    }
  }
}

HWY_INLINE double SumOfProducts(const float* x, const float* y, size_t size) {
  const D d;
  double total = 0;
  constexpr size_t kRun = 2048;
  for (size_t begin = 0; begin < size; begin += kRun) {
    V sum = hn::Zero(d);
    for (size_t i = begin; i < std::min(begin + kRun, size); i += hn::Lanes(d))
      sum = hn::MulAdd(hn::Load(d, x + i), hn::Load(d, y + i), sum);
    total += double{hn::GetLane(hn::SumOfLanes(d, sum))};
  }
  return total;
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace atp::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
