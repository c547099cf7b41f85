// In place of CUDA's header of this name, where .cu files are compiled for the host: the names of CUDA C++
// that kernels/cuda/ uses, and what kernels/cuda/launch.h wraps in inline assembly.
#ifndef ATP_TESTS_KERNELS_CUDA_EMULATION_CUDA_RUNTIME_H_
#define ATP_TESTS_KERNELS_CUDA_EMULATION_CUDA_RUNTIME_H_

#ifndef ATP_CUDA_EMULATION
#error "the emulation's cuda_runtime.h is in the include path of a build that is none"
#endif

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "tests/kernels/cuda_emulation/emulator.h"
#include "tests/kernels/cuda_emulation/runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

// NOLINTBEGIN: CUDA's names
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using Uint3 = atp::emulation::Index3;
extern Uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  atp::emulation::SyncThreads(file, line);
}
inline void __syncwarp(unsigned /*mask*/ = 0xffffffffu, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  atp::emulation::SyncWarp(file, line);
}

namespace atp::emulation {
// The value of lane `from`, or the caller's own where there is no such lane.
template <class T>
T Shuffle(T value, int from, const char* file, int line) {
  const std::byte* all = Exchange("__shfl", &value, sizeof(T), file, line);
  T result = value;
  if (from >= 0 && from < 32) std::memcpy(&result, all + static_cast<size_t>(from) * sizeof(T), sizeof(T));
  return result;
}
// The group of `width` lanes that the caller is in begins at this lane.
inline int GroupStart(int width) { return Lane() / width * width; }
}  // namespace atp::emulation

template <class T>
T __shfl_sync(unsigned, T value, int from, int width = 32, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  return atp::emulation::Shuffle(value, atp::emulation::GroupStart(width) + from % width, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask, int width = 32, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  const int from = atp::emulation::Lane() ^ mask;
  const bool inside = from < atp::emulation::GroupStart(width) + width;
  return atp::emulation::Shuffle(value, inside ? from : atp::emulation::Lane(), file, line);
}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned delta, int width = 32, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
  const int from = atp::emulation::Lane() + static_cast<int>(delta);
  const bool inside = from < atp::emulation::GroupStart(width) + width;
  return atp::emulation::Shuffle(value, inside ? from : atp::emulation::Lane(), file, line);
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned delta, int width = 32, const char* file = __builtin_FILE(),
                 int line = __builtin_LINE()) {
  const int from = atp::emulation::Lane() - static_cast<int>(delta);
  const bool inside = from >= atp::emulation::GroupStart(width);
  return atp::emulation::Shuffle(value, inside ? from : atp::emulation::Lane(), file, line);
}
inline unsigned __ballot_sync(unsigned, int predicate, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  const std::byte* all = atp::emulation::Exchange("__ballot", &predicate, sizeof(int), file, line);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    int vote;
    std::memcpy(&vote, all + static_cast<size_t>(lane) * sizeof(int), sizeof(int));
    votes |= (vote != 0 ? 1u : 0u) << lane;
  }
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(),
                      int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}

// One thread runs at a time, so these are what they say. Global memory only; shared: Shared<T>::AtomicAdd.
template <class T>
T atomicAdd(T* at, std::type_identity_t<T> value) {
  const T before = *at;
  *at = before + value;
  return before;
}
template <class T>
T atomicMax(T* at, std::type_identity_t<T> value) {
  const T before = *at;
  if (value > before) *at = value;
  return before;
}
template <class T>
T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  const T before = *at;
  if (before == expected) *at = value;
  return before;
}
inline void __threadfence() {}

