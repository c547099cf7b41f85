// Elements of block-quantised weights out of their planes (weight_planes.h), eight in a row: the values that
// DequantizeRow() gives, to the bit. Codes become floats by their bytes alone: put into the mantissa of 2^15,
// a byte b is 2^15 + b.
#ifndef ATP_KERNELS_CUDA_QUANTIZED_WEIGHT_CUH_
#define ATP_KERNELS_CUDA_QUANTIZED_WEIGHT_CUH_

#include <type_traits>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/weight_planes.h"
#include "kernels/quantized.h"

namespace atp::cuda {

struct Eight {
  float value[8];
};

// 2^15 + byte i of four.
__device__ __forceinline__ float ByteOn32768(uint32_t bytes, int i) {
  return __uint_as_float(__byte_perm(bytes, 0x47000000u, 0x7404u | static_cast<uint32_t>(i) << 4));
}

// Four of the 16 levels, 128 added to each, the first one lowest.
constexpr uint32_t FourLevels(DType dtype, int first) {
  uint32_t packed = 0;
  for (int i = 0; i < 4; ++i) {
    const int level = dtype == DType::kQ4 ? kQ4Levels[first + i] : first + i - 8;
    packed |= static_cast<uint32_t>(level + 128) << (8 * i);
  }
  return packed;
}

// Four codes of 4 bits, the low half of `codes`, as levels with 128 added.
template <DType kDType>
__device__ __forceinline__ uint32_t LevelsOf(uint32_t codes) {
  constexpr uint32_t k0 = FourLevels(kDType, 0), k4 = FourLevels(kDType, 4), k8 = FourLevels(kDType, 8),
                     k12 = FourLevels(kDType, 12);
  // The lower three bits choose among eight bytes; the fourth between the halves: byte i or 4 + i.
  const uint32_t among = codes & 0x7777u;
  return __byte_perm(__byte_perm(k0, k4, among), __byte_perm(k8, k12, among),
                     0x3210u | (codes & 0x8888u) >> 1);
}

// dtype: q8_0, q4_0, q4, q4_k, q5_k or q6_k.
template <DType kDType>
struct QuantizedWeight {
  static constexpr bool kNibbles = HasNibbles(kDType);
  static constexpr bool kSupers = IsKQuant(kDType);
  // Of eight elements.
  using Codes = std::conditional_t<kNibbles, uint32_t, uint2>;

  // at: of the first of them in the plane. scale, super: of their sub-block and block; super is not read
  // where there are none.
  static __device__ __forceinline__ Eight Decode(const Codes& codes, uint16_t scale, uint32_t super, int at) {
    if constexpr (kSupers) {
      return DecodeK(codes, scale, super, at);
    } else {
      // A level l on 2^15 + 128, times the scale, less (2^15 + 128) · scale: no step before the last rounds.
      const float unit = HalfToFloat(scale), less = -32896.0f * unit;
      uint32_t low, high;
      if constexpr (kNibbles) {
        low = LevelsOf<kDType>(codes);
        high = LevelsOf<kDType>(codes >> 16);
      } else {
        low = codes.x ^ 0x80808080u;
        high = codes.y ^ 0x80808080u;
      }
      Eight eight;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        eight.value[i] = __fmaf_rn(ByteOn32768(low, i), unit, less);
        eight.value[4 + i] = __fmaf_rn(ByteOn32768(high, i), unit, less);
      }
      return eight;
    }
  }

 private:
  // unit · code - min: the product has no more than 24 bits, or, of q6_k, the whole is one product.
  static __device__ __forceinline__ Eight DecodeK(const Codes& codes, uint16_t scale, uint32_t super,
                                                  int at) {
    const float units = HalfToFloat(static_cast<uint16_t>(super));
    float unit, min;
    if constexpr (kDType == DType::kQ6_K) {
      unit = units * static_cast<float>(static_cast<int8_t>(scale >> (at / 16 % 2 * 8)));
      min = 32 * unit;
    } else {
      unit = units * static_cast<float>(scale & 255u);
      min = HalfToFloat(static_cast<uint16_t>(super >> 16)) * static_cast<float>(scale >> 8);
    }
    Eight eight;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float code;
      if constexpr (kNibbles) {
        code = ByteOn32768((codes >> (i % 2 * 4)) & 0x0f0f0f0fu, i / 2);
      } else {
        code = ByteOn32768(i < 4 ? codes.x : codes.y, i % 4);
      }
      eight.value[i] = __fmaf_rn(code - 32768.0f, unit, -min);
    }
    return eight;
  }
};

// Elements [at, at + 8) of the planes, straight from global memory, where they are read once.
template <DType kDType>
__device__ __forceinline__ Eight LoadEight(const WeightPlanes& planes, int64_t at) {
  using W = QuantizedWeight<kDType>;
  const auto element = static_cast<uint64_t>(at);
  const auto codes = __ldcs(static_cast<const typename W::Codes*>(planes.codes) + element / 8);
  const uint32_t super = W::kSupers ? planes.supers[element / 256] : 0;
  return W::Decode(codes, planes.scales[element / 32], super, static_cast<int>(element % 32));
}

// launch(std::integral_constant<DType, dtype>), for kernels of a quantised dtype.
template <class Launching>
cudaError_t WithQuantizedType(DType dtype, const Launching& launch) {
  switch (dtype) {
    case DType::kQ4_0:
      return launch(std::integral_constant<DType, DType::kQ4_0>());
    case DType::kQ4:
      return launch(std::integral_constant<DType, DType::kQ4>());
    case DType::kQ4_K:
      return launch(std::integral_constant<DType, DType::kQ4_K>());
    case DType::kQ5_K:
      return launch(std::integral_constant<DType, DType::kQ5_K>());
    case DType::kQ6_K:
      return launch(std::integral_constant<DType, DType::kQ6_K>());
    default:
      return launch(std::integral_constant<DType, DType::kQ8_0>());
  }
}

}  // namespace atp::cuda

#endif  // ATP_KERNELS_CUDA_QUANTIZED_WEIGHT_CUH_
