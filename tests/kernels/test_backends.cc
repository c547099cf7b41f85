#include "tests/kernels/test_backends.h"

#include <utility>

#include "kernels/backend_factory.h"
#include "tests/kernels/host_facing_backend.h"
#include "tests/kernels/op_problems.h"

#ifdef ATP_CUDA_EMULATED
#include "tests/kernels/cuda_emulation/emulated_backend.h"
#endif

namespace atp {

std::vector<std::string> TestBackendNames() {
  std::vector<std::string> names = CpuIsaNames();
#ifdef ATP_CUDA_EMULATED
  names.push_back(kEmulated);
#endif
  names.push_back("cuda");
  return names;
}

bool IsCuda(const std::string& name) { return name == "cuda" || name == kEmulated; }

std::unique_ptr<Backend> TestBackend(const std::string& name, int threads, std::string* missing,
                                     DType activation_dtype) {
  if (!IsCuda(name)) return CpuBackend(name, threads, activation_dtype);
  BackendOptions options;
  options.device = "cuda";
#ifdef ATP_CUDA_EMULATED
  absl::StatusOr<std::unique_ptr<Backend>> device =
      name == kEmulated ? cuda_emulated::MakeBackend() : MakeBackend(options);
#else
  absl::StatusOr<std::unique_ptr<Backend>> device = MakeBackend(options);
#endif
  if (device.ok()) return HostFacing(*std::move(device));
  *missing = std::string(device.status().message());
  return nullptr;
}

}  // namespace atp
