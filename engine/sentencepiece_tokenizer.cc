// tokenizer.model through the sentencepiece library (Kudo and Richardson, arXiv 1808.06226).
//
// The library's header declares `absl::string_view` as std::string_view, which Debian's absl already has as a
// type of its own; under another name for that namespace both headers live together. (No symbol of the
// library is named after it.)
#define absl sentencepiece_absl
#include <sentencepiece_processor.h>
#undef absl

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "engine/sentencepiece_proto.h"
#include "engine/tokenizer_config.h"

namespace atp {
namespace {

constexpr char kSpace[] = "\xE2\x96\x81";  // "▁", how a piece writes " "

class SentencePieceTokenizer : public Tokenizer {
 public:
  absl::Status Init(std::string_view bytes, const TokenizerConfig& config) {
    absl::StatusOr<SentencePieceInfo> info = ParseSentencePieceProto(bytes);
    if (!info.ok()) return info.status();
    try {
      const auto status = processor_.LoadFromSerializedProto(bytes);
      if (!status.ok()) return absl::InvalidArgumentError(status.message());
    } catch (const std::exception& e) {
      return absl::InvalidArgumentError(absl::StrCat("not a SentencePiece model: ", e.what()));
    }
    if (processor_.GetPieceSize() != info->pieces)
      return absl::InvalidArgumentError("not a SentencePiece model");
    strips_leading_space_ = info->add_dummy_prefix;
    std::vector<AddedToken> added =
        config.added_tokens.empty() ? config.old_added_tokens : config.added_tokens;
    std::erase_if(added, [&](const AddedToken& token) { return token.id >= config.embedding_rows; });
    if (absl::Status s = BuildTables(added, info->user_defined); !s.ok()) return s;
    FindNewline();
    TokenizerDefaults defaults;
    if (processor_.bos_id() >= 0) {
      defaults.bos = processor_.bos_id();
      defaults.prefix = {processor_.bos_id()};  // the default of Llama's and Mistral's tokenizers
    }
    if (processor_.eos_id() >= 0) defaults.eos = {processor_.eos_id()};
    absl::StatusOr<ResolvedSpecials> specials =
        ResolveSpecials(config, defaults, vocab_size(), [this](std::string_view t) { return IdOf(t); });
    if (!specials.ok()) return specials.status();
    specials_ = *std::move(specials);
    return absl::OkStatus();
  }

  int vocab_size() const override { return static_cast<int>(token_bytes_.size()); }
  const SpecialTokens& special() const override { return specials_.special; }
  bool adds_bos() const override {
    return specials_.special.bos && !specials_.prefix.empty() &&
           specials_.prefix[0] == *specials_.special.bos;
  }
  bool strips_leading_space() const override { return strips_leading_space_; }
  bool lines_are_separate() const override { return newline_.has_value(); }

  std::vector<TokenId> Encode(std::string_view text, bool add_special, bool parse_special) const override {
    Encoding encoding;
    if (add_special) encoding.ids = specials_.prefix;
    AppendText(text, parse_special, &encoding);
    std::vector<TokenId>& ids = encoding.ids;
    if (add_special) ids.insert(ids.end(), specials_.suffix.begin(), specials_.suffix.end());
    return std::move(ids);
  }

  std::vector<TokenId> EncodeParts(std::span<const PromptPart> parts) const override {
    Encoding encoding;
    for (const PromptPart& part : parts) {
      part.token ? AppendToken(*part.token, &encoding) : AppendText(part.text, false, &encoding);
    }
    return std::move(encoding.ids);
  }

  std::string TokenBytes(TokenId id, bool keep_special) const override {
    if (id < 0 || id >= vocab_size() || (is_special_[id] && !keep_special)) return "";
    return token_bytes_[id];
  }

  std::optional<TokenId> IdOf(std::string_view token) const override {
    const auto it = ids_.find(std::string(token));
    return it == ids_.end() ? std::nullopt : std::optional<TokenId>(it->second);
  }

 private:
  // Each part between control tokens is a text of its own with its own dummy prefix, as the models were
  // trained. Marks (see FindMarks) are a part of the text around them: only its beginning has the prefix.
  struct Encoding {
    std::vector<TokenId> ids;
    bool text_begins = true;
  };

  void AppendToken(TokenId id, Encoding* out) const {
    const bool mark = mark_spelled_.contains(id);
    if (mark && out->text_begins) out->ids.insert(out->ids.end(), mark_prefix_.begin(), mark_prefix_.end());
    out->ids.push_back(id);
    out->text_begins = !mark;
  }

  void AppendText(std::string_view text, bool parse_special, Encoding* out) const {
    matcher_.Split(
        text, parse_special, [&](std::string_view part) { AppendPlain(part, out); },
        [&](TokenId id) { AppendToken(id, out); });
  }

  void AppendPlain(std::string_view text, Encoding* out) const {
    std::vector<TokenId> ids;
    if (out->text_begins || anchor_.empty()) {
      EncodeText(text, &ids);
    } else {
      ids = EncodeBehindMark(text);
    }
    for (const TokenId id : ids) {  // the library finds marks in any text: here they are text
      const auto spelled = mark_spelled_.find(id);
      if (spelled == mark_spelled_.end()) {
        out->ids.push_back(id);
      } else {
        out->ids.insert(out->ids.end(), spelled->second.begin(), spelled->second.end());
      }
    }
    out->text_begins = false;
  }

  std::vector<TokenId> EncodeBehindMark(std::string_view text) const {
    const std::vector<TokenId> ids = EncodeLine(absl::StrCat(anchor_, std::string(text)));
    const auto mark = std::find(ids.begin(), ids.end(), processor_.PieceToId(anchor_));
    return {mark == ids.end() ? mark : mark + 1, ids.end()};
  }

