#include "tests/bench/machine_peaks.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <fstream>
#include <functional>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace atp {
namespace {

// GCC keeps a chain's register only if nothing could have changed it: hence one asm that does nothing.
#if defined(__x86_64__)
constexpr int kChains = 16;  // more than latency times throughput

__attribute__((target("avx512f"))) double Fp32Loop(int64_t steps) {
  __m512 sum[kChains], a = _mm512_set1_ps(0.5f);
  for (auto& s : sum) s = _mm512_set1_ps(1.0f);
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 16
    for (auto& s : sum) s = _mm512_fmadd_ps(s, a, a);
  }
  for (auto& s : sum) asm volatile("" : "+v"(s));
  return static_cast<double>(steps) * kChains * 32;
}

__attribute__((target("avx512f,avx512bf16"))) double Bf16Loop(int64_t steps) {
  __m512 sum[kChains];
  __m512i a = _mm512_set1_epi32(0x3f003f00);
  for (auto& s : sum) s = _mm512_set1_ps(1.0f);
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 16
    for (auto& s : sum) s = _mm512_dpbf16_ps(s, (__m512bh)a, (__m512bh)a);
    asm volatile("" : "+v"(a));
  }
  for (auto& s : sum) asm volatile("" : "+v"(s));
  return static_cast<double>(steps) * kChains * 64;
}

__attribute__((target("avx512f,avx512vnni"))) double Int8Loop(int64_t steps) {
  __m512i sum[kChains], a = _mm512_set1_epi32(0x01010101);
  for (auto& s : sum) s = a;
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 16
    for (auto& s : sum) s = _mm512_dpbusd_epi32(s, a, a);
    asm volatile("" : "+v"(a));
  }
  for (auto& s : sum) asm volatile("" : "+v"(s));
  return static_cast<double>(steps) * kChains * 128;
}

__attribute__((target("avx2,fma"))) double Fp32LoopAvx2(int64_t steps) {
  __m256 sum[12], a = _mm256_set1_ps(0.5f);
  for (auto& s : sum) s = _mm256_set1_ps(1.0f);
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 12
    for (auto& s : sum) s = _mm256_fmadd_ps(s, a, a);
  }
  for (auto& s : sum) asm volatile("" : "+x"(s));
  return static_cast<double>(steps) * 12 * 16;
}
#endif

// Operations per second of `loop` on all threads at once.
double Rate(int threads, double (*loop)(int64_t)) {
  constexpr int64_t kSteps = 4 << 20;
  double best = 0;
  for (int run = 0; run < 6; ++run) {
    std::vector<std::thread> others;
    std::vector<double> rates(static_cast<size_t>(threads));
    const auto measure = [&](int thread) {
      const auto start = std::chrono::steady_clock::now();
      const double operations = loop(kSteps);
      const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
      rates[static_cast<size_t>(thread)] = operations / time.count();
    };
    for (int thread = 1; thread < threads; ++thread) others.emplace_back(measure, thread);
    measure(0);
    for (std::thread& other : others) other.join();
    double sum = 0;
    for (const double rate : rates) sum += rate;
    best = std::max(best, sum);
  }
  return best * 1e-9;
}

double ReadRate(int threads) {
  constexpr size_t kWords = (size_t{512} << 20) / sizeof(uint64_t);
  const std::vector<uint64_t> memory(kWords, 1);
  double best = 0;
  for (int run = 0; run < 6; ++run) {
    std::vector<std::thread> others;
    std::vector<uint64_t> sums(static_cast<size_t>(threads) * 8);
    const auto start = std::chrono::steady_clock::now();
    const auto read = [&](int thread) {
      const size_t share = kWords / static_cast<size_t>(threads) / 32 * 32;
      const uint64_t* from = memory.data() + static_cast<size_t>(thread) * share;
      uint64_t sum[32] = {};
      for (size_t i = 0; i < share; i += 32) {
        for (size_t j = 0; j < 32; ++j) sum[j] ^= from[i + j];
      }
      for (const uint64_t s : sum) sums[static_cast<size_t>(thread) * 8] ^= s;
    };
    for (int thread = 1; thread < threads; ++thread) others.emplace_back(read, thread);
    read(0);
    for (std::thread& other : others) other.join();
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
    for (uint64_t& sum : sums) asm volatile("" : "+r"(sum));
    best = std::max(best, static_cast<double>(kWords) * sizeof(uint64_t) / time.count());
  }
  return best * 1e-9;
}

}  // namespace

MachinePeaks MeasurePeaks(int threads) {
  MachinePeaks peaks;
  peaks.read = ReadRate(threads);
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) {
    peaks.fp32 = Rate(threads, Fp32Loop);
    if (__builtin_cpu_supports("avx512bf16")) peaks.bf16 = Rate(threads, Bf16Loop);
    if (__builtin_cpu_supports("avx512vnni")) peaks.int8 = Rate(threads, Int8Loop);
  } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    peaks.fp32 = Rate(threads, Fp32LoopAvx2);
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
