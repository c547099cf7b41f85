// y = x·Wᵀ + bias (+ y). A result must not depend on how many rows are in the batch, so all kernels of a
// weight type add up one output in one order:
//   bf16 whose rows are 16-byte aligned, and block-quantised ones, rounded to bf16 on their way: tensor
//   cores,
//     x rounded to bf16. Slices of kSlice products are summed by m16n8k16 steps in the order that StepsOf()
//     gives, then the slices from first to last.
//   anything else: fp32 multiply-adds, one product after the other (matmul_float.cu).
// Two kernels share the tensor-core order. SkinnyKernel, for decoding, is bound by the bytes of W: they go
// from global memory straight into fragments, slices of one output are spread over the warps of a block.
// TiledKernel, for prefill, is bound by arithmetic: W and x come through shared memory, three stages deep.
#include <limits>
#include <span>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/matmul_problem.cuh"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/quantized_weight.cuh"

namespace atp::cuda {
namespace {

using Problem = MatMulProblem;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kSlice = 512;
constexpr int kChunk = 32;  // of the depth: 16 bytes of bf16 from each of four lanes, two mma steps

// What one lane holds of a chunk of a row: elements [8t, 8t + 8). A step multiplies pairs 0 and 1 of all four
// lanes, the next one pairs 2 and 3: the order inside a chunk is permuted, in W and x alike.
struct Row8 {
  uint32_t pair[4];
};

__device__ __forceinline__ Row8 FromVector(const uint4& v) { return {{v.x, v.y, v.z, v.w}}; }

__device__ __forceinline__ Row8 FromEight(const Eight& w) {
  return {{PackBF16(w.value[0], w.value[1]), PackBF16(w.value[2], w.value[3]),
           PackBF16(w.value[4], w.value[5]), PackBF16(w.value[6], w.value[7])}};
}

// c += the chunk's products. low, high: W's rows g and g + 8; x: its row g.
__device__ __forceinline__ void StepsOf(float (&c)[4], const Row8& low, const Row8& high, const Row8& x) {
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const uint32_t a[4] = {low.pair[2 * step], high.pair[2 * step], low.pair[2 * step + 1],
                           high.pair[2 * step + 1]};
    const uint32_t b[2] = {x.pair[2 * step], x.pair[2 * step + 1]};
    MmaBF16(c, a, b);
  }
}

// How SkinnyKernel reads x: where it is few rows, as it is; else from the copy in bf16.
struct ReadF32 {
  static __device__ __forceinline__ Row8 Load(const Problem& p, int row, int at) {
    const float4* from = reinterpret_cast<const float4*>(p.x + static_cast<int64_t>(row) * p.in + at);
    const float4 a = from[0], b = from[1];
    return {{PackBF16(a.x, a.y), PackBF16(a.z, a.w), PackBF16(b.x, b.y), PackBF16(b.z, b.w)}};
  }
};
struct ReadBF16 {
  static __device__ __forceinline__ Row8 Load(const Problem& p, int row, int at) {
    return FromVector(*reinterpret_cast<const uint4*>(p.half + static_cast<int64_t>(row) * p.in + at));
  }
};

// How SkinnyKernel reads W, of dtype kW.
template <DType kW>
__device__ __forceinline__ Row8 LoadWeights(const Problem& p, int out, int at) {
  const int64_t element = static_cast<int64_t>(out) * p.in + at;
  if constexpr (kW == DType::kBF16) {
    const auto* weight = static_cast<const uint16_t*>(p.weight.codes) + element;
    return FromVector(__ldcs(reinterpret_cast<const uint4*>(weight)));
  } else {
    return FromEight(LoadEight<kW>(p.weight, element));
  }
}

// Fragments of one slice: kOutTiles · 16 outputs of kRowTiles · 8 rows.
template <int kOutTiles, int kRowTiles, class ReadX, DType kW>
__device__ __forceinline__ void SkinnySlice(const Problem& p, int first_out, int slice,
                                            float (&sums)[kOutTiles][kRowTiles][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
  const int end = min(slice * kSlice + kSlice, p.in);
#pragma unroll 4
  for (int at = slice * kSlice + 8 * t; at - 8 * t < end; at += kChunk) {
    const bool inside = at < end;
    Row8 w[kOutTiles][2];
#pragma unroll
    for (int half = 0; half < 2 * kOutTiles; ++half) {
      const int out = first_out + half * 8 + g;
      w[half / 2][half % 2] = {{0, 0, 0, 0}};
      if (inside && out < p.out) w[half / 2][half % 2] = LoadWeights<kW>(p, out, at);
    }
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
      const int row = n * 8 + g;
      Row8 x = {{0, 0, 0, 0}};
      if (inside && row < p.rows) x = ReadX::Load(p, row, at);
#pragma unroll
      for (int m = 0; m < kOutTiles; ++m) StepsOf(sums[m][n], w[m][0], w[m][1], x);
    }
  }
}

// Products of the same x that go together: one alone may be fewer blocks than the device has room for.
constexpr int kMostTogether = 3;
struct Products {
  Problem of[kMostTogether];
  int blocks[kMostTogether];  // of the last one there is, not read
  int padding = 0;
};

// A block computes kOutTiles · 16 outputs of all rows of a product; rows <= kRowTiles · 8. Its warps take one
// slice each of kWarps at a time; the block adds them up in order, while the warps are at the next ones.
template <int kOutTiles, int kRowTiles, class ReadX, DType kW>
__global__ void __launch_bounds__(kThreads) SkinnyKernel(const Products products) {
  constexpr int kOuts = kOutTiles * 16, kSums = kOuts * kRowTiles * 8;
  constexpr int kPerThread = (kSums + kThreads - 1) / kThreads;
  SharedArena arena;
  const Shared<float> partial = arena.Take<float>(2 * kWarps * kSums);
  const int me = static_cast<int>(threadIdx.x), warp = me / kWarpSize, lane = me % kWarpSize;
  int block = static_cast<int>(blockIdx.x), product = 0;
  while (product + 1 < kMostTogether && block >= products.blocks[product])
    block -= products.blocks[product++];
  const Problem& own = products.of[product];
  Problem p = products.of[0];  // whose x is everybody's
  p.weight = own.weight, p.out = own.out;
  const int first_out = block * kOuts;
  const int slices = CeilDiv(p.in, kSlice);
  float totals[kPerThread] = {};
  for (int round = 0; round * kWarps < slices; ++round) {
    const int buffer = round % 2 * kWarps * kSums;
    if (round * kWarps + warp < slices) {
      float sums[kOutTiles][kRowTiles][4] = {};
      SkinnySlice<kOutTiles, kRowTiles, ReadX, kW>(p, first_out, round * kWarps + warp, sums);
#pragma unroll
      for (int i = 0; i < kOutTiles * kRowTiles * 4; ++i) {
        // Fragment element i of all lanes lies side by side.
        partial[buffer + warp * kSums + i * kWarpSize + lane] =
            sums[i / 4 / kRowTiles][i / 4 % kRowTiles][i % 4];
      }
    }
    __syncthreads();
    const int full = min(kWarps, slices - round * kWarps);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const int at = me + k * kThreads;
      if (at >= kSums) continue;
      for (int w = 0; w < full; ++w) totals[k] += partial[buffer + w * kSums + at];
    }
  }
  p.bias = own.bias, p.y = own.y, p.accumulate = own.accumulate;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int at = me + k * kThreads;
    if (at >= kSums) continue;
    const int element = at / kWarpSize % 4, tile = at / kWarpSize / 4, g = at % kWarpSize / 4, t = at % 4;
    WriteOne(p, tile % kRowTiles * 8 + 2 * t + element % 2,
             first_out + tile / kRowTiles * 16 + g + element / 2 * 8, totals[k]);
  }
}

