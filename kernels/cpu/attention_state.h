// What the parts of attention share: sizes, and the running state of a part's queries.
#ifndef ATP_KERNELS_CPU_ATTENTION_STATE_H_
#define ATP_KERNELS_CPU_ATTENTION_STATE_H_

#include <cstddef>
#include <cstdint>
#include <limits>

#include "kernels/kv_page.h"

namespace atp::cpu {

inline constexpr int kSlice = 16;  // entries that are one vector of scores; divides every page's
inline constexpr int kTile = 64;   // entries between two steps of the running softmax
inline constexpr int kTileSlices = kTile / kSlice;
inline constexpr int kTilesPerChunk = 8;    // after which a state is merged into the total: 512 entries
inline constexpr int kQueriesPerPart = 32;  // aimed at: enough to reuse a tile from the first-level cache
inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Of the queries of a part, over one chunk of entries or several. dim is head_dim rounded up to 16, so that
// every query's rows are aligned.
struct AttentionState {
  float* query;    // [queries, dim], scaled
  float* sum;      // [queries, dim], Σ p·v
  float* total;    // [queries, 16], Σ p in 16 lanes
  float* maximum;  // [queries]
  size_t dim;
};

// Where a tile's slices of 16 entries lie.
struct TilePlace {
  const KvPage* page;
  const std::byte* block[kTileSlices];
  int offset[kTileSlices];  // of the slice's first entry in its block
  int slices = 0;
  uint64_t present = 0;  // bit e: entry e is there

  // Null: all zero.
  const float* LogMass(int slice) const {
    if (!page->with_log_mass()) return nullptr;
    return reinterpret_cast<const float*>(block[slice] + page->log_mass_offset()) + offset[slice];
  }
};

inline size_t AlignedDim(int head_dim) { return (static_cast<size_t>(head_dim) + 15) / 16 * 16; }

}  // namespace atp::cpu

#endif  // ATP_KERNELS_CPU_ATTENTION_STATE_H_
