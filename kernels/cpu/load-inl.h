// Loads of stored elements as fp32 vectors, once per target.
#if defined(ATP_KERNELS_CPU_LOAD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ATP_KERNELS_CPU_LOAD_INL_H_
#undef ATP_KERNELS_CPU_LOAD_INL_H_
#else
#define ATP_KERNELS_CPU_LOAD_INL_H_
#endif

#include <cstring>

#include "hwy/highway.h"

// Tiles keep their accumulators in small arrays, which are registers only if every loop over them is
// unrolled.
#undef ATP_UNROLL
#if HWY_COMPILER_CLANG
#define ATP_UNROLL _Pragma("unroll")
#else
#define ATP_UNROLL _Pragma("GCC unroll 16")
#endif

HWY_BEFORE_NAMESPACE();
namespace atp::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Lanes(d) elements from p, which need be aligned to an element only.
template <class D>
HWY_INLINE hn::Vec<D> LoadFloats(D d, const float* HWY_RESTRICT p) {
  return hn::LoadU(d, p);
}

template <class D>
HWY_INLINE hn::Vec<D> LoadFloats(D d, const hwy::bfloat16_t* HWY_RESTRICT p) {
  const hn::Rebind<uint16_t, D> d16;
  const hn::Rebind<uint32_t, D> d32;
  const auto bits = hn::LoadU(d16, reinterpret_cast<const uint16_t*>(p));
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(d32, bits)));
}

template <class D>
HWY_INLINE hn::Vec<D> LoadFloats(D d, const hwy::float16_t* HWY_RESTRICT p) {
  const hn::Rebind<hwy::float16_t, D> d16;
  return hn::PromoteTo(d, hn::LoadU(d16, p));
}

// The first n < Lanes(d) elements of p, and zeros.
template <class D, typename T>
HWY_INLINE hn::Vec<D> LoadFirst(D d, const T* HWY_RESTRICT p, size_t n) {
  alignas(64) T padded[HWY_MAX_BYTES / sizeof(float)] = {};
  std::memcpy(static_cast<void*>(padded), p, n * sizeof(T));
  return LoadFloats(d, padded);
}

// The first n < Lanes(d) lanes of v to p.
template <class D>
HWY_INLINE void StoreFirst(D d, hn::Vec<D> v, float* HWY_RESTRICT p, size_t n) {
  alignas(64) float lanes[HWY_MAX_BYTES / sizeof(float)];
  hn::Store(v, d, lanes);
  std::memcpy(p, lanes, n * sizeof(float));
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace atp::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
