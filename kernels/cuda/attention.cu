// Attention over the paged cache with log masses, in one pass over keys and values. Two ways through it:
//   few queries   (decode): each block takes one chunk of one part of one head's entries, and a second kernel
//                 folds the chunks. Work is split by entries: long heads have more blocks, whatever sequence
//                 they belong to. All query heads of a kv head, and several rows, share the pass.
//   many queries  (prefill): each warp goes through all chunks of its sixteen queries.
// Both fold the same states in the same order (online_softmax.cuh): a token's output is the same bits
// decoded, in a chunk of a prompt, and beside any others.
#include "kernels/cuda/attention_plan.h"
#include "kernels/cuda/attention_state.cuh"
#include "kernels/cuda/attention_unit.cuh"
#include "kernels/cuda/kv_tables.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/walsh_hadamard.cuh"

namespace atp::cuda {
namespace {

constexpr int kQueries = AttentionPlan::kFewQueries;  // of a block of queries: the columns of one product
static_assert(kWidestHead == kMaxHeadDim);
constexpr int kThreads = kAttentionThreads;
using Tile = AttentionPlan::Tile;
using Work = AttentionPlan::Work;

struct Shape {
  const float* query;  // [rows, heads, head_dim]
  float* out;          // [rows, heads, head_dim]
  int heads, group, head_dim;
  float scale;  // of scores, times log2 e
};

// States of chunks: `queries` per slot.
struct Partials {
  float* moments;  // [slots, queries, 2]: maximum, total
  float* sums;     // [slots, queries, head_dim]
  int queries;
  int padding = 0;
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
template <KvFormat kFormat, int kBlocks>
__device__ __forceinline__ void LoadQueries(const Shape& shape, const SequenceTable& sequence, int kv_head,
                                            int first, int lane,
                                            const QueryFragments<kBlocks, kTermsOf<kFormat>>& query) {
  constexpr int kTerms = kTermsOf<kFormat>;
  constexpr int kHalf = kWidestHead / 2;
  const int g = lane / 4, t = lane % 4;
  // A transformed query is summed up by halves: the registers that all of it takes are not there.
  const bool whole = RotatesKeys(kFormat) && shape.head_dim == kWidestHead;
  [[maybe_unused]] constexpr int kUnroll = RotatesKeys(kFormat) ? 1 : 2;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    const int packed = first + b * kQueries + g;
    const bool there = packed < sequence.rows * shape.group;
    const float* from = shape.query + QueryOffset(shape, sequence, kv_head, there ? packed : 0);
    const auto element = [&](int i) { return there && i < shape.head_dim ? from[i] : 0.0f; };
#pragma unroll kUnroll
    for (int half = 0; half < 2; ++half) {
      float x[kHalf / 4];
#pragma unroll
      for (int i = 0; i < kHalf / 4; ++i) {
        const float mine = element(kHalf * half + 4 * i + t);
        x[i] = mine;
        if (!whole) continue;
        const float other = element(kHalf * (1 - half) + 4 * i + t);
        // Rounded before what follows adds to it, in every kernel.
        x[i] = __fmul_rn(half == 0 ? mine + other : other - mine, 0.70710678f);
      }
      if constexpr (RotatesKeys(kFormat)) WarpWalshHadamard<4>(x, whole ? kHalf : shape.head_dim);
#pragma unroll
      for (int s = 0; s < kHalf / 16; ++s) {
        const int i = 4 * s, step = kHalf / 16 * half + s;
#pragma unroll
        for (int term = 0; term < kTerms; ++term) {
          query.Store(b, term, step, PackBF16(Term<kTerms>(x[i], term), Term<kTerms>(x[i + 1], term)),
                      PackBF16(Term<kTerms>(x[i + 2], term), Term<kTerms>(x[i + 3], term)));
        }
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
    LoadQueries<kFormat>(shape, sequence, tile.kv_head, first, lane, query);
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
  LoadQueries<kFormat>(shape, sequence, kv_head, first, lane, query);
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

template <KvFormat kFormat>
cudaError_t LaunchChunks(const OpContext& context, const KvTables& tables, const Shape& shape,
                         const Tile* tiles, const Work* items, size_t count, bool principal,
                         const Partials& partials) {
  if (count == 0) return cudaSuccess;
  // fp32 pages are for tests and small models.
  constexpr int kCommon = kFormat == KvFormat::kF32 ? 0 : 128;
  const auto kernel = shape.head_dim == 128 ? AttendChunks<kFormat, kCommon> : AttendChunks<kFormat, 0>;
  const size_t shared = SharedBytes<float>(kChunkUnits * kQueries * shape.head_dim) +
                        SharedBytes<float>(kChunkUnits * kQueries * 2) +
                        SharedBytes<uint32_t>(QueryFragments<1, kTermsOf<kFormat>>::kWords);
  return Launch("AttendChunks", kernel, dim3(static_cast<unsigned>(count)), dim3(kThreads), shared,
                context.stream, tables, shape, tiles, items, principal, partials);
}

// The wave's chunks, and what they make of its tiles.
cudaError_t AttendWave(const OpContext& context, const KvTables& tables, const Shape& shape,
                       const AttentionPlan& plan, const AttentionPlan::Wave& begin,
                       const AttentionPlan::Wave& end, const Partials& partials) {
  cudaError_t error = cudaSuccess;
  for (const bool principal : {true, false}) {
    const auto launch = [&](auto kernel_launch, KvFormat format) {
      if (error != cudaSuccess) return;
      const auto f = static_cast<int>(format);
      const size_t first = begin.work_end[principal][f];
      error = kernel_launch(context, tables, shape, plan.few_tiles, plan.items[principal][f] + first,
                            end.work_end[principal][f] - first, principal, partials);
    };
    launch(LaunchChunks<KvFormat::kF32>, KvFormat::kF32);
    launch(LaunchChunks<KvFormat::kBF16>, KvFormat::kBF16);
    launch(LaunchChunks<KvFormat::kFp8>, KvFormat::kFp8);
    launch(LaunchChunks<KvFormat::kInt8>, KvFormat::kInt8);
    launch(LaunchChunks<KvFormat::kInt4>, KvFormat::kInt4);
  }
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(end.tiles_end - begin.tiles_end),
                  static_cast<unsigned>(plan.queries));
  const int threads = CeilDiv(shape.head_dim, kWarpSize) * kWarpSize;
  return Launch("FoldChunks", FoldChunks, grid, dim3(static_cast<unsigned>(threads)), 0, context.stream,
                tables, shape, plan.few_tiles + begin.tiles_end, partials);
}

cudaError_t AttendFew(const OpContext& context, const KvTables& tables, const Shape& shape,
                      const AttentionPlan& plan) {
  cudaError_t error = cudaSuccess;
  Partials partials;
  partials.queries = plan.queries;
  const size_t states = static_cast<size_t>(plan.slots) * static_cast<size_t>(plan.queries);
  const size_t sums = states * static_cast<size_t>(shape.head_dim);
  void* memory = context.workspace->Reserve((sums + 2 * states) * sizeof(float), &error);
  if (memory == nullptr) return error;
  partials.sums = static_cast<float*>(memory);
  partials.moments = partials.sums + sums;
  AttentionPlan::Wave begin;
  for (const AttentionPlan::Wave& end : plan.waves) {
    error = AttendWave(context, tables, shape, plan, begin, end, partials);
    if (error != cudaSuccess) return error;
    begin = end;
  }
  return cudaSuccess;
}

cudaError_t AttendMany(const OpContext& context, const KvTables& tables, const Shape& shape,
                       const AttentionPlan& plan) {
  const auto kernel = plan.wide ? AttendMany<true> : AttendMany<false>;
  const int floats = kThreads * (plan.wide ? FoldedState<kManyBlocks<true>>::kFloats
                                           : FoldedState<kManyBlocks<false>>::kFloats);
  return Launch("AttendMany", kernel, dim3(static_cast<unsigned>(plan.many.size())), dim3(kThreads),
                2 * SharedBytes<float>(floats) + SharedBytes<uint32_t>(ManyQueryWords(plan.wide)),
                context.stream, tables, shape, plan.many_tiles);
}

}  // namespace

cudaError_t Attention(const OpContext& context, const AttentionArgs& args) {
  if (args.sequences.empty()) return cudaSuccess;
  cudaError_t error;
  const KvTables tables = TablesOf(context, args.sequences, args.pool, args.kv_heads, &error);
  if (error != cudaSuccess) return error;
  AttentionPlan own;
  AttentionPlan& plan = InStep(context, args.sequences) ? context.step->plan() : own;
  if (!plan.Serves(args)) {
    plan.Make(args, kTileQueries<true>, kTileQueries<false>, context.attention_bytes);
    error = plan.Upload(context);
    if (error != cudaSuccess) {
      plan.Forget();
      return error;
    }
  }
  const Shape shape{
      args.query,         args.out, args.heads, args.heads / args.kv_heads, args.pool.exact->head_dim(),
      args.scale * kLog2E};
  if (!plan.few.empty()) error = AttendFew(context, tables, shape, plan);
  if (error == cudaSuccess && !plan.many.empty()) error = AttendMany(context, tables, shape, plan);
  return error;
}

}  // namespace atp::cuda
