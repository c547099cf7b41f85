#include "engine/gguf.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/mapped_file.h"
#include "engine/safetensors_header.h"

namespace atp {

static_assert(std::endian::native == std::endian::little, "numbers are read as they lie in the file");

namespace {

constexpr uint64_t kMaxKeyBytes = 65535;
constexpr uint64_t kMaxTensorNameBytes = 255;
constexpr uint64_t kMaxEntries = 1 << 17;  // of metadata, and tensors
constexpr uint64_t kMaxAlignment = 1 << 20;
constexpr uint32_t kOwnQ4 = 0x41545001;  // "ATP" and a one

struct TypeNumber {
  uint32_t number;
  DType dtype;
};
constexpr TypeNumber kTensorTypes[] = {{0, DType::kF32},   {1, DType::kF16},   {2, DType::kQ4_0},
                                       {8, DType::kQ8_0},  {12, DType::kQ4_K}, {13, DType::kQ5_K},
                                       {14, DType::kQ6_K}, {30, DType::kBF16}, {kOwnQ4, DType::kQ4}};

// Types of ggml that are not served, for the message.
std::string TypeName(uint32_t type) {
  constexpr std::pair<uint32_t, const char*> others[] = {
      {3, "Q4_1"},   {6, "Q5_0"},     {7, "Q5_1"},    {9, "Q8_1"},     {10, "Q2_K"},  {11, "Q3_K"},
      {15, "Q8_K"},  {16, "IQ2_XXS"}, {17, "IQ2_XS"}, {18, "IQ3_XXS"}, {19, "IQ1_S"}, {20, "IQ4_NL"},
      {21, "IQ3_S"}, {22, "IQ2_S"},   {23, "IQ4_XS"}, {24, "I8"},      {25, "I16"},   {26, "I32"},
      {27, "I64"},   {28, "F64"},     {29, "IQ1_M"},  {34, "TQ1_0"},   {35, "TQ2_0"}};
  for (const auto& [number, name] : others) {
    if (number == type) return name;
  }
  return absl::StrCat("type ", type);
}

constexpr const char* kValueTypeNames[] = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                           "bool", "string", "array", "u64", "i64", "f64"};
constexpr size_t kValueBytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};  // 0: of varying length

template <typename T>
T Load(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

std::string FoundText(const GgufValue& value) {
  const std::string type = kValueTypeNames[static_cast<uint32_t>(value.type)];
  return value.is_array ? absl::StrCat("an array of ", type) : type;
}

int64_t IntegerAt(GgufType type, const std::byte* at) {
  switch (type) {
    case GgufType::kU8:
      return Load<uint8_t>(at);
    case GgufType::kI8:
      return Load<int8_t>(at);
    case GgufType::kU16:
      return Load<uint16_t>(at);
    case GgufType::kI16:
      return Load<int16_t>(at);
    case GgufType::kU32:
      return Load<uint32_t>(at);
    case GgufType::kI32:
      return Load<int32_t>(at);
    case GgufType::kU64:
      return static_cast<int64_t>(
          std::min<uint64_t>(Load<uint64_t>(at), std::numeric_limits<int64_t>::max()));
    default:
      return Load<int64_t>(at);
  }
}

bool IsInteger(GgufType type) {
  return type != GgufType::kF32 && type != GgufType::kF64 && type != GgufType::kBool &&
         type != GgufType::kString && type != GgufType::kArray;
}

}  // namespace

std::optional<DType> DTypeOfGguf(uint32_t type) {
  for (const TypeNumber& known : kTensorTypes) {
    if (known.number == type) return known.dtype;
  }
  return std::nullopt;
}

uint32_t GgufTypeOf(DType dtype) {
  for (const TypeNumber& known : kTensorTypes) {
    if (known.dtype == dtype) return known.number;
  }
  return 0;
}

// Reads from front to back. The first problem sticks, and every later read returns zeros.
class GgufParser {
 public:
  GgufParser(std::span<const std::byte> bytes, GgufFile* file) : bytes_(bytes), file_(file) {}

