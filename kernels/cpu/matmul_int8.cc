// y = x·Wᵀ for block-quantised weights: x is quantised to int8 too, so that the products of a block of 32 are
// summed in integers, exactly, before the weights' scale makes an fp32 number of the sum; x's own scale is
// one per group of blocks.
//
// Why y[r][o] is bit-identical in every batch: integers have no order, and the blocks' fp32 terms are added
// in order of k into a sum of y's own, group by group and slice by slice. No choice below (tile, part,
// thread, unpacking in registers or beforehand) changes a term or that order. Compiled in two parts, because
// it takes long: ATP_K_QUANTS is 1 where matmul_kquants.cc includes this.
#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "kernels/cpu/ops.h"
#include "kernels/cpu/panels.h"
#include "kernels/quantized.h"

#ifndef ATP_K_QUANTS
#define ATP_K_QUANTS 0
#endif
#undef ATP_INT8_PART
#if ATP_K_QUANTS
#define ATP_INT8_PART k_quants
#else
#define ATP_INT8_PART plain
#endif

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
namespace ATP_INT8_PART {
namespace pairs {
#define ATP_DOT8 0
#include "kernels/cpu/matmul_int8-inl.h"
#undef ATP_DOT8
}  // namespace pairs
}  // namespace ATP_INT8_PART
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
namespace ATP_INT8_PART {
namespace dot8 {
#define ATP_DOT8 1
#include "kernels/cpu/matmul_int8-inl.h"
#undef ATP_DOT8
}  // namespace dot8
}  // namespace ATP_INT8_PART
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

#if ATP_K_QUANTS
MatMulKernel KQuantKernel([[maybe_unused]] bool with_dot8) {
#else
MatMulKernel Int8Kernel([[maybe_unused]] bool with_dot8) {
#endif
#if ATP_HAVE_DOT8
  if (with_dot8) return ATP_INT8_PART::dot8::Kernel();
#endif
  return ATP_INT8_PART::pairs::Kernel();
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace atp::cpu
HWY_AFTER_NAMESPACE();
#undef ATP_HAVE_DOT8

#if HWY_ONCE
namespace atp::cpu {
#if ATP_K_QUANTS
HWY_EXPORT(KQuantKernel);
MatMulKernel KQuantMatMulFor(const Isa& isa) { return ATP_FUNCTION_FOR(isa.target, KQuantKernel)(isa.dot8); }
#else
HWY_EXPORT(Int8Kernel);
MatMulKernel Int8MatMulFor(const Isa& isa) { return ATP_FUNCTION_FOR(isa.target, Int8Kernel)(isa.dot8); }
#endif
}  // namespace atp::cpu
#endif
