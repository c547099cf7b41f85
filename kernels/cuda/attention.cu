// Attention over the paged cache with log masses, in one pass over keys and values. Two ways through it:
//   few queries   (decode): each block takes one chunk of one part of one head's entries, and a second kernel
//                 folds the chunks. Work is split by entries: long heads have more blocks, whatever sequence
//                 they belong to. All query heads of a kv head, and several rows, share the pass.
//   many queries  (prefill): each warp goes through all chunks of its sixteen queries.
// Both fold the same states in the same order (online_softmax.cuh): a token's output is the same bits
// decoded, in a chunk of a prompt, and beside any others.
#include <algorithm>
#include <vector>

#include "kernels/cuda/attention_state.cuh"
#include "kernels/cuda/attention_unit.cuh"
#include "kernels/cuda/kv_tables.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ops.h"

namespace atp::cuda {
namespace {

constexpr int kQueries = 8;  // of a block of queries: the columns of one product
static_assert(kWidestHead == kMaxHeadDim);
constexpr int kThreads = kAttentionThreads;
// A sequence with at least this many packed queries (rows x group) in a step goes the second way.
constexpr int kManyQueries = 8 * kQueries;

struct Shape {
  const float* query;  // [rows, heads, head_dim]
  float* out;          // [rows, heads, head_dim]
  int heads, group, head_dim;
  float scale;  // of scores, times log2 e
};

// Queries 8 · tile … of one kv head of one sequence. A packed query is row · group + head of the group.
struct Tile {
  int32_t sequence, kv_head, tile;
  int32_t first_chunk, chunks;  // of Partials; few queries only
};

// One block's work where queries are few.
struct Work {
  int32_t tile;   // index in the tiles
  int32_t chunk;  // of its part
  int32_t slot;   // index in Partials
};

// States of chunks: `queries` per slot.
struct Partials {
  float* moments;  // [slots, queries, 2]: maximum, total
  float* sums;     // [slots, queries, head_dim]
  int queries;
};

// What a tile sees of its head, in one part.
__device__ __forceinline__ EntryRange RangeOf(const KvTables& tables, const Shape& shape,
                                              const HeadTable& head, bool principal, int last_visible) {
  EntryRange range;
  range.tables = &tables;
  range.page = principal ? &tables.pages[head.page] : &tables.exact;
  range.blocks = tables.blocks + (principal ? head.principal : head.exact);
  range.end = principal ? head.principal_entries : last_visible;
  range.scale = shape.scale;
  range.all_visible = principal;
  return range;
}

// Exact entries that packed query `query` sees; 0 beyond the step's last row.
__device__ __forceinline__ int VisibleExact(const SequenceTable& sequence, int group, int query) {
  const int row = query / group;
  return row < sequence.rows ? sequence.exact_entries - sequence.rows + row + 1 : 0;
}

// Of the last query that a range of packed queries [.., end) has.
__device__ __forceinline__ int LastVisible(const SequenceTable& sequence, int group, int end) {
  return VisibleExact(sequence, group, min(end, sequence.rows * group) - 1);
}

// Where packed query `query` is in [rows, heads, head_dim].
__device__ __forceinline__ int64_t QueryOffset(const Shape& shape, const SequenceTable& sequence, int kv_head,
                                               int query) {
  const int64_t row = sequence.first_row + query / shape.group;
  return (row * shape.heads + kv_head * shape.group + query % shape.group) * shape.head_dim;
}

// Operand b of the scores: lane 4 g + t holds query g of each block, dimensions 16 s + 4 i + t.
template <int kBlocks, int kTerms>
__device__ __forceinline__ void LoadQueries(const Shape& shape, const SequenceTable& sequence, int kv_head,
                                            int first, int lane,
                                            const QueryFragments<kBlocks, kTerms>& query) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    const int packed = first + b * kQueries + g;
    const bool there = packed < sequence.rows * shape.group;
    const float* from = shape.query + QueryOffset(shape, sequence, kv_head, there ? packed : 0);
#pragma unroll
    for (int step = 0; step < kWidestHead / 16; ++step) {
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int dimension = 16 * step + 4 * i + t;
        x[i] = there && dimension < shape.head_dim ? from[dimension] : 0.0f;
      }
#pragma unroll
      for (int term = 0; term < kTerms; ++term) {
        query.Store(b, term, step, PackBF16(Term<kTerms>(x[0], term), Term<kTerms>(x[1], term)),
                    PackBF16(Term<kTerms>(x[2], term), Term<kTerms>(x[3], term)));
      }
    }
  }
}

