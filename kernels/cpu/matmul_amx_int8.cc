// matmul_int8.cc for many rows on processors with AMX: the same integers and the same order of fp32 sums, so
// the same bits, several times as fast. Few rows are bound by reading weights, and stay there.
//
// A tile instruction sums 16 rows times 16 outputs over a block of 32 in the time in which its sums are
// stored, and half of what vector instructions then do with them: so the three go on at once, each some
// blocks behind the other.
#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "kernels/cpu/amx_tiles.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/panels.h"
#include "kernels/quantized.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/matmul_amx_int8.cc"
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
HWY_PUSH_ATTRIBUTES(HWY_TARGET_STR ",amx-tile,amx-int8")
namespace atp::cpu {
namespace HWY_NAMESPACE {
namespace amx_int8 {

constexpr int64_t kPrefetchBytes = 0;  // of loaders that are not used here
#include "kernels/cpu/matmul_int8_load-inl.h"
#include "kernels/cpu/matmul_int8_rows-inl.h"

constexpr int P = kTilePanels;
// A turn is eight steps, a step what one scale is for: a block, or half of one.
constexpr int kTurnSteps = 8;

// A slice of a panel as signed integers, units of 64 bytes as in panels.h, and its scales.
struct Unpacked {
  alignas(64) int8_t bytes[kSliceBlocks * 512];
  alignas(64) float scales[kSliceBlocks * 2 * kPanelOuts];  // [block][half][out]
  alignas(64) float mins[kSliceBlocks * kPanelOuts];
};
struct Room {
  Unpacked panels[P];
  alignas(64) int32_t dots[kTurnSteps][kTileSums * kPanelOuts];  // on their way from AMX to the vector units
  alignas(64) float sums[kPartRows][kPairOuts];
};
static_assert(sizeof(Room) <= kMatMulScratchBytes);

template <DType kType>
constexpr int kStepsPerBlock = PackedLoader<kType>::kHalves ? 2 : 1;

// What a loader's integers are more than the weight's own.
template <DType kType>
constexpr uint8_t kZero = kType == DType::kQ8_0 || kType == DType::kQ4 ? 128
                          : kType == DType::kQ4_0                      ? 8
                          : kType == DType::kQ6_K                      ? 32
                                                                       : 0;

template <DType kType>
HWY_INLINE void Unpack(const PackedLoader<kType>& from, int64_t begin, int64_t end, Unpacked& to) {
  const hn::Repartition<uint8_t, DU> d8;
  const auto zero = hn::Set(d8, kZero<kType>);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t at = b - begin;
    ATP_UNROLL for (int j = 0; j < 8; ++j) {
      const auto bytes = hn::Sub(hn::BitCast(d8, from.Bytes(b, j, 0)), zero);
      hn::Store(bytes, d8, reinterpret_cast<uint8_t*>(to.bytes + at * 512 + j * 64));
    }
    for (int half = 0; half < (from.kHalves ? 2 : 1); ++half) {
      hn::Store(from.Scale(b, half, 0), DF(), to.scales + (at * 2 + half) * kPanelOuts);
    }
    if constexpr (PackedLoader<kType>::kMins) hn::Store(from.Min(b, 0), DF(), to.mins + at * kPanelOuts);
  }
  // The rest of the last turn counts nothing. (K-quants have none.)
  for (int64_t at = end - begin; at % kTurnSteps != 0; ++at) {
    std::fill_n(to.bytes + at * 512, 512, int8_t{0});
    std::fill_n(to.scales + at * 2 * kPanelOuts, 2 * kPanelOuts, 0.0f);
  }
}

// Eight steps of one tile of x, [block][row][32 elements], and one panel.
struct Turn {
  const int8_t* x;
  const int8_t* weights;
  const float* scales;  // as in Unpacked
  const float* mins;
  const uint32_t* about;  // RowWords of its first block
  float* sums;            // of the panel in Room::sums, where the turn ends a slice; else null
  bool ends_group;
};

// Asks for a slice of a pair of panels, a few lines with every turn: bursts would hold up the turns' own
// loads.
class NextSlice {
 public:
  template <DType kType>
  void Add(const PackedLoader<kType>& panel, int64_t begin, int64_t end) {
    constexpr int64_t kBytes = PackedLoader<kType>::kBlockBytes;
    ranges_[count_++] = {panel.quants + begin * kBytes, (end - begin) * kBytes};
    ranges_[count_++] = {panel.scales + begin * 32, (end - begin) * 32};
    if constexpr (kType == DType::kQ5_K || kType == DType::kQ6_K) {
      constexpr int64_t kHighBytes = kType == DType::kQ5_K ? 64 : 128;
      ranges_[count_++] = {panel.high + begin * kHighBytes, (end - begin) * kHighBytes};
    }
  }
  void SpreadOver(int64_t turns) {
    int64_t bytes = 0;
    for (int i = 0; i < count_; ++i) bytes += ranges_[i].bytes;
    lines_per_turn_ = (bytes / 64 + count_ + turns - 1) / turns;
  }
  HWY_INLINE void Fetch() {
    for (int64_t i = 0; i < lines_per_turn_ && at_ < count_; ++i) {
      __builtin_prefetch(ranges_[at_].from + done_, 0, /*locality=*/2);  // into the second-level cache
      done_ += 64;
      if (done_ >= ranges_[at_].bytes) ++at_, done_ = 0;
    }
  }

