#include "engine/added_tokens.h"

#include <algorithm>
#include <cctype>
#include <utility>

#include "engine/utf8.h"

namespace atp {
namespace {

// Length of the code point that ends at `end`, 0 when the bytes there are not valid UTF-8.
size_t LengthBefore(std::string_view text, size_t end) {
  for (size_t n = 1; n <= std::min<size_t>(4, end); ++n) {
    const Utf8Step step = NextUtf8(text.substr(end - n, n));
    if (step.kind == Utf8Kind::kValid && step.length == n) return n;
  }
  return 0;
}

size_t SpaceAfter(std::string_view text, size_t from) {
  while (from < text.size()) {
    const Utf8Step step = NextUtf8(text.substr(from));
    if (step.kind != Utf8Kind::kValid || !IsUnicodeSpace(CodePoint(text.substr(from), step.length))) break;
    from += step.length;
  }
  return from;
}

size_t SpaceBefore(std::string_view text, size_t begin, size_t end) {
  while (end > begin) {
    const size_t n = LengthBefore(text.substr(begin), end - begin);
    if (n == 0 || !IsUnicodeSpace(CodePoint(text.substr(end - n), n))) break;
    end -= n;
  }
  return end;
}

// Bytes beyond ASCII count as parts of a word: a token that asks for word boundaries stands beside ASCII in
// practice.
bool IsWordByte(char c) { return static_cast<signed char>(c) < 0 || std::isalnum(c) || c == '_'; }

bool StandsAlone(std::string_view text, size_t begin, size_t end) {
  return (begin == 0 || !IsWordByte(text[begin - 1])) && (end == text.size() || !IsWordByte(text[end]));
}

}  // namespace

AddedTokenMatcher::AddedTokenMatcher(std::vector<AddedToken> tokens) : tokens_(std::move(tokens)) {
  std::erase_if(tokens_, [](const AddedToken& t) { return t.content.empty(); });
  nodes_.emplace_back();
  for (size_t i = 0; i < tokens_.size(); ++i) {
    int node = 0;
    for (char c : tokens_[i].content) {
      int child = Child(node, c);
      if (child < 0) {
        child = static_cast<int>(nodes_.size());
        nodes_[node].next.emplace_back(c, child);
        nodes_.emplace_back();
      }
      node = child;
    }
    if (nodes_[node].token < 0) nodes_[node].token = static_cast<int>(i);
  }
  std::fill(std::begin(root_), std::end(root_), -1);
  for (const auto& [c, child] : nodes_[0].next) root_[static_cast<uint8_t>(c)] = child;
}

int AddedTokenMatcher::Child(int node, char c) const {
  for (const auto& [label, child] : nodes_[node].next) {
    if (label == c) return child;
  }
  return -1;
}

const AddedToken* AddedTokenMatcher::LongestAt(std::string_view text, size_t at, bool parse_special) const {
  const AddedToken* longest = nullptr;
  int node = root_[static_cast<uint8_t>(text[at])];
  for (size_t i = at + 1; node >= 0; ++i) {
    if (nodes_[node].token >= 0) {
      const AddedToken& token = tokens_[nodes_[node].token];
      if ((parse_special || !token.special) && (!token.single_word || StandsAlone(text, at, i)))
        longest = &token;
    }
    if (i == text.size()) break;
    node = Child(node, text[i]);
  }
  return longest;
}

void AddedTokenMatcher::Split(std::string_view text, bool parse_special,
                              const std::function<void(std::string_view)>& on_text,
                              const std::function<void(TokenId)>& on_token) const {
  size_t begin = 0;  // of the text that is not handed out yet
  for (size_t at = 0; !tokens_.empty() && at < text.size();) {
    const AddedToken* token = LongestAt(text, at, parse_special);
    if (token == nullptr) {
      ++at;
      continue;
    }
    const size_t text_end = token->lstrip ? SpaceBefore(text, begin, at) : at;
    if (text_end > begin) on_text(text.substr(begin, text_end - begin));
    on_token(token->id);
    at += token->content.size();
    if (token->rstrip) at = SpaceAfter(text, at);
    begin = at;
  }
  if (begin < text.size()) on_text(text.substr(begin));
}

}  // namespace atp