// One chunk of one part: each warp takes a unit, the block folds them into `partials`.
template <KvFormat kFormat, int kHeadDim>
__global__ void __launch_bounds__(kThreads, HasScales(kFormat) ? 3 : 2)
    AttendChunks(const KvTables tables, const Shape shape, const Tile* tiles, const Work* work,
                 bool principal, const Partials partials) {
  const Work item = work[blockIdx.x];
  const Tile tile = tiles[item.tile];
  const SequenceTable sequence = tables.sequences[tile.sequence];
  const HeadTable head = tables.heads[tile.sequence * tables.kv_heads + tile.kv_head];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize,
            warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const int head_dim = kHeadDim > 0 ? kHeadDim : shape.head_dim;
  const int first = tile.tile * kQueries;

  SharedArena arena;
  Shared<float> sums = arena.Take<float>(kChunkUnits * kQueries * head_dim);
  Shared<float> moments = arena.Take<float>(kChunkUnits * kQueries * 2);
  {
    const QueryFragments<1, kTermsOf<kFormat>> query(
        arena.Take<uint32_t>(QueryFragments<1, kTermsOf<kFormat>>::kWords));
    LoadQueries(shape, sequence, tile.kv_head, first, lane, query);
    const EntryRange range =
        RangeOf(tables, shape, head, principal, LastVisible(sequence, shape.group, first + kQueries));
    int visible[1][2];
    visible[0][0] = VisibleExact(sequence, shape.group, first + 2 * t);
    visible[0][1] = VisibleExact(sequence, shape.group, first + 2 * t + 1);
    UnitState<1> state;
    AttendUnit<kFormat, 1, kHeadDim>(range, item.chunk * kChunkEntries + warp * kUnitEntries, head_dim, lane,
                                     query, visible, state);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = warp * kQueries + 2 * t + i;
      if (g == 0) {
        moments[2 * at] = state.maximum[0][i];
        moments[2 * at + 1] = state.total[0][i];
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int dimension = 64 * h + 8 * g;
        if (dimension >= head_dim) continue;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const auto& low = state.sum[0][h][2 * j];
          const auto& high = state.sum[0][h][2 * j + 1];
          sums.template StoreAs<float4>(at * head_dim + dimension + 4 * j,
                                        make_float4(low[i], low[2 + i], high[i], high[2 + i]));
        }
      }
    }
  }
  __syncthreads();
  const int queries = min(kQueries, sequence.rows * shape.group - first);
  for (int i = static_cast<int>(threadIdx.x); i < queries * head_dim; i += kThreads) {
    const int query = i / head_dim, dimension = i % head_dim;
    float maximum = moments[2 * query], total = moments[2 * query + 1], sum = sums[i];
    for (int unit = 1; unit < kChunkUnits; ++unit) {
      const int at = unit * kQueries + query;
      const float next = moments[2 * at];
      if (IsEmpty(next)) continue;
      const Merge merge(maximum, next);
      total = merge(total, moments[2 * at + 1]);
      sum = merge(sum, sums[at * head_dim + dimension]);
      maximum = merge.maximum;
    }
    const int64_t out = static_cast<int64_t>(item.slot) * partials.queries + query;
    partials.sums[out * head_dim + dimension] = sum;
    if (dimension == 0) partials.moments[2 * out] = maximum, partials.moments[2 * out + 1] = total;
  }
}

// Folds a tile's chunks: one block per tile and query, one thread per dimension.
__global__ void FoldChunks(const KvTables tables, const Shape shape, const Tile* tiles,
                           const Partials partials) {
  const Tile tile = tiles[blockIdx.x];
  const SequenceTable sequence = tables.sequences[tile.sequence];
  const int query = static_cast<int>(blockIdx.y), packed = tile.tile * kQueries + query;
  const int dimension = static_cast<int>(threadIdx.x);
  if (packed >= sequence.rows * shape.group || dimension >= shape.head_dim) return;
  float maximum = MinusInfinity(), total = 0, sum = 0;
#pragma unroll 8
  for (int chunk = 0; chunk < tile.chunks; ++chunk) {
    const int64_t from = static_cast<int64_t>(tile.first_chunk + chunk) * partials.queries + query;
    const float next = partials.moments[2 * from];
    const float next_total = partials.moments[2 * from + 1];
    const float next_sum = partials.sums[from * shape.head_dim + dimension];
    if (chunk == 0) {
      maximum = next, total = next_total, sum = next_sum;
    } else if (!IsEmpty(next)) {
      const Merge merge(maximum, next);
      total = merge(total, next_total), sum = merge(sum, next_sum), maximum = merge.maximum;
    }
  }
  shape.out[QueryOffset(shape, sequence, tile.kv_head, packed) + dimension] = total > 0 ? sum / total : 0.0f;
}

