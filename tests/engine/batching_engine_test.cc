// The whole engine on the default model and the cpu backend. The central promise: a request with a seed gives
// the same tokens and log probabilities, bit for bit, whatever else runs and however the scheduler cuts and
// repeats the work.
#include "engine/batching_engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "kernels/backend_factory.h"
#include "tests/engine/recording_sink.h"

namespace atp {
namespace {

using testing::HasSubstr;
using Answer = RecordingSink::Answer;

constexpr char kModelDir[] = ATP_SOURCE_DIR "/models/default";

// Passes everything on to another backend, and fails when it is told to, as a lost device would.
class FailingBackend : public Backend {
 public:
  explicit FailingBackend(std::unique_ptr<Backend> backend) : backend_(std::move(backend)) {}
  std::atomic<bool> broken{false};

  std::string Description() const override { return backend_->Description(); }
  bool Supports(const OpDesc& desc) const override { return backend_->Supports(desc); }
  absl::StatusOr<Buffer> Allocate(size_t bytes) override { return backend_->Allocate(bytes); }
  absl::StatusOr<Weight> LoadWeight(const TensorView& host) override { return backend_->LoadWeight(host); }
  void CopyToDevice(void* device, const void* host, size_t bytes) override {
    backend_->CopyToDevice(device, host, bytes);
  }
  void CopyToHost(void* host, const void* device, size_t bytes) override {
    backend_->CopyToHost(host, device, bytes);
  }
  void GatherRows(const GatherRowsArgs& args) override { backend_->GatherRows(args); }
  void MatMul(const MatMulArgs& args) override { backend_->MatMul(args); }
  void RmsNorm(const RmsNormArgs& args) override { backend_->RmsNorm(args); }
  void Rope(const RopeArgs& args) override { backend_->Rope(args); }
  void SwiGlu(const SwiGluArgs& args) override { backend_->SwiGlu(args); }
  void StoreKv(const StoreKvArgs& args) override { backend_->StoreKv(args); }
  void Attention(const AttentionArgs& args) override { backend_->Attention(args); }
  absl::Status Synchronize() override {
    if (broken) return absl::InternalError("the device fell off the bus");
    return backend_->Synchronize();
  }

 private:
  std::unique_ptr<Backend> backend_;
};

class CountingObserver : public EngineObserver {
 public:
  void OnStep(const StepReport& report) override {
    ++steps;
    prefill_tokens += report.prefill_tokens;
    decode_tokens += report.decode_tokens;
  }
  void OnInterTokenLatency(absl::Duration) override { ++intervals; }
  void OnRequestFinished(const RequestReport& report) override {
    ++finished;
    completion_tokens += report.usage.completion_tokens;
  }
  std::atomic<int> steps{0}, prefill_tokens{0}, decode_tokens{0}, intervals{0}, finished{0},
      completion_tokens{0};
};

class BatchingEngineTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    absl::StatusOr<std::unique_ptr<Backend>> backend = MakeBackend({});
    ASSERT_TRUE(backend.ok()) << backend.status();
    backend_ = new FailingBackend(*std::move(backend));
    ModelLimits limits;
    limits.max_batch_rows = 256;
    limits.max_logit_rows = 32;
    absl::StatusOr<std::unique_ptr<LlamaModel>> model =
        LlamaModel::Load(kModelDir, backend_, limits, nullptr);
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = model->release();
    absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer =
        LoadTokenizer(kModelDir, model_->config().vocab_size);
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    tokenizer_ = tokenizer->release();
  }
  static void TearDownTestSuite() {
    delete tokenizer_;
    delete model_;
    delete backend_;
  }
  void SetUp() override { ASSERT_NE(tokenizer_, nullptr); }

