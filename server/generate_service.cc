#include "server/generate_service.h"

#include <openssl/crypto.h>
#include <openssl/rand.h>
#include <openssl/sha.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <limits>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "engine/compression_plans.h"
#include "engine/sampler.h"

namespace atp {
namespace {

absl::string_view ToAbsl(std::string_view text) { return {text.data(), text.size()}; }

absl::Status CheckIds(const std::vector<TokenId>& ids, int vocab_size, std::string_view field) {
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocab_size) {
      return absl::InvalidArgumentError(absl::StrCat(ToAbsl(field), ": token id ", ids[i], " at position ", i,
                                                     " is outside [0, ", vocab_size, ")"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckLimits(const SamplingParams& sampling, const LimitsConfig& limits) {
  if (sampling.n < 1 || sampling.n > limits.max_n) {
    return absl::InvalidArgumentError(
        absl::StrCat("n: must be in [1, ", limits.max_n, "], got ", sampling.n, " (limits.max_n)"));
  }
  if (sampling.logprobs && (*sampling.logprobs < 0 || *sampling.logprobs > limits.max_logprobs)) {
    return absl::InvalidArgumentError(absl::StrCat("logprobs: must be in [0, ", limits.max_logprobs,
                                                   "], got ", *sampling.logprobs, " (limits.max_logprobs)"));
  }
  const size_t max_stops = static_cast<size_t>(std::max(0, limits.max_stop_strings));
  if (sampling.stop.size() > max_stops) {
    return absl::InvalidArgumentError(absl::StrCat("stop: at most ", max_stops, " stop strings, got ",
                                                   sampling.stop.size(), " (limits.max_stop_strings)"));
  }
  return absl::OkStatus();
}

// Log probabilities of prompts that may be asked for in one call, and with those of answers that are kept
// until they are whole, which most often end before: some 100 bytes each.
constexpr int64_t kMaxScored = 1 << 20, kMaxKept = 1 << 22;

// Normalizers (NFKC and the like) may make a text so many times shorter.
constexpr size_t kMostShrinking = 4;
constexpr size_t kLongText = 64 << 10;  // bytes

// White space, which some tokenizers fold, does not count.
size_t BytesOf(std::string_view text) {
  return static_cast<size_t>(std::count_if(
      text.begin(), text.end(), [](char c) { return !absl::ascii_isspace(static_cast<unsigned char>(c)); }));
}

// The form that generate_service.h promises: the field and a colon first, whoever found the fault.
absl::Status WithField(const absl::Status& status, std::string_view field) {
  const absl::string_view message = status.message();
  const size_t word_end = message.find_first_of(" :");
  if (status.code() != absl::StatusCode::kInvalidArgument) return status;
  if (word_end != absl::string_view::npos && message[word_end] == ':') return status;
  return absl::InvalidArgumentError(absl::StrCat(ToAbsl(field), ": ", message));
}

// The sampler's messages begin with the field's name, but have no colon.
absl::Status CheckSampling(const SamplingParams& sampling, int vocab_size) {
  const absl::Status status = ValidateSampling(sampling, vocab_size);
  const std::string message(status.message());
  return WithField(status, message.substr(0, message.find(' ')));
}

absl::Status CheckCompression(const std::optional<CompressionOverride>& compression,
                              const AtpConfig& config) {
  if (!compression) return absl::OkStatus();
  if (!config.allow_override) {
    return absl::InvalidArgumentError(
        "atp: this server does not let requests choose their compression (atp.allow_override); leave it out");
  }
  return ValidateOverride(*compression);
}

using Digest = std::array<unsigned char, SHA256_DIGEST_LENGTH>;

// Digests have one length, so that the comparison below tells nothing about the length of a key either.
Digest Sha256(std::string_view text) {
  Digest digest;
  SHA256(reinterpret_cast<const unsigned char*>(text.data()), text.size(), digest.data());
  return digest;
}

}  // namespace

GenerateService::GenerateService(Engine* engine, const Tokenizer* tokenizer, ChatTemplate chat_template,
                                 ServedModel model, const Config& config)
    : engine_(engine),
      tokenizer_(tokenizer),
      chat_template_(std::move(chat_template)),
      model_(std::move(model)),
      config_(config) {
  for (TokenId id = 0; id < tokenizer->vocab_size(); ++id)
    longest_token_ = std::max(longest_token_, BytesOf(tokenizer->TokenBytes(id, /*keep_special=*/true)));
}

absl::Status GenerateService::CheckScored(int64_t scored, int64_t kept) {
  if (scored <= kMaxScored && kept <= kMaxKept) return absl::OkStatus();
  const bool prompts = scored > kMaxScored;
  return absl::InvalidArgumentError(absl::StrCat(
      "logprobs: ", prompts ? "of all prompts' tokens, with echo," : "of an answer that is not streamed,",
      " times n, times one more than logprobs, are ", prompts ? scored : kept, " candidates; at most ",
      prompts ? kMaxScored : kMaxKept, " are kept for one call: ",
      prompts ? "send fewer prompts at once" : "stream, or ask for fewer tokens"));
}

absl::StatusOr<Submitted> GenerateService::Generate(GenerateInput input, std::shared_ptr<OutputSink> sink) {
  if (!input.model.empty() && input.model != model_.id) {
    return absl::NotFoundError(absl::StrCat("model: '", input.model.substr(0, 128),
                                            "' is not served here; this server serves '", model_.id, "'"));
  }
  if (absl::Status s = CheckLimits(input.sampling, config_.limits); !s.ok()) return s;
  if (absl::Status s = CheckCompression(input.compression, config_.atp); !s.ok()) return s;

  Request request;
  request.sampling = std::move(input.sampling);
  const bool is_chat = std::holds_alternative<std::vector<ChatMessage>>(input.prompt);
  absl::StatusOr<std::vector<TokenId>> prompt = EncodePrompt(input.prompt, input.add_generation_prompt);
  if (!prompt.ok()) return prompt.status();
  request.prompt = *std::move(prompt);
  const int prompt_tokens = static_cast<int>(request.prompt.size());
  const int64_t per_token =
      request.sampling.logprobs ? int64_t{request.sampling.n} * (1 + *request.sampling.logprobs) : 0;
  const int64_t scored = input.echo ? prompt_tokens * per_token : 0;
  if (absl::Status s = CheckScored(scored, 0); !s.ok()) return s;
  const bool keeps = input.whole && per_token > 0;  // the log probabilities of the answer
  const int64_t most = keeps ? (kMaxKept - scored) / per_token : std::numeric_limits<int>::max();
  if (absl::Status s = FitMaxTokens(prompt_tokens, is_chat, input, most, &request.sampling); !s.ok())
    return s;
  const int room = model_.max_context_tokens - prompt_tokens;
  const int64_t kept = keeps ? scored + std::min(request.sampling.max_tokens, room) * per_token : 0;
  if (absl::Status s = CheckScored(scored, kept); !s.ok()) return s;
  if (absl::Status s = CheckSampling(request.sampling, model_.vocab_size); !s.ok()) return s;
  if (is_chat) AddTemplateStops(&request.sampling);

  request.external_id = std::move(input.external_id);
  request.echo_prompt = input.echo;
  request.compression = std::move(input.compression);
  request.priority = input.priority;
  request.deadline = input.deadline;
  if (request.deadline == absl::InfiniteFuture() && config_.scheduler.default_timeout_ms > 0) {
    request.deadline = absl::Now() + absl::Milliseconds(config_.scheduler.default_timeout_ms);
  }
  absl::StatusOr<RequestId> id = engine_->Submit(std::move(request), std::move(sink));
  if (!id.ok()) return WithField(id.status(), is_chat ? "messages" : "prompt");
  return Submitted{*id, prompt_tokens, scored, kept};
}

absl::StatusOr<std::vector<TokenId>> GenerateService::EncodePrompt(const PromptInput& prompt,
                                                                   bool add_generation_prompt) const {
  if (const auto* messages = std::get_if<std::vector<ChatMessage>>(&prompt)) {
    size_t bytes = 0;
    for (const ChatMessage& message : *messages) bytes += BytesOf(message.content);
    if (absl::Status s = CheckLength(bytes, "messages"); !s.ok()) return s;
    return TokenizeChat(*messages, add_generation_prompt);
  }
  std::vector<TokenId> ids;
  if (const auto* text = std::get_if<std::string>(&prompt)) {
    if (absl::Status s = CheckLength(BytesOf(*text), "prompt"); !s.ok()) return s;
    absl::StatusOr<std::vector<TokenId>> tokens = Tokenize(*text, /*add_special=*/true);
    if (!tokens.ok()) return tokens;
    ids = *std::move(tokens);
  } else {
    ids = std::get<std::vector<TokenId>>(prompt);
    if (absl::Status s = CheckIds(ids, model_.vocab_size, "prompt"); !s.ok()) return s;
  }
  if (ids.empty()) {
    if (!tokenizer_->special().bos) {
      return absl::InvalidArgumentError(
          "prompt: must not be empty (this model has no beginning-of-sequence token to start from)");
    }
    ids.push_back(*tokenizer_->special().bos);
  }
  return ids;
}

void GenerateService::AddTemplateStops(SamplingParams* sampling) const {
  for (std::string& stop : chat_template_.StopStrings()) sampling->stop.push_back(std::move(stop));
  if (sampling->ignore_eos) return;  // the tokens that end a turn are such
  for (std::string& token : chat_template_.StopTokens()) {
    if (std::optional<TokenId> id = tokenizer_->IdOf(token)) {
      sampling->stop_token_ids.push_back(*id);
    } else {
      sampling->stop.push_back(std::move(token));
    }
  }
}

absl::Status GenerateService::CheckLength(size_t bytes, std::string_view field) const {
  const size_t least = bytes / (kMostShrinking * longest_token_);
  if (least <= static_cast<size_t>(model_.max_context_tokens)) return absl::OkStatus();
  return absl::OutOfRangeError(absl::StrCat(ToAbsl(field), ": has ", bytes,
                                            " bytes beside white space, which are more than ", least,
                                            " tokens, but the model's context is ", model_.max_context_tokens,
                                            " tokens for prompt and answer together; shorten it"));
}

absl::Status GenerateService::FitMaxTokens(int prompt_tokens, bool is_chat, const GenerateInput& input,
                                           int64_t most, SamplingParams* sampling) const {
  const int room = model_.max_context_tokens - prompt_tokens;
  if (room < 0 || (room == 0 && !(input.max_tokens_given && sampling->max_tokens == 0))) {
    return absl::OutOfRangeError(absl::StrCat(
        is_chat ? "messages" : "prompt", ": has ", prompt_tokens, " tokens, but the model's context is ",
        model_.max_context_tokens, " tokens for prompt and answer together; shorten it"));
  }
  if (input.max_tokens_given) return absl::OkStatus();
  // An answer that nobody limited must not be refused because the cache is smaller than the model's context.
  const int fits = static_cast<int>(
      std::min<int64_t>({room, engine_->MaxNewTokens(prompt_tokens, input.compression), most}));
  sampling->max_tokens = fits;
  if (sampling->min_tokens > sampling->max_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("min_tokens: ", sampling->min_tokens,
                                                   " do not fit: after a prompt of ", prompt_tokens,
                                                   " tokens there is room for ", fits));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<TokenId>> GenerateService::Tokenize(std::string_view text,
                                                               bool add_special) const {
  std::unique_lock<std::mutex> lock(long_text_mutex_, std::defer_lock);
  if (text.size() > kLongText) lock.lock();
  return tokenizer_->Encode(text, add_special, /*parse_special=*/true);
}

absl::StatusOr<std::vector<TokenId>> GenerateService::TokenizeChat(const std::vector<ChatMessage>& messages,
                                                                   bool add_generation_prompt) const {
  if (messages.empty()) return absl::InvalidArgumentError("messages: must have at least one message");
  size_t bytes = 0;
  for (const ChatMessage& message : messages) bytes += message.content.size();
  std::unique_lock<std::mutex> lock(long_text_mutex_, std::defer_lock);
  if (bytes > kLongText) lock.lock();
  absl::StatusOr<std::vector<TokenId>> ids =
      chat_template_.Render(messages, *tokenizer_, add_generation_prompt);
  if (ids.ok() && ids->empty()) return absl::InvalidArgumentError("messages: the conversation has no tokens");
  return ids;
}

absl::StatusOr<std::string> GenerateService::Detokenize(const std::vector<TokenId>& tokens) const {
  if (absl::Status s = CheckIds(tokens, model_.vocab_size, "tokens"); !s.ok()) return s;
  return tokenizer_->Decode(tokens);
}

bool GenerateService::Authorized(std::string_view bearer_token) const {
  if (config_.server.api_keys.empty()) return true;
  const Digest given = Sha256(bearer_token);
  bool authorized = false;
  for (const std::string& key :
       config_.server.api_keys) {  // no early exit: time says nothing about which key
    const Digest wanted = Sha256(key);
    authorized |= CRYPTO_memcmp(given.data(), wanted.data(), wanted.size()) == 0;
  }
  return authorized;
}

std::string NewRequestId() {
  std::array<unsigned char, 12> bytes;
  // The id needs to be unique, not secret; the generator fails only where the system has no entropy source at
  // all.
  if (RAND_bytes(bytes.data(), static_cast<int>(bytes.size())) != 1) std::abort();
  return absl::StrCat("atp-", absl::BytesToHexString(absl::string_view(
                                  reinterpret_cast<const char*>(bytes.data()), bytes.size())));
}

std::string_view AtpVersion() { return ATP_VERSION; }

}  // namespace atp
