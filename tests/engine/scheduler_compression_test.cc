// The scheduler with compressed history: what it takes and gives back, and when. Segments of 8 tokens, blocks
// of 4.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "tests/engine/scheduler_fixture.h"

namespace atp {
namespace {

std::shared_ptr<const CompressionPlan> Plan(double ratio = 0.5, int window = 8, int cap = 0) {
  CompressionSettings settings;
  settings.ratio = ratio;
  settings.segment_tokens = 8;
  settings.window_tokens = window;
  settings.sink_tokens = 1;
  settings.max_principal_keys = cap;
  return MakeCompressionPlan(settings, {2, 4, 2, 2, 4, KvFormat::kF32, 1, 200}).value();
}
constexpr int kQueryBlocks = 8;  // 2 layers of 4 query heads, a block each

TEST_F(SchedulerTest, ChunksEndWhereSegmentsEnd) {
  Make(Options(40));
  const RequestId a = Admit({.prompt = 30, .max_tokens = 20, .plan = Plan()});
  const RequestId exact = Admit({.prompt = 20, .max_tokens = 20});
  EXPECT_EQ(Step(), (std::map<RequestId, int>{{a, 8}, {exact, 20}}));
  EXPECT_EQ(Step()[a], 8);
  EXPECT_EQ(Step()[a], 8);
  EXPECT_EQ(Step()[a], 6);
  RunToEnd();
}

// A segment that is fitted is found whole or not at all: half of one is nothing to wait for.
TEST_F(SchedulerTest, AnswersOfOneRequestWaitForWholeSegmentsOnly) {
  Make(Options(60));
  const RequestId a = Admit({.prompt = 7, .max_tokens = 20, .n = 3, .plan = Plan()});
  EXPECT_EQ(Step()[a], 3 * 7);
  RunToEnd();
  const RequestId b = Admit({.prompt = 9, .max_tokens = 20, .n = 3, .plan = Plan()});
  EXPECT_EQ(Step()[b], 8);
  EXPECT_EQ(Step()[b], 1 + 1 + 1);
  RunToEnd();
}

TEST_F(SchedulerTest, AShortRequestIsNotTouchedByItsPlan) {
  // 16 tokens are the first segment and the window; the 17th is never computed.
  for (const bool longer : {false, true}) {
    Make(Options(40));
    Admit({.prompt = 12, .max_tokens = longer ? 6 : 5, .plan = Plan()});
    int64_t extra = 0;
    while (!scheduler_->empty()) {
      EXPECT_EQ(Step().size(), 1u);
      const SchedulerStats stats = scheduler_->stats();
      extra += stats.principal_blocks + stats.query_blocks;
    }
    EXPECT_EQ(extra > 0, longer);
    EXPECT_EQ(scheduler_->stats().segments_closed, longer ? 1u : 0u);
  }
}

TEST_F(SchedulerTest, ExactBlocksAreFreeInTheStepThatLeavesThem) {
  SchedulerOptions options = Options(40);
  options.prefix_cache = false;
  Make(options);
  Admit({.prompt = 40, .max_tokens = 20, .plan = Plan()});
  Step();  // [0, 8): closes segment 0
  EXPECT_EQ(scheduler_->stats().blocks_used, 2 * kHeads + kHeads + kQueryBlocks);
  Step();  // [8, 16): closes segment 1; token 16 sees segment 0 compressed
  EXPECT_EQ(scheduler_->stats().blocks_used, 2 * kHeads + 2 * kHeads + kQueryBlocks);
  EXPECT_EQ(scheduler_->stats().tokens_compressed, 8);
  EXPECT_EQ(scheduler_->stats().principal_entries, 4 * kHeads);
  EXPECT_EQ(scheduler_->stats().exact_entries, 8 * kHeads);
  Step();
  EXPECT_EQ(scheduler_->stats().blocks_used, 2 * kHeads + 3 * kHeads + kQueryBlocks);
  for (int i = 0; i < 2; ++i) Step();
  // 40 tokens are computed. The answer's tokens up to the 58th see 5 segments compressed, and they are
  // closed: the next one will not be, so there is nothing to keep its queries for.
  EXPECT_EQ(scheduler_->stats().segments_closed, 5u);
  EXPECT_EQ(scheduler_->stats().query_blocks, kQueryBlocks);
  for (int i = 0; i < 8; ++i) Step();
  EXPECT_EQ(scheduler_->stats().segments_closed, 6u);
  EXPECT_EQ(scheduler_->stats().query_blocks, 0);
  RunToEnd();
  EXPECT_EQ(scheduler_->stats().blocks_used, 0);
}

TEST_F(SchedulerTest, WithoutAWindowASegmentIsCompressedAtOnce) {
  SchedulerOptions options = Options(40);
  options.prefix_cache = false;
  Make(options);
  Admit({.prompt = 8, .max_tokens = 20, .plan = Plan(0.5, /*window=*/0)});
  Step();
  EXPECT_EQ(scheduler_->stats().exact_blocks, 0);
  EXPECT_EQ(scheduler_->stats().principal_blocks, kHeads);
  Step();
  EXPECT_EQ(scheduler_->stats().exact_blocks, kHeads);
  RunToEnd();
}

TEST_F(SchedulerTest, WithACapALongAnswerHoldsABoundedNumberOfBlocks) {
  SchedulerOptions options = Options(40);
  options.prefix_cache = false;
  options.max_positions = 2000;
  Make(options);
  Admit({.prompt = 20, .max_tokens = 1900, .plan = Plan(0.5, 8, /*cap=*/8)});
  int64_t early = 0, late = 0;
  for (int i = 0; i < 1900; ++i) {
    Step();
    int64_t& most = i < 100 ? early : late;
    most = std::max(most, scheduler_->stats().blocks_used);
  }
  EXPECT_LE(late, early);
  // Window, open segment and the closing one exactly; two histories of 8 entries and the new one.
  EXPECT_LE(early, 4 * kHeads + 3 * 2 * kHeads + kQueryBlocks);
}

TEST_F(SchedulerTest, CompressedRequestsFitWhereExactOnesDoNot) {
  Make(Options(20));  // 80 exact tokens
  EXPECT_FALSE(scheduler_->CheckFits(60, 60).ok());
  const auto plan = Plan(0.25, 8, /*cap=*/8);
  EXPECT_EQ(scheduler_->CheckFits(60, 60, plan.get()), absl::OkStatus());
  const RequestId a = Admit({.prompt = 60, .max_tokens = 60, .plan = plan});
  const RequestId b = Admit({.prompt = 100, .max_tokens = 90, .plan = plan});
  RunToEnd();
  EXPECT_EQ(generated_[a], 60u);
  EXPECT_EQ(generated_[b], 90u);
}

// What nobody limited gets as much as fits, and not what would fit an exact cache.
TEST_F(SchedulerTest, TheLargestFitOfACompressedRequest) {
  Make(Options(20));  // 80 exact tokens
  const auto plan = Plan(0.5, 8);
  for (const int prompt : {1, 20, 60, 75, 90}) {
    SCOPED_TRACE(prompt);
    int expected = 0;
    for (int tokens = 1; prompt + tokens <= 200; ++tokens) {
      if (scheduler_->CheckFits(prompt, tokens, plan.get()).ok()) expected = tokens;
    }
    ASSERT_GT(expected, 0);
    EXPECT_EQ(scheduler_->LargestFit(prompt, plan.get()), expected);
    EXPECT_GT(expected, 80 - prompt);
  }
}

TEST_F(SchedulerTest, ACompressedPrefixIsFoundAgain) {
  Make(Options(60));
  const auto plan = Plan();
  const Ask ask = {.prompt = 40, .max_tokens = 20, .plan = plan, .first_token = 5};
  Admit(ask);
  RunToEnd();
  const RequestId again = Admit(ask);
  EXPECT_EQ(Step()[again], 8) << "all whole segments but the last, whose last token must be computed";
  RunToEnd();
  EXPECT_EQ(cached_[again], 32);
  // Another plan, and none, share the tokens that see nothing compressed, where they can go on from there.
  const RequestId exact = Admit({.prompt = 40, .max_tokens = 20, .first_token = 5});
  RunToEnd();
  EXPECT_EQ(cached_[exact], 16);
  const RequestId other = Admit({.prompt = 40, .max_tokens = 20, .plan = Plan(0.25), .first_token = 5});
  RunToEnd();
  EXPECT_EQ(cached_[other], 0);
}

}  // namespace
}  // namespace atp
