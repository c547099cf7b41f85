// y = x·Wᵀ for bf16 weights with x rounded to bf16 too: AVX512-BF16 multiplies two pairs per lane at once.
// Only where that was asked for (BackendOptions::activation_dtype), since it is less exact than
// matmul_float.cc.
//
// y[r][o] has one accumulator, filled in order of k and emptied into y at fixed multiples of kSlice: the same
// bits in every batch.
#include <algorithm>
#include <bit>

#include "kernels/cpu/ops.h"
#include "kernels/cpu/panels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/matmul_bf16.cc"
// foreach_target.h must come first.
// clang-format off
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "hwy/cache_control.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/load-inl.h"
#include "kernels/cpu/matmul_tile-inl.h"
// clang-format on

// Highway 1.0.3 has no name for a target with this instruction.
#if HWY_TARGET == HWY_AVX3
HWY_PUSH_ATTRIBUTES(HWY_TARGET_STR ",avx512bf16")
namespace atp::cpu {
namespace HWY_NAMESPACE {

constexpr int kTileRows = 8;
constexpr int64_t kPrefetch = 64;  // pairs ahead that weights are asked for: 4 KB
constexpr int64_t kSlice =
    256;  // pairs of k: both panels' 32 KB and a tile's x stay in the first-level cache

HWY_INLINE VF DotPairs(VF sum, VU weights, uint32_t x) {
  const __m512i broadcast = _mm512_set1_epi32(static_cast<int>(x));
  return VF{_mm512_dpbf16_ps(sum.raw, (__m512bh)weights.raw, (__m512bh)broadcast)};
}

// One tile of rows times P panels, pairs [begin, end).
template <int P>
struct PairsProduct {
  const MatMulArgs& args;
  const PackedRows& rows;
  const uint32_t* const (&panels)[P];
  Tile tile;
  int64_t begin, end;
  bool fetch;  // later tiles find the weights in the cache

  template <int R>
  HWY_NOINLINE void Run() const {
    const DF d;
    const uint32_t* HWY_RESTRICT words = rows.words + tile.row * rows.words_per_row;
    VF acc[R][P];
    ATP_UNROLL for (int r = 0; r < R; ++r) { ATP_UNROLL for (int p = 0; p < P; ++p) acc[r][p] = hn::Zero(d); }
    for (int64_t k = begin; k < end; ++k) {
      if (fetch) {
        ATP_UNROLL for (int p = 0; p < P; ++p) hwy::Prefetch(panels[p] + (k + kPrefetch) * kPanelOuts);
      }
      VU weight[P];
      ATP_UNROLL for (int p = 0; p < P; ++p) weight[p] = hn::LoadU(DU(), panels[p] + k * kPanelOuts);
      ATP_UNROLL for (int r = 0; r < R; ++r) {
        ATP_UNROLL for (int p = 0; p < P; ++p) acc[r][p] = DotPairs(acc[r][p], weight[p], words[k * R + r]);
      }
    }
    float sums[R][P * kPanelOuts];
    ATP_UNROLL for (int r = 0; r < R; ++r) {
      ATP_UNROLL for (int p = 0; p < P; ++p) hn::StoreU(acc[r][p], d, sums[r] + p * kPanelOuts);
    }
    AddSums<R, P>(args, tile, sums);
  }
};

template <int P>
HWY_INLINE void MultiplyPanels(const MatMulArgs& args, const PackedRows& rows, const MatMulPart& part,
                               int64_t panel) {
  const int64_t pairs = (args.weight.cols + 1) / 2;
  const uint32_t* panels[P];
  for (int p = 0; p < P; ++p) {
    panels[p] = static_cast<const uint32_t*>(args.weight.data) + (panel + p) * pairs * kPanelOuts;
  }
  const uint32_t* const(&fixed)[P] = panels;
  for (int64_t k = 0; k < pairs; k += kSlice) {
    const int64_t end = std::min(k + kSlice, pairs);
    for (int64_t row = part.row_begin; row < part.row_end; row += rows.tile_rows) {
      WithRows<kTileRows>(
          std::min<int64_t>(rows.tile_rows, part.row_end - row),
          PairsProduct<P>{args, rows, fixed, {row, panel, k == 0}, k, end, row == part.row_begin});
    }
  }
}

void MultiplyPairs(const MatMulArgs& args, const PackedRows& rows, const MatMulPart& part,
                   std::byte* /*scratch*/) {
  if (part.row_end - part.row_begin > rows.tile_rows) {
    for (int64_t panel = part.panel_begin; panel < part.panel_end; panel += 2) {
      MultiplyPanels<2>(args, rows, part, panel);
    }
    return;
  }
  const int64_t panel_end = std::min(part.panel_end, (args.weight.rows + kPanelOuts - 1) / kPanelOuts);
  for (int64_t panel = part.panel_begin; panel < panel_end; ++panel)
    MultiplyPanels<1>(args, rows, part, panel);
}

void PackPairs(const MatMulArgs& args, const PackedRows& rows, int64_t begin, int64_t end) {
  const int64_t cols = args.weight.cols;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t row = t * rows.tile_rows;
    const int64_t count = std::min<int64_t>(rows.tile_rows, args.rows - row);
    uint32_t* to = rows.words + row * rows.words_per_row;
    for (int64_t r = 0; r < count; ++r) {
      const float* x = args.x + (row + r) * cols;
      for (int64_t k = 0; k < cols; k += 16) {
        const __m512 sixteen = _mm512_maskz_loadu_ps(
            static_cast<__mmask16>(cols - k < 16 ? (1 << (cols - k)) - 1 : 0xffff), x + k);
        alignas(32) uint32_t pairs[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), (__m256i)_mm512_cvtneps_pbh(sixteen));
        const int64_t left = std::min<int64_t>(8, (cols - k + 1) / 2);
        for (int64_t i = 0; i < left; ++i) to[(k / 2 + i) * count + r] = pairs[i];
      }
    }
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace atp::cpu
HWY_POP_ATTRIBUTES
#endif

HWY_BEFORE_NAMESPACE();
namespace atp::cpu {
namespace HWY_NAMESPACE {

MatMulKernel BF16Kernel() {
#if HWY_TARGET == HWY_AVX3
  return {RowForm::kBF16, kTileRows, kTileRows, 2, PackPairs, MultiplyPairs};
#else
  return {};
#endif
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace atp::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace atp::cpu {
HWY_EXPORT(BF16Kernel);
MatMulKernel BF16MatMulFor(const Isa& isa) {
  return isa.dot16 ? ATP_FUNCTION_FOR(isa.target, BF16Kernel)() : MatMulKernel{};
}
}  // namespace atp::cpu
#endif
