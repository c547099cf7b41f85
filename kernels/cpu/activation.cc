// out = silu(gate) · up, silu(g) = g / (1 + e^-g). An element's value does not depend on where its part
// begins: the last, partly filled vector goes through the same arithmetic as the full ones.
#include "kernels/cpu/ops.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/activation.cc"
// foreach_target.h must come first.
// clang-format off
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "hwy/contrib/math/math-inl.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/load-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace atp::cpu {
namespace HWY_NAMESPACE {

template <class D, class V>
HWY_INLINE V SiluTimes(D d, V gate, V up) {
  // e^88 is still finite; beyond it silu is 0 to within 1e-36.
  const V exp = hn::Exp(d, hn::Min(hn::Neg(gate), hn::Set(d, 88.0f)));
  return hn::Mul(hn::Div(gate, hn::Add(hn::Set(d, 1.0f), exp)), up);
}

void SwiGlu(const SwiGluArgs& args, int64_t begin, int64_t end) {
  const hn::ScalableTag<float> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = begin;
  for (; i + lanes <= end; i += lanes) {
    hn::StoreU(SiluTimes(d, hn::LoadU(d, args.gate + i), hn::LoadU(d, args.up + i)), d, args.out + i);
  }
  if (i < end) {
    const size_t rest = static_cast<size_t>(end - i);
    StoreFirst(d, SiluTimes(d, LoadFirst(d, args.gate + i, rest), LoadFirst(d, args.up + i, rest)),
               args.out + i, rest);
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace atp::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace atp::cpu {
HWY_EXPORT(SwiGlu);
SwiGluFn SwiGluFor(int64_t target) { return ATP_FUNCTION_FOR(target, SwiGlu); }
}  // namespace atp::cpu
#endif
