#include "kernels/cpu/isa.h"

#include "hwy/highway.h"
#if HWY_ARCH_X86
#include <cpuid.h>
#endif
#if HWY_ARCH_X86 && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

#if HWY_ARCH_X86
// What Highway does not ask for; that the system saves the registers is part of its own check of the target.
struct DotInstructions {
  bool avx512_vnni = false, avx_vnni = false, avx512_bf16 = false, amx = false;

  DotInstructions() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return;
    const unsigned last_leaf = eax;
    avx512_vnni = (ecx >> 11 & 1) != 0;
    amx = (edx >> 22 & 1) != 0 && (edx >> 24 & 1) != 0 && (edx >> 25 & 1) != 0;  // bf16, tiles, int8
    if (last_leaf < 1 || __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) == 0) return;
    avx_vnni = (eax >> 4 & 1) != 0;
    avx512_bf16 = (eax >> 5 & 1) != 0;
  }
};

// Linux saves tile registers only for processes that have asked for them; this asks, for all threads to come.
bool TilesGranted() {
#ifdef __linux__
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

void AddWithDot(int64_t target, std::vector<Isa>& isas) {
  const DotInstructions has;
  if (target == HWY_AVX3 && has.avx512_vnni) {
    if (has.avx512_bf16 && has.amx && TilesGranted()) isas.push_back({"amx", target, true, true, true});
    if (has.avx512_bf16) isas.push_back({"avx512_bf16", target, true, true});
    isas.push_back({"avx512_vnni", target, true, false});
  }
  if (target == HWY_AVX2 && has.avx_vnni) isas.push_back({"avx2_vnni", target, true, false});
}
#else
void AddWithDot(int64_t, std::vector<Isa>&) {}
#endif

}  // namespace

std::vector<Isa> AvailableIsas() {
  std::vector<Isa> isas;
  // The static target needs nothing that the compiler was not allowed to use anyway, so it is always there.
  int64_t targets = (hwy::SupportedTargets() | HWY_STATIC_TARGET) & HWY_TARGETS;
  while (targets != 0) {
    const int64_t best = targets & -targets;  // a lower bit is a better target
    AddWithDot(best, isas);
    isas.push_back({IsaName(best), best});
    targets &= targets - 1;
  }
  return isas;
}

}  // namespace atp::cpu
