#include "kernels/cuda/weight_planes.h"

#include <cstring>

#include "kernels/quantized.h"

namespace atp::cuda {
namespace {

// The 32 codes of sub-block `index` of a block, a byte each, and the two bytes of its scale.
void ReadSubBlock(DType dtype, const uint8_t* block, int index, uint8_t* codes, uint8_t* scale) {
  if (IsKQuant(dtype)) {
    KElements(dtype, block, index, codes);
    const ScaleAndMin packed = dtype == DType::kQ6_K
                                   ? ScaleAndMin{block[192 + 2 * index], block[193 + 2 * index]}
                                   : KScaleAndMin(block + 4, index);
    scale[0] = packed.scale;
    scale[1] = packed.min;
    return;
  }
  std::memcpy(scale, block, 2);
  for (int i = 0; i < 32; ++i) {
    codes[i] =
        dtype == DType::kQ8_0 ? block[2 + i] : static_cast<uint8_t>((block[2 + i % 16] >> (i / 16 * 4)) & 15);
  }
}

}  // namespace

WeightPlaneBytes PlaneBytes(DType dtype, int64_t elements) {
  const auto count = static_cast<size_t>(elements);
  return {HasNibbles(dtype) ? count / 2 : count, count / 16, IsKQuant(dtype) ? count / 64 : 0};
}

WeightPlanes PlanesOf(const TensorView& weight) {
  if (!IsQuantized(weight.dtype)) return {weight.data, nullptr, nullptr};
  const WeightPlaneBytes bytes = PlaneBytes(weight.dtype, weight.rows * weight.cols);
  const auto* codes = static_cast<const std::byte*>(weight.data);
  const std::byte* scales = codes + bytes.codes;
  return {codes, reinterpret_cast<const uint16_t*>(scales),
          reinterpret_cast<const uint32_t*>(scales + bytes.scales)};
}

void SplitIntoPlanes(DType dtype, const std::byte* blocks, int64_t elements, std::byte* codes,
                     std::byte* scales, std::byte* supers) {
  const DTypeBlock size = BlockOf(dtype);
  const auto* block = reinterpret_cast<const uint8_t*>(blocks);
  for (int64_t done = 0; done < elements; done += size.elements, block += size.bytes) {
    for (int index = 0; index < size.elements / 32; ++index, scales += 2) {
      uint8_t code[32], scale[2];
      ReadSubBlock(dtype, block, index, code, scale);
      std::memcpy(scales, scale, 2);
      for (int i = 0; i < 16 && HasNibbles(dtype); ++i)
        code[i] = static_cast<uint8_t>(code[2 * i] | code[2 * i + 1] << 4);
      const size_t bytes = HasNibbles(dtype) ? 16 : 32;
      std::memcpy(codes, code, bytes);
      codes += bytes;
    }
    if (!IsKQuant(dtype)) continue;
    const bool six = dtype == DType::kQ6_K;  // which has no minima
    std::memset(supers, 0, 4);
    std::memcpy(supers, block + (six ? 208 : 0), six ? 2 : 4);
    supers += 4;
  }
}

}  // namespace atp::cuda
