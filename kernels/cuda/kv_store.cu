// Writes into KV blocks: this step's keys and values as exact entries, and kept queries. Where keys are yet
// to be rotated they are on their way, and further blocks of the same launch rotate the queries.
#include "kernels/cuda/kv_tables.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/principal_pages.cuh"
#include "kernels/cuda/rotation.cuh"
#include "kernels/cuda/walsh_hadamard.cuh"

namespace atp::cuda {
namespace {

constexpr int kThreads = 256;
// Entries that one block of threads writes. Keys lie dimension-major: 16 entries of one dimension are what
// makes their lines whole, and are at most two KV blocks.
constexpr int kTile = 16;
// Query heads that a block of threads rotates.
constexpr int kHeadsPerBlock = 8;

struct Rotation {
  const int32_t* positions = nullptr;  // [rows]; null: everything is rotated
  const float* inverse_frequency = nullptr;
  float* query = nullptr;  // [rows, heads, head_dim]
  int heads = 0;
  int padding = 0;
};

// Of a tile's rows.
class Angles {
 public:
  __device__ __forceinline__ Angles(SharedArena& arena, int half)
      : half_(half), cosines_(arena.Take<float>(kTile * half)), sines_(arena.Take<float>(kTile * half)) {}

  // By the whole block, of rows [row, row + count) of the batch; a barrier before they are read.
  __device__ __forceinline__ void Fill(const Rotation& rotation, int row, int count) const {
    for (int i = static_cast<int>(threadIdx.x); i < count * half_; i += kThreads) {
      const float2 angle =
          RotationOf(rotation.positions[row + i / half_], rotation.inverse_frequency[i % half_]);
      cosines_[i] = angle.x;
      sines_[i] = angle.y;
    }
  }
  // Pair `i` of a head of row `row` of the tile; `head` is where it begins.
  __device__ __forceinline__ float2 Pair(const float* head, int row, int i) const {
    return Rotated(head[i], head[i + half_], cosines_[row * half_ + i], sines_[row * half_ + i]);
  }
  __device__ __forceinline__ float Element(const float* head, int row, int dimension) const {
    return dimension < half_ ? Pair(head, row, dimension).x : Pair(head, row, dimension - half_).y;
  }

