// Block-quantised weights as the device keeps them. What a block holds together lies apart, in planes, so
// that a warp reads whole sectors of each:
//
//               codes [rows, cols]                    scales [rows, cols / 32]   supers [rows, cols / 256]
//   q8_0        int8                                  fp16
//   q4_0, q4    4 bits: which of 16 levels            fp16
//   q4_k        4 bits                                6-bit scale, 6-bit minimum fp16 of scales, fp16 of
//   minima q5_k        8 bits, of which 5 are used           the same                   the same q6_k 8 bits,
//   of which 6 are used           int8 scales of both 16     fp16 of scales, 0
//
// Of codes of 4 bits, eight in a row are a uint32_t, the first the lowest.
#ifndef ATP_KERNELS_CUDA_WEIGHT_PLANES_H_
#define ATP_KERNELS_CUDA_WEIGHT_PLANES_H_

#include <cstddef>
#include <cstdint>

#include "kernels/tensor_view.h"

namespace atp::cuda {

constexpr bool HasNibbles(DType dtype) {
  return dtype == DType::kQ4_0 || dtype == DType::kQ4 || dtype == DType::kQ4_K;
}

// Pointers to the planes, or bytes of each.
struct WeightPlanes {
  const void* codes = nullptr;
  const uint16_t* scales = nullptr;
  const uint32_t* supers = nullptr;
};
struct WeightPlaneBytes {
  size_t codes, scales, supers;
  size_t total() const { return codes + scales + supers; }
};

// elements: whole blocks; dtype is quantised.
WeightPlaneBytes PlaneBytes(DType dtype, int64_t elements);

// Of a weight that is not quantised, `codes` is its data.
WeightPlanes PlanesOf(const TensorView& weight);

// blocks: as kernels/quantized.h has them. The planes of these elements alone are written.
void SplitIntoPlanes(DType dtype, const std::byte* blocks, int64_t elements, std::byte* codes,
                     std::byte* scales, std::byte* supers);

}  // namespace atp::cuda

#endif  // ATP_KERNELS_CUDA_WEIGHT_PLANES_H_
