// How a row of x becomes integers, for all kernels that multiply them: included where
// matmul_int8_load-inl.h is.

// Blocks of 32 per slice of k: a pair of unpacked panels and a tile's x stay in the first-level cache.
constexpr int64_t kSliceBlocks = 24;
static_assert(kSliceBlocks % kRowGroupBlocks == 0);

// x: blocks * 32 elements. What they are multiplied by to become integers; `scale` is what undoes it: it
// makes the largest 127 (and is NaN where one is not finite).
HWY_INLINE float InverseScale(const float* HWY_RESTRICT x, int64_t blocks, float& scale) {
  const DF d;
  const DI di;
  // As integers, magnitudes compare like the numbers they are, and infinity and NaN are the largest.
  VI largest[2] = {hn::Zero(di), hn::Zero(di)};
  for (int64_t i = 0; i < blocks * kQuantBlock; i += 32) {
    ATP_UNROLL for (int at = 0; at < 32; at += kLanes) {
      VI& most = largest[at / kLanes % 2];
      most = hn::Max(most, hn::BitCast(di, hn::Abs(hn::LoadU(d, x + i + at))));
    }
  }
  const int32_t peak_bits = hn::GetLane(hn::MaxOfLanes(di, hn::Max(largest[0], largest[1])));
  const float peak = std::bit_cast<float>(peak_bits);
  const bool finite = peak_bits < 0x7f800000;
  scale = finite ? peak / 127 : std::numeric_limits<float>::quiet_NaN();
  // Below 2^-120 the inverse would overflow: such a group counts as zeros.
  return finite && peak > 0x1p-120f ? 127 / peak : 0.0f;
}

// q: of 16 elements.
HWY_INLINE int32_t SumOf16(const int8_t* HWY_RESTRICT q) {
#if HWY_TARGET == HWY_SCALAR
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += q[i];
  return sum;
#else
  const hn::Full128<uint8_t> d8;
  const auto shifted = hn::Xor(hn::LoadU(d8, reinterpret_cast<const uint8_t*>(q)), hn::Set(d8, 0x80));
  const auto sums = hn::SumsOf8(shifted);
  return static_cast<int32_t>(hn::ExtractLane(sums, 0) + hn::ExtractLane(sums, 1)) - 16 * 128;
#endif
}

// A block's words about a row.
HWY_INLINE void PutAbout(const int8_t* HWY_RESTRICT q, float scale, int64_t count,
                         uint32_t* HWY_RESTRICT about) {
  const int32_t first = SumOf16(q), second = SumOf16(q + 16), sum = first + second;
  about[kRowScale * count] = std::bit_cast<uint32_t>(scale);
  about[kRowSum * count] = std::bit_cast<uint32_t>(static_cast<float>(sum));
  about[kRowOffset * count] = static_cast<uint32_t>(-128 * sum);
  about[kRowHalfFirst * count] = static_cast<uint32_t>(-32 * first);
  about[kRowHalfSecond * count] = static_cast<uint32_t>(-32 * second);
}

// A group, of `blocks` blocks, of a row of x, as integers. about: the group's words about this row, of a tile
// of `count` rows.
HWY_INLINE void QuantizeGroup(const float* HWY_RESTRICT x, int64_t blocks, int64_t count,
                              int8_t (&q)[kRowGroupBlocks * kQuantBlock], uint32_t* HWY_RESTRICT about) {
  const DF d;
  const hn::Rebind<int8_t, DI> d8;
  float scale;
  const VF inverse = hn::Set(d, InverseScale(x, blocks, scale));
  for (int64_t i = 0; i < blocks * kQuantBlock; i += kLanes) {
    hn::StoreU(hn::DemoteTo(d8, hn::NearestInt(hn::Mul(hn::LoadU(d, x + i), inverse))), d8, q + i);
  }
  for (int64_t b = 0; b < blocks; ++b) {
    PutAbout(q + b * kQuantBlock, scale, count, about + b * kRowWords * count);
  }
}