  absl::Status Run() {
    ReadHeader();
    for (uint64_t i = 0; i < metadata_count_ && status_.ok(); ++i) ReadMetadata();
    ReadAlignment();
    for (uint64_t i = 0; i < tensor_count_ && status_.ok(); ++i) ReadTensorInfo();
    PlaceTensors();
    return status_;
  }

 private:
  struct Placement {
    uint64_t offset, end;
    const std::string* name;
    GgufTensor* tensor;
  };

  void Fail(absl::string_view message) {
    if (status_.ok()) status_ = absl::InvalidArgumentError(absl::StrCat(file_->source_, ": ", message));
  }
  void FailAt(absl::string_view kind, std::string_view name, absl::string_view message) {
    if (status_.ok()) Fail(absl::StrCat(kind, " ", QuoteForError(name), ": ", message));
  }

  uint64_t left() const { return std::min<uint64_t>(bytes_.size(), kMaxGgufHeaderBytes) - at_; }

  // The next bytes; empty, and a failure, when they are not there.
  std::span<const std::byte> Take(uint64_t size, absl::string_view what) {
    if (!status_.ok()) return {};
    if (size > left()) {
      const bool cut = size > bytes_.size() - at_;
      Fail(absl::StrCat(
          "expected ", size, " bytes of ", what, " at byte ", at_, ", found ",
          cut ? absl::StrCat("the end of the file after ", bytes_.size() - at_)
              : absl::StrCat("the limit of ", kMaxGgufHeaderBytes, " bytes before tensor data")));
      return {};
    }
    const auto taken = bytes_.subspan(at_, size);
    at_ += size;
    return taken;
  }

  template <typename T>
  T Number(absl::string_view what) {
    const auto taken = Take(sizeof(T), what);
    return taken.empty() ? T() : Load<T>(taken.data());
  }

  std::string_view Text(uint64_t limit, absl::string_view what) {
    const uint64_t length = Number<uint64_t>(what);
    if (status_.ok() && length > limit) {
      Fail(
          absl::StrCat("expected ", what, " of at most ", limit, " bytes at byte ", at_, ", found ", length));
    }
    const auto taken = Take(length, what);
    return {reinterpret_cast<const char*>(taken.data()), taken.size()};
  }

  void ReadHeader() {
    const auto magic = Take(4, "the magic number");
    if (status_.ok() && std::memcmp(magic.data(), "GGUF", 4) != 0) {
      Fail(absl::StrCat("expected a GGUF file, found one that begins with ",
                        QuoteForError({reinterpret_cast<const char*>(magic.data()), 4})));
    }
    const uint32_t version = Number<uint32_t>("the version");
    if (status_.ok() && version != 2 && version != 3) {
      Fail(absl::StrCat("expected GGUF version 2 or 3, found ", version,
                        (version & 0xffffu) == 0 ? " (a big-endian file?)" : ""));
    }
    tensor_count_ = Number<uint64_t>("the number of tensors");
    metadata_count_ = Number<uint64_t>("the number of metadata entries");
    // The shortest tensor entry and the shortest metadata entry: counts beyond are refused before any work.
    CheckCount(tensor_count_, 32, "tensors");
    CheckCount(metadata_count_, 13, "metadata entries");
  }

  void CheckCount(uint64_t count, uint64_t min_bytes, absl::string_view what) {
    const uint64_t most = std::min(left() / min_bytes, kMaxEntries);
    if (status_.ok() && count > most) {
      Fail(
          absl::StrCat("expected at most ", most, " ", what, " in ", bytes_.size(), " bytes, found ", count));
    }
  }