constexpr int kStages = 3;
constexpr int kDepth = 64;  // of a stage

// Of a row of a stage: 16-byte vectors, 8 of bf16, 4 of codes of 8 bits, 2 of 4.
template <DType kW>
constexpr int VectorsOf() {
  if constexpr (kW == DType::kBF16)
    return 8;
  else
    return QuantizedWeight<kW>::kNibbles ? 2 : 4;
}

// Where vector v of row r lies, in elements of two bytes. A row is 32, 16 or 8 banks; of every two, four or
// eight rows the later half have their halves exchanged, out of the way of the others that are read with
// them.
template <int kVectors>
__device__ __forceinline__ int TileIndex(int row, int vector) {
  return (row * kVectors + (vector ^ (row / (8 / kVectors) % 2 * (kVectors / 2)))) * 8;
}

// Rows [first, first + kRows) of a [rows, in] matrix, elements [at, at + kDepth), zeros outside.
template <int kRows, int kVectors>
__device__ __forceinline__ void CopyTile(const Shared<uint16_t>& tile, int offset, const void* from, int rows,
                                         int in, int first, int at) {
  constexpr int kElements = kDepth / kVectors;  // of a vector
#pragma unroll
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kVectors; i += kThreads) {
    const int row = i / kVectors, vector = i % kVectors;
    const bool inside = first + row < rows && at + vector * kElements < in;
    const int64_t element = inside ? static_cast<int64_t>(first + row) * in + at + vector * kElements : 0;
    CpAsync16(tile, offset + TileIndex<kVectors>(row, vector),
              static_cast<const uint4*>(from) + element / kElements, inside);
  }
}

