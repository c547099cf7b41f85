// y = x / sqrt(mean(x²) + eps) · weight. A row is summed in four fixed vectors, whatever else is in the call.
#include <cmath>

#include "kernels/cpu/ops.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/norm.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/load-inl.h"

HWY_BEFORE_NAMESPACE();
namespace atp::cpu {
namespace HWY_NAMESPACE {

HWY_INLINE float SumOfSquares(const float* HWY_RESTRICT x, int64_t dim) {
  const hn::ScalableTag<float> d;
  using V = hn::Vec<decltype(d)>;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  V acc[4];
  ATP_UNROLL for (int a = 0; a < 4; ++a) acc[a] = hn::Zero(d);
  int64_t i = 0;
  for (; i + 4 * lanes <= dim; i += 4 * lanes) {
    ATP_UNROLL for (int a = 0; a < 4; ++a) {
      const V v = hn::LoadU(d, x + i + a * lanes);
      acc[a] = hn::MulAdd(v, v, acc[a]);
    }
  }
  for (; i + lanes <= dim; i += lanes) {
    const V v = hn::LoadU(d, x + i);
    acc[0] = hn::MulAdd(v, v, acc[0]);
  }
  if (i < dim) {
    const V v = LoadFirst(d, x + i, static_cast<size_t>(dim - i));
    acc[0] = hn::MulAdd(v, v, acc[0]);
  }
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(acc[0], acc[1]), hn::Add(acc[2], acc[3]))));
}

void RmsNorm(const RmsNormArgs& args, int64_t begin, int64_t end) {
  const hn::ScalableTag<float> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t row = begin; row < end; ++row) {
    const float* x = args.x + row * args.dim;
    float* y = args.y + row * args.dim;
    const float mean = SumOfSquares(x, args.dim) / static_cast<float>(args.dim);
    const float inverse = 1.0f / std::sqrt(mean + args.epsilon);
    const auto scale = hn::Set(d, inverse);
    int64_t i = 0;
    for (; i + lanes <= args.dim; i += lanes) {
      const auto normalized = hn::Mul(hn::LoadU(d, x + i), scale);
      hn::StoreU(hn::Mul(normalized, hn::LoadU(d, args.weight + i)), d, y + i);
    }
    for (; i < args.dim; ++i) y[i] = x[i] * inverse * args.weight[i];
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace atp::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace atp::cpu {
HWY_EXPORT(RmsNorm);
RmsNormFn RmsNormFor(int64_t target) { return ATP_FUNCTION_FOR(target, RmsNorm); }
}  // namespace atp::cpu
#endif
