#include "engine/safetensors_header.h"

#include <algorithm>
#include <array>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace atp {
namespace {

using Json = nlohmann::json;

absl::Status TensorError(const std::string& source, std::string_view tensor, absl::string_view message) {
  return absl::InvalidArgumentError(absl::StrCat(source, ": tensor ", QuoteForError(tensor), ": ", message));
}

struct NamedSize {
  absl::string_view name;
  size_t bytes;
};
constexpr std::array<NamedSize, 15> kDTypes = {{{"F64", 8},
                                                {"F32", 4},
                                                {"F16", 2},
                                                {"BF16", 2},
                                                {"F8_E4M3", 1},
                                                {"F8_E5M2", 1},
                                                {"I64", 8},
                                                {"I32", 4},
                                                {"I16", 2},
                                                {"I8", 1},
                                                {"U64", 8},
                                                {"U32", 4},
                                                {"U16", 2},
                                                {"U8", 1},
                                                {"BOOL", 1}}};

std::optional<size_t> ElementBytes(const std::string& dtype) {
  for (const NamedSize& known : kDTypes) {
    if (known.name == dtype) return known.bytes;
  }
  return std::nullopt;
}

std::string KnownDTypes() {
  return absl::StrJoin(kDTypes, ", ",
                       [](std::string* out, const NamedSize& d) { absl::StrAppend(out, d.name); });
}

// Both readers below are SAX handlers: the parser beneath them keeps its nesting on the heap, and they keep
// only what they were looking for, so neither depth nor size of a hostile document costs more than the
// document itself.
class SaxReader : public nlohmann::json_sax<Json> {
 public:
  explicit SaxReader(const std::string& source) : source_(source) {}

  absl::Status Read(const char* begin, const char* end) {
    const bool whole = Json::sax_parse(begin, end, this);
    if (error_.ok() && !whole) error_ = absl::InvalidArgumentError(absl::StrCat(source_, ": not valid JSON"));
    return error_;
  }

  bool null() override { return OnOther("null"); }
  bool boolean(bool value) override { return OnOther(value ? "true" : "false"); }
  bool number_integer(int64_t value) override { return OnOther(absl::StrCat(value)); }
  bool number_unsigned(uint64_t value) override { return OnUnsigned(value); }
  bool number_float(double, const std::string& text) override { return OnOther(text.substr(0, 40)); }
  bool binary(Json::binary_t&) override { return OnOther("binary"); }
  bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception&) override {
    return Fail(absl::InvalidArgumentError(
        absl::StrCat(source_, ": expected valid JSON, found a syntax error at byte ", position)));
  }

 protected:
  virtual bool OnUnsigned(uint64_t value) = 0;
  virtual bool OnOther(absl::string_view found) = 0;
  bool Fail(absl::Status status) {
    if (error_.ok()) error_ = std::move(status);
    return false;
  }

  const std::string& source_;

 private:
  absl::Status error_;
};

struct HeaderEntry {
  std::optional<std::string> dtype;
  std::optional<std::vector<uint64_t>> shape;
  std::optional<std::vector<uint64_t>> offsets;
};
using HeaderEntries = std::map<std::string, HeaderEntry, std::less<>>;

class HeaderReader : public SaxReader {
 public:
  using SaxReader::SaxReader;
  HeaderEntries entries;

  bool start_object(size_t) override {
    if (state_ == State::kStart) return Enter(State::kNames);
    if (state_ == State::kNames) return Enter(name_ == "__metadata__" ? State::kMetadata : State::kFields);
    return OnOther("an object");
  }

  bool end_object() override { return Enter(state_ == State::kNames ? State::kEnd : State::kNames); }

  bool key(std::string& key) override {
    if (state_ == State::kMetadata) return true;
    if (state_ == State::kFields) {
      field_ = key;
      const bool known = key == "dtype" || key == "shape" || key == "data_offsets";
      return known ||
             FailTensor(absl::StrCat("expected dtype, shape and data_offsets, found ", QuoteForError(key)));
    }
    name_ = key;
    if (key == "__metadata__") {
      if (std::exchange(has_metadata_, true)) return FailTensor("expected once, found twice");
      return true;
    }
    const auto [it, added] = entries.try_emplace(key);
    entry_ = &it->second;
    return added || FailTensor("expected once, found twice");
  }

