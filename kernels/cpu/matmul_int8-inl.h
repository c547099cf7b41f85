// The kernel of matmul_int8.cc: included there once or twice per target, each time in a namespace of its own,
// with ATP_DOT8 saying whether VNNI may be used. Every version computes the same integers.

// Rows of a tile: as many as the registers hold sums for.
#if HWY_TARGET == HWY_AVX3
constexpr int kTileRows = 6;
constexpr int kFewRows = 8;  // times one panel
#else
constexpr int kTileRows = 2;
constexpr int kFewRows = 2;
#endif
// Blocks of 32 per slice of k: a pair of unpacked panels and a tile's x stay in the first-level cache.
constexpr int64_t kSliceBlocks = 24;
// How far ahead weights are asked for: about memory's latency times a core's share of its bandwidth.
constexpr int64_t kPrefetchBlocks = 16;

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

HWY_INLINE VU LoadBytes(const uint8_t* p) { return hn::LoadU(DU(), reinterpret_cast<const uint32_t*>(p)); }

// Levels of a nibble in every byte of v.
HWY_INLINE VU Lookup(const uint8_t (&table)[16], VU v) {
#if HWY_TARGET == HWY_SCALAR
  const uint32_t x = hn::GetLane(v);
  return hn::Set(DU(), table[x & 15] | static_cast<uint32_t>(table[x >> 8 & 15]) << 8 |
                           static_cast<uint32_t>(table[x >> 16 & 15]) << 16 |
                           static_cast<uint32_t>(table[x >> 24 & 15]) << 24);
#else
  const hn::Repartition<uint8_t, DU> d8;
  return hn::BitCast(DU(), hn::TableLookupBytes(hn::LoadDup128(d8, table), hn::BitCast(d8, v)));
#endif
}

HWY_INLINE VF LoadHalves(const uint8_t* p) {
  return LoadFloats(DF(), reinterpret_cast<const hwy::float16_t*>(p));
}
template <typename T>
HWY_INLINE VF LoadIntegers(const uint8_t* p) {
  const hn::Rebind<T, DI> d8;
  return hn::ConvertTo(DF(), hn::PromoteTo(DI(), hn::LoadU(d8, reinterpret_cast<const T*>(p))));
}

// The levels of 4-bit weights, plus 128.
struct Tables {
  alignas(16) uint8_t linear[16];
  alignas(16) uint8_t fitted[16];
};
constexpr Tables MakeTables() {
  Tables tables{};
  for (int i = 0; i < 16; ++i) {
    tables.linear[i] = static_cast<uint8_t>(i - 8 + 128);
    tables.fitted[i] = static_cast<uint8_t>(kQ4Levels[i] + 128);
  }
  return tables;
}
inline constexpr Tables kTables = MakeTables();

// A loader gives a panel's weights block by block: Bytes(b, j, v) is vector v of unit j as integers from 0
// on, Scale(b, half, v) and Min(b, v) what they are multiplied by and what is then taken away.
template <DType kType>
struct PackedLoader {
  static constexpr bool kHalves = kType == DType::kQ6_K;  // a scale for each 16
  static constexpr bool kMins = kType == DType::kQ4_K || kType == DType::kQ5_K;

  PackedLoader(const PanelLayout& layout, const std::byte* panel)
      : super(reinterpret_cast<const uint8_t*>(panel) + layout.super),
        scales(reinterpret_cast<const uint8_t*>(panel) + layout.scales),
        quants(reinterpret_cast<const uint8_t*>(panel) + layout.quants),
        high(reinterpret_cast<const uint8_t*>(panel) + layout.high) {}

