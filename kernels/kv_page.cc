#include "kernels/kv_page.h"

#include <cstring>

#include "absl/base/macros.h"
#include "kernels/dtype.h"

namespace atp {
namespace {

constexpr size_t kAlignment = 64;

size_t ElementBytes(KvFormat format) { return format == KvFormat::kF32 ? 4 : 2; }

size_t RoundUp(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

void StoreElement(std::byte* at, KvFormat format, float value) {
  if (format == KvFormat::kF32) {
    std::memcpy(at, &value, sizeof(value));
  } else {
    const uint16_t bits = FloatToBF16(value);
    std::memcpy(at, &bits, sizeof(bits));
  }
}

float LoadElement(const std::byte* at, KvFormat format) {
  if (format == KvFormat::kF32) {
    float value;
    std::memcpy(&value, at, sizeof(value));
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, at, sizeof(bits));
  return BF16ToFloat(bits);
}

}  // namespace

std::string_view Name(KvFormat format) {
  switch (format) {
    case KvFormat::kF32:
      return "f32";
    case KvFormat::kBF16:
      return "bf16";
  }
  return "?";
}

std::optional<KvFormat> KvFormatFromName(std::string_view name) {
  for (const KvFormat format : {KvFormat::kF32, KvFormat::kBF16}) {
    if (Name(format) == name) return format;
  }
  return std::nullopt;
}

KvPage::KvPage(KvFormat format, int entries, int head_dim, bool with_log_mass)
    : format_(format), entries_(entries), head_dim_(head_dim), with_log_mass_(with_log_mass) {
  ABSL_ASSERT(entries > 0 && entries % 16 == 0);
  ABSL_ASSERT(head_dim > 0);
  const size_t matrix_bytes =
      static_cast<size_t>(entries) * static_cast<size_t>(head_dim) * ElementBytes(format);
  value_offset_ = matrix_bytes;
  log_mass_offset_ = 2 * matrix_bytes;
  const size_t log_mass_bytes = with_log_mass ? static_cast<size_t>(entries) * sizeof(float) : 0;
  bytes_ = RoundUp(log_mass_offset_ + log_mass_bytes);
}

void KvPage::Store(std::byte* block, int entry, const float* key, const float* value, float log_mass) const {
  ABSL_ASSERT(entry >= 0 && entry < entries_);
  const size_t element = ElementBytes(format_);
  for (int i = 0; i < head_dim_; ++i) {
    const size_t key_index = static_cast<size_t>(i) * entries_ + entry;
    const size_t value_index = static_cast<size_t>(entry) * head_dim_ + i;
    StoreElement(block + key_offset() + key_index * element, format_, key[i]);
    StoreElement(block + value_offset() + value_index * element, format_, value[i]);
  }
  if (with_log_mass_) {
    std::memcpy(block + log_mass_offset_ + entry * sizeof(float), &log_mass, sizeof(log_mass));
  }
}

void KvPage::Load(const std::byte* block, int entry, float* key, float* value, float* log_mass) const {
  ABSL_ASSERT(entry >= 0 && entry < entries_);
  const size_t element = ElementBytes(format_);
  for (int i = 0; i < head_dim_; ++i) {
    const size_t key_index = static_cast<size_t>(i) * entries_ + entry;
    const size_t value_index = static_cast<size_t>(entry) * head_dim_ + i;
    key[i] = LoadElement(block + key_offset() + key_index * element, format_);
    value[i] = LoadElement(block + value_offset() + value_index * element, format_);
  }
  *log_mass = 0.0f;
  if (with_log_mass_) {
    std::memcpy(log_mass, block + log_mass_offset_ + entry * sizeof(float), sizeof(*log_mass));
  }
}

QueryPage::QueryPage(size_t block_bytes, int samples, int head_dim)
    : samples_(samples),
      head_dim_(head_dim),
      per_block_(static_cast<int>(block_bytes / (static_cast<size_t>(head_dim) * sizeof(uint16_t)))) {
  ABSL_ASSERT(samples > 0 && head_dim > 0 && per_block_ > 0);
}

}  // namespace atp
