// Rotates the pairs (i, i + head_dim/2) of every head by the row's angles, which the backend has computed in
// double.
#include "kernels/cpu/ops.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/rope.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/load-inl.h"

HWY_BEFORE_NAMESPACE();
namespace atp::cpu {
namespace HWY_NAMESPACE {

template <class D>
HWY_INLINE void RotatePairs(D d, float* HWY_RESTRICT low, float* HWY_RESTRICT high,
                            const float* HWY_RESTRICT cosine, const float* HWY_RESTRICT sine) {
  const auto a = hn::LoadU(d, low);
  const auto b = hn::LoadU(d, high);
  const auto c = hn::LoadU(d, cosine);
  const auto s = hn::LoadU(d, sine);
  hn::StoreU(hn::Sub(hn::Mul(a, c), hn::Mul(b, s)), d, low);
  hn::StoreU(hn::Add(hn::Mul(b, c), hn::Mul(a, s)), d, high);
}

void Rope(const RopeArgs& args, const float* angles, int64_t begin, int64_t end) {
  const hn::ScalableTag<float> d;
  const hn::CappedTag<float, 1> d1;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t half = args.head_dim / 2;
  for (int64_t row = begin; row < end; ++row) {
    const float* cosine = angles + row * 2 * half;
    const float* sine = cosine + half;
    for (int head = 0; head < args.heads; ++head) {
      float* low = args.x + (row * args.heads + head) * args.head_dim;
      float* high = low + half;
      int64_t i = 0;
      for (; i + lanes <= half; i += lanes) RotatePairs(d, low + i, high + i, cosine + i, sine + i);
      for (; i < half; ++i) RotatePairs(d1, low + i, high + i, cosine + i, sine + i);
    }
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace atp::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace atp::cpu {
HWY_EXPORT(Rope);
RopeFn RopeFor(int64_t target) { return ATP_FUNCTION_FOR(target, Rope); }
}  // namespace atp::cpu
#endif