// Eight warps, 4 by 2, of kOutTiles · 16 outputs and kRowTiles · 8 rows each.
template <int kOutTiles, int kRowTiles, DType kW>
struct Tile {
  static constexpr int kOuts = 4 * kOutTiles * 16;
  static constexpr int kRows = 2 * kRowTiles * 8;
  static constexpr int kWeightElements = kOuts * VectorsOf<kW>() * 8;  // of two bytes
  static constexpr int kStageElements = kWeightElements + kRows * kDepth;
};

// Of one stage, for the outputs that a lane loads; fetched a stage ahead.
template <int kOutTiles, DType kW>
struct StageScales {
  uint16_t of[2 * kOutTiles][kDepth / kChunk];
  uint32_t super[2 * kOutTiles];

  __device__ __forceinline__ void Load(const Problem& p, int out, int step) {
    if constexpr (kW != DType::kBF16) {
#pragma unroll
      for (int m = 0; m < 2 * kOutTiles; ++m) {
        const bool inside = out + m * 8 < p.out && step * kDepth < p.in;
        const int64_t first = static_cast<int64_t>(out + m * 8) * p.in + step * kDepth;
        if constexpr (IsKQuant(kW)) super[m] = inside ? p.weight.supers[first / 256] : 0;
#pragma unroll
        for (int chunk = 0; chunk < kDepth / kChunk; ++chunk) {
          of[m][chunk] = inside && step * kDepth + chunk * kChunk < p.in
                             ? p.weight.scales[first / kChunk + chunk]
                             : uint16_t{0};
        }
      }
    }
  }
};

// Chunk `chunk` of row `row` of the weights of a stage, a lane's eight elements of it.
template <DType kW>
__device__ __forceinline__ Row8 TileWeights(const Shared<uint16_t>& tiles, int offset, int row, int chunk,
                                            int t, uint16_t scale, uint32_t super) {
  constexpr int kVectors = VectorsOf<kW>(), kBytes = 2 * kVectors;  // of eight elements
  const int byte = chunk * 4 * kBytes + t * kBytes;
  const int at = offset + TileIndex<kVectors>(row, byte / 16) + byte % 16 / 2;
  if constexpr (kW == DType::kBF16) {
    return FromVector(tiles.LoadAs<uint4>(at));
  } else {
    using W = QuantizedWeight<kW>;
    return FromEight(W::Decode(tiles.LoadAs<typename W::Codes>(at), scale, super, 8 * t));
  }
}

// One stage's products.
template <int kOutTiles, int kRowTiles, DType kW>
__device__ __forceinline__ void TiledSteps(const Shared<uint16_t>& tiles, int offset,
                                           const StageScales<kOutTiles, kW>& scales,
                                           float (&sums)[kOutTiles][kRowTiles][4]) {
  using T = Tile<kOutTiles, kRowTiles, kW>;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize,
            lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const int out = warp / 2 * kOutTiles * 16 + g, row = warp % 2 * kRowTiles * 8 + g;
#pragma unroll
  for (int chunk = 0; chunk < kDepth / kChunk; ++chunk) {
    Row8 w[kOutTiles][2];
#pragma unroll
    for (int m = 0; m < 2 * kOutTiles; ++m)
      w[m / 2][m % 2] =
          TileWeights<kW>(tiles, offset, out + m * 8, chunk, t, scales.of[m][chunk], scales.super[m]);
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
      const Row8 x =
          TileWeights<DType::kBF16>(tiles, offset + T::kWeightElements, row + n * 8, chunk, t, 0, 0);
#pragma unroll
      for (int m = 0; m < kOutTiles; ++m) StepsOf(sums[m][n], w[m][0], w[m][1], x);
    }
  }
}

