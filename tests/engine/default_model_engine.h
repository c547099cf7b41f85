// A fixture with the default model on the cpu backend, loaded once per test suite, and engines made from it.
#ifndef ATP_TESTS_ENGINE_DEFAULT_MODEL_ENGINE_H_
#define ATP_TESTS_ENGINE_DEFAULT_MODEL_ENGINE_H_

#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/batching_engine.h"
#include "kernels/backend_factory.h"
#include "tests/engine/recording_sink.h"

namespace atp {

using Answer = RecordingSink::Answer;

inline constexpr char kModelDir[] = ATP_SOURCE_DIR "/models/default";

// Passes everything on to another backend, and fails when it is told to, as a lost device would.
class FailingBackend : public Backend {
 public:
  explicit FailingBackend(std::unique_ptr<Backend> backend) : backend_(std::move(backend)) {}
  std::atomic<bool> broken{false}, lost{false};

  std::string Description() const override { return backend_->Description(); }
  bool Supports(const OpDesc& desc) const override { return backend_->Supports(desc); }
  absl::StatusOr<Buffer> Allocate(size_t bytes) override { return backend_->Allocate(bytes); }
  absl::StatusOr<Weight> LoadWeight(const TensorView& host, DType dtype) override {
    return backend_->LoadWeight(host, dtype);
  }
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
  void StoreQueries(const StoreQueriesArgs& args) override { backend_->StoreQueries(args); }
  void FitPrincipalKeys(const FitPrincipalKeysArgs& args) override { backend_->FitPrincipalKeys(args); }
  void SampleTokens(const SampleTokensArgs& args) override { backend_->SampleTokens(args); }
  double LowRankMatMulSpeed(DType weight) const override { return backend_->LowRankMatMulSpeed(weight); }
  void LowRankInput(const LowRankInputArgs& args) override { backend_->LowRankInput(args); }
  void LowRankOutput(const LowRankOutputArgs& args) override { backend_->LowRankOutput(args); }
  absl::Status Synchronize() override {
    if (lost) return absl::UnavailableError("the device fell off the bus for good");
    if (broken) return absl::InternalError("the device fell off the bus");
    return backend_->Synchronize();
  }

 private:
  std::unique_ptr<Backend> backend_;
};

inline bool SameBits(float a, float b) { return std::memcmp(&a, &b, sizeof(a)) == 0; }

inline void ExpectSame(const Answer& expected, const Answer& actual) {
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
  // The answer to `request` as the tenth of sixteen requests of all lengths; the others end as well.
  static Answer AmongSixteen(Engine* engine, const Request& request) {
    std::vector<std::shared_ptr<RecordingSink>> others;
    std::shared_ptr<RecordingSink> sink;
    for (int i = 0; i < 16; ++i) {
      if (i == 9) {
        sink = Submit(engine, request);
      } else {
        const std::string prompt(static_cast<size_t>(10 + 23 * i), static_cast<char>('a' + i));
        others.push_back(Submit(engine, Sampled(prompt, 5 + 4 * i, 100 + i)));
      }
    }
    const Answer answer = sink->WaitOne();
    for (auto& other : others) other->Wait();
    return answer;
  }
  // A higher class takes the place of `request` after 45 tokens, and its answer stays the same.
  static void ExpectSameAfterAHigherClass(const Answer& alone, BatchingEngineOptions options,
                                          const Request& request) {
    options.max_running_sequences = 1;
    for (const bool prefix_cache : {false, true}) {
      options.prefix_cache = prefix_cache;
      const std::unique_ptr<BatchingEngine> engine = Make(options);
      const std::shared_ptr<RecordingSink> low = Submit(engine.get(), request);
      low->WaitForDeltas(45);  // in mid-segment, where there are segments
      Request urgent = Sampled("Help", 3, 1);
      urgent.priority = 1;
      Submit(engine.get(), urgent)->WaitOne();
      ExpectSame(alone, low->WaitOne());
      EXPECT_EQ(engine->Stats().preemptions_total, 1u);
      ExpectNothingLeft(engine.get());
    }
  }
  // Four answers to one request are those to four requests, and share the prompt.
  static void ExpectFourAnswersAsAlone(const BatchingEngineOptions& options, Request request) {
    const std::unique_ptr<BatchingEngine> engine = Make(options);
    request.sampling.n = 4;
    const auto answers = Submit(engine.get(), request)->Wait();
    request.sampling.n = 1;
    for (size_t i = 0; i < 4; ++i) {
      EXPECT_EQ(answers.at(i).finish.usage.cached_tokens > 0, i > 0) << i;
      ExpectSame(Submit(Make(options).get(), request)->WaitOne(), answers.at(i));
      ++*request.sampling.seed;
    }
    ExpectNothingLeft(engine.get());
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

// A prompt of several blocks.
inline constexpr char kStory[] =
    "It was a bright morning in the early spring, and the whole village had come down to the river to see "
    "the boats "
    "go out. The old captain stood upon the pier with his hands behind his back, and said nothing to "
    "anybody.";

}  // namespace atp

#endif  // ATP_TESTS_ENGINE_DEFAULT_MODEL_ENGINE_H_
