// The GGUF format, versions 2 and 3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), parsed from
// bytes that may be hostile; all numbers are little-endian:
//   "GGUF", u32 version, u64 tensors, u64 metadata entries
//   metadata: string key, u32 type, value; a string is a u64 length and its bytes, an array is a u32 type, a
//   u64 count and the elements tensors:  string name, u32 dimensions, u64 each (the row's length first), u32
//   type, u64 offset padding to general.alignment, then tensor data, at offsets that are multiples of it
// Nothing is allocated but an entry per metadata key and per tensor, each of which the file must have in
// full.
#ifndef ATP_ENGINE_GGUF_H_
#define ATP_ENGINE_GGUF_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/dtype.h"

namespace atp {

class MappedFile;

inline constexpr uint64_t kMaxGgufHeaderBytes = uint64_t{256} << 20;  // all that is before the tensor data
inline constexpr size_t kMaxGgufRank = 4;

enum class GgufType : uint32_t {
  kU8,
  kI8,
  kU16,
  kI16,
  kU32,
  kI32,
  kF32,
  kBool,
  kString,
  kArray,
  kU64,
  kI64,
  kF64
};

// A metadata value as it lies in the file, its lengths checked.
struct GgufValue {
  GgufType type = GgufType::kU8;  // of the elements where is_array
  bool is_array = false;
  uint64_t count = 1;
  std::span<const std::byte> bytes;  // the value or the elements; strings with their lengths
};

struct GgufTensor {
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;  // row-major, as everywhere in atp: the reverse of the file's order
  std::span<const std::byte> data;
};

// A type of tensors in the file's own numbering. Our own kQ4 has a number far from ggml's.
std::optional<DType> DTypeOfGguf(uint32_t type);
uint32_t GgufTypeOf(DType dtype);

class GgufFile {
 public:
  // InvalidArgument is one line: file, key or tensor, expected, found. No tensor data is touched.
  static absl::StatusOr<std::shared_ptr<const GgufFile>> Open(const std::string& path);
  // `bytes` is the whole file and outlives the result; `source` names it in errors.
  static absl::StatusOr<std::shared_ptr<const GgufFile>> Parse(std::span<const std::byte> bytes,
                                                               const std::string& source);
  ~GgufFile();
  GgufFile(const GgufFile&) = delete;
  GgufFile& operator=(const GgufFile&) = delete;

  const std::string& source() const { return source_; }
  const std::map<std::string, GgufTensor, std::less<>>& tensors() const { return tensors_; }
  const std::map<std::string, GgufValue, std::less<>>& metadata() const { return metadata_; }
  const GgufTensor* FindTensor(std::string_view name) const;
  const GgufValue* Find(std::string_view key) const;
  bool Has(std::string_view key) const { return Find(key) != nullptr; }

  // Typed reads. NotFound where the key is absent, InvalidArgument where it is something else; both name file
  // and key. Integers of all widths are integers, f32 and f64 are numbers.
  absl::StatusOr<int64_t> Int(std::string_view key) const;
  absl::StatusOr<double> Number(std::string_view key) const;
  absl::StatusOr<bool> Bool(std::string_view key) const;
  absl::StatusOr<std::string_view> String(std::string_view key) const;
  // Views into the file. Their number is bounded by the file's size.
  absl::StatusOr<std::vector<std::string_view>> Strings(std::string_view key) const;
  absl::StatusOr<std::vector<float>> Floats(std::string_view key) const;
  absl::StatusOr<std::vector<int64_t>> Ints(std::string_view key) const;

 private:
  GgufFile() = default;
  friend class GgufParser;

  std::string source_;
  std::unique_ptr<MappedFile> file_;  // null after Parse()
  std::map<std::string, GgufValue, std::less<>> metadata_;
  std::map<std::string, GgufTensor, std::less<>> tensors_;
};

}  // namespace atp

#endif  // ATP_ENGINE_GGUF_H_
