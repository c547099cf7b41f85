// One token per byte, then <bos> and <eos>: a tokenizer whose ids a test can write down.
#ifndef ATP_TESTS_SERVER_BYTE_TOKENIZER_H_
#define ATP_TESTS_SERVER_BYTE_TOKENIZER_H_

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/tokenizer.h"

namespace atp::testing {

class ByteTokenizer : public Tokenizer {
 public:
  static constexpr TokenId kBos = 256;
  static constexpr TokenId kEos = 257;
  static constexpr int kVocabSize = 258;

  explicit ByteTokenizer(bool has_bos = true, bool adds_bos = true) : adds_bos_(has_bos && adds_bos) {
    if (has_bos) special_.bos = kBos;
    special_.eos = {kEos};
  }

  int vocab_size() const override { return kVocabSize; }
  const SpecialTokens& special() const override { return special_; }
  bool adds_bos() const override { return adds_bos_; }
  std::vector<TokenId> Encode(std::string_view text, bool add_special, bool parse_special) const override {
    std::vector<TokenId> ids;
    if (add_special && adds_bos_) ids.push_back(kBos);
    for (size_t i = 0; i < text.size(); ++i) {
      if (parse_special && text.substr(i, 5) == "<eos>") {
        ids.push_back(kEos);
        i += 4;
      } else {
        ids.push_back(static_cast<unsigned char>(text[i]));
      }
    }
    return ids;
  }
  std::string TokenBytes(TokenId id, bool keep_special) const override {
    if (id >= 0 && id < 256) return std::string(1, static_cast<char>(id));
    if (!keep_special) return "";
    return id == kBos ? "<bos>" : id == kEos ? "<eos>" : "";
  }
  bool strips_leading_space() const override { return false; }
  std::optional<TokenId> IdOf(std::string_view token) const override {
    if (token == "<bos>" && special_.bos) return kBos;
    if (token == "<eos>") return kEos;
    if (token.size() == 1) return static_cast<unsigned char>(token[0]);
    return std::nullopt;
  }

 private:
  SpecialTokens special_;
  bool adds_bos_;
};

}  // namespace atp::testing

#endif  // ATP_TESTS_SERVER_BYTE_TOKENIZER_H_