  bool string(std::string& value) override {
    if (state_ == State::kMetadata) return true;
    if (state_ != State::kFields || field_ != "dtype") return OnOther("a string");
    if (entry_->dtype.has_value()) return FailTensor("expected one dtype, found two");
    if (!ElementBytes(value).has_value()) {
      return FailTensor(
          absl::StrCat("expected a dtype that is one of ", KnownDTypes(), ", found ", QuoteForError(value)));
    }
    entry_->dtype = value;
    return true;
  }

  bool start_array(size_t) override {
    if (state_ != State::kFields || field_ == "dtype") return OnOther("an array");
    std::optional<std::vector<uint64_t>>& numbers = field_ == "shape" ? entry_->shape : entry_->offsets;
    if (numbers.has_value()) return FailTensor(absl::StrCat("expected one ", field_, ", found two"));
    numbers_ = &numbers.emplace();
    return Enter(State::kNumbers);
  }

  bool end_array() override { return Enter(State::kFields); }

 protected:
  bool OnUnsigned(uint64_t value) override {
    if (state_ != State::kNumbers) return OnOther(absl::StrCat(value));
    const size_t limit = field_ == "shape" ? kMaxSafetensorsRank : 2;
    if (numbers_->size() == limit) {
      return FailTensor(absl::StrCat(field_, ": expected at most ", limit, " numbers, found more"));
    }
    numbers_->push_back(value);
    return true;
  }

  bool OnOther(absl::string_view found) override {
    switch (state_) {
      case State::kStart:
      case State::kEnd:
        return Fail(absl::InvalidArgumentError(
            absl::StrCat(source_, ": header: expected a JSON object, found ", found)));
      case State::kNames:
        return FailTensor(absl::StrCat("expected an object, found ", found));
      case State::kMetadata:
        return FailTensor(absl::StrCat("expected strings only, found ", found));
      case State::kFields:
        return FailTensor(absl::StrCat(field_, ": expected ",
                                       field_ == "dtype" ? "a string" : "an array of integers", ", found ",
                                       found));
      case State::kNumbers:
        return FailTensor(absl::StrCat(field_, ": expected an integer from 0 to 2^64 - 1, found ", found));
    }
    return false;
  }

 private:
  enum class State { kStart, kNames, kMetadata, kFields, kNumbers, kEnd };

  bool Enter(State state) {
    state_ = state;
    return true;
  }
  bool FailTensor(absl::string_view message) { return Fail(TensorError(source_, name_, message)); }

  State state_ = State::kStart;
  std::string name_;   // of the tensor being read
  std::string field_;  // of it
  HeaderEntry* entry_ = nullptr;
  std::vector<uint64_t>* numbers_ = nullptr;
  bool has_metadata_ = false;
};

// Takes the strings of the top-level object "weight_map", and skips everything else.
class IndexReader : public SaxReader {
 public:
  using SaxReader::SaxReader;
  SafetensorsIndex index;
  bool has_weight_map = false;

  bool start_object(size_t) override {
    if (depth_ == 1 && at_weight_map_) {
      if (std::exchange(has_weight_map, true)) {
        return Fail(
            absl::InvalidArgumentError(absl::StrCat(source_, ": weight_map: expected once, found twice")));
      }
      in_weight_map_ = true;
    } else if (in_weight_map_) {
      return OnOther("an object");
    }
    ++depth_;
    return true;
  }
  bool end_object() override {
    --depth_;
    in_weight_map_ = false;
    return true;
  }
  bool start_array(size_t) override {
    if (Relevant()) return OnOther("an array");
    ++depth_;
    return true;
  }
  bool end_array() override {
    --depth_;
    return true;
  }
  bool key(std::string& key) override {
    if (depth_ == 1) at_weight_map_ = key == "weight_map";
    if (in_weight_map_) name_ = key;
    return true;
  }
  bool string(std::string& value) override {
    if (!in_weight_map_) return OnOther("a string");
    const bool plain = absl::EndsWith(value, ".safetensors") && value.size() <= 255 && value[0] != '.' &&
                       value.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos;
    if (!plain) {
      return Fail(
          TensorError(source_, name_,
                      absl::StrCat("expected the plain name of a .safetensors file beside the index, found ",
                                   QuoteForError(value))));
    }
    if (!index.try_emplace(name_, value).second) {
      return Fail(TensorError(source_, name_, "expected once, found twice"));
    }
    return true;
  }

