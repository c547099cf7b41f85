// The eight tile registers of AMX, as both of its matrix product kernels use them: 0..3 hold sums, 4 and 5
// rows of x, 6 and 7 weights.
#ifndef ATP_KERNELS_CPU_AMX_TILES_H_
#define ATP_KERNELS_CPU_AMX_TILES_H_

#include <cstdint>

#include "kernels/cpu/ops.h"

namespace atp::cpu {

inline constexpr int kTileSums = 16;  // rows of a tile at most, and sums in each
// Rows of a part: many, because weights come from memory once for each, at less than AMX could use.
inline constexpr int64_t kTileRowsPerPart = 512;
inline constexpr int64_t kPartRows = kTileRowsPerPart + kTileSums;  // and a few more, where tiles end

// What LDTILECFG reads: Intel SDM, volume 1, 18.3.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // Of rows and rows_below (<= 16) rows of x, x_bytes (<= 64) of each at a time. Sums 0 and 1 are of tile 4's
  // rows, 2 and 3 of tile 5's.
  TileConfig(int64_t rows_above, int64_t rows_below, int x_bytes) {
    for (int t = 0; t < 8; ++t) row_bytes[t] = 64;
    row_bytes[4] = row_bytes[5] = static_cast<uint16_t>(x_bytes);
    rows[0] = rows[1] = rows[4] = static_cast<uint8_t>(rows_above);
    rows[2] = rows[3] = rows[5] = static_cast<uint8_t>(rows_below);
    rows[6] = rows[7] = static_cast<uint8_t>(x_bytes / 4);
  }
};
static_assert(sizeof(TileConfig) == 64);

}  // namespace atp::cpu

#endif  // ATP_KERNELS_CPU_AMX_TILES_H_
