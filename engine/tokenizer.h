// Text to token ids and back. Two kinds: SentencePiece (tokenizer.model) and byte-level BPE (tokenizer.json).
// Immutable after loading, so shared between threads without a lock.
#ifndef ATP_ENGINE_TOKENIZER_H_
#define ATP_ENGINE_TOKENIZER_H_

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/request.h"

namespace atp {

struct SpecialTokens {
  std::optional<TokenId> bos;
  std::vector<TokenId> eos;  // any of these ends a generation
};

// A token, or text in which nothing is looked for.
struct PromptPart {
  std::optional<TokenId> token;
  std::string text;
};

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  virtual int vocab_size() const = 0;  // ids are [0, vocab_size)
  virtual const SpecialTokens& special() const = 0;
  // Whether a plain prompt begins with BOS (post-processing of tokenizer.json, add_bos_token of
  // tokenizer_config.json).
  virtual bool adds_bos() const = 0;

  // Never fails: any byte sequence has ids. `add_special`: BOS/EOS post-processing. `parse_special`: added
  // tokens such as <|eot_id|> in the text become their ids — off for the messages of a chat.
  virtual std::vector<TokenId> Encode(std::string_view text, bool add_special, bool parse_special) const = 0;

  // The ids of a prompt that a template made of tokens and texts, as the whole was encoded in training.
  virtual std::vector<TokenId> EncodeParts(std::span<const PromptPart> parts) const;

  // The bytes of one token as they appear in the middle of a text (SentencePiece: "▁the" is " the"); may be
  // part of a UTF-8 sequence. Control tokens (BOS, EOS, <|eot_id|>) are empty unless `keep_special`. Ids out
  // of range are empty.
  virtual std::string TokenBytes(TokenId id, bool keep_special) const = 0;

  // Whether the text before the first token begins with a space that encoding put there, to be dropped
  // (SentencePiece's dummy prefix).
  virtual bool strips_leading_space() const = 0;

  // Whether each line of a text is encoded as a text of its own, dummy prefix included, with newline tokens
  // between: SentencePiece models whose normalizer would fold newlines into spaces, although they have a
  // token for them.
  virtual bool lines_are_separate() const { return false; }

  virtual std::optional<TokenId> IdOf(std::string_view token) const = 0;

  // Whole text of a sequence of tokens, invalid UTF-8 replaced by U+FFFD.
  std::string Decode(std::span<const TokenId> ids, bool keep_special = false) const;
};

// The tokenizer of a model (model_path.h): of a GGUF file the one in it; of a directory tokenizer.model, then
// tokenizer.json, with what tokenizer_config.json, generation_config.json and config.json say about BOS/EOS.
// A GGUF file without one has its directory's. `embedding_rows` is the model's vocabulary: a tokenizer with
// more ids than that is an error naming both numbers; 0 skips the check.
absl::StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizer(const std::string& model, int64_t embedding_rows);
// Whether there is one at all.
bool HasTokenizer(const std::string& model);
// The model's chat template (Jinja), from where its tokenizer is; "" if none.
absl::StatusOr<std::string> LoadChatTemplateText(const std::string& model);

// The two kinds by themselves, from the path of the file.
absl::StatusOr<std::unique_ptr<Tokenizer>> LoadSentencePieceTokenizer(const std::string& path);
absl::StatusOr<std::unique_ptr<Tokenizer>> LoadBpeTokenizer(const std::string& path);

}  // namespace atp

#endif  // ATP_ENGINE_TOKENIZER_H_