 protected:
  bool OnUnsigned(uint64_t value) override { return OnOther(absl::StrCat(value)); }
  bool OnOther(absl::string_view found) override {
    if (in_weight_map_) {
      return Fail(TensorError(source_, name_, absl::StrCat("expected the name of a shard, found ", found)));
    }
    if (!Relevant()) return true;
    return Fail(absl::InvalidArgumentError(
        absl::StrCat(source_, depth_ == 0 ? "" : ": weight_map", ": expected a JSON object, found ", found)));
  }

 private:
  bool Relevant() const { return depth_ == 0 || in_weight_map_ || (depth_ == 1 && at_weight_map_); }

  size_t depth_ = 0;
  bool at_weight_map_ = false;
  bool in_weight_map_ = false;
  std::string name_;
};

std::string ShapeText(const std::vector<uint64_t>& shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

// What one entry says of itself: all fields there, offsets inside the data, shape × dtype = bytes.
absl::Status CheckEntry(const HeaderEntry& entry, size_t data_bytes, const std::string& source,
                        std::string_view name) {
  if (!entry.dtype.has_value()) return TensorError(source, name, "expected a dtype, found none");
  if (!entry.shape.has_value()) return TensorError(source, name, "expected a shape, found none");
  if (!entry.offsets.has_value() || entry.offsets->size() != 2) {
    return TensorError(source, name,
                       absl::StrCat("data_offsets: expected 2 integers, found ",
                                    entry.offsets.has_value() ? entry.offsets->size() : 0));
  }
  const uint64_t begin = (*entry.offsets)[0];
  const uint64_t end = (*entry.offsets)[1];
  if (begin > end) {
    return TensorError(source, name,
                       absl::StrCat("data_offsets: expected begin <= end, found [", begin, ", ", end, "]"));
  }
  if (end > data_bytes) {
    return TensorError(source, name,
                       absl::StrCat("data_offsets: expected an end of at most ", data_bytes,
                                    ", the bytes of data in the file, found ", end,
                                    "; the file may be truncated, download it again"));
  }
  // A dimension of 0 makes the tensor empty whatever the others are, also where their product would overflow.
  const bool has_zero = std::find(entry.shape->begin(), entry.shape->end(), 0u) != entry.shape->end();
  uint64_t bytes = has_zero ? 0 : *ElementBytes(*entry.dtype);
  constexpr uint64_t kMax = std::numeric_limits<int64_t>::max();
  for (const uint64_t dim : *entry.shape) {
    if (dim > kMax || (!has_zero && bytes > kMax / dim)) {
      return TensorError(
          source, name,
          absl::StrCat("expected a shape whose bytes fit into 63 bits, found ", ShapeText(*entry.shape)));
    }
    bytes *= dim;
  }
  if (bytes != end - begin) {
    return TensorError(
        source, name,
        absl::StrCat("expected ", bytes, " bytes for ", *entry.dtype, " ", ShapeText(*entry.shape),
                     ", found data_offsets of ", end - begin, " bytes"));
  }
  return absl::OkStatus();
}

// What the entries say together: they cover the data section exactly.
absl::Status CheckCover(const HeaderEntries& entries, size_t data_bytes, const std::string& source) {
  std::vector<HeaderEntries::const_iterator> order;
  order.reserve(entries.size());
  for (auto it = entries.begin(); it != entries.end(); ++it) order.push_back(it);
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return *a->second.offsets < *b->second.offsets;  // lexicographic: begin, then end
  });
  uint64_t covered = 0;
  std::string_view previous;
  for (const auto& it : order) {
    const uint64_t begin = (*it->second.offsets)[0];
    if (begin != covered) {
      const std::string where =
          previous.empty() ? "" : absl::StrCat(", where tensor ", QuoteForError(previous), " ends");
      return TensorError(source, it->first,
                         absl::StrCat("expected data to begin at byte ", covered, where, ", found ", begin,
                                      begin < covered ? " (overlapping tensors)" : " (a gap)"));
    }
    covered = (*it->second.offsets)[1];
    previous = it->first;
  }
  if (covered != data_bytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        source, ": expected ", covered, " bytes of tensor data as the header says, found ", data_bytes));
  }
  return absl::OkStatus();
}

}  // namespace

