// What every front end does with a request, whatever the transport: validate, template, tokenize, submit,
// cancel. Thread-safe. Knows no socket, no JSON and no protobuf.
#ifndef ATP_SERVER_GENERATE_SERVICE_H_
#define ATP_SERVER_GENERATE_SERVICE_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "config/config.h"
#include "engine/engine.h"
#include "engine/request.h"
#include "engine/tokenizer.h"
#include "server/chat_template.h"

namespace atp {

struct ServedModel {
  std::string id;
  int64_t created_unix_seconds = 0;
  int max_context_tokens = 0;
  int vocab_size = 0;
  std::string device;       // Backend::Description()
  SamplingParams sampling;  // what requests begin from; the front ends put in what a client sends
};

// Text, token ids, or a conversation that the model's chat template turns into a prompt.
using PromptInput = std::variant<std::string, std::vector<TokenId>, std::vector<ChatMessage>>;

struct GenerateInput {
  std::string model;  // empty, or ServedModel::id: else NotFound
  PromptInput prompt;
  SamplingParams sampling;
  bool max_tokens_given =
      false;  // else sampling.max_tokens becomes what fits (chat, gRPC) — set by the service
  bool add_generation_prompt = true;  // of a conversation: open the assistant's answer
  bool echo = false;
  bool whole = false;  // the answer is kept until it is whole; else it goes out as it comes
  std::optional<CompressionOverride> compression;  // none: as the server does it
  int priority = 0;
  absl::Time deadline = absl::InfiniteFuture();  // infinite: scheduler.default_timeout_ms from now
  std::string external_id;
};

struct Submitted {
  RequestId id = 0;
  int prompt_tokens = 0;
  // Log probabilities, candidates counted: of the prompt; and with those of the answer, where it is kept
  // whole.
  int64_t scored = 0, kept = 0;
};

class GenerateService {
 public:
  // All pointers outlive the service.
  GenerateService(Engine* engine, const Tokenizer* tokenizer, ChatTemplate chat_template, ServedModel model,
                  const Config& config);

  // Statuses as Engine::Submit, NotFound for another model, and OutOfRange for a prompt that leaves no room.
  // InvalidArgument messages begin with the field's OpenAI name and a colon ("temperature: must be in [0,
  // 100], got -1"), so that front ends can fill in `param`.
  absl::StatusOr<Submitted> Generate(GenerateInput input, std::shared_ptr<OutputSink> sink);
  // Whether one call may ask for so many log probabilities: the sums of its prompts' Submitted.
  static absl::Status CheckScored(int64_t scored, int64_t kept);
  void Cancel(RequestId id) { engine_->Cancel(id); }

  // As a prompt: control tokens that the text spells are such.
  absl::StatusOr<std::vector<TokenId>> Tokenize(std::string_view text, bool add_special) const;
  absl::StatusOr<std::vector<TokenId>> TokenizeChat(const std::vector<ChatMessage>& messages,
                                                    bool add_generation_prompt = true) const;
  absl::StatusOr<std::string> Detokenize(
      const std::vector<TokenId>& tokens) const;  // InvalidArgument for ids out of range
  const Tokenizer& tokenizer() const { return *tokenizer_; }

  const ServedModel& model() const { return model_; }
  const Config& config() const { return config_; }
  EngineStats Stats() const { return engine_->Stats(); }
  absl::Duration RetryAfter() const { return engine_->RetryAfter(); }

  // Constant-time comparison with every configured key; true when none is configured.
  bool Authorized(std::string_view bearer_token) const;

  // Off at once when draining begins. /health/ready and grpc.health follow it.
  void SetReady(bool ready) { ready_.store(ready); }
  bool ready() const { return ready_.load(); }

 private:
  absl::StatusOr<std::vector<TokenId>> EncodePrompt(const PromptInput& prompt,
                                                    bool add_generation_prompt) const;
  void AddTemplateStops(SamplingParams* sampling) const;
  // Refuses a text that cannot fit without tokenizing it, which takes long: `bytes` of it are no white space.
  absl::Status CheckLength(size_t bytes, std::string_view field) const;
  // Refuses a prompt that leaves no room for an answer, and sets max_tokens to what fits where it was not
  // given, and at most to `most`.
  absl::Status FitMaxTokens(int prompt_tokens, bool is_chat, const GenerateInput& input, int64_t most,
                            SamplingParams* sampling) const;

  Engine* engine_;
  const Tokenizer* tokenizer_;
  ChatTemplate chat_template_;
  ServedModel model_;
  Config config_;
  size_t longest_token_ = 1;  // bytes
  // One long text at a time: a library may need a hundred times its size to tokenize it.
  mutable std::mutex long_text_mutex_;
  std::atomic<bool> ready_{false};
};

// A fresh id for a request that came without one: "atp-" and 24 hex digits.
std::string NewRequestId();

// What /version, atp --version and atp_build_info say.
std::string_view AtpVersion();

}  // namespace atp

#endif  // ATP_SERVER_GENERATE_SERVICE_H_
