// matmul_bf16.cc on processors with AMX: y = x·Wᵀ for bf16 weights with x rounded to bf16 too.
//
// Of every batch, rows are computed here, whatever their number, because AMX adds in an order of its own: per
// 32 elements of k the even ones and the odd ones apart. A slice of k is summed onto what y holds, slices lie
// at fixed multiples of kSlice, and no row of a tile knows of another: so y[r] has the same bits in every
// batch.
#include <algorithm>
#include <cstring>

#include "kernels/cpu/amx_tiles.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/panels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/matmul_amx_bf16.cc"
// foreach_target.h must come first.
// clang-format off
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "hwy/cache_control.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/load-inl.h"
#include "kernels/cpu/matmul_tile-inl.h"
// clang-format on

// Highway 1.0.3 has no name for a target with these instructions.
#if HWY_TARGET == HWY_AVX3
HWY_PUSH_ATTRIBUTES(HWY_TARGET_STR ",avx512bf16,amx-tile,amx-bf16")
namespace atp::cpu {
namespace HWY_NAMESPACE {
namespace amx_bf16 {

constexpr int P = kTilePanels;
constexpr int64_t kStep = 32;  // elements of k that an instruction sums
constexpr int64_t kSlice = 8;  // steps: both panels' 32 KB stay in the first-level cache
constexpr int64_t kStepBytes = kStep * kPanelOuts * 2;  // of a panel
// Where a part's x is larger than this, so many pairs of panels take turns with a slice of it, which so comes
// from the second-level cache; the sums of all wait there, too.
constexpr int64_t kLargeX = 1280 << 10;
constexpr int64_t kGroupPairs = 8;
constexpr int64_t kRowsPerPart = 256;

// Lines of the next slice's weights, a share with every step.
struct NextSlice {
  HWY_INLINE void Fetch() {
    for (int64_t i = 0; i < lines_per_step && at < end; ++i, at += 64) {
      ATP_UNROLL for (int p = 0; p < P; ++p) __builtin_prefetch(panels[p] + at, 0, 2);
    }
  }
  const std::byte* panels[P] = {};
  int64_t at = 0, end = 0, lines_per_step = 0;
};

struct Slice {
  const std::byte* weights[P];  // of its first step
  int64_t steps;
  NextSlice next;
};

// Two tiles of rows, or one (kTiles), times a pair of panels. sums: [row][outs of both panels]
template <int kTiles>
HWY_INLINE void MultiplyTiles(const PackedRows& rows, int64_t row, const int64_t (&count)[2],
                              int64_t first_step, Slice& slice, float* sums) {
  constexpr int64_t kSumBytes = kPairOuts * sizeof(float);
  float* const below = sums + count[0] * kPairOuts;
  _tile_loadd(0, sums, kSumBytes);
  _tile_loadd(1, sums + kPanelOuts, kSumBytes);
  if constexpr (kTiles == 2) {
    _tile_loadd(2, below, kSumBytes);
    _tile_loadd(3, below + kPanelOuts, kSumBytes);
  }
  const int64_t x_bytes = kStep * 2;
  const std::byte* x0 = reinterpret_cast<const std::byte*>(rows.words + row * rows.words_per_row) +
                        first_step * x_bytes * count[0];
  const std::byte* x1 =
      reinterpret_cast<const std::byte*>(rows.words + (row + count[0]) * rows.words_per_row) +
      first_step * x_bytes * count[1];
  for (int64_t step = 0; step < slice.steps; ++step) {
    slice.next.Fetch();
    _tile_loadd(4, x0 + step * x_bytes * count[0], x_bytes);
    _tile_loadd(6, slice.weights[0] + step * kStepBytes, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, slice.weights[1] + step * kStepBytes, 64);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTiles == 2) {
      _tile_loadd(5, x1 + step * x_bytes * count[1], x_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kSumBytes);
  _tile_stored(1, sums + kPanelOuts, kSumBytes);
  if constexpr (kTiles == 2) {
    _tile_stored(2, below, kSumBytes);
    _tile_stored(3, below + kPanelOuts, kSumBytes);
  }
}

// Where the sums of a group's pair of panels are: [pair][row of the part][outs of both panels].
struct GroupSums {
  HWY_INLINE float* Of(int64_t panel) const { return sums + (panel - first_panel) / P * rows * kPairOuts; }
  float* sums;
  int64_t first_panel, rows;
};

// A slice of k times all rows of the part, for one pair of panels.
HWY_INLINE void MultiplyRows(const PackedRows& rows, const MatMulPart& part, int64_t first_step, Slice& slice,
                             float* sums, int64_t (&configured)[2]) {
  for (int64_t row = part.row_begin; row < part.row_end; row += 2 * rows.tile_rows) {
    const int64_t left = part.row_end - row;
    const int64_t count[2] = {std::min<int64_t>(rows.tile_rows, left),
                              std::clamp<int64_t>(left - rows.tile_rows, 0, rows.tile_rows)};
    if (count[0] != configured[0] || count[1] != configured[1]) {
      const TileConfig config(count[0], std::max<int64_t>(count[1], 1), kStep * 2);
      _tile_loadconfig(&config);
      configured[0] = count[0], configured[1] = count[1];
    }
    float* const row_sums = sums + (row - part.row_begin) * kPairOuts;
    if (count[1] > 0) {
      MultiplyTiles<2>(rows, row, count, first_step, slice, row_sums);
    } else {
      MultiplyTiles<1>(rows, row, count, first_step, slice, row_sums);
    }
  }
}

void Multiply(const MatMulArgs& args, const PackedRows& rows, const MatMulPart& part, std::byte* scratch) {
  static_assert((kRowsPerPart + kTileSums) * kGroupPairs * kPairOuts * sizeof(float) <= kMatMulScratchBytes);
  const int64_t steps = args.weight.cols / kStep;
  const std::byte* const matrix = static_cast<const std::byte*>(args.weight.data);
  const int64_t all_rows = part.row_end - part.row_begin;
  const int64_t turns = (all_rows + 2 * rows.tile_rows - 1) / (2 * rows.tile_rows);
  const auto weights = [&](int64_t panel, int64_t step) {
    return matrix + (panel * steps + step) * kStepBytes;
  };
  const int64_t x_bytes = all_rows * rows.words_per_row * int64_t{sizeof(uint32_t)};
  const int64_t group_panels = (x_bytes > kLargeX ? kGroupPairs : 1) * P;
  int64_t configured[2] = {0, 0};
  for (int64_t group = part.panel_begin; group < part.panel_end; group += group_panels) {
    const int64_t group_end = std::min(group + group_panels, part.panel_end);
    const GroupSums sums{reinterpret_cast<float*>(scratch), group, all_rows};
    for (int64_t panel = group; panel < group_end; panel += P)
      StartSums(args, part.row_begin, all_rows, panel, sums.Of(panel));
    for (int64_t step = 0; step < steps; step += kSlice) {
      for (int64_t panel = group; panel < group_end; panel += P) {
        // Behind a pair's slice comes the next pair's, behind the last one's the next slice of the first.
        const bool last_pair = panel + P >= group_end, last_slice = step + kSlice >= steps;
        const int64_t next_panel = !last_pair ? panel + P : last_slice ? group_end : group;
        const int64_t next_step = !last_pair ? step : last_slice ? 0 : step + kSlice;
        Slice slice;
        slice.steps = std::min(kSlice, steps - step);
        for (int p = 0; p < P; ++p) {
          slice.weights[p] = weights(panel + p, step);
          slice.next.panels[p] = weights(next_panel + p, next_step);
        }
        slice.next.end = std::min(kSlice, steps) * kStepBytes;
        slice.next.lines_per_step = (slice.next.end / 64 + turns * slice.steps - 1) / (turns * slice.steps);
        MultiplyRows(rows, part, step, slice, sums.Of(panel), configured);
      }
    }
    for (int64_t panel = group; panel < group_end; panel += P)
      StoreSums(args, part.row_begin, all_rows, panel, sums.Of(panel));
  }
  _tile_release();
}

// [tile][step][row of the tile][32 elements]
void PackRows(const MatMulArgs& args, const PackedRows& rows, int64_t begin, int64_t end) {
  const int64_t cols = args.weight.cols;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t row = t * rows.tile_rows;
    const int64_t count = std::min<int64_t>(rows.tile_rows, args.rows - row);
    auto* const to = reinterpret_cast<uint16_t*>(rows.words + row * rows.words_per_row);
    for (int64_t r = 0; r < count; ++r) {
      const float* x = args.x + (row + r) * cols;
      for (int64_t k = 0; k < cols; k += 16) {
        const __m256i half = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + k));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (k / kStep * count + r) * kStep + k % kStep),
                            half);
      }
    }
  }
}

}  // namespace amx_bf16
// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace atp::cpu
HWY_POP_ATTRIBUTES
#endif

HWY_BEFORE_NAMESPACE();
namespace atp::cpu {
namespace HWY_NAMESPACE {

MatMulKernel AmxBF16Kernel() {
#if HWY_TARGET == HWY_AVX3
  return {RowForm::kBF16,        kTileSums, kTileSums, 2, amx_bf16::PackRows, amx_bf16::Multiply,
          amx_bf16::kRowsPerPart};
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
HWY_EXPORT(AmxBF16Kernel);
MatMulKernel AmxBF16MatMulFor(const Isa& isa) {
  return isa.amx ? ATP_FUNCTION_FOR(isa.target, AmxBF16Kernel)() : MatMulKernel{};
}
}  // namespace atp::cpu
#endif
