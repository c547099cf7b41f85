// Single elements of KV pages, for kernels that go through them once in a while.
#ifndef ATP_KERNELS_CUDA_PRINCIPAL_PAGES_CUH_
#define ATP_KERNELS_CUDA_PRINCIPAL_PAGES_CUH_

#include "kernels/cuda/kv_tables.h"
#include "kernels/cuda/launch.h"

namespace atp::cuda {

__device__ __forceinline__ float ScaleAt(const std::byte* block, uint32_t offset, int entry) {
  return BF16ToFloat(reinterpret_cast<const uint16_t*>(block + offset)[entry]);
}

// Element `index` of an array of keys or values, times its entry's scale where the format has one.
__device__ __forceinline__ float ElementAt(const std::byte* array, KvFormat format, int index, float scale) {
  switch (format) {
    case KvFormat::kF32:
      return reinterpret_cast<const float*>(array)[index];
    case KvFormat::kBF16:
      return BF16ToFloat(reinterpret_cast<const uint16_t*>(array)[index]);
    case KvFormat::kFp8:
      return E4M3ToFloat(static_cast<uint8_t>(array[index])) * scale;
    case KvFormat::kInt8:
      return static_cast<float>(reinterpret_cast<const int8_t*>(array)[index]) * scale;
    case KvFormat::kInt4: {
      const int byte = static_cast<int>(array[index / 2]);
      const int half = index % 2 == 0 ? byte & 15 : byte >> 4;
      return static_cast<float>(half >= 8 ? half - 16 : half) * scale;
    }
  }
  return 0;
}

// Symmetric quantisation as KvPage::Store does it, to the last bit: the scale is rounded up to bf16.
__device__ __forceinline__ uint16_t ScaleBits(float largest, int top) {
  if (!(largest > 0) || largest > 3.402823466e38f) return 0;
  const float wanted = largest / static_cast<float>(top);
  uint16_t bits = FloatToBF16(wanted);
  if (BF16ToFloat(bits) < wanted) ++bits;
  return bits;
}
// The bits of an element: of int4, sign bits follow.
__device__ __forceinline__ uint32_t Quantized(float x, float scale, KvFormat format) {
  if (scale == 0) return 0;
  if (format == KvFormat::kFp8) return ToE4M3(x / scale);
  const float top = static_cast<float>(TopOf(format));
  return static_cast<uint32_t>(static_cast<int>(fminf(fmaxf(rintf(x / scale), -top - 1), top)));
}

// Writes `entries` entries of a block by all threads of the thread block. key(entry, dimension) and
// value(entry, dimension) give fp32, mass(entry) the log mass; entries are the block's own. Where the page
// rotates keys they come so, rounded, and key_scale(entry) gives the bits of their scales.
template <class Key, class KeyScale, class Value, class Mass>
__device__ __forceinline__ void StorePage(const PageLayout& page, std::byte* block, int threads,
                                          const Key& key, const KeyScale& key_scale, const Value& value,
                                          const Mass& mass) {
  const int me = static_cast<int>(threadIdx.x), lane = me % kWarpSize, d = page.head_dim;
  const int top = TopOf(page.format);
  auto* key_scales = reinterpret_cast<uint16_t*>(block + page.key_scale_offset);
  auto* value_scales = reinterpret_cast<uint16_t*>(block + page.value_scale_offset);
#pragma unroll 1
  for (int e = me / kWarpSize; e < page.entries; e += threads / kWarpSize) {
    if (HasScales(page.format)) {
      float largest_key = 0, largest_value = 0;
      for (int i = lane; i < d; i += kWarpSize) {
        largest_key = fmaxf(largest_key, fabsf(key(e, i)));
        largest_value = fmaxf(largest_value, fabsf(value(e, i)));
      }
      largest_key = WarpMax(largest_key), largest_value = WarpMax(largest_value);
      if (lane == 0) {
        key_scales[e] = RotatesKeys(page.format) ? key_scale(e) : ScaleBits(largest_key, top);
        value_scales[e] = ScaleBits(largest_value, top);
      }
    }
    if (lane == 0 && page.with_log_mass) reinterpret_cast<float*>(block + page.log_mass_offset)[e] = mass(e);
  }
  __syncthreads();
  if (page.format == KvFormat::kInt4) {
    // A byte is two entries' keys, or two dimensions' values: one thread writes both.
#pragma unroll 1
    for (int i = me; i < page.entries * d / 2; i += threads) {
      const int row = i / (page.entries / 2), at = i % (page.entries / 2), e = at / 8 * 16 + at % 8;
      const uint32_t low = Quantized(key(e, row), BF16ToFloat(key_scales[e]), KvFormat::kInt4);
      const uint32_t high = Quantized(key(e + 8, row), BF16ToFloat(key_scales[e + 8]), KvFormat::kInt4);
      block[i] = static_cast<std::byte>((low & 15) | (high & 15) << 4);
      const int entry = i / (d / 2), dimension = i % (d / 2);
      const float scale = BF16ToFloat(value_scales[entry]);
      const uint32_t first = Quantized(value(entry, dimension), scale, KvFormat::kInt4);
      const uint32_t second = Quantized(value(entry, dimension + d / 2), scale, KvFormat::kInt4);
      block[page.value_offset + static_cast<uint32_t>(i)] =
          static_cast<std::byte>((first & 15) | (second & 15) << 4);
    }
    return;
  }
#pragma unroll 1
  for (int i = me; i < 2 * page.entries * d; i += threads) {
    const bool is_key = i < page.entries * d;
    const int at = is_key ? i : i - page.entries * d;
    const int entry = is_key ? at % page.entries : at / d;
    const float x = is_key ? key(entry, at / page.entries) : value(entry, at % d);
    std::byte* array = is_key ? block : block + page.value_offset;
    if (page.format == KvFormat::kF32) {
      reinterpret_cast<float*>(array)[at] = x;
    } else if (page.format == KvFormat::kBF16) {
      reinterpret_cast<uint16_t*>(array)[at] = FloatToBF16(x);
    } else {
      const float scale = BF16ToFloat((is_key ? key_scales : value_scales)[entry]);
      array[at] = static_cast<std::byte>(Quantized(x, scale, page.format));
    }
  }
}

}  // namespace atp::cuda

#endif  // ATP_KERNELS_CUDA_PRINCIPAL_PAGES_CUH_
