// Attention in one pass over the cache with an online softmax (Milakov & Gimelshein 2018; FlashAttention, Dao
// et al. 2022): per query a running maximum m, a running sum l and a running weighted sum of values; no score
// matrix.
//
// Cache entries are taken in slices of 16: principal blocks first, then exact ones. Several queries (rows x
// the query heads of one kv head) share each load of a slice. A query meets exactly the slices it can see, in
// order, with the same arithmetic alone or among others, so its result does not depend on the rest of the
// batch.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "kernels/cpu/ops.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention.cc"
// foreach_target.h must come first.
// clang-format off
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "hwy/cache_control.h"
#include "hwy/contrib/math/math-inl.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/load-inl.h"
// clang-format on

#ifndef ATP_KERNELS_CPU_ATTENTION_SHARED
#define ATP_KERNELS_CPU_ATTENTION_SHARED
namespace atp::cpu {

inline constexpr int kSlice = 16;           // entries; divides every page's
inline constexpr int kQueriesPerPart = 32;  // aimed at: enough to reuse a slice from the first-level cache
inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// A part's scratch. dim is head_dim rounded up to 16, so that every query's rows are aligned.
struct AttentionState {
  float* query;    // [queries, dim], scaled
  float* sum;      // [queries, dim], Σ p·v
  float* maximum;  // [queries]
  float* total;    // [queries], Σ p
  float* keys;     // [dim, 16] and
  float* values;   // [16, head_dim]: a slice of integers, as fp32
  size_t dim;
};

inline size_t AlignedDim(int head_dim) { return (static_cast<size_t>(head_dim) + 15) / 16 * 16; }

}  // namespace atp::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace atp::cpu {
namespace HWY_NAMESPACE {

template <typename T>
struct Slice {
  const T* keys;  // [head_dim, key_stride], this slice's first entry
  size_t key_stride;
  const T* values;        // [16, head_dim]
  const float* log_mass;  // [16], or null: all zero
  int head_dim;
  int entries[kSlice];  // those that are there and visible, ascending
  int count;
};

using SliceTag = hn::CappedTag<float, kSlice>;
constexpr int kSliceLanes = static_cast<int>(hn::MaxLanes(SliceTag()));
constexpr int kSliceVectors = kSlice / kSliceLanes;

// scores[q][e] = query[q]·key[e] + log_mass[e], for M queries and all 16 entries of the slice.
template <int M, typename T>
HWY_INLINE void Scores(const Slice<T>& slice, const float* query, size_t query_stride,
                       float (&scores)[M][kSlice]) {
  const SliceTag d;
  using V = hn::Vec<SliceTag>;
  V acc[M][kSliceVectors];
  ATP_UNROLL for (int q = 0; q < M; ++q) {
    ATP_UNROLL for (int v = 0; v < kSliceVectors; ++v) acc[q][v] = hn::Zero(d);
  }
  for (int i = 0; i < slice.head_dim; ++i) {
    V key[kSliceVectors];
    ATP_UNROLL for (int v = 0; v < kSliceVectors; ++v) {
      key[v] = LoadFloats(d, slice.keys + i * slice.key_stride + v * kSliceLanes);
    }
    ATP_UNROLL for (int q = 0; q < M; ++q) {
      const V value = hn::Set(d, query[q * query_stride + i]);
      ATP_UNROLL for (int v = 0; v < kSliceVectors; ++v) acc[q][v] = hn::MulAdd(value, key[v], acc[q][v]);
    }
  }
  ATP_UNROLL for (int q = 0; q < M; ++q) {
    ATP_UNROLL for (int v = 0; v < kSliceVectors; ++v) {
      if (slice.log_mass != nullptr)
        acc[q][v] = hn::Add(acc[q][v], hn::LoadU(d, slice.log_mass + v * kSliceLanes));
      hn::Store(acc[q][v], d, scores[q] + v * kSliceLanes);
    }
  }
}

// Turns one query's scores into weights p (0 for entries that are not visible), moves its maximum and total,
// and returns the factor that its sum so far shrinks by.
template <typename T>
HWY_INLINE float SoftmaxStep(const Slice<T>& slice, float (&scores)[kSlice], float& maximum, float& total) {
  const SliceTag d;
  using V = hn::Vec<SliceTag>;
  if (slice.count < kSlice) {
    alignas(64) float visible[kSlice];
    std::fill(visible, visible + kSlice, kMinusInfinity);
    for (int i = 0; i < slice.count; ++i) visible[slice.entries[i]] = scores[slice.entries[i]];
    std::copy(visible, visible + kSlice, scores);
  }
  V largest = hn::Load(d, scores);
  ATP_UNROLL for (int v = 1; v < kSliceVectors; ++v) {
    largest = hn::Max(largest, hn::Load(d, scores + v * kSliceLanes));
  }
  const float new_maximum = std::max(maximum, hn::GetLane(hn::MaxOfLanes(d, largest)));
  const V shift = hn::Set(d, new_maximum);
  V sum = hn::Zero(d);
  ATP_UNROLL for (int v = 0; v < kSliceVectors; ++v) {
    // Below -104 e^x is 0 in fp32; the bound also keeps -inf away from Exp's conversion to an integer.
    const V exponent = hn::Max(hn::Sub(hn::Load(d, scores + v * kSliceLanes), shift), hn::Set(d, -200.0f));
    const V p = hn::Exp(d, exponent);
    hn::Store(p, d, scores + v * kSliceLanes);
    sum = hn::Add(sum, p);
  }
  const float shrink = maximum == new_maximum ? 1.0f : std::exp(maximum - new_maximum);
  total = total * shrink + hn::GetLane(hn::SumOfLanes(d, sum));
  maximum = new_maximum;
  return shrink;
}

// sum[q][i] = sum[q][i]·shrink[q] + Σ_e p[q][e]·value[e][i] for dimensions [i, i + Lanes(d)).
template <int M, class D, typename T>
HWY_INLINE void AddValues(D d, const Slice<T>& slice, int i, const float (&p)[M][kSlice],
                          const float (&shrink)[M], float* sum, size_t sum_stride) {
  using V = hn::Vec<D>;
  V acc[M];
  ATP_UNROLL for (int q = 0; q < M; ++q) {
    acc[q] = hn::Mul(hn::LoadU(d, sum + q * sum_stride + i), hn::Set(d, shrink[q]));
  }
  for (int n = 0; n < slice.count; ++n) {
    const int entry = slice.entries[n];
    const V value = LoadFloats(d, slice.values + static_cast<size_t>(entry) * slice.head_dim + i);
    ATP_UNROLL for (int q = 0; q < M; ++q) acc[q] = hn::MulAdd(hn::Set(d, p[q][entry]), value, acc[q]);
  }
  ATP_UNROLL for (int q = 0; q < M; ++q) hn::StoreU(acc[q], d, sum + q * sum_stride + i);
}

template <int M, typename T>
HWY_NOINLINE void UpdateQueries(const Slice<T>& slice, const AttentionState& state, int first) {
  alignas(64) float p[M][kSlice];
  float shrink[M];
  Scores<M>(slice, state.query + first * state.dim, state.dim, p);
  for (int q = 0; q < M; ++q) {
    shrink[q] = SoftmaxStep(slice, p[q], state.maximum[first + q], state.total[first + q]);
  }
  float* sum = state.sum + first * state.dim;
  const hn::ScalableTag<float> d;
  const hn::CappedTag<float, 8> d8;
  const hn::CappedTag<float, 1> d1;
  const int lanes = static_cast<int>(hn::Lanes(d));
  const int lanes8 = static_cast<int>(hn::Lanes(d8));
  int i = 0;
  for (; i + lanes <= slice.head_dim; i += lanes) AddValues<M>(d, slice, i, p, shrink, sum, state.dim);
  for (; i + lanes8 <= slice.head_dim; i += lanes8) AddValues<M>(d8, slice, i, p, shrink, sum, state.dim);
  for (; i < slice.head_dim; ++i) AddValues<M>(d1, slice, i, p, shrink, sum, state.dim);
}

// Queries [first, last), in groups as large as there are registers for.
template <typename T>
HWY_INLINE void UpdateRange(const Slice<T>& slice, const AttentionState& state, int first, int last) {
  if (slice.count == 0) return;
#if HWY_TARGET == HWY_AVX3
  for (; first + 8 <= last; first += 8) UpdateQueries<8>(slice, state, first);
#endif
#if HWY_TARGET != HWY_SCALAR && HWY_TARGET != HWY_EMU128
  for (; first + 4 <= last; first += 4) UpdateQueries<4>(slice, state, first);
  for (; first + 2 <= last; first += 2) UpdateQueries<2>(slice, state, first);
#endif
  for (; first < last; ++first) UpdateQueries<1>(slice, state, first);
}

// Entries [entry, entry + 16) of a head whose blocks are `blocks`.
template <typename T>
HWY_INLINE Slice<T> SliceAt(const KvPool& pool, const KvPage& page, const BlockId* blocks, int entry) {
  const std::byte* block = pool.data + static_cast<size_t>(blocks[entry / page.entries()]) * pool.block_bytes;
  const int offset = entry % page.entries();
  Slice<T> slice;
  slice.keys = reinterpret_cast<const T*>(block + page.key_offset()) + offset;
  slice.key_stride = static_cast<size_t>(page.entries());
  slice.values =
      reinterpret_cast<const T*>(block + page.value_offset()) + static_cast<size_t>(offset) * page.head_dim();
  slice.log_mass = page.with_log_mass()
                       ? reinterpret_cast<const float*>(block + page.log_mass_offset()) + offset
                       : nullptr;
  slice.head_dim = page.head_dim();
  slice.count = 0;
  return slice;
}

template <typename T>
HWY_INLINE void ShowFirst(Slice<T>& slice, int count) {
  slice.count = 0;
  for (int e = 0; e < count; ++e) {
    // Padding of a principal block: its key and value are whatever was there before.
    if (slice.log_mass != nullptr && slice.log_mass[e] == kMinusInfinity) continue;
    slice.entries[slice.count++] = e;
  }
}

template <typename T>
HWY_INLINE void AttendPrincipal(const KvPool& pool, const KvPage& page, const KvHeadBlocks& head,
                                const AttentionState& state, int queries) {
  for (int entry = 0; entry < head.principal_entries; entry += kSlice) {
    Slice<T> slice = SliceAt<T>(pool, page, head.principal, entry);
    ShowFirst(slice, std::min(kSlice, head.principal_entries - entry));
    UpdateRange(slice, state, 0, queries);
  }
}

template <typename T>
HWY_INLINE void AttendExact(const AttentionArgs& args, const AttentionPart& part, const KvHeadBlocks& head,
                            const AttentionState& state, int group) {
  const KvSequence& sequence = *part.sequence;
  const int before =
      sequence.exact_entries - sequence.rows;  // row r of the sequence sees entries [0, before + r]
  const int rows = part.row_end - part.row_begin;
  for (int entry = 0; entry <= before + part.row_end - 1; entry += kSlice) {
    Slice<T> slice = SliceAt<T>(args.pool, *args.pool.exact, head.exact, entry);
    // Rows from `dense` on see the whole slice; those before it a part or nothing.
    const int dense = std::clamp(entry + kSlice - 1 - before - part.row_begin, 0, rows);
    for (int row = 0; row < dense; ++row) {
      const int visible = before + part.row_begin + row + 1 - entry;
      if (visible <= 0) continue;
      ShowFirst(slice, visible);
      UpdateRange(slice, state, row * group, (row + 1) * group);
    }
    ShowFirst(slice, kSlice);
    UpdateRange(slice, state, dense * group, rows * group);
  }
}

// Lanes(d) int8, or the low or high halves of as many bytes, as fp32.
template <class D>
HWY_INLINE hn::Vec<D> LoadInt8(D d, const int8_t* HWY_RESTRICT p) {
  return hn::ConvertTo(d, hn::PromoteTo(hn::RebindToSigned<D>(), hn::LoadU(hn::Rebind<int8_t, D>(), p)));
}
template <class D>
HWY_INLINE void LoadInt4(D d, const uint8_t* HWY_RESTRICT p, hn::Vec<D>& low, hn::Vec<D>& high) {
  const auto bytes = hn::PromoteTo(hn::RebindToSigned<D>(), hn::LoadU(hn::Rebind<uint8_t, D>(), p));
  low = hn::ConvertTo(d, hn::ShiftRight<28>(hn::ShiftLeft<28>(bytes)));
  high = hn::ConvertTo(d, hn::ShiftRight<28>(hn::ShiftLeft<24>(bytes)));
}

// One dimension of the 16 keys of a slice, times each entry's scale.
HWY_INLINE void UnpackKeys(const int8_t* HWY_RESTRICT row, const float* HWY_RESTRICT scale,
                           float* HWY_RESTRICT out) {
  const SliceTag d;
  ATP_UNROLL for (int v = 0; v < kSlice; v += kSliceLanes) {
    hn::Store(hn::Mul(LoadInt8(d, row + v), hn::Load(d, scale + v)), d, out + v);
  }
}
HWY_INLINE void UnpackKeys(const uint8_t* HWY_RESTRICT row, const float* HWY_RESTRICT scale,
                           float* HWY_RESTRICT out) {
  const hn::CappedTag<float, kSlice / 2> d;
  constexpr int kLanes = static_cast<int>(hn::MaxLanes(hn::CappedTag<float, kSlice / 2>()));
  ATP_UNROLL for (int v = 0; v < kSlice / 2; v += kLanes) {
    hn::Vec<decltype(d)> low, high;
    LoadInt4(d, row + v, low, high);
    hn::Store(hn::Mul(low, hn::Load(d, scale + v)), d, out + v);
    hn::Store(hn::Mul(high, hn::Load(d, scale + v + kSlice / 2)), d, out + v + kSlice / 2);
  }
}

// One entry's value, times its scale.
HWY_INLINE void UnpackValues(const int8_t* HWY_RESTRICT row, float scale, int head_dim,
                             float* HWY_RESTRICT out) {
  const hn::ScalableTag<float> d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  int i = 0;
  for (; i + lanes <= head_dim; i += lanes)
    hn::StoreU(hn::Mul(LoadInt8(d, row + i), hn::Set(d, scale)), d, out + i);
  for (; i < head_dim; ++i) out[i] = static_cast<float>(row[i]) * scale;
}
HWY_INLINE void UnpackValues(const uint8_t* HWY_RESTRICT row, float scale, int head_dim,
                             float* HWY_RESTRICT out) {
  const hn::ScalableTag<float> d;
  const int lanes = static_cast<int>(hn::Lanes(d)), half = head_dim / 2;
  int i = 0;
  for (; i + lanes <= half; i += lanes) {
    hn::Vec<decltype(d)> low, high;
    LoadInt4(d, row + i, low, high);
    hn::StoreU(hn::Mul(low, hn::Set(d, scale)), d, out + i);
    hn::StoreU(hn::Mul(high, hn::Set(d, scale)), d, out + i + half);
  }
  for (; i < half; ++i) {
    out[i] = static_cast<float>(static_cast<int8_t>(row[i] << 4) >> 4) * scale;
    out[i + half] = static_cast<float>(static_cast<int8_t>(row[i]) >> 4) * scale;
  }
}

// A slice of an integer page becomes one of fp32 in scratch, once for all queries that share it. T: int8_t,
// or uint8_t for pairs of int4. Plain loops, which the compiler vectorises for each target.
template <typename T>
HWY_INLINE Slice<float> UnpackSlice(const KvPool& pool, const KvPage& page, const BlockId* blocks, int entry,
                                    const AttentionState& state) {
  constexpr int kPerByte = std::is_same_v<T, uint8_t> ? 2 : 1;
  const std::byte* block = pool.data + static_cast<size_t>(blocks[entry / page.entries()]) * pool.block_bytes;
  const int offset = entry % page.entries(), head_dim = page.head_dim();
  alignas(64) float key_scale[kSlice];
  float value_scale[kSlice];
  for (int e = 0; e < kSlice; ++e) {
    key_scale[e] =
        BF16ToFloat(reinterpret_cast<const uint16_t*>(block + page.key_scale_offset())[offset + e]);
    value_scale[e] =
        BF16ToFloat(reinterpret_cast<const uint16_t*>(block + page.value_scale_offset())[offset + e]);
  }
  const T* keys = reinterpret_cast<const T*>(block + page.key_offset()) + offset / kPerByte;
  for (int i = 0; i < head_dim; ++i) {
    UnpackKeys(keys + static_cast<size_t>(i) * (page.entries() / kPerByte), key_scale,
               state.keys + i * kSlice);
  }
  const T* values = reinterpret_cast<const T*>(block + page.value_offset()) +
                    static_cast<size_t>(offset) * head_dim / kPerByte;
  for (int e = 0; e < kSlice; ++e) {
    UnpackValues(values + static_cast<size_t>(e) * head_dim / kPerByte, value_scale[e], head_dim,
                 state.values + e * head_dim);
  }
  Slice<float> slice;
  slice.keys = state.keys;
  slice.key_stride = kSlice;
  slice.values = state.values;
  slice.log_mass = reinterpret_cast<const float*>(block + page.log_mass_offset()) + offset;
  slice.head_dim = head_dim;
  slice.count = 0;
  return slice;
}

template <typename T>
HWY_INLINE void AttendUnpacked(const KvPool& pool, const KvPage& page, const KvHeadBlocks& head,
                               const AttentionState& state, int queries) {
  for (int entry = 0; entry < head.principal_entries; entry += kSlice) {
    // Unpacking waits for every byte it reads, so the next block is asked for while this one is worked on.
    if (entry % page.entries() == 0 && entry + page.entries() < head.principal_entries) {
      const std::byte* next =
          pool.data + static_cast<size_t>(head.principal[entry / page.entries() + 1]) * pool.block_bytes;
      for (size_t at = 0; at < page.bytes(); at += 64) hwy::Prefetch(next + at);
    }
    Slice<float> slice = UnpackSlice<T>(pool, page, head.principal, entry, state);
    ShowFirst(slice, std::min(kSlice, head.principal_entries - entry));
    UpdateRange(slice, state, 0, queries);
  }
}

void AttendPrincipalOf(const AttentionArgs& args, const KvHeadBlocks& head, const AttentionState& state,
                       int queries) {
  if (head.principal_entries == 0) return;
  const KvPage& page = *head.principal_page;
  switch (page.format()) {
    case KvFormat::kF32:
      return AttendPrincipal<float>(args.pool, page, head, state, queries);
    case KvFormat::kBF16:
      return AttendPrincipal<hwy::bfloat16_t>(args.pool, page, head, state, queries);
    case KvFormat::kInt8:
      return AttendUnpacked<int8_t>(args.pool, page, head, state, queries);
    case KvFormat::kInt4:
      return AttendUnpacked<uint8_t>(args.pool, page, head, state, queries);
  }
}

void AttendExactOf(const AttentionArgs& args, const AttentionPart& part, const KvHeadBlocks& head,
                   const AttentionState& state, int group) {
  switch (args.pool.exact->format()) {
    case KvFormat::kF32:
      return AttendExact<float>(args, part, head, state, group);
    case KvFormat::kBF16:
      return AttendExact<hwy::bfloat16_t>(args, part, head, state, group);
    case KvFormat::kInt8:
    case KvFormat::kInt4:
      break;  // Supports() refuses exact pages of integers
  }
}

void Attention(const AttentionArgs& args, const AttentionPart& part, float* scratch) {
  const int head_dim = args.pool.exact->head_dim();
  const int group = args.heads / args.kv_heads;
  const int rows = part.row_end - part.row_begin;
  const int queries = rows * group;
  AttentionState state;
  state.dim = AlignedDim(head_dim);
  state.keys = scratch;
  state.values = state.keys + state.dim * kSlice;
  state.query = state.values + state.dim * kSlice;
  state.sum = state.query + queries * state.dim;
  state.maximum = state.sum + queries * state.dim;
  state.total = state.maximum + queries;
  const size_t row_floats = static_cast<size_t>(args.heads) * head_dim;
  const size_t offset = (static_cast<size_t>(part.sequence->first_row) + part.row_begin) * row_floats +
                        static_cast<size_t>(part.kv_head) * group * head_dim;
  for (int q = 0; q < queries; ++q) {
    const float* query =
        args.query + offset + (q / group) * row_floats + static_cast<size_t>(q % group) * head_dim;
    for (int i = 0; i < head_dim; ++i) state.query[q * state.dim + i] = query[i] * args.scale;
    std::fill_n(state.sum + q * state.dim, state.dim, 0.0f);
    state.maximum[q] = kMinusInfinity;
    state.total[q] = 0.0f;
  }
  const KvHeadBlocks& head = part.sequence->heads[part.kv_head];
  AttendPrincipalOf(args, head, state, queries);
  AttendExactOf(args, part, head, state, group);
  for (int q = 0; q < queries; ++q) {
    float* out = args.out + offset + (q / group) * row_floats + static_cast<size_t>(q % group) * head_dim;
    for (int i = 0; i < head_dim; ++i) out[i] = state.sum[q * state.dim + i] / state.total[q];
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace atp::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace atp::cpu {

int AttentionRowsPerPart(int group) { return std::max(1, kQueriesPerPart / group); }

size_t AttentionScratchFloats(int group, int head_dim) {
  return static_cast<size_t>(AttentionRowsPerPart(group)) * group * (2 * AlignedDim(head_dim) + 2) +
         2 * kSlice * AlignedDim(head_dim);
}

HWY_EXPORT(Attention);
AttentionFn AttentionFor(int64_t target) { return ATP_FUNCTION_FOR(target, Attention); }
}  // namespace atp::cpu
#endif
