#include "kernels/sample_tokens.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numeric>
#include <span>

namespace atp {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

// A NaN is never chosen; +inf stays finite so that differences of logits stay numbers.
float Sane(float logit) { return std::isnan(logit) ? kNever : std::min(logit, kLargest); }

// Higher logit first, the smaller id first among equals.
template <class Logit>
auto Better(const Logit& logit) {
  return [&logit](int32_t a, int32_t b) { return logit(a) != logit(b) ? logit(a) > logit(b) : a < b; };
}

void Adjust(const SampleRow& row, std::vector<float>* logits) {
  for (const LogitAdjustment& adjustment : row.adjustments) {
    float& x = (*logits)[static_cast<size_t>(adjustment.token)];
    x = std::min(x + adjustment.bias, kLargest);
    if (adjustment.seen) {
      x = x > 0 ? x / row.repetition_penalty : x * row.repetition_penalty;
      x = std::min(x, kLargest);
    }
    if (adjustment.times > 0) {
      x -= row.presence_penalty + row.frequency_penalty * static_cast<float>(adjustment.times);
    }
    if (adjustment.forbidden) x = kNever;
  }
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

// Keeps in `order` the fewest tokens that together have `top_p` of the weight of all in `order`.
template <class Compare>
void KeepTopP(const std::vector<double>& weights, const Compare& better, float top_p,
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
int32_t Draw(const std::vector<int32_t>& tokens, const std::vector<double>& weights, double uniform) {
  double total = 0;
  for (int32_t t : tokens) total += weights[t];
  double left = uniform * total;
  int32_t last = 0;
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

void TokenSampler::Sample(const SampleTokensArgs& args) {
  const auto vocab = static_cast<size_t>(args.vocab);
  logits_.resize(vocab);
  weights_.resize(vocab);
  for (size_t i = 0; i < args.rows.size(); ++i) {
    const SampleRow& row = args.rows[i];
    const float* logits = args.logits + static_cast<size_t>(row.row) * vocab;
    SampledRow& out = args.out[i];
    out.token = row.given;
    if (row.given < 0) {
      std::transform(logits, logits + vocab, logits_.begin(), Sane);
      Adjust(row, &logits_);
      out.token = Choose(row);
    }
    if (row.top_logprobs >= 0) Score(logits, row.top_logprobs, &out);
  }
}

int32_t TokenSampler::Choose(const SampleRow& row) {
  const auto best = static_cast<int32_t>(std::max_element(logits_.begin(), logits_.end()) - logits_.begin());
  const float max = logits_[static_cast<size_t>(best)];
  if (row.temperature <= 0 || max == kNever) return best;
  ComputeWeights(logits_, max, row.temperature, &weights_);
  order_.resize(logits_.size());
  std::iota(order_.begin(), order_.end(), 0);
  const auto logit = [this](int32_t t) { return logits_[static_cast<size_t>(t)]; };
  const auto better = Better(logit);
  if (row.top_k > 0 && static_cast<size_t>(row.top_k) < order_.size()) {
    std::nth_element(order_.begin(), order_.begin() + row.top_k - 1, order_.end(), better);
    order_.resize(static_cast<size_t>(row.top_k));
    std::sort(order_.begin(), order_.end());  // one order of summation, whatever nth_element left
  }
  if (row.top_p < 1) {
    KeepTopP(weights_, better, row.top_p, &order_);
    std::sort(order_.begin(), order_.end());
  }
  if (row.min_p > 0) {
    // The best token weighs 1, so min_p times the highest probability is min_p in weights.
    std::erase_if(order_, [&](int32_t t) { return weights_[t] < row.min_p; });
  }
  return Draw(order_, weights_, row.uniform);
}

void TokenSampler::Score(const float* logits, int count, SampledRow* out) const {
  const auto logit = [&](int32_t t) { return Sane(logits[t]); };
  const auto vocab = static_cast<int32_t>(logits_.size());
  float max = kNever;
  for (int32_t t = 0; t < vocab; ++t) max = std::max(max, logit(t));
  double sum = 0;
  for (int32_t t = 0; t < vocab; ++t) {
    if (logit(t) != kNever) sum += std::exp(static_cast<double>(logit(t)) - max);
  }
  const double log_sum = std::log(sum);
  const auto logprob = [&](int32_t t) {
    return logit(t) == kNever ? kNever : static_cast<float>(static_cast<double>(logit(t)) - max - log_sum);
  };
  out->logprob = logprob(out->token);
  const auto k = static_cast<std::ptrdiff_t>(std::min({count, kMaxTopLogprobs, vocab}));
  if (k == 0) return;
  ranks_.resize(static_cast<size_t>(vocab));
  std::iota(ranks_.begin(), ranks_.end(), 0);
  std::partial_sort(ranks_.begin(), ranks_.begin() + k, ranks_.end(), Better(logit));
  for (std::ptrdiff_t i = 0; i < k; ++i) {
    out->top_tokens[i] = ranks_[static_cast<size_t>(i)];
    out->top_logprobs[i] = logprob(ranks_[static_cast<size_t>(i)]);
  }
}

}  // namespace atp
