#include "server/grpc_convert.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "atp/v1/inference.pb.h"

namespace atp {
namespace {

SamplingParams SamplingFromProto(const v1::SamplingParams& in, SamplingParams out) {
  if (in.has_temperature()) out.temperature = in.temperature();
  if (in.has_top_k()) out.top_k = in.top_k();
  if (in.has_top_p()) out.top_p = in.top_p();
  if (in.has_min_p()) out.min_p = in.min_p();
  if (in.has_repetition_penalty()) out.repetition_penalty = in.repetition_penalty();
  if (in.has_presence_penalty()) out.presence_penalty = in.presence_penalty();
  if (in.has_frequency_penalty()) out.frequency_penalty = in.frequency_penalty();
  for (const auto& [token, bias] : in.logit_bias()) out.logit_bias.emplace_back(token, bias);
  if (in.has_seed()) out.seed = in.seed();
  out.stop.assign(in.stop().begin(), in.stop().end());
  out.include_stop_in_output = in.include_stop_in_output();
  out.stop_token_ids.assign(in.stop_token_ids().begin(), in.stop_token_ids().end());
  if (in.has_max_tokens()) out.max_tokens = in.max_tokens();
  out.min_tokens = in.min_tokens();
  out.ignore_eos = in.ignore_eos();
  if (in.has_n()) out.n = in.n();
  if (in.has_logprobs()) out.logprobs = in.logprobs();
  return out;
}

CompressionOverride CompressionFromProto(const v1::Compression& in) {
  CompressionOverride out;
  if (in.budget_case() == v1::Compression::kPreset) out.preset = in.preset();
  if (in.budget_case() == v1::Compression::kRatio) out.ratio = in.ratio();
  if (in.has_bits()) out.bits = in.bits();
  return out;
}

void FillLogprob(const TokenLogprob& in, const Tokenizer& tokenizer, v1::TokenLogprob* out) {
  out->set_token(in.token);
  out->set_logprob(in.logprob);
  out->set_text(tokenizer.TokenBytes(in.token, /*keep_special=*/true));
  for (const auto& [token, logprob] : in.top) {
    v1::TopLogprob* top = out->add_top();
    top->set_token(token);
    top->set_logprob(logprob);
    top->set_text(tokenizer.TokenBytes(token, /*keep_special=*/true));
  }
}

}  // namespace

absl::StatusOr<GenerateInput> FromProto(const v1::GenerateRequest& request, const SamplingParams& defaults) {
  GenerateInput input;
  switch (request.input_case()) {
    case v1::GenerateRequest::kPrompt:
      input.prompt = request.prompt();
      break;
    case v1::GenerateRequest::kPromptTokens:
      input.prompt =
          std::vector<TokenId>(request.prompt_tokens().ids().begin(), request.prompt_tokens().ids().end());
      break;
    case v1::GenerateRequest::kChat: {
      std::vector<ChatMessage> messages;
      for (const v1::ChatMessage& in : request.chat().messages()) {
        ChatMessage message;
        message.role = in.role();
        message.content = in.content();
        messages.push_back(std::move(message));
      }
      input.prompt = std::move(messages);
      break;
    }
    case v1::GenerateRequest::INPUT_NOT_SET:
      return absl::InvalidArgumentError("prompt: one of prompt, prompt_tokens and chat must be set");
  }
  input.model = request.model();
  input.sampling = SamplingFromProto(request.sampling(), defaults);
  input.max_tokens_given = request.sampling().has_max_tokens();
  input.echo = request.sampling().echo();
  input.priority = request.priority();
  if (request.has_atp()) input.compression = CompressionFromProto(request.atp());
  return input;
}

size_t AppendDelta(const OutputDelta& delta, const Tokenizer& tokenizer, v1::Choice* choice) {
  size_t bytes = delta.text.size() + delta.tokens.size() * sizeof(TokenId);
  choice->mutable_text()->append(delta.text);
  choice->mutable_tokens()->Add(delta.tokens.begin(), delta.tokens.end());
  for (const TokenLogprob& logprob : delta.logprobs) {
    v1::TokenLogprob* out = choice->add_logprobs();
    FillLogprob(logprob, tokenizer, out);
    bytes += out->ByteSizeLong();
  }
  return bytes;
}

absl::Status ApplyFinish(const OutputFinish& finish, v1::Choice* choice) {
  auto message = [&finish](const char* otherwise) {
    return finish.message.empty() ? std::string(otherwise) : finish.message;
  };
  switch (finish.reason) {
    case FinishReason::kStop:
      choice->set_finish_reason(v1::FINISH_REASON_STOP);
      choice->set_matched_stop(finish.matched_stop);
      return absl::OkStatus();
    case FinishReason::kLength:
      choice->set_finish_reason(v1::FINISH_REASON_LENGTH);
      return absl::OkStatus();
    case FinishReason::kDeadline:
      return absl::DeadlineExceededError(
          message("the request's deadline passed before the answer was whole"));
    case FinishReason::kCancelled:
      return absl::CancelledError(message("the request was cancelled"));
    case FinishReason::kShutdown:
      return absl::UnavailableError(
          message("the server stopped before the answer was whole; try another one"));
    case FinishReason::kError:
      return absl::InternalError(message("the engine failed"));
  }
  return absl::InternalError(absl::StrCat("unknown finish reason ", static_cast<int>(finish.reason)));
}

void AddUsage(const OutputFinish& finish, v1::Usage* usage) {
  usage->set_prompt_tokens(finish.usage.prompt_tokens);
  usage->set_completion_tokens(usage->completion_tokens() + finish.usage.completion_tokens);
  if (finish.index == 0) usage->set_cached_tokens(finish.usage.cached_tokens);
  const CompressionUsage& atp = finish.usage.atp;
  if (atp.preset.empty()) return;
  v1::CompressionUsage* const sum = usage->mutable_atp();
  sum->set_preset(atp.preset);
  sum->set_ratio(atp.ratio);
  sum->set_bits(atp.bits);
  sum->set_tokens(sum->tokens() + atp.tokens);
  sum->set_compressed_tokens(sum->compressed_tokens() + atp.compressed_tokens);
  sum->set_entries(sum->entries() + atp.entries);
  sum->set_kv_bytes(sum->kv_bytes() + atp.kv_bytes);
  sum->set_exact_kv_bytes(sum->exact_kv_bytes() + atp.exact_kv_bytes);
}

void FillModelInfo(const ServedModel& model, v1::ModelInfo* info) {
  info->set_id(model.id);
  info->set_max_context_tokens(model.max_context_tokens);
  info->set_vocab_size(model.vocab_size);
}

}  // namespace atp
