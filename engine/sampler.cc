#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>

#include "absl/strings/str_cat.h"
#include "engine/philox.h"

namespace atp {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr int kMaxStops =
    64;  // the configured limit (limits.max_stop_strings) and a chat template's are checked before
constexpr size_t kMaxStopBytes = 1024;
constexpr int kMaxLogprobs = 20;
constexpr int kMaxAnswers = 128;

// A NaN is never chosen; +inf stays finite so that differences of logits stay numbers.
void CopySane(std::span<const float> logits, std::vector<float>* out) {
  for (size_t i = 0; i < out->size(); ++i) {
    out->at(i) = std::isnan(logits[i]) ? kNever : std::min(logits[i], std::numeric_limits<float>::max());
  }
}

// Higher logit first, the smaller id first among equals.
struct Better {
  const std::vector<float>& logits;
  bool operator()(int32_t a, int32_t b) const {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  }
};

// Calls visit(token, times) once for each distinct token; `counts` is all zero before and after.
template <typename Visit>
void ForEachDistinct(std::span<const TokenId> first, std::span<const TokenId> second,
                     std::vector<int32_t>* counts, Visit visit) {
  const auto valid = [&](TokenId t) { return t >= 0 && t < static_cast<TokenId>(counts->size()); };
  for (auto tokens : {first, second}) {
    for (TokenId t : tokens) {
      if (valid(t)) ++(*counts)[t];
    }
  }
  for (auto tokens : {first, second}) {
    for (TokenId t : tokens) {
      if (!valid(t) || (*counts)[t] == 0) continue;
      visit(t, (*counts)[t]);
      (*counts)[t] = 0;
    }
  }
}

TokenId Argmax(const std::vector<float>& logits) {
  return static_cast<TokenId>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

// exp((logit - max) / temperature) per token: 1 for the best, never overflows. In double, because the
// difference of two finite floats may not be a finite float.
void ComputeWeights(const std::vector<float>& logits, float max, float temperature,
                    std::vector<double>* weights) {
  for (size_t i = 0; i < logits.size(); ++i) {
    const double difference = static_cast<double>(logits[i]) - max;
    (*weights)[i] = difference == 0 ? 1.0 : std::exp(difference / temperature);
  }
}

// Keeps in `order`, sorted, the fewest tokens that together have `top_p` of the weight of all in `order`.
void KeepTopP(const std::vector<double>& weights, const Better& better, float top_p,
              std::vector<int32_t>* order) {
  double total = 0;
  for (int32_t t : *order) total += weights[t];
  // All tokens lighter than this together have less than 1 - top_p of the weight, so none of them is in the
  // nucleus.
  const double floor = (1.0 - top_p) * total / static_cast<double>(order->size());
  std::erase_if(*order, [&](int32_t t) { return weights[t] < floor; });
  double sum = 0;
  size_t kept = 0;
  for (size_t sorted = 0, chunk = 64; sorted < order->size(); chunk *= 4) {
    const size_t end = std::min(order->size(), sorted + chunk);
    std::partial_sort(order->begin() + sorted, order->begin() + end, order->end(), better);
    for (sorted = end; kept < end; ++kept) {
      if (sum >= top_p * total) break;
      sum += weights[(*order)[kept]];
    }
    if (kept < end) break;
  }
  order->resize(std::max<size_t>(kept, 1));
}

// The token in whose share of the total weight `uniform` falls. Never one of weight zero.
TokenId Draw(const std::vector<int32_t>& tokens, const std::vector<double>& weights, double total,
             double uniform) {
  double left = uniform * total;
  TokenId last = 0;
  for (int32_t t : tokens) {
    const double w = weights[t];
    if (w <= 0) continue;
    last = t;
    left -= w;
    if (left < 0) break;
  }
  return last;  // rounding may leave a little: then the last possible one
}

}  // namespace

Sampler::Sampler(int vocab_size)
    : scratch_(vocab_size), weights_(vocab_size), order_(vocab_size), counts_(vocab_size) {}

TokenLogprob Sampler::Logprob(std::span<const float> logits, TokenId token, int top) {
  CopySane(logits, &scratch_);
  const float max = *std::max_element(scratch_.begin(), scratch_.end());
  double sum = 0;
  for (float x : scratch_) {
    if (x != kNever) sum += std::exp(static_cast<double>(x) - max);
  }
  const double log_sum = std::log(sum);
  const auto logprob = [&](TokenId t) {
    return scratch_[t] == kNever ? kNever
                                 : static_cast<float>(static_cast<double>(scratch_[t]) - max - log_sum);
  };
  TokenLogprob result{token, logprob(token), {}};
  const size_t k = std::min<size_t>(std::max(top, 0), scratch_.size());
  if (k == 0) return result;
  order_.resize(scratch_.size());
  std::iota(order_.begin(), order_.end(), 0);
  std::partial_sort(order_.begin(), order_.begin() + k, order_.end(), Better{scratch_});
  for (size_t i = 0; i < k; ++i) result.top.emplace_back(order_[i], logprob(order_[i]));
  return result;
}

void Sampler::Adjust(const SampleContext& context) {
  const SamplingParams& params = *context.params;
  const auto valid = [&](TokenId t) { return t >= 0 && t < static_cast<TokenId>(scratch_.size()); };
  for (const auto& [token, bias] : params.logit_bias) {
    if (valid(token)) scratch_[token] = std::min(scratch_[token] + bias, std::numeric_limits<float>::max());
  }
  if (params.repetition_penalty != 1.0f) {
    ForEachDistinct(context.prompt, context.generated, &counts_, [&](TokenId t, int) {
      float& x = scratch_[t];
      x = x > 0 ? x / params.repetition_penalty : x * params.repetition_penalty;
      x = std::min(x, std::numeric_limits<float>::max());
    });
  }
  if (params.presence_penalty != 0 || params.frequency_penalty != 0) {
    ForEachDistinct(context.generated, {}, &counts_, [&](TokenId t, int times) {
      scratch_[t] -= params.presence_penalty + params.frequency_penalty * static_cast<float>(times);
    });
  }
  for (TokenId t : context.forbidden) {
    if (valid(t)) scratch_[t] = kNever;
  }
}

TokenId Sampler::Choose(const SampleContext& context) {
  const SamplingParams& params = *context.params;
  const TokenId best = Argmax(scratch_);
  if (params.temperature <= 0 || scratch_[best] == kNever) return best;
  ComputeWeights(scratch_, scratch_[best], params.temperature, &weights_);
  const double uniform = UniformAt(context.seed, context.generated.size());
  order_.resize(scratch_.size());
  std::iota(order_.begin(), order_.end(), 0);
  const Better better{scratch_};
  if (params.top_k > 0 && static_cast<size_t>(params.top_k) < order_.size()) {
    std::nth_element(order_.begin(), order_.begin() + params.top_k - 1, order_.end(), better);
    order_.resize(params.top_k);
    std::sort(order_.begin(), order_.end());  // one order of summation, whatever nth_element left
  }
  if (params.top_p < 1) KeepTopP(weights_, better, params.top_p, &order_);
  if (params.min_p > 0) {
    // The best token weighs 1, so min_p times the highest probability is min_p in weights.
    std::erase_if(order_, [&](int32_t t) { return weights_[t] < params.min_p; });
  }
  double total = 0;
  for (int32_t t : order_) total += weights_[t];
  return Draw(order_, weights_, total, uniform);
}

Sampled Sampler::Sample(std::span<const float> logits, const SampleContext& context) {
  CopySane(logits, &scratch_);
  Adjust(context);
  Sampled sampled;
  sampled.token = Choose(context);
  if (context.params->logprobs) sampled.logprob = Logprob(logits, sampled.token, *context.params->logprobs);
  return sampled;
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
                {"logprobs", static_cast<double>(params.logprobs.value_or(0)), 0, kMaxLogprobs}};
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
