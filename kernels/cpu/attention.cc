// Attention in one pass over the cache with an online softmax (Milakov & Gimelshein 2018; FlashAttention, Dao
// et al. 2022): per query a running maximum m, a running sum l and a running weighted sum of values; no score
// matrix.
//
// A head's entries, principal ones first, then exact ones, are taken in tiles of 64 (neither kind shares a
// tile with the other) and chunks of 8 tiles. Each chunk begins with an empty state, which is then merged
// into the total, in order. So chunks of a long sequence may go to different threads, and the result is the
// same to the last bit however the work is cut, and whoever else is in the batch.
#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>

#include "kernels/cpu/attention_state.h"
#include "kernels/cpu/attention_vnni.h"
#include "kernels/cpu/ops.h"
#include "kernels/dtype.h"
#include "kernels/walsh_hadamard.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention.cc"
// foreach_target.h must come first.
// clang-format off
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "hwy/cache_control.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/attention-inl.h"
#include "kernels/cpu/attention_unpack-inl.h"
// clang-format on

#ifndef ATP_KERNELS_CPU_ATTENTION_SHARED
#define ATP_KERNELS_CPU_ATTENTION_SHARED
namespace atp::cpu {

constexpr int CeilDiv(int a, int b) { return (a + b - 1) / b; }

// How many exact entries the part's last row sees.
inline int ExactSeen(const AttentionPart& part) {
  return part.sequence->exact_entries - part.sequence->rows + part.row_end;
}

// Whole cache lines, so that the next state is aligned, too.
inline size_t StateFloats(size_t queries, size_t dim) {
  return queries * (dim + kSlice) + (queries + kSlice - 1) / kSlice * kSlice;
}

// Lays a state's running values out in memory and returns what follows them.
inline float* PlaceState(float* memory, int queries, AttentionState& state) {
  state.sum = memory;
  state.total = state.sum + queries * state.dim;
  state.maximum = state.total + queries * kSlice;
  return memory + StateFloats(queries, state.dim);
}

inline void ClearState(const AttentionState& state, int queries) {
  std::fill_n(state.sum, queries * (state.dim + kSlice), 0.0f);
  std::fill_n(state.maximum, queries, kMinusInfinity);
}

// What a part works with, besides its state.
struct PartScratch {
  AttentionState state;  // of the chunk
  AttentionState merged;
  float* query[2];  // [queries, dim], scaled; [1] in the basis of pages that rotate keys
  float* keys;      // [head_dim, 64] and
  float* values;    // [64, head_dim]: a tile of integers, as fp32
  int* limit;       // [queries]
  IntegerOperands integers;
};

}  // namespace atp::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace atp::cpu {
namespace HWY_NAMESPACE {

// One kind of a head's entries.
struct EntryRun {
  const KvPool* pool;
  const KvPage* page;
  const BlockId* blocks;
  int count;
  TilePlace behind;  // what is worked on next

