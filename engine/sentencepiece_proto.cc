#include "engine/sentencepiece_proto.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/utf8.h"

namespace atp {
namespace {

constexpr int kMaxPieces = 4 << 20;
constexpr size_t kMaxPieceBytes = 4096;

absl::Status Malformed(const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat("not a SentencePiece model: ", what));
}

// One field of a protobuf message; which of the members holds its value depends on the wire type.
struct Field {
  uint32_t number = 0;
  uint32_t wire_type = 0;
  uint64_t varint = 0;     // wire type 0
  std::string_view bytes;  // wire types 1, 2 and 5
};

class Reader {
 public:
  explicit Reader(std::string_view bytes) : bytes_(bytes) {}

  // False at the end and at malformed bytes; `ok` tells which.
  bool Next(Field* field) {
    if (bytes_.empty()) return false;
    uint64_t tag = 0;
    ok_ = ReadVarint(&tag) && tag >> 3 != 0 && tag >> 32 == 0;
    field->number = static_cast<uint32_t>(tag >> 3);
    field->wire_type = tag & 7;
    field->bytes = {};
    uint64_t length = 0;
    switch (field->wire_type) {
      case 0:
        ok_ = ok_ && ReadVarint(&field->varint);
        return ok_;
      case 1:
        length = 8;
        break;
      case 2:
        ok_ = ok_ && ReadVarint(&length);
        break;
      case 5:
        length = 4;
        break;
      default:
        ok_ = false;
    }
    ok_ = ok_ && length <= bytes_.size();
    if (!ok_) return false;
    field->bytes = bytes_.substr(0, length);
    bytes_.remove_prefix(length);
    return true;
  }
  bool ok() const { return ok_; }

 private:
  bool ReadVarint(uint64_t* value) {
    *value = 0;
    for (int shift = 0; shift < 70 && !bytes_.empty(); shift += 7) {
      const uint8_t byte = static_cast<uint8_t>(bytes_[0]);
      bytes_.remove_prefix(1);
      if (shift < 64) *value |= uint64_t{byte & 0x7Fu} << shift;
      if (byte < 0x80) return true;
    }
    return false;
  }