// All chunks of one part for a warp's queries.
template <KvFormat kFormat, int kBlocks>
__device__ __forceinline__ void AttendPart(const EntryRange& range, const Shape& shape,
                                           const SequenceTable& sequence, int kv_head, int first, int lane,
                                           const Shared<uint32_t>& query_memory, FoldedState<kBlocks>& chunk,
                                           FoldedState<kBlocks>& whole) {
  const QueryFragments<kBlocks, kTermsOf<kFormat>> query(query_memory);
  LoadQueries(shape, sequence, kv_head, first, lane, query);
  int visible[kBlocks][2];
#pragma unroll
  for (int q = 0; q < 2 * kBlocks; ++q) {
    visible[q / 2][q % 2] =
        VisibleExact(sequence, shape.group, first + q / 2 * kQueries + lane % 4 * 2 + q % 2);
  }
#pragma unroll 1
  for (int begin = 0; begin < range.end; begin += kUnitEntries) {
    UnitState<kBlocks> unit;
    AttendUnit<kFormat, kBlocks, 0>(range, begin, shape.head_dim, lane, query, visible, unit);
    chunk.Add(unit);
    if ((begin + kUnitEntries) % kChunkEntries == 0 || begin + kUnitEntries >= range.end) {
      whole.Add(chunk);
      chunk.Clear();
    }
  }
}

// A warp's queries, eight in a block. kWide: with fp32 pages, which want more registers. There is no version
// for head_dim 128 alone: without the branches between its steps, compilers move more loads up than there are
// registers for.
template <bool kWide>
inline constexpr int kManyBlocks = kWide ? 1 : 2;
template <bool kWide>
inline constexpr int kTileQueries = kChunkUnits* kManyBlocks<kWide>* kQueries;

__host__ __device__ constexpr int ManyQueryWords(bool wide) {
  return wide ? QueryFragments<kManyBlocks<true>, 3>::kWords : QueryFragments<kManyBlocks<false>, 1>::kWords;
}

template <bool kWide>
__global__ void __launch_bounds__(kThreads, kWide ? 1 : 2)
    AttendMany(const KvTables tables, const Shape shape, const Tile* tiles) {
  constexpr int kBlocks = kManyBlocks<kWide>;
  const Tile tile = tiles[blockIdx.x];
  const SequenceTable sequence = tables.sequences[tile.sequence];
  const HeadTable head = tables.heads[tile.sequence * tables.kv_heads + tile.kv_head];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize,
            warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int first = tile.tile * kTileQueries<kWide> + warp * kBlocks * kQueries;
  SharedArena arena;
  FoldedState<kBlocks> chunk(arena.Take<float>(kThreads * FoldedState<kBlocks>::kFloats));
  FoldedState<kBlocks> whole(arena.Take<float>(kThreads * FoldedState<kBlocks>::kFloats));
  const Shared<uint32_t> query_memory = arena.Take<uint32_t>(ManyQueryWords(kWide));
  if (first >= sequence.rows * shape.group) return;  // no barrier follows
  const int last = LastVisible(sequence, shape.group, first + kBlocks * kQueries);
#pragma unroll 1
  for (int part = 0; part < 2; ++part) {
    const EntryRange range = RangeOf(tables, shape, head, part == 0, last);
    const auto attend = [&](auto part_function) {
      part_function(range, shape, sequence, tile.kv_head, first, lane, query_memory, chunk, whole);
    };
    if (range.end <= 0) continue;
    if constexpr (kWide) {
      if (range.page->format == KvFormat::kF32) attend(AttendPart<KvFormat::kF32, kBlocks>);
    }
    if (range.page->format == KvFormat::kBF16) attend(AttendPart<KvFormat::kBF16, kBlocks>);
    if (range.page->format == KvFormat::kFp8) attend(AttendPart<KvFormat::kFp8, kBlocks>);
    if (range.page->format == KvFormat::kInt8) attend(AttendPart<KvFormat::kInt8, kBlocks>);
    if (range.page->format == KvFormat::kInt4) attend(AttendPart<KvFormat::kInt4, kBlocks>);
  }
#pragma unroll
  for (int q = 0; q < 2 * kBlocks; ++q) {
    const int packed = first + q / 2 * kQueries + lane % 4 * 2 + q % 2;
    if (packed >= sequence.rows * shape.group) continue;
    float* out = shape.out + QueryOffset(shape, sequence, tile.kv_head, packed);
    const float4 moments = whole.Moments(q / 2);
    const float total = q % 2 == 0 ? moments.z : moments.w;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int dimension = 64 * (i / 4) + 8 * (lane / 4) + 2 * (i % 4);
      if (dimension >= shape.head_dim) continue;
      const float4 sums = whole.Sums(q / 2, i);
      const float low = q % 2 == 0 ? sums.x : sums.y, high = q % 2 == 0 ? sums.z : sums.w;
      *reinterpret_cast<float2*>(out + dimension) =
          make_float2(total > 0 ? low / total : 0.0f, total > 0 ? high / total : 0.0f);
    }
  }
}

