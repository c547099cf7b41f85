// The oracle: every op as its formula reads, one thread, double accumulators, host memory. Slow on purpose.
#ifndef ATP_KERNELS_REFERENCE_REFERENCE_BACKEND_H_
#define ATP_KERNELS_REFERENCE_REFERENCE_BACKEND_H_

#include <memory>

#include "kernels/backend.h"

namespace atp {

std::unique_ptr<Backend> MakeReferenceBackend();

}  // namespace atp

#endif  // ATP_KERNELS_REFERENCE_REFERENCE_BACKEND_H_