  static BatchingEngineOptions Options(int kv_tokens = 4096) {
    BatchingEngineOptions options;
    options.kv_memory_bytes = static_cast<size_t>(kv_tokens) * BytesPerToken();
    options.eos_token_ids = model_->config().eos_token_ids;
    return options;
  }
  static size_t BytesPerToken() {
    const LlamaConfig& config = model_->config();
    const KvPage page(KvFormat::kF32, 16, config.head_dim, false);
    return page.bytes() / 16 * static_cast<size_t>(config.layers) * static_cast<size_t>(config.kv_heads);
  }
  static std::unique_ptr<BatchingEngine> Make(const BatchingEngineOptions& options,
                                              EngineObserver* observer = nullptr) {
    absl::StatusOr<std::unique_ptr<BatchingEngine>> engine =
        BatchingEngine::Create(backend_, model_, tokenizer_, options, observer);
    EXPECT_TRUE(engine.ok()) << engine.status();
    return *std::move(engine);
  }

  static Request Ask(std::string_view prompt, int max_tokens, uint64_t seed = 1) {
    Request request;
    request.prompt = tokenizer_->Encode(prompt, /*add_special=*/true, /*parse_special=*/false);
    request.sampling.max_tokens = max_tokens;
    request.sampling.seed = seed;
    request.sampling.ignore_eos = true;
    return request;
  }
  static Request Sampled(std::string_view prompt, int max_tokens, uint64_t seed) {
    Request request = Ask(prompt, max_tokens, seed);
    request.sampling.temperature = 0.9f;
    request.sampling.top_p = 0.95f;
    request.sampling.top_k = 100;
    request.sampling.repetition_penalty = 1.1f;
    request.sampling.logprobs = 3;
    return request;
  }
  static std::shared_ptr<RecordingSink> Submit(Engine* engine, const Request& request) {
    auto sink = std::make_shared<RecordingSink>(request.sampling.n);
    const absl::StatusOr<RequestId> id = engine->Submit(request, sink);
    EXPECT_TRUE(id.ok()) << id.status();
    return sink;
  }
  static void ExpectNothingLeft(Engine* engine) {
    EXPECT_EQ(engine->Drain(absl::InfiniteDuration()), absl::OkStatus());
    const EngineStats stats = engine->Stats();
    EXPECT_EQ(stats.requests_running, 0);
    EXPECT_EQ(stats.requests_waiting, 0);
    EXPECT_EQ(stats.kv_blocks_used, 0);
  }

  static inline FailingBackend* backend_ = nullptr;
  static inline LlamaModel* model_ = nullptr;
  static inline Tokenizer* tokenizer_ = nullptr;
};

bool SameBits(float a, float b) { return std::memcmp(&a, &b, sizeof(a)) == 0; }

void ExpectSame(const Answer& expected, const Answer& actual) {
  ASSERT_EQ(expected.tokens, actual.tokens);
  EXPECT_EQ(expected.text, actual.text);
  ASSERT_EQ(expected.logprobs.size(), actual.logprobs.size());
  for (size_t i = 0; i < expected.logprobs.size(); ++i) {
    const TokenLogprob& e = expected.logprobs[i];
    const TokenLogprob& a = actual.logprobs[i];
    ASSERT_TRUE(SameBits(e.logprob, a.logprob)) << "token " << i << ": " << e.logprob << " and " << a.logprob;
    ASSERT_EQ(e.top.size(), a.top.size());
    for (size_t k = 0; k < e.top.size(); ++k) {
      ASSERT_EQ(e.top[k].first, a.top[k].first);
      ASSERT_TRUE(SameBits(e.top[k].second, a.top[k].second));
    }
  }
}

// A prompt of several blocks.
constexpr char kStory[] =
    "It was a bright morning in the early spring, and the whole village had come down to the river to see "
    "the boats "
    "go out. The old captain stood upon the pier with his hands behind his back, and said nothing to "
    "anybody.";

class BatchInvarianceTest : public BatchingEngineTest {
 protected:
  Answer Alone() {
    std::unique_ptr<BatchingEngine> engine = Make(Options());
    return Submit(engine.get(), Sampled(kStory, 40, 7))->WaitOne();
  }
};

