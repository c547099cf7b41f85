// The kernel of matmul_int8.cc and matmul_kquants.cc: included there once or twice per target, each time in a
// namespace of its own, with ATP_DOT8 saying whether VNNI may be used. Every version computes the same
// integers.

// Rows of a tile: as many as the registers hold sums for, twice: a block's integers and a group's fp32.
#if HWY_TARGET == HWY_AVX3
constexpr int kTileRows = 6;
constexpr int kFewRows = 6;   // times one panel
constexpr int kPairRows = 2;  // times two
#else
constexpr int kTileRows = 2;
constexpr int kFewRows = 2;
constexpr int kPairRows = 1;
#endif
// How far ahead a single tile asks for weights: about memory's latency times a core's share of its bandwidth.
constexpr int64_t kPrefetchBytes = 4096;

// Four products per lane of a unit of weights (0..255) and a row's four elements.
#if ATP_DOT8
constexpr int kDotWords = 1;
using Unit = VU;
HWY_INLINE Unit Expand(VU bytes) { return bytes; }
HWY_INLINE VI Dot(VI sum, Unit w, const uint32_t* HWY_RESTRICT x, int /*stride*/) {
  const VU broadcast = hn::Set(DU(), *x);
#if HWY_TARGET == HWY_AVX3
  return VI{_mm512_dpbusd_epi32(sum.raw, w.raw, broadcast.raw)};
#else
  return VI{_mm256_dpbusd_avx_epi32(sum.raw, w.raw, broadcast.raw)};
#endif
}
#else
// As pairs of 16 bits: elements 0 and 2 of a lane, 1 and 3.
constexpr int kDotWords = 2;
struct Unit {
  HWY_INLINE Unit() {}  // GCC does not compile what it writes itself for the target at hand
  HWY_INLINE Unit(VU low, VU high) : even(low), odd(high) {}
  VU even, odd;
};
HWY_INLINE Unit Expand(VU bytes) {
  const VU low = hn::Set(DU(), 0x00ff00ffu);
  return {hn::And(bytes, low), hn::And(hn::ShiftRight<8>(bytes), low)};
}
HWY_INLINE VI DotPairs(VI sum, VU w, VU x) {
  const DI d;
#if HWY_TARGET == HWY_SCALAR
  const VI wi = hn::BitCast(d, w), xi = hn::BitCast(d, x);
  const VI low =
      hn::Mul(hn::ShiftRight<16>(hn::ShiftLeft<16>(wi)), hn::ShiftRight<16>(hn::ShiftLeft<16>(xi)));
  return hn::Add(sum, hn::Add(low, hn::Mul(hn::ShiftRight<16>(wi), hn::ShiftRight<16>(xi))));
#else
  const hn::Repartition<int16_t, DI> d16;
  VI other = hn::Zero(d);
  const VI products =
      hn::ReorderWidenMulAccumulate(d, hn::BitCast(d16, w), hn::BitCast(d16, x), hn::Zero(d), other);
  return hn::Add(sum, hn::RearrangeToOddPlusEven(products, other));
#endif
}
HWY_INLINE VI Dot(VI sum, Unit w, const uint32_t* HWY_RESTRICT x, int stride) {
  const DU d;
  return DotPairs(DotPairs(sum, w.even, hn::Set(d, x[0])), w.odd, hn::Set(d, x[stride]));
}
#endif

#include "kernels/cpu/matmul_int8_load-inl.h"  // here, because they need what is above
#include "kernels/cpu/matmul_int8_rows-inl.h"

// dot[r][.] += units [kFrom, kTo) of block b times row r's elements. words: the block's, of the tile.
template <int R, int P, int kFrom, int kTo, class L>
HWY_INLINE void AddUnits(const L (&loaders)[P], int64_t b, const uint32_t* HWY_RESTRICT words,
                         VI (&dot)[R][P * kPanelVectors]) {
  constexpr int V = P * kPanelVectors;
  ATP_UNROLL for (int j = kFrom; j < kTo; ++j) {
    Unit weight[V];
    ATP_UNROLL for (int v = 0; v < V; ++v) {
      weight[v] = Expand(loaders[v / kPanelVectors].Bytes(b, j, v % kPanelVectors));
    }
    ATP_UNROLL for (int r = 0; r < R; ++r) {
      const uint32_t* x = words + j * kDotWords * R + r;
      ATP_UNROLL for (int v = 0; v < V; ++v) dot[r][v] = Dot(dot[r][v], weight[v], x, R);
    }
  }
}