// Grid: (blocks of rows, blocks of outputs): neighbours share W.
template <int kOutTiles, int kRowTiles, DType kW>
__global__ void __launch_bounds__(kThreads) TiledKernel(Problem p) {
  using T = Tile<kOutTiles, kRowTiles, kW>;
  SharedArena arena;
  const Shared<uint16_t> tiles = arena.Take<uint16_t>(kStages * T::kStageElements);
  const int first_row = static_cast<int>(blockIdx.x) * T::kRows,
            first_out = static_cast<int>(blockIdx.y) * T::kOuts;
  const int steps = CeilDiv(p.in, kDepth);
  const auto fetch = [&](int step) {
    if (step < steps) {
      const int offset = step % kStages * T::kStageElements;
      CopyTile<T::kOuts, VectorsOf<kW>()>(tiles, offset, p.weight.codes, p.out, p.in, first_out,
                                          step * kDepth);
      CopyTile<T::kRows, VectorsOf<DType::kBF16>()>(tiles, offset + T::kWeightElements, p.half, p.rows, p.in,
                                                    first_row, step * kDepth);
    }
    CpAsyncCommit();  // an empty group too: the count of groups is what is waited for
  };
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize,
            lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int lane_out = first_out + warp / 2 * kOutTiles * 16 + lane / 4;
  StageScales<kOutTiles, kW> scales = {}, next = {};
  next.Load(p, lane_out, 0);
  float totals[kOutTiles][kRowTiles][4] = {};
  float sums[kOutTiles][kRowTiles][4] = {};
  for (int step = 0; step < kStages - 1; ++step) fetch(step);
  for (int step = 0; step < steps; ++step) {
    CpAsyncWait<kStages - 2>();
    __syncthreads();  // this step's stage is there for all, and all have left the stage that is fetched next
    fetch(step + kStages - 1);
    scales = next;
    next.Load(p, lane_out, step + 1);
    TiledSteps<kOutTiles, kRowTiles, kW>(tiles, step % kStages * T::kStageElements, scales, sums);
    if ((step + 1) % (kSlice / kDepth) != 0 && step + 1 != steps) continue;
#pragma unroll
    for (int i = 0; i < kOutTiles * kRowTiles * 4; ++i) {
      totals[i / 4 / kRowTiles][i / 4 % kRowTiles][i % 4] +=
          sums[i / 4 / kRowTiles][i / 4 % kRowTiles][i % 4];
      sums[i / 4 / kRowTiles][i / 4 % kRowTiles][i % 4] = 0;
    }
  }
#pragma unroll
  for (int i = 0; i < kOutTiles * kRowTiles * 4; ++i) {
    const int m = i / 4 / kRowTiles, n = i / 4 % kRowTiles, element = i % 4;
    WriteOne(p, first_row + (warp % 2 * kRowTiles + n) * 8 + lane % 4 * 2 + element % 2,
             first_out + (warp / 2 * kOutTiles + m) * 16 + lane / 4 + element / 2 * 8, totals[m][n][element]);
  }
}

// count: a multiple of 8.
__global__ void __launch_bounds__(kThreads) RoundKernel(const float* x, uint16_t* half, int64_t count) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 8;
  if (at >= count) return;
  const float4 a = *reinterpret_cast<const float4*>(x + at), b = *reinterpret_cast<const float4*>(x + at + 4);
  *reinterpret_cast<uint4*>(half + at) =
      make_uint4(PackBF16(a.x, a.y), PackBF16(a.z, a.w), PackBF16(b.x, b.y), PackBF16(b.z, b.w));
}

template <int kOutTiles, int kRowTiles, class ReadX, DType kW>
cudaError_t Skinny(const OpContext& context, std::span<const Problem> problems) {
  constexpr int kOuts = kOutTiles * 16;
  Products products{};
  int blocks = 0;
  for (size_t i = 0; i < kMostTogether; ++i) {
    // Those that are not there have no blocks, and the last of all takes what is left.
    products.blocks[i] = std::numeric_limits<int>::max();
    if (i >= problems.size()) continue;
    products.of[i] = problems[i];
    products.blocks[i] = CeilDiv(problems[i].out, kOuts);
    blocks += products.blocks[i];
  }
  return Launch("MatMul skinny", SkinnyKernel<kOutTiles, kRowTiles, ReadX, kW>,
                dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                SharedBytes<float>(2 * kWarps * kOuts * kRowTiles * 8), context.stream, products);
}

