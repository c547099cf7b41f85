#include "cli/npy.h"

#include <cstring>
#include <fstream>
#include <optional>
#include <sstream>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "engine/safetensors_header.h"

namespace atp {
namespace {

constexpr std::string_view kMagic("\x93NUMPY", 6);
constexpr size_t kMaxHeaderBytes = 64 << 10;

absl::Status Wrong(const std::string& source, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat(source, ": ", what));
}

template <typename T>
T ReadLittleEndian(const char* bytes) {  // as this machine: x86-64 and arm64 are little-endian
  T value;
  std::memcpy(&value, bytes, sizeof(value));
  return value;
}

// What stands after "'name':" in the header, a Python dictionary literal, up to the end of that value.
std::optional<std::string> Field(std::string_view header, std::string_view name, char close) {
  const std::string key = absl::StrCat("'", std::string(name), "':");
  size_t begin = header.find(key);
  if (begin == std::string_view::npos) return std::nullopt;
  begin = header.find_first_not_of(' ', begin + key.size());
  if (begin == std::string_view::npos) return std::nullopt;
  const size_t end = header.find(close, begin + 1);
  if (end == std::string_view::npos) return std::nullopt;
  return std::string(header.substr(begin, end - begin));
}

// "(12, 256" or "(512," as dimensions.
std::optional<std::vector<uint64_t>> ParseShape(std::string_view text) {
  if (text.empty() || text[0] != '(') return std::nullopt;
  std::vector<absl::string_view> sizes =
      absl::StrSplit(absl::string_view(text.data() + 1, text.size() - 1), ',');
  if (absl::StripAsciiWhitespace(sizes.back()).empty()) sizes.pop_back();  // of one dimension: (512,)
  std::vector<uint64_t> shape(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (!absl::SimpleAtoi(sizes[i], &shape[i])) return std::nullopt;
  }
  return shape;
}

struct Array {
  uint64_t rows = 0;
  uint64_t columns = 0;
  char kind = 0;  // 'i' or 'u'
  int item_bytes = 0;
  std::string_view data;
};

absl::StatusOr<Array> ParseArray(std::string_view bytes, const std::string& source) {
  if (bytes.size() < 10 || bytes.substr(0, 6) != kMagic) return Wrong(source, "not a .npy file");
  const int version = bytes[6];
  if (version != 1 && version != 2 && version != 3)
    return Wrong(source, absl::StrCat("unknown .npy version ", version));
  const size_t prefix = version == 1 ? 10 : 12;
  if (bytes.size() < prefix) return Wrong(source, "truncated header");
  const size_t header_bytes = version == 1 ? ReadLittleEndian<uint16_t>(bytes.data() + 8)
                                           : ReadLittleEndian<uint32_t>(bytes.data() + 8);
  if (header_bytes > kMaxHeaderBytes || header_bytes > bytes.size() - prefix) {
    return Wrong(source, absl::StrCat("header of ", header_bytes, " bytes, file of ", bytes.size()));
  }
  const std::string_view header = bytes.substr(prefix, header_bytes);
  const auto type = Field(header, "descr", ',');  // with its quotes
  const auto order = Field(header, "fortran_order", ',');
  const auto shape_text = Field(header, "shape", ')');
  if (!type || !order || !shape_text) return Wrong(source, "header without descr, fortran_order and shape");

  Array array;
  if (*type == "'<i4'") array = {0, 0, 'i', 4, {}};
  if (*type == "'<i8'") array = {0, 0, 'i', 8, {}};
  if (*type == "'<u2'") array = {0, 0, 'u', 2, {}};
  if (array.item_bytes == 0)
    return Wrong(source, absl::StrCat("expected int32, int64 or uint16, found dtype ",
                                      QuoteForError(absl::StrReplaceAll(*type, {{"'", ""}}))));
  if (*order != "False") return Wrong(source, "expected C order, found fortran_order");
  const auto shape = ParseShape(*shape_text);
  if (!shape || shape->empty() || shape->size() > 2) {
    return Wrong(source, absl::StrCat("expected shape (rows, tokens) or (tokens,), found ",
                                      QuoteForError(*shape_text + ")")));
  }
  array.columns = shape->back();
  array.rows = shape->size() == 2 ? shape->front() : 1;
  array.data = bytes.substr(prefix + header_bytes);
  const uint64_t items = array.data.size() / static_cast<uint64_t>(array.item_bytes);
  const bool whole = array.data.size() % static_cast<uint64_t>(array.item_bytes) == 0;
  // Divided, not multiplied: the product of an attacker's numbers could wrap.
  const bool fits = array.columns == 0 || array.rows == 0
                        ? items == 0
                        : items % array.columns == 0 && items / array.columns == array.rows;
  if (!whole || !fits) {
    return Wrong(source, absl::StrCat("shape ", QuoteForError(*shape_text + ")"), " of ", array.item_bytes,
                                      "-byte items does not match ", array.data.size(), " bytes of data"));
  }
  if (items == 0) return Wrong(source, "no tokens");
  return array;
}

}  // namespace

absl::StatusOr<std::vector<std::vector<TokenId>>> ParseTokenIds(std::string_view bytes,
                                                                const std::string& source,
                                                                int64_t vocab_size) {
  absl::StatusOr<Array> array = ParseArray(bytes, source);
  if (!array.ok()) return array.status();
  std::vector<std::vector<TokenId>> rows(array->rows);
  const char* at = array->data.data();
  for (uint64_t r = 0; r < array->rows; ++r) {
    rows[r].reserve(array->columns);
    for (uint64_t c = 0; c < array->columns; ++c, at += array->item_bytes) {
      const int64_t id = array->kind == 'u'       ? int64_t{ReadLittleEndian<uint16_t>(at)}
                         : array->item_bytes == 4 ? int64_t{ReadLittleEndian<int32_t>(at)}
                                                  : ReadLittleEndian<int64_t>(at);
      if (id < 0 || id >= vocab_size) {
        return Wrong(source, absl::StrCat("token ", id, " at [", r, ", ", c,
                                          "] is outside the vocabulary [0, ", vocab_size, ")"));
      }
      rows[r].push_back(static_cast<TokenId>(id));
    }
  }
  return rows;
}

absl::StatusOr<std::vector<std::vector<TokenId>>> ReadTokenIds(const std::string& path, int64_t vocab_size) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat(path, ": cannot be opened"));
  std::ostringstream bytes;
  bytes << file.rdbuf();
  return ParseTokenIds(bytes.str(), path, vocab_size);
}

}  // namespace atp
