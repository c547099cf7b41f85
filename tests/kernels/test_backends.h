// The backends that op tests run on, by name: every instruction set of the cpu, the emulated GPU, and the
// GPU.
#ifndef ATP_TESTS_KERNELS_TEST_BACKENDS_H_
#define ATP_TESTS_KERNELS_TEST_BACKENDS_H_

#include <memory>
#include <string>
#include <vector>

#include "kernels/backend.h"

namespace atp {

std::vector<std::string> TestBackendNames();

// Ops take host memory, whatever the device. Null, with the reason in *missing, where there is no such
// device. activation_dtype: of the cpu.
std::unique_ptr<Backend> TestBackend(const std::string& name, int threads, std::string* missing,
                                     DType activation_dtype = DType::kF32);

// A GPU, real or emulated.
bool IsCuda(const std::string& name);
inline constexpr char kEmulated[] = "cuda_emulated";

}  // namespace atp

#endif  // ATP_TESTS_KERNELS_TEST_BACKENDS_H_
