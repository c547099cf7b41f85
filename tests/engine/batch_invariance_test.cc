// The central promise: a request with a seed gives the same tokens and log probabilities, bit for bit,
// whatever else runs and however the scheduler cuts and repeats the work.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "tests/engine/default_model_engine.h"

namespace atp {
namespace {

class BatchInvarianceTest : public BatchingEngineTest {
 protected:
  Answer Alone(int max_tokens = 40) {
    std::unique_ptr<BatchingEngine> engine = Make(Options());
    return Submit(engine.get(), Sampled(kStory, max_tokens, 7))->WaitOne();
  }
};

TEST_F(BatchInvarianceTest, InABatchOfSixteen) {
  const Answer alone = Alone();
  EXPECT_EQ(alone.tokens.size(), 40u);
  EXPECT_EQ(alone.logprobs.size(), 40u);
  std::unique_ptr<BatchingEngine> engine = Make(Options());
  ExpectSame(alone, AmongSixteen(engine.get(), Sampled(kStory, 40, 7)));
  ExpectNothingLeft(engine.get());
}

TEST_F(BatchInvarianceTest, AfterPreemption) {
  const Answer alone = Alone();
  BatchingEngineOptions options = Options(160);  // room for one and a half of them
  options.prefix_cache = false;                  // so that all is computed again
  std::unique_ptr<BatchingEngine> engine = Make(options);
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (int i = 0; i < 4; ++i) sinks.push_back(Submit(engine.get(), Sampled(kStory, 40, 7)));
  for (auto& sink : sinks) ExpectSame(alone, sink->WaitOne());
  EXPECT_GT(engine->Stats().preemptions_total, 0u);
}

TEST_F(BatchInvarianceTest, AfterAHigherClassTookItsPlace) {
  ExpectSameAfterAHigherClass(Alone(300), Options(), Sampled(kStory, 300, 7));
}

TEST_F(BatchInvarianceTest, AfterRunningOutOfBlocks) {
  BatchingEngineOptions options = Options(96);
  options.prefix_cache = false;
  std::unique_ptr<BatchingEngine> engine = Make(options);
  const Answer first = Submit(engine.get(), Sampled("Once upon a time", 70, 3))->WaitOne();
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (int i = 0; i < 6; ++i) sinks.push_back(Submit(engine.get(), Sampled("Once upon a time", 70, 3)));
  for (auto& sink : sinks) ExpectSame(first, sink->WaitOne());
  EXPECT_GE(engine->Stats().preemptions_total, 1u);
  ExpectNothingLeft(engine.get());
}

TEST_F(BatchInvarianceTest, WithAPrefixCacheHit) {
  const Answer alone = Alone();
  std::unique_ptr<BatchingEngine> engine = Make(Options());
  ExpectSame(alone, Submit(engine.get(), Sampled(kStory, 40, 7))->WaitOne());
  const Answer again = Submit(engine.get(), Sampled(kStory, 40, 7))->WaitOne();
  EXPECT_GE(again.finish.usage.cached_tokens, 32);
  EXPECT_EQ(again.finish.usage.cached_tokens % 16, 0);
  EXPECT_LT(again.finish.usage.cached_tokens, again.finish.usage.prompt_tokens);
  ExpectSame(alone, again);
  EXPECT_GE(engine->Stats().prefix_cache_hits_tokens_total, 32u);
}

TEST_F(BatchInvarianceTest, WithAnyChunks) {
  const Answer alone = Alone();
  for (int chunk : {1, 3, 16, 23}) {
    BatchingEngineOptions options = Options();
    options.max_prefill_chunk_tokens = chunk;
    options.max_batch_tokens = 24;
    std::unique_ptr<BatchingEngine> engine = Make(options);
    auto other = Submit(engine.get(), Sampled("Another one runs beside it", 60, 2));
    ExpectSame(alone, Submit(engine.get(), Sampled(kStory, 40, 7))->WaitOne());
    other->Wait();
  }
}

}  // namespace
}  // namespace atp
