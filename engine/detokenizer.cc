#include "engine/detokenizer.h"

#include "engine/utf8.h"

namespace atp {

Detokenizer::Detokenizer(const Tokenizer* tokenizer, bool continues_text, bool keep_special)
    : tokenizer_(tokenizer),
      keep_special_(keep_special),
      at_start_(!continues_text && tokenizer->strips_leading_space()) {}

std::string Detokenizer::Append(TokenId id) {
  const std::string bytes = tokenizer_->TokenBytes(id, keep_special_);
  if (bytes.empty()) return "";  // a control token does not end the start of the text
  const bool drop_space = at_start_ && bytes[0] == ' ';
  at_start_ = bytes.back() == '\n' && tokenizer_->lines_are_separate() && tokenizer_->strips_leading_space();
  pending_.append(bytes, drop_space ? 1 : 0);
  std::string text;
  pending_.erase(0, AppendUtf8(pending_, /*at_end=*/false, &text));
  return text;
}

std::string Detokenizer::Flush() {
  std::string text;
  AppendUtf8(pending_, /*at_end=*/true, &text);
  pending_.clear();
  return text;
}

}  // namespace atp
