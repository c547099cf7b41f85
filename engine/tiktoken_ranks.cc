// Llama 3's original tokenizer.model: one "base64-of-token rank" line per token, in tiktoken's format. The
// pattern and the 256 control tokens behind the ranks are not in the file; they are those of Meta's reference
// tokenizer.
#include <charconv>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "engine/bpe_tokenizer.h"

namespace atp {
namespace {

constexpr size_t kMaxTokenBytes = 4096;

constexpr int kControlTokens = 256;

std::vector<AddedToken> Llama3ControlTokens(TokenId first) {
  std::vector<std::string> names = {"<|begin_of_text|>",
                                    "<|end_of_text|>",
                                    "<|reserved_special_token_0|>",
                                    "<|reserved_special_token_1|>",
                                    "<|reserved_special_token_2|>",
                                    "<|reserved_special_token_3|>",
                                    "<|start_header_id|>",
                                    "<|end_header_id|>",
                                    "<|reserved_special_token_4|>",
                                    "<|eot_id|>"};
  for (int i = 5; static_cast<int>(names.size()) < kControlTokens; ++i) {
    names.push_back(absl::StrCat("<|reserved_special_token_", i, "|>"));
  }
  std::vector<AddedToken> tokens(names.size());
  for (size_t i = 0; i < names.size(); ++i) {
    tokens[i].content = names[i];
    tokens[i].id = first + static_cast<TokenId>(i);
  }
  return tokens;
}

// "IQ== 0". False when the line is not of that form.
bool ParseLine(std::string_view line, std::string* bytes, TokenId* rank) {
  const size_t space = line.find(' ');
  if (space == 0 || space == std::string_view::npos) return false;
  if (!absl::Base64Unescape(absl::string_view(line.data(), space), bytes) || bytes->empty()) return false;
  const char* end = line.data() + line.size();
  const auto [rest, error] = std::from_chars(line.data() + space + 1, end, *rank);
  return error == std::errc() && rest == end && *rank >= 0;
}

std::string_view TakeLine(std::string_view* text) {
  const size_t end = text->find('\n');
  std::string_view line = text->substr(0, end);
  text->remove_prefix(end == std::string_view::npos ? text->size() : end + 1);
  if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
  return line;
}

}  // namespace

bool LooksLikeTiktokenRanks(std::string_view bytes) {
  bytes = bytes.substr(0, 4096);
  std::string token;
  TokenId rank = 0;
  return ParseLine(TakeLine(&bytes), &token, &rank);
}

absl::StatusOr<std::unique_ptr<Tokenizer>> ParseTiktokenRanks(std::string_view text, const std::string& name,
                                                              const TokenizerConfig& config) {
  BpeModel::Vocabulary vocabulary;
  for (int line_number = 1; !text.empty(); ++line_number) {
    const std::string_view line = TakeLine(&text);
    if (line.empty()) continue;
    std::string bytes;
    TokenId rank = 0;
    if (!ParseLine(line, &bytes, &rank)) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ":", line_number, ": expected a token in base64, a space and its rank"));
    }
    if (bytes.size() > kMaxTokenBytes) {  // every way to cut a token in two is tried
      return absl::InvalidArgumentError(absl::StrCat(name, ":", line_number, ": a token of ", bytes.size(),
                                                     " bytes; at most ", kMaxTokenBytes, " are possible"));
    }
    vocabulary.emplace_back(std::move(bytes), rank);
  }
  BpeOptions options;
  options.ignore_merges = true;
  absl::StatusOr<BpeModel> model = BpeModel::Create(vocabulary, options);
  if (!model.ok())
    return absl::InvalidArgumentError(absl::StrCat(name, ": ", std::string(model.status().message())));
  for (int b = 0; b < 256; ++b) {
    const char byte = static_cast<char>(b);
    if (!model->IdOf(std::string_view(&byte, 1))) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ": byte ", b, " has no token; is the file complete?"));
    }
  }
  // The control tokens come right behind the ranks, so a file that lost lines would shift them silently.
  const TokenId first_control = model->id_limit();
  if (static_cast<size_t>(first_control) != vocabulary.size() ||
      config.bos_token_id.value_or(first_control) != first_control) {
    return absl::InvalidArgumentError(absl::StrCat(
        name, ": ", vocabulary.size(), " ranks, the highest ", first_control - 1, ", but bos_token_id is ",
        config.bos_token_id.value_or(first_control), "; is the file complete?"));
  }
  model->AddMergesOfRanks();
  absl::StatusOr<WordRegex> regex = WordRegex::Create(kLlama3Pattern, /*is_literal=*/false);
  if (!regex.ok()) return regex.status();
  std::vector<PreTokenizerStep> steps(1);
  steps[0].regex = std::make_unique<WordRegex>(*std::move(regex));
  BpeParts parts{*std::move(model),
                 std::move(vocabulary),
                 Llama3ControlTokens(first_control),
                 Normalizer(),
                 PreTokenizer(std::move(steps)),
                 "",
                 false,
                 {}};
  parts.defaults.bos = first_control;
  parts.defaults.prefix = {first_control};
  parts.defaults.eos = {first_control + 1, first_control + 9};  // <|end_of_text|>, <|eot_id|>
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = MakeBpeTokenizer(std::move(parts), config);
  if (tokenizer.ok()) return tokenizer;
  return absl::InvalidArgumentError(absl::StrCat(name, ": ", std::string(tokenizer.status().message())));
}

}  // namespace atp
