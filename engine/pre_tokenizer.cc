#include "engine/pre_tokenizer.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

namespace atp {

const char kGpt2Pattern[] = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
const char kLlama3Pattern[] =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
const char kQwen2Pattern[] =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
const char kTekkenPattern[] =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

namespace {

constexpr size_t kMaxPatternBytes = 64 << 10;
constexpr uint32_t kMatchLimit = 2'000'000;  // backtracking steps of one match
constexpr uint32_t kHeapLimitKib = 64 << 10;

// Oniguruma's \s is Unicode's White_Space; PCRE2's also has U+180E, which stopped being a space in
// Unicode 6.3.
std::string WithUnicodeSpace(const std::string& pattern) {
  std::string result;
  for (size_t i = 0; i < pattern.size(); ++i) {
    if (pattern[i] != '\\' || i + 1 == pattern.size()) {
      result += pattern[i];
      continue;
    }
    const char escaped = pattern[++i];
    if (escaped == 's') {
      result += "\\p{White_Space}";
    } else if (escaped == 'S') {
      result += "\\P{White_Space}";
    } else {
      result += {'\\', escaped};
    }
  }
  return result;
}

}  // namespace

struct WordRegex::Compiled {
  pcre2_code* code = nullptr;
  pcre2_match_context* limits = nullptr;  // only read while matching
  ~Compiled() {
    pcre2_match_context_free(limits);
    pcre2_code_free(code);
  }
};

WordRegex::WordRegex(std::unique_ptr<Compiled> compiled) : compiled_(std::move(compiled)) {}
WordRegex::WordRegex(WordRegex&&) noexcept = default;
WordRegex& WordRegex::operator=(WordRegex&&) noexcept = default;
WordRegex::~WordRegex() = default;

absl::StatusOr<WordRegex> WordRegex::Create(const std::string& pattern, bool is_literal) {
  if (pattern.empty() || pattern.size() > kMaxPatternBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("a pattern has ", pattern.size(), " bytes; 1 to ", kMaxPatternBytes, " are possible"));
  }
  const std::string source = is_literal ? pattern : WithUnicodeSpace(pattern);
  uint32_t options = PCRE2_UTF;
  options |= is_literal ? PCRE2_LITERAL : PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C;
  int error = 0;
  PCRE2_SIZE offset = 0;
  auto compiled = std::make_unique<Compiled>();
  compiled->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(source.data()), source.size(), options, &error,
                                 &offset, nullptr);
  if (compiled->code == nullptr) {
    char message[256];
    pcre2_get_error_message(error, reinterpret_cast<PCRE2_UCHAR*>(message), sizeof(message));
    return absl::InvalidArgumentError(
        absl::StrCat("not a regular expression: ", message, ", at byte ", offset, " of '", source, "'"));
  }
  pcre2_jit_compile(compiled->code, PCRE2_JIT_COMPLETE);  // where there is none, matching interprets
  compiled->limits = pcre2_match_context_create(nullptr);
  pcre2_set_match_limit(compiled->limits, kMatchLimit);
  pcre2_set_heap_limit(compiled->limits, kHeapLimitKib);
  return WordRegex(std::move(compiled));
}

std::vector<WordRegex::Span> WordRegex::Find(std::string_view text) const {
  const std::unique_ptr<pcre2_match_data, void (*)(pcre2_match_data*)> data(
      pcre2_match_data_create_from_pattern(compiled_->code, nullptr), pcre2_match_data_free);
  const auto subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  std::vector<Span> spans;
  size_t done = 0;    // all before is in `spans`
  size_t search = 0;  // where the next match is looked for
  while (search < text.size()) {
    const auto match = [&](uint32_t options) {
      // Checked by the caller once; PCRE2 would check the rest of the text again for each match.
      return pcre2_match(compiled_->code, subject, text.size(), search, options | PCRE2_NO_UTF_CHECK,
                         data.get(), compiled_->limits);
    };
    int found = match(0);
    if (found == PCRE2_ERROR_JIT_STACKLIMIT)
      found = match(PCRE2_NO_JIT);  // the interpreter's stack is on the heap
    if (found < 0) break;
    const PCRE2_SIZE* range = pcre2_get_ovector_pointer(data.get());
    const size_t begin = std::max<size_t>(range[0], done), end = range[1];  // \K can move the beginning
    if (end <= begin) {  // an empty match: step over one code point
      do {
        ++search;
      } while (search < text.size() && (static_cast<uint8_t>(text[search]) & 0xC0) == 0x80);
      continue;
    }
    if (begin > done) spans.push_back({done, begin, false});
    spans.push_back({begin, end, true});
    done = search = end;
  }
  if (done < text.size()) spans.push_back({done, text.size(), false});
  return spans;
}

