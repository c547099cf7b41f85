// Every rule of engine/README.md's policy by itself.
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

using testing::ElementsAre;
using testing::HasSubstr;

TEST_F(SchedulerTest, RunsARequestToItsEnd) {
  Make(Options(20));
  const RequestId a = Admit({.prompt = 6, .max_tokens = 3});
  const Batch& batch = scheduler_->Schedule(kNow);
  ASSERT_EQ(batch.entries.size(), 1u);
  EXPECT_EQ(batch.rows(), 6);
  EXPECT_THAT(batch.positions, ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(batch.tokens, ElementsAre(1000, 1001, 1002, 1003, 1004, 1005));
  EXPECT_THAT(batch.logit_rows, ElementsAre(5));
  EXPECT_EQ(batch.entries[0].exact_entries, 6);
  EXPECT_EQ(batch.entries[0].table->exact_blocks(), 2);
  const TokenId token = 7;
  scheduler_->Commit(batch, {&token, 1});
  const Batch& decode = scheduler_->Schedule(kNow);
  EXPECT_THAT(decode.tokens, ElementsAre(7));
  EXPECT_THAT(decode.positions, ElementsAre(6));
  EXPECT_EQ(decode.entries[0].exact_entries, 7);
  scheduler_->Commit(decode, {&token, 1});
  RunToEnd();
  EXPECT_THAT(ended_, ElementsAre(std::pair(a, FinishReason::kLength)));
  EXPECT_EQ(generated_[a], 3u);
  EXPECT_EQ(scheduler_->stats().blocks_used, 0);
}

TEST_F(SchedulerTest, PromptsRunInChunksBehindDecodes) {
  Make(Options(40));
  const RequestId a = Admit({.prompt = 4, .max_tokens = 50});
  Step();
  const RequestId b = Admit({.prompt = 70, .max_tokens = 2});
  EXPECT_EQ(Step(), (std::map<RequestId, int>{{a, 1}, {b, 31}}));
  EXPECT_EQ(Step(), (std::map<RequestId, int>{{a, 1}, {b, 31}}));
  EXPECT_EQ(logit_rows_, 1);  // none for a chunk in mid-prompt
  EXPECT_EQ(Step(), (std::map<RequestId, int>{{a, 1}, {b, 8}}));
  EXPECT_EQ(logit_rows_, 2);
  EXPECT_EQ(Step(), (std::map<RequestId, int>{{a, 1}, {b, 1}}));
}

TEST_F(SchedulerTest, ChunkLimitLeavesRoomForTheNextPrompt) {
  SchedulerOptions options = Options(40);
  options.max_prefill_chunk_tokens = 20;
  Make(options);
  const RequestId a = Admit({.prompt = 30});
  const RequestId b = Admit({.prompt = 30});
  EXPECT_EQ(Step(), (std::map<RequestId, int>{{a, 20}, {b, 12}}));
}

TEST_F(SchedulerTest, FirstComeFirstServedInsideAClass) {
  Make(Options(12));
  const RequestId a = Admit({.prompt = 20, .max_tokens = 8});
  Step();
  const RequestId big = Admit({.prompt = 30, .max_tokens = 8});
  const RequestId small = Admit({.prompt = 4, .max_tokens = 1});
  EXPECT_EQ(Step(), (std::map<RequestId, int>{{a, 1}}));  // small would fit, but big came first
  RunToEnd();
  std::vector<RequestId> order;
  for (const auto& [id, reason] : ended_) order.push_back(id);
  EXPECT_EQ(order.front(), a);
  EXPECT_EQ(ended_.size(), 3u);
  EXPECT_EQ(generated_[big], 8u);
  EXPECT_EQ(generated_[small], 1u);
}

TEST_F(SchedulerTest, HigherClassGoesFirst) {
  SchedulerOptions options = Options(40);
  options.max_running_sequences = 1;
  Make(options);
  const RequestId low = Admit({.priority = -1});
  const RequestId middle = Admit({.priority = 0});
  const RequestId high = Admit({.priority = 5});
  RunToEnd();
  EXPECT_THAT(ended_,
              ElementsAre(std::pair(high, FinishReason::kLength), std::pair(middle, FinishReason::kLength),
                          std::pair(low, FinishReason::kLength)));
}

TEST_F(SchedulerTest, HigherClassTakesThePlaceOfALowerOne) {
  SchedulerOptions options = Options(40);
  options.max_running_sequences = 2;
  Make(options);
  const RequestId a = Admit({.max_tokens = 20});
  const RequestId b = Admit({.max_tokens = 20});
  Step();
  const RequestId high = Admit({.priority = 1});
  Step();
  EXPECT_TRUE(Running(high));
  EXPECT_TRUE(Running(a));
  EXPECT_FALSE(Running(b));                 // the youngest of the lowest class
  EXPECT_EQ(At(b).generated().size(), 1u);  // its tokens are kept
  EXPECT_EQ(scheduler_->stats().preemptions, 1u);
  RunToEnd();
  EXPECT_EQ(generated_[b], 20u);
}

TEST_F(SchedulerTest, HigherClassTakesBlocksOfLowerOnes) {
  Make(Options(8));
  const RequestId low = Admit({.prompt = 16, .max_tokens = 8});
  Step();
  const RequestId high = Admit({.prompt = 20, .max_tokens = 8, .priority = 1});
  Step();
  EXPECT_TRUE(Running(high));
  EXPECT_FALSE(Running(low));
  RunToEnd();
  EXPECT_EQ(generated_[low], 8u);
  EXPECT_EQ(ended_.front().first, high);
}

TEST_F(SchedulerTest, LowerClassNeverTakesFromAHigherOne) {
  Make(Options(8));
  const RequestId high = Admit({.prompt = 12, .max_tokens = 16, .priority = 1});
  Step();
  const RequestId low = Admit({.prompt = 8, .max_tokens = 16});
  while (sequences_.contains({high, 0})) {
    Step();
    if (!sequences_.contains({high, 0})) break;
    EXPECT_TRUE(Running(high));
  }
  RunToEnd();
  EXPECT_EQ(generated_[low], 16u);
}

TEST_F(SchedulerTest, NothingIsPreemptedInVain) {
  Make(Options(12));
  const RequestId high = Admit({.prompt = 24, .max_tokens = 16, .priority = 1});
  const RequestId low = Admit({.prompt = 4, .max_tokens = 12});
  Step();
  Step();
  ASSERT_TRUE(Running(low));
  Admit({.prompt = 30, .max_tokens = 1, .priority = 1});  // would not fit even without `low`
  Step();
  EXPECT_TRUE(Running(low));
  EXPECT_TRUE(Running(high));
  EXPECT_EQ(scheduler_->stats().preemptions, 0u);
}

TEST_F(SchedulerTest, YoungestIsPreemptedWhenBlocksRunOut) {
  SchedulerOptions options = Options(9);
  options.prefix_cache = false;
  Make(options);
  const RequestId a = Admit({.prompt = 8, .max_tokens = 20});
  const RequestId b = Admit({.prompt = 8, .max_tokens = 20});
  while (scheduler_->stats().preemptions == 0) Step();
  EXPECT_TRUE(Running(a));
  EXPECT_FALSE(Running(b));
  const size_t kept = At(b).generated().size();
  EXPECT_GT(kept, 0u);
  EXPECT_EQ(At(b).position(), 0);
  EXPECT_TRUE(At(b).groups().empty());
  RunToEnd();
  EXPECT_THAT(ended_, ElementsAre(std::pair(a, FinishReason::kLength), std::pair(b, FinishReason::kLength)));
  EXPECT_EQ(generated_[b], 20u);
}

TEST_F(SchedulerTest, PreemptedGoesBeforeThoseThatNeverRan) {
  SchedulerOptions options = Options(9);
  options.prefix_cache = false;
  Make(options);
  Admit({.prompt = 8, .max_tokens = 20});
  const RequestId b = Admit({.prompt = 8, .max_tokens = 20});
  Step();
  const RequestId c = Admit({.prompt = 4, .max_tokens = 24});
  RunToEnd();
  EXPECT_GT(scheduler_->stats().preemptions, 0u);
  const auto place = [this](RequestId id) {
    return std::find_if(ended_.begin(), ended_.end(), [id](const auto& e) { return e.first == id; });
  };
  EXPECT_LT(place(b), place(c));
}

TEST_F(SchedulerTest, RecomputesPromptAndGeneratedTokensInOneGo) {
  SchedulerOptions options = Options(40);
  options.max_running_sequences = 1;
  options.prefix_cache = false;
  Make(options);
  const RequestId low = Admit({.prompt = 6, .max_tokens = 10});
  for (int i = 0; i < 5; ++i) Step();
  Admit({.prompt = 4, .max_tokens = 1, .priority = 1});
  Step();
  EXPECT_EQ(Step(), (std::map<RequestId, int>{{low, 11}}));
  EXPECT_EQ(At(low).generated().size(), 6u);
}

TEST_F(SchedulerTest, SharedPrefixIsComputedOnce) {
  Make(Options(40));
  const RequestId a = Admit({.prompt = 12, .first_token = 50});
  RunToEnd();
  EXPECT_EQ(cached_[a], 0);
  const RequestId b = Admit({.prompt = 12, .first_token = 50});
  // At most all but one token: the last block is computed for its logits.
  EXPECT_EQ(Step(), (std::map<RequestId, int>{{b, 4}}));
  RunToEnd();
  EXPECT_EQ(cached_[b], 8);
  const RequestId c = Admit({.prompt = 13, .first_token = 50});
  EXPECT_EQ(Step(), (std::map<RequestId, int>{{c, 1}}));
  RunToEnd();
  EXPECT_EQ(cached_[c], 12);
  EXPECT_EQ(scheduler_->stats().prefix_hits_tokens, 20u);
  EXPECT_EQ(scheduler_->stats().prefix_queries_tokens, 37u);
}

TEST_F(SchedulerTest, GeneratedTokensAreFoundAgainToo) {
  Make(Options(40));
  Admit({.prompt = 5, .max_tokens = 8, .first_token = 50});
  RunToEnd();
  auto request = std::make_shared<Request>();
  request->prompt = {50, 51, 52, 53, 54, 7, 7, 7, 7, 7};  // a conversation that goes on
  scheduler_->Admit(std::make_unique<Sequence>(99, request, 0, 4, nullptr)).IgnoreError();
  EXPECT_EQ(Step(), (std::map<RequestId, int>{{99, 2}}));
}

TEST_F(SchedulerTest, PrefixCacheOff) {
  SchedulerOptions options = Options(40);
  options.prefix_cache = false;
  Make(options);
  Admit({.prompt = 12, .first_token = 50});
  RunToEnd();
  EXPECT_EQ(scheduler_->stats().blocks_cached, 0);
  const RequestId b = Admit({.prompt = 12, .first_token = 50});
  EXPECT_EQ(Step(), (std::map<RequestId, int>{{b, 12}}));
}

TEST_F(SchedulerTest, CacheGivesWayToSequences) {
  Make(Options(10));
  for (int i = 0; i < 10; ++i) {
    Admit({.prompt = 30, .max_tokens = 8});
    RunToEnd();
  }
  EXPECT_EQ(scheduler_->stats().preemptions, 0u);
  EXPECT_GT(scheduler_->stats().blocks_cached, 0);
}

TEST_F(SchedulerTest, AnswersOfOneRequestShareItsPrompt) {
  Make(Options(20));
  const RequestId a = Admit({.prompt = 17, .max_tokens = 4, .n = 3});
  EXPECT_EQ(Step(), (std::map<RequestId, int>{{a, 17}}));  // the first computes the prompt, the others wait
  EXPECT_EQ(Step(), (std::map<RequestId, int>{{a, 1 + 1 + 1}}));  // and compute its last token only
  EXPECT_EQ(scheduler_->stats().blocks_used, (4 + 3) * kHeads);
  RunToEnd();
  EXPECT_EQ(generated_[a], 12u);
}

TEST_F(SchedulerTest, PromptScoresTakeRowsOfLogits) {
  Make(Options(40));
  const RequestId a = Admit({.max_tokens = 40});
  Step();
  const RequestId b = Admit({.prompt = 16, .max_tokens = 2, .score = true});
  EXPECT_EQ(Step(), (std::map<RequestId, int>{{a, 1}, {b, 7}}));
  EXPECT_EQ(logit_rows_, 8);
  EXPECT_EQ(Step(), (std::map<RequestId, int>{{a, 1}, {b, 7}}));
  EXPECT_EQ(Step(), (std::map<RequestId, int>{{a, 1}, {b, 2}}));
  EXPECT_EQ(logit_rows_, 3);
  EXPECT_EQ(At(b).scored_tokens(), 16);
  EXPECT_EQ(Step(), (std::map<RequestId, int>{{a, 1}, {b, 1}}));
  RunToEnd();
}

TEST_F(SchedulerTest, PromptScoresSkipTheCacheAndAreNotAskedTwice) {
  SchedulerOptions options = Options(40);
  options.max_running_sequences = 1;
  Make(options);
  Admit({.prompt = 16, .first_token = 50});
  RunToEnd();
  const RequestId b = Admit({.prompt = 16, .max_tokens = 9, .score = true, .first_token = 50});
  EXPECT_EQ(Step(), (std::map<RequestId, int>{{b, 8}}));
  EXPECT_EQ(At(b).cached_tokens(), 0);
  const RequestId high = Admit({.prompt = 4, .max_tokens = 1, .priority = 1});
  EXPECT_EQ(Step(), (std::map<RequestId, int>{{high, 4}}));
  // 8 rows are scored: they are computed again, without logits, and 8 more with.
  EXPECT_EQ(Step(), (std::map<RequestId, int>{{b, 16}}));
  EXPECT_EQ(logit_rows_, 8);
  RunToEnd();
}

TEST_F(SchedulerTest, NoMoreSequencesThanRowsOfLogits) {
  SchedulerOptions options = Options(100);
  options.max_running_sequences = 50;
  options.max_logit_rows = 5;
  Make(options);
  EXPECT_EQ(scheduler_->max_running_sequences(), 5);
  for (int i = 0; i < 9; ++i) Admit({.max_tokens = 10});
  Step();
  Step();
  EXPECT_EQ(scheduler_->stats().running, 5);
  EXPECT_EQ(scheduler_->stats().waiting, 4);
  EXPECT_LE(logit_rows_, 5);
  RunToEnd();
}

TEST_F(SchedulerTest, DeadlinesEndInAnyState) {
  SchedulerOptions options = Options(40);
  options.max_running_sequences = 1;
  Make(options);
  const RequestId running = Admit({.max_tokens = 50, .deadline = kNow + absl::Seconds(2)});
  const RequestId waiting = Admit({.max_tokens = 50, .deadline = kNow + absl::Seconds(1)});
  const RequestId patient = Admit({.max_tokens = 50});
  Step();
  EXPECT_TRUE(ended_.empty());
  Step(kNow + absl::Seconds(1));
  EXPECT_THAT(ended_, ElementsAre(std::pair(waiting, FinishReason::kDeadline)));
  const auto rows = Step(kNow + absl::Seconds(2));
  EXPECT_EQ(ended_.back(), std::pair(running, FinishReason::kDeadline));
  EXPECT_EQ(rows, (std::map<RequestId, int>{{patient, 4}}));  // in the same step the next one has the place
}

TEST_F(SchedulerTest, CancelFreesAtOnceInAnyState) {
  SchedulerOptions options = Options(40);
  options.max_running_sequences = 2;
  options.prefix_cache = false;
  Make(options);
  const RequestId a = Admit({.prompt = 50, .max_tokens = 50});
  const RequestId b = Admit({.max_tokens = 50, .n = 3});
  Step();
  Step();
  scheduler_->Cancel(12345);  // nobody
  scheduler_->Cancel(a);      // in mid-prompt or decode
  scheduler_->Cancel(b);      // some running, some waiting
  EXPECT_TRUE(scheduler_->empty());
  EXPECT_EQ(scheduler_->stats().blocks_used, 0);
  EXPECT_EQ(scheduler_->CheckInvariants(), absl::OkStatus());
  EXPECT_EQ(scheduler_->TakeFinished().size(), 4u);
  EXPECT_TRUE(scheduler_->Schedule(kNow).empty());
}

TEST_F(SchedulerTest, RefusesWhatCouldNeverFitWithTheNumbers) {
  Make(Options(10));  // 40 tokens, 200 positions
  EXPECT_EQ(scheduler_->CheckFits(30, 10), absl::OkStatus());
  const absl::Status too_much = scheduler_->CheckFits(30, 11);
  EXPECT_EQ(too_much.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(too_much.message()), HasSubstr("30 tokens and 11 new tokens need 44 KV blocks"));
  EXPECT_THAT(std::string(too_much.message()), HasSubstr("40 (40 tokens)"));
  EXPECT_THAT(std::string(too_much.message()), HasSubstr("kv_cache.memory_bytes"));
  const absl::Status too_long = scheduler_->CheckFits(200, 1);
  EXPECT_EQ(too_long.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(too_long.message()), HasSubstr("200 positions"));
  EXPECT_THAT(std::string(too_long.message()), HasSubstr("at most 199"));
  EXPECT_EQ(scheduler_->MaxNewTokens(190, 100), 10);
  EXPECT_EQ(scheduler_->LargestFit(30), 10);
  EXPECT_EQ(scheduler_->LargestFit(39), 1);
  EXPECT_EQ(scheduler_->LargestFit(60), 140) << "none fits: what the positions leave";

  auto request = std::make_shared<Request>();
  request->prompt.resize(41);
  EXPECT_FALSE(scheduler_->Admit(std::make_unique<Sequence>(1, request, 0, 1, nullptr)).ok());
  EXPECT_FALSE(
      scheduler_->Admit(std::make_unique<Sequence>(2, std::make_shared<Request>(), 0, 1, nullptr)).ok());
  EXPECT_TRUE(scheduler_->empty());
}

TEST_F(SchedulerTest, LargestRequestThatFitsRunsAloneToItsEnd) {
  Make(Options(10));
  const RequestId small = Admit({.prompt = 4, .max_tokens = 30});
  const RequestId large = Admit({.prompt = 30, .max_tokens = 10});
  RunToEnd();
  EXPECT_EQ(generated_[small], 30u);
  EXPECT_EQ(generated_[large], 10u);
}

TEST_F(SchedulerTest, OldestOfTheHighestClassGetsRowsInEveryStep) {
  SchedulerOptions options = Options(12);
  options.max_batch_tokens = 3;
  options.max_running_sequences = 3;
  Make(options);
  for (int i = 0; i < 3; ++i) Admit({.prompt = 4, .max_tokens = 20});
  for (int i = 0; i < 8; ++i) Step();
  const RequestId high = Admit({.prompt = 20, .max_tokens = 10, .priority = 9});
  Step();  // makes its place
  while (sequences_.contains({high, 0})) EXPECT_GT(Step()[high], 0);
  RunToEnd();
}

TEST_F(SchedulerTest, CheckInvariantsSeesALeak) {
  Make(Options(10));
  Admit({.prompt = 8, .max_tokens = 10});
  scheduler_->Schedule(kNow);
  EXPECT_EQ(scheduler_->CheckInvariants(), absl::OkStatus());
  {
    const BlockGroup leaked = sequences_.begin()->second->groups()[0].Share();
    EXPECT_FALSE(scheduler_->CheckInvariants().ok());
  }
  EXPECT_EQ(scheduler_->CheckInvariants(), absl::OkStatus());
}

}  // namespace
}  // namespace atp
