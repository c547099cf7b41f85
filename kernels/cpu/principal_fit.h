// The principal fit (kernels/principal_fit.h), vectorised; double throughout, because 200 gradient steps and
// a pivot order amplify what fp32 loses and the whole costs a few percent of a prefill.
#ifndef ATP_KERNELS_CPU_PRINCIPAL_FIT_H_
#define ATP_KERNELS_CPU_PRINCIPAL_FIT_H_

#include <cstddef>
#include <cstdint>

#include "kernels/principal_fit.h"

namespace atp::cpu {

// Doubles of scratch that a fit of this size needs (64-byte aligned).
size_t PrincipalFitScratch(int n, int m, int d, int count);

// One fit, one thread; allocates nothing.
using PrincipalFitFn = void (*)(const PrincipalFitProblem& problem, double* scratch, PrincipalFit* fit);
PrincipalFitFn PrincipalFitFor(int64_t target);

}  // namespace atp::cpu

#endif  // ATP_KERNELS_CPU_PRINCIPAL_FIT_H_
