#include "engine/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "engine/philox.h"
#include "kernels/sample_tokens.h"

namespace atp {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// One row at a time, on the host.
class Sampler {
 public:
  explicit Sampler(int vocab_size) : rows_(vocab_size) {}
  Sampled Sample(const std::vector<float>& logits, const SampleContext& context) {
    rows_.Clear();
    rows_.Draw(0, context);
    return Run(logits);
  }
  TokenLogprob Logprob(const std::vector<float>& logits, TokenId token, int top) {
    rows_.Clear();
    rows_.Score(0, token, top);
    return *Run(logits).logprob;
  }

 private:
  Sampled Run(const std::vector<float>& logits) {
    const std::span<const SampleRow> rows = rows_.rows();
    sampler_.Sample({logits.data(), static_cast<int64_t>(logits.size()), rows, rows_.sampled()});
    return rows_.Result(0);
  }

  SampleRows rows_;
  TokenSampler sampler_;
};

// Known answers of Random123 (kat_vectors, philox4x32-10).
TEST(Philox, KnownAnswers) {
  using Words = std::array<uint32_t, 4>;
  EXPECT_EQ(Philox4x32({0, 0, 0, 0}, {0, 0}), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(Philox4x32({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(Philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

// The distribution that the parameters ask for, step by step in doubles, without any of the sampler's
// shortcuts.
std::vector<double> Oracle(const std::vector<float>& logits, const SampleContext& context) {
  const SamplingParams& p = *context.params;
  std::vector<double> x(logits.begin(), logits.end());
  for (double& v : x) {
    if (std::isnan(v)) v = -kInf;
  }
  for (const auto& [token, bias] : p.logit_bias) x[token] += bias;
  std::set<TokenId> seen(context.prompt.begin(), context.prompt.end());
  seen.insert(context.generated.begin(), context.generated.end());
  for (TokenId t : seen) x[t] = x[t] > 0 ? x[t] / p.repetition_penalty : x[t] * p.repetition_penalty;
  for (TokenId t : std::set<TokenId>(context.generated.begin(), context.generated.end())) {
    x[t] -= p.presence_penalty;
    x[t] -= p.frequency_penalty *
            static_cast<double>(std::count(context.generated.begin(), context.generated.end(), t));
  }
  for (TokenId t : context.forbidden) x[t] = -kInf;
  std::vector<int> order(x.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return x[a] > x[b]; });
  std::vector<double> result(x.size(), 0.0);
  if (p.temperature == 0) {
    result[order[0]] = 1;
    return result;
  }
  if (p.top_k > 0) order.resize(std::min<size_t>(order.size(), p.top_k));
  const auto weight = [&](int t) { return std::exp((x[t] - x[order[0]]) / p.temperature); };
  double total = 0;
  for (int t : order) total += weight(t);
  double before = 0;
  for (int t : order) {
    const bool in_nucleus = before < p.top_p * total;
    before += weight(t);
    if (in_nucleus && weight(t) >= p.min_p) result[t] = weight(t);
  }
  const double sum = std::accumulate(result.begin(), result.end(), 0.0);
  for (double& r : result) r /= sum;
  return result;
}

std::vector<float> RandomLogits(int n, uint32_t seed, float scale = 2.0f) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> logits(n);
  for (float& x : logits) x = normal(random);
  return logits;
}

// Draws many times and compares with the oracle by a chi-square test at about five standard deviations.
void ExpectDistribution(const std::vector<float>& logits, SampleContext context) {
  constexpr int kDraws = 20000;
  const std::vector<double> expected = Oracle(logits, context);
  Sampler sampler(static_cast<int>(logits.size()));
  std::vector<int> counts(logits.size());
  for (int i = 0; i < kDraws; ++i) {
    context.seed = 1000 + i;
    ++counts[sampler.Sample(logits, context).token];
  }
  double chi2 = 0, rest_expected = 0, rest_seen = 0;
  int cells = 0;
  for (size_t t = 0; t < logits.size(); ++t) {
    if (expected[t] == 0) {
      ASSERT_EQ(counts[t], 0) << "token " << t << " is excluded";
      continue;
    }
    const double e = expected[t] * kDraws;
    if (e < 8) {  // too few for the approximation: together
      rest_expected += e;
      rest_seen += counts[t];
      continue;
    }
    chi2 += (counts[t] - e) * (counts[t] - e) / e;
    ++cells;
  }
  if (rest_expected > 0) {
    chi2 += (rest_seen - rest_expected) * (rest_seen - rest_expected) / std::max(rest_expected, 1.0);
    ++cells;
  }
  const double freedom = std::max(cells - 1, 1);
  EXPECT_LT(chi2, freedom + 5 * std::sqrt(2 * freedom) + 5);
}

TEST(Sampler, EachParameterGivesItsDistribution) {
  const std::vector<float> logits = RandomLogits(60, 1);
  const std::vector<TokenId> prompt = {1, 2, 2, 30}, generated = {4, 4, 4, 5, 1}, forbidden = {7, 8};
  const auto check = [&](auto&& change) {
    SamplingParams params;
    change(params);
    SampleContext context;
    context.params = &params;
    context.prompt = prompt;
    context.generated = generated;
    context.forbidden = forbidden;
    ExpectDistribution(logits, context);
  };
  check([](SamplingParams&) {});
  check([](SamplingParams& p) { p.temperature = 0; });
  check([](SamplingParams& p) { p.temperature = 0.3f; });
  check([](SamplingParams& p) { p.temperature = 5; });
  check([](SamplingParams& p) { p.top_k = 1; });
  check([](SamplingParams& p) { p.top_k = 7; });
  check([](SamplingParams& p) { p.top_k = 1000; });
  check([](SamplingParams& p) { p.top_p = 0.5f; });
  check([](SamplingParams& p) { p.top_p = 0.001f; });
  check([](SamplingParams& p) { p.min_p = 0.2f; });
  check([](SamplingParams& p) { p.min_p = 1; });
  check([](SamplingParams& p) { p.repetition_penalty = 1.7f; });
  check([](SamplingParams& p) { p.presence_penalty = 1.5f; });
  check([](SamplingParams& p) { p.frequency_penalty = -1; });
  check([](SamplingParams& p) { p.logit_bias = {{3, 5.0f}, {9, -100.0f}}; });
  check([](SamplingParams& p) {
    p.temperature = 1.4f;
    p.top_k = 30;
    p.top_p = 0.9f;
    p.min_p = 0.05f;
    p.repetition_penalty = 1.2f;
    p.presence_penalty = 0.5f;
    p.frequency_penalty = 0.3f;
    p.logit_bias = {{20, 2.0f}};
  });
}

// top_p sorts in chunks and drops the tail early; neither may change which tokens are in the nucleus.
TEST(Sampler, NucleusOfLargeVocabularies) {
  for (float scale : {0.0f, 0.1f, 1.0f, 8.0f}) {
    const std::vector<float> logits = RandomLogits(2000, 9, scale);
    for (float top_p : {0.1f, 0.7f, 0.999f}) {
      SamplingParams params;
      params.top_p = top_p;
      SampleContext context;
      context.params = &params;
      const std::vector<double> expected = Oracle(logits, context);
      Sampler sampler(2000);
      std::set<TokenId> seen;
      for (int i = 0; i < 1000; ++i) {
        context.seed = i;
        const TokenId token = sampler.Sample(logits, context).token;
        ASSERT_GT(expected[token], 0) << "scale " << scale << ", top_p " << top_p;
        seen.insert(token);
      }
      // At least half of the tokens that are expected 5 times or more came up.
      int likely = 0, missed = 0;
      for (int t = 0; t < 2000; ++t) {
        if (expected[t] * 1000 < 5) continue;
        ++likely;
        missed += !seen.count(t);
      }
      EXPECT_LE(missed * 20, likely);
    }
  }
}

TEST(Sampler, TiesBreakTowardTheSmallerId) {
  SamplingParams params;
  SampleContext context;
  context.params = &params;
  const std::vector<float> logits = {0, 3, 3, 3, 1};
  Sampler sampler(5);
  params.temperature = 0;
  EXPECT_EQ(sampler.Sample(logits, context).token, 1);
  params.temperature = 1;
  params.top_k = 2;
  std::set<TokenId> seen;
  for (int i = 0; i < 200; ++i) {
    context.seed = i;
    seen.insert(sampler.Sample(logits, context).token);
  }
  EXPECT_EQ(seen, (std::set<TokenId>{1, 2}));
}

TEST(Sampler, ADrawIsAFunctionOfSeedAndPosition) {
  const std::vector<float> logits = RandomLogits(100, 4, 0.5f);
  SamplingParams params;
  std::vector<TokenId> generated;
  std::vector<TokenId> first;
  for (int round = 0; round < 2; ++round) {
    Sampler sampler(100);
    generated.clear();
    for (int t = 0; t < 50; ++t) {
      SampleContext context;
      context.params = &params;
      context.seed = 42;
      context.generated = generated;
      // A draw for another sequence in between changes nothing.
      SampleContext other = context;
      other.seed = static_cast<uint64_t>(round * 1000 + t);
      sampler.Sample(logits, other);
      generated.push_back(sampler.Sample(logits, context).token);
    }
    if (round == 0) first = generated;
  }
  EXPECT_EQ(first, generated);
  EXPECT_GT(std::set<TokenId>(first.begin(), first.end()).size(), 20u);
}

TEST(Sampler, NeverChoosesNanOrMinusInfinity) {
  const std::vector<float> logits = {kNan, -kInf, 1, kNan, 0, -kInf};
  Sampler sampler(6);
  for (float temperature : {0.0f, 1e-30f, 1.0f, 100.0f}) {
    for (float top_p : {1.0f, 0.9f, 1e-6f}) {
      for (int top_k : {0, 1, 4}) {
        SamplingParams params;
        params.temperature = temperature;
        params.top_p = top_p;
        params.top_k = top_k;
        params.logprobs = 6;
        SampleContext context;
        context.params = &params;
        for (int i = 0; i < 50; ++i) {
          context.seed = i;
          const Sampled sampled = sampler.Sample(logits, context);
          ASSERT_TRUE(sampled.token == 2 || sampled.token == 4);
          ASSERT_FALSE(std::isnan(sampled.logprob->logprob));
          for (const auto& [token, logprob] : sampled.logprob->top) ASSERT_FALSE(std::isnan(logprob));
        }
      }
    }
  }
}

TEST(Sampler, ExtremesStayNumbers) {
  const float huge = std::numeric_limits<float>::max();
  SamplingParams params;
  params.logprobs = 2;
  SampleContext context;
  context.params = &params;
  Sampler sampler(3);
  EXPECT_EQ(sampler.Sample(std::vector<float>{-huge, huge, 0}, context).token, 1);
  EXPECT_EQ(sampler.Sample(std::vector<float>{0, kInf, huge}, context).token == 0, false);
  params.logit_bias = {{1, 100}};
  EXPECT_EQ(sampler.Sample(std::vector<float>{-huge, huge, 0}, context).token, 1);
  params.logit_bias.clear();
  const Sampled nothing = sampler.Sample(std::vector<float>{kNan, -kInf, kNan}, context);
  EXPECT_EQ(nothing.token, 0);
  EXPECT_EQ(nothing.logprob->logprob, -kInf);
  // Ids outside the vocabulary, as a prompt of another model would have, are ignored.
  const std::vector<TokenId> outside = {-5, 3, 1 << 30};
  params.repetition_penalty = 2;
  params.frequency_penalty = 1;
  context.prompt = context.generated = context.forbidden = outside;
  EXPECT_EQ(sampler.Sample(std::vector<float>{0, 50, 0}, context).token, 1);
}

TEST(Sampler, LogprobsAreOfTheRawLogits) {
  const std::vector<float> logits = RandomLogits(50, 8);
  SamplingParams params;
  params.temperature = 0.1f;
  params.logit_bias = {{17, 100.0f}};
  params.logprobs = 4;
  SampleContext context;
  context.params = &params;
  Sampler sampler(50);
  const Sampled sampled = sampler.Sample(logits, context);
  ASSERT_EQ(sampled.token, 17);
  double sum = 0;
  for (float x : logits) sum += std::exp(static_cast<double>(x));
  ASSERT_TRUE(sampled.logprob.has_value());
  EXPECT_NEAR(sampled.logprob->logprob, logits[17] - std::log(sum), 1e-5);
  ASSERT_EQ(sampled.logprob->top.size(), 4u);
  std::vector<int> order(50);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(sampled.logprob->top[i].first, order[i]);
    EXPECT_NEAR(sampled.logprob->top[i].second, logits[order[i]] - std::log(sum), 1e-5);
  }
  EXPECT_EQ(sampler.Logprob(logits, 3, 100).top.size(), static_cast<size_t>(kMaxTopLogprobs));
  EXPECT_EQ(Sampler(5).Logprob(RandomLogits(5, 9), 3, kMaxTopLogprobs).top.size(), 5u);
  EXPECT_TRUE(sampler.Logprob(logits, 3, 0).top.empty());
}

TEST(ValidateSampling, NamesTheField) {
  const auto message = [](auto&& change) {
    SamplingParams params;
    change(params);
    const absl::Status status = ValidateSampling(params, 100);
    return status.ok() ? std::string("ok") : std::string(status.message());
  };
  EXPECT_EQ(message([](SamplingParams&) {}), "ok");
  const std::map<std::string, std::vector<std::function<void(SamplingParams&)>>> bad = {
      {"temperature",
       {[](auto& p) { p.temperature = -0.1f; }, [](auto& p) { p.temperature = kNan; },
        [](auto& p) { p.temperature = kInf; }}},
      {"top_k", {[](auto& p) { p.top_k = -1; }}},
      {"top_p",
       {[](auto& p) { p.top_p = 0; }, [](auto& p) { p.top_p = 1.01f; }, [](auto& p) { p.top_p = kNan; }}},
      {"min_p", {[](auto& p) { p.min_p = -0.1f; }, [](auto& p) { p.min_p = 1.1f; }}},
      {"repetition_penalty",
       {[](auto& p) { p.repetition_penalty = 0; }, [](auto& p) { p.repetition_penalty = kNan; }}},
      {"presence_penalty", {[](auto& p) { p.presence_penalty = 2.1f; }}},
      {"frequency_penalty", {[](auto& p) { p.frequency_penalty = -2.1f; }}},
      {"logit_bias",
       {[](auto& p) {
          p.logit_bias = {{100, 0.0f}};
        },
        [](auto& p) {
          p.logit_bias = {{-1, 0.0f}};
        },
        [](auto& p) {
          p.logit_bias = {{1, 101.0f}};
        },
        [](auto& p) {
          p.logit_bias = {{1, kNan}};
        },
        [](auto& p) {
          p.logit_bias.assign(1025, {1, 0.0f});
        }}},
      {"stop",
       {[](auto& p) { p.stop = {""}; }, [](auto& p) { p.stop.assign(65, "x"); },
        [](auto& p) { p.stop = {std::string(2000, 'x')}; }}},
      {"stop_token_ids",
       {[](auto& p) { p.stop_token_ids = {100}; }, [](auto& p) { p.stop_token_ids.assign(1025, 1); }}},
      {"max_tokens", {[](auto& p) { p.max_tokens = -1; }}},
      {"min_tokens", {[](auto& p) { p.min_tokens = -1; }, [](auto& p) { p.min_tokens = 17; }}},
      {"n", {[](auto& p) { p.n = 0; }, [](auto& p) { p.n = 1000; }}},
      {"logprobs", {[](auto& p) { p.logprobs = 21; }, [](auto& p) { p.logprobs = -1; }}}};
  for (const auto& [field, changes] : bad) {
    for (const auto& change : changes)
      EXPECT_EQ(message(change).rfind(field + " ", 0), 0u) << message(change);
  }
}

}  // namespace
}  // namespace atp
