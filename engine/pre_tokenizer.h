// Splits a text into the words that byte-pair merges stay inside of: tokenizer.json's `pre_tokenizer`.
#ifndef ATP_ENGINE_PRE_TOKENIZER_H_
#define ATP_ENGINE_PRE_TOKENIZER_H_

#include <deque>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace atp {

// GPT-2's pattern, which the ByteLevel pre-tokenizer uses by itself, and Llama 3's, which its tokenizer.model
// implies; and those that GGUF files know by a name only: Qwen 2's and Mistral's Tekken.
extern const char kGpt2Pattern[];
extern const char kLlama3Pattern[];
extern const char kQwen2Pattern[];
extern const char kTekkenPattern[];

// One compiled regular expression (PCRE2, Unicode properties), read as the Oniguruma of Hugging Face's
// tokenizers reads it. Immutable, so shared between threads.
class WordRegex {
 public:
  // InvalidArgument with the position when the pattern is not one.
  static absl::StatusOr<WordRegex> Create(const std::string& pattern, bool is_literal);
  WordRegex(WordRegex&&) noexcept;
  WordRegex& operator=(WordRegex&&) noexcept;
  ~WordRegex();

  struct Span {
    size_t begin, end;
    bool is_match;
  };
  // Matches and the parts between them, in order; no empty spans. Precondition: valid UTF-8. When the matcher
  // gives up on a hostile pattern or text, the rest of the text is one part that is not a match.
  std::vector<Span> Find(std::string_view text) const;

 private:
  struct Compiled;
  explicit WordRegex(std::unique_ptr<Compiled> compiled);
  std::unique_ptr<Compiled> compiled_;
};

enum class SplitBehavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };

struct PreTokenizerStep {
  enum Kind {
    kSplit,
    kPrefixSpace,  // ByteLevel's add_prefix_space
    kMetaspace,    // " " becomes `replacement`, which is also put before the text
  };
  enum Prepend { kNever, kFirst, kAlways };

  Kind kind = kSplit;
  std::unique_ptr<WordRegex>
      regex;  // kSplit; kMetaspace: splits before each replacement, null when it does not split
  SplitBehavior behavior = SplitBehavior::kIsolated;
  bool invert = false;
  std::string replacement;  // kMetaspace
  Prepend prepend = kAlways;
};

// The words of one text, and the memory of those that are not a part of it.
struct Words {
  std::vector<std::string_view> words;
  std::deque<std::string> owned;  // a deque: its strings stay where they are
};

class PreTokenizer {
 public:
  PreTokenizer() = default;
  explicit PreTokenizer(std::vector<PreTokenizerStep> steps);

  // `at_start`: nothing, not even an added token, is before this text. Precondition: valid UTF-8, which
  // outlives Words.
  Words Split(std::string_view text, bool at_start) const;

 private:
  std::vector<PreTokenizerStep> steps_;
};

}  // namespace atp

#endif  // ATP_ENGINE_PRE_TOKENIZER_H_
