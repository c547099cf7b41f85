// y = x·Wᵀ for weights kept as f32, bf16 or f16. Lanes are outputs: an element of x, broadcast, meets 16 or
// 32 weights at once.
//
// Why y[r][o] is bit-identical in every batch: it has one accumulator of its own, filled in order of k with
// fused (or, on targets without FMA, unfused) multiply-adds, emptied into y at fixed multiples of kSlice. No
// choice below (tile, part, thread, converting in registers or beforehand) changes that order.
#include <algorithm>
#include <bit>

#include "kernels/cpu/ops.h"
#include "kernels/cpu/panels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/matmul_float.cc"
// foreach_target.h must come first.
// clang-format off
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "hwy/cache_control.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/load-inl.h"
#include "kernels/cpu/matmul_tile-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace atp::cpu {
namespace HWY_NAMESPACE {

// Sums of a tile: 16 registers of AVX-512's 32, 12 of AVX2's 16.
#if HWY_TARGET == HWY_AVX3
constexpr int kTileRows = 8;
#elif HWY_TARGET == HWY_AVX2
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 2;
#endif
// Elements of k per slice: a pair of panels in fp32 (32 KB) and a tile's x stay in the first-level cache.
constexpr int64_t kSlice = 256;
// How far ahead weights are asked for: some KB, about memory's latency times a core's share of its bandwidth.
constexpr int64_t kPrefetch = 128;

// Loaders: Load(k, v, out) gives vector v of the panel's weights at k, k + 1, …, k + kStep - 1.
struct F32Loader {
  static constexpr int kStep = 1;
  HWY_INLINE void Load(int64_t k, int v, VF* out) const {
    out[0] = hn::LoadU(DF(), data + k * kPanelOuts + v * kLanes);
  }
  HWY_INLINE void Prefetch(int64_t k) const { hwy::Prefetch(data + k * kPanelOuts); }
  const float* data;
};

struct F16Loader {
  static constexpr int kStep = 1;
  HWY_INLINE void Load(int64_t k, int v, VF* out) const {
    out[0] = LoadFloats(DF(), data + k * kPanelOuts + v * kLanes);
  }
  HWY_INLINE void Prefetch(int64_t k) const { hwy::Prefetch(data + k * kPanelOuts); }
  const hwy::float16_t* data;
};

// Past an odd last k there are zeros, in the panel and in x.
struct BF16Loader {
  static constexpr int kStep = 2;
  HWY_INLINE void Load(int64_t k, int v, VF* out) const {
    const VU pair = hn::LoadU(DU(), data + k / 2 * kPanelOuts + v * kLanes);
    out[0] = hn::BitCast(DF(), hn::ShiftLeft<16>(pair));
    out[1] = hn::BitCast(DF(), hn::And(pair, hn::Set(DU(), 0xffff0000u)));
  }
  HWY_INLINE void Prefetch(int64_t k) const { hwy::Prefetch(data + k / 2 * kPanelOuts); }
  const uint32_t* data;  // pairs
};

// x: the tile's, [k][R]; k in [begin, end).
template <int R, int P, class L>
HWY_INLINE void SumProducts(const L (&loaders)[P], const float* HWY_RESTRICT x, int64_t begin, int64_t end,
                            float (&sums)[R][P * kPanelOuts]) {
  constexpr int V = P * kPanelVectors;
  constexpr int S = L::kStep;
  const DF d;
  VF acc[R][V];
  ATP_UNROLL for (int r = 0; r < R; ++r) { ATP_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = hn::Zero(d); }
  for (int64_t k = begin; k < end; k += S) {
    ATP_UNROLL for (int p = 0; p < P; ++p) loaders[p].Prefetch(k + kPrefetch);
    VF weight[V][S];
    ATP_UNROLL for (int v = 0; v < V; ++v) loaders[v / kPanelVectors].Load(k, v % kPanelVectors, weight[v]);
    ATP_UNROLL for (int s = 0; s < S; ++s) {
      ATP_UNROLL for (int r = 0; r < R; ++r) {
        const VF value = hn::Set(d, x[(k + s) * R + r]);
        ATP_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = hn::MulAdd(value, weight[v][s], acc[r][v]);
      }
    }
  }
  ATP_UNROLL for (int r = 0; r < R; ++r) {
    ATP_UNROLL for (int v = 0; v < V; ++v) hn::StoreU(acc[r][v], d, sums[r] + v * kLanes);
  }
}

// One tile of rows times P panels, k in [begin, end).
template <int P, class L>
struct TileProduct {
  const MatMulArgs& args;
  const PackedRows& rows;
  const L (&loaders)[P];
  Tile tile;
  int64_t begin, end;