 private:
  int half_;
  Shared<float> cosines_, sines_;
};

// Queries of rows [row, row + count) in place, of kHeadsPerBlock heads from `first` on.
__device__ __forceinline__ void RotateQueries(const Rotation& rotation, const Angles& angles, int row,
                                              int count, int first, int half) {
  angles.Fill(rotation, row, count);
  __syncthreads();
  const int heads = min(kHeadsPerBlock, rotation.heads - first);
  for (int i = static_cast<int>(threadIdx.x); i < count * heads * half; i += kThreads) {
    const int at = i / (heads * half), head = first + i / half % heads, pair = i % half;
    float* query = rotation.query + (static_cast<int64_t>(row + at) * rotation.heads + head) * 2 * half;
    const float2 rotated = angles.Pair(query, at, pair);
    query[pair] = rotated.x;
    query[pair + half] = rotated.y;
  }
}

__device__ __forceinline__ void Write(float* to, float value) { *to = value; }
__device__ __forceinline__ void Write(uint16_t* to, float value) { *to = FloatToBF16(value); }

// Grid: (tiles of rows, kv heads and then groups of query heads, sequences). Keys and values come in row by
// row, whole lines at a time, and keys leave transposed through shared memory.
template <class Element>
__global__ void __launch_bounds__(kThreads)
    StoreKvKernel(const float* key, const float* value, KvTables tables, Rotation rotation) {
  const PageLayout& page = tables.exact;
  const int head_dim = page.head_dim, stride = head_dim + 1;  // + 1: a column's elements lie in 16 banks
  SharedArena arena;
  const Shared<float> keys = arena.Take<float>(kTile * stride);
  const SequenceTable sequence = tables.sequences[blockIdx.z];
  const int kv_head = static_cast<int>(blockIdx.y), me = static_cast<int>(threadIdx.x);
  const int first = static_cast<int>(blockIdx.x) * kTile;
  const int count = min(kTile, sequence.rows - first);
  const bool rotates = rotation.positions != nullptr;
  const Angles angles(arena, rotates ? head_dim / 2 : 0);
  if (kv_head >= tables.kv_heads) {
    RotateQueries(rotation, angles, sequence.first_row + first, count,
                  (kv_head - tables.kv_heads) * kHeadsPerBlock, head_dim / 2);
    return;
  }
  if (rotates) {
    angles.Fill(rotation, sequence.first_row + first, count);
    __syncthreads();
  }
  const HeadTable head = tables.heads[static_cast<int64_t>(blockIdx.z) * tables.kv_heads + kv_head];
  const int first_entry = sequence.exact_entries - sequence.rows + first;
  const auto block_of = [&](int entry) {
    return tables.Block(tables.blocks[head.exact + entry / page.entries]);
  };
  for (int i = me; i < count * head_dim; i += kThreads) {
    const int row = i / head_dim, dimension = i % head_dim, entry = first_entry + row;
    const int64_t from =
        (static_cast<int64_t>(sequence.first_row + first + row) * tables.kv_heads + kv_head) * head_dim;
    keys[row * stride + dimension] =
        rotates ? angles.Element(key + from, row, dimension) : key[from + dimension];
    auto* values = reinterpret_cast<Element*>(block_of(entry) + page.value_offset);
    Write(values + page.ValueIndex(dimension, entry % page.entries), value[from + dimension]);
  }
  __syncthreads();
  for (int i = me; i < kTile * head_dim; i += kThreads) {
    const int dimension = i / kTile, row = i % kTile, entry = first_entry + row;
    if (row >= count) continue;
    auto* out = reinterpret_cast<Element*>(block_of(entry));
    Write(out + page.KeyIndex(dimension, entry % page.entries), keys[row * stride + dimension]);
  }
}

// The same for formats with scales. A block of threads has the entries of one slice of 16, because an int4
// byte has the keys of two of them; of those that are not this step's, nothing is changed.
template <KvFormat kFormat>
__global__ void __launch_bounds__(kThreads)
    StoreScaledKvKernel(const float* key, const float* value, KvTables tables, Rotation rotation) {
  constexpr int kTop = TopOf(kFormat);
  const PageLayout& page = tables.exact;
  const int head_dim = page.head_dim, stride = head_dim + 1;
  SharedArena arena;
  const Shared<float> keys = arena.Take<float>(kTile * stride);
  const Shared<float> scales = arena.Take<float>(2 * kTile);  // of keys, of values
  const SequenceTable sequence = tables.sequences[blockIdx.z];
  const int kv_head = static_cast<int>(blockIdx.y), me = static_cast<int>(threadIdx.x);
  const int first_entry = sequence.exact_entries - sequence.rows;
  const int slice = (first_entry / kTile + static_cast<int>(blockIdx.x)) * kTile;
  const int begin = max(first_entry - slice, 0), end = min(sequence.exact_entries - slice, kTile);
  if (begin >= end) return;
  const bool rotates = rotation.positions != nullptr;
  const Angles angles(arena, rotates ? head_dim / 2 : 0);
  const int first_row = sequence.first_row + slice + begin - first_entry;
  if (kv_head >= tables.kv_heads) {
    RotateQueries(rotation, angles, first_row, end - begin, (kv_head - tables.kv_heads) * kHeadsPerBlock,
                  head_dim / 2);
    return;
  }
  if (rotates) {
    angles.Fill(rotation, first_row, end - begin);
    __syncthreads();
  }
  const HeadTable head = tables.heads[static_cast<int64_t>(blockIdx.z) * tables.kv_heads + kv_head];
  std::byte* block = tables.Block(tables.blocks[head.exact + slice / page.entries]);
  const int offset = slice % page.entries;
  const auto source = [&](int e) {
    const int64_t row = sequence.first_row + slice + e - first_entry;
    return (row * tables.kv_heads + kv_head) * head_dim;
  };
#pragma unroll 1
  for (int e = begin + me / kWarpSize; e < end; e += kThreads / kWarpSize) {
    float k[kHeadVectors], largest_key = 0, largest_value = 0;
#pragma unroll
    for (int j = 0; j < kHeadVectors; ++j) {
      const int i = me % kWarpSize + j * kWarpSize;
      k[j] = 0;
      if (i >= head_dim) continue;
      k[j] = rotates ? angles.Element(key + source(e), e - begin, i) : key[source(e) + i];
      largest_value = fmaxf(largest_value, fabsf(value[source(e) + i]));
    }
    if constexpr (RotatesKeys(kFormat)) WarpWalshHadamard<kWarpSize>(k, head_dim);
#pragma unroll
    for (int j = 0; j < kHeadVectors; ++j) {
      const int i = me % kWarpSize + j * kWarpSize;
      if (i >= head_dim) continue;
      keys[e * stride + i] = k[j];
      largest_key = fmaxf(largest_key, fabsf(k[j]));
    }
    const uint16_t key_scale = ScaleBits(WarpMax(largest_key), kTop);
    const uint16_t value_scale = ScaleBits(WarpMax(largest_value), kTop);
    if (me % kWarpSize != 0) continue;
    scales[e] = BF16ToFloat(key_scale), scales[kTile + e] = BF16ToFloat(value_scale);
    reinterpret_cast<uint16_t*>(block + page.key_scale_offset)[offset + e] = key_scale;
    reinterpret_cast<uint16_t*>(block + page.value_scale_offset)[offset + e] = value_scale;
  }
  __syncthreads();
  const auto key_at = [&](int e, int dimension) {
    return Quantized(keys[e * stride + dimension], scales[e], kFormat);
  };
  const auto value_at = [&](int e, int dimension) {
    return Quantized(value[source(e) + dimension], scales[kTile + e], kFormat);
  };
  constexpr int kPerByte = 8 / BitsOf(kFormat), kBytes = kTile / kPerByte;
  for (int i = me; i < kBytes * head_dim; i += kThreads) {
    const int dimension = i / kBytes, e = i % kBytes;
    std::byte* to = block + page.KeyIndex(dimension, offset + e) / kPerByte;
    auto byte = static_cast<uint32_t>(*to);
    if (kPerByte == 1) {
      if (e >= begin && e < end) byte = key_at(e, dimension);
    } else {
      if (e >= begin && e < end) byte = (byte & 0xf0) | (key_at(e, dimension) & 15);
      if (e + 8 >= begin && e + 8 < end) byte = (byte & 15) | (key_at(e + 8, dimension) & 15) << 4;
    }
    *to = static_cast<std::byte>(byte & 255);
  }
  const int row_bytes = head_dim / kPerByte;
  for (int i = me; i < (end - begin) * row_bytes; i += kThreads) {
    const int e = begin + i / row_bytes, dimension = i % row_bytes;
    uint32_t byte = value_at(e, dimension);
    if (kPerByte == 2) byte = (byte & 15) | (value_at(e, dimension + head_dim / 2) & 15) << 4;
    block[page.value_offset + page.ValueIndex(dimension, offset + e) / kPerByte] =
        static_cast<std::byte>(byte & 255);
  }
}

// One kept query: where its heads' elements go. `blocks` counts from the table's first id.
struct QueryRow {
  int32_t row;
  int32_t blocks;
  uint32_t offset;  // bytes into the block
};

// Grid: (rows, heads).
__global__ void __launch_bounds__(kThreads)
    StoreQueriesKernel(const float* query, const QueryRow* rows, const BlockId* blocks, std::byte* pool,
                       size_t block_bytes, int heads, int head_dim) {
  const QueryRow row = rows[blockIdx.x];
  const int head = static_cast<int>(blockIdx.y);
  const BlockId id = blocks[row.blocks + head];
  auto* out = reinterpret_cast<uint16_t*>(pool + static_cast<size_t>(id) * block_bytes + row.offset);
  const float* in = query + (static_cast<int64_t>(row.row) * heads + head) * head_dim;
  for (int i = static_cast<int>(threadIdx.x); i < head_dim; i += kThreads) out[i] = FloatToBF16(in[i]);
}

}  // namespace

namespace {

cudaError_t Store(const OpContext& context, const StoreKvArgs& args, const Rotation& rotation) {
  int32_t most = 0;
  for (const KvSequence& sequence : args.sequences) most = sequence.rows > most ? sequence.rows : most;
  if (most == 0) return cudaSuccess;
  cudaError_t error;
  const KvTables tables = TablesOf(context, args.sequences, args.pool, args.kv_heads, &error);
  if (error != cudaSuccess) return error;
  auto* kernel = tables.exact.format == KvFormat::kF32 ? StoreKvKernel<float> : StoreKvKernel<uint16_t>;
  if (tables.exact.format == KvFormat::kFp8) kernel = StoreScaledKvKernel<KvFormat::kFp8>;
  if (tables.exact.format == KvFormat::kInt8) kernel = StoreScaledKvKernel<KvFormat::kInt8>;
  if (tables.exact.format == KvFormat::kInt4) kernel = StoreScaledKvKernel<KvFormat::kInt4>;
  // These are cut where slices begin, which may be one tile more.
  const int tiles = CeilDiv(most, kTile) + (HasScales(tables.exact.format) ? 1 : 0);
  const dim3 grid(static_cast<unsigned>(tiles),
                  static_cast<unsigned>(args.kv_heads + CeilDiv(rotation.heads, kHeadsPerBlock)),
                  static_cast<unsigned>(args.sequences.size()));
  const int half = rotation.positions != nullptr ? tables.exact.head_dim / 2 : 0;
  return Launch("StoreKv", kernel, grid, dim3(kThreads),
                SharedBytes<float>(kTile * (tables.exact.head_dim + 1)) + SharedBytes<float>(2 * kTile) +
                    2 * SharedBytes<float>(kTile * half),
                context.stream, args.key, args.value, tables, rotation);
}

}  // namespace

cudaError_t StoreKv(const OpContext& context, const StoreKvArgs& args) { return Store(context, args, {}); }

cudaError_t RotateAndStore(const OpContext& context, const RotateAndStoreArgs& args) {
  cudaError_t error;
  const int32_t* positions = PositionsOf(context, args.positions, &error);
  if (error != cudaSuccess) return error;
  return Store(context, {args.key, args.value, args.sequences, args.pool, args.kv_heads},
               {positions, args.inverse_frequency, args.query, args.heads});
}

cudaError_t StoreQueries(const OpContext& context, const StoreQueriesArgs& args) {
  if (args.rows.empty()) return cudaSuccess;
  const QueryPage& page = *args.page;
  const size_t heads = static_cast<size_t>(args.heads),
               per_head = static_cast<size_t>(page.blocks_per_head());
  const size_t blocks_at = args.rows.size() * sizeof(QueryRow);
  cudaError_t error;
  const Staging::Table table =
      context.staging->Take(blocks_at + args.rows.size() * heads * sizeof(BlockId), &error);
  if (table.host == nullptr) return error;
  auto* rows = reinterpret_cast<QueryRow*>(table.host);
  auto* blocks = reinterpret_cast<BlockId*>(table.host + blocks_at);
  int32_t used = 0;
  for (const QuerySampleRow& row : args.rows) {
    *rows++ = {row.row, used, static_cast<uint32_t>(page.offset(row.sample))};
    const size_t block = static_cast<size_t>(row.sample / page.per_block());
    for (size_t h = 0; h < heads; ++h) blocks[used++] = row.blocks[h * per_head + block];
  }
  error = context.staging->Send(table, context.stream);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(args.rows.size()), static_cast<unsigned>(args.heads));
  return Launch("StoreQueries", StoreQueriesKernel, grid, dim3(kThreads), 0, context.stream, args.query,
                reinterpret_cast<const QueryRow*>(table.device),
                reinterpret_cast<const BlockId*>(table.device + blocks_at), args.pool.data,
                args.pool.block_bytes, args.heads, page.head_dim());
}

}  // namespace atp::cuda
