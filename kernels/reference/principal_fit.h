// Naive double-precision oracle of the principal fit (kernels/principal_fit.h).
#ifndef ATP_KERNELS_REFERENCE_PRINCIPAL_FIT_H_
#define ATP_KERNELS_REFERENCE_PRINCIPAL_FIT_H_

#include "kernels/principal_fit.h"

namespace atp {

void ReferenceFitPrincipal(const PrincipalFitProblem& problem, PrincipalFit* fit);

}  // namespace atp

#endif  // ATP_KERNELS_REFERENCE_PRINCIPAL_FIT_H_
