#include <charconv>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/json_object.h"
#include "server/openai_json.h"

namespace atp {
namespace {

using nlohmann::json;

constexpr int kMaxInt = std::numeric_limits<int>::max();

void ReadLogitBias(const JsonObject& body, SamplingParams* sampling) {
  const json* found = body.Find("logit_bias");
  if (found == nullptr) return;
  if (!found->is_object()) {
    return body.Fail("logit_bias", absl::StrCat("must map token ids to numbers, got ", Describe(*found)));
  }
  for (auto it = found->begin(); it != found->end(); ++it) {
    const std::string& key = it.key();
    TokenId id = 0;
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), id);
    if (error != std::errc() || end != key.data() + key.size() || id < 0) {
      return body.Fail("logit_bias",
                       absl::StrCat("has a key that is not a token id: '", key.substr(0, 32), "'"));
    }
    if (!it->is_number() || !(std::abs(it->get<double>()) <= 100)) {
      return body.Fail("logit_bias",
                       absl::StrCat("of token ", id, " must be in [-100, 100], got ", Describe(*it)));
    }
    sampling->logit_bias.emplace_back(id, it->get<float>());
  }
}

// "atp": {"preset": "compact"} or {"ratio": 0.25, "bits": 4}. Ranges are GenerateService's to check.
void ReadCompression(const JsonObject& body, absl::Status* status,
                     std::optional<CompressionOverride>* compression) {
  const json* found = body.Find("atp");
  if (found == nullptr) return;
  if (!found->is_object()) {
    return body.Fail("atp", absl::StrCat("must be an object with preset or ratio, got ", Describe(*found)));
  }
  const JsonObject atp(found, status, "atp.");
  for (const auto& item : found->items()) {
    if (item.key() == "preset" || item.key() == "ratio" || item.key() == "bits") continue;
    return body.Fail("atp",
                     absl::StrCat("has preset, ratio and bits, but no '", item.key().substr(0, 32), "'"));
  }
  CompressionOverride& wanted = compression->emplace();
  if (atp.Find("preset") != nullptr) atp.Read("preset", &wanted.preset.emplace());
  if (atp.Find("ratio") != nullptr) atp.Read("ratio", &wanted.ratio.emplace());
  if (atp.Find("bits") != nullptr) atp.Read("bits", &wanted.bits.emplace());
}

// Everything that both kinds of completion have. Ranges of sampling parameters are GenerateService's to
// check.
void ReadCommon(const JsonObject& body, absl::Status* status, const LimitsConfig& limits,
                CompletionCall* call) {
  SamplingParams& sampling = call->sampling;
  body.Read("model", &call->model);
  body.Read("temperature", &sampling.temperature);
  body.Read("top_p", &sampling.top_p);
  body.Read("min_p", &sampling.min_p);
  // -1 is vLLM's way to say off.
  body.Read("top_k", -1, kMaxInt, &sampling.top_k);
  sampling.top_k = std::max(sampling.top_k, 0);
  body.Read("presence_penalty", &sampling.presence_penalty);
  body.Read("frequency_penalty", &sampling.frequency_penalty);
  body.Read("repetition_penalty", &sampling.repetition_penalty);
  ReadLogitBias(body, &sampling);
  body.ReadSeed("seed", &sampling.seed);
  body.ReadStrings("stop", &sampling.stop);
  for (const std::string& stop : sampling.stop) {
    if (stop.empty()) body.Fail("stop", "must not have an empty string");
  }
  body.Read("include_stop_str_in_output", &sampling.include_stop_in_output);
  body.ReadTokens("stop_token_ids", &sampling.stop_token_ids);
  body.Read("min_tokens", 0, kMaxInt, &sampling.min_tokens);
  body.Read("ignore_eos", &sampling.ignore_eos);
  body.Read("n", 1, limits.max_n, &sampling.n);
  int best_of = sampling.n;
  body.Read("best_of", &best_of);
  if (best_of != sampling.n) body.Fail("best_of", absl::StrCat("must be n (", sampling.n, ") or absent"));
  body.Read("priority", &call->priority);
  ReadCompression(body, status, &call->compression);
  std::string user;
  body.Read("user", &user);  // nothing is done with it, but a wrong type is a mistake worth telling
  body.Read("stream", &call->stream);
  if (const json* options = body.Find("stream_options"); options != nullptr) {
    if (!options->is_object()) return body.Fail("stream_options", "must be an object");
    if (!call->stream) return body.Fail("stream_options", "needs \"stream\": true");
    absl::Status status;
    JsonObject(options, &status).Read("include_usage", &call->include_usage);
    if (!status.ok()) body.Fail("stream_options.include_usage", "must be true or false");
  }
  body.Refuse({"use_beam_search",
               "prompt_logprobs",
               "guided_json",
               "guided_regex",
               "guided_choice",
               "guided_grammar",
               "structured_outputs",
               "logits_processors",
               "allowed_token_ids",
               "bad_words",
               "truncate_prompt_tokens",
               "chat_template",
               "chat_template_kwargs",
               "documents",
               "prompt_embeds",
               "grammar",
               "json_schema",
               "mirostat",
               "dry_multiplier",
               "xtc_probability"});
  if (const json* format = body.Find("response_format"); format != nullptr) {
    const bool text = format->is_object() && format->value("type", json()) == json("text");
    if (!text) body.Fail("response_format", "only {\"type\": \"text\"} is supported by this server");
  }
}