  std::vector<TokenId> EncodeLine(std::string_view text) const {
    std::vector<int> ids;
    if (!processor_.Encode(text, &ids).ok()) ids.clear();  // only a processor without a model fails
    return ids;
  }

  void EncodeText(std::string_view text, std::vector<TokenId>* ids) const {
    while (newline_) {
      const size_t end = text.find('\n');
      if (end == std::string_view::npos) break;
      const std::vector<TokenId> line = EncodeLine(text.substr(0, end));
      ids->insert(ids->end(), line.begin(), line.end());
      ids->push_back(*newline_);
      text.remove_prefix(end + 1);
    }
    const std::vector<TokenId> line = EncodeLine(text);
    ids->insert(ids->end(), line.begin(), line.end());
  }

  // A model with a token for the newline byte whose normalizer (nmt_nfkc) makes newlines spaces: it can only
  // have learnt newlines as that token between lines that were encoded one by one.
  void FindNewline() {
    const int newline = processor_.PieceToId("<0x0A>");
    if (processor_.IsByte(newline) && EncodeLine("a\na") == EncodeLine("a a")) newline_ = newline;
  }

  // Marks are pieces such as <|im_start|> that a model was trained with as the library's user-defined ones,
  // which it finds in any text: control tokens to us, but without a text of their own on either side.
  void FindMarks(const std::vector<int>& user_defined, const std::vector<AddedToken>& added_tokens,
                 std::vector<AddedToken>* added) {
    for (const int id : user_defined) {
      const std::string& piece = processor_.IdToPiece(id);
      const bool special = std::any_of(added_tokens.begin(), added_tokens.end(),
                                       [&](const AddedToken& t) { return t.id == id && t.special; });
      if (piece.size() < 2 || !(special || (piece.starts_with("<|") && piece.ends_with("|>")))) continue;
      is_special_[id] = true;
      token_bytes_[id] = anchor_ = piece;
      added->emplace_back();
      added->back().content = piece;
      added->back().id = id;
      // In two parts, or the library would find it again.
      std::vector<TokenId>& spelled = mark_spelled_[id] = EncodeBehindMark(piece.substr(0, 1));
      const std::vector<TokenId> rest = EncodeBehindMark(piece.substr(1));
      spelled.insert(spelled.end(), rest.begin(), rest.end());
    }
    if (anchor_.empty()) return;
    mark_prefix_ = EncodeLine(anchor_);
    if (!mark_prefix_.empty()) mark_prefix_.pop_back();
  }

  absl::Status BuildTables(const std::vector<AddedToken>& added_tokens,
                           const std::vector<int>& user_defined) {
    const int pieces = processor_.GetPieceSize();
    token_bytes_.resize(pieces);
    is_special_.resize(pieces);
    std::vector<AddedToken> added;
    for (int id = 0; id < pieces; ++id) {
      const std::string& piece = processor_.IdToPiece(id);
      ids_[piece] = id;
      if (processor_.IsByte(id)) {  // "<0x0A>", which the library has checked
        token_bytes_[id] = std::string(1, static_cast<char>(std::stoi(piece.substr(3, 2), nullptr, 16)));
        continue;
      }
      is_special_[id] = processor_.IsControl(id) || processor_.IsUnknown(id);
      token_bytes_[id] = is_special_[id] ? piece : absl::StrReplaceAll(piece, {{kSpace, " "}});
      if (processor_.IsControl(id)) {
        added.emplace_back();
        added.back().content = piece;
        added.back().id = id;
      }
    }
    FindMarks(user_defined, added_tokens, &added);
    // tokenizer_config.json lists tokens behind the model's pieces, such as <|im_start|> of a fine-tuned
    // model.
    const int64_t limit = int64_t{pieces} + static_cast<int64_t>(added_tokens.size()) + 4096;
    for (const AddedToken& token : added_tokens) {
      if (token.id < pieces) continue;
      if (token.id >= limit) {
        return absl::InvalidArgumentError(
            absl::StrCat("added_tokens_decoder of tokenizer_config.json has token '", token.content,
                         "' with id ", token.id, ", but the model ends at ", pieces - 1));
      }
      const size_t size = std::max<size_t>(token_bytes_.size(), token.id + 1);
      token_bytes_.resize(size);
      is_special_.resize(size);
      token_bytes_[token.id] = token.content;
      is_special_[token.id] = token.special;
      ids_[token.content] = token.id;
      added.push_back(token);
    }
    matcher_ = AddedTokenMatcher(std::move(added));
    return absl::OkStatus();
  }

  sentencepiece::SentencePieceProcessor processor_;
  AddedTokenMatcher matcher_;
  std::string anchor_;                // one of the marks; empty: there are none
  std::vector<TokenId> mark_prefix_;  // what the library puts before a mark that begins a text
  absl::flat_hash_map<TokenId, std::vector<TokenId>> mark_spelled_;  // marks, and each as text
  absl::flat_hash_map<std::string, TokenId> ids_;
  std::vector<std::string> token_bytes_;  // by id
  std::vector<bool> is_special_;          // by id
  ResolvedSpecials specials_;
  std::optional<TokenId> newline_;  // set: lines are separate
  bool strips_leading_space_ = true;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> ParseSentencePiece(std::string_view bytes, const std::string& name,
                                                              const TokenizerConfig& config) {
  auto tokenizer = std::make_unique<SentencePieceTokenizer>();
  if (absl::Status s = tokenizer->Init(bytes, config); !s.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": ", std::string(s.message())));
  }
  return tokenizer;
}

}  // namespace atp