  HWY_INLINE VU Bytes(int64_t b, int j, int v) const {
    const DU d;
    const int at = v * kLanes * 4;
    if constexpr (kType == DType::kQ8_0) return LoadBytes(quants + b * 512 + j * 64 + at);
    const VU packed = LoadBytes(quants + b * 256 + j % 4 * 64 + at);
    const VU low = hn::And(j < 4 ? packed : hn::ShiftRight<4>(packed), hn::Set(d, 0x0f0f0f0fu));
    if constexpr (kType == DType::kQ4_0) return Lookup(kTables.linear, low);
    if constexpr (kType == DType::kQ4) return Lookup(kTables.fitted, low);
    if constexpr (kType == DType::kQ5_K) {
      const VU bits = LoadBytes(high + b * 64 + at);
      return hn::Or(low, Shifted(bits, j - 4, 0x10101010u));
    }
    if constexpr (kType == DType::kQ6_K) {
      const VU bits = LoadBytes(high + b * 128 + j / 4 * 64 + at);
      return hn::Or(low, Shifted(bits, j % 4 * 2 - 4, 0x30303030u));
    }
    return low;
  }

  HWY_INLINE VF Scale(int64_t b, int half, int v) const {
    const int at = v * kLanes;
    if constexpr (kHalves) {
      return hn::Mul(LoadHalves(super + b / 8 * 32 + at * 2),
                     LoadIntegers<int8_t>(scales + b * 32 + half * 16 + at));
    }
    if constexpr (kMins) {
      return hn::Mul(LoadHalves(super + b / 8 * 64 + at * 2), LoadIntegers<uint8_t>(scales + b * 32 + at));
    }
    return LoadHalves(scales + b * 32 + at * 2);
  }

  HWY_INLINE VF Min(int64_t b, int v) const {
    const int at = v * kLanes;
    return hn::Mul(LoadHalves(super + b / 8 * 64 + 32 + at * 2),
                   LoadIntegers<uint8_t>(scales + b * 32 + 16 + at));
  }

  // The bytes of block b of this panel, or, where that is past its end, of what follows it.
  HWY_INLINE void Prefetch(int64_t b) const {
    constexpr int kBytes = kType == DType::kQ8_0 ? 512 : 256;
    for (int i = 0; i < kBytes; i += 64) hwy::Prefetch(quants + b * kBytes + i);
    if (kType == DType::kQ5_K) hwy::Prefetch(high + b * 64);
    if (kType == DType::kQ6_K) hwy::Prefetch(high + b * 128);
    if (kType == DType::kQ6_K) hwy::Prefetch(high + b * 128 + 64);
    if (b % 2 == 0) hwy::Prefetch(scales + b * 32);
  }

  const uint8_t* super;
  const uint8_t* scales;
  const uint8_t* quants;
  const uint8_t* high;

 private:
  // v >> shift (or << -shift) where mask has bits.
  static HWY_INLINE VU Shifted(VU v, int shift, uint32_t mask) {
    const VU moved = shift > 0 ? hn::ShiftRightSame(v, shift) : hn::ShiftLeftSame(v, -shift);
    return hn::And(moved, hn::Set(DU(), mask));
  }
};

// The same of a slice that was unpacked to bytes and fp32 before.
template <bool kHalves_, bool kMins_>
struct UnpackedLoader {
  static constexpr bool kHalves = kHalves_;
  static constexpr bool kMins = kMins_;

  // Of the next slice, as it lies packed, while this one is multiplied with the first tile.
  HWY_INLINE void Prefetch(int64_t b) const {
    if (next == nullptr) return;
    for (int64_t i = 0; i < next_bytes; i += 64) hwy::Prefetch(next + b * next_bytes + i);
  }
  HWY_INLINE VU Bytes(int64_t b, int j, int v) const {
    return LoadBytes(bytes + (b - first) * 512 + j * 64 + v * kLanes * 4);
  }
  HWY_INLINE VF Scale(int64_t b, int half, int v) const {
    return hn::Load(DF(), scales + ((b - first) * 2 + half) * kPanelOuts + v * kLanes);
  }
  HWY_INLINE VF Min(int64_t b, int v) const {
    return hn::Load(DF(), mins + (b - first) * kPanelOuts + v * kLanes);
  }

  const uint8_t* bytes = nullptr;
  const float* scales = nullptr;
  const float* mins = nullptr;
  int64_t first = 0;              // block
  const uint8_t* next = nullptr;  // quants, or null: fetched already
  int64_t next_bytes = 0;         // per block
};

