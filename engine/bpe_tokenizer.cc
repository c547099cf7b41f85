#include "engine/bpe_tokenizer.h"

#include <algorithm>
#include <cstdint>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "engine/safetensors_header.h"
#include "engine/utf8.h"

namespace atp {
namespace {

// The byte of "<0x0A>", -1 for any other token.
int FallbackByte(std::string_view token) {
  if (token.size() != 6 || token.substr(0, 3) != "<0x" || token[5] != '>') return -1;
  int value = 0;
  for (char c : token.substr(3, 2)) {
    const bool digit = c >= '0' && c <= '9', letter = c >= 'A' && c <= 'F';
    if (!digit && !letter) return -1;
    value = value * 16 + (digit ? c - '0' : c - 'A' + 10);
  }
  return value;
}

class BpeTokenizer : public Tokenizer {
 public:
  explicit BpeTokenizer(BpeParts parts) : parts_(std::move(parts)) {}

  absl::Status Init(const TokenizerConfig& config) {
    MergeAddedTokens(config.added_tokens);
    std::erase_if(parts_.added_tokens,
                  [&](const AddedToken& token) { return token.id >= config.embedding_rows; });
    int64_t limit = parts_.model.id_limit();
    const int64_t allowed = 2 * (limit + static_cast<int64_t>(parts_.added_tokens.size())) + 4096;
    std::vector<AddedToken> raw, normalized;
    for (AddedToken token : parts_.added_tokens) {
      if (token.id < 0 || token.id > allowed) {
        return absl::InvalidArgumentError(absl::StrCat("added token ", QuoteForError(token.content),
                                                       " has id ", token.id, ", but the vocabulary ends at ",
                                                       parts_.model.id_limit() - 1));
      }
      limit = std::max<int64_t>(limit, token.id + 1);
      added_ids_[token.content] = token.id;
      if (token.special) special_contents_.push_back(token.content);
      if (token.normalized && !parts_.normalizer.empty() && IsValidUtf8(token.content)) {
        token.content = parts_.normalizer.Apply(token.content);
        normalized.push_back(std::move(token));
      } else {
        raw.push_back(std::move(token));
      }
    }
    std::sort(special_contents_.begin(), special_contents_.end());
    raw_matcher_ = AddedTokenMatcher(std::move(raw));
    normalized_matcher_ = AddedTokenMatcher(std::move(normalized));
    BuildTokenBytes(static_cast<size_t>(limit));
    absl::StatusOr<ResolvedSpecials> specials = ResolveSpecials(
        config, parts_.defaults, vocab_size(), [this](std::string_view t) { return IdOf(t); });
    if (!specials.ok()) return specials.status();
    specials_ = *std::move(specials);
    const auto bos = specials_.special.bos;
    adds_bos_ = bos && !specials_.prefix.empty() && specials_.prefix[0] == *bos;
    parts_.vocabulary = {};
    return absl::OkStatus();
  }

  int vocab_size() const override { return static_cast<int>(token_bytes_.size()); }
  const SpecialTokens& special() const override { return specials_.special; }
  bool adds_bos() const override { return adds_bos_; }
  bool strips_leading_space() const override { return parts_.strips_leading_space; }

  std::vector<TokenId> Encode(std::string_view text, bool add_special, bool parse_special) const override {
    std::vector<TokenId> ids;
    if (add_special) ids = specials_.prefix;
    EncodeAdded(text, /*at_start=*/true, parse_special, &ids);
    if (add_special) ids.insert(ids.end(), specials_.suffix.begin(), specials_.suffix.end());
    return ids;
  }

  // Only the first part is where a text begins, for those that put a space there.
  std::vector<TokenId> EncodeParts(std::span<const PromptPart> parts) const override {
    std::vector<TokenId> ids;
    for (size_t i = 0; i < parts.size(); ++i) {
      if (parts[i].token) {
        ids.push_back(*parts[i].token);
      } else {
        EncodeAdded(parts[i].text, /*at_start=*/i == 0, /*parse_special=*/false, &ids);
      }
    }
    return ids;
  }

  std::string TokenBytes(TokenId id, bool keep_special) const override {
    if (id < 0 || id >= vocab_size() || (is_special_[id] && !keep_special)) return "";
    return token_bytes_[id];
  }

  std::optional<TokenId> IdOf(std::string_view token) const override {
    const auto added = added_ids_.find(std::string(token));
    if (added != added_ids_.end()) return added->second;
    if (parts_.model.options().byte_level) {
      if (const auto bytes = PrintableToBytes(token)) return parts_.model.IdOf(*bytes);
    }
    return parts_.model.IdOf(token);
  }

