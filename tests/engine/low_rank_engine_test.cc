// Prompts whose linear layers take low-rank inputs: the same tokens, bit for bit, however a request is
// scheduled. The layers are named by the options, not by the cost model.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/low_rank.h"
#include "tests/engine/default_model_engine.h"

namespace atp {
namespace {

constexpr int kSegment = 32;
constexpr int kAnswer = 70;

// With the history exact, and compressed as well.
class LowRankEngineTest : public BatchingEngineTest, public testing::WithParamInterface<double> {
 protected:
  static BatchingEngineOptions LowRank(int kv_tokens = 8192) {
    BatchingEngineOptions options = Options(kv_tokens);
    options.max_running_sequences = 16;
    options.compression.ratio = GetParam();
    options.compression.segment_tokens = kSegment;
    options.compression.window_tokens = kSegment;
    options.compression.linear_rank = 0.5;
    options.compression.linear_layers = kAllLinearLayers;
    return options;
  }
  static std::string Prompt(const std::string& beginning = "") {
    return beginning + kStory + kStory + kStory;
  }
  static Request Question(uint64_t seed = 7) { return Sampled(Prompt(), kAnswer, seed); }
  static const Answer& Alone() {
    static std::map<double, Answer> answers;
    Answer& answer = answers[GetParam()];
    if (answer.tokens.empty()) answer = Submit(Make(LowRank()).get(), Question())->WaitOne();
    return answer;
  }
};
INSTANTIATE_TEST_SUITE_P(Ratios, LowRankEngineTest, testing::Values(1.0, 0.25));

TEST_P(LowRankEngineTest, IsUsedAndChangesTheAnswer) {
  BatchingEngineOptions options = LowRank();
  options.compression.linear_rank = 1;
  std::unique_ptr<BatchingEngine> engine = Make(options);
  const Answer exact = Submit(engine.get(), Question())->WaitOne();
  ASSERT_FALSE(exact.logprobs.empty());
  EXPECT_FALSE(SameBits(exact.logprobs[0].logprob, Alone().logprobs[0].logprob));
  // Prompts shorter than a segment are exact.
  engine = Make(LowRank());
  Request request = Question();
  request.prompt.resize(kSegment - 1);
  const Answer low = Submit(engine.get(), request)->WaitOne();
  ExpectSame(Submit(Make(options).get(), request)->WaitOne(), low);
}

// Its logits begin the answer.
TEST_P(LowRankEngineTest, TheSegmentOfThePromptsLastTokenIsExact) {
  BatchingEngineOptions exact = LowRank();
  exact.compression.linear_rank = 1;
  Request request = Question();
  request.prompt.resize(kSegment);
  ExpectSame(Submit(Make(exact).get(), request)->WaitOne(),
             Submit(Make(LowRank()).get(), request)->WaitOne());
  request = Question();
  request.prompt.resize(kSegment + 1);
  EXPECT_FALSE(SameBits(Submit(Make(exact).get(), request)->WaitOne().logprobs[0].logprob,
                        Submit(Make(LowRank()).get(), request)->WaitOne().logprobs[0].logprob));
}

// A row of a low-rank segment has seen those behind it, so its log probability would be none.
TEST_P(LowRankEngineTest, APromptThatIsScoredIsExact) {
  BatchingEngineOptions exact = LowRank();
  exact.compression.linear_rank = 1;
  Request request = Question();
  request.echo_prompt = true;
  ExpectSame(Submit(Make(exact).get(), request)->WaitOne(),
             Submit(Make(LowRank()).get(), request)->WaitOne());
}

TEST_P(LowRankEngineTest, InABatchAndWithFewTokensPerStep) {
  for (const int tokens : {kSegment + 15, 100, 256}) {
    BatchingEngineOptions options = LowRank();
    options.max_batch_tokens = tokens;
    std::unique_ptr<BatchingEngine> engine = Make(options);
    ExpectSame(Alone(), AmongSixteen(engine.get(), Question()));
    ExpectNothingLeft(engine.get());
  }
}

TEST_P(LowRankEngineTest, InChunksOfAnySizeThatHoldsASegment) {
  for (const int chunk : {kSegment, kSegment + 13, 200}) {
    BatchingEngineOptions options = LowRank();
    options.max_prefill_chunk_tokens = chunk;
    ExpectSame(Alone(), Submit(Make(options).get(), Question())->WaitOne());
  }
}

TEST_P(LowRankEngineTest, IsLeftOutWhereAStepHasNoRoomForASegment) {
  BatchingEngineOptions exact = LowRank();
  exact.compression.linear_rank = 1;
  const Answer expected = Submit(Make(exact).get(), Question())->WaitOne();
  for (const bool chunk : {false, true}) {
    BatchingEngineOptions options = LowRank();
    (chunk ? options.max_prefill_chunk_tokens : options.max_batch_tokens) =
        chunk ? kSegment - 1 : kSegment + 14;
    ExpectSame(expected, Submit(Make(options).get(), Question())->WaitOne());
  }
}

// What was generated one token at a time is computed again exactly, whole segments of it too.
TEST_P(LowRankEngineTest, AfterPreemption) { ExpectSameAfterAHigherClass(Alone(), LowRank(), Question()); }

TEST_P(LowRankEngineTest, FromThePrefixCache) {
  std::unique_ptr<BatchingEngine> engine = Make(LowRank());
  ExpectSame(Alone(), Submit(engine.get(), Question())->WaitOne());
  const Answer again = Submit(engine.get(), Question())->WaitOne();
  ExpectSame(Alone(), again);
  EXPECT_GE(again.finish.usage.cached_tokens, 3 * kSegment);
  // Segments that were generated are computed anew where they are part of a prompt, and segments that differ
  // in a late token from their first token on.
  Request longer = Question();
  longer.prompt.insert(longer.prompt.end(), Alone().tokens.begin(), Alone().tokens.begin() + 60);
  Request other = Question();
  other.prompt[2 * kSegment - 1] = other.prompt[5] + 1;
  Request shorter = Question();
  shorter.prompt.resize(2 * kSegment + 20);
  for (const Request& request : {longer, other, shorter, longer, other, shorter}) {
    const Answer hit = Submit(engine.get(), request)->WaitOne();
    const Answer miss = Submit(Make(LowRank()).get(), request)->WaitOne();
    EXPECT_EQ(miss.finish.usage.cached_tokens, 0);
    EXPECT_GT(hit.finish.usage.cached_tokens, 0);
    ExpectSame(miss, hit);
  }
  const Answer other_hit = Submit(engine.get(), other)->WaitOne();
  EXPECT_GE(other_hit.finish.usage.cached_tokens, 3 * kSegment);  // its own by now
}

TEST_P(LowRankEngineTest, FourAnswersOfOneRequest) { ExpectFourAnswersAsAlone(LowRank(), Question()); }

// At the least rank that loses nothing, of layers one at a time: near the exact answer.
TEST_P(LowRankEngineTest, EachGroupOfLayersByItself) {
  for (const LinearLayers layers : {kQueryKeyValue, kGateUp, kDown}) {
    BatchingEngineOptions options = LowRank();
    options.compression.linear_rank = 0.99;
    options.compression.linear_layers = layers;
    const Answer low = Submit(Make(options).get(), Question())->WaitOne();
    options.compression.linear_rank = 1;
    const Answer exact = Submit(Make(options).get(), Question())->WaitOne();
    ASSERT_FALSE(low.logprobs.empty());
    ASSERT_EQ(low.tokens[0], exact.tokens[0]);
    EXPECT_NEAR(low.logprobs[0].logprob, exact.logprobs[0].logprob, 0.01);
    EXPECT_NE(low.logprobs[0].logprob, exact.logprobs[0].logprob) << "nothing was of low rank";
  }
}

TEST(ChooseLinearLayers, FollowsShapeAndSpeed) {
  LlamaConfig tiny;  // stories260K
  tiny.hidden_size = 64, tiny.intermediate_size = 172, tiny.heads = 8, tiny.kv_heads = 4, tiny.head_dim = 8;
  EXPECT_EQ(ChooseLinearLayers(tiny, 1, 0.5, 256).layers, 0);
  LlamaConfig large;  // Llama 3 8B
  large.hidden_size = 4096, large.intermediate_size = 14336;
  large.heads = 32, large.kv_heads = 8, large.head_dim = 128;
  EXPECT_EQ(ChooseLinearLayers(large, 1, 0.25, 256).layers, kAllLinearLayers);
  EXPECT_EQ(ChooseLinearLayers(large, 1, 0.99, 256).layers, 0);
  EXPECT_EQ(ChooseLinearLayers(large, 0, 0.25, 256).layers, 0);  // no such device
  EXPECT_EQ(ChooseLinearLayers(large, 10, 0.5, 256).layers & (kQueryKeyValue | kDown), 0);
  const std::string reasons = ChooseLinearLayers(large, 3.3, 0.5, 256).reasons;
  for (const char* name : {"q/k/v (", "gate/up (", "down ("})
    EXPECT_NE(reasons.find(name), std::string::npos);
}

}  // namespace
}  // namespace atp
