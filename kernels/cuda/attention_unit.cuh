// What a warp does: eight (or twice eight) queries of one kv head over one unit of entries.
//
// Both products are turned around, scores as keys x queriesᵀ and outputs as valuesᵀ x weightsᵀ, so that the
// eight columns of mma.m16n8k16 are queries: a decode step of one token has only a group of them. Lane 4 g +
// t holds scores of entries 8 g .. 8 g + 7 and sums of dimensions 64 h + 8 g .. + 7, each for queries 2 t and
// 2 t + 1. Queries and weights are rounded to bf16, but for fp32 pages, where three bf16 terms of each factor
// give all of fp32's digits; sums are fp32.
#ifndef ATP_KERNELS_CUDA_ATTENTION_UNIT_CUH_
#define ATP_KERNELS_CUDA_ATTENTION_UNIT_CUH_

#include "kernels/cuda/kv_tables.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/online_softmax.cuh"
#include "kernels/cuda/page_fragments.cuh"

namespace atp::cuda {

inline constexpr int kWidestHead = 128;

inline constexpr int kAttentionThreads = kChunkUnits * kWarpSize;

// The queries of a warp, eight per block: rows of the batch and heads of the group, packed. They lie in
// shared memory, each thread's part where only that thread looks: the registers are needed for sums and
// loads.
template <int kBlocks, int kTerms>
class QueryFragments {
 public:
  static constexpr int kWords = kBlocks * kTerms * (kWidestHead / 16) * 2 * kAttentionThreads;

  __device__ __forceinline__ explicit QueryFragments(const Shared<uint32_t>& memory) : memory_(memory) {}
  __device__ __forceinline__ void Store(int block, int term, int step, uint32_t low, uint32_t high) const {
    memory_.template StoreAs<uint2>(At(block, term, step), make_uint2(low, high));
  }
  __device__ __forceinline__ void Load(int block, int term, int step, uint32_t (&b)[2]) const {
    const uint2 pair = memory_.template LoadAs<uint2>(At(block, term, step));
    b[0] = pair.x, b[1] = pair.y;
  }

 private:
  static __device__ __forceinline__ int At(int block, int term, int step) {
    return (((block * kTerms + term) * (kWidestHead / 16) + step) * kAttentionThreads +
            static_cast<int>(threadIdx.x)) *
           2;
  }
  Shared<uint32_t> memory_;
};

// One unit's state, of queries 2t and 2t + 1 of each block.
template <int kBlocks>
struct UnitState {
  float maximum[kBlocks][2];
  float total[kBlocks][2];
  float sum[kBlocks][2][4][4];  // h, product, element

  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < 2; ++i) maximum[b][i] = MinusInfinity(), total[b][i] = 0;
#pragma unroll
      for (int i = 0; i < 32; ++i) sum[b][i / 16][i / 4 % 4][i % 4] = 0;
    }
  }
};

// One part (principal or exact) of a head's entries.
struct EntryRange {
  const KvTables* tables;
  const PageLayout* page;
  const BlockId* blocks;
  int end;           // entries from here on are seen by nobody in the tile
  float scale;       // of scores, times log2 e
  bool all_visible;  // but for padding: no query sees fewer than `end`
};

// The lane's slices of a tile: t's, whose values it loads, and g / 2's, whose keys it loads.
struct TileAddress {
  const std::byte* key_block;
  const std::byte* value_block;
  int key_offset, value_offset;
};

__device__ __forceinline__ TileAddress AddressOf(const EntryRange& range, int tile, int lane) {
  const int entry = tile + lane % 4 * 16;
  BlockId id = -1;
  int offset = 0;
  if (entry < range.end) {
    id = range.blocks[entry / range.page->entries];
    offset = entry % range.page->entries;
  }
  const BlockId key_id = __shfl_sync(kWarpMask, id, lane / 8);
  TileAddress address;
  address.key_offset = __shfl_sync(kWarpMask, offset, lane / 8);
  address.value_offset = offset;
  address.key_block = key_id < 0 ? nullptr : range.tables->Block(key_id);
  address.value_block = id < 0 ? nullptr : range.tables->Block(id);
  return address;
}