void ReadPrompts(const JsonObject& body, const LimitsConfig& limits, CompletionCall* call) {
  const json* prompt = body.Find("prompt");
  if (prompt == nullptr) return body.Fail("prompt", "is required");
  if (prompt->is_string()) {
    call->prompts.emplace_back(prompt->get<std::string>());
    return;
  }
  if (!prompt->is_array() || prompt->empty()) {
    return body.Fail("prompt",
                     absl::StrCat("must be a string, an array of strings, an array of token ids or an array "
                                  "of such arrays, got ",
                                  Describe(*prompt)));
  }
  if (prompt->front().is_number()) {
    std::vector<TokenId> tokens;
    body.ReadTokens("prompt", &tokens);
    call->prompts.emplace_back(std::move(tokens));
    return;
  }
  if (prompt->size() > static_cast<size_t>(std::max(limits.max_prompts, 0))) {
    return body.Fail("prompt", absl::StrCat("at most ", limits.max_prompts, " prompts in one call, got ",
                                            prompt->size(), " (limits.max_prompts)"));
  }
  for (size_t i = 0; i < prompt->size(); ++i) {
    const json& item = (*prompt)[i];
    if (item.type() != prompt->front().type() || !(item.is_string() || item.is_array())) {
      return body.Fail(
          "prompt", absl::StrCat("items must all be strings or all be arrays of token ids; item ", i, " is ",
                                 Describe(item)));
    }
    if (item.is_string()) {
      call->prompts.emplace_back(item.get<std::string>());
      continue;
    }
    absl::StatusOr<std::vector<TokenId>> tokens = TokenArray(item);
    if (!tokens.ok()) return body.Fail("prompt", absl::StrCat("[", i, "]", tokens.status().message()));
    call->prompts.emplace_back(*std::move(tokens));
  }
}

// A message's content: a string, or text parts, joined by newlines. An assistant's may be missing, or a
// refusal.
void ReadContent(const JsonObject& message, bool assistant, std::string* content) {
  const json* found = message.Find("content");
  if (found == nullptr && assistant) return message.Read("refusal", content);
  if (found == nullptr) return message.Fail("content", "is required");
  if (found->is_string()) {
    *content = found->get<std::string>();
    return;
  }
  if (!found->is_array()) {
    return message.Fail("content",
                        absl::StrCat("must be a string or an array of text parts, got ", Describe(*found)));
  }
  bool first = true;
  for (const json& part : *found) {
    const auto is = [&part](const char* type) {
      return part.is_object() && part.value("type", json()) == json(type) && part.contains(type) &&
             part[type].is_string();
    };
    const char* const type = assistant && is("refusal") ? "refusal" : "text";
    if (!is(type)) {
      return message.Fail("content", "only parts {\"type\": \"text\", \"text\": …} are supported");
    }
    if (!first) content->push_back('\n');
    content->append(part[type].get_ref<const std::string&>());
    first = false;
  }
}

void ReadMessages(const JsonObject& body, absl::Status* status, std::vector<ChatMessage>* messages) {
  const json* found = body.Find("messages");
  if (found == nullptr) return body.Fail("messages", "is required");
  if (!found->is_array() || found->empty()) {
    return body.Fail("messages",
                     absl::StrCat("must be an array of at least one message, got ", Describe(*found)));
  }
  messages->reserve(found->size());
  for (size_t i = 0; i < found->size() && status->ok(); ++i) {
    const json& item = (*found)[i];
    const std::string path = absl::StrCat("messages[", i, "]");
    if (!item.is_object()) return body.Fail(path, absl::StrCat("must be an object, got ", Describe(item)));
    const JsonObject message(&item, status, absl::StrCat(path, "."));
    ChatMessage& out = messages->emplace_back();
    message.Read("role", &out.role);
    if (out.role.empty()) message.Fail("role", "is required");
    message.Read("name", &out.name);
    message.Refuse({"tool_calls", "function_call", "audio"});
    ReadContent(message, out.role == "assistant", &out.content);
  }
}

void ReadGenerationPrompt(const JsonObject& body, bool* add_generation_prompt) {
  body.Read("add_generation_prompt", add_generation_prompt);
  body.Refuse({"continue_final_message"});
}

}  // namespace

