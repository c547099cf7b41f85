#include "cli/evaluation_data.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string_view>
#include <utility>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "cli/npy.h"
#include "engine/philox.h"

namespace atp {
namespace {

constexpr std::string_view kSeparator = "<|endoftext|>";
constexpr int kShortestSpan = 8;
constexpr int kLongestSpan = 64;

std::string_view Strip(std::string_view text) {
  constexpr std::string_view kSpace = " \t\r\n\v\f";
  const size_t begin = text.find_first_not_of(kSpace);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(kSpace) - begin + 1);
}

// Each story on its own where the text has separators: BOS (where the model takes one), the stripped story,
// at most `context` tokens. Else windows of `context` tokens, each with its BOS.
TokenSequences TokenizeText(std::string_view text, const Tokenizer& tokenizer, int context, int64_t limit) {
  std::vector<TokenId> start;
  if (tokenizer.adds_bos() && tokenizer.special().bos) start.push_back(*tokenizer.special().bos);
  const size_t room = static_cast<size_t>(context) - start.size();
  TokenSequences sequences;
  const auto full = [&] { return limit > 0 && static_cast<int64_t>(sequences.size()) >= limit; };
  const auto add = [&](const std::vector<TokenId>& ids, size_t begin) {
    sequences.push_back(start);
    const size_t end = std::min(ids.size(), begin + room);
    sequences.back().insert(sequences.back().end(), ids.begin() + static_cast<ptrdiff_t>(begin),
                            ids.begin() + static_cast<ptrdiff_t>(end));
  };
  const auto encode = [&](std::string_view part) {
    return tokenizer.Encode(part, /*add_special=*/false, /*parse_special=*/false);
  };
  if (text.find(kSeparator) == std::string_view::npos) {
    const std::vector<TokenId> ids = encode(text);
    for (size_t begin = 0; begin < ids.size() && !full(); begin += room) add(ids, begin);
    return sequences;
  }
  while (!text.empty() && !full()) {
    const size_t end = text.find(kSeparator);
    const std::string_view story = Strip(text.substr(0, end));
    text = end == std::string_view::npos ? std::string_view() : text.substr(end + kSeparator.size());
    if (!story.empty()) add(encode(story), 0);
  }
  return sequences;
}

absl::StatusOr<std::string> ReadText(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat(path, ": cannot be opened"));
  std::ostringstream text;
  text << file.rdbuf();  // fails where nothing comes, too
  std::error_code none;
  if (text.fail() &&
      (std::filesystem::is_directory(path, none) || std::filesystem::file_size(path, none) > 0))
    return absl::InvalidArgumentError(absl::StrCat(path, ": cannot be read"));
  return text.str();
}

}  // namespace

void AddDataFlags(CLI::App* app, DataFlags* flags, int64_t default_limit, int default_context) {
  flags->limit = default_limit;
  flags->default_context = default_context;
  app->add_option("--text", flags->text_file, "text, split at <|endoftext|> where it has that; or --ids")
      ->option_text("FILE");
  app->add_option("--ids", flags->ids_file, "token ids: [rows, tokens] of int32, int64 or uint16; or --text")
      ->option_text("FILE.npy");
  app->add_option("--context", flags->context,
                  absl::StrCat("tokens per sequence, more are cut off or go to the next one (default: ",
                               default_context, ", or the model's positions)"))
      ->option_text("TOKENS")
      ->check(CLI::Range(2, 1 << 24));
  app->add_option("--limit", flags->limit,
                  absl::StrCat("take only the first sequences; 0: all (default: ", default_limit, ")"))
      ->option_text("N")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 40));
}

absl::Status CheckDataFlags(const DataFlags& flags, const std::string& command) {
  if (flags.text_file.empty() != flags.ids_file.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(command, " needs either --text FILE or --ids FILE.npy"));
}

absl::StatusOr<int> ContextTokens(const DataFlags& flags, const LoadedModel& loaded) {
  const int context =
      flags.context > 0 ? flags.context : std::min(flags.default_context, loaded.max_context_tokens);
  if (context < 2)
    return absl::InvalidArgumentError("the model has a position for one token: it predicts nothing");
  if (context <= loaded.max_context_tokens) return context;
  return absl::InvalidArgumentError(absl::StrCat("--context ", context, ": the model has positions for ",
                                                 loaded.max_context_tokens, " tokens"));
}

absl::StatusOr<TokenSequences> LoadSequences(const DataFlags& flags, const LoadedModel& loaded, int context) {
  TokenSequences sequences;
  if (!flags.ids_file.empty()) {
    absl::StatusOr<TokenSequences> rows = ReadTokenIds(flags.ids_file, loaded.model->config().vocab_size);
    if (!rows.ok()) return rows.status();
    sequences = *std::move(rows);
    if (flags.limit > 0 && sequences.size() > static_cast<size_t>(flags.limit)) {
      sequences.resize(static_cast<size_t>(flags.limit));
    }
    for (auto& ids : sequences) ids.resize(std::min(ids.size(), static_cast<size_t>(context)));
  } else {
    absl::StatusOr<std::string> text = ReadText(flags.text_file);
    if (!text.ok()) return text.status();
    sequences = TokenizeText(*text, *loaded.tokenizer, context, flags.limit);
  }
  return sequences;
}

absl::Status RepeatSpans(size_t every, TokenSequences* sequences) {
  bool repeated = false;
  const auto repeat = [&](size_t s) {
    std::vector<TokenId>& ids = (*sequences)[s];
    const size_t length = ids.size();
    const int fresh = static_cast<int>(length / 2);
    if (fresh < 2 * kShortestSpan) return;
    repeated = true;
    ids.resize(static_cast<size_t>(fresh));
    uint64_t draws = 0;
    const auto draw = [&](int bound) { return static_cast<int>(UniformAt(s, draws++) * bound); };
    while (ids.size() < length) {
      const int longest = std::min(kLongestSpan, fresh);
      const int span = kShortestSpan + draw(longest - kShortestSpan + 1);
      const int from = draw(fresh - span + 1);
      for (int i = 0; i < span && ids.size() < length; ++i) ids.push_back(ids[static_cast<size_t>(from + i)]);
    }
  };
  for (size_t s = every - 1; s < sequences->size(); s += every) repeat(s);
  for (size_t s = 0; s < sequences->size() && !repeated; ++s) repeat(s);
  if (repeated) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("spans cannot be repeated: bring sequences of at least ", 4 * kShortestSpan, " tokens"));
}

}  // namespace atp