namespace {

// What remains of `spans`, in the words of Hugging Face's SplitDelimiterBehavior: matches are the delimiters.
std::vector<WordRegex::Span> Combine(std::vector<WordRegex::Span> spans, SplitBehavior behavior) {
  std::vector<WordRegex::Span> result;
  const bool backward = behavior == SplitBehavior::kMergedWithNext;
  if (backward) std::reverse(spans.begin(), spans.end());
  bool previous_match = false;
  for (const WordRegex::Span& span : spans) {
    bool merge = false;
    switch (behavior) {
      case SplitBehavior::kRemoved:
        if (span.is_match) continue;
        break;
      case SplitBehavior::kIsolated:
        break;
      case SplitBehavior::kMergedWithPrevious:
      case SplitBehavior::kMergedWithNext:
        merge = span.is_match && !previous_match;
        break;
      case SplitBehavior::kContiguous:
        merge = span.is_match == previous_match;
        break;
    }
    previous_match = span.is_match;
    if (merge && !result.empty()) {
      result.back().begin = std::min(result.back().begin, span.begin);
      result.back().end = std::max(result.back().end, span.end);
    } else {
      result.push_back(span);
    }
  }
  if (backward) std::reverse(result.begin(), result.end());
  return result;
}

void ApplySplit(const PreTokenizerStep& step, std::string_view word, std::vector<std::string_view>* out) {
  std::vector<WordRegex::Span> spans = step.regex->Find(word);
  if (step.invert) {
    for (WordRegex::Span& span : spans) span.is_match = !span.is_match;
  }
  for (const WordRegex::Span& span : Combine(std::move(spans), step.behavior)) {
    out->push_back(word.substr(span.begin, span.end - span.begin));
  }
}

}  // namespace

PreTokenizer::PreTokenizer(std::vector<PreTokenizerStep> steps) : steps_(std::move(steps)) {}

Words PreTokenizer::Split(std::string_view text, bool at_start) const {
  Words result;
  if (!text.empty()) result.words.push_back(text);
  for (const PreTokenizerStep& step : steps_) {
    std::vector<std::string_view> next;
    next.reserve(result.words.size());
    for (size_t i = 0; i < result.words.size(); ++i) {
      std::string_view word = result.words[i];
      if (step.kind == PreTokenizerStep::kSplit) {
        ApplySplit(step, word, &next);
      } else if (step.kind == PreTokenizerStep::kPrefixSpace) {
        if (word[0] != ' ') word = result.owned.emplace_back(std::string(" ").append(word));
        next.push_back(word);
      } else {
        std::string spaced = absl::StrReplaceAll(std::string(word), {{" ", step.replacement}});
        const bool prepend = step.prepend == PreTokenizerStep::kAlways ||
                             (step.prepend == PreTokenizerStep::kFirst && at_start && i == 0);
        if (prepend && spaced.rfind(step.replacement, 0) != 0) spaced.insert(0, step.replacement);
        word = result.owned.emplace_back(std::move(spaced));
        if (step.regex != nullptr) {
          ApplySplit(step, word, &next);
        } else {
          next.push_back(word);
        }
      }
    }
    result.words = std::move(next);
  }
  return result;
}

}  // namespace atp
