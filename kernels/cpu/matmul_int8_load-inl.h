// How the kernel of matmul_int8-inl.h, where this is included, gets at weights: from panels as they were
// loaded, from scratch where an earlier tile unpacked them, and what it asks of memory ahead of time.

// What will be used a while later, into the second-level cache: of requests for the first one a core has too
// few under way for memory's latency (Zen 4: a sixth more weights per second).
HWY_INLINE void PrefetchFar(const void* p) {
  constexpr int kRead = 0, kSecondLevel = 2;
  __builtin_prefetch(p, kRead, kSecondLevel);
}

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

// The levels of q4, plus 128.
struct Q4Table {
  alignas(16) uint8_t levels[16];
};
constexpr Q4Table MakeQ4Table() {
  Q4Table table{};
  for (int i = 0; i < 16; ++i) table.levels[i] = static_cast<uint8_t>(kQ4Levels[i] + 128);
  return table;
}
inline constexpr Q4Table kQ4Table = MakeQ4Table();

// A loader gives a panel's weights block by block: Bytes(b, j, v) is vector v of unit j as integers from 0
// on, Scale(b, half, v) and Min(b, v) what they are multiplied by and what is then taken away.
template <DType kType>
struct PackedLoader {
  static constexpr bool kHalves = kType == DType::kQ6_K;  // a scale for each 16
  static constexpr bool kMins = kType == DType::kQ4_K || kType == DType::kQ5_K;
  static constexpr int kBlockBytes = kType == DType::kQ8_0 ? 512 : 256;  // of quants
  static constexpr int kOffsetShift = kType == DType::kQ4_0 ? 4 : 0;     // its zero is 8, others' is 128

  PackedLoader() = default;
  PackedLoader(const PanelLayout& layout, const void* matrix, int64_t index) {
    const uint8_t* panel = static_cast<const uint8_t*>(matrix) + static_cast<size_t>(index) * layout.bytes;
    super = panel + layout.super;
    scales = panel + layout.scales;
    quants = panel + layout.quants;
    high = panel + layout.high;
  }

  HWY_INLINE VU Bytes(int64_t b, int j, int v) const {
    const DU d;
    const int at = v * kLanes * 4;
    if constexpr (kType == DType::kQ8_0) return LoadBytes(quants + b * 512 + j * 64 + at);
    const VU packed = LoadBytes(quants + b * 256 + j % 4 * 64 + at);
    const VU low = hn::And(j < 4 ? packed : hn::ShiftRight<4>(packed), hn::Set(d, 0x0f0f0f0fu));
    if constexpr (kType == DType::kQ4) return Lookup(kQ4Table.levels, low);
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
    for (int i = 0; i < kBlockBytes; i += 64) hwy::Prefetch(quants + b * kBlockBytes + i);
    PrefetchRest(b);
  }
  HWY_INLINE void PrefetchRest(int64_t b) const {
    if (kType == DType::kQ5_K) PrefetchFar(high + b * 64);
    if (kType == DType::kQ6_K) PrefetchFar(high + b * 128);
    if (kType == DType::kQ6_K) PrefetchFar(high + b * 128 + 64);
    if (b % 2 == 0) PrefetchFar(scales + b * 32);
  }

  const uint8_t* super = nullptr;
  const uint8_t* scales = nullptr;
  const uint8_t* quants = nullptr;
  const uint8_t* high = nullptr;

 private:
  // v >> shift (or << -shift) where mask has bits.
  static HWY_INLINE VU Shifted(VU v, int shift, uint32_t mask) {
    const VU moved = shift > 0 ? hn::ShiftRightSame(v, shift) : hn::ShiftLeftSame(v, -shift);
    return hn::And(moved, hn::Set(DU(), mask));
  }
};

// The same, and what it gives is left in scratch for later tiles (q8_0's bytes stay where they are).
template <DType kType>
struct UnpackingLoader {
  static constexpr bool kHalves = PackedLoader<kType>::kHalves;
  static constexpr bool kMins = PackedLoader<kType>::kMins;
  static constexpr int kOffsetShift = PackedLoader<kType>::kOffsetShift;
  static constexpr bool kCopies = kType != DType::kQ8_0;

