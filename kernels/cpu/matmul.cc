// y = x·Wᵀ. Both operands run along k (`in`), so an output is a dot product; a tile of R rows x O outs keeps
// R·O vector accumulators in registers and reuses each loaded vector R or O times.
//
// Why y[r][o] is bit-identical in every batch: it has one vector accumulator of its own, filled in order of k
// with fused (or, on targets without FMA, unfused) multiply-adds, summed across lanes at fixed multiples of
// kDepth, and those sums are added in order of k. No choice below (tile, row block, thread, packing) changes
// that order.
#include <algorithm>

#include "kernels/cpu/ops.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/matmul.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/load-inl.h"

HWY_BEFORE_NAMESPACE();
namespace atp::cpu {
namespace HWY_NAMESPACE {

// 4 x 6 needs 24 accumulators, 6 weights and one x of AVX-512's 32 registers; the others have 16.
constexpr int kTileRows = 4;
#if HWY_TARGET == HWY_AVX3
constexpr int kTileOuts = 6;
#else
constexpr int kTileOuts = 3;
#endif
// A tile's weights are 24 KB at this depth: they stay in the first-level cache while all rows of a part go
// by.
constexpr int64_t kDepth = 1024;
// From this many rows on, weights are converted to fp32 once per part, in the panel, and not once per four
// rows.
constexpr int64_t kPackRows = 9;

static_assert(kMatMulOutsPerTile % kTileOuts == 0);
static_assert(kTileOuts * kDepth <= static_cast<int64_t>(kMatMulPanelFloats));

// sums[r][o] = Σ_k x[r][k]·w[o][k] over `depth` elements.
template <int R, int O, typename W>
HWY_INLINE void Tile(const float* HWY_RESTRICT x, int64_t x_stride, const W* HWY_RESTRICT w, int64_t w_stride,
                     int64_t depth, float (&sums)[kTileRows][kTileOuts]) {
  const hn::ScalableTag<float> d;
  using V = hn::Vec<decltype(d)>;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  V acc[R][O];
  ATP_UNROLL for (int r = 0; r < R; ++r) { ATP_UNROLL for (int o = 0; o < O; ++o) acc[r][o] = hn::Zero(d); }
  int64_t k = 0;
  for (; k + lanes <= depth; k += lanes) {
    V weight[O];
    ATP_UNROLL for (int o = 0; o < O; ++o) weight[o] = LoadFloats(d, w + o * w_stride + k);
    ATP_UNROLL for (int r = 0; r < R; ++r) {
      const V value = hn::LoadU(d, x + r * x_stride + k);
      ATP_UNROLL for (int o = 0; o < O; ++o) acc[r][o] = hn::MulAdd(value, weight[o], acc[r][o]);
    }
  }
  if (k < depth) {
    const size_t rest = static_cast<size_t>(depth - k);
    ATP_UNROLL for (int o = 0; o < O; ++o) {
      const V weight = LoadFirst(d, w + o * w_stride + k, rest);
      ATP_UNROLL for (int r = 0; r < R; ++r) {
        acc[r][o] = hn::MulAdd(LoadFirst(d, x + r * x_stride + k, rest), weight, acc[r][o]);
      }
    }
  }
  ATP_UNROLL for (int r = 0; r < R; ++r) {
    ATP_UNROLL for (int o = 0; o < O; ++o) sums[r][o] = hn::GetLane(hn::SumOfLanes(d, acc[r][o]));
  }
}

// Adds the k slice [k, k + depth) to y[row..row + R, out..out + O]; the slice at k = 0 starts from bias and
// residual.
template <int R, int O, typename W>
HWY_NOINLINE void AddTile(const MatMulArgs& args, int64_t row, int64_t out, int64_t k, int64_t depth,
                          const W* w, int64_t w_stride) {
  const int64_t in = args.weight.cols;
  const int64_t outs = args.weight.rows;
  float sums[kTileRows][kTileOuts];
  Tile<R, O, W>(args.x + row * in + k, in, w, w_stride, depth, sums);
  for (int r = 0; r < R; ++r) {
    float* y = args.y + (row + r) * outs + out;
    for (int o = 0; o < O; ++o) {
      float base = k != 0 || args.accumulate ? y[o] : 0.0f;
      if (k == 0 && args.bias != nullptr) base += args.bias[out + o];
      y[o] = base + sums[r][o];
    }
  }
}

template <int O, typename W>
HWY_INLINE void AddRows(const MatMulArgs& args, int64_t row_begin, int64_t row_end, int64_t out, int64_t k,
                        int64_t depth, const W* w, int64_t w_stride) {
  int64_t row = row_begin;
  for (; row + kTileRows <= row_end; row += kTileRows) {
    AddTile<kTileRows, O, W>(args, row, out, k, depth, w, w_stride);
  }
  switch (row_end - row) {
    case 3:
      return AddTile<3, O, W>(args, row, out, k, depth, w, w_stride);
    case 2:
      return AddTile<2, O, W>(args, row, out, k, depth, w, w_stride);
    case 1:
      return AddTile<1, O, W>(args, row, out, k, depth, w, w_stride);
  }
}

// All rows of the part for outs [out, out + count), count <= kTileOuts.
template <typename W>
HWY_INLINE void AddOuts(const MatMulArgs& args, const MatMulPart& part, int64_t out, int64_t count, int64_t k,
                        int64_t depth, const W* w, int64_t w_stride) {
  if (count == kTileOuts) {
    return AddRows<kTileOuts, W>(args, part.row_begin, part.row_end, out, k, depth, w, w_stride);
  }
  for (int64_t o = 0; o < count; ++o) {
    AddRows<1, W>(args, part.row_begin, part.row_end, out + o, k, depth, w + o * w_stride, w_stride);
  }
}

// panel[o][k] = w[o][k] as fp32.
template <typename W>
HWY_INLINE void Pack(const W* HWY_RESTRICT w, int64_t w_stride, int64_t count, int64_t depth,
                     float* HWY_RESTRICT panel) {
  const hn::ScalableTag<float> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t o = 0; o < count; ++o) {
    const W* from = w + o * w_stride;
    float* to = panel + o * depth;
    int64_t k = 0;
    for (; k + lanes <= depth; k += lanes) hn::StoreU(LoadFloats(d, from + k), d, to + k);
    const size_t rest = static_cast<size_t>(depth - k);
    if (rest != 0) StoreFirst(d, LoadFirst(d, from + k, rest), to + k, rest);
  }
}

template <typename W>
void MatMulOf(const MatMulArgs& args, const MatMulPart& part, float* panel) {
  const int64_t in = args.weight.cols;
  const W* weight = static_cast<const W*>(args.weight.data);
  if (part.row_end - part.row_begin < kPackRows) {
    // Bound by reading the weights once: along each weight row to its end.
    for (int64_t out = part.out_begin; out < part.out_end; out += kTileOuts) {
      const int64_t count = std::min<int64_t>(kTileOuts, part.out_end - out);
      for (int64_t k = 0; k < in; k += kDepth) {
        AddOuts<W>(args, part, out, count, k, std::min(kDepth, in - k), weight + out * in + k, in);
      }
    }
    return;
  }
  for (int64_t k = 0; k < in; k += kDepth) {
    const int64_t depth = std::min(kDepth, in - k);
    for (int64_t out = part.out_begin; out < part.out_end; out += kTileOuts) {
      const int64_t count = std::min<int64_t>(kTileOuts, part.out_end - out);
      Pack<W>(weight + out * in + k, in, count, depth, panel);
      AddOuts<float>(args, part, out, count, k, depth, panel, depth);
    }
  }
}

void MatMul(const MatMulArgs& args, const MatMulPart& part, float* panel) {
  switch (args.weight.dtype) {
    case DType::kF32:
      return MatMulOf<float>(args, part, panel);
    case DType::kBF16:
      return MatMulOf<hwy::bfloat16_t>(args, part, panel);
    case DType::kF16:
      return MatMulOf<hwy::float16_t>(args, part, panel);
    default:
      return;  // Supports() refuses them
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace atp::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace atp::cpu {
HWY_EXPORT(MatMul);
MatMulFn MatMulFor(int64_t target) { return ATP_FUNCTION_FOR(target, MatMul); }
}  // namespace atp::cpu
#endif
