// The backend of this machine's cores: Highway SIMD in one chosen instruction set, on a thread pool of its
// own.
#ifndef ATP_KERNELS_CPU_CPU_BACKEND_H_
#define ATP_KERNELS_CPU_CPU_BACKEND_H_

#include <memory>

#include "kernels/backend.h"
#include "kernels/cpu/isa.h"

namespace atp::cpu {

inline constexpr int kMaxThreads = 1024;

// threads: 0 for GrantedCores(). isa: one of AvailableIsas().
std::unique_ptr<Backend> MakeCpuBackend(const Isa& isa, int threads, DType activation_dtype);

}  // namespace atp::cpu

#endif  // ATP_KERNELS_CPU_CPU_BACKEND_H_