  HWY_INLINE VU Bytes(int64_t b, int j, int v) const {
    const VU unpacked = from.Bytes(b, j, v);
    if constexpr (kCopies) {
      hn::StoreU(unpacked, DU(),
                 reinterpret_cast<uint32_t*>(bytes + (b - first) * 512 + j * 64 + v * kLanes * 4));
    }
    return unpacked;
  }
  HWY_INLINE VF Scale(int64_t b, int half, int v) const {
    const VF scale = from.Scale(b, half, v);
    hn::Store(scale, DF(), scales + ((b - first) * 2 + half) * kPanelOuts + v * kLanes);
    return scale;
  }
  HWY_INLINE VF Min(int64_t b, int v) const {
    const VF min = from.Min(b, v);
    hn::Store(min, DF(), mins + (b - first) * kPanelOuts + v * kLanes);
    return min;
  }

  PackedLoader<kType> from;
  int64_t first;  // block
  uint8_t* bytes;
  float* scales;
  float* mins;
};

// What an UnpackingLoader left.
template <DType kType>
struct UnpackedLoader {
  static constexpr bool kHalves = PackedLoader<kType>::kHalves;
  static constexpr bool kMins = PackedLoader<kType>::kMins;
  static constexpr int kOffsetShift = PackedLoader<kType>::kOffsetShift;

  HWY_INLINE VU Bytes(int64_t b, int j, int v) const {
    return LoadBytes(bytes + (b - first) * 512 + j * 64 + v * kLanes * 4);
  }
  HWY_INLINE VF Scale(int64_t b, int half, int v) const {
    return hn::Load(DF(), scales + ((b - first) * 2 + half) * kPanelOuts + v * kLanes);
  }
  HWY_INLINE VF Min(int64_t b, int v) const {
    return hn::Load(DF(), mins + (b - first) * kPanelOuts + v * kLanes);
  }

  int64_t first;  // block
  const uint8_t* bytes;
  const float* scales;
  const float* mins;
};

// What a tile asks of memory while it computes: blocks [begin, end) of these panels, spread over its own,
// because more requests at once than the core can have under way would hold up its own loads.
template <int P, DType kType>
struct Ahead {
  HWY_INLINE void Fetch(int64_t step, int64_t steps) const {
    const int64_t count = end - begin;
    for (int64_t b = count * step / steps; b < count * (step + 1) / steps; ++b) {
      ATP_UNROLL for (int p = 0; p < P; ++p) loaders[p]->Prefetch(begin + b);
    }
  }

  const PackedLoader<kType>* loaders[P];
  int64_t begin, end;
};

// Where there is one tile: each load of weights asks for those a fixed distance ahead, one line at a time.
template <DType kType>
struct StreamingLoader {
  static constexpr bool kHalves = PackedLoader<kType>::kHalves;
  static constexpr bool kMins = PackedLoader<kType>::kMins;
  static constexpr int kOffsetShift = PackedLoader<kType>::kOffsetShift;
  static constexpr int kBlockBytes = PackedLoader<kType>::kBlockBytes;

  HWY_INLINE VU Bytes(int64_t b, int j, int v) const {
    if (v == 0 && j < kBlockBytes / 64) PrefetchFar(from.quants + b * kBlockBytes + j * 64 + kPrefetchBytes);
    return from.Bytes(b, j, v);
  }
  HWY_INLINE VF Scale(int64_t b, int half, int v) const { return from.Scale(b, half, v); }
  HWY_INLINE VF Min(int64_t b, int v) const { return from.Min(b, v); }

  PackedLoader<kType> from;
};

// What is not a block's quants, a fixed distance ahead.
template <int P, DType kType>
struct Streaming {
  HWY_INLINE void Fetch(int64_t step, int64_t /*steps*/) const {
    ATP_UNROLL for (int p = 0; p < P; ++p) loaders[p]->PrefetchRest(begin + step);
  }

  const PackedLoader<kType>* loaders[P];
  int64_t begin;
};
