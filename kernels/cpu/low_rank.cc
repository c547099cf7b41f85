#include "kernels/low_rank.h"

#include "kernels/cpu/ops.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/low_rank.cc"
// foreach_target.h must come first.
// clang-format off
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include <cmath>

#include "hwy/highway.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/load-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace atp::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;

float Dot(const float* HWY_RESTRICT x, const float* HWY_RESTRICT y, int64_t size) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  V sums[4];
  ATP_UNROLL for (V& sum : sums) sum = hn::Zero(d);
  int64_t i = 0;
  for (; i + 4 * lanes <= size; i += 4 * lanes) {
    ATP_UNROLL for (int v = 0; v < 4; ++v) sums[v] =
        hn::MulAdd(hn::LoadU(d, x + i + v * lanes), hn::LoadU(d, y + i + v * lanes), sums[v]);
  }
  for (; i + lanes <= size; i += lanes)
    sums[0] = hn::MulAdd(hn::LoadU(d, x + i), hn::LoadU(d, y + i), sums[0]);
  const V sum = hn::Add(hn::Add(sums[0], sums[1]), hn::Add(sums[2], sums[3]));
  float total = hn::GetLane(hn::SumOfLanes(d, sum));
  for (; i < size; ++i) total += x[i] * y[i];
  return total;
}

// to := a · to + b · from
void Combine(float* HWY_RESTRICT to, float a, float b, const float* HWY_RESTRICT from, int64_t size) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const V va = hn::Set(d, a), vb = hn::Set(d, b);
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes) {
    const V scaled = hn::Mul(va, hn::LoadU(d, to + i));
    hn::StoreU(hn::MulAdd(vb, hn::LoadU(d, from + i), scaled), d, to + i);
  }
  for (; i < size; ++i) to[i] = a * to[i] + b * from[i];
}

// Gram-Schmidt, twice: the second pass makes up for the rounding of the first (kLowRankLeft).
void Orthonormalize(float* columns, int64_t count, int64_t size) {
  for (int64_t j = 0; j < count; ++j) {
    float* const column = columns + j * size;
    double left[2];  // by each pass
    for (double& norm : left) {
      for (int64_t k = 0; k < j; ++k) {
        const float* const before = columns + k * size;
        Combine(column, 1.0f, -Dot(column, before, size), before, size);
      }
      norm = std::sqrt(double{Dot(column, column, size)});
    }
    const float scale = left[1] > kLowRankLeft * left[0] ? static_cast<float>(1 / left[1]) : 0.0f;
    for (int64_t i = 0; i < size; ++i) column[i] *= scale;
  }
}

void Centre(const LowRankInputArgs& args, int64_t begin, int64_t end, float* centred) {
  const int64_t size = end - begin;
  float* const mean = args.right + args.rank * args.dim + begin;
  for (int64_t c = 0; c < size; ++c) mean[c] = 0;
  for (int64_t i = 0; i < args.rows; ++i) Combine(mean, 1.0f, 1.0f, args.x + i * args.dim + begin, size);
  for (int64_t c = 0; c < size; ++c) mean[c] /= static_cast<float>(args.rows);
  for (int64_t i = 0; i < args.rows; ++i) {
    const float* const x = args.x + i * args.dim + begin;
    float* const to = centred + i * args.dim + begin;
    for (int64_t c = 0; c < size; ++c) to[c] = x[c] - mean[c];
  }
}

LowRankLoops Loops() { return {Centre, Orthonormalize}; }

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace atp::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace atp::cpu {
HWY_EXPORT(Loops);
LowRankLoops LowRankLoopsFor(int64_t target) { return ATP_FUNCTION_FOR(target, Loops)(); }
}  // namespace atp::cpu
#endif
