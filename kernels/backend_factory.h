// The only place that knows which backends were built.
#ifndef ATP_KERNELS_BACKEND_FACTORY_H_
#define ATP_KERNELS_BACKEND_FACTORY_H_

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace atp {

struct BackendOptions {
  std::string device = "cpu";    // "cpu", "reference" or "cuda"
  int threads = 0;               // 0: the physical cores that the container's cgroup grants
  std::string cpu_isa = "auto";  // "auto", or one of CpuIsaNames()
  // What products with bf16 weights round x to. kF32: not at all, so results are as exact as fp32 sums are.
  // kBF16: to bf16, several times as fast where the processor has the instruction (elsewhere as kF32).
  // Block-quantised weights always meet x in int8, with a scale per 256 elements.
  DType activation_dtype = DType::kF32;
};

// InvalidArgument for an unknown device or an ISA that this machine lacks (naming what it has); Unimplemented
// for a device that this binary was built without.
absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(const BackendOptions& options);

std::vector<std::string> BuiltDevices();
// The ISAs this binary carries and this machine can run, best first ("avx512_bf16", "avx512", "avx2", …,
// "scalar").
std::vector<std::string> CpuIsaNames();

}  // namespace atp

#endif  // ATP_KERNELS_BACKEND_FACTORY_H_
