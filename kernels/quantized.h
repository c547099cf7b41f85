// Rows of stored weights to fp32 and back, one block at a time: the plain code that defines what the bytes
// mean. Fast forms of it live with each backend.
//
// The byte layouts of q8_0, q4_0, q4_k, q5_k and q6_k are those of GGUF files; q4 has q4_0's (fp16 scale,
// then byte i holds element i in its low and element i + 16 in its high half), with kQ4Levels in place of
// -8..7.
#ifndef ATP_KERNELS_QUANTIZED_H_
#define ATP_KERNELS_QUANTIZED_H_

#include <cstdint>

#include "kernels/dtype.h"

namespace atp {

// The 16 levels of kQ4: weight = scale · level. Least mean squared error (Lloyd's iteration) for blocks of 32
// normal deviates whose scale, of either sign, is fitted by least squares; the largest is 127 by convention.
// Lopsided, because the sign of the scale puts a block's largest element on the side that reaches further.
inline constexpr int8_t kQ4Levels[16] = {-127, -100, -78, -61, -47, -33, -21, -9,
                                         2,    13,   25,  37,  50,  65,  83,  106};

// Six bits each: scale and minimum of sub-block `index` (0..7) out of the 12 bytes that q4_k and q5_k keep.
struct ScaleAndMin {
  uint8_t scale, min;
};
ScaleAndMin KScaleAndMin(const uint8_t* packed, int index);

// The 32 elements of sub-block `index` (0..7) of a K-quant block, without their scale: q4_k 0..15, q5_k
// 0..31, q6_k 0..63 (32 is its zero).
void KElements(DType dtype, const uint8_t* block, int index, uint8_t* elements);

// cols: a multiple of the block's elements. src need not be aligned.
void DequantizeRow(DType dtype, const void* src, int64_t cols, float* out);

// For these the library can make rows: f32, bf16, f16, q8_0, q4_0, q4.
constexpr bool CanQuantizeTo(DType dtype) { return !IsKQuant(dtype); }

// CanQuantizeTo(dtype); cols as above; out takes RowBytes(dtype, cols) and need not be aligned.
// Deterministic. An infinity or NaN poisons its block only: the block becomes zeros in the quantised formats.
void QuantizeRow(DType dtype, const float* src, int64_t cols, void* out);

}  // namespace atp

#endif  // ATP_KERNELS_QUANTIZED_H_
