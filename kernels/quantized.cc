#include "kernels/quantized.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "absl/base/macros.h"

namespace atp {
namespace {

float HalfAt(const uint8_t* bytes) {
  uint16_t bits;
  std::memcpy(&bits, bytes, sizeof(bits));
  return F16ToFloat(bits);
}

void PutHalf(float value, uint8_t* bytes) {
  const uint16_t bits = FloatToF16(value);
  std::memcpy(bytes, &bits, sizeof(bits));
}

void DequantizeQ8(const uint8_t* block, float* out) {
  const float scale = HalfAt(block);
  for (int i = 0; i < 32; ++i) out[i] = scale * static_cast<float>(static_cast<int8_t>(block[2 + i]));
}

void DequantizeQ4Linear(const uint8_t* block, float* out) {
  const float scale = HalfAt(block);
  for (int i = 0; i < 16; ++i) {
    out[i] = scale * static_cast<float>((block[2 + i] & 15) - 8);
    out[i + 16] = scale * static_cast<float>((block[2 + i] >> 4) - 8);
  }
}

void DequantizeQ4(const uint8_t* block, float* out) {
  const float scale = HalfAt(block);
  for (int i = 0; i < 16; ++i) {
    out[i] = scale * static_cast<float>(kQ4Levels[block[2 + i] & 15]);
    out[i + 16] = scale * static_cast<float>(kQ4Levels[block[2 + i] >> 4]);
  }
}

// d, dmin: fp16; 12 bytes of scales and minima.
void DequantizeK45(DType dtype, const uint8_t* block, float* out) {
  const float d = HalfAt(block), dmin = HalfAt(block + 2);
  for (int s = 0; s < 8; ++s) {
    const ScaleAndMin packed = KScaleAndMin(block + 4, s);
    const float scale = d * static_cast<float>(packed.scale), min = dmin * static_cast<float>(packed.min);
    uint8_t elements[32];
    KElements(dtype, block, s, elements);
    for (int i = 0; i < 32; ++i) out[s * 32 + i] = scale * static_cast<float>(elements[i]) - min;
  }
}

// After the elements 16 signed scales, one per 16 elements, and d: fp16.
void DequantizeQ6K(const uint8_t* block, float* out) {
  const float d = HalfAt(block + 208);
  for (int s = 0; s < 8; ++s) {
    uint8_t elements[32];
    KElements(DType::kQ6_K, block, s, elements);
    for (int i = 0; i < 32; ++i) {
      const float scale = d * static_cast<float>(static_cast<int8_t>(block[192 + 2 * s + i / 16]));
      out[s * 32 + i] = scale * static_cast<float>(elements[i] - 32);
    }
  }
}

// 0 where an element is not finite.
float LargestMagnitude(const float* x) {
  float largest = 0;
  for (int i = 0; i < 32; ++i) {
    if (!std::isfinite(x[i])) return 0;
    largest = std::max(largest, std::abs(x[i]));
  }
  return largest;
}

// Finite in fp16, and its inverse; 0 where the scale is too small for fp16 to tell from 0.
float StorableScale(float scale) { return F16ToFloat(FloatToF16(std::clamp(scale, -65504.0f, 65504.0f))); }
float InverseOf(float scale) { return scale != 0 ? 1 / scale : 0; }

void QuantizeQ8(const float* x, uint8_t* block) {
  const float scale = StorableScale(LargestMagnitude(x) / 127);
  const float inverse = LargestMagnitude(x) > 0 ? InverseOf(scale) : 0;
  PutHalf(scale, block);
  for (int i = 0; i < 32; ++i) {
    // Adding and taking away 1.5 · 2^23 rounds to the nearest integer.
    const float q =
        inverse != 0 ? std::clamp(x[i] * inverse, -127.0f, 127.0f) + 12582912.0f - 12582912.0f : 0;
    block[2 + i] = static_cast<uint8_t>(static_cast<int8_t>(q));
  }
}

constexpr int8_t kLinearLevels[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

struct Levels {
  float level[16];
  float boundary[15];  // half way between neighbours

  explicit Levels(const int8_t (&levels)[16]) {
    for (int i = 0; i < 16; ++i) level[i] = static_cast<float>(levels[i]);
    for (int i = 0; i < 15; ++i) boundary[i] = (level[i] + level[i + 1]) / 2;
  }
};

// index[i]: the level nearest to x[i] · inverse.
void Nearest(const Levels& levels, const float* x, float inverse, int32_t* index) {
  float scaled[32];
  for (int i = 0; i < 32; ++i) scaled[i] = x[i] * inverse;
  for (int i = 0; i < 32; ++i) index[i] = 0;
  for (const float boundary : levels.boundary) {
    for (int i = 0; i < 32; ++i) index[i] += scaled[i] > boundary ? 1 : 0;
  }
}

// Σ level·x / Σ level²: the scale that suits these indices best.
float BestScale(const Levels& levels, const float* x, const int32_t* index) {
  float product = 0, square = 0;
  for (int i = 0; i < 32; ++i) {
    const float level = levels.level[index[i]];
    product += level * x[i];
    square += level * level;
  }
  return square > 0 ? product / square : 0;
}

// Tries scales that put the largest element near either end of the levels, each improved by one step of
// alternation, and keeps the one with the least squared error.
void QuantizeLevels(const Levels& levels, const float* x, uint8_t* block) {
  constexpr float kStretches[] = {1.15f, 1.03f, 0.92f, 0.8f};
  float best_error = std::numeric_limits<float>::infinity();
  float best_scale = 0;
  int32_t best[32] = {};
  float peak = 0;
  if (LargestMagnitude(x) > 0) {
    peak = *std::max_element(x, x + 32, [](float a, float b) { return std::abs(a) < std::abs(b); });
  }
  for (int candidate = 0; candidate < 8 && peak != 0; ++candidate) {
    const float end = levels.level[candidate % 2 == 0 ? 0 : 15] * kStretches[candidate / 2];
    int32_t index[32];
    Nearest(levels, x, end / peak, index);
    Nearest(levels, x, InverseOf(BestScale(levels, x, index)), index);
    const float scale = StorableScale(BestScale(levels, x, index));
    float error = 0;
    for (int i = 0; i < 32; ++i) {
      const float miss = x[i] - scale * levels.level[index[i]];
      error += miss * miss;
    }
    if (error < best_error) {
      best_error = error;
      best_scale = scale;
      std::copy_n(index, 32, best);
    }
  }
  PutHalf(best_scale, block);
  for (int i = 0; i < 16; ++i) block[2 + i] = static_cast<uint8_t>(best[i] | best[i + 16] << 4);
}

}  // namespace

ScaleAndMin KScaleAndMin(const uint8_t* packed, int index) {
  if (index < 4)
    return {static_cast<uint8_t>(packed[index] & 63), static_cast<uint8_t>(packed[index + 4] & 63)};
  // The later four have their low four bits in bytes 8..11, their upper two on top of the earlier ones'.
  const int low = packed[index + 4];
  return {static_cast<uint8_t>((low & 15) | (packed[index - 4] >> 6) << 4),
          static_cast<uint8_t>((low >> 4) | (packed[index] >> 6) << 4)};
}

// q4_k, q5_k: two sub-blocks share 32 bytes of low four bits; of q5_k, bit s of byte i before them is the
// fifth of element i of sub-block s. q6_k: 128 bytes of low halves, 64 of upper two bits; within each half of
// 128 elements, quarter g has its low bits in nibble g / 2 of bytes 32 · (g % 2) + i, its upper bits at 2g of
// byte i.
void KElements(DType dtype, const uint8_t* block, int index, uint8_t* elements) {
  if (dtype == DType::kQ6_K) {
    const int g = index % 4;
    const uint8_t* low = block + index / 4 * 64 + g % 2 * 32;
    const uint8_t* high = block + 128 + index / 4 * 32;
    for (int i = 0; i < 32; ++i)
      elements[i] = static_cast<uint8_t>(((low[i] >> (g / 2 * 4)) & 15) | ((high[i] >> (2 * g)) & 3) << 4);
    return;
  }
  const uint8_t* high = block + 16;
  const uint8_t* low = high + (dtype == DType::kQ5_K ? 32 : 0) + index / 2 * 32;
  for (int i = 0; i < 32; ++i) {
    elements[i] = (low[i] >> (index % 2 * 4)) & 15;
    if (dtype == DType::kQ5_K)
      elements[i] = static_cast<uint8_t>(elements[i] | ((high[i] >> index) & 1) << 4);
  }
}

void DequantizeRow(DType dtype, const void* src, int64_t cols, float* out) {
  const DTypeBlock size = BlockOf(dtype);
  ABSL_ASSERT(cols % size.elements == 0);
  const uint8_t* from = static_cast<const uint8_t*>(src);
  if (dtype == DType::kF32) {
    if (cols > 0) std::memcpy(out, src, static_cast<size_t>(cols) * sizeof(float));
    return;
  }
  for (int64_t c = 0; c < cols; c += size.elements, from += size.bytes, out += size.elements) {
    switch (dtype) {
      case DType::kF32:
        break;
      case DType::kBF16: {
        uint16_t bits;
        std::memcpy(&bits, from, sizeof(bits));
        *out = BF16ToFloat(bits);
        break;
      }
      case DType::kF16:
        *out = HalfAt(from);
        break;
      case DType::kQ8_0:
        DequantizeQ8(from, out);
        break;
      case DType::kQ4_0:
        DequantizeQ4Linear(from, out);
        break;
      case DType::kQ4:
        DequantizeQ4(from, out);
        break;
      case DType::kQ4_K:
      case DType::kQ5_K:
        DequantizeK45(dtype, from, out);
        break;
      case DType::kQ6_K:
        DequantizeQ6K(from, out);
        break;
    }
  }
}

void QuantizeRow(DType dtype, const float* src, int64_t cols, void* out) {
  static const Levels linear(kLinearLevels);
  static const Levels fitted(kQ4Levels);
  const DTypeBlock size = BlockOf(dtype);
  ABSL_ASSERT(CanQuantizeTo(dtype) && cols % size.elements == 0);
  uint8_t* to = static_cast<uint8_t*>(out);
  for (int64_t c = 0; c < cols; c += size.elements, to += size.bytes) {
    switch (dtype) {
      case DType::kF32:
        std::memcpy(to, src + c, sizeof(float));
        break;
      case DType::kBF16: {
        const uint16_t bits = FloatToBF16(src[c]);
        std::memcpy(to, &bits, sizeof(bits));
        break;
      }
      case DType::kF16:
        PutHalf(src[c], to);
        break;
      case DType::kQ8_0:
        QuantizeQ8(src + c, to);
        break;
      case DType::kQ4_0:
        QuantizeLevels(linear, src + c, to);
        break;
      case DType::kQ4:
        QuantizeLevels(fitted, src + c, to);
        break;
      default:
        return;
    }
  }
}

}  // namespace atp
