// The order in which the cpu backend keeps weight matrices: panels of 16 outputs, so that a vector's lanes
// are outputs and one pass over a panel, front to back, serves any number of rows. Nothing is lost: a panel
// holds the same bits as the 16 rows it was made of, in another order.
//
//   f32, f16   [k][16]
//   bf16       [k / 2][16][2]; an odd last column is followed by zeros
//   quantised  four sections, each [block of 32][...] or, for `super`, [256 columns][...]; see PanelLayout.
//              A unit is 64 bytes: for each of 16 outputs four elements, k = 4j .. 4j + 3, j = 0..7.
#ifndef ATP_KERNELS_CPU_PANELS_H_
#define ATP_KERNELS_CPU_PANELS_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/dtype.h"
#include "kernels/tensor_view.h"

namespace atp::cpu {

inline constexpr int kPanelOuts = 16;
inline constexpr int kQuantBlock = 32;

// Offsets in bytes from the start of a panel; every section starts at a multiple of 64.
struct PanelLayout {
  DType dtype = DType::kF32;
  int64_t cols = 0;
  size_t super = 0;   // q4_k, q5_k: 16 d, 16 dmin; q6_k: 16 d (fp16)
  size_t scales = 0;  // q8_0, q4_0, q4: 16 fp16; q4_k, q5_k: 16 scales, 16 minima (uint8);
                      // q6_k: 16 scales of the first half, 16 of the second (int8)
  size_t quants = 0;  // q8_0: 8 units of q + 128; else 4 units, element k in the low half, k + 16 in the high
  size_t high = 0;    // q5_k: one unit, bit j of a byte belongs to unit j;
                      // q6_k: two units, bits 2(j % 4) and up of unit j / 4's bytes
  size_t bytes = 0;   // of a whole panel

  PanelLayout(DType dtype, int64_t cols);
};

// Panels come in pairs (kernels take two at a time): an odd last one is followed by one of zeros.
constexpr int64_t PanelCount(int64_t rows) { return (rows + 2 * kPanelOuts - 1) / (2 * kPanelOuts) * 2; }

// Rows `from`, `row_bytes` apart, in layout.dtype's own bytes; count <= 16 of them. The panel is zeroed
// memory.
void PackPanel(const PanelLayout& layout, const std::byte* from, size_t row_bytes, int count,
               std::byte* panel);

// A matrix as panels of `dtype`, converted and packed by all threads. Errors: Backend::LoadWeight's.
absl::StatusOr<Weight> LoadPanels(const TensorView& host, DType dtype, ThreadPool& pool);

// Row `row` of a packed matrix as fp32.
void UnpackRow(const TensorView& packed, int64_t row, float* out);

}  // namespace atp::cpu

#endif  // ATP_KERNELS_CPU_PANELS_H_