  void ReadMetadata() {
    const std::string_view key = Text(kMaxKeyBytes, "a metadata key");
    uint32_t type = Number<uint32_t>("a metadata type");
    GgufValue value;
    value.is_array = type == static_cast<uint32_t>(GgufType::kArray);
    if (value.is_array) {
      type = Number<uint32_t>("an array's type");
      value.count = Number<uint64_t>("an array's length");
    }
    if (!status_.ok()) return;
    if (type > static_cast<uint32_t>(GgufType::kF64) || type == static_cast<uint32_t>(GgufType::kArray)) {
      return FailAt("key", key,
                    absl::StrCat("expected a value type from 0 to 12, no array of arrays, found ", type));
    }
    value.type = static_cast<GgufType>(type);
    const size_t begin = at_;
    if (value.type == GgufType::kString) {
      if (value.count > left() / 8) {
        return FailAt(
            "key", key,
            absl::StrCat("expected at most ", left() / 8, " strings in the bytes left, found ", value.count));
      }
      for (uint64_t i = 0; i < value.count && status_.ok(); ++i) {
        Text(std::numeric_limits<uint64_t>::max(), "a metadata string");
      }
    } else {
      const uint64_t each = kValueBytes[type];
      if (value.count > left() / each) {
        return FailAt("key", key,
                      absl::StrCat("expected at most ", left() / each, " elements in the bytes left, found ",
                                   value.count));
      }
      Take(value.count * each, "metadata");
    }
    if (!status_.ok()) return;
    value.bytes = bytes_.subspan(begin, at_ - begin);
    if (!file_->metadata_.emplace(std::string(key), value).second) {
      FailAt("key", key, "expected each key once, found it twice");
    }
  }

  void ReadAlignment() {
    if (!status_.ok() || !file_->Has("general.alignment")) return;
    const absl::StatusOr<int64_t> given = file_->Int("general.alignment");
    if (!given.ok()) {
      status_ = given.status();
    } else if (*given < 1 || static_cast<uint64_t>(*given) > kMaxAlignment ||
               !std::has_single_bit(static_cast<uint64_t>(*given))) {
      FailAt("key", "general.alignment",
             absl::StrCat("expected a power of two up to ", kMaxAlignment, ", found ", *given));
    } else {
      alignment_ = static_cast<uint64_t>(*given);
    }
  }

  void ReadTensorInfo() {
    const std::string_view name = Text(kMaxTensorNameBytes, "a tensor name");
    const uint32_t rank = Number<uint32_t>("a tensor's rank");
    if (status_.ok() && (rank == 0 || rank > kMaxGgufRank)) {
      return FailAt("tensor", name,
                    absl::StrCat("expected 1 to ", kMaxGgufRank, " dimensions, found ", rank));
    }
    std::array<uint64_t, kMaxGgufRank> dims = {};
    for (uint32_t i = 0; i < rank && status_.ok(); ++i) dims[i] = Number<uint64_t>("a tensor's shape");
    const uint32_t type = Number<uint32_t>("a tensor's type");
    const uint64_t offset = Number<uint64_t>("a tensor's offset");
    if (!status_.ok()) return;
    const std::optional<DType> dtype = DTypeOfGguf(type);
    if (!dtype.has_value()) {
      return FailAt("tensor", name,
                    absl::StrCat("expected type F32, F16, BF16, Q8_0, Q4_0, Q4_K, Q5_K or Q6_K, found ",
                                 TypeName(type)));
    }
    const DTypeBlock block = BlockOf(*dtype);
    if (dims[0] % static_cast<uint64_t>(block.elements) != 0) {
      return FailAt("tensor", name,
                    absl::StrCat("expected rows of whole blocks of ", block.elements, " (",
                                 std::string(block.name), "), found ", dims[0], " elements"));
    }
    uint64_t blocks = dims[0] / static_cast<uint64_t>(block.elements);
    // No tensor is larger than the file, so its count of blocks is at most that.
    for (uint32_t i = 0; i < rank; ++i) {
      const uint64_t factor = i == 0 ? 1 : dims[i];
      if (dims[i] == 0 || dims[i] > INT64_MAX || blocks > bytes_.size() / factor) {
        return FailAt(
            "tensor", name,
            absl::StrCat("expected a shape that fits into a file of ", bytes_.size(), " bytes, found [",
                         absl::StrJoin(dims.rend() - rank, dims.rend(), ", "), "]"));
      }
      blocks *= factor;
    }
    AddTensor(name, *dtype, {dims.rend() - rank, dims.rend()}, offset,
              blocks * static_cast<uint64_t>(block.bytes));
  }

