// What this machine can do at most, measured without any of our kernels: the yardstick of kernels_bench.
#ifndef ATP_TESTS_BENCH_MACHINE_PEAKS_H_
#define ATP_TESTS_BENCH_MACHINE_PEAKS_H_

#include <string>

namespace atp {

struct MachinePeaks {
  double fp32 = 0;                        // GFLOP/s of fused multiply-adds that stay in registers
  double bf16 = 0;                        // of vdpbf16ps; 0 where the machine has none
  double int8 = 0;                        // GOP/s of vpdpbusd; 0 likewise
  double bf16_tiles = 0, int8_tiles = 0;  // of AMX; 0 likewise
  double read = 0;                        // GB/s of reading memory that no cache holds
};

// With `threads` threads at once; the best of several runs of about 50 ms.
MachinePeaks MeasurePeaks(int threads);

std::string CpuModel();

}  // namespace atp

#endif  // ATP_TESTS_BENCH_MACHINE_PEAKS_H_
