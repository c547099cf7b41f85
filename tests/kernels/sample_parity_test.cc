// SampleTokens on every backend: the same tokens as on the host, whatever is asked for.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/kernels/op_parity.h"

namespace atp {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Ask {
  SampleRow row;
  std::vector<LogitAdjustment> adjustments;
};

class SampleParity : public OpParity {
 protected:
  // Rows of `logits` are asked for as `asks` say, in one call and one by one: the same answers.
  void Check(const std::vector<float>& logits, int64_t vocab, std::vector<Ask> asks) {
    std::vector<SampleRow> rows;
    for (const Ask& ask : asks) {
      rows.push_back(ask.row);
      rows.back().adjustments = ask.adjustments;
    }
    std::vector<SampledRow> actual(rows.size()), expected(rows.size());
    actual_->SampleTokens({logits.data(), vocab, rows, actual});
    ASSERT_TRUE(actual_->Synchronize().ok());
    reference_->SampleTokens({logits.data(), vocab, rows, expected});
    for (size_t i = 0; i < rows.size(); ++i) {
      const SampleRow& row = rows[i];
      const std::string where = "vocab " + std::to_string(vocab) + " row " + std::to_string(i) + " T " +
                                std::to_string(row.temperature) + " top_k " + std::to_string(row.top_k) +
                                " top_p " + std::to_string(row.top_p) + " min_p " + std::to_string(row.min_p);
      ASSERT_EQ(actual[i].token, expected[i].token) << where;
      if (row.top_logprobs < 0) continue;
      // Sums of doubles in another order, once rounded to fp32.
      const auto near = [&](float a, float b) {
        if (std::isinf(b)) return a == b;
        return std::abs(static_cast<double>(a) - b) <= std::abs(b) * 0x1p-23;
      };
      EXPECT_TRUE(near(actual[i].logprob, expected[i].logprob))
          << where << ": " << actual[i].logprob << ", expected " << expected[i].logprob;
      for (int j = 0; j < std::min<int64_t>(row.top_logprobs, vocab); ++j) {
        EXPECT_EQ(actual[i].top_tokens[j], expected[i].top_tokens[j]) << where << " rank " << j;
        EXPECT_TRUE(near(actual[i].top_logprobs[j], expected[i].top_logprobs[j])) << where << " rank " << j;
      }
      SampledRow alone;
      actual_->SampleTokens({logits.data(), vocab, {&row, 1}, {&alone, 1}});
      ASSERT_TRUE(actual_->Synchronize().ok());
      EXPECT_EQ(alone.token, actual[i].token) << where;
      EXPECT_EQ(alone.logprob, actual[i].logprob) << where;
    }
  }

  double Uniform() { return std::uniform_real_distribution<double>()(random_); }

  std::vector<Ask> Asks(int rows, int64_t vocab) {
    std::vector<Ask> asks;
    const auto add = [&](auto change) {
      Ask& ask = asks.emplace_back();
      ask.row.row = UniformInt(random_, 0, rows - 1);
      ask.row.uniform = Uniform();
      change(ask);
    };
    add([](Ask& a) { a.row.temperature = 0; });
    add([](Ask&) {});
    for (const double u : {0.0, 0x1.fffffffffffffp-1}) add([u](Ask& a) { a.row.uniform = u; });
    for (const float t : {0.3f, 1.7f, 100.0f}) add([t](Ask& a) { a.row.temperature = t; });
    for (const int k : {1, 2, 40, 100000}) add([k](Ask& a) { a.row.top_k = k; });
    for (const float p : {1e-6f, 0.5f, 0.9f, 0.9999f}) add([p](Ask& a) { a.row.top_p = p; });
    for (const float p : {0.01f, 0.5f, 1.0f}) add([p](Ask& a) { a.row.min_p = p; });
    add([](Ask& a) { a.row.top_k = 30, a.row.top_p = 0.8f, a.row.min_p = 0.05f, a.row.temperature = 1.3f; });
    for (const int n : {0, 1, 20}) add([n](Ask& a) { a.row.top_logprobs = n; });
    add([&](Ask& a) {
      a.row.given = UniformInt(random_, 0, static_cast<int>(vocab) - 1);
      a.row.top_logprobs = 5;
    });
    for (int i = 0; i < 4; ++i) {
      add([&](Ask& a) {
        a.row.repetition_penalty = 1.3f, a.row.presence_penalty = 0.7f, a.row.frequency_penalty = -0.4f;
        a.row.top_logprobs = 3;
        a.row.temperature = i == 0 ? 0.0f : 1.0f;
        a.row.top_p = i == 1 ? 0.9f : 1.0f;
        for (int32_t t = 0; t < vocab; t += UniformInt(random_, 1, 5)) {
          a.adjustments.push_back({t, UniformInt(random_, 0, 1) * 1.5f, UniformInt(random_, 0, 1) == 0,
                                   UniformInt(random_, 0, 3), UniformInt(random_, 0, 5) == 0});
        }
      });
    }
    return asks;
  }
};

TEST_P(SampleParity, TheSameTokens) {
  for (const int64_t vocab : {1, 2, 31, 257, 3001}) {
    std::vector<float> logits = Normals(random_, static_cast<size_t>(3 * vocab));
    for (float& x : logits) x *= 3;
    Check(logits, vocab, Asks(3, vocab));
    ASSERT_FALSE(HasFatalFailure());
  }
}

// Equal logits, also at every cut: the smaller id is the better.
TEST_P(SampleParity, TiesAreTheSmallerIds) {
  for (const int levels : {1, 3, 20}) {
    std::vector<float> logits(2 * 700);
    for (float& x : logits) x = static_cast<float>(UniformInt(random_, 1, levels)) - 2.0f;
    for (float& x : logits) x = x == 0 && UniformInt(random_, 0, 1) == 0 ? -0.0f : x;
    Check(logits, 700, Asks(2, 700));
    ASSERT_FALSE(HasFatalFailure());
  }
}

TEST_P(SampleParity, WhatIsNoNumberIsNeverDrawn) {
  std::vector<float> logits = Normals(random_, 3 * 600);
  for (size_t i = 0; i < logits.size(); ++i) {
    const float odd[] = {std::nanf(""), -kInf, -std::numeric_limits<float>::max(), 1e-40f};
    if (UniformInt(random_, 0, 1) == 0) logits[i] = odd[UniformInt(random_, 0, 3)];
    if (i >= 1200) logits[i] = UniformInt(random_, 0, 1) == 0 ? std::nanf("") : -kInf;  // nothing is there
  }
  logits[700] = kInf;
  Check(logits, 600, Asks(3, 600));
}

INSTANTIATE_TEST_SUITE_P(EveryBackend, SampleParity, ::testing::ValuesIn(TestBackendNames()),
                         [](const auto& name) { return name.param; });

}  // namespace
}  // namespace atp
