// One NVIDIA GPU (device 0 of those that CUDA_VISIBLE_DEVICES shows).
#ifndef ATP_KERNELS_CUDA_CUDA_BACKEND_H_
#define ATP_KERNELS_CUDA_CUDA_BACKEND_H_

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace atp::cuda {

// Unavailable, in one line, without a driver or a device; FailedPrecondition for a device older than sm_80.
absl::StatusOr<std::unique_ptr<Backend>> MakeBackend();

}  // namespace atp::cuda

#endif  // ATP_KERNELS_CUDA_CUDA_BACKEND_H_
