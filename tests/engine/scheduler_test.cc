// Every rule of engine/README.md's policy by itself, on a scheduler without a model: the test plays the
// model.
#include "engine/scheduler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

namespace atp {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr int kHeads = 4;  // 2 layers of 2 kv heads
const absl::Time kNow = absl::FromUnixSeconds(1000);

SchedulerOptions Options(int groups) {
  SchedulerOptions options;
  options.max_batch_tokens = 32;
  options.max_prefill_chunk_tokens = 32;
  options.max_running_sequences = 8;
  options.max_logit_rows = 8;
  options.max_positions = 200;
  options.layers = 2;
  options.kv_heads = 2;
  options.block_tokens = 4;
  options.num_blocks = static_cast<int64_t>(groups) * kHeads;
  return options;
}

struct Ask {
  int prompt = 4;
  int max_tokens = 4;
  int priority = 0;
  int n = 1;
  absl::Time deadline = absl::InfiniteFuture();
  bool score = false;
  std::shared_ptr<const CompressionPlan> plan = nullptr;
  TokenId first_token = 0;  // requests with the same one share prefixes; 0: nobody else's
};

class SchedulerTest : public testing::Test {
 protected:
  void Make(const SchedulerOptions& options) { scheduler_ = std::make_unique<Scheduler>(options); }

  RequestId Admit(const Ask& ask) {
    const RequestId id = ++last_id_;
    auto request = std::make_shared<Request>();
    request->prompt.resize(ask.prompt);
    const TokenId first = ask.first_token != 0 ? ask.first_token : static_cast<TokenId>(1000 * id);
    std::iota(request->prompt.begin(), request->prompt.end(), first);
    request->sampling.max_tokens = ask.max_tokens;
    request->sampling.n = ask.n;
    request->priority = ask.priority;
    request->deadline = ask.deadline;
    if (ask.score) {
      request->echo_prompt = true;
      request->sampling.logprobs = 0;
    }
    for (int i = 0; i < ask.n; ++i) {
      auto sequence = std::make_unique<Sequence>(
          id, request, i, scheduler_->MaxNewTokens(ask.prompt, ask.max_tokens), nullptr, ask.plan);
      sequences_[{id, i}] = sequence.get();
      EXPECT_EQ(scheduler_->Admit(std::move(sequence)), absl::OkStatus());
    }
    return id;
  }

  // One step with a model that always answers 7. Returns rows by request, summed over its answers.
  std::map<RequestId, int> Step(absl::Time now = kNow) {
    const Batch& batch = scheduler_->Schedule(now);
    EXPECT_EQ(scheduler_->CheckInvariants(), absl::OkStatus());
    std::map<RequestId, int> rows;
    for (const BatchEntry& entry : batch.entries) rows[entry.sequence->id()] += entry.rows;
    rows_ = batch.rows();
    logit_rows_ = static_cast<int>(batch.logit_rows.size());
    scheduler_->Commit(batch, std::vector<TokenId>(batch.entries.size(), 7));
    for (const BatchEntry& entry : batch.entries) {
      Sequence* s = entry.sequence;
      if (s->generated().size() >= static_cast<size_t>(s->max_new_tokens()) && !s->generated().empty()) {
        scheduler_->Finish(s, FinishReason::kLength);
      }
    }
    for (auto& s : scheduler_->TakeFinished()) {
      ended_.push_back({s->id(), s->finish_reason()});
      generated_[s->id()] += s->generated().size();
      cached_[s->id()] = s->cached_tokens();
      sequences_.erase({s->id(), s->index()});
    }
    EXPECT_EQ(scheduler_->CheckInvariants(), absl::OkStatus());
    return rows;
  }
  void RunToEnd(int limit = 2000) {
    for (int i = 0; i < limit && !scheduler_->empty(); ++i) Step();
    EXPECT_TRUE(scheduler_->empty());
  }
  const Sequence& At(RequestId id, int index = 0) const { return *sequences_.at({id, index}); }
  bool Running(RequestId id) const { return At(id).state() == SequenceState::kRunning; }

  std::unique_ptr<Scheduler> scheduler_;
  RequestId last_id_ = 0;
  std::map<std::pair<RequestId, int>, Sequence*> sequences_;
  std::vector<std::pair<RequestId, FinishReason>> ended_;
  std::map<RequestId, size_t> generated_;
  std::map<RequestId, int> cached_;
  int rows_ = 0;
  int logit_rows_ = 0;
};

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

// ---- with compressed history: segments of 8 tokens, blocks of 4 ----

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