std::string QuoteForError(std::string_view name) {
  constexpr size_t kLimit = 120;
  const std::string_view cut = name.substr(0, kLimit);
  return absl::StrCat("'", absl::CHexEscape({cut.data(), cut.size()}), name.size() > kLimit ? "…" : "", "'");
}

absl::StatusOr<SafetensorsTensors> ParseSafetensors(std::span<const std::byte> file,
                                                    const std::string& source) {
  constexpr size_t kLengthBytes = 8;
  if (file.size() < kLengthBytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        source, ": expected at least 8 bytes of header length, found a file of ", file.size(), " bytes"));
  }
  uint64_t header_bytes = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) header_bytes |= std::to_integer<uint64_t>(file[i]) << (8 * i);
  const size_t rest = file.size() - kLengthBytes;
  if (header_bytes > kMaxSafetensorsHeaderBytes) {
    return absl::InvalidArgumentError(absl::StrCat(source, ": header length: expected at most ",
                                                   kMaxSafetensorsHeaderBytes, " bytes, found ", header_bytes,
                                                   "; this may not be a safetensors file"));
  }
  if (header_bytes > rest) {
    return absl::InvalidArgumentError(absl::StrCat(source, ": header length: expected at most ", rest,
                                                   " bytes, the rest of the file, found ", header_bytes,
                                                   "; the file may be truncated, download it again"));
  }
  HeaderReader reader(source);
  const char* header = reinterpret_cast<const char*>(file.data()) + kLengthBytes;
  if (absl::Status read = reader.Read(header, header + header_bytes); !read.ok()) return read;

  const std::span<const std::byte> data = file.subspan(kLengthBytes + header_bytes);
  for (const auto& [name, entry] : reader.entries) {
    if (absl::Status checked = CheckEntry(entry, data.size(), source, name); !checked.ok()) return checked;
  }
  if (absl::Status cover = CheckCover(reader.entries, data.size(), source); !cover.ok()) return cover;

  SafetensorsTensors tensors;
  for (auto& [name, entry] : reader.entries) {
    const uint64_t begin = (*entry.offsets)[0];
    SafetensorsTensor& tensor = tensors[name];
    tensor.file = source;
    tensor.dtype = std::move(*entry.dtype);
    tensor.shape.assign(entry.shape->begin(), entry.shape->end());
    tensor.data = data.subspan(begin, (*entry.offsets)[1] - begin);
  }
  return tensors;
}

absl::StatusOr<SafetensorsIndex> ParseSafetensorsIndex(std::string_view json, const std::string& source) {
  if (json.size() > kMaxSafetensorsHeaderBytes) {
    return absl::InvalidArgumentError(absl::StrCat(source, ": expected at most ", kMaxSafetensorsHeaderBytes,
                                                   " bytes, found ", json.size()));
  }
  IndexReader reader(source);
  if (absl::Status read = reader.Read(json.data(), json.data() + json.size()); !read.ok()) return read;
  if (!reader.has_weight_map) {
    return absl::InvalidArgumentError(absl::StrCat(source, ": expected a key weight_map, found none"));
  }
  return std::move(reader.index);
}

}  // namespace atp