// acc[r][o] += block b's term, but for the row's scale. words, about: the block's, of the tile.
template <int R, int P, class L>
HWY_INLINE void AddBlock(const L (&loaders)[P], int64_t b, const uint32_t* HWY_RESTRICT words,
                         const uint32_t* HWY_RESTRICT about, VF (&acc)[R][P * kPanelVectors]) {
  constexpr int V = P * kPanelVectors;
  const DF d;
  const DI di;
  const int32_t* offset = reinterpret_cast<const int32_t*>(about + kRowOffset * R);
  const int32_t* half_offset = reinterpret_cast<const int32_t*>(about + kRowHalfFirst * R);
  ATP_UNROLL for (int half = 0; half < (L::kHalves ? 2 : 1); ++half) {
    VI dot[R][V];
    ATP_UNROLL for (int r = 0; r < R; ++r) {
      const VI start = L::kMins     ? hn::Zero(di)
                       : L::kHalves ? hn::Set(di, half_offset[half * R + r])
                                    : hn::ShiftRight<L::kOffsetShift>(hn::Set(di, offset[r]));
      ATP_UNROLL for (int v = 0; v < V; ++v) dot[r][v] = start;
    }
    if constexpr (L::kHalves) {
      if (half == 0) {
        AddUnits<R, P, 0, 4>(loaders, b, words, dot);
      } else {
        AddUnits<R, P, 4, 8>(loaders, b, words, dot);
      }
    } else {
      AddUnits<R, P, 0, 8>(loaders, b, words, dot);
    }
    ATP_UNROLL for (int v = 0; v < V; ++v) {
      const VF scale = loaders[v / kPanelVectors].Scale(b, half, v % kPanelVectors);
      ATP_UNROLL for (int r = 0; r < R; ++r) {
        acc[r][v] = hn::MulAdd(hn::ConvertTo(d, dot[r][v]), scale, acc[r][v]);
      }
    }
  }
  if constexpr (L::kMins) {
    const float* x_sum = reinterpret_cast<const float*>(about + kRowSum * R);
    ATP_UNROLL for (int v = 0; v < V; ++v) {
      const VF min = loaders[v / kPanelVectors].Min(b, v % kPanelVectors);
      ATP_UNROLL for (int r = 0; r < R; ++r) {
        acc[r][v] = hn::NegMulAdd(min, hn::Set(d, x_sum[r]), acc[r][v]);
      }
    }
  }
}

// sums[r][o] = Σ over blocks [begin, end) of the slice.
template <int R, int P, class L, class A>
HWY_INLINE void SumBlocks(const L (&loaders)[P], const uint32_t* HWY_RESTRICT words,
                          const uint32_t* HWY_RESTRICT about, int64_t begin, int64_t end, const A& ahead,
                          float (&sums)[R][P * kPanelOuts]) {
  constexpr int V = P * kPanelVectors;
  const DF d;
  VF total[R][V];
  ATP_UNROLL for (int r = 0; r < R; ++r) { ATP_UNROLL for (int v = 0; v < V; ++v) total[r][v] = hn::Zero(d); }
  for (int64_t group = begin; group < end; group += kRowGroupBlocks) {
    const int64_t group_end = std::min(group + kRowGroupBlocks, end);
    VF acc[R][V];
    ATP_UNROLL for (int r = 0; r < R; ++r) { ATP_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = hn::Zero(d); }
    for (int64_t b = group; b < group_end; ++b) {
      ahead.Fetch(b - begin, end - begin);
      AddBlock<R, P>(loaders, b, words + b * 8 * kDotWords * R, about + b * kRowWords * R, acc);
    }
    const float* const scale = reinterpret_cast<const float*>(about + (group * kRowWords + kRowScale) * R);
    ATP_UNROLL for (int r = 0; r < R; ++r) {
      const VF row_scale = hn::Set(d, scale[r]);
      ATP_UNROLL for (int v = 0; v < V; ++v) total[r][v] = hn::MulAdd(acc[r][v], row_scale, total[r][v]);
    }
  }
  ATP_UNROLL for (int r = 0; r < R; ++r) {
    ATP_UNROLL for (int v = 0; v < V; ++v) hn::StoreU(total[r][v], d, sums[r] + v * kLanes);
  }
}

// One tile of rows times P panels, blocks [begin, end).
template <int P, class L, class A>
struct TileProduct {
  const MatMulArgs& args;
  const PackedRows& rows;
  const L (&loaders)[P];
  const A& ahead;
  Tile tile;
  int64_t begin, end;