// Blocks [begin, end) of a panel's slice into scratch (q8_0's bytes stay where they are).
template <DType kType>
HWY_INLINE UnpackedLoader<PackedLoader<kType>::kHalves, PackedLoader<kType>::kMins> Unpack(
    const PackedLoader<kType>& from, int64_t begin, int64_t end, std::byte* scratch) {
  using L = PackedLoader<kType>;
  uint8_t* bytes = reinterpret_cast<uint8_t*>(scratch);
  float* scales = reinterpret_cast<float*>(scratch + kSliceBlocks * 512);
  float* mins = scales + kSliceBlocks * 2 * kPanelOuts;
  for (int64_t b = begin; b < end; ++b) {
    for (int v = 0; v < kPanelVectors; ++v) {
      if constexpr (kType != DType::kQ8_0) {
        ATP_UNROLL for (int j = 0; j < 8; ++j) {
          hn::StoreU(from.Bytes(b, j, v), DU(),
                     reinterpret_cast<uint32_t*>(bytes + (b - begin) * 512 + j * 64 + v * kLanes * 4));
        }
      }
      for (int half = 0; half < (L::kHalves ? 2 : 1); ++half) {
        hn::Store(from.Scale(b, half, v), DF(), scales + ((b - begin) * 2 + half) * kPanelOuts + v * kLanes);
      }
      if constexpr (L::kMins) {
        hn::Store(from.Min(b, v), DF(), mins + (b - begin) * kPanelOuts + v * kLanes);
      }
    }
  }
  if constexpr (kType == DType::kQ8_0) {
    return {from.quants + begin * 512, scales, mins, begin, from.quants, 512};
  }
  return {bytes, scales, mins, begin, from.quants, 256};
}

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