  void AddTensor(std::string_view name, DType dtype, std::vector<int64_t> shape, uint64_t offset,
                 uint64_t bytes) {
    if (offset % alignment_ != 0) {
      return FailAt(
          "tensor", name,
          absl::StrCat("expected an offset that is a multiple of ", alignment_, ", found ", offset));
    }
    if (offset > bytes_.size() || bytes > bytes_.size() - offset) {
      return FailAt("tensor", name,
                    absl::StrCat("expected ", bytes, " bytes at offset ", offset, ", found a file of ",
                                 bytes_.size(), " bytes"));
    }
    const auto [it, is_new] =
        file_->tensors_.emplace(std::string(name), GgufTensor{dtype, std::move(shape), {}});
    if (!is_new) return FailAt("tensor", name, "expected each tensor once, found it twice");
    placements_.push_back({offset, offset + bytes, &it->first, &it->second});
  }

  void PlaceTensors() {
    if (!status_.ok()) return;
    std::sort(placements_.begin(), placements_.end(),
              [](const Placement& a, const Placement& b) { return a.offset < b.offset; });
    const uint64_t begin = (at_ + alignment_ - 1) / alignment_ * alignment_;
    uint64_t covered = 0;
    for (const Placement& p : placements_) {
      if (p.offset < covered) {
        return FailAt("tensor", *p.name,
                      absl::StrCat("expected its own bytes, found offset ", p.offset,
                                   " inside of another tensor's data"));
      }
      if (begin > bytes_.size() || p.end > bytes_.size() - begin) {
        return FailAt("tensor", *p.name,
                      absl::StrCat("expected data up to byte ", begin + p.end, ", found a file of ",
                                   bytes_.size(), " bytes"));
      }
      p.tensor->data = bytes_.subspan(begin + p.offset, p.end - p.offset);
      covered = p.end;
    }
  }

  std::span<const std::byte> bytes_;
  GgufFile* file_;
  absl::Status status_;
  uint64_t at_ = 0;
  uint64_t tensor_count_ = 0;
  uint64_t metadata_count_ = 0;
  uint64_t alignment_ = 32;
  std::vector<Placement> placements_;
};

GgufFile::~GgufFile() = default;

absl::StatusOr<std::shared_ptr<const GgufFile>> GgufFile::Parse(std::span<const std::byte> bytes,
                                                                const std::string& source) {
  std::shared_ptr<GgufFile> file(new GgufFile());
  file->source_ = source;
  if (absl::Status s = GgufParser(bytes, file.get()).Run(); !s.ok()) return s;
  return file;
}

absl::StatusOr<std::shared_ptr<const GgufFile>> GgufFile::Open(const std::string& path) {
  absl::StatusOr<std::unique_ptr<MappedFile>> mapped = MappedFile::Open(path);
  if (!mapped.ok()) return mapped.status();
  std::shared_ptr<GgufFile> file(new GgufFile());
  file->source_ = path;
  if (absl::Status s = GgufParser((*mapped)->bytes(), file.get()).Run(); !s.ok()) return s;
  file->file_ = *std::move(mapped);
  return file;
}

