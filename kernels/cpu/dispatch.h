// For the .cc files of ops only: after HWY_EXPORT(Function), ATP_FUNCTION_FOR(target, Function) is the
// version of Function compiled for that target. Highway's own dispatch would pick one target for the whole
// process.
#ifndef ATP_KERNELS_CPU_DISPATCH_H_
#define ATP_KERNELS_CPU_DISPATCH_H_

#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"

#if (HWY_TARGETS & (HWY_TARGETS - 1)) == 0
#define ATP_FUNCTION_FOR(target, Function) (static_cast<void>(target), &HWY_STATIC_DISPATCH(Function))
#else
#define ATP_FUNCTION_FOR(target, Function) (HWY_DISPATCH_TABLE(Function)[atp::cpu::DispatchIndex(target)])
#endif

namespace atp::cpu {

inline size_t DispatchIndex(int64_t target) {
  hwy::ChosenTarget chosen;
  chosen.Update(target);
  return chosen.GetIndex();
}

}  // namespace atp::cpu

#endif  // ATP_KERNELS_CPU_DISPATCH_H_
