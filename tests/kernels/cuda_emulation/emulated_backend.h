// The cuda backend of kernels/cuda/, compiled for the host against the emulation beside this file. Its device
// memory is apart from the caller's, as a device's is.
#ifndef ATP_TESTS_KERNELS_CUDA_EMULATION_EMULATED_BACKEND_H_
#define ATP_TESTS_KERNELS_CUDA_EMULATION_EMULATED_BACKEND_H_

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace atp::cuda_emulated {

absl::StatusOr<std::unique_ptr<Backend>> MakeBackend();

}  // namespace atp::cuda_emulated

#endif  // ATP_TESTS_KERNELS_CUDA_EMULATION_EMULATED_BACKEND_H_
