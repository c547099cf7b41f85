#include "engine/bpe_model.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <queue>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/safetensors_header.h"
#include "engine/utf8.h"

namespace atp {
namespace {

// absl::string_view is not std::string_view in Debian's build, so the maps say themselves how to look up by
// view.
struct ViewHash {
  using is_transparent = void;
  size_t operator()(std::string_view s) const { return std::hash<std::string_view>()(s); }
};
struct ViewEqual {
  using is_transparent = void;
  bool operator()(std::string_view a, std::string_view b) const { return a == b; }
};

// The code point of each byte: printable Latin-1 as it is, the other bytes counted up from U+0100.
const std::array<uint16_t, 256>& PrintableCodes() {
  static const std::array<uint16_t, 256> codes = [] {
    std::array<uint16_t, 256> result{};
    uint16_t next = 0x100;
    for (int b = 0; b < 256; ++b) {
      const bool printable = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
      result[b] = printable ? static_cast<uint16_t>(b) : next++;
    }
    return result;
  }();
  return codes;
}

struct Merge {
  int32_t rank;
  TokenId result;
};

uint64_t PairKey(TokenId left, TokenId right) {
  return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
}

// A symbol of a word that is being merged, in a doubly linked list over the word.
struct Symbol {
  TokenId id;
  int previous;
  int next;  // -1: the last one
};

constexpr TokenId kGone = -1;  // merged into its left neighbour

struct Candidate {
  int32_t rank;
  int left;       // index of the left symbol
  uint64_t pair;  // ids when it was found: another merge may have changed them since
  TokenId result;
  // priority_queue pops the greatest: the lowest rank, the leftmost among equals.
  bool operator<(const Candidate& other) const {
    return rank != other.rank ? rank > other.rank : left > other.left;
  }
};

}  // namespace

std::string BytesToPrintable(std::string_view bytes) {
  std::string result;
  for (char c : bytes) {
    const uint16_t code = PrintableCodes()[static_cast<uint8_t>(c)];
    if (code < 0x80) {
      result += static_cast<char>(code);
    } else {
      result += static_cast<char>(0xC0 | code >> 6);
      result += static_cast<char>(0x80 | (code & 0x3F));
    }
  }
  return result;
}

std::optional<std::string> PrintableToBytes(std::string_view printable) {
  static const std::array<int16_t, 0x200> bytes = [] {
    std::array<int16_t, 0x200> result;
    result.fill(-1);
    for (int b = 0; b < 256; ++b) result[PrintableCodes()[b]] = static_cast<int16_t>(b);
    return result;
  }();
  std::string result;
  while (!printable.empty()) {
    const Utf8Step step = NextUtf8(printable);
    if (step.kind != Utf8Kind::kValid) return std::nullopt;
    const char32_t code = CodePoint(printable, step.length);
    if (code >= bytes.size() || bytes[code] < 0) return std::nullopt;
    result += static_cast<char>(bytes[code]);
    printable.remove_prefix(step.length);
  }
  return result;
}

struct BpeModel::Tables {
  BpeOptions options;
  int id_limit = 0;
  absl::flat_hash_map<std::string, TokenId, ViewHash, ViewEqual> ids;
  absl::flat_hash_map<uint64_t, Merge> merges;
  std::array<TokenId, 256> byte_ids;  // kGone: none. Of the byte itself, or of <0xXX> with byte_fallback

