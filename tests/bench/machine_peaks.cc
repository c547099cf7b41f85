#include "tests/bench/machine_peaks.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <fstream>
#include <vector>

#include "kernels/cpu/amx_tiles.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/thread_pool.h"

namespace atp {
namespace {

using Clock = std::chrono::steady_clock;

// The shortest of many short runs of `body` on all threads: the machine may have other guests.
template <class Body>
double ShortestRun(cpu::ThreadPool& pool, const Body& body) {
  double best = 1e30;
  for (int run = 0; run < 1000; ++run) {
    const Clock::time_point start = Clock::now();
    pool.ParallelFor(pool.threads(), body);
    best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return best;
}

#if defined(__x86_64__)
constexpr int64_t kSteps = 20000;
constexpr int kChains = 12;  // enough to hide the latency of two instructions per cycle

// Twelve chains of one instruction. Assembly, because compilers add register moves to instructions that
// overwrite an operand.
#define ATP_CHAIN(op, n) op " %%zmm30, %%zmm31, %%zmm" #n "\n"
#define ATP_CHAINS(op)                                                                              \
  for (int64_t i = 0; i < kSteps; ++i) {                                                            \
    asm volatile(ATP_CHAIN(op, 0) ATP_CHAIN(op, 1) ATP_CHAIN(op, 2)::: "xmm0", "xmm1", "xmm2");     \
    asm volatile(ATP_CHAIN(op, 3) ATP_CHAIN(op, 4) ATP_CHAIN(op, 5)::: "xmm3", "xmm4", "xmm5");     \
    asm volatile(ATP_CHAIN(op, 6) ATP_CHAIN(op, 7) ATP_CHAIN(op, 8)::: "xmm6", "xmm7", "xmm8");     \
    asm volatile(ATP_CHAIN(op, 9) ATP_CHAIN(op, 10) ATP_CHAIN(op, 11)::: "xmm9", "xmm10", "xmm11"); \
  }

double Rate(cpu::ThreadPool& pool, double per_instruction, void (*loop)(int64_t, int), int chains = kChains) {
  const double operations = static_cast<double>(kSteps) * chains * per_instruction * pool.threads();
  return operations / ShortestRun(pool, loop) * 1e-9;
}

void Fp32Chains(int64_t, int) { ATP_CHAINS("vfmadd231ps") }
void Bf16Chains(int64_t, int) { ATP_CHAINS("vdpbf16ps") }
void Int8Chains(int64_t, int) { ATP_CHAINS("vpdpbusd") }

// Four chains are what the tile registers have room for, and hide the latency of one instruction in 16
// cycles.
constexpr int kTileChains = 4;
#define ATP_TILE_CHAINS(op)                                                                                  \
  const cpu::TileConfig config(16, 16, 64);                                                                  \
  asm volatile(                                                                                              \
      "ldtilecfg %0\n tilezero %%tmm4\n tilezero %%tmm5\n tilezero %%tmm6\n tilezero %%tmm7" ::"m"(config)); \
  for (int64_t i = 0; i < kSteps; ++i) {                                                                     \
    asm volatile(op " %tmm6, %tmm4, %tmm0\n" op " %tmm7, %tmm4, %tmm1\n" op " %tmm6, %tmm5, %tmm2\n" op      \
                    " %tmm7, %tmm5, %tmm3");                                                                 \
  }                                                                                                          \
  asm volatile("tilerelease");
void Bf16Tiles(int64_t, int) { ATP_TILE_CHAINS("tdpbf16ps") }
void Int8Tiles(int64_t, int) { ATP_TILE_CHAINS("tdpbssd") }
#endif

double ReadRate(cpu::ThreadPool& pool) {
  constexpr size_t kWords = (size_t{256} << 20) / sizeof(uint64_t);
  constexpr size_t kPieceWords = (size_t{8} << 20) / sizeof(uint64_t);
  const std::vector<uint64_t> memory(kWords, 1);
  size_t turn = 0;
  double best = 1e30;
  for (int run = 0; run < 600; ++run) {
    const uint64_t* piece = memory.data() + turn++ % (kWords / kPieceWords) * kPieceWords;
    const Clock::time_point start = Clock::now();
    const int parts = 4 * pool.threads();
    pool.ParallelFor(parts, [&](int64_t part, int) {
      const size_t share = kPieceWords / static_cast<size_t>(parts) / 32 * 32;
      const uint64_t* from = piece + static_cast<size_t>(part) * share;
      uint64_t sum[32] = {};
      for (size_t i = 0; i < share; i += 32) {
        for (size_t j = 0; j < 32; ++j) sum[j] ^= from[i + j];
      }
      for (uint64_t& s : sum) asm volatile("" : "+r"(s));
    });
    best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return static_cast<double>(kPieceWords) * sizeof(uint64_t) / best * 1e-9;
}

}  // namespace

MachinePeaks MeasurePeaks(int threads) {
  cpu::ThreadPool pool(threads);
  MachinePeaks peaks;
  peaks.read = ReadRate(pool);
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) {
    peaks.fp32 = Rate(pool, 32, Fp32Chains);
    if (__builtin_cpu_supports("avx512bf16")) peaks.bf16 = Rate(pool, 64, Bf16Chains);
    if (__builtin_cpu_supports("avx512vnni")) peaks.int8 = Rate(pool, 128, Int8Chains);
  }
  if (cpu::AvailableIsas().front().amx) {
    peaks.bf16_tiles = Rate(pool, 2 * 16 * 16 * 32, Bf16Tiles, kTileChains);
    peaks.int8_tiles = Rate(pool, 2 * 16 * 16 * 64, Int8Tiles, kTileChains);
  }
#endif
  return peaks;
}

std::string CpuModel() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

}  // namespace atp
