// The byte layout of one KV block, for every KvFormat. Nobody else computes an offset inside a block.
//
// One block holds `entries` cache entries of ONE kv head of ONE layer. An entry is (key[d], value[d],
// log_mass): a token's entry has log_mass 0, so exact blocks leave it out; principal blocks store it.
//
//   keys      [head_dim, entries]  dimension-major: the scores of all entries of a block are one vector per
//                                  dimension; integers are in the Walsh–Hadamard basis
//   values    [entries, head_dim]  entry-major: a weighted sum of values streams rows
//   log_mass  float[entries]       principal blocks only; -inf pads an entry that is not there
#ifndef ATP_KERNELS_KV_PAGE_H_
#define ATP_KERNELS_KV_PAGE_H_

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string_view>

namespace atp {

// Index of a block in the KV pool; its bytes start at pool + id * KvPage::bytes().
using BlockId = int32_t;

enum class KvFormat : uint8_t { kF32, kBF16, kFp8, kInt8, kInt4 };  // fp8: e4m3
inline constexpr KvFormat kKvFormats[] = {KvFormat::kF32, KvFormat::kBF16, KvFormat::kFp8, KvFormat::kInt8,
                                          KvFormat::kInt4};
inline constexpr int kKvFormatCount = static_cast<int>(std::size(kKvFormats));

// Bits per element of keys and values.
constexpr int BitsOf(KvFormat format) {
  // No table: on a device it would lie in local memory.
  return format == KvFormat::kF32 ? 32 : format == KvFormat::kBF16 ? 16 : format == KvFormat::kInt4 ? 4 : 8;
}
// Formats with a scale per key and per value, and what the largest element of each is stored as.
constexpr bool HasScales(KvFormat format) { return BitsOf(format) <= 8; }
constexpr bool IsInteger(KvFormat format) { return HasScales(format) && format != KvFormat::kFp8; }
// One step for a whole key: its elements are spread evenly first, by a basis in which queries meet them.
constexpr bool RotatesKeys(KvFormat format) { return IsInteger(format); }
constexpr int TopOf(KvFormat format) {
  return format == KvFormat::kFp8 ? 448 : format == KvFormat::kInt8 ? 127 : 7;
}

std::string_view Name(KvFormat format);
std::optional<KvFormat> KvFormatFromName(std::string_view name);

class KeyRounding;

class KvPage {
 public:
  // entries: positive; backends need a multiple of 16. head_dim: positive.
  KvPage(KvFormat format, int entries, int head_dim, bool with_log_mass);

  KvFormat format() const { return format_; }
  int entries() const { return entries_; }
  int head_dim() const { return head_dim_; }
  bool with_log_mass() const { return with_log_mass_; }
  size_t bytes() const { return bytes_; }  // a multiple of 64

  size_t key_offset() const { return 0; }
  size_t value_offset() const { return value_offset_; }
  size_t key_scale_offset() const { return key_scale_offset_; }      // formats that have scales
  size_t value_scale_offset() const { return value_scale_offset_; }  // formats that have scales
  size_t log_mass_offset() const { return log_mass_offset_; }        // meaningless without log mass

  // Host access to one entry of the block at `block` (reference backend, tests). key, value: [head_dim] fp32.
  // rounding: of integer formats, how keys are rounded; null: to the nearest step.
  void Store(std::byte* block, int entry, const float* key, const float* value, float log_mass = 0.0f,
             const KeyRounding* rounding = nullptr) const;
  void Load(const std::byte* block, int entry, float* key, float* value, float* log_mass) const;

 private:
  size_t KeyIndex(int dimension, int entry) const;
  size_t ValueIndex(int dimension, int entry) const;

  KvFormat format_;
  int entries_;
  int head_dim_;
  bool with_log_mass_;
  size_t value_offset_;
  size_t key_scale_offset_;
  size_t value_scale_offset_;
  size_t log_mass_offset_;
  size_t bytes_;
};

// Kept queries of one query head of one layer: bf16 [samples, head_dim], over as many blocks of the pool as
// that takes.
class QueryPage {
 public:
  QueryPage(size_t block_bytes, int samples, int head_dim);

  int samples() const { return samples_; }
  int head_dim() const { return head_dim_; }
  int blocks_per_head() const { return (samples_ + per_block_ - 1) / per_block_; }
  // Where sample s lies: block s / per_block() of the head, this many bytes into it.
  int per_block() const { return per_block_; }
  size_t offset(int sample) const {
    return static_cast<size_t>(sample % per_block_) * static_cast<size_t>(head_dim_) * sizeof(uint16_t);
  }

 private:
  int samples_;
  int head_dim_;
  int per_block_;
};

}  // namespace atp

#endif  // ATP_KERNELS_KV_PAGE_H_
