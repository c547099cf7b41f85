#include "engine/tokenizer.h"

#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/detokenizer.h"
#include "engine/gguf.h"
#include "engine/gguf_tokenizer.h"
#include "engine/model_path.h"
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

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadFromDirectory(const std::string& directory,
                                                             int64_t embedding_rows) {
  absl::StatusOr<TokenizerConfig> config = ReadTokenizerConfig(directory);
  if (!config.ok()) return config.status();
  if (embedding_rows > 0) config->embedding_rows = static_cast<TokenId>(embedding_rows);
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer =
      LoadTokenizerModel(directory + "/tokenizer.model", *config);
  if (absl::IsNotFound(tokenizer.status()))
    tokenizer = LoadTokenizerJson(directory + "/tokenizer.json", *config);
  if (absl::IsNotFound(tokenizer.status())) {
    return absl::NotFoundError(absl::StrCat(
        directory, ": neither tokenizer.model nor tokenizer.json is there; a model needs one of them"));
  }
  return tokenizer;
}

// Null where the model is no GGUF file with a tokenizer in it.
absl::StatusOr<std::shared_ptr<const GgufFile>> GgufWithTokenizer(const std::string& model) {
  const absl::StatusOr<std::string> path = FindGguf(model);
  if (!path.ok()) return path.status();
  if (path->empty()) return std::shared_ptr<const GgufFile>();
  absl::StatusOr<std::shared_ptr<const GgufFile>> file = GgufFile::Open(*path);
  if (file.ok() && !HasGgufTokenizer(**file)) return std::shared_ptr<const GgufFile>();
  return file;
}

}  // namespace

std::vector<TokenId> Tokenizer::EncodeParts(std::span<const PromptPart> parts) const {
  std::vector<TokenId> ids;
  for (const PromptPart& part : parts) {
    if (part.token) {
      ids.push_back(*part.token);
      continue;
    }
    const std::vector<TokenId> text = Encode(part.text, /*add_special=*/false, /*parse_special=*/false);
    ids.insert(ids.end(), text.begin(), text.end());
  }
  return ids;
}

std::string Tokenizer::Decode(std::span<const TokenId> ids, bool keep_special) const {
  Detokenizer detokenizer(this, /*continues_text=*/false, keep_special);
  std::string text;
  for (TokenId id : ids) text += detokenizer.Append(id);
  return text + detokenizer.Flush();
}

bool HasTokenizer(const std::string& model) {
  std::error_code ignored;
  const std::string directory = ModelDirectory(model);
  if (std::filesystem::exists(directory + "/tokenizer.model", ignored) ||
      std::filesystem::exists(directory + "/tokenizer.json", ignored)) {
    return true;
  }
  const auto gguf = GgufWithTokenizer(model);
  return gguf.ok() && *gguf != nullptr;
}

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizer(const std::string& model, int64_t embedding_rows) {
  const auto gguf = GgufWithTokenizer(model);
  if (!gguf.ok()) return gguf.status();
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer =
      *gguf != nullptr ? LoadGgufTokenizer(**gguf) : LoadFromDirectory(ModelDirectory(model), embedding_rows);
  if (!tokenizer.ok()) return tokenizer;
  if (embedding_rows > 0 && (*tokenizer)->vocab_size() > embedding_rows) {
    return absl::InvalidArgumentError(absl::StrCat(model, ": the tokenizer has ", (*tokenizer)->vocab_size(),
                                                   " tokens, but the model's embedding has ", embedding_rows,
                                                   " rows; they are not of the same model"));
  }
  return tokenizer;
}

absl::StatusOr<std::string> LoadChatTemplateText(const std::string& model) {
  const auto gguf = GgufWithTokenizer(model);
  if (!gguf.ok()) return gguf.status();
  return *gguf != nullptr ? GgufChatTemplate(**gguf) : ReadChatTemplate(ModelDirectory(model));
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
