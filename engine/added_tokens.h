// Added tokens of a vocabulary (<|eot_id|>, <think>, …): found in a text before it is split into words.
#ifndef ATP_ENGINE_ADDED_TOKENS_H_
#define ATP_ENGINE_ADDED_TOKENS_H_

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/request.h"

namespace atp {

// As in tokenizer.json's added_tokens; the field names are Hugging Face's.
struct AddedToken {
  std::string content;
  TokenId id = 0;
  bool special = true;       // a control token: never text, and not looked for in users' text
  bool single_word = false;  // only where no letter, digit or underscore is beside it
  bool lstrip = false;       // takes the white space on its left with it
  bool rstrip = false;
  bool normalized = false;  // looked for in normalized text
};

// Leftmost-longest search over a byte trie: time is text × longest token, whatever the number of tokens.
class AddedTokenMatcher {
 public:
  AddedTokenMatcher() = default;
  explicit AddedTokenMatcher(std::vector<AddedToken> tokens);

  bool empty() const { return tokens_.empty(); }

  // Calls on_text(part) and on_token(id) from left to right, covering all of `text` except stripped white
  // space. Special tokens are only looked for when `parse_special`; the others always are.
  void Split(std::string_view text, bool parse_special, const std::function<void(std::string_view)>& on_text,
             const std::function<void(TokenId)>& on_token) const;

 private:
  struct Node {
    std::vector<std::pair<char, int>> next;  // nodes have few children
    int token = -1;                          // index in tokens_, when a token ends here
  };

  const AddedToken* LongestAt(std::string_view text, size_t at, bool parse_special) const;
  int Child(int node, char c) const;

  std::vector<AddedToken> tokens_;
  std::vector<Node> nodes_;
  int root_[256];  // child of the root per byte, -1 for none: most bytes begin no token
};

}  // namespace atp

#endif  // ATP_ENGINE_ADDED_TOKENS_H_