 private:
  // tokenizer_config.json repeats tokenizer.json's added tokens; by id, the former goes before.
  void MergeAddedTokens(const std::vector<AddedToken>& more) {
    absl::flat_hash_map<TokenId, size_t> by_id;
    for (size_t i = 0; i < parts_.added_tokens.size(); ++i) by_id[parts_.added_tokens[i].id] = i;
    for (const AddedToken& token : more) {
      const auto [it, is_new] = by_id.emplace(token.id, parts_.added_tokens.size());
      if (is_new) {
        parts_.added_tokens.push_back(token);
      } else {
        parts_.added_tokens[it->second] = token;
      }
    }
  }

  void BuildTokenBytes(size_t limit) {
    token_bytes_.resize(limit);
    is_special_.resize(limit);
    for (const auto& [bytes, id] : parts_.vocabulary) {
      const int byte = parts_.model.options().byte_fallback ? FallbackByte(bytes) : -1;
      if (byte >= 0) {
        token_bytes_[id] = std::string(1, static_cast<char>(byte));
      } else {
        token_bytes_[id] = parts_.space.empty() ? bytes : absl::StrReplaceAll(bytes, {{parts_.space, " "}});
      }
    }
    for (const AddedToken& token : parts_.added_tokens) {
      token_bytes_[token.id] = token.content;
      is_special_[token.id] = token.special;
    }
  }

  void EncodeAdded(std::string_view text, bool at_start, bool parse_special,
                   std::vector<TokenId>* ids) const {
    raw_matcher_.Split(
        text, parse_special,
        [&](std::string_view part) {
          EncodeText(part, at_start && part.data() == text.data(), parse_special, ids);
        },
        [&](TokenId id) { ids->push_back(id); });
  }

  // Words are made of valid UTF-8 only; broken bytes go to the model as they are, so that no byte is lost.
  void EncodeText(std::string_view text, bool at_start, bool parse_special, std::vector<TokenId>* ids) const {
    while (!text.empty()) {
      size_t valid = 0, broken = 0;
      while (valid < text.size()) {
        const Utf8Step step = NextUtf8(text.substr(valid));
        if (step.kind != Utf8Kind::kValid) {
          broken = step.length;
          break;
        }
        valid += step.length;
      }
      if (valid > 0) EncodeValid(text.substr(0, valid), at_start, parse_special, ids);
      if (broken > 0) parts_.model.Encode(text.substr(valid, broken), /*as_whole=*/false, ids);
      text.remove_prefix(valid + broken);
      at_start = false;
    }
  }

  void EncodeValid(std::string_view text, bool at_start, bool parse_special,
                   std::vector<TokenId>* ids) const {
    std::string normalized;
    if (!parts_.normalizer.empty()) {
      normalized = parts_.normalizer.Apply(text);
      text = normalized;
    }
    normalized_matcher_.Split(
        text, parse_special,
        [&](std::string_view part) { EncodeWords(part, at_start && part.data() == text.data(), ids); },
        [&](TokenId id) { ids->push_back(id); });
  }

  void EncodeWords(std::string_view text, bool at_start, std::vector<TokenId>* ids) const {
    const Words words = parts_.pre_tokenizer.Split(text, at_start);
    for (std::string_view word : words.words) {
      // Text that spells a control token must not become it, not even where ignore_merges would look it up
      // whole.
      parts_.model.Encode(word, !IsSpecialContent(word), ids);
    }
  }

  bool IsSpecialContent(std::string_view word) const {
    return std::binary_search(special_contents_.begin(), special_contents_.end(), word);
  }

  BpeParts parts_;
  AddedTokenMatcher raw_matcher_;         // looked for in the text as it came
  AddedTokenMatcher normalized_matcher_;  // looked for after normalization
  absl::flat_hash_map<std::string, TokenId> added_ids_;
  std::vector<std::string> special_contents_;  // sorted
  std::vector<std::string> token_bytes_;       // by id
  std::vector<bool> is_special_;               // by id
  ResolvedSpecials specials_;
  bool adds_bos_ = false;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> MakeBpeTokenizer(BpeParts parts, const TokenizerConfig& config) {
  auto tokenizer = std::make_unique<BpeTokenizer>(std::move(parts));
  if (absl::Status s = tokenizer->Init(config); !s.ok()) return s;
  return tokenizer;
}

}  // namespace atp
