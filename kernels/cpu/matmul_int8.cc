// y = x·Wᵀ for block-quantised weights: x is quantised to int8 too, a scale per 32 elements, so that a
// block's products are summed in integers, exactly, before two scales make an fp32 number of the sum.
//
// Why y[r][o] is bit-identical in every batch: integers have no order, and the blocks' fp32 terms are added
// in order of k into a sum of y's own, slice by slice. No choice below (tile, part, thread, unpacking in
// registers or beforehand) changes a term or that order.
#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "kernels/cpu/ops.h"
#include "kernels/cpu/panels.h"
#include "kernels/quantized.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/matmul_int8.cc"
// foreach_target.h must come first.
// clang-format off
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "hwy/cache_control.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/load-inl.h"
#include "kernels/cpu/matmul_tile-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace atp::cpu {
namespace HWY_NAMESPACE {
namespace pairs {
#define ATP_DOT8 0
#include "kernels/cpu/matmul_int8-inl.h"
#undef ATP_DOT8
}  // namespace pairs
// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace atp::cpu
HWY_AFTER_NAMESPACE();

// Highway 1.0.3 has no name for targets with VNNI: the same code again, with the instruction allowed.
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX2
#define ATP_HAVE_DOT8 1
#if HWY_TARGET == HWY_AVX3
HWY_PUSH_ATTRIBUTES(HWY_TARGET_STR ",avx512vnni")
#else
HWY_PUSH_ATTRIBUTES(HWY_TARGET_STR ",avxvnni")
#endif
namespace atp::cpu {
namespace HWY_NAMESPACE {
namespace dot8 {
#define ATP_DOT8 1
#include "kernels/cpu/matmul_int8-inl.h"
#undef ATP_DOT8
}  // namespace dot8
// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace atp::cpu
HWY_POP_ATTRIBUTES
#else
#define ATP_HAVE_DOT8 0
#endif

HWY_BEFORE_NAMESPACE();
namespace atp::cpu {
namespace HWY_NAMESPACE {

MatMulKernel Int8Kernel([[maybe_unused]] bool with_dot8) {
#if ATP_HAVE_DOT8
  if (with_dot8) return dot8::Kernel();
#endif
  return pairs::Kernel();
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace atp::cpu
HWY_AFTER_NAMESPACE();
#undef ATP_HAVE_DOT8

#if HWY_ONCE
namespace atp::cpu {
HWY_EXPORT(Int8Kernel);
MatMulKernel Int8MatMulFor(const Isa& isa) { return ATP_FUNCTION_FOR(isa.target, Int8Kernel)(isa.dot8); }
}  // namespace atp::cpu
#endif
