// Slices of 8- and 4-bit pages as fp32, once per target.
#if defined(ATP_KERNELS_CPU_ATTENTION_UNPACK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ATP_KERNELS_CPU_ATTENTION_UNPACK_INL_H_
#undef ATP_KERNELS_CPU_ATTENTION_UNPACK_INL_H_
#else
#define ATP_KERNELS_CPU_ATTENTION_UNPACK_INL_H_
#endif

#include <cstdint>
#include <type_traits>

#include "hwy/highway.h"
#include "kernels/cpu/attention-inl.h"
#include "kernels/kv_page.h"

HWY_BEFORE_NAMESPACE();
namespace atp::cpu {
namespace HWY_NAMESPACE {

// Lanes(d) int8, or the low or high halves of as many bytes, as fp32.
template <class D>
HWY_INLINE hn::Vec<D> LoadInt8(D d, const int8_t* HWY_RESTRICT p) {
  return hn::ConvertTo(d, hn::PromoteTo(hn::RebindToSigned<D>(), hn::LoadU(hn::Rebind<int8_t, D>(), p)));
}
template <class D>
HWY_INLINE void LoadInt4(D d, const uint8_t* HWY_RESTRICT p, hn::Vec<D>& low, hn::Vec<D>& high) {
  const auto bytes = hn::PromoteTo(hn::RebindToSigned<D>(), hn::LoadU(hn::Rebind<uint8_t, D>(), p));
  low = hn::ConvertTo(d, hn::ShiftRight<28>(hn::ShiftLeft<28>(bytes)));
  high = hn::ConvertTo(d, hn::ShiftRight<28>(hn::ShiftLeft<24>(bytes)));
}

// An element of an fp8 page.
struct E4M3 {
  uint8_t bits;
};

// Lanes(d) of them, as fp32. A normal one has fp32's exponent less 120; where it is 0, the value is what the
// mantissa adds to 2^-6.
template <class D>
HWY_INLINE hn::Vec<D> LoadFp8(D d, const E4M3* HWY_RESTRICT p) {
  const hn::RebindToUnsigned<D> du;
  const auto bytes = hn::PromoteTo(du, hn::LoadU(hn::Rebind<uint8_t, D>(), &p->bits));
  const auto sign = hn::ShiftLeft<24>(hn::And(bytes, hn::Set(du, 0x80u)));
  const auto magnitude = hn::ShiftLeft<20>(hn::And(bytes, hn::Set(du, 0x7fu)));
  const auto least = hn::Set(d, 0x1p-6f);
  const auto normal = hn::BitCast(d, hn::Add(magnitude, hn::Set(du, 120u << 23)));
  const auto subnormal = hn::Sub(hn::BitCast(d, hn::Add(magnitude, hn::Set(du, 121u << 23))), least);
  return hn::Or(hn::IfThenElse(hn::Lt(normal, least), subnormal, normal), hn::BitCast(d, sign));
}

template <class D>
HWY_INLINE hn::Vec<D> LoadByte(D d, const int8_t* HWY_RESTRICT p) {
  return LoadInt8(d, p);
}
template <class D>
HWY_INLINE hn::Vec<D> LoadByte(D d, const E4M3* HWY_RESTRICT p) {
  return LoadFp8(d, p);
}
inline float FloatOf(int8_t x) { return static_cast<float>(x); }
inline float FloatOf(E4M3 x) { return E4M3ToFloat(x.bits); }

// One dimension of the 16 keys of a slice, times each entry's scale.
template <typename Byte>
HWY_INLINE void UnpackKeys(const Byte* HWY_RESTRICT row, const float* HWY_RESTRICT scale,
                           float* HWY_RESTRICT out) {
  const SliceTag d;
  ATP_UNROLL for (int v = 0; v < kSlice; v += kSliceLanes) {
    hn::Store(hn::Mul(LoadByte(d, row + v), hn::Load(d, scale + v)), d, out + v);
  }
}
HWY_INLINE void UnpackKeys(const uint8_t* HWY_RESTRICT row, const float* HWY_RESTRICT scale,
                           float* HWY_RESTRICT out) {
  const hn::CappedTag<float, kSlice / 2> d;
  constexpr int kLanes = static_cast<int>(hn::MaxLanes(hn::CappedTag<float, kSlice / 2>()));
  ATP_UNROLL for (int v = 0; v < kSlice / 2; v += kLanes) {
    hn::Vec<decltype(d)> low, high;
    LoadInt4(d, row + v, low, high);
    hn::Store(hn::Mul(low, hn::Load(d, scale + v)), d, out + v);
    hn::Store(hn::Mul(high, hn::Load(d, scale + v + kSlice / 2)), d, out + v + kSlice / 2);
  }
}

// One entry's value, times its scale.
template <typename Byte>
HWY_INLINE void UnpackValues(const Byte* HWY_RESTRICT row, float scale, int head_dim,
                             float* HWY_RESTRICT out) {
  const hn::ScalableTag<float> d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  int i = 0;
  for (; i + lanes <= head_dim; i += lanes)
    hn::StoreU(hn::Mul(LoadByte(d, row + i), hn::Set(d, scale)), d, out + i);
  for (; i < head_dim; ++i) out[i] = FloatOf(row[i]) * scale;
}
HWY_INLINE void UnpackValues(const uint8_t* HWY_RESTRICT row, float scale, int head_dim,
                             float* HWY_RESTRICT out) {
  const hn::ScalableTag<float> d;
  const int lanes = static_cast<int>(hn::Lanes(d)), half = head_dim / 2;
  int i = 0;
  for (; i + lanes <= half; i += lanes) {
    hn::Vec<decltype(d)> low, high;
    LoadInt4(d, row + i, low, high);
    hn::StoreU(hn::Mul(low, hn::Set(d, scale)), d, out + i);
    hn::StoreU(hn::Mul(high, hn::Set(d, scale)), d, out + i + half);
  }
  for (; i < half; ++i) {
    out[i] = static_cast<float>(static_cast<int8_t>(row[i] << 4) >> 4) * scale;
    out[i + half] = static_cast<float>(static_cast<int8_t>(row[i]) >> 4) * scale;
  }
}

// Entries [offset, offset + 16) of a block to keys [head_dim, 64] and values [16, head_dim]. T: E4M3, int8_t,
// or uint8_t for pairs of int4.
template <typename T>
HWY_INLINE void UnpackSlice(const KvPage& page, const std::byte* block, int offset, float* keys,
                            float* values) {
  constexpr int kPerByte = std::is_same_v<T, uint8_t> ? 2 : 1;
  const int head_dim = page.head_dim();
  const auto* key_scales = reinterpret_cast<const uint16_t*>(block + page.key_scale_offset()) + offset;
  const auto* value_scales = reinterpret_cast<const uint16_t*>(block + page.value_scale_offset()) + offset;
  alignas(64) float key_scale[kSlice];
  for (int e = 0; e < kSlice; ++e) key_scale[e] = BF16ToFloat(key_scales[e]);
  const T* in = reinterpret_cast<const T*>(block + page.key_offset()) + offset / kPerByte;
  for (int i = 0; i < head_dim; ++i) {
    UnpackKeys(in + static_cast<size_t>(i) * (page.entries() / kPerByte), key_scale, keys + i * kTile);
  }
  in = reinterpret_cast<const T*>(block + page.value_offset()) +
       static_cast<size_t>(offset) * head_dim / kPerByte;
  for (int e = 0; e < kSlice; ++e) {
    UnpackValues(in + static_cast<size_t>(e) * head_dim / kPerByte, BF16ToFloat(value_scales[e]), head_dim,
                 values + e * head_dim);
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace atp::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