TEST_F(BatchInvarianceTest, InABatchOfSixteen) {
  const Answer alone = Alone();
  EXPECT_EQ(alone.tokens.size(), 40u);
  EXPECT_EQ(alone.logprobs.size(), 40u);
  std::unique_ptr<BatchingEngine> engine = Make(Options());
  std::vector<std::shared_ptr<RecordingSink>> others;
  std::shared_ptr<RecordingSink> sink;
  for (int i = 0; i < 16; ++i) {
    if (i == 9) {
      sink = Submit(engine.get(), Sampled(kStory, 40, 7));
    } else {
      const std::string prompt(static_cast<size_t>(10 + 37 * i), static_cast<char>('a' + i));
      others.push_back(Submit(engine.get(), Sampled(prompt, 5 + 4 * i, 100 + i)));
    }
  }
  ExpectSame(alone, sink->WaitOne());
  for (auto& other : others) other->Wait();
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
  // A higher class takes the place of a running one: preemption for certain, whatever the lengths.
  options.max_running_sequences = 1;
  engine = Make(options);
  auto low = Submit(engine.get(), Sampled(kStory, 40, 7));
  low->WaitForDeltas(5);
  Request urgent = Sampled("Help", 3, 1);
  urgent.priority = 1;
  auto high = Submit(engine.get(), urgent);
  high->Wait();
  ExpectSame(alone, low->WaitOne());
  EXPECT_GE(engine->Stats().preemptions_total, 1u);
  ExpectNothingLeft(engine.get());
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

TEST_F(BatchingEngineTest, GreedyIsTheSameForEverySeed) {
  std::unique_ptr<BatchingEngine> engine = Make(Options());
  Request request = Ask(kStory, 20, 1);
  request.sampling.temperature = 0;
  const Answer a = Submit(engine.get(), request)->WaitOne();
  request.sampling.seed.reset();
  const Answer b = Submit(engine.get(), request)->WaitOne();
  EXPECT_EQ(a.tokens, b.tokens);
  EXPECT_EQ(a.finish.reason, FinishReason::kLength);
  EXPECT_EQ(a.finish.usage.completion_tokens, 20);
  EXPECT_EQ(a.text, b.text);
  EXPECT_FALSE(a.text.empty());
}

TEST_F(BatchingEngineTest, AnswersDifferAndAnswerIHasSeedPlusI) {
  std::unique_ptr<BatchingEngine> engine = Make(Options());
  Request request = Sampled(kStory, 12, 50);
  request.sampling.n = 3;
  const auto answers = Submit(engine.get(), request)->Wait();
  ASSERT_EQ(answers.size(), 3u);
  EXPECT_GT(answers.at(1).finish.usage.cached_tokens, 0);  // they share the prompt
  for (int i = 0; i < 3; ++i) {
    ExpectSame(Submit(engine.get(), Sampled(kStory, 12, 50 + i))->WaitOne(), answers.at(i));
  }
  EXPECT_NE(answers.at(0).tokens, answers.at(1).tokens);
  ExpectNothingLeft(engine.get());
}

TEST_F(BatchingEngineTest, StopStringsStopTokensAndEos) {
  std::unique_ptr<BatchingEngine> engine = Make(Options());
  Request request = Ask(kStory, 40, 7);
  const Answer whole = Submit(engine.get(), request)->WaitOne();
  const std::string stop = whole.text.substr(whole.text.size() / 2, 3);
  request.sampling.stop = {stop};
  const Answer stopped = Submit(engine.get(), request)->WaitOne();
  EXPECT_EQ(stopped.finish.reason, FinishReason::kStop);
  EXPECT_EQ(stopped.finish.matched_stop, stop);
  EXPECT_EQ(stopped.text, whole.text.substr(0, whole.text.find(stop)));

  request.sampling.stop.clear();
  request.sampling.stop_token_ids = {whole.tokens[9]};
  const Answer by_token = Submit(engine.get(), request)->WaitOne();
  EXPECT_EQ(by_token.finish.reason, FinishReason::kStop);
  EXPECT_LE(by_token.tokens.size(), 9u);
  request.sampling.min_tokens = 30;
  const Answer later = Submit(engine.get(), request)->WaitOne();
  EXPECT_GE(later.finish.usage.completion_tokens, 30);

  BatchingEngineOptions options = Options();
  options.eos_token_ids = {whole.tokens[5]};
  engine = Make(options);
  request = Ask(kStory, 40, 7);
  request.sampling.ignore_eos = false;
  const Answer ended = Submit(engine.get(), request)->WaitOne();
  EXPECT_EQ(ended.finish.reason, FinishReason::kStop);
  EXPECT_LE(ended.tokens.size(), 5u);
  EXPECT_TRUE(ended.finish.matched_stop.empty());
}

TEST_F(BatchingEngineTest, EchoWithLogprobsAgreesWithGeneration) {
  std::unique_ptr<BatchingEngine> engine = Make(Options());
  Request request = Ask(kStory, 30, 7);
  request.sampling.logprobs = 2;
  request.sampling.temperature = 0;
  const Answer generated = Submit(engine.get(), request)->WaitOne();

  // What was generated, given as a prompt, must get the log probabilities that it had: the same model saw the
  // same text.
  Request scored = request;
  scored.prompt.insert(scored.prompt.end(), generated.tokens.begin(), generated.tokens.end());
  scored.echo_prompt = true;
  scored.sampling.max_tokens = 0;
  const Answer echo = Submit(engine.get(), scored)->WaitOne();
  EXPECT_EQ(echo.finish.reason, FinishReason::kLength);
  EXPECT_EQ(echo.finish.usage.completion_tokens, 0);
  EXPECT_EQ(echo.finish.usage.cached_tokens, 0);
  ASSERT_EQ(echo.prompt_logprobs.size(), scored.prompt.size());
  EXPECT_TRUE(std::isnan(echo.prompt_logprobs[0].logprob));
  for (size_t i = 0; i < scored.prompt.size(); ++i)
    EXPECT_EQ(echo.prompt_logprobs[i].token, scored.prompt[i]);
  for (size_t i = 0; i < generated.logprobs.size(); ++i) {
    const TokenLogprob& e = echo.prompt_logprobs[request.prompt.size() + i];
    EXPECT_TRUE(SameBits(e.logprob, generated.logprobs[i].logprob));
    EXPECT_EQ(e.top, generated.logprobs[i].top);
  }
  EXPECT_THAT(echo.prompt_text, HasSubstr("bright morning"));

  // The same, and an answer behind it.
  scored.sampling.max_tokens = 4;
  const Answer both = Submit(engine.get(), scored)->WaitOne();
  EXPECT_EQ(both.prompt_logprobs.size(), scored.prompt.size());
  EXPECT_EQ(both.tokens.size(), 4u);

  // Echo alone.
  scored.sampling.logprobs.reset();
  scored.sampling.max_tokens = 0;
  const Answer text = Submit(engine.get(), scored)->WaitOne();
  EXPECT_EQ(text.prompt_text, echo.prompt_text);
  EXPECT_TRUE(text.prompt_logprobs.empty());
  ExpectNothingLeft(engine.get());
}

TEST_F(BatchingEngineTest, CancelInMidStreamFreesTheBlocks) {
  BatchingEngineOptions options = Options();
  options.prefix_cache = false;
  std::unique_ptr<BatchingEngine> engine = Make(options);
  auto sink = std::make_shared<RecordingSink>();
  const absl::StatusOr<RequestId> id = engine->Submit(Ask(kStory, 400), sink);
  ASSERT_TRUE(id.ok());
  sink->WaitForDeltas(3);
  EXPECT_GT(engine->Stats().kv_blocks_used, 0);
  engine->Cancel(*id);
  const Answer answer = sink->WaitOne();
  EXPECT_EQ(answer.finish.reason, FinishReason::kCancelled);
  EXPECT_LT(answer.finish.usage.completion_tokens, 400);
  EXPECT_EQ(engine->Stats().kv_blocks_used, 0);  // by the time the caller hears of it
  EXPECT_FALSE(sink->late());
}

TEST_F(BatchingEngineTest, ASinkMayCancelItsOwnRequest) {
  std::unique_ptr<BatchingEngine> engine = Make(Options());
  std::atomic<RequestId> id{0};
  auto sink = std::make_shared<RecordingSink>(1, [&] {
    if (id != 0) engine->Cancel(id);
  });
  const absl::StatusOr<RequestId> submitted = engine->Submit(Ask(kStory, 400), sink);
  ASSERT_TRUE(submitted.ok());
  id = *submitted;
  EXPECT_EQ(sink->WaitOne().finish.reason, FinishReason::kCancelled);
}

TEST_F(BatchingEngineTest, DeadlineEndsARunningRequest) {
  std::unique_ptr<BatchingEngine> engine = Make(Options());
  Request request = Ask(kStory, 400);
  request.deadline = absl::Now();
  EXPECT_EQ(Submit(engine.get(), request)->WaitOne().finish.reason, FinishReason::kDeadline);
  ExpectNothingLeft(engine.get());
}

TEST_F(BatchingEngineTest, RefusesWhatIsWrongWithTheNumbers) {
  std::unique_ptr<BatchingEngine> engine = Make(Options(128));
  const auto refusal = [&](const Request& request) {
    const absl::StatusOr<RequestId> id = engine->Submit(request, nullptr);
    EXPECT_EQ(id.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(id.status().message());
  };
  EXPECT_THAT(refusal(Ask(kStory, 200)), HasSubstr("kv_cache.memory_bytes"));
  Request request = Ask("a", 5);
  request.prompt.assign(600, 5);
  EXPECT_THAT(refusal(request), HasSubstr("512 positions"));
  request.prompt = {5, 100000};
  EXPECT_THAT(refusal(request), HasSubstr("100000"));
  request.prompt.clear();
  EXPECT_THAT(refusal(request), HasSubstr("prompt"));
  request = Ask("a", 5);
  request.sampling.top_p = 0;
  EXPECT_THAT(refusal(request), HasSubstr("top_p"));
  BatchingEngineOptions tiny = Options(1);
  const auto engine_or = BatchingEngine::Create(backend_, model_, tokenizer_, tiny, nullptr);
  EXPECT_THAT(std::string(engine_or.status().message()), HasSubstr("kv_cache.memory_bytes"));
}

TEST_F(BatchingEngineTest, GenerationEndsWithTheModelsPositions) {
  std::unique_ptr<BatchingEngine> engine = Make(Options());
  Request request = Ask("a", 100);
  request.prompt.assign(500, 300);
  const Answer answer = Submit(engine.get(), request)->WaitOne();
  EXPECT_EQ(answer.finish.reason, FinishReason::kLength);
  EXPECT_EQ(answer.finish.usage.completion_tokens, 12);
}

TEST_F(BatchingEngineTest, FullQueueRefusesAndDrainEndsInOrder) {
  BatchingEngineOptions options = Options();
  options.max_running_sequences = 1;
  options.max_waiting_requests = 2;
  std::unique_ptr<BatchingEngine> engine = Make(options);
  auto running = Submit(engine.get(), Ask(kStory, 300));
  running->WaitForDeltas(1);
  auto b = Submit(engine.get(), Ask("b", 3));
  auto c = Submit(engine.get(), Ask("c", 3));
  const absl::StatusOr<RequestId> refused = engine->Submit(Ask("d", 3), std::make_shared<RecordingSink>());
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(engine->Stats().requests_waiting, 2);
  EXPECT_EQ(engine->Stats().requests_running, 1);
  EXPECT_GE(engine->RetryAfter(), absl::Seconds(1));
  EXPECT_EQ(engine->Drain(absl::InfiniteDuration()), absl::OkStatus());
  EXPECT_EQ(running->WaitOne().finish.usage.completion_tokens, 300);
  EXPECT_EQ(b->WaitOne().finish.reason, FinishReason::kLength);
  EXPECT_EQ(c->WaitOne().finish.reason, FinishReason::kLength);
  EXPECT_EQ(engine->Submit(Ask("e", 3), running).status().code(), absl::StatusCode::kUnavailable);
}

TEST_F(BatchingEngineTest, DrainEndsTheRestAndDestructionToo) {
  std::unique_ptr<BatchingEngine> engine = Make(Options());
  auto sink = Submit(engine.get(), Ask(kStory, 400));
  EXPECT_EQ(engine->Drain(absl::ZeroDuration()).code(), absl::StatusCode::kDeadlineExceeded);
  const Answer answer = sink->WaitOne();
  EXPECT_EQ(answer.finish.reason, FinishReason::kShutdown);
  EXPECT_FALSE(answer.finish.message.empty());
  engine = Make(Options());
  sink = Submit(engine.get(), Ask(kStory, 400));
  engine.reset();
  EXPECT_TRUE(sink->ended());
}

TEST_F(BatchingEngineTest, DeviceFailureEndsWhatRunsWithAMessage) {
  std::unique_ptr<BatchingEngine> engine = Make(Options());
  auto sink = Submit(engine.get(), Ask(kStory, 400));
  sink->WaitForDeltas(2);
  backend_->broken = true;
  const Answer answer = sink->WaitOne();
  backend_->broken = false;
  EXPECT_EQ(answer.finish.reason, FinishReason::kError);
  EXPECT_THAT(answer.finish.message, HasSubstr("fell off the bus"));
  EXPECT_EQ(engine->Stats().kv_blocks_used, 0);
  EXPECT_EQ(engine->Stats().kv_blocks_cached, 0);
  EXPECT_EQ(Submit(engine.get(), Ask(kStory, 3))->WaitOne().finish.reason, FinishReason::kLength);
}

TEST_F(BatchingEngineTest, WithoutTokenizerTokensAreDelivered) {
  auto engine = BatchingEngine::Create(backend_, model_, nullptr, Options(), nullptr);
  ASSERT_TRUE(engine.ok());
  Request request = Ask("a", 6);
  const Answer answer = Submit(engine->get(), request)->WaitOne();
  EXPECT_EQ(answer.tokens.size(), 6u);
  EXPECT_EQ(answer.text, "");
  request.sampling.stop = {"x"};
  EXPECT_EQ((*engine)->Submit(request, nullptr).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(BatchingEngineTest, HundredsOfRequestsLeakNothing) {
  CountingObserver observer;
  BatchingEngineOptions options = Options(320);
  options.max_running_sequences = 12;
  std::unique_ptr<BatchingEngine> engine = Make(options, &observer);
  std::atomic<int> completion_tokens{0};
  std::vector<std::thread> clients;
  for (int t = 0; t < 6; ++t) {
    clients.emplace_back([&, t] {
      for (int i = 0; i < 50; ++i) {
        const std::string prompt(static_cast<size_t>(5 + (i * 13 + t * 7) % 60),
                                 static_cast<char>('a' + i % 5));
        Request request = Ask(prompt, 1 + (i + t) % 9, i);
        request.sampling.n = 1 + i % 2;
        request.priority = t % 2;
        if (i % 11 == 0) request.deadline = absl::Now() + absl::Milliseconds(1);
        auto sink = std::make_shared<RecordingSink>(request.sampling.n);
        const absl::StatusOr<RequestId> id = engine->Submit(request, sink);
        ASSERT_TRUE(id.ok()) << id.status();
        if (i % 7 == 3) {
          sink->WaitForDeltas(1);
          engine->Cancel(*id);
        }
        for (const auto& [index, answer] : sink->Wait()) {
          EXPECT_EQ(answer.finishes, 1);
          completion_tokens += answer.finish.usage.completion_tokens;
        }
        EXPECT_FALSE(sink->late());
      }
    });
  }
  for (std::thread& client : clients) client.join();
  ExpectNothingLeft(engine.get());
  EXPECT_EQ(observer.finished, 300);
  EXPECT_EQ(observer.completion_tokens, completion_tokens);
  EXPECT_GT(observer.steps, 0);
  EXPECT_GT(observer.prefill_tokens, 0);
  EXPECT_GT(observer.decode_tokens, 0);
  EXPECT_GT(observer.intervals, 0);
}

}  // namespace
}  // namespace atp
