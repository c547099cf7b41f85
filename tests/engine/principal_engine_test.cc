// The central promise with compressed history: a request with a seed gives the same tokens and log
// probabilities, bit for bit, alone, in a batch, after a preemption, from the prefix cache.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "tests/engine/default_model_engine.h"

namespace atp {
namespace {

struct Case {
  double ratio;
  int cap;
  int bits = 16;
};

// Segments of 32 tokens, so that short prompts and answers have many of them.
constexpr int kSegment = 32;
constexpr int kAnswer = 120;

class PrincipalEngineTest : public BatchingEngineTest, public testing::WithParamInterface<Case> {
 protected:
  static BatchingEngineOptions Compressed(int kv_tokens = 8192) {
    BatchingEngineOptions options = Options(kv_tokens);
    options.compression.ratio = GetParam().ratio;
    options.compression.bits = GetParam().bits;
    options.compression.max_principal_keys = GetParam().cap;
    options.compression.segment_tokens = kSegment;
    options.compression.window_tokens = kSegment;
    return options;
  }
  // About 150 tokens, and an answer that goes on through four segments.
  static std::string Prompt(const std::string& beginning = "") {
    return beginning + kStory + kStory + kStory;
  }
  static Request Question(uint64_t seed = 7) { return Sampled(Prompt(), kAnswer, seed); }
  // Computed once for each setting.
  static const Answer& Alone() {
    static std::map<std::tuple<double, int, int>, Answer> answers;
    Answer& answer = answers[{GetParam().ratio, GetParam().cap, GetParam().bits}];
    if (answer.tokens.empty()) {
      std::unique_ptr<BatchingEngine> engine = Make(Compressed());
      answer = Submit(engine.get(), Question())->WaitOne();
    }
    return answer;
  }
};
// Every ratio with and without a cap, every number of bits with and without one.
INSTANTIATE_TEST_SUITE_P(Settings, PrincipalEngineTest,
                         testing::Values(Case{0.5, 0, 16}, Case{0.25, 0, 8}, Case{0.125, 0, 4},
                                         Case{0.5, 32, 4}, Case{0.25, 20, 16}, Case{0.125, 12, 8},
                                         Case{0.25, 0, 16}),
                         [](const auto& info) {
                           return "OneOf" + std::to_string(static_cast<int>(1 / info.param.ratio)) +
                                  (info.param.cap > 0 ? "Capped" : "") + "Bits" +
                                  std::to_string(info.param.bits);
                         });

TEST_P(PrincipalEngineTest, HistoryIsCompressedIndeed) {
  std::unique_ptr<BatchingEngine> engine = Make(Compressed());
  const Request question = Question();
  ASSERT_GT(question.prompt.size(), 4u * kSegment);
  const Answer compressed = Submit(engine.get(), question)->WaitOne();
  EXPECT_EQ(compressed.tokens.size(), static_cast<size_t>(kAnswer));
  EXPECT_EQ(engine->Stats().segments_compressed_total,
            static_cast<uint64_t>(
                engine->plan()->FittedSegments(static_cast<int>(question.prompt.size()) + kAnswer - 1)));
  EXPECT_GT(engine->Stats().segments_compressed_total, 5u);
  EXPECT_EQ(engine->Stats().tokens_compressed_total, engine->Stats().segments_compressed_total * kSegment);
  engine = Make(Options());
  const Answer exact = Submit(engine.get(), question)->WaitOne();
  bool same = exact.tokens == compressed.tokens;
  for (size_t i = 0; same && i < exact.logprobs.size(); ++i)
    same = SameBits(exact.logprobs[i].logprob, compressed.logprobs[i].logprob);
  EXPECT_FALSE(same);
  EXPECT_EQ(engine->Stats().segments_compressed_total, 0u);
}

// The answer says what was done to its history, by the plan and the allocator's blocks.
TEST_P(PrincipalEngineTest, AnswersReportTheirCompression) {
  const Answer& answer = Alone();
  std::unique_ptr<BatchingEngine> engine = Make(Compressed());
  const CompressionPlan& plan = *engine->plan();
  const CompressionUsage& atp = answer.finish.usage.atp;
  const int tokens = answer.finish.usage.prompt_tokens + kAnswer - 1;  // the last one is never computed
  const int visible = plan.VisibleSegments(tokens);
  EXPECT_EQ(atp.preset, "ratio");
  EXPECT_EQ(atp.ratio, GetParam().ratio);
  EXPECT_EQ(atp.bits, GetParam().bits == 16 ? BitsOf(Compressed().kv_format) : GetParam().bits);
  EXPECT_EQ(atp.tokens, tokens);
  EXPECT_EQ(atp.compressed_tokens, visible * kSegment);
  int64_t entries = tokens - visible * kSegment;
  for (int k = plan.StateBegin(visible - 1); k < visible; ++k) entries += plan.GroupEntries(k)[0];
  EXPECT_EQ(atp.entries, entries);
  EXPECT_LT(atp.kv_bytes, atp.exact_kv_bytes);
  const KvCache::Shape& shape = engine->kv_cache().shape();
  const KvPage page(shape.format, shape.block_tokens, shape.head_dim, false);
  EXPECT_EQ(atp.exact_kv_bytes,
            (tokens + 15) / 16 * int64_t{shape.heads_total()} * static_cast<int64_t>(page.bytes()));
  engine = Make(Options());
  const CompressionUsage exact = Submit(engine.get(), Question())->WaitOne().finish.usage.atp;
  EXPECT_EQ(exact.preset, "exact");
  EXPECT_EQ(exact.entries, exact.tokens);
  EXPECT_EQ(exact.compressed_tokens, 0);
  EXPECT_GE(exact.kv_bytes, exact.exact_kv_bytes);  // with the block of the token that was not computed
}

TEST_P(PrincipalEngineTest, InABatchOfSixteen) {
  const Answer& alone = Alone();
  std::unique_ptr<BatchingEngine> engine = Make(Compressed());
  ExpectSame(alone, AmongSixteen(engine.get(), Question()));
  ExpectNothingLeft(engine.get());
}

TEST_P(PrincipalEngineTest, InChunksOfAnySize) {
  const Answer& alone = Alone();
  for (const int chunk : {1, 13}) {
    BatchingEngineOptions options = Compressed();
    options.max_prefill_chunk_tokens = chunk;
    std::unique_ptr<BatchingEngine> engine = Make(options);
    ExpectSame(alone, Submit(engine.get(), Question())->WaitOne());
  }
}

TEST_P(PrincipalEngineTest, AfterPreemption) {
  // Short prompts are let in side by side, and then their answers grow beyond what there is.
  const auto ask = [](int i) { return Sampled(std::string("The boat number ") + char('1' + i), 160, i); };
  std::unique_ptr<BatchingEngine> large = Make(Compressed());
  const Answer alone = Submit(large.get(), ask(3))->WaitOne();
  large.reset();
  for (const bool prefix_cache : {false, true}) {
    BatchingEngineOptions options = Compressed(280);
    options.prefix_cache = prefix_cache;
    std::unique_ptr<BatchingEngine> engine = Make(options);
    std::vector<std::shared_ptr<RecordingSink>> sinks;
    for (int i = 0; i < 4; ++i) sinks.push_back(Submit(engine.get(), ask(i)));
    ExpectSame(alone, sinks[3]->WaitOne());
    for (auto& sink : sinks) sink->WaitOne();
    EXPECT_GT(engine->Stats().preemptions_total, 0u);
    ExpectNothingLeft(engine.get());
  }
}

TEST_P(PrincipalEngineTest, AfterAHigherClassTookItsPlace) {
  ExpectSameAfterAHigherClass(Alone(), Compressed(), Question());
}

TEST_P(PrincipalEngineTest, FromThePrefixCache) {
  const Answer& alone = Alone();
  std::unique_ptr<BatchingEngine> engine = Make(Compressed());
  ExpectSame(alone, Submit(engine.get(), Question())->WaitOne());
  const Answer again = Submit(engine.get(), Question())->WaitOne();
  ExpectSame(alone, again);
  EXPECT_GE(again.finish.usage.cached_tokens, 4 * kSegment);
  EXPECT_EQ(again.finish.usage.cached_tokens % kSegment, 0);
  // The prompt goes on with half of the answer: all whole segments of both are there.
  Request longer = Question();
  longer.prompt.insert(longer.prompt.end(), alone.tokens.begin(), alone.tokens.begin() + 60);
  longer.sampling.temperature = 0;
  const Answer hit = Submit(engine.get(), longer)->WaitOne();
  EXPECT_GE(hit.finish.usage.cached_tokens, static_cast<int>(longer.prompt.size() - 1) / kSegment * kSegment);
  std::unique_ptr<BatchingEngine> fresh = Make(Compressed());
  const Answer miss = Submit(fresh.get(), longer)->WaitOne();
  EXPECT_EQ(miss.finish.usage.cached_tokens, 0);
  ExpectSame(miss, hit);
}

TEST_P(PrincipalEngineTest, FourAnswersOfOneRequest) { ExpectFourAnswersAsAlone(Compressed(), Question()); }

// Looks at the blocks in every step, as an operator's metrics do.
class BlockWatcher : public EngineObserver {
 public:
  void OnStep(const StepReport& report) override {
    fits += static_cast<int>(report.fits.size());
    EXPECT_EQ(report.fits.empty(), report.fit_time == absl::ZeroDuration());
    const BatchingEngine* const e = engine;
    if (e == nullptr) return;
    const EngineStats stats = e->Stats();
    most_used = std::max(most_used.load(), stats.kv_blocks_used);
    most_principal = std::max(most_principal.load(), stats.kv_principal_blocks);
    most_queries = std::max(most_queries.load(), stats.kv_query_blocks);
    most_saved = std::max(most_saved.load(), stats.kv_bytes_saved);
  }
  void OnInterTokenLatency(absl::Duration) override {}
  void OnRequestFinished(const RequestReport&) override {}