// scores[b][product][element] = key · query, unscaled.
template <KvFormat kFormat, int kBlocks, int kHeadDim>
__device__ __forceinline__ void Scores(const EntryRange& range, const TileAddress& address, int head_dim,
                                       int lane, const QueryFragments<kBlocks, kTermsOf<kFormat>>& query,
                                       float (&scores)[kBlocks][4][4]) {
  constexpr int kTerms = kTermsOf<kFormat>;
  const int t = lane % 4, half = lane / 4 % 2;
#pragma unroll
  for (int i = 0; i < kBlocks * 16; ++i) scores[i / 16][i / 4 % 4][i % 4] = 0;
  // All loads of a tile in flight where registers allow.
  [[maybe_unused]] constexpr int kUnroll = kBlocks > 1 ? 2 : kWidestHead / 16;
#pragma unroll kUnroll
  for (int step = 0; step < (kHeadDim > 0 ? kHeadDim : kWidestHead) / 16; ++step) {
    if (kHeadDim == 0 && 16 * step >= head_dim) continue;
    uint32_t q[kBlocks][kTerms][2];
#pragma unroll
    for (int i = 0; i < kBlocks * kTerms; ++i)
      query.Load(i / kTerms, i % kTerms, step, q[i / kTerms][i % kTerms]);
    RowOf8<kFormat> rows[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      rows[i].Load(
          KeyRow<kFormat>(address.key_block, *range.page, address.key_offset, 16 * step + 4 * i + t, half),
          address.key_block != nullptr, kFormat == KvFormat::kInt4 ? 4 * half : 0);
    }
#pragma unroll
    for (int product = 0; product < 4; ++product) {
#pragma unroll
      for (int term = 0; term < kTerms; ++term) {
        uint32_t a[4];
        FragmentOf<kFormat>(rows, product, term, a);
#pragma unroll
        for (int other = 0; other + term < kTerms; ++other) {
#pragma unroll
          for (int b = 0; b < kBlocks; ++b) MmaBF16(scores[b][product], a, q[b][other]);
        }
      }
    }
  }
}

// Eight bf16 scales, or eight log masses, of entries beside each other.
__device__ __forceinline__ void LoadScales(const std::byte* from, float (&out)[8]) {
  const uint4 v = *reinterpret_cast<const uint4*>(from);
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) out[2 * i] = LowBF16(words[i]), out[2 * i + 1] = HighBF16(words[i]);
}

// Which of the lane's eight entries are there at all, as bits; their scores become exponents of 2, -inf for
// those a query does not see.
template <KvFormat kFormat, int kBlocks>
__device__ __forceinline__ uint32_t Exponents(const EntryRange& range, const TileAddress& address, int tile,
                                              int lane, const int (&visible)[kBlocks][2],
                                              float (&scores)[kBlocks][4][4]) {
  const PageLayout& page = *range.page;
  const int first = tile + lane / 4 * 8;
  const int offset = address.key_offset + lane / 4 % 2 * 8;
  float scale[8], mass[8];
  if (HasScales(kFormat) && address.key_block != nullptr) {
    LoadScales(address.key_block + page.key_scale_offset + 2 * offset, scale);
  }
  if (page.with_log_mass && address.key_block != nullptr) {
    const float4* from =
        reinterpret_cast<const float4*>(address.key_block + page.log_mass_offset + 4 * offset);
    const float4 low = from[0], high = from[1];
    mass[0] = low.x, mass[1] = low.y, mass[2] = low.z, mass[3] = low.w;
    mass[4] = high.x, mass[5] = high.y, mass[6] = high.z, mass[7] = high.w;
  }
  uint32_t there = 0;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const bool is_there = first + e < range.end && !(page.with_log_mass && mass[e] == MinusInfinity());
    there |= (is_there ? 1u : 0u) << e;
    const float factor = HasScales(kFormat) ? __fmul_rn(scale[e], range.scale) : range.scale;
    const float add = page.with_log_mass ? __fmul_rn(mass[e], kLog2E) : 0.0f;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& score = scores[b][e / 2][e % 2 * 2 + i];
        const bool seen = is_there && (range.all_visible || first + e < visible[b][i]);
        score = seen ? fmaf(score, factor, add) : MinusInfinity();
      }
    }
  }
  return there;
}

// Exponents become weights; the state's maximum and total move, its sums shrink.
template <int kBlocks>
__device__ __forceinline__ void Weights(float (&scores)[kBlocks][4][4], UnitState<kBlocks>& state) {
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    float shrink[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float maximum = scores[b][0][i];
#pragma unroll
      for (int e = 1; e < 8; ++e) maximum = fmaxf(maximum, scores[b][e / 2][e % 2 * 2 + i]);
#pragma unroll
      for (int distance = 4; distance < kWarpSize; distance *= 2) {
        maximum = fmaxf(maximum, __shfl_xor_sync(kWarpMask, maximum, distance));
      }
      maximum = fmaxf(maximum, state.maximum[b][i]);
      // With nothing seen yet, -inf minus -inf must not become NaN.
      const float reference = IsEmpty(maximum) ? 0.0f : maximum;
      shrink[i] = exp2f(state.maximum[b][i] - reference);
      float total = 0;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        float& score = scores[b][e / 2][e % 2 * 2 + i];
        score = exp2f(score - reference);
        total += score;
      }
      state.total[b][i] = fmaf(state.total[b][i], shrink[i], total);
      state.maximum[b][i] = maximum;
    }
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      float& sum = state.sum[b][j / 16][j / 4 % 4][j % 4];
      sum = __fmul_rn(sum, shrink[j % 2]);
    }
  }
}