template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
T __ldcs(const T* at) {
  return *at;
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline void sincospif(float x, float* sine, float* cosine) {
  const double angle = static_cast<double>(x) * 3.14159265358979323846;
  *sine = static_cast<float>(std::sin(angle));
  *cosine = static_cast<float>(std::cos(angle));
}
inline void sincospi(double x, double* sine, double* cosine) {
  *sine = std::sin(x * 3.14159265358979323846);
  *cosine = std::cos(x * 3.14159265358979323846);
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned from = selector >> (4 * i) & 7;
    result |= static_cast<unsigned>(bytes >> (8 * from) & 255) << (8 * i);
  }
  return result;
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
template <class T>
constexpr T min(T a, std::type_identity_t<T> b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, std::type_identity_t<T> b) {
  return a < b ? b : a;
}
// NOLINTEND

namespace atp::cuda {

template <class T>
class Shared {
 public:
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % 2 == 0);  // smaller ones are not told apart
  Shared(T* data, int size) : data_(data), size_(size) {}

  // What an element looks like to a kernel: reads and writes are seen.
  class Reference {
   public:
    Reference(const Shared& array, int index) : array_(array), index_(index) {}
    operator T() const { return array_.template LoadAs<T>(index_); }  // NOLINT: as implicit as T& is
    const Reference& operator=(const T& value) const {
      array_.template StoreAs<T>(index_, value);
      return *this;
    }
    const Reference& operator=(const Reference& other) const { return *this = static_cast<T>(other); }
    const Reference& operator+=(const T& value) const { return *this = static_cast<T>(*this) + value; }
    const Reference& operator-=(const T& value) const { return *this = static_cast<T>(*this) - value; }
    const Reference& operator*=(const T& value) const { return *this = static_cast<T>(*this) * value; }
    Reference(const Reference&) = default;

   private:
    Shared array_;
    int index_;
  };
  Reference operator[](int index) const { return Reference(*this, index); }

  template <class V>
  V LoadAs(int index) const {
    emulation::TrackShared(At<V>(index), sizeof(V), emulation::Access::kRead, index);
    V value;
    std::memcpy(&value, data_ + index, sizeof(V));
    return value;
  }
  template <class V>
  void StoreAs(int index, const V& value) const {
    emulation::TrackShared(At<V>(index), sizeof(V), emulation::Access::kWrite, index);
    std::memcpy(data_ + index, &value, sizeof(V));
  }
  T AtomicAdd(int index, T value) const {
    emulation::TrackShared(At<T>(index), sizeof(T), emulation::Access::kAtomic, index);
    const T before = data_[index];
    data_[index] = before + value;
    return before;
  }
  // The address of V at `index`, checked.
  template <class V>
  const std::byte* At(int index) const {
    constexpr int elements = static_cast<int>(sizeof(V) / sizeof(T));
    static_assert(sizeof(V) % sizeof(T) == 0);
    if (index < 0 || index + elements > size_) emulation::OutOfBounds(index, size_);
    if (reinterpret_cast<uintptr_t>(data_ + index) % alignof(V) != 0) emulation::Misaligned(index, sizeof(V));
    return reinterpret_cast<const std::byte*>(data_ + index);
  }

 private:
  T* data_;
  int size_;
};

class SharedArena {
 public:
  template <class T>
  Shared<T> Take(int count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    T* data = reinterpret_cast<T*>(emulation::TakeShared(offset_, bytes));
    offset_ += (bytes + 15) / 16 * 16;
    return Shared<T>(data, count);
  }

 private:
  size_t offset_ = 0;
};

template <class T>
void CpAsync16(const Shared<T>& to, int index, const void* from, bool valid) {
  const std::byte* at = to.template At<uint4>(index);
  emulation::CopyLater(const_cast<std::byte*>(at), valid ? from : nullptr, 16, index);
}
inline void CpAsyncCommit() { emulation::CommitCopies(); }
template <int kPending>
void CpAsyncWait() {
  emulation::WaitForCopies(kPending);
}

void MmaBF16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
             const char* file = __builtin_FILE(), int line = __builtin_LINE());

namespace emulated {
// `row`: this lane's row of 8 elements, read.
void LdMatrix4(uint32_t (&out)[4], const uint4& row, bool transposed, const char* file, int line);
}  // namespace emulated

template <class T>
void LdMatrix4(uint32_t (&out)[4], const Shared<T>& from, int index, const char* file = __builtin_FILE(),
               int line = __builtin_LINE()) {
  static_assert(sizeof(T) == 2);
  emulated::LdMatrix4(out, from.template LoadAs<uint4>(index), false, file, line);
}
template <class T>
void LdMatrix4Transposed(uint32_t (&out)[4], const Shared<T>& from, int index,
                         const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(sizeof(T) == 2);
  emulated::LdMatrix4(out, from.template LoadAs<uint4>(index), true, file, line);
}

uint32_t PackBF16(float low, float high);

template <class... Parameters>
void DeclareKernel(const char* name, void (*kernel)(Parameters...)) {
  static constexpr size_t kSizes[] = {sizeof(Parameters)...};
  const auto call = [](const void* function, void** arguments) {
    const auto run = [&]<size_t... i>(std::index_sequence<i...>) {
      reinterpret_cast<void (*)(Parameters...)>(const_cast<void*>(function))(
          *static_cast<std::remove_const_t<Parameters>*>(arguments[i])...);
    };
    run(std::index_sequence_for<Parameters...>());
  };
  emulation::Declare(reinterpret_cast<const void*>(kernel), {name, kSizes, call});
}

}  // namespace atp::cuda

#endif  // ATP_TESTS_KERNELS_CUDA_EMULATION_CUDA_RUNTIME_H_