 private:
  struct Range {
    const uint8_t* from;
    int64_t bytes;
  };
  Range ranges_[3 * P];
  int count_ = 0, at_ = 0;
  int64_t done_ = 0, lines_per_turn_ = 0;
};

// acc[r] += what AMX left of step kStep of a turn.
template <int R, DType kType, int kStep>
HWY_INLINE void AddStep(const Turn& turn, int64_t count, const int32_t* HWY_RESTRICT from, VF (&acc)[R]) {
  constexpr int kHalves = kStepsPerBlock<kType>;
  constexpr int kBlock = kStep / kHalves;
  const DF d;
  const VF scale = hn::Load(d, turn.scales + (kBlock * 2 + kStep % kHalves) * kPanelOuts);
  ATP_UNROLL for (int r = 0; r < R; ++r) {
    acc[r] = hn::MulAdd(hn::ConvertTo(d, hn::Load(DI(), from + r * kPanelOuts)), scale, acc[r]);
  }
  if constexpr (PackedLoader<kType>::kMins) {
    const VF min = hn::Load(d, turn.mins + kBlock * kPanelOuts);
    const float* HWY_RESTRICT x_sum =
        reinterpret_cast<const float*>(turn.about + (kBlock * kRowWords + kRowSum) * count);
    ATP_UNROLL for (int r = 0; r < R; ++r) acc[r] = hn::NegMulAdd(min, hn::Set(d, x_sum[r]), acc[r]);
  }
}

// totals += acc · the scale of each row, which all blocks of a group have.
template <int R>
HWY_INLINE void EndGroup(const Turn& turn, int64_t count, VF (&acc)[R],
                         float (&totals)[kTileSums][kPanelOuts]) {
  const DF d;
  const float* HWY_RESTRICT scale = reinterpret_cast<const float*>(turn.about + kRowScale * count);
  ATP_UNROLL for (int r = 0; r < R; ++r) {
    hn::Store(hn::MulAdd(acc[r], hn::Set(d, scale[r]), hn::Load(d, totals[r])), d, totals[r]);
    acc[r] = hn::Zero(d);
  }
}

HWY_INLINE void EndSlice(const Turn& turn, int64_t count, float (&totals)[kTileSums][kPanelOuts]) {
  const DF d;
  for (int64_t r = 0; r < count; ++r) {
    float* const sum = turn.sums + r * kPairOuts;
    hn::Store(hn::Add(hn::Load(d, sum), hn::Load(d, totals[r])), d, sum);
  }
  for (float(&total)[kPanelOuts] : totals) hn::Store(hn::Zero(d), d, total);
}

// Tiles of `count` rows, from `row` on, times blocks [begin, end) of a pair of panels.
struct SliceProduct {
  const PackedRows& rows;
  Room& room;
  int64_t begin, end;
  int64_t row, count, tiles;
  float* sums;  // the first tile's in room
};

template <int R, DType kType>
HWY_NOINLINE void MultiplyTiles(const SliceProduct& slice, NextSlice& next) {
  constexpr int kHalves = kStepsPerBlock<kType>;
  constexpr int kTurnBlocks = kTurnSteps / kHalves;
  const DF d;
  const int64_t count = slice.count, blocks = slice.end - slice.begin;
  auto& dots = slice.room.dots;
  alignas(64) float totals[kTileSums][kPanelOuts];
  for (float(&total)[kPanelOuts] : totals) hn::Store(hn::Zero(d), d, total);
  VF acc[R];
  ATP_UNROLL for (int r = 0; r < R; ++r) acc[r] = hn::Zero(d);
  // Before the first turn lies one that counts nothing.
  alignas(64) static constexpr float kNothing[kTurnSteps * 2 * kPanelOuts * kRowWords] = {};
  Turn before{nullptr, nullptr, kNothing, kNothing, reinterpret_cast<const uint32_t*>(kNothing),
              nullptr, false};
  Turn now = before;

  // GCC wants tile registers by number. Sums are stored three steps after they were made, and added after
  // five.
#define ATP_AMX_STEP(s, sum_tile, x_tile, weight_tile, stored_tile)                    \
  _tile_zero(sum_tile);                                                                \
  _tile_loadd(x_tile, now.x + s / kHalves * 32 * count + s % kHalves * 16, 32);        \
  _tile_loadd(weight_tile, now.weights + s / kHalves * 512 + s % kHalves * 256, 64);   \
  _tile_dpbssd(sum_tile, x_tile, weight_tile);                                         \
  _tile_stored(stored_tile, dots[(s + 5) % kTurnSteps], kPanelOuts * sizeof(int32_t)); \
  AddStep<R, kType, (s + 3) % kTurnSteps>(s < 5 ? before : now, count, dots[(s + 3) % kTurnSteps], acc);
#define ATP_AMX_FIRST_STEPS                                       \
  ATP_AMX_STEP(0, 0, 4, 6, 1)                                     \
  ATP_AMX_STEP(1, 1, 5, 7, 2)                                     \
  ATP_AMX_STEP(2, 2, 4, 6, 3)                                     \
  ATP_AMX_STEP(3, 3, 5, 7, 0)                                     \
  ATP_AMX_STEP(4, 0, 4, 6, 1)                                     \
  if (before.ends_group) EndGroup<R>(before, count, acc, totals); \
  if (before.sums != nullptr) EndSlice(before, count, totals);

  // Panels outside: one's slice, the x of one tile, and dots fit the first-level cache together.
  for (int p = 0; p < P; ++p) {
    const Unpacked& panel = slice.room.panels[p];
    for (int64_t t = 0; t < slice.tiles; ++t) {
      const int64_t row = slice.row + t * count;
      const auto* const x =
          reinterpret_cast<const int8_t*>(slice.rows.words + row * slice.rows.words_per_row) +
          slice.begin * 32 * count;
      const uint32_t* const about =
          slice.rows.block_words + row * slice.rows.block_words_per_row + slice.begin * kRowWords * count;
      for (int64_t block = 0; block < blocks; block += kTurnBlocks) {
        next.Fetch();
        const int64_t after = block + kTurnBlocks;
        now = {x + block * 32 * count,
               panel.bytes + block * 512,
               panel.scales + block * 2 * kPanelOuts,
               panel.mins + block * kPanelOuts,
               about + block * kRowWords * count,
               after < blocks ? nullptr : slice.sums + t * count * kPairOuts + p * kPanelOuts,
               after >= blocks || after % kRowGroupBlocks == 0};
        ATP_AMX_FIRST_STEPS
        ATP_AMX_STEP(5, 1, 5, 7, 2)
        ATP_AMX_STEP(6, 2, 4, 6, 3)
        ATP_AMX_STEP(7, 3, 5, 7, 0)
        before = now;
      }
    }
  }
  ATP_AMX_FIRST_STEPS  // what is still on its way; the last turn begins once more, for nothing
#undef ATP_AMX_FIRST_STEPS
#undef ATP_AMX_STEP
}

// Blocks [begin, end) of a pair of panels times all rows of the part. `next` is asked of memory meanwhile.
template <DType kType>
HWY_INLINE void MultiplySlice(const MatMulArgs& args, const PackedRows& rows, const MatMulPart& part,
                              int64_t panel, int64_t begin, int64_t end, NextSlice& next, Room& room) {
  constexpr int kXBytes = PackedLoader<kType>::kHalves ? 16 : 32;
  const PanelLayout layout(kType, args.weight.cols);
  for (int p = 0; p < P; ++p) {
    Unpack<kType>(PackedLoader<kType>(layout, args.weight.data, panel + p), begin, end, room.panels[p]);
  }
  // Tiles of equal size, and perhaps one that is smaller.
  for (int64_t row = part.row_begin; row < part.row_end;) {
    const int64_t count = std::min<int64_t>(rows.tile_rows, part.row_end - row);
    const int64_t tiles = (part.row_end - row) / count;
    const TileConfig config(count, count, kXBytes);
    _tile_loadconfig(&config);
    const SliceProduct slice{rows, room, begin, end, row, count, tiles, room.sums[row - part.row_begin]};
    if (count <= kTileSums / 2) {
      MultiplyTiles<kTileSums / 2, kType>(slice, next);
    } else {
      MultiplyTiles<kTileSums, kType>(slice, next);
    }
    row += tiles * count;
  }
}

template <DType kType>
HWY_NOINLINE void MultiplyOf(const MatMulArgs& args, const PackedRows& rows, const MatMulPart& part,
                             Room& room) {
  const PanelLayout layout(kType, args.weight.cols);
  const int64_t blocks = args.weight.cols / kQuantBlock;
  const int64_t part_rows = part.row_end - part.row_begin;
  for (int64_t panel = part.panel_begin; panel < part.panel_end; panel += P) {
    StartSums(args, part.row_begin, part_rows, panel, room.sums[0]);
    for (int64_t b = 0; b < blocks; b += kSliceBlocks) {
      const int64_t end = std::min(b + kSliceBlocks, blocks);
      const bool last = end == blocks;
      const int64_t next_begin = last ? 0 : end, next_end = std::min(next_begin + kSliceBlocks, blocks);
      NextSlice next;
      for (int p = 0; p < P; ++p) {
        next.Add(PackedLoader<kType>(layout, args.weight.data, panel + p + (last ? P : 0)), next_begin,
                 next_end);
      }
      next.SpreadOver(P * ((part_rows + rows.tile_rows - 1) / rows.tile_rows) *
                      ((end - b) * kStepsPerBlock<kType> + kTurnSteps - 1) / kTurnSteps);
      MultiplySlice<kType>(args, rows, part, panel, b, end, next, room);
    }
    StoreSums(args, part.row_begin, part_rows, panel, room.sums[0]);
  }
  _tile_release();
}

void Multiply(const MatMulArgs& args, const PackedRows& rows, const MatMulPart& part, std::byte* scratch) {
  Room& room = *reinterpret_cast<Room*>(scratch);
  switch (args.weight.dtype) {
    case DType::kQ8_0:
      return MultiplyOf<DType::kQ8_0>(args, rows, part, room);
    case DType::kQ4_0:
      return MultiplyOf<DType::kQ4_0>(args, rows, part, room);
    case DType::kQ4:
      return MultiplyOf<DType::kQ4>(args, rows, part, room);
    case DType::kQ4_K:
      return MultiplyOf<DType::kQ4_K>(args, rows, part, room);
    case DType::kQ5_K:
      return MultiplyOf<DType::kQ5_K>(args, rows, part, room);
    case DType::kQ6_K:
      return MultiplyOf<DType::kQ6_K>(args, rows, part, room);
    default:
      return;  // another kernel's
  }
}

void PackRows(const MatMulArgs& args, const PackedRows& rows, int64_t begin, int64_t end) {
  const int64_t cols = args.weight.cols, blocks = cols / kQuantBlock;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = t * rows.tile_rows;
    const int64_t count = std::min<int64_t>(rows.tile_rows, args.rows - first);
    int8_t* const x = reinterpret_cast<int8_t*>(rows.words + first * rows.words_per_row);
    uint32_t* const about = rows.block_words + first * rows.block_words_per_row;
    for (int64_t group = 0; group < blocks; group += kRowGroupBlocks) {
      const int64_t some = std::min(kRowGroupBlocks, blocks - group);
      for (int64_t r = 0; r < count; ++r) {
        alignas(64) int8_t q[kRowGroupBlocks * kQuantBlock];
        QuantizeGroup(args.x + (first + r) * cols + group * kQuantBlock, some, count, q,
                      about + group * kRowWords * count + r);
        for (int64_t b = 0; b < some; ++b) {
          std::memcpy(x + ((group + b) * count + r) * kQuantBlock, q + b * kQuantBlock, kQuantBlock);
        }
      }
    }
  }
}

}  // namespace amx_int8
// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace atp::cpu
HWY_POP_ATTRIBUTES
#endif

HWY_BEFORE_NAMESPACE();
namespace atp::cpu {
namespace HWY_NAMESPACE {

MatMulKernel AmxInt8Kernel() {
#if HWY_TARGET == HWY_AVX3
  return {RowForm::kInt8, kTileSums, kTileSums, 1, amx_int8::PackRows, amx_int8::Multiply, kTileRowsPerPart};
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
HWY_EXPORT(AmxInt8Kernel);
MatMulKernel AmxInt8MatMulFor(const Isa& isa) {
  return isa.amx ? ATP_FUNCTION_FOR(isa.target, AmxInt8Kernel)() : MatMulKernel{};
}
}  // namespace atp::cpu
#endif
