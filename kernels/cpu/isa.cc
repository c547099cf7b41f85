#include "kernels/cpu/isa.h"

#include "hwy/highway.h"

namespace atp::cpu {
namespace {

std::string IsaName(int64_t target) {
  switch (target) {
#if HWY_ARCH_X86
    case HWY_AVX3:
      return "avx512";
    case HWY_AVX2:
      return "avx2";
    case HWY_SSE4:
      return "sse4";
#endif
#if HWY_ARCH_ARM
    case HWY_NEON:
      return "neon";
#endif
    default:
      return "scalar";
  }
}

}  // namespace

std::vector<Isa> AvailableIsas() {
  std::vector<Isa> isas;
  // The static target needs nothing that the compiler was not allowed to use anyway, so it is always there.
  int64_t targets = (hwy::SupportedTargets() | HWY_STATIC_TARGET) & HWY_TARGETS;
  while (targets != 0) {
    const int64_t best = targets & -targets;  // a lower bit is a better target
    isas.push_back({IsaName(best), best});
    targets &= targets - 1;
  }
  return isas;
}

}  // namespace atp::cpu