const GgufTensor* GgufFile::FindTensor(std::string_view name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

const GgufValue* GgufFile::Find(std::string_view key) const {
  const auto it = metadata_.find(key);
  return it == metadata_.end() ? nullptr : &it->second;
}

namespace {

// The value if it is there and `fits`, else the error.
template <typename Fits>
absl::StatusOr<const GgufValue*> Expect(const GgufFile& file, std::string_view key,
                                        absl::string_view expected, Fits fits) {
  const GgufValue* value = file.Find(key);
  const std::string where =
      absl::StrCat(file.source(), ": key ", QuoteForError(key), ": expected ", expected);
  if (value == nullptr) return absl::NotFoundError(absl::StrCat(where, ", found no such key"));
  if (!fits(*value)) return absl::InvalidArgumentError(absl::StrCat(where, ", found ", FoundText(*value)));
  return value;
}

// The string that begins at *at, which moves behind it. Lengths were checked by the parser.
std::string_view NextString(std::span<const std::byte> bytes, size_t* at) {
  const auto length = static_cast<size_t>(Load<uint64_t>(bytes.data() + *at));
  const std::string_view text(reinterpret_cast<const char*>(bytes.data() + *at + 8), length);
  *at += 8 + length;
  return text;
}

}  // namespace

absl::StatusOr<int64_t> GgufFile::Int(std::string_view key) const {
  const auto value =
      Expect(*this, key, "an integer", [](const GgufValue& v) { return !v.is_array && IsInteger(v.type); });
  if (!value.ok()) return value.status();
  return IntegerAt((*value)->type, (*value)->bytes.data());
}

absl::StatusOr<double> GgufFile::Number(std::string_view key) const {
  const auto value = Expect(*this, key, "a number", [](const GgufValue& v) {
    return !v.is_array && v.type != GgufType::kString && v.type != GgufType::kBool;
  });
  if (!value.ok()) return value.status();
  const std::byte* at = (*value)->bytes.data();
  if ((*value)->type == GgufType::kF32) return Load<float>(at);
  if ((*value)->type == GgufType::kF64) return Load<double>(at);
  return static_cast<double>(IntegerAt((*value)->type, at));
}

absl::StatusOr<bool> GgufFile::Bool(std::string_view key) const {
  const auto value = Expect(*this, key, "a bool",
                            [](const GgufValue& v) { return !v.is_array && v.type == GgufType::kBool; });
  if (!value.ok()) return value.status();
  return Load<uint8_t>((*value)->bytes.data()) != 0;
}

absl::StatusOr<std::string_view> GgufFile::String(std::string_view key) const {
  const auto value = Expect(*this, key, "a string",
                            [](const GgufValue& v) { return !v.is_array && v.type == GgufType::kString; });
  if (!value.ok()) return value.status();
  size_t at = 0;
  return NextString((*value)->bytes, &at);
}

absl::StatusOr<std::vector<std::string_view>> GgufFile::Strings(std::string_view key) const {
  const auto value = Expect(*this, key, "an array of strings",
                            [](const GgufValue& v) { return v.is_array && v.type == GgufType::kString; });
  if (!value.ok()) return value.status();
  std::vector<std::string_view> strings;
  strings.reserve((*value)->count);
  for (size_t at = 0; at < (*value)->bytes.size();) strings.push_back(NextString((*value)->bytes, &at));
  return strings;
}

absl::StatusOr<std::vector<float>> GgufFile::Floats(std::string_view key) const {
  const auto value = Expect(*this, key, "an array of f32",
                            [](const GgufValue& v) { return v.is_array && v.type == GgufType::kF32; });
  if (!value.ok()) return value.status();
  std::vector<float> floats((*value)->count);
  if (!floats.empty()) std::memcpy(floats.data(), (*value)->bytes.data(), (*value)->bytes.size());
  return floats;
}

absl::StatusOr<std::vector<int64_t>> GgufFile::Ints(std::string_view key) const {
  const auto value = Expect(*this, key, "an array of integers",
                            [](const GgufValue& v) { return v.is_array && IsInteger(v.type); });
  if (!value.ok()) return value.status();
  const size_t each = kValueBytes[static_cast<uint32_t>((*value)->type)];
  std::vector<int64_t> ints;
  ints.reserve((*value)->count);
  for (size_t i = 0; i < (*value)->count; ++i) {
    ints.push_back(IntegerAt((*value)->type, (*value)->bytes.data() + i * each));
  }
  return ints;
}

}  // namespace atp
