// What both matrix product kernels share, once per target.
#if defined(ATP_KERNELS_CPU_MATMUL_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ATP_KERNELS_CPU_MATMUL_TILE_INL_H_
#undef ATP_KERNELS_CPU_MATMUL_TILE_INL_H_
#else
#define ATP_KERNELS_CPU_MATMUL_TILE_INL_H_
#endif

#include <algorithm>

#include "hwy/highway.h"
#include "kernels/cpu/load-inl.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/panels.h"

HWY_BEFORE_NAMESPACE();
namespace atp::cpu {
namespace HWY_NAMESPACE {

// A pair of panels is as wide as AVX-512's registers allow; others take one panel at a time.
#if HWY_TARGET == HWY_AVX3
constexpr int kTilePanels = 2;
#else
constexpr int kTilePanels = 1;
#endif

using DF = hn::ScalableTag<float>;
using DI = hn::ScalableTag<int32_t>;
using DU = hn::ScalableTag<uint32_t>;
using VF = hn::Vec<DF>;
using VI = hn::Vec<DI>;
using VU = hn::Vec<DU>;
constexpr int kLanes = static_cast<int>(HWY_LANES(float));
constexpr int kPanelVectors = kPanelOuts / kLanes;

struct Tile {
  int64_t row;    // first
  int64_t panel;  // first
  bool first;     // the first slice of k: starts from bias and residual
};

// Asks for what AddSums of this tile will add to.
template <int R, int P>
HWY_INLINE void FetchSums(const MatMulArgs& args, const Tile& tile) {
  const float* y = args.y + tile.row * args.weight.rows + tile.panel * kPanelOuts;
  ATP_UNROLL for (int r = 0; r < R; ++r) {
    ATP_UNROLL for (int p = 0; p < P; ++p) __builtin_prefetch(y + r * args.weight.rows + p * kPanelOuts, 1);
  }
}

// y[row + r][outs of panel + p] += sums[r][p]. The base is y's own content, or bias and residual.
template <int R, int P>
HWY_INLINE void AddSums(const MatMulArgs& args, const Tile& tile, const float (&sums)[R][P * kPanelOuts]) {
  const DF d;
  const int64_t outs = args.weight.rows;
  const bool add = !tile.first || args.accumulate;
  const bool bias = tile.first && args.bias != nullptr;
  ATP_UNROLL for (int p = 0; p < P; ++p) {
    const int64_t out = (tile.panel + p) * kPanelOuts;
    const int64_t count = std::min<int64_t>(kPanelOuts, outs - out);
    float* const first = args.y + tile.row * outs + out;
    if (count == kPanelOuts && add && !bias) {  // by far the most
      ATP_UNROLL for (int r = 0; r < R; ++r) {
        ATP_UNROLL for (int i = 0; i < kPanelOuts; i += kLanes) {
          float* const y = first + r * outs + i;
          hn::StoreU(hn::Add(hn::LoadU(d, y), hn::LoadU(d, sums[r] + p * kPanelOuts + i)), d, y);
        }
      }
      continue;
    }
    for (int r = 0; r < R; ++r) {
      float* const y = first + r * outs;
      const float* const sum = sums[r] + p * kPanelOuts;
      if (count == kPanelOuts) {
        for (int i = 0; i < kPanelOuts; i += kLanes) {
          VF base = add ? hn::LoadU(d, y + i) : hn::Zero(d);
          if (bias) base = hn::Add(base, hn::LoadU(d, args.bias + out + i));
          hn::StoreU(hn::Add(base, hn::LoadU(d, sum + i)), d, y + i);
        }
      } else {
        for (int64_t i = 0; i < count; ++i) {
          float base = add ? y[i] : 0.0f;
          if (bias) base += args.bias[out + i];
          y[i] = base + sum[i];
        }
      }
    }
  }
}

// Sums of rows [row, row + rows) and a pair of panels that are kept apart from y until they are whole:
// [row][out].
constexpr int kPairOuts = 2 * kPanelOuts;

// What the first slice of k adds to: y or zero, and bias.
HWY_INLINE void StartSums(const MatMulArgs& args, int64_t row, int64_t rows, int64_t panel, float* sums) {
  const DF d;
  const int64_t outs = args.weight.rows, out = panel * kPanelOuts;
  const float* y = args.y + row * outs + out;
  if (out + kPairOuts > outs) {
    for (int64_t r = 0; r < rows; ++r, sums += kPairOuts, y += outs) {
      for (int64_t i = 0; i < outs - out; ++i) {
        const float base = args.accumulate ? y[i] : 0.0f;
        sums[i] = args.bias != nullptr ? base + args.bias[out + i] : base;
      }
    }
    return;
  }
  for (int64_t r = 0; r < rows; ++r, sums += kPairOuts, y += outs) {
    ATP_UNROLL for (int i = 0; i < kPairOuts; i += kLanes) {
      VF base = args.accumulate ? hn::LoadU(d, y + i) : hn::Zero(d);
      if (args.bias != nullptr) base = hn::Add(base, hn::LoadU(d, args.bias + out + i));
      hn::Store(base, d, sums + i);
    }
  }
}

HWY_INLINE void StoreSums(const MatMulArgs& args, int64_t row, int64_t rows, int64_t panel,
                          const float* sums) {
  const DF d;
  const int64_t outs = args.weight.rows, out = panel * kPanelOuts;
  float* y = args.y + row * outs + out;
  for (int64_t r = 0; r < rows; ++r, sums += kPairOuts, y += outs) {
    if (out + kPairOuts > outs) {
      std::copy_n(sums, outs - out, y);
    } else {
      ATP_UNROLL for (int i = 0; i < kPairOuts; i += kLanes) hn::StoreU(hn::Load(d, sums + i), d, y + i);
    }
  }
}

// Calls body.template operator()<R>() with R = rows, which is at most kMax.
template <int kMax, class Body>
HWY_INLINE void WithRows(int64_t rows, const Body& body) {
  if (rows == kMax) return body.template Run<kMax>();
  if constexpr (kMax > 1) WithRows<kMax - 1>(rows, body);
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace atp::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