// sum += weight · value.
template <KvFormat kFormat, int kBlocks, int kHeadDim>
__device__ __forceinline__ void AddValues(const EntryRange& range, const TileAddress& address, int head_dim,
                                          int lane, uint32_t there, float (&weights)[kBlocks][4][4],
                                          UnitState<kBlocks>& state) {
  constexpr int kTerms = kTermsOf<kFormat>;
  const int g = lane / 4, t = lane % 4;
  const PageLayout& page = *range.page;
  if (HasScales(kFormat) && address.key_block != nullptr) {
    float scale[8];
    LoadScales(address.key_block + page.value_scale_offset + 2 * (address.key_offset + g % 2 * 8), scale);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
#pragma unroll
      for (int j = 0; j < 2 * kBlocks; ++j) {
        float& weight = weights[j / 2][e / 2][e % 2 * 2 + j % 2];
        // What is not there has weight 0, and a scale that may be anything.
        weight = (there >> e & 1) != 0 ? __fmul_rn(weight, scale[e]) : 0.0f;
      }
    }
  }
  // Of slice t: bit e for its first half's entries, bit 8 + e for the second's.
  const uint32_t slice_there = __shfl_sync(kWarpMask, there, 8 * t) | __shfl_sync(kWarpMask, there, 8 * t + 4)
                                                                          << 8;
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    uint32_t p[kBlocks][kTerms][2];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int term = 0; term < kTerms; ++term) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          p[b][term][i] = TransposeMatrix(PackBF16(Term<kTerms>(weights[b][step][2 * i], term),
                                                   Term<kTerms>(weights[b][step][2 * i + 1], term)));
        }
      }
    }
#pragma unroll
    for (int h = 0; h < (kHeadDim > 0 && kHeadDim <= 64 ? 1 : 2); ++h) {
      if (kHeadDim == 0 && 64 * h >= head_dim) continue;
      const int dimension = 64 * h + 8 * g;
      const bool inside = kHeadDim > 0 || dimension < head_dim;
      RowOf8<kFormat> rows[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int entry = 2 * step + i / 2 + i % 2 * 8;
        rows[i].Load(
            ValueRow<kFormat>(address.value_block, page, head_dim, address.value_offset + entry, dimension),
            inside && (slice_there >> entry & 1) != 0,
            kFormat == KvFormat::kInt4 && dimension >= head_dim / 2 ? 4 : 0);
      }
#pragma unroll
      for (int product = 0; product < 4; ++product) {
#pragma unroll
        for (int term = 0; term < kTerms; ++term) {
          uint32_t a[4];
          FragmentOf<kFormat>(rows, product, term, a);
#pragma unroll
          for (int other = 0; other + term < kTerms; ++other) {
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) MmaBF16(state.sum[b][h][product], a, p[b][other]);
          }
        }
      }
    }
  }
}

// Entries [begin, begin + kUnitEntries) of a part. visible: queries 2t and 2t + 1 of each block see entries
// before this count. kHeadDim: 0 for any multiple of 16 up to kWidestHead.
template <KvFormat kFormat, int kBlocks, int kHeadDim>
__device__ __forceinline__ void AttendUnit(const EntryRange& range, int begin, int head_dim, int lane,
                                           const QueryFragments<kBlocks, kTermsOf<kFormat>>& query,
                                           const int (&visible)[kBlocks][2], UnitState<kBlocks>& state) {
  state.Clear();
  const int end = min(begin + kUnitEntries, range.end);
#pragma unroll 1
  for (int tile = begin; tile < end; tile += kTileEntries) {
    const TileAddress address = AddressOf(range, tile, lane);
    float scores[kBlocks][4][4];
    Scores<kFormat, kBlocks, kHeadDim>(range, address, head_dim, lane, query, scores);
    const uint32_t there = Exponents<kFormat>(range, address, tile, lane, visible, scores);
    Weights(scores, state);
    AddValues<kFormat, kBlocks, kHeadDim>(range, address, head_dim, lane, there, scores, state);
  }
#pragma unroll
  for (int i = 0; i < 2 * kBlocks; ++i) {
    float& total = state.total[i / 2][i % 2];
#pragma unroll
    for (int distance = 4; distance < kWarpSize; distance *= 2) {
      total += __shfl_xor_sync(kWarpMask, total, distance);
    }
  }
}

}  // namespace atp::cuda

#endif  // ATP_KERNELS_CUDA_ATTENTION_UNIT_CUH_
