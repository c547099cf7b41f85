// The instruction sets that the cpu backend was compiled for. A backend picks one when it is made and holds
// the functions of that one: no global switch, so that backends with different instruction sets live side by
// side (tests).
#ifndef ATP_KERNELS_CPU_ISA_H_
#define ATP_KERNELS_CPU_ISA_H_

#include <cstdint>
#include <string>
#include <vector>

namespace atp::cpu {

struct Isa {
  std::string
      name;  // "amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2_vnni", "avx2", "sse4", "neon", "scalar"
  int64_t target = 0;  // Highway's bit for it
  bool dot8 = false;   // has VNNI: four products of bytes per lane in one instruction
  bool dot16 = false;  // has AVX512-BF16: two products of bf16 per lane
  bool amx = false;    // has AMX: products of tiles of int8 and of bf16
};

// Those that this binary carries and this machine can run, best first; never empty.
std::vector<Isa> AvailableIsas();

}  // namespace atp::cpu

#endif  // ATP_KERNELS_CPU_ISA_H_
