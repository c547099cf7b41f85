#include "kernels/backend_factory.h"

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/isa.h"
#include "kernels/reference/reference_backend.h"
#ifdef ATP_CUDA
#include "kernels/cuda/cuda_backend.h"
#endif

namespace atp {

std::vector<std::string> BuiltDevices() {
#ifdef ATP_CUDA
  return {"cpu", "cuda", "reference"};
#else
  return {"cpu", "reference"};
#endif
}

std::vector<std::string> CpuIsaNames() {
  std::vector<std::string> names;
  for (const cpu::Isa& isa : cpu::AvailableIsas()) names.push_back(isa.name);
  return names;
}

absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(const BackendOptions& options) {
  const std::string built = absl::StrJoin(BuiltDevices(), ", ");
  if (options.device == "reference") return MakeReferenceBackend();
  if (options.device == "cuda") {
#ifdef ATP_CUDA
    return cuda::MakeBackend();
#else
    return absl::UnimplementedError(
        absl::StrCat("device 'cuda': this binary was built without CUDA; it has: ", built));
#endif
  }
  if (options.device != "cpu") {
    return absl::InvalidArgumentError(
        absl::StrCat("unknown device '", options.device, "'; this binary has: ", built));
  }
  if (options.threads < 0 || options.threads > cpu::kMaxThreads) {
    return absl::InvalidArgumentError(absl::StrCat("threads is ", options.threads,
                                                   "; it must be between 0 and ", cpu::kMaxThreads,
                                                   " (0: the cores granted to this process)"));
  }
  const std::vector<cpu::Isa> isas = cpu::AvailableIsas();
  for (const cpu::Isa& isa : isas) {
    if (options.cpu_isa == "auto" || options.cpu_isa == isa.name) {
      return cpu::MakeCpuBackend(isa, options.threads, options.activation_dtype);
    }
  }
  return absl::InvalidArgumentError(absl::StrCat("CPU instruction set '", options.cpu_isa,
                                                 "' is not available on this machine; it has: auto, ",
                                                 absl::StrJoin(CpuIsaNames(), ", ")));
}

}  // namespace atp