  std::string_view bytes_;
  bool ok_ = true;
};

constexpr uint64_t kUserDefined = 4;  // of a piece's types

absl::Status CheckPiece(std::string_view bytes, uint64_t* type, std::string* of) {
  std::string& text = *of;
  float score = 0;
  Reader reader(bytes);
  for (Field field; reader.Next(&field);) {
    if (field.number == 1 && field.wire_type == 2) text = std::string(field.bytes);
    if (field.number == 2 && field.wire_type == 5) std::memcpy(&score, field.bytes.data(), sizeof(float));
    if (field.number == 3 && field.wire_type == 0) *type = field.varint;
    if (!std::isfinite(score)) return Malformed("a piece has no finite score");
  }
  if (!reader.ok()) return Malformed("a piece is cut");
  if (text.empty() || text.size() > kMaxPieceBytes || text.find('\0') != std::string::npos ||
      !IsValidUtf8(text)) {
    return Malformed("a piece is empty, too long or not UTF-8");
  }
  return absl::OkStatus();
}

// Of those that begin a text the library keeps 64 and counts beyond them.
absl::Status CheckUserDefined(std::vector<std::string> texts) {
  constexpr size_t kMostNested = 64;
  std::sort(texts.begin(), texts.end());
  std::vector<std::string_view> nested;  // each begins the one after it
  for (const std::string& text : texts) {
    while (!nested.empty() && !text.starts_with(nested.back())) nested.pop_back();
    nested.push_back(text);
    if (nested.size() > kMostNested) return Malformed("too many user-defined pieces begin one another");
  }
  return absl::OkStatus();
}

uint32_t LittleEndian32(std::string_view bytes) {
  uint32_t value = 0;
  for (int i = 3; i >= 0; --i) value = value << 8 | static_cast<uint8_t>(bytes[i]);
  return value;
}

// The precompiled character map: the size of a double-array trie (Darts-clone), its 32-bit units, then the
// replacements, each ended by NUL. The library walks the trie without bounds, so each unit it can reach must
// lead inside.
absl::Status CheckCharacterMap(std::string_view map) {
  if (map.empty()) return absl::OkStatus();
  if (map.size() < 4) return Malformed("the character map is cut");
  const size_t trie_bytes = LittleEndian32(map);
  if (trie_bytes > map.size() - 4 || trie_bytes % 4 != 0 || trie_bytes == 0) {
    return Malformed("the character map's trie is cut");
  }
  const std::string_view trie = map.substr(4, trie_bytes);
  const std::string_view replacements = map.substr(4 + trie_bytes);
  if (replacements.empty() || replacements.back() != '\0')
    return Malformed("the character map's texts are cut");
  const size_t units = trie_bytes / 4;
  const auto unit = [&](size_t i) { return LittleEndian32(trie.substr(4 * i)); };
  // The library keeps 32 matches of a text and counts beyond them, so no path may have more values; a path
  // that comes back to where it was has no end of them. Depth first, a node's count made when all its
  // children's are.
  constexpr int kMostValues = 32;
  constexpr int8_t kUnseen = -2, kOnPath = -1;
  std::vector<int8_t> values(units, kUnseen);  // on the path from here that has the most
  std::vector<size_t> path = {0};
  while (!path.empty()) {
    const size_t node = path.back();
    const uint32_t u = unit(node);
    const size_t base =
        node ^ (size_t{u >> 10} << ((u & (1u << 9)) >> 6));  // Darts-clone: DoubleArrayUnit::offset
    if ((base | 0xFF) >= units) return Malformed("the character map's trie leads outside itself");
    const bool has_value = u >> 8 & 1;  // at the child with label 0
    if (has_value && (unit(base) & 0x7FFFFFFF) >= replacements.size())
      return Malformed("the character map's trie points outside its texts");
    const bool first = values[node] == kUnseen;
    values[node] = kOnPath;
    int most = 0;
    for (size_t label = 0; label < 256; ++label) {
      const size_t child = base ^ label;
      if ((unit(child) & 0x800000FF) != label) continue;
      if (first && values[child] == kUnseen) {
        path.push_back(child);
      } else if (values[child] == kOnPath) {
        return Malformed("the character map's trie leads back into itself");
      }
      most = std::max<int>(most, values[child]);
    }
    if (first && path.back() != node) continue;  // its children first
    path.pop_back();
    most += has_value;
    if (most > kMostValues) return Malformed("the character map's trie has too many values on one path");
    values[node] = static_cast<int8_t>(most);
  }
  return absl::OkStatus();
}

absl::Status ParseNormalizer(std::string_view bytes, bool is_main, SentencePieceInfo* info) {
  Reader reader(bytes);
  for (Field field; reader.Next(&field);) {
    if (field.number == 2 && field.wire_type == 2) {
      if (absl::Status s = CheckCharacterMap(field.bytes); !s.ok()) return s;
    }
    if (is_main && field.number == 3 && field.wire_type == 0) info->add_dummy_prefix = field.varint != 0;
  }
  return reader.ok() ? absl::OkStatus() : Malformed("the normalizer is cut");
}

}  // namespace

absl::StatusOr<SentencePieceInfo> ParseSentencePieceProto(std::string_view bytes) {
  SentencePieceInfo info;
  std::vector<std::string> user_defined;
  Reader reader(bytes);
  for (Field field; reader.Next(&field);) {
    if (field.wire_type != 2) continue;
    absl::Status status;
    if (field.number == 1) {
      if (++info.pieces > kMaxPieces) return Malformed("too many pieces");
      uint64_t type = 0;
      std::string text;
      status = CheckPiece(field.bytes, &type, &text);
      if (type == kUserDefined) {
        info.user_defined.push_back(info.pieces - 1);
        user_defined.push_back(std::move(text));
      }
    } else if (field.number == 3 || field.number == 5) {  // normalizer_spec, denormalizer_spec
      status = ParseNormalizer(field.bytes, field.number == 3, &info);
    }
    if (!status.ok()) return status;
  }
  if (!reader.ok()) return Malformed("it is cut or not in protobuf form");
  if (info.pieces == 0) return Malformed("it has no pieces");
  if (absl::Status s = CheckUserDefined(std::move(user_defined)); !s.ok()) return s;
  return info;
}

}  // namespace atp
