#include "engine/sampler.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "engine/philox.h"

namespace atp {
namespace {

constexpr int kMaxStops =
    64;  // the configured limit (limits.max_stop_strings) and a chat template's are checked before
constexpr size_t kMaxStopBytes = 1024;
// Of logit_bias and of stop_token_ids: each answer has a copy, and goes through it for each token.
constexpr size_t kMaxListedTokens = 1024;
constexpr int kMaxAnswers = 128;

}  // namespace

void SampleRows::Clear() {
  rows_.clear();
  adjustments_.clear();
  ends_.clear();
}

LogitAdjustment* SampleRows::Adjustment(TokenId token) {
  if (token < 0 || static_cast<size_t>(token) >= places_.size()) return nullptr;
  const size_t begin = ends_.empty() ? 0 : ends_.back();
  int32_t& place = places_[static_cast<size_t>(token)];
  if (place == 0) {
    adjustments_.push_back({});
    adjustments_.back().token = token;
    place = static_cast<int32_t>(adjustments_.size() - begin);
  }
  return &adjustments_[begin + static_cast<size_t>(place) - 1];
}

SampleRow& SampleRows::NextRow() {
  if (sampled_.size() == rows_.size()) sampled_.emplace_back();
  return rows_.emplace_back();
}

void SampleRows::Draw(int row, const SampleContext& context) {
  const SamplingParams& params = *context.params;
  SampleRow& wanted = NextRow();
  wanted.row = row;
  wanted.temperature = params.temperature;
  wanted.top_k = params.top_k;
  wanted.top_p = params.top_p;
  wanted.min_p = params.min_p;
  wanted.repetition_penalty = params.repetition_penalty;
  wanted.presence_penalty = params.presence_penalty;
  wanted.frequency_penalty = params.frequency_penalty;
  wanted.uniform = UniformAt(context.seed, context.generated.size());
  wanted.top_logprobs = params.logprobs.value_or(-1);
  const auto each = [this](std::span<const TokenId> tokens, auto change) {
    for (const TokenId token : tokens) {
      if (LogitAdjustment* adjustment = Adjustment(token)) change(adjustment);
    }
  };
  for (const auto& [token, bias] : params.logit_bias) {
    if (LogitAdjustment* adjustment = Adjustment(token)) adjustment->bias += bias;
  }
  if (params.repetition_penalty != 1.0f) {
    for (const auto tokens : {context.prompt, context.generated}) {
      each(tokens, [](LogitAdjustment* adjustment) { adjustment->seen = true; });
    }
  }
  if (params.presence_penalty != 0 || params.frequency_penalty != 0) {
    each(context.generated, [](LogitAdjustment* adjustment) { ++adjustment->times; });
  }
  each(context.forbidden, [](LogitAdjustment* adjustment) { adjustment->forbidden = true; });
  for (size_t i = ends_.empty() ? 0 : ends_.back(); i < adjustments_.size(); ++i) {
    places_[static_cast<size_t>(adjustments_[i].token)] = 0;
  }
  ends_.push_back(adjustments_.size());
}

void SampleRows::Score(int row, TokenId token, int top) {
  SampleRow& wanted = NextRow();
  wanted.row = row;
  wanted.given = token;
  wanted.top_logprobs = top;
  ends_.push_back(adjustments_.size());
}

std::span<const SampleRow> SampleRows::rows() {
  size_t begin = 0;
  for (size_t i = 0; i < rows_.size(); ++i) {
    rows_[i].adjustments = {adjustments_.data() + begin, ends_[i] - begin};
    begin = ends_[i];
  }
  return rows_;
}

Sampled SampleRows::Result(size_t index) const {
  const SampledRow& row = sampled_[index];
  Sampled result;
  result.token = row.token;
  if (rows_[index].top_logprobs < 0) return result;
  result.logprob = TokenLogprob{row.token, row.logprob, {}};
  const int count =
      std::min({rows_[index].top_logprobs, kMaxTopLogprobs, static_cast<int32_t>(places_.size())});
  for (int i = 0; i < count; ++i) result.logprob->top.emplace_back(row.top_tokens[i], row.top_logprobs[i]);
  return result;
}

absl::Status ValidateSampling(const SamplingParams& params, int vocab_size) {
  const auto error = [](auto&&... parts) { return absl::InvalidArgumentError(absl::StrCat(parts...)); };
  const auto between = [&](const char* field, double value, double low, double high) -> absl::Status {
    if (value >= low && value <= high) return absl::OkStatus();  // false for NaN
    return error(field, " is ", value, "; it must be between ", low, " and ", high);
  };
  const auto token_in_range = [&](const char* field, TokenId token) -> absl::Status {
    if (token >= 0 && token < vocab_size) return absl::OkStatus();
    return error(field, " has token id ", token, "; ids of this model are 0 to ", vocab_size - 1);
  };
  const struct {
    const char* field;
    double value, low, high;
  } ranges[] = {{"temperature", params.temperature, 0, 100},
                {"min_p", params.min_p, 0, 1},
                {"presence_penalty", params.presence_penalty, -2, 2},
                {"frequency_penalty", params.frequency_penalty, -2, 2},
                {"n", static_cast<double>(params.n), 1, kMaxAnswers},
                {"logprobs", static_cast<double>(params.logprobs.value_or(0)), 0, kMaxTopLogprobs}};
  for (const auto& range : ranges) {
    if (absl::Status s = between(range.field, range.value, range.low, range.high); !s.ok()) return s;
  }
  if (!(params.top_p > 0 && params.top_p <= 1)) {
    return error("top_p is ", params.top_p, "; it must be greater than 0 and at most 1");
  }
  if (!(params.repetition_penalty > 0 && params.repetition_penalty <= 100)) {
    return error("repetition_penalty is ", params.repetition_penalty,
                 "; it must be greater than 0 and at most 100");
  }
  if (params.top_k < 0) return error("top_k is ", params.top_k, "; it must be 0 (off) or greater");
  if (params.max_tokens < 0) return error("max_tokens is ", params.max_tokens, "; it must be 0 or greater");
  if (params.min_tokens < 0 || params.min_tokens > params.max_tokens) {
    return error("min_tokens is ", params.min_tokens, "; it must be between 0 and max_tokens, which is ",
                 params.max_tokens);
  }
  const std::pair<const char*, size_t> lists[] = {{"logit_bias", params.logit_bias.size()},
                                                  {"stop_token_ids", params.stop_token_ids.size()}};
  for (const auto& [field, size] : lists) {
    if (size > kMaxListedTokens)
      return error(field, " has ", size, " tokens; at most ", kMaxListedTokens, " are allowed");
  }
  for (const auto& [token, bias] : params.logit_bias) {
    if (absl::Status s = token_in_range("logit_bias", token); !s.ok()) return s;
    if (absl::Status s = between("logit_bias", bias, -100, 100); !s.ok()) return s;
  }
  if (params.stop.size() > kMaxStops) {
    return error("stop has ", params.stop.size(), " strings; at most ", kMaxStops, " are allowed");
  }
  for (const std::string& stop : params.stop) {
    if (stop.empty() || stop.size() > kMaxStopBytes) {
      return error("stop has a string of ", stop.size(), " bytes; each must have 1 to ", kMaxStopBytes);
    }
  }
  for (TokenId token : params.stop_token_ids) {
    if (absl::Status s = token_in_range("stop_token_ids", token); !s.ok()) return s;
  }
  return absl::OkStatus();
}

}  // namespace atp
