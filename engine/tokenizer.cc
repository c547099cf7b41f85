#include "engine/tokenizer.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/detokenizer.h"
#include "engine/tokenizer_config.h"

namespace atp {
namespace {

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizerModel(const std::string& path,
                                                              const TokenizerConfig& config) {
  absl::StatusOr<std::string> bytes = ReadWholeFile(path, kMaxTokenizerBytes);
  if (!bytes.ok()) return bytes.status();
  return LooksLikeTiktokenRanks(*bytes) ? ParseTiktokenRanks(*bytes, path, config)
                                        : ParseSentencePiece(*bytes, path, config);
}

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizerJson(const std::string& path,
                                                             const TokenizerConfig& config) {
  absl::StatusOr<std::string> bytes = ReadWholeFile(path, kMaxTokenizerBytes);
  if (!bytes.ok()) return bytes.status();
  return ParseTokenizerJson(*bytes, path, config);
}

}  // namespace

std::string Tokenizer::Decode(std::span<const TokenId> ids, bool keep_special) const {
  Detokenizer detokenizer(this, /*continues_text=*/false, keep_special);
  std::string text;
  for (TokenId id : ids) text += detokenizer.Append(id);
  return text + detokenizer.Flush();
}

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizer(const std::string& model_dir,
                                                         int64_t embedding_rows) {
  absl::StatusOr<TokenizerConfig> config = ReadTokenizerConfig(model_dir);
  if (!config.ok()) return config.status();
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer =
      LoadTokenizerModel(model_dir + "/tokenizer.model", *config);
  if (absl::IsNotFound(tokenizer.status()))
    tokenizer = LoadTokenizerJson(model_dir + "/tokenizer.json", *config);
  if (absl::IsNotFound(tokenizer.status())) {
    return absl::NotFoundError(absl::StrCat(
        model_dir, ": neither tokenizer.model nor tokenizer.json is there; a model needs one of them"));
  }
  if (!tokenizer.ok()) return tokenizer;
  if (embedding_rows > 0 && (*tokenizer)->vocab_size() > embedding_rows) {
    return absl::InvalidArgumentError(absl::StrCat(
        model_dir, ": the tokenizer has ", (*tokenizer)->vocab_size(),
        " tokens, but the model's embedding has ", embedding_rows, " rows; they are not of the same model"));
  }
  return tokenizer;
}

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadSentencePieceTokenizer(const std::string& path) {
  absl::StatusOr<std::string> bytes = ReadWholeFile(path, kMaxTokenizerBytes);
  if (!bytes.ok()) return bytes.status();
  return ParseSentencePiece(*bytes, path, TokenizerConfig());
}

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadBpeTokenizer(const std::string& path) {
  absl::StatusOr<std::string> bytes = ReadWholeFile(path, kMaxTokenizerBytes);
  if (!bytes.ok()) return bytes.status();
  return LooksLikeTiktokenRanks(*bytes) ? ParseTiktokenRanks(*bytes, path, TokenizerConfig())
                                        : ParseTokenizerJson(*bytes, path, TokenizerConfig());
}

}  // namespace atp