  template <int R>
  HWY_NOINLINE void Run() const {
    float sums[R][P * kPanelOuts];
    const uint32_t* words = rows.words + tile.row * rows.words_per_row;
    SumProducts<R, P, L>(loaders, reinterpret_cast<const float*>(words), begin, end, sums);
    AddSums<R, P>(args, tile, sums);
  }
};

// The panel's k in [begin, end) as [k][16] fp32. The loader that reads it counts from the panel's start.
template <class L>
HWY_INLINE void Convert(const L& from, int64_t begin, int64_t end, float* to) {
  for (int64_t k = begin; k < end; k += L::kStep, to += L::kStep * kPanelOuts) {
    from.Prefetch(k + kPrefetch);
    for (int v = 0; v < kPanelVectors; ++v) {
      VF out[L::kStep];
      from.Load(k, v, out);
      ATP_UNROLL for (int s = 0; s < L::kStep; ++s) {
        hn::Store(out[s], DF(), to + s * kPanelOuts + v * kLanes);
      }
    }
  }
}

// A slice that was converted beforehand.
struct SliceLoader {
  static constexpr int kStep = 1;
  HWY_INLINE void Load(int64_t k, int v, VF* out) const {
    out[0] = hn::LoadU(DF(), data + (k - first) * kPanelOuts + v * kLanes);
  }
  HWY_INLINE void Prefetch(int64_t) const {}  // in the first-level cache already
  const float* data = nullptr;
  int64_t first = 0;
};

template <class L, typename T>
void MultiplyOf(const MatMulArgs& args, const PackedRows& rows, const MatMulPart& part, std::byte* scratch) {
  const PanelLayout layout(args.weight.dtype, args.weight.cols);
  const std::byte* data = static_cast<const std::byte*>(args.weight.data);
  const int64_t depth = (args.weight.cols + L::kStep - 1) / L::kStep * L::kStep;
  const auto panel_at = [&](int64_t panel) {
    return L{reinterpret_cast<const T*>(data + static_cast<size_t>(panel) * layout.bytes)};
  };
  if (part.row_end - part.row_begin <= rows.tile_rows) {
    // Bound by reading the weights: each once, from front to back, converted in registers.
    const int64_t panel_end = std::min(part.panel_end, (args.weight.rows + kPanelOuts - 1) / kPanelOuts);
    for (int64_t panel = part.panel_begin; panel < panel_end; ++panel) {
      const L loaders[1] = {panel_at(panel)};
      for (int64_t k = 0; k < depth; k += kSlice) {
        WithRows<kTileRows>(
            part.row_end - part.row_begin,
            TileProduct<1, L>{
                args, rows, loaders, {part.row_begin, panel, k == 0}, k, std::min(k + kSlice, depth)});
      }
    }
    return;
  }
  for (int64_t panel = part.panel_begin; panel < part.panel_end; panel += kTilePanels) {
    for (int64_t k = 0; k < depth; k += kSlice) {
      const int64_t end = std::min(k + kSlice, depth);
      SliceLoader loaders[kTilePanels];
      for (int p = 0; p < kTilePanels; ++p) {
        loaders[p] = {reinterpret_cast<float*>(scratch) + p * kSlice * kPanelOuts, k};
        Convert(panel_at(panel + p), k, end, const_cast<float*>(loaders[p].data));
      }
      for (int64_t row = part.row_begin; row < part.row_end; row += rows.tile_rows) {
        WithRows<kTileRows>(
            std::min<int64_t>(rows.tile_rows, part.row_end - row),
            TileProduct<kTilePanels, SliceLoader>{args, rows, loaders, {row, panel, k == 0}, k, end});
      }
    }
  }
}

void Multiply(const MatMulArgs& args, const PackedRows& rows, const MatMulPart& part, std::byte* scratch) {
  switch (args.weight.dtype) {
    case DType::kF32:
      return MultiplyOf<F32Loader, float>(args, rows, part, scratch);
    case DType::kBF16:
      return MultiplyOf<BF16Loader, uint32_t>(args, rows, part, scratch);
    case DType::kF16:
      return MultiplyOf<F16Loader, hwy::float16_t>(args, rows, part, scratch);
    default:
      return;  // quantised: another kernel
  }
}

void PackRows(const MatMulArgs& args, const PackedRows& rows, int64_t begin, int64_t end) {
  const int64_t cols = args.weight.cols;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t row = t * rows.tile_rows;
    const int64_t count = std::min<int64_t>(rows.tile_rows, args.rows - row);
    const float* x = args.x + row * cols;
    float* to = reinterpret_cast<float*>(rows.words + row * rows.words_per_row);
    for (int64_t k = 0; k < rows.words_per_row; ++k, to += count) {
      for (int64_t r = 0; r < count; ++r) to[r] = k < cols ? x[r * cols + k] : 0.0f;
    }
  }
}

MatMulKernel FloatKernel() { return {RowForm::kF32, kTileRows, kTileRows, 4, PackRows, Multiply}; }

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace atp::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace atp::cpu {
HWY_EXPORT(FloatKernel);
MatMulKernel FloatMatMulFor(const Isa& isa) { return ATP_FUNCTION_FOR(isa.target, FloatKernel)(); }
}  // namespace atp::cpu
#endif