// What each kernel gets to do, made on the host from the entry counts alone.
struct Plan {
  std::vector<Tile> few, many;
  std::vector<Work> work[2][kKvFormatCount];  // [principal][format]
  bool wide = false;                          // some page is fp32
  int slots = 0;
  int queries = 1;  // of a slot
};

bool HasF32(const AttentionArgs& args) {
  if (args.pool.exact->format() == KvFormat::kF32) return true;
  for (const KvSequence& sequence : args.sequences) {
    for (int h = 0; h < args.kv_heads; ++h) {
      const KvHeadBlocks& head = sequence.heads[h];
      if (head.principal_entries > 0 && head.principal_page->format() == KvFormat::kF32) return true;
    }
  }
  return false;
}

Plan MakePlan(const AttentionArgs& args) {
  Plan plan;
  plan.wide = HasF32(args);
  const int group = args.heads / args.kv_heads;
  const int tile_queries = plan.wide ? kTileQueries<true> : kTileQueries<false>;
  for (int s = 0; s < static_cast<int>(args.sequences.size()); ++s) {
    const KvSequence& sequence = args.sequences[s];
    const int packed = sequence.rows * group;
    for (int h = 0; h < args.kv_heads; ++h) {
      const KvHeadBlocks& head = sequence.heads[h];
      if (packed >= kManyQueries) {
        // The last rows see most: they begin first.
        for (int tile = CeilDiv(packed, tile_queries); tile-- > 0;) plan.many.push_back({s, h, tile, 0, 0});
        continue;
      }
      plan.queries = std::max(plan.queries, std::min(packed, kQueries));
      for (int tile = 0; tile < CeilDiv(packed, kQueries); ++tile) {
        const int last_row = (std::min((tile + 1) * kQueries, packed) - 1) / group;
        const int exact = sequence.exact_entries - sequence.rows + last_row + 1;
        const int first = plan.slots, index = static_cast<int>(plan.few.size());
        const auto add = [&](bool principal, KvFormat format, int entries) {
          for (int chunk = 0; chunk < CeilDiv(entries, kChunkEntries); ++chunk) {
            plan.work[principal][static_cast<int>(format)].push_back({index, chunk, plan.slots++});
          }
        };
        if (head.principal_entries > 0) add(true, head.principal_page->format(), head.principal_entries);
        add(false, args.pool.exact->format(), exact);
        plan.few.push_back({s, h, tile, first, plan.slots - first});
      }
    }
  }
  return plan;
}

