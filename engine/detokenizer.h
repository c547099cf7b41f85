// Streaming detokenization of one sequence: bytes of tokens become text that never ends inside a UTF-8
// sequence and never loses a space. Invalid bytes become U+FFFD, as in Tokenizer::Decode, whatever the split
// into tokens.
#ifndef ATP_ENGINE_DETOKENIZER_H_
#define ATP_ENGINE_DETOKENIZER_H_

#include <string>

#include "engine/tokenizer.h"

namespace atp {

class Detokenizer {
 public:
  // `continues_text`: the tokens continue a text (a generation after a prompt), so a leading space is kept.
  Detokenizer(const Tokenizer* tokenizer, bool continues_text, bool keep_special = false);

  std::string Append(TokenId id);  // the text that became certain with this token; may be empty
  std::string Flush();             // what is left at the end: an unfinished UTF-8 sequence becomes U+FFFD

 private:
  const Tokenizer* tokenizer_;
  bool keep_special_;
  bool at_start_;        // a space that encoding put there may come next
  std::string pending_;  // bytes of an unfinished UTF-8 sequence
};

}  // namespace atp

#endif  // ATP_ENGINE_DETOKENIZER_H_