  std::atomic<const BatchingEngine*> engine{nullptr};
  std::atomic<int> fits{0};
  std::atomic<int64_t> most_used{0}, most_principal{0}, most_queries{0}, most_saved{0};
};

TEST_P(PrincipalEngineTest, ShortRequestsPayNothing) {
  BlockWatcher watcher;
  std::unique_ptr<BatchingEngine> engine = Make(Compressed(), &watcher);
  watcher.engine = engine.get();
  Request request = Question();
  request.prompt.resize(20);
  request.sampling.max_tokens = 2 * kSegment + 1 - 20;  // the last of them is never computed
  Submit(engine.get(), request)->WaitOne();
  EXPECT_GT(watcher.most_used, 0);
  EXPECT_EQ(watcher.most_queries, 0);
  EXPECT_EQ(watcher.most_principal, 0);
  EXPECT_EQ(watcher.fits, 0);
  request.sampling.max_tokens += 1;
  Submit(engine.get(), request)->WaitOne();
  EXPECT_GT(watcher.most_queries, 0);
  EXPECT_GT(watcher.most_principal, 0);
  EXPECT_GT(watcher.fits, 0);
  watcher.engine = nullptr;
}

TEST_P(PrincipalEngineTest, ALongAnswerHoldsABoundedNumberOfBlocks) {
  BatchingEngineOptions options = Compressed();
  options.prefix_cache = false;
  std::vector<int64_t> used;
  for (const int tokens : {200, 480}) {
    BlockWatcher watcher;
    std::unique_ptr<BatchingEngine> engine = Make(options, &watcher);
    watcher.engine = engine.get();
    Submit(engine.get(), Sampled("Once", tokens, 3))->WaitOne();
    used.push_back(watcher.most_used);
    EXPECT_GT(watcher.most_saved, 0);
    watcher.engine = nullptr;
  }
  if (GetParam().cap > 0) {
    EXPECT_EQ(used[0], used[1]);
  } else {
    EXPECT_GT(used[1], used[0]);
  }
}

}  // namespace
}  // namespace atp