  template <int R>
  HWY_NOINLINE void Run() const {
    alignas(64) float sums[R][P * kPanelOuts];
    SumBlocks<R, P>(loaders, rows.words + tile.row * rows.words_per_row,
                    rows.block_words + tile.row * rows.block_words_per_row, begin, end, ahead, sums);
    AddSums<R, P>(args, tile, sums);
  }
};

// Bound by reading the weights: each once, from front to back, unpacked in registers.
template <DType kType, int P, int kMostRows>
HWY_INLINE void MultiplyStreams(const MatMulArgs& args, const PackedRows& rows, const MatMulPart& part,
                                const PanelLayout& layout, int64_t panel) {
  const int64_t blocks = args.weight.cols / kQuantBlock;
  using L = StreamingLoader<kType>;
  L loaders[P];
  for (int p = 0; p < P; ++p) loaders[p] = {PackedLoader<kType>(layout, args.weight.data, panel + p)};
  const L(&fixed)[P] = loaders;
  for (int64_t b = 0; b < blocks; b += kSliceBlocks) {
    const int64_t end = std::min(b + kSliceBlocks, blocks);
    Streaming<P, kType> ahead;
    for (int p = 0; p < P; ++p) ahead.loaders[p] = &loaders[p].from;
    ahead.begin = b + kPrefetchBytes / L::kBlockBytes;
    WithRows<kMostRows>(part.row_end - part.row_begin,
                        TileProduct<P, L, Streaming<P, kType>>{
                            args, rows, fixed, ahead, {part.row_begin, panel, b == 0}, b, end});
  }
}

template <DType kType>
void MultiplyFew(const MatMulArgs& args, const PackedRows& rows, const MatMulPart& part) {
  const PanelLayout layout(kType, args.weight.cols);
  const int64_t panel_end = std::min(part.panel_end, (args.weight.rows + kPanelOuts - 1) / kPanelOuts);
  int64_t panel = part.panel_begin;
  // Panels of 4 bits are short: two at once keep memory busier than one after the other (a tenth faster).
  // Larger ones, or with more beside their quants, do not gain.
  if constexpr (kType == DType::kQ4_0 || kType == DType::kQ4) {
    const bool in_pairs = part.row_end - part.row_begin <= kPairRows;
    for (; in_pairs && panel + 2 <= panel_end; panel += 2) {
      MultiplyStreams<kType, 2, kPairRows>(args, rows, part, layout, panel);
    }
  }
  for (; panel < panel_end; ++panel) {
    MultiplyStreams<kType, 1, kFewRows>(args, rows, part, layout, panel);
  }
}

// A slice of some panels for all tiles of rows. The first unpacks the weights, and each asks for its share of
// the next slice.
template <DType kType>
struct Slices {
  static constexpr int P = kTilePanels;
  using Packed = PackedLoader<kType>;
  using Unpacking = UnpackingLoader<kType>;
  using Unpacked = UnpackedLoader<kType>;

  void Run(int64_t panel, int64_t begin, int64_t end, const Ahead<P, kType>& next) const {
    Packed packed[P];
    Unpacking unpacking[P];
    Unpacked unpacked[P];
    for (int p = 0; p < P; ++p) {
      packed[p] = Packed(layout, args.weight.data, panel + p);
      std::byte* const room = scratch + static_cast<size_t>(p) * (kMatMulScratchBytes / 2);
      uint8_t* const bytes = reinterpret_cast<uint8_t*>(room);
      float* const scales = reinterpret_cast<float*>(room + kSliceBlocks * 512);
      float* const mins = scales + kSliceBlocks * 2 * kPanelOuts;
      unpacking[p] = {packed[p], begin, bytes, scales, mins};
      unpacked[p] = {begin, Unpacking::kCopies ? bytes : packed[p].quants + begin * 512, scales, mins};
    }
    const Unpacking(&first)[P] = unpacking;
    const Unpacked(&later)[P] = unpacked;
    const int64_t tiles = (part.row_end - part.row_begin + rows.tile_rows - 1) / rows.tile_rows;
    for (int64_t t = 0; t < tiles; ++t) {
      Ahead<P, kType> ahead = next;
      ahead.begin = next.begin + (next.end - next.begin) * t / tiles;
      ahead.end = next.begin + (next.end - next.begin) * (t + 1) / tiles;
      const int64_t row = part.row_begin + t * rows.tile_rows;
      const int64_t count = std::min<int64_t>(rows.tile_rows, part.row_end - row);
      const Tile tile{row, panel, begin == 0};
      if (t == 0) {
        WithRows<kTileRows>(
            count, TileProduct<P, Unpacking, Ahead<P, kType>>{args, rows, first, ahead, tile, begin, end});
      } else {
        WithRows<kTileRows>(
            count, TileProduct<P, Unpacked, Ahead<P, kType>>{args, rows, later, ahead, tile, begin, end});
      }
    }
  }

