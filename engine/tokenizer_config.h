// What the files beside a tokenizer say about it (tokenizer_config.json, generation_config.json,
// config.json), and what the loaders of all kinds share.
#ifndef ATP_ENGINE_TOKENIZER_CONFIG_H_
#define ATP_ENGINE_TOKENIZER_CONFIG_H_

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/added_tokens.h"
#include "engine/request.h"
#include "engine/tokenizer.h"

namespace atp {

// Absent means that no file says it.
struct TokenizerConfig {
  std::optional<bool> add_bos_token;
  std::optional<bool> add_eos_token;
  std::optional<std::string> bos_token;
  std::optional<std::string> eos_token;
  std::optional<TokenId> bos_token_id;   // generation_config.json, else config.json
  std::vector<TokenId> eos_token_ids;    // the same; one or several
  std::vector<AddedToken> added_tokens;  // added_tokens_decoder
  std::vector<AddedToken>
      old_added_tokens;       // added_tokens.json, where there are none of those: ids and texts only
  std::string chat_template;  // Jinja text, "" if none
  // Added tokens with this id and higher are left out: the model has no embedding for them (a padding token
  // that its training added, mostly).
  TokenId embedding_rows = std::numeric_limits<TokenId>::max();
};

// Files that are absent say nothing; one that is there and broken is InvalidArgument with its path.
absl::StatusOr<TokenizerConfig> ReadTokenizerConfig(const std::string& model_dir);

// The model's chat template (Jinja): chat_template.jinja, or tokenizer_config.json's chat_template (the one
// named "default" where there are several). "" if none.
absl::StatusOr<std::string> ReadChatTemplate(const std::string& model_dir);

// The whole file. NotFound when it is absent; InvalidArgument when it is larger than `max_bytes` or no
// regular file.
absl::StatusOr<std::string> ReadWholeFile(const std::string& path, size_t max_bytes);
inline constexpr size_t kMaxTokenizerBytes = size_t{256} << 20;

// What a tokenizer file itself says; TokenizerConfig goes before it, except that end-of-sequence ids add up.
struct TokenizerDefaults {
  std::optional<TokenId> bos;
  std::vector<TokenId> eos;
  std::vector<TokenId> prefix;  // ids that post-processing puts before a text, and after it
  std::vector<TokenId> suffix;
};

struct ResolvedSpecials {
  SpecialTokens special;
  std::vector<TokenId> prefix, suffix;
};

// InvalidArgument when a file names a token or an id that the vocabulary does not have.
absl::StatusOr<ResolvedSpecials> ResolveSpecials(
    const TokenizerConfig& config, const TokenizerDefaults& defaults, int vocab_size,
    const std::function<std::optional<TokenId>(std::string_view)>& id_of);

// One loader per file format, from bytes; `name` is for messages.
absl::StatusOr<std::unique_ptr<Tokenizer>> ParseTokenizerJson(std::string_view json, const std::string& name,
                                                              const TokenizerConfig& config);
absl::StatusOr<std::unique_ptr<Tokenizer>> ParseTiktokenRanks(std::string_view text, const std::string& name,
                                                              const TokenizerConfig& config);
absl::StatusOr<std::unique_ptr<Tokenizer>> ParseSentencePiece(std::string_view bytes, const std::string& name,
                                                              const TokenizerConfig& config);
// Whether a tokenizer.model is Llama 3's list of "base64 rank" lines, and not a SentencePiece model.
bool LooksLikeTiktokenRanks(std::string_view bytes);

}  // namespace atp

#endif  // ATP_ENGINE_TOKENIZER_CONFIG_H_