template <KvFormat kFormat>
cudaError_t LaunchChunks(const OpContext& context, const KvTables& tables, const Shape& shape,
                         const Tile* tiles, std::span<const Work> work, bool principal,
                         const Partials& partials) {
  cudaError_t error = cudaSuccess;
  const Work* items = context.staging->Upload(work, context.stream, &error);
  if (error != cudaSuccess) return error;
  // fp32 pages are for tests and small models.
  constexpr int kCommon = kFormat == KvFormat::kF32 ? 0 : 128;
  const auto kernel = shape.head_dim == 128 ? AttendChunks<kFormat, kCommon> : AttendChunks<kFormat, 0>;
  const size_t shared = SharedBytes<float>(kChunkUnits * kQueries * shape.head_dim) +
                        SharedBytes<float>(kChunkUnits * kQueries * 2) +
                        SharedBytes<uint32_t>(QueryFragments<1, kTermsOf<kFormat>>::kWords);
  return Launch("AttendChunks", kernel, dim3(static_cast<unsigned>(work.size())), dim3(kThreads), shared,
                context.stream, tables, shape, tiles, items, principal, partials);
}

cudaError_t AttendFew(const OpContext& context, const KvTables& tables, const Shape& shape,
                      const Plan& plan) {
  cudaError_t error = cudaSuccess;
  const Tile* tiles = context.staging->Upload(std::span<const Tile>(plan.few), context.stream, &error);
  if (error != cudaSuccess) return error;
  Partials partials;
  partials.queries = plan.queries;
  const size_t states = static_cast<size_t>(plan.slots) * static_cast<size_t>(plan.queries);
  const size_t sums = states * static_cast<size_t>(shape.head_dim);
  void* memory = context.workspace->Reserve((sums + 2 * states) * sizeof(float), context.stream, &error);
  if (error != cudaSuccess) return error;
  partials.sums = static_cast<float*>(memory);
  partials.moments = partials.sums + sums;
  for (const bool principal : {true, false}) {
    const auto& work = plan.work[principal];
    const auto launch = [&](auto kernel_launch, KvFormat format) {
      const auto& items = work[static_cast<int>(format)];
      if (error == cudaSuccess && !items.empty()) {
        error =
            kernel_launch(context, tables, shape, tiles, std::span<const Work>(items), principal, partials);
      }
    };
    launch(LaunchChunks<KvFormat::kF32>, KvFormat::kF32);
    launch(LaunchChunks<KvFormat::kBF16>, KvFormat::kBF16);
    launch(LaunchChunks<KvFormat::kFp8>, KvFormat::kFp8);
    launch(LaunchChunks<KvFormat::kInt8>, KvFormat::kInt8);
    launch(LaunchChunks<KvFormat::kInt4>, KvFormat::kInt4);
  }
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(plan.few.size()), static_cast<unsigned>(plan.queries));
  const int threads = CeilDiv(shape.head_dim, kWarpSize) * kWarpSize;
  return Launch("FoldChunks", FoldChunks, grid, dim3(static_cast<unsigned>(threads)), 0, context.stream,
                tables, shape, tiles, partials);
}

cudaError_t AttendMany(const OpContext& context, const KvTables& tables, const Shape& shape,
                       const Plan& plan) {
  cudaError_t error = cudaSuccess;
  const Tile* tiles = context.staging->Upload(std::span<const Tile>(plan.many), context.stream, &error);
  if (error != cudaSuccess) return error;
  const auto kernel = plan.wide ? AttendMany<true> : AttendMany<false>;
  const int floats = kThreads * (plan.wide ? FoldedState<kManyBlocks<true>>::kFloats
                                           : FoldedState<kManyBlocks<false>>::kFloats);
  return Launch("AttendMany", kernel, dim3(static_cast<unsigned>(plan.many.size())), dim3(kThreads),
                2 * SharedBytes<float>(floats) + SharedBytes<uint32_t>(ManyQueryWords(plan.wide)),
                context.stream, tables, shape, tiles);
}

}  // namespace

cudaError_t Attention(const OpContext& context, const AttentionArgs& args) {
  cudaError_t error = cudaSuccess;
  const Plan plan = MakePlan(args);
  const KvTables tables = UploadKvTables(context, args.sequences, args.pool, args.kv_heads, true, &error);
  if (error != cudaSuccess) return error;
  const Shape shape{
      args.query,         args.out, args.heads, args.heads / args.kv_heads, args.pool.exact->head_dim(),
      args.scale * kLog2E};
  if (!plan.few.empty()) error = AttendFew(context, tables, shape, plan);
  if (error == cudaSuccess && !plan.many.empty()) error = AttendMany(context, tables, shape, plan);
  return error;
}

}  // namespace atp::cuda