template <int kOutTiles, int kRowTiles, DType kW>
cudaError_t Tiled(const OpContext& context, const Problem& p) {
  using T = Tile<kOutTiles, kRowTiles, kW>;
  return Launch(
      "MatMul tiled", TiledKernel<kOutTiles, kRowTiles, kW>,
      dim3(static_cast<unsigned>(CeilDiv(p.rows, T::kRows)), static_cast<unsigned>(CeilDiv(p.out, T::kOuts))),
      dim3(kThreads), SharedBytes<uint16_t>(kStages * T::kStageElements), context.stream, p);
}

// Up to here x is read as fp32, and a copy would cost a launch more; up to here W is what takes the time;
// from here on there are enough large tiles to go round.
constexpr int kMostRowsAsTheyAre = 16;
constexpr int kMostSkinnyRows = 32;
constexpr int kMostRowsOfSmallTiles = 256;

bool OnTensorCores(const MatMulArgs& args) {
  return IsQuantized(args.weight.dtype) || (args.weight.dtype == DType::kBF16 && args.weight.cols % 8 == 0);
}

// x as bf16: [rows, in].
cudaError_t Round(const OpContext& context, const MatMulArgs& args, const uint16_t** half) {
  const int64_t count = args.rows * args.weight.cols;
  cudaError_t error;
  auto* to = static_cast<uint16_t*>(
      context.workspace->Reserve(static_cast<size_t>(count) * sizeof(uint16_t), &error));
  if (to == nullptr) return error;
  *half = to;
  const auto blocks = static_cast<unsigned>(CeilDiv<int64_t, int64_t>(count, kThreads * 8));
  return Launch("MatMul round", RoundKernel, dim3(blocks), dim3(kThreads), 0, context.stream, args.x, to,
                count);
}

// Up to kMostTogether problems of the same x, weights of kW.
template <DType kW>
cudaError_t TensorCores(const OpContext& context, std::span<const Problem> problems) {
  const int rows = problems[0].rows;
  if (rows <= 8) return Skinny<1, 1, ReadF32, kW>(context, problems);
  if (rows <= kMostRowsAsTheyAre) return Skinny<1, 2, ReadF32, kW>(context, problems);
  if (rows <= kMostSkinnyRows) return Skinny<1, 4, ReadBF16, kW>(context, problems);
  for (const Problem& p : problems) {
    const cudaError_t error =
        rows <= kMostRowsOfSmallTiles ? Tiled<1, 4, kW>(context, p) : Tiled<2, 8, kW>(context, p);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t TensorCores(const OpContext& context, std::span<const Problem> problems, DType weight) {
  if (weight == DType::kBF16) return TensorCores<DType::kBF16>(context, problems);
  return WithQuantizedType(
      weight, [&](auto dtype) { return TensorCores<decltype(dtype)::value>(context, problems); });
}

Problem ProblemOf(const MatMulArgs& args, const uint16_t* half) {
  return {args.x,
          half,
          PlanesOf(args.weight),
          args.bias,
          args.y,
          static_cast<int>(args.rows),
          static_cast<int>(args.weight.cols),
          static_cast<int>(args.weight.rows),
          args.accumulate};
}

}  // namespace

size_t MatMulBytes(const StepLimits& limits) {
  return static_cast<size_t>(limits.rows * limits.widest) * sizeof(uint16_t);
}

cudaError_t MatMuls(const OpContext& context, std::span<const MatMulArgs> products) {
  if (products.empty() || products[0].rows == 0) return cudaSuccess;
  const uint16_t* half = nullptr;
  cudaError_t error = cudaSuccess;
  for (size_t i = 0; i < products.size() && error == cudaSuccess;) {
    const DType dtype = products[i].weight.dtype;
    if (!OnTensorCores(products[i])) {
      error = MatMulFloat(context, ProblemOf(products[i++], nullptr), dtype);
      continue;
    }
    if (half == nullptr && products[i].rows > kMostRowsAsTheyAre) error = Round(context, products[i], &half);
    if (error != cudaSuccess) return error;
    Problem together[kMostTogether];
    size_t count = 0;
    while (count < kMostTogether && i < products.size() && products[i].weight.dtype == dtype)
      together[count++] = ProblemOf(products[i++], half);
    error = TensorCores(context, {together, count}, dtype);
  }
  return error;
}

}  // namespace atp::cuda