  // The tile from `entry` on, or what is behind the last one.
  TilePlace Place(int entry) const {
    if (entry >= count) return behind;
    TilePlace tile;
    tile.page = page;
    tile.slices = CeilDiv(std::min(kTile, count - entry), kSlice);
    int block = entry / page->entries(), offset = entry % page->entries();
    for (int s = 0; s < tile.slices; ++s, offset += kSlice) {
      if (offset == page->entries()) offset = 0, ++block;
      tile.block[s] = pool->data + static_cast<size_t>(blocks[block]) * pool->block_bytes;
      tile.offset[s] = offset;
    }
    return tile;
  }
};

// Which of a tile's first `count` entries are there. Padding of a principal block has log mass -inf; its key
// and value are whatever was there before.
HWY_INLINE uint64_t Present(const TilePlace& tile, int count) {
  uint64_t present = Visible(~uint64_t{0}, count);
  if (!tile.page->with_log_mass()) return present;
  const SliceTag d;
  for (int s = 0; s < tile.slices; ++s) {
    const float* log_mass = tile.LogMass(s);
    for (int i = 0; i < kSlice; i += kSliceLanes) {
      uint8_t bits[8] = {};
      hn::StoreMaskBits(d, hn::Eq(hn::LoadU(d, log_mass + i), hn::Set(d, kMinusInfinity)), bits);
      present &= ~((bits[0] | uint64_t{bits[1]} << 8) << (s * kSlice + i));
    }
  }
  return present;
}

template <typename T>
HWY_INLINE void Locate(const TilePlace& place, const T* (&keys)[kTileSlices],
                       const T* (&values)[kTileSlices]) {
  for (int s = 0; s < place.slices; ++s) {
    keys[s] = reinterpret_cast<const T*>(place.block[s] + place.page->key_offset()) + place.offset[s];
    values[s] = reinterpret_cast<const T*>(place.block[s] + place.page->value_offset()) +
                static_cast<size_t>(place.offset[s]) * place.page->head_dim();
  }
}

// The cache lines of a slice, all at once.
template <typename T>
HWY_INLINE void PrefetchSlice(const T* keys, const T* values, const KvPage& page) {
  constexpr int kLine = 64 / sizeof(T);
  const int rows = std::max(1, kLine / page.entries());
  for (int i = 0; i < page.head_dim(); i += rows)
    hwy::Prefetch(keys + static_cast<size_t>(i) * static_cast<size_t>(page.entries()));
  for (int i = 0; i < kSlice * page.head_dim(); i += kLine) hwy::Prefetch(values + i);
}

// Stored: what lies in the blocks; T: what the arithmetic reads, float where integers are unpacked first.
template <typename T, typename Stored>
HWY_INLINE Tile<T> TileAt(const TilePlace& place, const TilePlace& next, const PartScratch& scratch) {
  const KvPage& page = *place.page;
  Tile<T> tile;
  tile.head_dim = page.head_dim();
  tile.present = place.present;
  if constexpr (std::is_same_v<T, Stored>) {
    tile.key_stride = static_cast<size_t>(page.entries());
    Locate(place, tile.keys, tile.values);
  } else {
    tile.key_stride = kTile;
  }
  for (int s = 0; s < place.slices; ++s) {
    tile.log_mass[s] = place.LogMass(s);
    if constexpr (!std::is_same_v<T, Stored>) {
      float* keys = scratch.keys + s * kSlice;
      float* values = scratch.values + s * kSlice * tile.head_dim;
      UnpackSlice<Stored>(page, place.block[s], place.offset[s], keys, values);
      tile.keys[s] = keys;
      tile.values[s] = values;
    }
    tile.next_keys[s] = tile.keys[s];
    tile.next_values[s] = tile.values[s];
  }
  if (std::is_same_v<T, Stored> && next.slices > 0 && next.page->format() == page.format() &&
      next.page->entries() == page.entries()) {
    Locate(next, tile.next_keys, tile.next_values);
    for (int s = 0; s < next.slices && next.page->with_log_mass(); ++s) hwy::Prefetch(next.LogMass(s));
    // What there is no work on a slice of this tile beside which to ask for.
    if constexpr (std::is_same_v<T, Stored>) {
      for (int s = place.slices; s < next.slices; ++s)
        PrefetchSlice(tile.next_keys[s], tile.next_values[s], page);
    }
  } else {
    NextLines(next).PrefetchAll();
  }
  return tile;
}

// The queries of a part, and how many exact entries its first row sees besides its own; rows of principal
// entries see all, before < 0.
struct Rows {
  int queries;
  int group;
  int before;
};

// How many entries of a tile each query may see, or null: all.
HWY_INLINE const int* Limits(const Rows& rows, int entry, int* limit) {
  if (rows.before < 0 || rows.before + 1 >= entry + kTile) return nullptr;
  for (int q = 0; q < rows.queries; ++q) limit[q] = rows.before + q / rows.group + 1 - entry;
  return limit;
}

// Tiles [begin, end) of a run.
template <typename T, typename Stored>
HWY_NOINLINE void AttendTiles(const EntryRun& run, int begin, int end, const Rows& rows,
                              const PartScratch& scratch) {
  TilePlace next = run.Place(begin * kTile);
  for (int entry = begin * kTile; entry < end * kTile; entry += kTile) {
    TilePlace place = next;
    place.present = Present(place, run.count - entry);
    next = run.Place(entry + kTile);
    const Tile<T> tile = TileAt<T, Stored>(place, next, scratch);
    UpdateAll(tile, scratch.state, Limits(rows, entry, scratch.limit), rows.queries);
  }
}

#if HWY_TARGET == HWY_AVX3
// Up to 8 queries of a tile that is unpacked in `operands`.
HWY_INLINE void UpdateIntegers(const TilePlace& tile, const AttentionState& state, const int* limit,
                               int first, int count, IntegerOperands& operands) {
  alignas(64) float p[8][kTile];
  float shrink[8];
  IntegerScores(operands, tile.slices, first, count, p);
  for (int q = 0; q < count; ++q) {
    const uint64_t visible = limit == nullptr ? tile.present : Visible(tile.present, limit[first + q]);
    shrink[q] = SoftmaxStep(visible, p[q], state.maximum[first + q], state.total + (first + q) * kSlice);
  }
  IntegerValues(operands, tile.slices, count, p, shrink, state.sum + first * state.dim);
}

HWY_NOINLINE void AttendIntegers(const EntryRun& run, int begin, int end, const Rows& rows,
                                 PartScratch& scratch) {
  TilePlace next = run.Place(begin * kTile);
  for (int entry = begin * kTile; entry < end * kTile; entry += kTile) {
    TilePlace tile = next;
    tile.present = Present(tile, run.count - entry);
    next = run.Place(entry + kTile);
    UnpackIntegerTile(tile, scratch.integers);
    scratch.integers.next = NextLines(next);
    const int* limit = Limits(rows, entry, scratch.limit);
    for (int first = 0; first < rows.queries; first += 8) {
      UpdateIntegers(tile, scratch.state, limit, first, std::min(8, rows.queries - first), scratch.integers);
    }
    scratch.integers.next.PrefetchAll();
  }
}
#endif

void AttendRun(const EntryRun& run, int begin, int end, const Rows& rows, PartScratch& scratch) {
  scratch.state.query = scratch.query[RotatesKeys(run.page->format())];
#if HWY_TARGET == HWY_AVX3
  if (VnniSupports(*run.page)) return AttendIntegers(run, begin, end, rows, scratch);
#endif
  switch (run.page->format()) {
    case KvFormat::kF32:
      return AttendTiles<float, float>(run, begin, end, rows, scratch);
    case KvFormat::kBF16:
      return AttendTiles<hwy::bfloat16_t, hwy::bfloat16_t>(run, begin, end, rows, scratch);
    case KvFormat::kFp8:
      return AttendTiles<float, E4M3>(run, begin, end, rows, scratch);
    case KvFormat::kInt8:
      return AttendTiles<float, int8_t>(run, begin, end, rows, scratch);
    case KvFormat::kInt4:
      return AttendTiles<float, uint8_t>(run, begin, end, rows, scratch);
  }
}

// merged += state, query by query.
void MergeState(const AttentionState& state, const AttentionState& merged, int queries) {
  const SliceTag d;
  for (int first = 0; first < queries; first += kSlice) {
    // Of 16 queries at once; maxima have room for whole slices.
    alignas(64) float keep[kSlice], take[kSlice];
    for (int v = 0; v < kSlice; v += kSliceLanes) {
      float* const at = merged.maximum + first + v;
      const auto floor = hn::Set(d, -200.0f);
      const auto mine = hn::Load(d, state.maximum + first + v), before = hn::Load(d, at);
      const auto maximum = hn::Max(mine, before);
      hn::Store(ExpOfScore(d, hn::Max(hn::Sub(before, maximum), floor)), d, keep + v);
      hn::Store(ExpOfScore(d, hn::Max(hn::Sub(mine, maximum), floor)), d, take + v);
      hn::Store(maximum, d, at);
    }
    const auto add = [&](float* to, const float* from, size_t size, int q) HWY_ATTR {
      const auto kept = hn::Set(d, keep[q]), taken = hn::Set(d, take[q]);
      for (size_t i = 0; i < size; i += kSliceLanes)
        hn::Store(hn::MulAdd(hn::Load(d, from + i), taken, hn::Mul(hn::Load(d, to + i), kept)), d, to + i);
    };
    for (int q = 0; q < std::min(kSlice, queries - first); ++q) {
      const size_t at = static_cast<size_t>(first + q);
      if (state.maximum[at] == kMinusInfinity) continue;
      add(merged.sum + at * state.dim, state.sum + at * state.dim, state.dim, q);
      add(merged.total + at * kSlice, state.total + at * kSlice, kSlice, q);
    }
  }
}

// Where the part's first query lies in query and out; query q is q / group rows and q % group heads further.
HWY_INLINE size_t QueryOffset(const AttentionArgs& args, const AttentionPart& part, int q) {
  const int group = args.heads / args.kv_heads, head_dim = args.pool.exact->head_dim();
  const size_t row = static_cast<size_t>(part.sequence->first_row) + part.row_begin + q / group;
  return (row * args.heads + static_cast<size_t>(part.kv_head) * group + q % group) * head_dim;
}

void WriteOut(const AttentionArgs& args, const AttentionPart& part, const AttentionState& merged,
              int queries) {
  const int head_dim = args.pool.exact->head_dim();
  const SliceTag d;
  for (int q = 0; q < queries; ++q) {
    auto totals = hn::Load(d, merged.total + q * kSlice);
    for (int v = kSliceLanes; v < kSlice; v += kSliceLanes)
      totals = hn::Add(totals, hn::Load(d, merged.total + q * kSlice + v));
    const float share = 1 / hn::GetLane(hn::SumOfLanes(d, totals));
    const float* HWY_RESTRICT sum = merged.sum + q * merged.dim;
    float* HWY_RESTRICT out = args.out + QueryOffset(args, part, q);
    for (int i = 0; i < head_dim; ++i) out[i] = sum[i] * share;
  }
}

// The runs of a part. Behind the exact entries comes, perhaps, the next part.
EntryRun ExactRun(const AttentionArgs& args, const AttentionPart& part) {
  return {&args.pool, args.pool.exact, part.sequence->heads[part.kv_head].exact, ExactSeen(part), {}};
}
EntryRun PrincipalRun(const AttentionArgs& args, const AttentionPart& part, const EntryRun& exact) {
  const KvHeadBlocks& head = part.sequence->heads[part.kv_head];
  const int first_exact = part.chunk_begin * kTilesPerChunk - CeilDiv(head.principal_entries, kTile);
  return {&args.pool, head.principal_page, head.principal, head.principal_entries,
          exact.Place(std::max(0, first_exact) * kTile)};
}
TilePlace FirstTile(const AttentionArgs& args, const AttentionPart& part) {
  return PrincipalRun(args, part, ExactRun(args, part)).Place(part.chunk_begin * kTilesPerChunk * kTile);
}

void Attention(const AttentionArgs& args, const AttentionPart& part, const AttentionPart* next,
               float* memory) {
  const int head_dim = args.pool.exact->head_dim();
  const int group = args.heads / args.kv_heads;
  const int queries = (part.row_end - part.row_begin) * group;
  PartScratch scratch;
  scratch.state.dim = scratch.merged.dim = AlignedDim(head_dim);
  const size_t dim = scratch.state.dim;
  scratch.keys = memory;
  scratch.values = scratch.keys + dim * kTile;
  scratch.query[0] = scratch.values + dim * kTile;
  scratch.query[1] = scratch.query[0] + queries * dim;
  memory = PlaceState(scratch.query[1] + queries * dim, queries, scratch.state);
  memory = PlaceState(memory, queries, scratch.merged);
  PlaceIntegerOperands(memory, queries, head_dim, scratch.integers);
  scratch.limit = reinterpret_cast<int*>(memory + IntegerOperandFloats(queries, head_dim));
  if (part.partial != nullptr) PlaceState(part.partial, queries, scratch.state);
  for (int q = 0; q < queries; ++q) {
    const float* query = args.query + QueryOffset(args, part, q);
    for (int i = 0; i < head_dim; ++i) scratch.query[0][q * dim + i] = query[i] * args.scale;
  }
  const int seen = ExactSeen(part), before = seen - (part.row_end - part.row_begin);
  EntryRun exact = ExactRun(args, part);
  const EntryRun principal = PrincipalRun(args, part, exact);
  if (next != nullptr) exact.behind = FirstTile(args, *next);
  const KvPage* rotated = RotatesKeys(exact.page->format()) ? exact.page : nullptr;
  if (principal.count > 0 && RotatesKeys(principal.page->format())) rotated = principal.page;
  if (rotated != nullptr) {
    std::copy_n(scratch.query[0], queries * dim, scratch.query[1]);
    for (int q = 0; q < queries; ++q) WalshHadamard(scratch.query[1] + q * dim, head_dim);
#if HWY_TARGET == HWY_AVX3
    if (VnniSupports(*rotated)) QuantizeQueries(scratch.query[1], queries, dim, scratch.integers);
#endif
  }
  const int first_exact = CeilDiv(principal.count, kTile);
  NextLines(FirstTile(args, part)).PrefetchAll();
  const int tiles = first_exact + CeilDiv(seen, kTile);
  ClearState(scratch.merged, queries);
  for (int chunk = part.chunk_begin; chunk < part.chunk_end; ++chunk) {
    const int begin = chunk * kTilesPerChunk, end = std::min(tiles, begin + kTilesPerChunk);
    ClearState(scratch.state, queries);
    if (begin < first_exact) {
      AttendRun(principal, begin, std::min(end, first_exact), {queries, group, -1}, scratch);
    }
    if (end > first_exact) {
      AttendRun(exact, std::max(begin, first_exact) - first_exact, end - first_exact,
                {queries, group, before}, scratch);
    }
    if (part.partial == nullptr) MergeState(scratch.state, scratch.merged, queries);
  }
  if (part.partial == nullptr) WriteOut(args, part, scratch.merged, queries);
}

void MergeAttention(const AttentionArgs& args, const AttentionPart& part, float* memory) {
  const int queries = (part.row_end - part.row_begin) * (args.heads / args.kv_heads);
  AttentionState state, merged;
  state.dim = merged.dim = AlignedDim(args.pool.exact->head_dim());
  PlaceState(memory, queries, merged);
  ClearState(merged, queries);
  float* partial = part.partial;
  for (int chunk = part.chunk_begin; chunk < part.chunk_end; ++chunk) {
    partial = PlaceState(partial, queries, state);
    MergeState(state, merged, queries);
  }
  WriteOut(args, part, merged, queries);
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace atp::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace atp::cpu {

int AttentionRowsPerPart(int group) { return std::max(1, kQueriesPerPart / group); }

int AttentionChunks(const AttentionPart& part) {
  const int principal = part.sequence->heads[part.kv_head].principal_entries;
  return CeilDiv(CeilDiv(principal, kTile) + CeilDiv(ExactSeen(part), kTile), kTilesPerChunk);
}

size_t AttentionPartialFloats(int queries, int head_dim) {
  return StateFloats(static_cast<size_t>(queries), AlignedDim(head_dim));
}

size_t AttentionScratchFloats(int group, int head_dim) {
  const size_t queries = static_cast<size_t>(AttentionRowsPerPart(group)) * group;
  const size_t dim = AlignedDim(head_dim);
  return 2 * kTile * dim + queries * (2 * dim + 1) + 2 * StateFloats(queries, dim) +
         IntegerOperandFloats(static_cast<int>(queries), head_dim);
}

HWY_EXPORT(Attention);
AttentionFn AttentionFor(int64_t target) { return ATP_FUNCTION_FOR(target, Attention); }
HWY_EXPORT(MergeAttention);
MergeAttentionFn MergeAttentionFor(int64_t target) { return ATP_FUNCTION_FOR(target, MergeAttention); }
}  // namespace atp::cpu
#endif
