// Requests that choose their own compression, side by side in one engine: each gives the same tokens and log
// probabilities, bit for bit, as it does alone.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "tests/engine/default_model_engine.h"

namespace atp {
namespace {

using testing::HasSubstr;

constexpr int kSegment = 32;
constexpr int kAnswer = 70;
constexpr int kUntouched = 2 * kSegment;  // a window and a segment

CompressionOverride Ratio(double ratio, int bits) {
  CompressionOverride override;
  override.ratio = ratio;
  override.bits = bits;
  return override;
}

class OverrideEngineTest : public BatchingEngineTest {
 protected:
  static CompressionSettings Settings(double ratio, int bits) {
    CompressionSettings settings;
    settings.ratio = ratio;
    settings.bits = bits;
    settings.segment_tokens = settings.window_tokens = kSegment;
    return settings;
  }
  // An exact engine that takes overrides.
  static BatchingEngineOptions Exact(int kv_tokens = 8192) {
    BatchingEngineOptions options = Options(kv_tokens);
    options.override_settings = [](const CompressionOverride& o) -> absl::StatusOr<CompressionSettings> {
      return o.preset ? CompressionSettings() : Settings(*o.ratio, *o.bits);
    };
    return options;
  }
  // One that compresses by itself.
  static BatchingEngineOptions Compressed() {
    BatchingEngineOptions options = Exact();
    options.compression = Settings(0.5, 4);
    return options;
  }
  static Request Question(const std::optional<CompressionOverride>& compression) {
    Request request = Sampled(std::string(kStory) + kStory + kStory, kAnswer, 7);
    request.compression = compression;
    return request;
  }
  static std::vector<std::optional<CompressionOverride>> Kinds() {
    CompressionOverride exact;
    exact.preset = "exact";
    return {std::nullopt, exact, Ratio(0.5, 8), Ratio(0.25, 4), Ratio(0.125, 4)};
  }
  static bool Same(const Answer& a, const Answer& b) {
    if (a.tokens != b.tokens) return false;
    for (size_t i = 0; i < a.logprobs.size(); ++i)
      if (!SameBits(a.logprobs[i].logprob, b.logprobs[i].logprob)) return false;
    return true;
  }
};

TEST_F(OverrideEngineTest, SideBySideAsAlone) {
  for (const BatchingEngineOptions& options : {Exact(), Compressed()}) {
    std::vector<Answer> alone;
    for (const auto& kind : Kinds()) {
      std::unique_ptr<BatchingEngine> engine = Make(options);
      alone.push_back(Submit(engine.get(), Question(kind))->WaitOne());
      ASSERT_EQ(alone.back().tokens.size(), static_cast<size_t>(kAnswer));
    }
    for (size_t i = 2; i < alone.size(); ++i) EXPECT_FALSE(Same(alone[i], alone[i - 1])) << i;
    EXPECT_EQ(Same(alone[0], alone[1]), options.compression.bits == 16) << "the default, and exact";
    for (const bool prefix_cache : {false, true}) {
      BatchingEngineOptions together = options;
      together.prefix_cache = prefix_cache;
      std::unique_ptr<BatchingEngine> engine = Make(together);
      std::vector<std::shared_ptr<RecordingSink>> sinks;
      for (const auto& kind : Kinds()) sinks.push_back(Submit(engine.get(), Question(kind)));
      for (size_t i = 0; i < sinks.size(); ++i) ExpectSame(alone[i], sinks[i]->WaitOne());
      ExpectNothingLeft(engine.get());
    }
  }
}

TEST_F(OverrideEngineTest, MaxNewTokensAreThoseOfTheRequestsCompression) {
  const std::unique_ptr<BatchingEngine> exact = Make(Exact(/*kv_tokens=*/512));
  EXPECT_EQ(exact->MaxNewTokens(100, std::nullopt), 412);
  EXPECT_EQ(exact->MaxNewTokens(100, Kinds()[1]), 412);
  Request request = Question(Ratio(0.25, 8));
  const int prompt = static_cast<int>(request.prompt.size());
  const int most = exact->MaxNewTokens(prompt, request.compression);
  ASSERT_GT(most, 512 - prompt);
  ASSERT_LT(prompt + most, exact->max_context_tokens());
  request.sampling.max_tokens = most + 1;
  EXPECT_FALSE(exact->Submit(request, std::make_shared<RecordingSink>()).ok());
  request.sampling.max_tokens = most;
  EXPECT_TRUE(exact->Submit(request, std::make_shared<RecordingSink>()).ok());
}

TEST_F(OverrideEngineTest, ThePrefixCacheIsSharedByEqualPlansOnly) {
  std::unique_ptr<BatchingEngine> engine = Make(Exact());
  const std::vector<std::optional<CompressionOverride>> kinds = {Kinds()[2], Kinds()[3], Kinds()[1]};
  std::vector<Answer> first;
  for (const auto& kind : kinds) first.push_back(Submit(engine.get(), Question(kind))->WaitOne());
  EXPECT_EQ(first[0].finish.usage.cached_tokens, 0);
  EXPECT_EQ(first[1].finish.usage.cached_tokens, 0) << "nobody has its principal entries";
  // What sees nothing compressed is everybody's; behind it, others' blocks are of no use.
  EXPECT_EQ(first[2].finish.usage.cached_tokens, kUntouched);
  for (size_t i = 0; i < kinds.size(); ++i) {
    const Answer again = Submit(engine.get(), Question(kinds[i]))->WaitOne();
    EXPECT_GT(again.finish.usage.cached_tokens, kUntouched);
    ExpectSame(first[i], again);
  }
  ExpectSame(first[2], Submit(engine.get(), Question(std::nullopt))->WaitOne());
}

TEST_F(OverrideEngineTest, AfterPreemption) {
  const auto ask = [](int i) {
    Request request = Sampled(std::string("The boat number ") + char('1' + i), 180, i);
    request.compression = Kinds()[i % Kinds().size()];
    return request;
  };
  std::unique_ptr<BatchingEngine> large = Make(Exact());
  std::vector<Answer> alone;
  for (int i = 0; i < 6; ++i) alone.push_back(Submit(large.get(), ask(i))->WaitOne());
  for (const bool prefix_cache : {false, true}) {
    BatchingEngineOptions options = Exact(320);
    options.prefix_cache = prefix_cache;
    std::unique_ptr<BatchingEngine> engine = Make(options);
    std::vector<std::shared_ptr<RecordingSink>> sinks;
    for (int i = 0; i < 6; ++i) sinks.push_back(Submit(engine.get(), ask(i)));
    for (int i = 0; i < 6; ++i) ExpectSame(alone[i], sinks[i]->WaitOne());
    EXPECT_GT(engine->Stats().preemptions_total, 0u);
    ExpectNothingLeft(engine.get());
  }
}

TEST_F(OverrideEngineTest, BeingAllowedCostsAnExactEngineNothing) {
  const std::unique_ptr<BatchingEngine> engine = Make(Exact()), strict = Make(Options(8192));
  EXPECT_EQ(engine->Stats().kv_block_bytes, strict->Stats().kv_block_bytes);
  EXPECT_EQ(engine->Stats().kv_blocks_total, strict->Stats().kv_blocks_total);
  Submit(engine.get(), Question(std::nullopt))->WaitOne();
  EXPECT_EQ(engine->Stats().segments_compressed_total, 0u);
  Submit(engine.get(), Question(Ratio(0.25, 4)))->WaitOne();
  EXPECT_GT(engine->Stats().segments_compressed_total, 0u);
}

TEST_F(OverrideEngineTest, AdmissionCountsWithTheRequestsOwnPlan) {
  std::unique_ptr<BatchingEngine> engine = Make(Exact(256));
  Request request = Ask(std::string(kStory) + kStory, 200);
  auto sink = std::make_shared<RecordingSink>(1);
  const absl::Status refused = engine->Submit(request, sink).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("KV blocks"));
  request.compression = Ratio(1.0 / 16, 4);
  EXPECT_EQ(Submit(engine.get(), request)->WaitOne().tokens.size(), 200u);
}

TEST_F(OverrideEngineTest, WhatCannotBeIsRefused) {
  const auto error = [](BatchingEngine* engine, const CompressionOverride& override) {
    const absl::Status s = engine->Submit(Question(override), std::make_shared<RecordingSink>(1)).status();
    EXPECT_EQ(s.code(), absl::StatusCode::kInvalidArgument);
    return std::string(s.message());
  };
  EXPECT_THAT(error(Make(Options()).get(), Ratio(0.5, 4)), HasSubstr("atp.allow_override"));
  std::unique_ptr<BatchingEngine> engine = Make(Exact());
  EXPECT_THAT(error(engine.get(), Ratio(2, 4)), HasSubstr("atp.ratio: "));
  EXPECT_THAT(error(engine.get(), Ratio(0.5, 16)), HasSubstr("atp.bits: "));
  engine = Make(Compressed());  // its blocks have the room
  Submit(engine.get(), Question(Ratio(0.5, 16)))->WaitOne();
  EXPECT_GT(engine->Stats().segments_compressed_total, 0u);
}

}  // namespace
}  // namespace atp