  const MatMulArgs& args;
  const PackedRows& rows;
  const MatMulPart& part;
  const PanelLayout& layout;
  std::byte* scratch;
};

template <DType kType>
void MultiplyOf(const MatMulArgs& args, const PackedRows& rows, const MatMulPart& part, std::byte* scratch) {
  if (part.row_end - part.row_begin <= kFewRows) return MultiplyFew<kType>(args, rows, part);
  constexpr int P = kTilePanels;
  const PanelLayout layout(kType, args.weight.cols);
  const int64_t blocks = args.weight.cols / kQuantBlock;
  const Slices<kType> slices{args, rows, part, layout, scratch};
  for (int64_t panel = part.panel_begin; panel < part.panel_end; panel += P) {
    for (int64_t b = 0; b < blocks; b += kSliceBlocks) {
      const int64_t end = std::min(b + kSliceBlocks, blocks);
      PackedLoader<kType> loaders[P];
      Ahead<P, kType> next;
      for (int p = 0; p < P; ++p) {
        loaders[p] = PackedLoader<kType>(layout, args.weight.data, panel + p + (end < blocks ? 0 : P));
        next.loaders[p] = &loaders[p];
      }
      next.begin = end < blocks ? end : 0;
      next.end = std::min(next.begin + kSliceBlocks, blocks);
      slices.Run(panel, b, end, next);
    }
  }
}

void Multiply(const MatMulArgs& args, const PackedRows& rows, const MatMulPart& part, std::byte* scratch) {
  switch (args.weight.dtype) {
#if ATP_K_QUANTS
    case DType::kQ4_K:
      return MultiplyOf<DType::kQ4_K>(args, rows, part, scratch);
    case DType::kQ5_K:
      return MultiplyOf<DType::kQ5_K>(args, rows, part, scratch);
    case DType::kQ6_K:
      return MultiplyOf<DType::kQ6_K>(args, rows, part, scratch);
#else
    case DType::kQ8_0:
      return MultiplyOf<DType::kQ8_0>(args, rows, part, scratch);
    case DType::kQ4_0:
      return MultiplyOf<DType::kQ4_0>(args, rows, part, scratch);
    case DType::kQ4:
      return MultiplyOf<DType::kQ4>(args, rows, part, scratch);
#endif
    default:
      return;  // another kernel's
  }
}

// Row r of a tile of `count`: a group, of `blocks` blocks, of x. words, about: the group's, of the tile.
HWY_INLINE void PackGroup(const float* HWY_RESTRICT x, int64_t blocks, int64_t count,
                          uint32_t* HWY_RESTRICT words, uint32_t* HWY_RESTRICT about) {
  alignas(64) int8_t q[kRowGroupBlocks * kQuantBlock];
  QuantizeGroup(x, blocks, count, q, about);
  for (int64_t j = 0; j < blocks * 8; ++j) {
    if constexpr (kDotWords == 1) {
      std::memcpy(words + j * count, q + 4 * j, 4);
    } else {
      const auto pair = [&](int i) {
        return (static_cast<uint32_t>(q[4 * j + i]) & 0xffffu) | static_cast<uint32_t>(q[4 * j + i + 2])
                                                                     << 16;
      };
      words[2 * j * count] = pair(0);
      words[(2 * j + 1) * count] = pair(1);
    }
  }
}

void PackRows(const MatMulArgs& args, const PackedRows& rows, int64_t begin, int64_t end) {
  const int64_t cols = args.weight.cols, blocks = cols / kQuantBlock;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = t * rows.tile_rows;
    const int64_t count = std::min<int64_t>(rows.tile_rows, args.rows - first);
    uint32_t* const words = rows.words + first * rows.words_per_row;
    uint32_t* const about = rows.block_words + first * rows.block_words_per_row;
    // A group of each row in turn: what is written stays in the cache until the line is full.
    for (int64_t b = 0; b < blocks; b += kRowGroupBlocks) {
      for (int64_t r = 0; r < count; ++r) {
        PackGroup(args.x + (first + r) * cols + b * kQuantBlock, std::min(kRowGroupBlocks, blocks - b), count,
                  words + b * 8 * kDotWords * count + r, about + b * kRowWords * count + r);
      }
    }
  }
}

constexpr MatMulKernel Kernel() {
  return {RowForm::kInt8, kTileRows, kFewRows, kDotWords, PackRows, Multiply};
}
