// A decode step of the whole engine (schedule, forward, sample, commit) allocates nothing on the engine's
// thread but what it hands over: an OutputDelta per answer, whose vector of tokens becomes the front end's.
//
// Measured from one delta to the next of the same answer, so everything in between is counted: operator new
// of the engine's thread, under one backend thread. Steps that open a block of the KV cache are counted
// apart: the prefix cache keeps a record of each whole block.
#include <gtest/gtest.h>

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "engine/batching_engine.h"
#include "kernels/backend_factory.h"
#include "tests/allocation_count.h"

namespace atp {
namespace {

constexpr int kTokens = 100;

// Notes what the engine's thread has allocated whenever a delta comes.
class CountingSink : public OutputSink {
 public:
  CountingSink() { seen_.reserve(kTokens + 1); }
  void OnDelta(OutputDelta delta) override {
    if (!delta.tokens.empty()) seen_.push_back(AllocationsOfThisThread());
  }
  void OnFinish(OutputFinish) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    done_ = true;
    changed_.notify_all();
  }
  const std::vector<int64_t>& Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return done_; });
    return seen_;
  }

 private:
  std::vector<int64_t> seen_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool done_ = false;
};

TEST(StepAllocation, ADecodeStepAllocatesItsDeltasOnly) {
  BackendOptions backend_options;
  backend_options.threads = 1;  // which of several runs a part, and so grows its scratch, is left to chance
  const absl::StatusOr<std::unique_ptr<Backend>> backend = MakeBackend(backend_options);
  ASSERT_TRUE(backend.ok()) << backend.status();
  ModelLimits limits;
  limits.max_batch_rows = 64;
  const absl::StatusOr<std::unique_ptr<LlamaModel>> model =
      LlamaModel::Load(ATP_SOURCE_DIR "/models/default", backend->get(), limits, nullptr, DType::kQ8_0);
  ASSERT_TRUE(model.ok()) << model.status();
  BatchingEngineOptions options;
  options.kv_memory_bytes = size_t{256} << 20;
  const absl::StatusOr<std::unique_ptr<BatchingEngine>> engine =
      BatchingEngine::Create(backend->get(), model->get(), nullptr, options, nullptr);
  ASSERT_TRUE(engine.ok()) << engine.status();
  Request request;
  for (int i = 0; i < 20; ++i) request.prompt.push_back(10 + i);
  request.sampling.max_tokens = kTokens;
  request.sampling.ignore_eos = true;
  request.sampling.temperature = 0.8f;
  request.sampling.top_p = 0.9f;
  const auto sink = std::make_shared<CountingSink>();
  ASSERT_TRUE((*engine)->Submit(request, sink).ok());
  const std::vector<int64_t>& seen = sink->Wait();
  ASSERT_EQ(seen.size(), static_cast<size_t>(kTokens));
  EXPECT_GT(seen.front(), 0);  // so the counter counts
  for (int i = 40; i < kTokens; ++i) {
    if ((20 + i - 1) % options.block_tokens < 2) continue;  // ends or opens a block
    EXPECT_EQ(seen[i] - seen[i - 1], 1) << "token " << i;
  }
}

}  // namespace
}  // namespace atp
