// OpenAI's JSON, both ways: bodies become our own structs, answers become text. Knows no socket and no
// engine. Every text that goes out is valid UTF-8 JSON, whatever came in. Parsing is limited in depth,
// refuses duplicate keys and invalid UTF-8, and treats null as absent. Errors are InvalidArgument and begin
// with the field: "n: must be …".
#ifndef ATP_SERVER_OPENAI_JSON_H_
#define ATP_SERVER_OPENAI_JSON_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "config/config.h"
#include "engine/detokenizer.h"
#include "engine/request.h"
#include "engine/tokenizer.h"
#include "server/chat_template.h"

namespace atp {

// The body of /v1/completions or /v1/chat/completions.
struct CompletionCall {
  bool chat = false;
  std::string model;  // empty: the served one
  // One generation of `sampling.n` answers each; a chat has exactly one. Choice index = prompt * n + answer.
  std::vector<std::variant<std::string, std::vector<TokenId>, std::vector<ChatMessage>>> prompts;
  SamplingParams sampling;
  bool max_tokens_given = false;
  bool echo = false;
  bool add_generation_prompt = true;               // of a chat: open the assistant's answer
  std::optional<CompressionOverride> compression;  // "atp": {"preset"} or {"ratio", "bits"}, not OpenAI's
  int priority = 0;
  bool stream = false;
  bool include_usage = false;  // stream_options.include_usage
};

// `defaults`: sampling parameters that the body does not have.
absl::StatusOr<CompletionCall> ParseCompletionCall(std::string_view body, const LimitsConfig& limits,
                                                   const SamplingParams& defaults = {});
absl::StatusOr<CompletionCall> ParseChatCall(std::string_view body, const LimitsConfig& limits,
                                             const SamplingParams& defaults = {});

// The body of /tokenize: {"prompt"} (vLLM), {"messages"} (vLLM) or {"content"} (llama-server).
struct TokenizeCall {
  std::string model;
  std::variant<std::string, std::vector<ChatMessage>> input;
  bool add_special = true;
  bool add_generation_prompt = true;
};
absl::StatusOr<TokenizeCall> ParseTokenizeCall(std::string_view body);

struct DetokenizeCall {
  std::string model;
  std::vector<TokenId> tokens;
};
absl::StatusOr<DetokenizeCall> ParseDetokenizeCall(std::string_view body);

// What every chunk of one answer repeats.
struct AnswerHeader {
  bool chat = false;
  bool include_usage = false;
  bool with_logprobs = false;
  int top_logprobs = 0;
  std::string id;  // "cmpl-…" or "chatcmpl-…"
  int64_t created_unix_seconds = 0;
  std::string model;
};

// Where in a choice's text the next token's text begins, in characters (code points): OpenAI's text_offset.
// Tokens are turned into text again as the engine did it, because a token's bytes and its text are not always
// the same (spaces that the tokenizer put there, UTF-8 sequences over several tokens).
class TextPosition {
 public:
  // `echo`: the text begins with the prompt.
  TextPosition(const Tokenizer* tokenizer, bool echo);

  int64_t offset() const { return offset_; }
  void Advance(const TokenLogprob& token);

 private:
  Detokenizer detokenizer_;
  int64_t offset_ = 0;
};

// New text of one choice; of a whole answer, all its text.
struct ChoicePiece {
  int index = 0;
  std::string text;
  std::vector<TokenLogprob> logprobs;
  std::optional<FinishReason> finish;  // kStop or kLength
};

// {"error":{"message","type","param","code"}}. `param` is what comes before the first ": " of the message,
// where that is a field's name. The HTTP status gives type and code, where none is given.
std::string RenderError(int http_status, std::string_view message, const char* code = nullptr);
int HttpStatusOf(const absl::Status& status);

// Chunks of a stream, without SSE framing. A chat's first chunk of a choice is its role.
std::string RenderRoleChunk(const AnswerHeader& header, int index);
// `last`: of all of a stream's, where no usage chunk follows: null otherwise.
std::string RenderChunk(const AnswerHeader& header, const ChoicePiece& piece, const Tokenizer& tokenizer,
                        TextPosition* position, const CompressionUsage* last = nullptr);
// `atp` (in every last chunk and whole answer, where the engine says): how its history was compressed.
std::string RenderUsageChunk(const AnswerHeader& header, const Usage& usage);

// A whole answer. `positions` are as at the beginning, one per piece.
std::string RenderAnswer(const AnswerHeader& header, const std::vector<ChoicePiece>& pieces,
                         const Usage& usage, const Tokenizer& tokenizer, std::vector<TextPosition> positions);

struct ModelCard {
  std::string id;
  int64_t created_unix_seconds = 0;
  int max_context_tokens = 0;
};
std::string RenderModel(const ModelCard& model);
std::string RenderModelList(const ModelCard& model);
std::string RenderTokens(const std::vector<TokenId>& tokens, int max_context_tokens);
std::string RenderText(std::string_view text);  // {"prompt", "content"}: vLLM's name and llama-server's
std::string RenderVersion();
std::string RenderHealth(std::string_view state);

}  // namespace atp

#endif  // ATP_SERVER_OPENAI_JSON_H_