absl::StatusOr<CompletionCall> ParseCompletionCall(std::string_view text, const LimitsConfig& limits,
                                                   const SamplingParams& defaults) {
  absl::StatusOr<json> parsed = ParseJsonObject(text);
  if (!parsed.ok()) return parsed.status();
  absl::Status status;
  const JsonObject body(&*parsed, &status);
  CompletionCall call;
  call.sampling = defaults;
  ReadCommon(body, &status, limits, &call);
  ReadPrompts(body, limits, &call);
  body.Read("echo", &call.echo);
  std::string suffix;
  body.Read("suffix", &suffix);
  if (!suffix.empty()) body.Fail("suffix", "is not supported by this server; leave it out");
  call.sampling.max_tokens = limits.default_max_tokens;
  call.max_tokens_given = true;
  body.Read("max_tokens", call.echo ? 0 : 1, kMaxInt, &call.sampling.max_tokens);
  if (body.Find("logprobs") != nullptr) {
    int logprobs = 0;
    body.Read("logprobs", 0, limits.max_logprobs, &logprobs);
    call.sampling.logprobs = logprobs;
  }
  if (!status.ok()) return status;
  return call;
}

absl::StatusOr<CompletionCall> ParseChatCall(std::string_view text, const LimitsConfig& limits,
                                             const SamplingParams& defaults) {
  absl::StatusOr<json> parsed = ParseJsonObject(text);
  if (!parsed.ok()) return parsed.status();
  absl::Status status;
  const JsonObject body(&*parsed, &status);
  CompletionCall call;
  call.chat = true;
  call.sampling = defaults;
  ReadCommon(body, &status, limits, &call);
  std::vector<ChatMessage> messages;
  ReadMessages(body, &status, &messages);
  call.prompts.emplace_back(std::move(messages));
  ReadGenerationPrompt(body, &call.add_generation_prompt);
  body.Refuse({"tools", "functions", "audio", "web_search_options"});
  for (std::string_view name : {"tool_choice", "function_call"}) {
    const json* found = body.Find(name);
    if (found != nullptr && *found != json("none")) body.Fail(name, "tools are not supported by this server");
  }
  if (const json* modalities = body.Find("modalities");
      modalities != nullptr && *modalities != json::array({"text"})) {
    body.Fail("modalities", "only [\"text\"] is supported by this server");
  }
  for (std::string_view name : {"max_tokens", "max_completion_tokens"}) {  // the newer name wins
    body.Read(name, 1, kMaxInt, &call.sampling.max_tokens);
    call.max_tokens_given |= body.Find(name) != nullptr;
  }
  bool logprobs = false;
  body.Read("logprobs", &logprobs);
  int top_logprobs = 0;
  body.Read("top_logprobs", 0, limits.max_logprobs, &top_logprobs);
  if (logprobs) call.sampling.logprobs = top_logprobs;
  if (!logprobs && top_logprobs > 0) body.Fail("top_logprobs", "needs \"logprobs\": true");
  if (!status.ok()) return status;
  return call;
}

absl::StatusOr<TokenizeCall> ParseTokenizeCall(std::string_view text) {
  absl::StatusOr<json> parsed = ParseJsonObject(text);
  if (!parsed.ok()) return parsed.status();
  absl::Status status;
  const JsonObject body(&*parsed, &status);
  TokenizeCall call;
  body.Read("model", &call.model);
  const int given = (body.Find("prompt") != nullptr) + (body.Find("content") != nullptr) +
                    (body.Find("messages") != nullptr);
  if (given != 1) body.Fail("prompt", "exactly one of prompt, messages and content is required");
  if (body.Find("messages") != nullptr) {
    std::vector<ChatMessage> messages;
    ReadMessages(body, &status, &messages);
    ReadGenerationPrompt(body, &call.add_generation_prompt);
    call.input = std::move(messages);
  } else {
    std::string input;
    body.Read("prompt", &input);
    body.Read("content", &input);
    // The default of llama-server, whose field that is, is the opposite of vLLM's.
    if (body.Find("content") != nullptr) call.add_special = false;
    body.Read("add_special", &call.add_special);
    body.Read("add_special_tokens", &call.add_special);
    call.input = std::move(input);
  }
  if (!status.ok()) return status;
  return call;
}

absl::StatusOr<DetokenizeCall> ParseDetokenizeCall(std::string_view text) {
  absl::StatusOr<json> parsed = ParseJsonObject(text);
  if (!parsed.ok()) return parsed.status();
  absl::Status status;
  const JsonObject body(&*parsed, &status);
  DetokenizeCall call;
  body.Read("model", &call.model);
  if (body.Find("tokens") == nullptr) body.Fail("tokens", "is required");
  body.ReadTokens("tokens", &call.tokens);
  if (!status.ok()) return status;
  return call;
}

}  // namespace atp
