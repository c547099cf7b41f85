// A tokenizer whose tokens are the 256 bytes, and one control token: texts in tests can be read.
#ifndef ATP_TESTS_ENGINE_BYTE_VOCABULARY_H_
#define ATP_TESTS_ENGINE_BYTE_VOCABULARY_H_

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/tokenizer.h"

namespace atp {

class ByteVocabulary final : public Tokenizer {
 public:
  static constexpr TokenId kEos = 256;

  int vocab_size() const override { return 257; }
  const SpecialTokens& special() const override { return special_; }
  bool adds_bos() const override { return false; }
  std::vector<TokenId> Encode(std::string_view text, bool, bool) const override { return Ids(text); }
  std::string TokenBytes(TokenId id, bool keep_special) const override {
    if (id == kEos) return keep_special ? "<eos>" : "";
    return std::string(1, static_cast<char>(id));
  }
  bool strips_leading_space() const override { return false; }
  std::optional<TokenId> IdOf(std::string_view token) const override {
    if (token == "<eos>") return kEos;
    return std::nullopt;
  }

  static std::vector<TokenId> Ids(std::string_view text) {
    std::vector<TokenId> ids;
    for (char c : text) ids.push_back(static_cast<unsigned char>(c));
    return ids;
  }

 private:
  SpecialTokens special_{std::nullopt, {kEos}};
};

}  // namespace atp

#endif  // ATP_TESTS_ENGINE_BYTE_VOCABULARY_H_
