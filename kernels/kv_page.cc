#include "kernels/kv_page.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/base/macros.h"
#include "absl/container/inlined_vector.h"
#include "kernels/dtype.h"
#include "kernels/key_rounding.h"
#include "kernels/walsh_hadamard.h"

namespace atp {
namespace {

constexpr size_t kAlignment = 64;

size_t RoundUp(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Symmetric quantisation with one scale per vector. The scale is rounded up to bf16 first, so that the
// largest element still fits and what is stored is all there is to know.
float ScaleFor(const float* x, int size, int top) {
  float largest = 0;
  for (int i = 0; i < size; ++i) largest = std::max(largest, std::abs(x[i]));
  if (!(largest > 0) || !std::isfinite(largest)) return 0;
  const float wanted = largest / static_cast<float>(top);
  uint16_t bits = FloatToBF16(wanted);
  if (BF16ToFloat(bits) < wanted) ++bits;
  return BF16ToFloat(bits);
}

int Quantize(float x, float scale, int top) {
  if (scale == 0 || std::isnan(x)) return 0;  // no integer says that a model overflowed
  return static_cast<int>(
      std::clamp(std::nearbyint(x / scale), static_cast<float>(-top - 1), static_cast<float>(top)));
}

// Element `index` of an array in `format`; int4 elements are reached by (byte, high half).
void StoreElement(std::byte* array, size_t index, KvFormat format, float value, float scale) {
  switch (format) {
    case KvFormat::kF32:
      std::memcpy(array + index * 4, &value, 4);
      return;
    case KvFormat::kBF16: {
      const uint16_t bits = FloatToBF16(value);
      std::memcpy(array + index * 2, &bits, 2);
      return;
    }
    case KvFormat::kFp8:
      array[index] = static_cast<std::byte>(scale == 0 ? 0 : FloatToE4M3(value / scale));
      return;
    case KvFormat::kInt8:
      array[index] = static_cast<std::byte>(Quantize(value, scale, TopOf(format)));
      return;
    case KvFormat::kInt4: {
      const auto half = static_cast<std::byte>(Quantize(value, scale, TopOf(format)) & 15);
      std::byte& byte = array[index / 2];
      byte = index % 2 == 0 ? (byte & std::byte{0xf0}) | half : (byte & std::byte{0x0f}) | (half << 4);
      return;
    }
  }
}

float LoadElement(const std::byte* array, size_t index, KvFormat format, float scale) {
  switch (format) {
    case KvFormat::kF32: {
      float value;
      std::memcpy(&value, array + index * 4, 4);
      return value;
    }
    case KvFormat::kBF16: {
      uint16_t bits;
      std::memcpy(&bits, array + index * 2, 2);
      return BF16ToFloat(bits);
    }
    case KvFormat::kFp8:
      return E4M3ToFloat(static_cast<uint8_t>(array[index])) * scale;
    case KvFormat::kInt8:
      return static_cast<float>(static_cast<int8_t>(array[index])) * scale;
    case KvFormat::kInt4: {
      const int half =
          static_cast<int>(index % 2 == 0 ? array[index / 2] & std::byte{0x0f} : array[index / 2] >> 4);
      return static_cast<float>(half >= 8 ? half - 16 : half) * scale;
    }
  }
  return 0;
}

}  // namespace

std::string_view Name(KvFormat format) {
  switch (format) {
    case KvFormat::kF32:
      return "f32";
    case KvFormat::kBF16:
      return "bf16";
    case KvFormat::kFp8:
      return "fp8";
    case KvFormat::kInt8:
      return "int8";
    case KvFormat::kInt4:
      return "int4";
  }
  return "?";
}

std::optional<KvFormat> KvFormatFromName(std::string_view name) {
  for (const KvFormat format : kKvFormats) {
    if (Name(format) == name) return format;
  }
  return std::nullopt;
}

KvPage::KvPage(KvFormat format, int entries, int head_dim, bool with_log_mass)
    : format_(format), entries_(entries), head_dim_(head_dim), with_log_mass_(with_log_mass) {
  ABSL_ASSERT(entries > 0);
  ABSL_ASSERT(head_dim > 0 && (format != KvFormat::kInt4 || head_dim % 2 == 0));
  const size_t count = static_cast<size_t>(entries);
  const size_t matrix_bytes = count * static_cast<size_t>(head_dim) * static_cast<size_t>(BitsOf(format)) / 8;
  const size_t scale_bytes = HasScales(format) ? count * sizeof(uint16_t) : 0;
  value_offset_ = matrix_bytes;
  key_scale_offset_ = 2 * matrix_bytes;
  value_scale_offset_ = key_scale_offset_ + scale_bytes;
  log_mass_offset_ = value_scale_offset_ + scale_bytes;
  bytes_ = RoundUp(log_mass_offset_ + (with_log_mass ? count * sizeof(float) : 0));
}

// Where element `dimension` of an entry is in the arrays of keys and values; see the layout of int4 in the
// header.
size_t KvPage::KeyIndex(int dimension, int entry) const {
  const size_t row = static_cast<size_t>(dimension) * entries_;
  if (format_ != KvFormat::kInt4) return row + entry;
  return row + entry / 16 * 16 + entry % 8 * 2 + (entry % 16 >= 8 ? 1 : 0);
}

size_t KvPage::ValueIndex(int dimension, int entry) const {
  const size_t row = static_cast<size_t>(entry) * head_dim_;
  if (format_ != KvFormat::kInt4) return row + dimension;
  const int half = head_dim_ / 2;
  return row + dimension % half * 2 + (dimension >= half ? 1 : 0);
}

void KvPage::Store(std::byte* block, int entry, const float* key, const float* value, float log_mass,
                   const KeyRounding* rounding) const {
  ABSL_ASSERT(entry >= 0 && entry < entries_);
  absl::InlinedVector<float, 256> rotated;
  if (RotatesKeys(format_)) {
    rotated.assign(key, key + head_dim_);
    WalshHadamard(rotated.data(), head_dim_);
    key = rotated.data();
  }
  float key_scale = 1, value_scale = 1;
  if (HasScales(format_)) {
    key_scale = ScaleFor(key, head_dim_, TopOf(format_));
    if (rounding != nullptr) rounding->Round(rotated.data(), key_scale, TopOf(format_));
    value_scale = ScaleFor(value, head_dim_, TopOf(format_));
    StoreElement(block + key_scale_offset_, entry, KvFormat::kBF16, key_scale, 1);
    StoreElement(block + value_scale_offset_, entry, KvFormat::kBF16, value_scale, 1);
  }
  for (int i = 0; i < head_dim_; ++i) {
    StoreElement(block + key_offset(), KeyIndex(i, entry), format_, key[i], key_scale);
    StoreElement(block + value_offset(), ValueIndex(i, entry), format_, value[i], value_scale);
  }
  if (with_log_mass_) StoreElement(block + log_mass_offset_, entry, KvFormat::kF32, log_mass, 1);
}

void KvPage::Load(const std::byte* block, int entry, float* key, float* value, float* log_mass) const {
  ABSL_ASSERT(entry >= 0 && entry < entries_);
  float key_scale = 1, value_scale = 1;
  if (HasScales(format_)) {
    key_scale = LoadElement(block + key_scale_offset_, entry, KvFormat::kBF16, 1);
    value_scale = LoadElement(block + value_scale_offset_, entry, KvFormat::kBF16, 1);
  }
  for (int i = 0; i < head_dim_; ++i) {
    key[i] = LoadElement(block + key_offset(), KeyIndex(i, entry), format_, key_scale);
    value[i] = LoadElement(block + value_offset(), ValueIndex(i, entry), format_, value_scale);
  }
  if (RotatesKeys(format_)) WalshHadamard(key, head_dim_);
  *log_mass = with_log_mass_ ? LoadElement(block + log_mass_offset_, entry, KvFormat::kF32, 1) : 0.0f;
}

QueryPage::QueryPage(size_t block_bytes, int samples, int head_dim)
    : samples_(samples),
      head_dim_(head_dim),
      per_block_(static_cast<int>(block_bytes / (static_cast<size_t>(head_dim) * sizeof(uint16_t)))) {
  ABSL_ASSERT(samples > 0 && head_dim > 0 && per_block_ > 0);
}

}  // namespace atp
