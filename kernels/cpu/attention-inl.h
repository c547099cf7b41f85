// Scores, softmax and weighted values of a tile of cache entries, once per target. Each query meets a tile
// with the same arithmetic whoever shares it, so its result does not depend on the rest of the batch.
#if defined(ATP_KERNELS_CPU_ATTENTION_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ATP_KERNELS_CPU_ATTENTION_INL_H_
#undef ATP_KERNELS_CPU_ATTENTION_INL_H_
#else
#define ATP_KERNELS_CPU_ATTENTION_INL_H_
#endif

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "hwy/cache_control.h"
#include "hwy/highway.h"
// math-inl.h after highway.h.
// clang-format off
#include "hwy/contrib/math/math-inl.h"
// clang-format on
#include "kernels/cpu/attention_state.h"
#include "kernels/cpu/load-inl.h"

HWY_BEFORE_NAMESPACE();
namespace atp::cpu {
namespace HWY_NAMESPACE {

// Up to 64 entries in slices of 16, which may lie in different blocks.
template <typename T>
struct Tile {
  const T* keys[kTileSlices];  // [head_dim, key_stride], the slice's first entry
  size_t key_stride;
  const T* values[kTileSlices];        // [16, head_dim]
  const float* log_mass[kTileSlices];  // [16], or null: all zero
  int head_dim;
  uint64_t present;  // bit e: entry e is there
  // The tile behind this one. Its cache lines are asked for one by one between the multiplications: the
  // hardware does not foresee the change of blocks, and asking for all at once would wait for them.
  const T* next_keys[kTileSlices];
  const T* next_values[kTileSlices];
};

using SliceTag = hn::CappedTag<float, kSlice>;
constexpr int kSliceLanes = static_cast<int>(hn::MaxLanes(SliceTag()));
constexpr int kSliceVectors = kSlice / kSliceLanes;
// Slices, and vectors of values, worked on at once: with 8 queries these make 16 accumulators, enough to hide
// the latency of two multiply-adds a cycle.
#if HWY_TARGET == HWY_AVX3
constexpr int kAtOnce = 2;
#else
constexpr int kAtOnce = 1;
#endif

// The entries of a tile that a query sees: those that are there among the first `limit`.
HWY_INLINE uint64_t Visible(uint64_t present, int limit) {
  if (limit >= kTile) return present;
  return limit <= 0 ? 0 : present & ((uint64_t{1} << limit) - 1);
}

// scores[q][e] = log_mass[e] + query[q]·key[e], for M queries and all entries of N slices.
template <int M, int N, typename T>
HWY_INLINE void Scores(const Tile<T>& tile, int slice, const float* query, size_t query_stride,
                       float (&scores)[M][kTile]) {
  const SliceTag d;
  using V = hn::Vec<SliceTag>;
  constexpr int kVectors = N * kSliceVectors;
  V acc[M][kVectors];
  const T *keys[N], *next[N];
  ATP_UNROLL for (int n = 0; n < N; ++n) {
    keys[n] = tile.keys[slice + n];
    next[n] = tile.next_keys[slice + n];
    const float* log_mass = tile.log_mass[slice + n];
    ATP_UNROLL for (int v = 0; v < kSliceVectors; ++v) {
      const V bias = log_mass != nullptr ? hn::LoadU(d, log_mass + v * kSliceLanes) : hn::Zero(d);
      ATP_UNROLL for (int q = 0; q < M; ++q) acc[q][n * kSliceVectors + v] = bias;
    }
  }
  const size_t stride = tile.key_stride;
  for (int i = 0; i < tile.head_dim; ++i) {
    ATP_UNROLL for (int n = 0; n < N; ++n) hwy::Prefetch(next[n] + i * stride);
    V key[kVectors];
    ATP_UNROLL for (int v = 0; v < kVectors; ++v) {
      key[v] = LoadFloats(d, keys[v / kSliceVectors] + i * stride + v % kSliceVectors * kSliceLanes);
    }
    ATP_UNROLL for (int q = 0; q < M; ++q) {
      const V value = hn::Set(d, query[q * query_stride + i]);
      ATP_UNROLL for (int v = 0; v < kVectors; ++v) acc[q][v] = hn::MulAdd(value, key[v], acc[q][v]);
    }
  }
  ATP_UNROLL for (int q = 0; q < M; ++q) {
    ATP_UNROLL for (int v = 0; v < kVectors; ++v) {
      hn::Store(acc[q][v], d, scores[q] + slice * kSlice + v * kSliceLanes);
    }
  }
}

// e^x for x <= 80, within 2 ulp; 0 below -87, where it would be subnormal. e^x = 2^n·e^r, |r| <= ln 2 / 2;
// the polynomial is that of expf in the Cephes library (Moshier). hn::Exp takes half as many instructions
// again.
template <class D>
HWY_INLINE hn::Vec<D> ExpOfScore(D d, hn::Vec<D> x) {
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_NEON
  const hn::RebindToSigned<D> di;
  const auto n = hn::NearestInt(hn::Mul(x, hn::Set(d, 1.44269504088896341f)));
  const auto whole = hn::ConvertTo(d, n);
  auto r = hn::NegMulAdd(whole, hn::Set(d, 0.693359375f), x);
  r = hn::NegMulAdd(whole, hn::Set(d, -2.12194440e-4f), r);
  const auto r2 = hn::Mul(r, r);
  const auto p01 = hn::MulAdd(r, hn::Set(d, 1.6666665459e-1f), hn::Set(d, 5.0000001201e-1f));
  const auto p23 = hn::MulAdd(r, hn::Set(d, 8.3334519073e-3f), hn::Set(d, 4.1665795894e-2f));
  const auto p45 = hn::MulAdd(r, hn::Set(d, 1.9875691500e-4f), hn::Set(d, 1.3981999507e-3f));
  const auto p = hn::MulAdd(hn::MulAdd(p45, r2, p23), r2, p01);
  const auto y = hn::Add(hn::MulAdd(p, r2, r), hn::Set(d, 1.0f));
  const auto scaled = hn::BitCast(d, hn::Add(hn::BitCast(di, y), hn::ShiftLeft<23>(n)));
  return hn::IfThenElseZero(hn::Ge(x, hn::Set(d, -87.0f)), scaled);
#else  // without fused multiply-add r would lose its last bits
  return hn::Exp(d, x);
#endif
}

// The maximum only keeps e^x in range, so it follows the scores no closer than this: most tiles move nothing.
constexpr float kMaximumSlack = 8.0f;

// Turns one query's scores into weights p (0 for entries that it does not see), moves its maximum and total,
// and returns the factor that its sum so far shrinks by.
HWY_INLINE float SoftmaxStep(uint64_t visible, float (&scores)[kTile], float& maximum, float* total) {
  const SliceTag d;
  using V = hn::Vec<SliceTag>;
  constexpr int kVectors = kTile / kSliceLanes;
  if (visible != ~uint64_t{0}) {
    const hn::RebindToUnsigned<SliceTag> bits;
    const auto bit_of_lane = hn::Shl(hn::Set(bits, 1u), hn::Iota(bits, 0));
    for (int e = 0; e < kTile; e += kSliceLanes) {
      const auto lanes = hn::Set(bits, static_cast<uint32_t>(visible >> e));
      const auto seen = hn::RebindMask(d, hn::TestBit(lanes, bit_of_lane));
      hn::Store(hn::IfThenElse(seen, hn::Load(d, scores + e), hn::Set(d, kMinusInfinity)), d, scores + e);
    }
  }
  V largest = hn::Load(d, scores);
  for (int v = 1; v < kVectors; ++v) largest = hn::Max(largest, hn::Load(d, scores + v * kSliceLanes));
  float shrink = 1.0f;
  if (!hn::AllFalse(d, hn::Gt(largest, hn::Set(d, maximum + kMaximumSlack)))) {
    const float new_maximum = hn::GetLane(hn::MaxOfLanes(d, largest));
    shrink = maximum == kMinusInfinity ? 0.0f : std::exp(maximum - new_maximum);
    maximum = new_maximum;
  } else if (maximum == kMinusInfinity) {  // nothing seen yet
    std::fill_n(scores, kTile, 0.0f);
    return shrink;
  }
  const V shift = hn::Set(d, maximum), factor = hn::Set(d, shrink);
  V sums[kSliceVectors];
  ATP_UNROLL for (int v = 0; v < kSliceVectors; ++v) {
    sums[v] = hn::Mul(hn::Load(d, total + v * kSliceLanes), factor);
  }
  for (int s = 0; s < kTile; s += kSlice) {
    ATP_UNROLL for (int v = 0; v < kSliceVectors; ++v) {
      float* at = scores + s + v * kSliceLanes;
      // The bound keeps -inf away from the conversion to an integer.
      const V p = ExpOfScore(d, hn::Max(hn::Sub(hn::Load(d, at), shift), hn::Set(d, -200.0f)));
      hn::Store(p, d, at);
      sums[v] = hn::Add(sums[v], p);
    }
  }
  ATP_UNROLL for (int v = 0; v < kSliceVectors; ++v) hn::Store(sums[v], d, total + v * kSliceLanes);
  return shrink;
}

// The entries of a bit mask, ascending.
struct EntryList {
  uint8_t entries[kTile];
  int count;
};
HWY_INLINE void List(uint64_t mask, EntryList& list) {
  list.count = 0;
  for (; mask != 0; mask &= mask - 1)
    list.entries[list.count++] = static_cast<uint8_t>(std::countr_zero(mask));
}

// sum[q][i] = sum[q][i]·shrink[q] + Σ_e p[q][e]·value[e][i] for dimensions [i, i + N·Lanes(d)).
template <int M, int N, class D, typename T>
HWY_INLINE void AddValues(D d, const Tile<T>& tile, const EntryList& list, int i, const float (&p)[M][kTile],
                          const float (&shrink)[M], float* sum, size_t sum_stride) {
  using V = hn::Vec<D>;
  const int lanes = static_cast<int>(hn::Lanes(d));
  V acc[M][N];
  ATP_UNROLL for (int q = 0; q < M; ++q) {
    const V factor = hn::Set(d, shrink[q]);
    ATP_UNROLL for (int n = 0; n < N; ++n) {
      acc[q][n] = hn::Mul(hn::LoadU(d, sum + q * sum_stride + i + n * lanes), factor);
    }
  }
  for (int k = 0; k < list.count; ++k) {
    const int entry = list.entries[k];
    const size_t offset = static_cast<size_t>(entry % kSlice) * tile.head_dim + i;
    const T* row = tile.values[entry / kSlice] + offset;
    hwy::Prefetch(tile.next_values[entry / kSlice] + offset);
    V value[N];
    ATP_UNROLL for (int n = 0; n < N; ++n) value[n] = LoadFloats(d, row + n * lanes);
    ATP_UNROLL for (int q = 0; q < M; ++q) {
      const V weight = hn::Set(d, p[q][entry]);
      ATP_UNROLL for (int n = 0; n < N; ++n) acc[q][n] = hn::MulAdd(weight, value[n], acc[q][n]);
    }
  }
  ATP_UNROLL for (int q = 0; q < M; ++q) {
    ATP_UNROLL for (int n = 0; n < N; ++n) { hn::StoreU(acc[q][n], d, sum + q * sum_stride + i + n * lanes); }
  }
}

// limit: how many entries of the tile each query may see, from the part's first query on; null: all.
template <int M, typename T>
HWY_NOINLINE void UpdateQueries(const Tile<T>& tile, const AttentionState& state, const int* limit,
                                int first) {
  uint64_t visible[M], seen = 0;
  for (int q = 0; q < M; ++q) {
    visible[q] = limit == nullptr ? tile.present : Visible(tile.present, limit[first + q]);
    seen |= visible[q];
  }
  if (seen == 0) return;
  const int slices = (kTile - std::countl_zero(seen) + kSlice - 1) / kSlice;
  alignas(64) float p[M][kTile];
  const float* query = state.query + first * state.dim;
  int slice = 0;
  for (; slice + kAtOnce <= slices; slice += kAtOnce) Scores<M, kAtOnce>(tile, slice, query, state.dim, p);
  for (; slice < slices; ++slice) Scores<M, 1>(tile, slice, query, state.dim, p);
  float shrink[M];
  for (int q = 0; q < M; ++q) {
    shrink[q] = SoftmaxStep(visible[q], p[q], state.maximum[first + q], state.total + (first + q) * kSlice);
  }
  // What no query of these sees is not read: it may never have been written. What only some see has p = 0 for
  // the others.
  EntryList list;
  List(seen, list);
  float* sum = state.sum + first * state.dim;
  const hn::ScalableTag<float> d;
  const hn::CappedTag<float, 8> d8;
  const hn::CappedTag<float, 1> d1;
  const int lanes = static_cast<int>(hn::Lanes(d)), lanes8 = static_cast<int>(hn::Lanes(d8));
  int i = 0;
  for (; i + kAtOnce * lanes <= tile.head_dim; i += kAtOnce * lanes)
    AddValues<M, kAtOnce>(d, tile, list, i, p, shrink, sum, state.dim);
  for (; i + lanes <= tile.head_dim; i += lanes) AddValues<M, 1>(d, tile, list, i, p, shrink, sum, state.dim);
  for (; i + lanes8 <= tile.head_dim; i += lanes8)
    AddValues<M, 1>(d8, tile, list, i, p, shrink, sum, state.dim);
  for (; i < tile.head_dim; ++i) AddValues<M, 1>(d1, tile, list, i, p, shrink, sum, state.dim);
}

// All queries of a part, in groups as large as there are registers for.
template <typename T>
HWY_INLINE void UpdateAll(const Tile<T>& tile, const AttentionState& state, const int* limit, int queries) {
  int first = 0;
#if HWY_TARGET == HWY_AVX3
  for (; first + 8 <= queries; first += 8) UpdateQueries<8>(tile, state, limit, first);
#endif
#if HWY_TARGET != HWY_SCALAR && HWY_TARGET != HWY_EMU128
  for (; first + 4 <= queries; first += 4) UpdateQueries<4>(tile, state, limit, first);
  for (; first + 2 <= queries; first += 2) UpdateQueries<2>(tile, state, limit, first);
#endif
  for (; first < queries; ++first) UpdateQueries<1>(tile, state, limit, first);
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace atp::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
