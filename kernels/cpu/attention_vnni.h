// Attention over tiles of integer entries with the dot products of AVX-512 VNNI: int8 and int4 keys and
// values are multiplied as they are, never converted. The other side is rounded to 16 bits (two products of 8
// bits): a query to 2^-16 of its largest element, a weight times its value's scale to 2^-17 of the largest in
// the tile. That is a 256th of the step of int8 entries, so integer formats lose nothing by it.
#ifndef ATP_KERNELS_CPU_ATTENTION_VNNI_H_
#define ATP_KERNELS_CPU_ATTENTION_VNNI_H_

#include <cstddef>
#include <cstdint>

#include "hwy/cache_control.h"
#include "kernels/cpu/attention_state.h"

namespace atp::cpu {

// Whether this machine has the instructions, and there are kernels for pages like this one.
bool VnniSupports(const KvPage& page);

// The cache lines of the blocks that begin in a tile, asked for one by one between the multiplications of the
// tile before: for all at once would wait.
class NextLines {
 public:
  NextLines() = default;
  explicit NextLines(const TilePlace& tile) {
    if (tile.slices > 0) bytes_ = static_cast<int>(tile.page->key_scale_offset());
    for (int s = 0; s < tile.slices; ++s) {
      if (tile.offset[s] != 0) continue;
      block_[blocks_++] = tile.block[s];
      // What is behind keys and values is little, and needed first.
      for (size_t at = bytes_; at < tile.page->bytes(); at += 64) hwy::Prefetch(tile.block[s] + at);
    }
  }

  // False: there was none left.
  bool Prefetch() {
    if (at_block_ >= blocks_) return false;
    hwy::Prefetch(block_[at_block_] + at_byte_);
    at_byte_ += 64;
    if (at_byte_ >= bytes_) at_byte_ = 0, ++at_block_;
    return true;
  }
  void PrefetchAll() {
    while (Prefetch()) continue;
  }

 private:
  const std::byte* block_[kTileSlices];
  int blocks_ = 0;
  int bytes_ = 0;  // of a block's keys and values
  int at_block_ = 0;
  int at_byte_ = 0;
};

// A part's queries and a tile, as the instructions want them. All 64-byte aligned.
struct IntegerOperands {
  int head_dim;
  int queries;
  int8_t* query;       // [queries, 2, dim]: high and low bytes of 16-bit integers
  float* query_scale;  // [queries]
  int32_t* query_sum;  // [2, queries], of 256 times the high bytes, and of the 16-bit integers
  uint8_t* keys;       // [dim / 4, 64, 4], moved to be unsigned
  int8_t* values;      // [64 / 4, dim, 4]
  alignas(64) float key_scale[kTile];
  alignas(64) float value_scale[kTile];  // 0 for entries that are not there
  const float* log_mass[kTileSlices];
  int32_t key_offset;  // what was added to the keys
  int halves;          // of the queries that are used: 1 is the high bytes alone
  NextLines next;
};
size_t IntegerOperandFloats(int queries, int head_dim);
void PlaceIntegerOperands(float* memory, int queries, int head_dim, IntegerOperands& operands);

// query: [queries, dim], in the basis of the keys.
void QuantizeQueries(const float* query, int queries, size_t dim, IntegerOperands& operands);
void UnpackIntegerTile(const TilePlace& tile, IntegerOperands& operands);

// Of `count` <= 8 queries from `first` on, for the entries of the first `slices` slices:
// scores[q][e] = query[q]·key[e] + log_mass[e].
void IntegerScores(IntegerOperands& operands, int slices, int first, int count, float (*scores)[kTile]);
// sum[q] = sum[q]·shrink[q] + Σ_e p[q][e]·value[e]. p must be 0 for entries that a query does not see.
void IntegerValues(IntegerOperands& operands, int slices, int count, const float (*p)[kTile],
                   const float* shrink, float* sum);

}  // namespace atp::cpu

#endif  // ATP_KERNELS_CPU_ATTENTION_VNNI_H_
