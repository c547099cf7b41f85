// Bodies from anyone: whatever the bytes, a call in its limits or an error, and every text that goes out is
// JSON.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "server/openai_json.h"
#include "tests/server/byte_tokenizer.h"

namespace atp {

// In the server this is in generate_service.cc, which would bring the engine along.
std::string_view AtpVersion() { return "fuzz"; }

namespace {

const LimitsConfig kLimits;

void Require(bool condition) {
  if (!condition) std::abort();
}

void RequireJson(const std::string& text) { Require(nlohmann::json::accept(text)); }

void CheckError(const absl::Status& status) {
  Require(status.code() == absl::StatusCode::kInvalidArgument);
  RequireJson(RenderError(HttpStatusOf(status), std::string(status.message())));
}

// Renders an answer that says what the client said, which is the worst text there is.
void CheckAnswer(const CompletionCall& call, std::string text) {
  const testing::ByteTokenizer tokenizer;
  AnswerHeader header;
  header.chat = call.chat;
  header.model = call.model;
  header.with_logprobs = call.sampling.logprobs.has_value();
  header.top_logprobs = call.sampling.logprobs.value_or(0);
  ChoicePiece piece;
  piece.finish = FinishReason::kStop;
  for (unsigned char byte : text)
    piece.logprobs.push_back({byte, byte == 0 ? NAN : -1.0f, {{byte, -1.0f}, {0xE2, -INFINITY}}});
  piece.text = std::move(text);
  TextPosition position(&tokenizer, false);
  RequireJson(RenderChunk(header, piece, tokenizer, &position));
  RequireJson(RenderAnswer(header, {piece}, Usage(), tokenizer, {TextPosition(&tokenizer, true)}));
}

void CheckCall(const absl::StatusOr<CompletionCall>& call, std::string_view body) {
  if (!call.ok()) return CheckError(call.status());
  const SamplingParams& sampling = call->sampling;
  Require(!call->prompts.empty() && call->prompts.size() <= static_cast<size_t>(kLimits.max_prompts));
  Require(sampling.n >= 1 && sampling.n <= kLimits.max_n);
  Require(sampling.max_tokens >= 0 && sampling.min_tokens >= 0 && sampling.top_k >= 0);
  Require(std::isfinite(sampling.temperature) && std::isfinite(sampling.top_p) &&
          std::isfinite(sampling.min_p));
  if (sampling.logprobs) Require(*sampling.logprobs >= 0 && *sampling.logprobs <= kLimits.max_logprobs);
  for (const auto& [token, bias] : sampling.logit_bias) Require(token >= 0 && std::abs(bias) <= 100);
  for (const std::string& stop : sampling.stop) Require(!stop.empty());
  for (const auto& prompt : call->prompts) {
    if (const auto* ids = std::get_if<std::vector<TokenId>>(&prompt)) {
      for (TokenId id : *ids) Require(id >= 0);
    }
  }
  CheckAnswer(*call, std::string(body.substr(0, 256)));
}

}  // namespace
}  // namespace atp

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view body(reinterpret_cast<const char*>(data), size);
  atp::CheckCall(atp::ParseCompletionCall(body, atp::kLimits), body);
  atp::CheckCall(atp::ParseChatCall(body, atp::kLimits), body);
  if (const auto call = atp::ParseTokenizeCall(body); !call.ok()) atp::CheckError(call.status());
  if (const auto call = atp::ParseDetokenizeCall(body); !call.ok()) atp::CheckError(call.status());
  return 0;
}
