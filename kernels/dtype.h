// Element types of weights, and their sizes. These are storage formats; sums are fp32 whatever they are.
#ifndef ATP_KERNELS_DTYPE_H_
#define ATP_KERNELS_DTYPE_H_

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace atp {

// The quantised ones are the block formats of GGUF files (ggml-common.h of llama.cpp documents their bytes);
// kQ4 is our own: per 32 elements an fp16 scale and 32 indices of four bits into one fixed codebook.
enum class DType : uint8_t { kF32, kBF16, kF16, kQ8_0, kQ4_0, kQ4, kQ4_K, kQ5_K, kQ6_K };

// The smallest piece of a row that stands alone. A row's length is a multiple of `elements`.
struct DTypeBlock {
  int elements;
  int bytes;
  std::string_view name;
};

constexpr DTypeBlock BlockOf(DType dtype) {
  constexpr DTypeBlock blocks[] = {
      {1, 4, "f32"},  {1, 2, "bf16"},     {1, 2, "f16"},      {32, 34, "q8_0"},   {32, 18, "q4_0"},
      {32, 18, "q4"}, {256, 144, "q4_k"}, {256, 176, "q5_k"}, {256, 210, "q6_k"},
  };
  return blocks[static_cast<int>(dtype)];
}

constexpr std::string_view Name(DType dtype) { return BlockOf(dtype).name; }
constexpr bool IsQuantized(DType dtype) { return BlockOf(dtype).elements > 1; }
// Of eight sub-blocks of 32, with scales of their own that the block scales once more.
constexpr bool IsKQuant(DType dtype) { return BlockOf(dtype).elements == 256; }

// cols: a multiple of the block's elements.
constexpr size_t RowBytes(DType dtype, int64_t cols) {
  const DTypeBlock block = BlockOf(dtype);
  return static_cast<size_t>(cols / block.elements) * static_cast<size_t>(block.bytes);
}

constexpr float BF16ToFloat(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// Round to nearest even; NaN stays NaN.
constexpr uint16_t FloatToBF16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

constexpr float F16ToFloat(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fu;
  const uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // zero or subnormal
  return sign ? -magnitude : magnitude;
}

// Round to nearest even; too large becomes infinity, NaN stays NaN.
constexpr uint16_t FloatToF16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the value in units of 2^-24 in the low bits, rounded by the addition
    // itself.
    const float rounded = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(rounded) - 0x3f000000u));
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

// The 8-bit float e4m3fn (OCP 8-bit floating point): up to 448, no infinity.
constexpr float E4M3ToFloat(uint8_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x80u) << 24;
  const uint32_t magnitude = bits & 0x7fu;
  if (magnitude == 0x7f) return std::bit_cast<float>(sign | 0x7fc00000u);
  if (magnitude >= 8) return std::bit_cast<float>(sign | ((magnitude << 20) + (120u << 23)));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-9f;
  return sign ? -subnormal : subnormal;
}

// Round to nearest even; too large becomes 448, NaN stays NaN.
constexpr uint8_t FloatToE4M3(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 24 & 0x80u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint8_t>(sign | 0x7fu);
  if (magnitude >= std::bit_cast<uint32_t>(448.0f)) return static_cast<uint8_t>(sign | 0x7eu);
  if (magnitude < std::bit_cast<uint32_t>(0x1p-6f)) {
    // Subnormal: adding 2^14 leaves the value in units of 2^-9 in the low bits, rounded by the addition.
    const float rounded = std::bit_cast<float>(magnitude) + 0x1p14f;
    return static_cast<uint8_t>(sign | (std::bit_cast<uint32_t>(rounded) - std::bit_cast<uint32_t>(0x1p14f)));
  }
  const uint32_t odd = (magnitude >> 20) & 1u;
  return static_cast<uint8_t>(sign | ((magnitude - (120u << 23) + 0x7ffffu + odd) >> 20));
}

}  // namespace atp

#endif  // ATP_KERNELS_DTYPE_H_