  std::optional<TokenId> Find(std::string_view bytes) const {
    const auto it = ids.find(bytes);
    return it == ids.end() ? std::nullopt : std::optional<TokenId>(it->second);
  }
  const Merge* FindMerge(TokenId left, TokenId right) const {
    const auto it = merges.find(PairKey(left, right));
    return it == merges.end() ? nullptr : &it->second;
  }
  void AppendUnknown(std::vector<Symbol>* symbols) const;
  void AppendCodePoint(std::string_view character, std::vector<Symbol>* symbols) const;
  std::vector<Symbol> Symbols(std::string_view word) const;
  void MergeAll(std::vector<Symbol>* symbols) const;
};

BpeModel::BpeModel(std::unique_ptr<Tables> tables) : tables_(std::move(tables)) {}
BpeModel::BpeModel(BpeModel&&) noexcept = default;
BpeModel& BpeModel::operator=(BpeModel&&) noexcept = default;
BpeModel::~BpeModel() = default;

absl::StatusOr<BpeModel> BpeModel::Create(const Vocabulary& vocabulary, BpeOptions options) {
  auto tables = std::make_unique<Tables>();
  tables->options = options;
  tables->ids.reserve(vocabulary.size());
  // Tables are sized by the highest id, so that must not be a number somebody just wrote into a small file.
  const int64_t highest = 2 * static_cast<int64_t>(vocabulary.size()) + 4096;
  for (const auto& [bytes, id] : vocabulary) {
    if (id < 0 || id > highest) {
      return absl::InvalidArgumentError(absl::StrCat("token ", QuoteForError(bytes), " has id ", id,
                                                     " in a vocabulary of ", vocabulary.size(),
                                                     " tokens; ids must be dense and start at 0"));
    }
    tables->ids[bytes] = id;
    tables->id_limit = std::max(tables->id_limit, id + 1);
  }
  for (int b = 0; b < 256; ++b) {
    const std::string key =
        options.byte_level ? std::string(1, static_cast<char>(b)) : absl::StrFormat("<0x%02X>", b);
    tables->byte_ids[b] = tables->Find(key).value_or(kGone);
  }
  return BpeModel(std::move(tables));
}

absl::Status BpeModel::AddMerge(std::string_view left, std::string_view right, int32_t rank) {
  const std::string merged = std::string(left).append(right);
  TokenId ids[3];
  const std::string_view parts[3] = {left, right, merged};
  for (int i = 0; i < 3; ++i) {
    const std::optional<TokenId> id = IdOf(parts[i]);
    if (!id) {
      return absl::NotFoundError(absl::StrCat("merge ", rank, " needs the token ", QuoteForError(parts[i]),
                                              ", which is not in the vocabulary"));
    }
    ids[i] = *id;
  }
  tables_->merges[PairKey(ids[0], ids[1])] = {rank, ids[2]};
  return absl::OkStatus();
}

void BpeModel::AddMergesOfRanks() {
  for (const auto& [bytes, id] : tables_->ids) {
    const std::string_view token = bytes;
    for (size_t cut = 1; cut < token.size(); ++cut) {
      const auto left = tables_->Find(token.substr(0, cut));
      if (!left) continue;
      const auto right = tables_->Find(token.substr(cut));
      if (right) tables_->merges[PairKey(*left, *right)] = {id, id};
    }
  }
}

void BpeModel::Tables::AppendUnknown(std::vector<Symbol>* symbols) const {
  if (!options.unknown) return;
  if (options.fuse_unknown && !symbols->empty() && symbols->back().id == *options.unknown) return;
  symbols->push_back({*options.unknown, 0, 0});
}

void BpeModel::Tables::AppendCodePoint(std::string_view character, std::vector<Symbol>* symbols) const {
  if (const auto id = Find(character)) {
    symbols->push_back({*id, 0, 0});
    return;
  }
  const auto has_token = [&](char c) { return byte_ids[static_cast<uint8_t>(c)] != kGone; };
  if (!options.byte_fallback || !std::all_of(character.begin(), character.end(), has_token)) {
    AppendUnknown(symbols);
    return;
  }
  for (char c : character) symbols->push_back({byte_ids[static_cast<uint8_t>(c)], 0, 0});
}

std::vector<Symbol> BpeModel::Tables::Symbols(std::string_view word) const {
  std::vector<Symbol> symbols;
  symbols.reserve(word.size());
  while (!word.empty()) {
    const size_t length = options.byte_level ? 1 : NextUtf8(word).length;
    if (options.byte_level) {
      const TokenId id = byte_ids[static_cast<uint8_t>(word[0])];
      if (id == kGone) {
        AppendUnknown(&symbols);
      } else {
        symbols.push_back({id, 0, 0});
      }
    } else {
      AppendCodePoint(word.substr(0, length), &symbols);
    }
    word.remove_prefix(length);
  }
  for (size_t i = 0; i < symbols.size(); ++i) {
    symbols[i].previous = static_cast<int>(i) - 1;
    symbols[i].next = i + 1 < symbols.size() ? static_cast<int>(i) + 1 : -1;
  }
  return symbols;
}

// Always the merge of lowest rank next, in n log n for a word of n symbols: candidates wait in a heap, and
// one whose symbols have changed since is skipped when it comes up.
void BpeModel::Tables::MergeAll(std::vector<Symbol>* symbols) const {
  std::priority_queue<Candidate> queue;
  const auto consider = [&](int left) {
    if (left < 0 || (*symbols)[left].next < 0) return;
    const TokenId a = (*symbols)[left].id, b = (*symbols)[(*symbols)[left].next].id;
    if (const Merge* merge = FindMerge(a, b)) queue.push({merge->rank, left, PairKey(a, b), merge->result});
  };
  for (size_t i = 0; i < symbols->size(); ++i) consider(static_cast<int>(i));
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    Symbol& left = (*symbols)[best.left];
    if (left.id == kGone || left.next < 0 || PairKey(left.id, (*symbols)[left.next].id) != best.pair)
      continue;
    Symbol& right = (*symbols)[left.next];
    left.id = best.result;
    left.next = right.next;
    right.id = kGone;
    if (left.next >= 0) (*symbols)[left.next].previous = best.left;
    consider(left.previous);
    consider(best.left);
  }
}

void BpeModel::Encode(std::string_view word, bool as_whole, std::vector<TokenId>* ids) const {
  if (as_whole && tables_->options.ignore_merges) {
    if (const auto id = tables_->Find(word)) {
      ids->push_back(*id);
      return;
    }
  }
  std::vector<Symbol> symbols = tables_->Symbols(word);
  if (symbols.size() > 1) tables_->MergeAll(&symbols);
  for (int i = symbols.empty() ? -1 : 0; i >= 0; i = symbols[i].next) ids->push_back(symbols[i].id);
}

std::optional<TokenId> BpeModel::IdOf(std::string_view bytes) const { return tables_->Find(bytes); }
int BpeModel::id_limit() const { return tables_->id_limit; }
const BpeOptions& BpeModel::options() const { return tables_->options; }

}  // namespace atp