// sums[r][o] = Σ over blocks [begin, end) of the slice.
template <int R, int P, class L>
HWY_INLINE void SumBlocks(const L (&loaders)[P], const uint32_t* HWY_RESTRICT words,
                          const uint32_t* HWY_RESTRICT block_words, int64_t begin, int64_t end,
                          float (&sums)[R][P * kPanelOuts]) {
  constexpr int V = P * kPanelVectors;
  const DF d;
  const DI di;
  VF acc[R][V];
  ATP_UNROLL for (int r = 0; r < R; ++r) { ATP_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = hn::Zero(d); }
  for (int64_t b = begin; b < end; ++b) {
    ATP_UNROLL for (int p = 0; p < P; ++p) loaders[p].Prefetch(b + kPrefetchBlocks);
    const uint32_t* x = words + b * 8 * kDotWords * R;
    const uint32_t* about = block_words + b * kRowWords * R;
    const float* x_scale = reinterpret_cast<const float*>(about + kRowScale * R);
    const int32_t* offset = reinterpret_cast<const int32_t*>(about + kRowOffset * R);
    const int32_t* half_offset = reinterpret_cast<const int32_t*>(about + kRowHalfFirst * R);
    ATP_UNROLL for (int half = 0; half < (L::kHalves ? 2 : 1); ++half) {
      VI dot[R][V];
      ATP_UNROLL for (int r = 0; r < R; ++r) {
        const VI start = L::kMins     ? hn::Zero(di)
                         : L::kHalves ? hn::Set(di, half_offset[half * R + r])
                                      : hn::Set(di, offset[r]);
        ATP_UNROLL for (int v = 0; v < V; ++v) dot[r][v] = start;
      }
      if constexpr (L::kHalves) {
        if (half == 0) {
          AddUnits<R, P, 0, 4>(loaders, b, x, dot);
        } else {
          AddUnits<R, P, 4, 8>(loaders, b, x, dot);
        }
      } else {
        AddUnits<R, P, 0, 8>(loaders, b, x, dot);
      }
      VF scale[V];
      ATP_UNROLL for (int v = 0; v < V; ++v) {
        scale[v] = loaders[v / kPanelVectors].Scale(b, half, v % kPanelVectors);
      }
      ATP_UNROLL for (int r = 0; r < R; ++r) {
        const VF row_scale = hn::Set(d, x_scale[r]);
        ATP_UNROLL for (int v = 0; v < V; ++v) {
          acc[r][v] = hn::MulAdd(hn::ConvertTo(d, dot[r][v]), hn::Mul(scale[v], row_scale), acc[r][v]);
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
  ATP_UNROLL for (int r = 0; r < R; ++r) {
    ATP_UNROLL for (int v = 0; v < V; ++v) hn::StoreU(acc[r][v], d, sums[r] + v * kLanes);
  }
}

// One tile of rows times P panels, blocks [begin, end).
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
    SumBlocks<R, P, L>(loaders, rows.words + tile.row * rows.words_per_row,
                       rows.block_words + tile.row * rows.block_words_per_row, begin, end, sums);
    AddSums<R, P>(args, tile, sums);
  }
};

template <DType kType>
void MultiplyOf(const MatMulArgs& args, const PackedRows& rows, const MatMulPart& part, std::byte* scratch) {
  const PanelLayout layout(kType, args.weight.cols);
  const std::byte* data = static_cast<const std::byte*>(args.weight.data);
  const int64_t blocks = args.weight.cols / kQuantBlock;
  const auto panel_at = [&](int64_t panel) { return data + static_cast<size_t>(panel) * layout.bytes; };
  using Packed = PackedLoader<kType>;
  if (part.row_end - part.row_begin <= rows.tile_rows) {
    // Bound by reading the weights: each once, from front to back, unpacked in registers.
    const int64_t panel_end = std::min(part.panel_end, (args.weight.rows + kPanelOuts - 1) / kPanelOuts);
    for (int64_t panel = part.panel_begin; panel < panel_end; ++panel) {
      const Packed loaders[1] = {Packed(layout, panel_at(panel))};
      for (int64_t b = 0; b < blocks; b += kSliceBlocks) {
        WithRows<kFewRows>(
            part.row_end - part.row_begin,
            TileProduct<1, Packed>{
                args, rows, loaders, {part.row_begin, panel, b == 0}, b, std::min(b + kSliceBlocks, blocks)});
      }
    }
    return;
  }
  using Unpacked = UnpackedLoader<Packed::kHalves, Packed::kMins>;
  for (int64_t panel = part.panel_begin; panel < part.panel_end; panel += kTilePanels) {
    for (int64_t b = 0; b < blocks; b += kSliceBlocks) {
      const int64_t end = std::min(b + kSliceBlocks, blocks);
      Unpacked loaders[kTilePanels];
      for (int p = 0; p < kTilePanels; ++p) {
        loaders[p] = Unpack<kType>(Packed(layout, panel_at(panel + p)), b, end,
                                   scratch + static_cast<size_t>(p) * (kMatMulScratchBytes / 2));
      }
      for (int64_t row = part.row_begin; row < part.row_end; row += rows.tile_rows) {
        WithRows<kTileRows>(
            std::min<int64_t>(rows.tile_rows, part.row_end - row),
            TileProduct<kTilePanels, Unpacked>{args, rows, loaders, {row, panel, b == 0}, b, end});
        for (Unpacked& loader : loaders) loader.next = nullptr;
      }
    }
  }
}

void Multiply(const MatMulArgs& args, const PackedRows& rows, const MatMulPart& part, std::byte* scratch) {
  switch (args.weight.dtype) {
    case DType::kQ8_0:
      return MultiplyOf<DType::kQ8_0>(args, rows, part, scratch);
    case DType::kQ4_0:
      return MultiplyOf<DType::kQ4_0>(args, rows, part, scratch);
    case DType::kQ4:
      return MultiplyOf<DType::kQ4>(args, rows, part, scratch);
    case DType::kQ4_K:
      return MultiplyOf<DType::kQ4_K>(args, rows, part, scratch);
    case DType::kQ5_K:
      return MultiplyOf<DType::kQ5_K>(args, rows, part, scratch);
    case DType::kQ6_K:
      return MultiplyOf<DType::kQ6_K>(args, rows, part, scratch);
    default:
      return;  // plain numbers have another kernel
  }
}

// 32 elements as int8, under a scale that makes the largest 127 (NaN where one is not finite).
struct QuantizedBlock {
  alignas(64) int8_t q[kQuantBlock];
  float scale;
  int32_t half_sums[2];
};

HWY_INLINE void QuantizeBlock(const float* HWY_RESTRICT x, QuantizedBlock& out) {
  const DF d;
  const DI di;
  // As integers, magnitudes compare like the numbers they are, and infinity and NaN are the largest.
  VI largest = hn::Zero(di);
  for (int i = 0; i < kQuantBlock; i += kLanes) {
    largest = hn::Max(largest, hn::BitCast(di, hn::Abs(hn::LoadU(d, x + i))));
  }
  const int32_t peak_bits = hn::GetLane(hn::MaxOfLanes(di, largest));
  const float peak = std::bit_cast<float>(peak_bits);
  const bool finite = peak_bits < 0x7f800000;
  // Below 2^-120 the inverse would overflow: such a block counts as zeros.
  const VF inverse = hn::Set(d, finite && peak > 0x1p-120f ? 127 / peak : 0.0f);
  const hn::Rebind<int8_t, DI> d8;
  for (int half = 0; half < 2; ++half) {
    VI sum = hn::Zero(di);
    for (int i = half * 16; i < half * 16 + 16; i += kLanes) {
      const VI q = hn::NearestInt(hn::Mul(hn::LoadU(d, x + i), inverse));
      sum = hn::Add(sum, q);
      hn::StoreU(hn::DemoteTo(d8, q), d8, out.q + i);
    }
    out.half_sums[half] = hn::GetLane(hn::SumOfLanes(di, sum));
  }
  out.scale = finite ? peak / 127 : std::numeric_limits<float>::quiet_NaN();
}

// Block b's words about row r.
HWY_INLINE void PutAbout(const QuantizedBlock& block, int64_t count, uint32_t* HWY_RESTRICT about) {
  const int32_t sum = block.half_sums[0] + block.half_sums[1];
  about[kRowScale * count] = std::bit_cast<uint32_t>(block.scale);
  about[kRowSum * count] = std::bit_cast<uint32_t>(block.scale * static_cast<float>(sum));
  about[kRowOffset * count] = static_cast<uint32_t>(-128 * sum);
  about[kRowHalfFirst * count] = static_cast<uint32_t>(-32 * block.half_sums[0]);
  about[kRowHalfSecond * count] = static_cast<uint32_t>(-32 * block.half_sums[1]);
}

// Row r of a tile of `count`, blocks [begin, end) of x. words, about: the tile's.
HWY_INLINE void PackBlocks(const float* HWY_RESTRICT x, int64_t begin, int64_t end, int64_t count,
                           uint32_t* HWY_RESTRICT words, uint32_t* HWY_RESTRICT about) {
  for (int64_t b = begin; b < end; ++b) {
    QuantizedBlock block;
    QuantizeBlock(x + b * kQuantBlock, block);
    PutAbout(block, count, about + b * kRowWords * count);
    uint32_t* to = words + b * 8 * kDotWords * count;
    for (int j = 0; j < 8; ++j) {
      if constexpr (kDotWords == 1) {
        std::memcpy(to + j * count, block.q + 4 * j, 4);
      } else {
        const auto pair = [&](int i) {
          return (static_cast<uint32_t>(block.q[4 * j + i]) & 0xffffu) |
                 static_cast<uint32_t>(block.q[4 * j + i + 2]) << 16;
        };
        to[2 * j * count] = pair(0);
        to[(2 * j + 1) * count] = pair(1);
      }
    }
  }
}

void PackRows(const MatMulArgs& args, const PackedRows& rows, int64_t begin, int64_t end) {
  const int64_t cols = args.weight.cols, blocks = cols / kQuantBlock;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = t * rows.tile_rows;
    const int64_t count = std::min<int64_t>(rows.tile_rows, args.rows - first);
    // A stretch of each row in turn: x is read in long runs, and what is written stays in the cache.
    for (int64_t b = 0; b < blocks; b += kSliceBlocks) {
      for (int64_t r = 0; r < count; ++r) {
        PackBlocks(args.x + (first + r) * cols, b, std::min(b + kSliceBlocks, blocks), count,
                   rows.words + first * rows.words_per_row + r,
                   rows.block_words + first * rows.block_words_per_row + r);
      }
    }
  }
}

constexpr MatMulKernel Kernel() {
  return {RowForm::kInt8, kTileRows, kFewRows, kDotWords, PackRows, Multiply};
}
