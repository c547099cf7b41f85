// A model and a scheduler that run given sequences of tokens to their end and keep the logits of every
// position, so that tests can compare what different schedules and compressions make of the same tokens.
#ifndef ATP_TESTS_ENGINE_PLANNED_RUNNER_H_
#define ATP_TESTS_ENGINE_PLANNED_RUNNER_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine/llama_model.h"
#include "engine/scheduler.h"
#include "kernels/backend_factory.h"

namespace atp {

class PlannedRunner {
 public:
  static constexpr int kMaxRows = 256;

  // `exact_blocks`: no larger than exact tokens need, so that pages of principal entries hold fewer.
  explicit PlannedRunner(const std::string& model_dir, KvFormat format = KvFormat::kF32,
                         const std::string& device = "cpu", bool exact_blocks = false,
                         std::optional<DType> weight_dtype = std::nullopt) {
    BackendOptions options;
    options.device = device;
    Load(MakeBackend(options).value(), model_dir, format, exact_blocks, weight_dtype);
  }
  PlannedRunner(std::unique_ptr<Backend> backend, const std::string& model_dir, KvFormat format,
                std::optional<DType> weight_dtype = std::nullopt) {
    Load(std::move(backend), model_dir, format, /*exact_blocks=*/false, weight_dtype);
  }

  const LlamaConfig& config() const { return model_->config(); }
  LlamaModel& model() { return *model_; }
  const KvCache& cache() const { return *cache_; }
  size_t vocab() const { return static_cast<size_t>(config().vocab_size); }

  std::shared_ptr<const CompressionPlan> Plan(const CompressionSettings& settings) const {
    CompressionShape shape;
    shape.layers = config().layers;
    shape.heads = config().heads;
    shape.kv_heads = config().kv_heads;
    shape.head_dim = config().head_dim;
    shape.format = cache_->shape().format;
    shape.block_tokens = cache_->shape().block_tokens;
    shape.query_blocks_per_head = cache_->query_page().blocks_per_head();
    shape.max_positions = kMaxPositions;
    shape.block_bytes = cache_->block_bytes();
    return MakeCompressionPlan(settings, shape).value();
  }

  // Runs all `prompts` side by side, in chunks of at most `chunk_tokens` (1: as decoding does). Returns the
  // logits of each, [tokens, vocab].
  std::vector<std::vector<float>> Logits(const std::vector<std::vector<TokenId>>& prompts,
                                         std::shared_ptr<const CompressionPlan> plan, int chunk_tokens) {
    Scheduler scheduler(Options(chunk_tokens));
    std::vector<std::vector<float>> logits(prompts.size());
    std::vector<const Sequence*> sequences;
    for (size_t i = 0; i < prompts.size(); ++i) {
      auto request = std::make_shared<Request>();
      request->prompt = prompts[i];
      request->echo_prompt = true;  // so that every row has logits
      request->sampling.logprobs = 0;
      auto sequence = std::make_unique<Sequence>(i + 1, request, 0, 0, nullptr, plan);
      EXPECT_EQ(scheduler.Admit(std::move(sequence)), absl::OkStatus());
    }
    most_blocks_used = 0;
    fits.clear();
    while (!scheduler.empty()) {
      const Batch& batch = scheduler.Schedule(absl::UnixEpoch());
      const std::span<const float> rows = model_->Forward(batch, *cache_).value();
      fits.insert(fits.end(), model_->fits().begin(), model_->fits().end());
      for (const BatchEntry& entry : batch.entries) {
        const auto mine = rows.subspan(entry.first_logit * vocab(), entry.logits * vocab());
        std::vector<float>& all = logits[entry.sequence->id() - 1];
        all.insert(all.end(), mine.begin(), mine.end());
      }
      most_blocks_used = std::max(most_blocks_used, scheduler.stats().blocks_used);
      scheduler.Commit(batch, std::vector<TokenId>(batch.entries.size(), 0));
      EXPECT_EQ(scheduler.CheckInvariants(), absl::OkStatus());
      for (const BatchEntry& entry : batch.entries) {
        if (entry.sequence->position() == entry.sequence->prompt_tokens())
          scheduler.Finish(entry.sequence, FinishReason::kLength);
      }
      scheduler.TakeFinished();
    }
    for (size_t i = 0; i < prompts.size(); ++i) EXPECT_EQ(logits[i].size(), prompts[i].size() * vocab());
    return logits;
  }

  // Of the last Logits.
  int64_t most_blocks_used = 0;
  std::vector<PrincipalFitReport> fits;

 private:
  static constexpr int kMaxPositions = 4096;

  void Load(std::unique_ptr<Backend> backend, const std::string& model_dir, KvFormat format,
            bool exact_blocks, std::optional<DType> weight_dtype) {
    backend_ = std::move(backend);
    ModelLimits limits;
    limits.max_batch_rows = kMaxRows;
    limits.max_logit_rows = kMaxRows;
    limits.max_batch_entries = 8;
    model_ = LlamaModel::Load(model_dir, backend_.get(), limits, nullptr, weight_dtype).value();
    KvCache::Shape shape = model_->cache_shape();
    shape.format = format;
    shape.compressible = true;
    CompressionSettings smallest;  // so that plans of any bits can be tried
    smallest.bits = 4;
    shape.block_bytes = CompressedBlockBytes(smallest, shape.format, shape.block_tokens, shape.head_dim);
    if (exact_blocks) shape.block_bytes = KvPage(format, shape.block_tokens, shape.head_dim, false).bytes();
    cache_ = std::make_unique<KvCache>(KvCache::Create(backend_.get(), shape, 64 << 20).value());
  }

  SchedulerOptions Options(int chunk_tokens) const {
    SchedulerOptions options;
    options.max_batch_tokens = kMaxRows;
    options.max_prefill_chunk_tokens = chunk_tokens;
    options.max_running_sequences = 8;
    options.max_logit_rows = kMaxRows;
    options.max_positions = kMaxPositions;
    options.layers = config().layers;
    options.kv_heads = config().kv_heads;
    options.block_tokens = cache_->shape().block_tokens;
    options.num_blocks = cache_->num_blocks();
    options.compressible = true;
    return options;
  }

  std::unique_ptr<Backend> backend_;
  std::unique_ptr<LlamaModel> model_;
  std::unique_ptr<KvCache> cache_;
};

}  // namespace atp

#endif  // ATP_TESTS_ENGINE_PLANNED_RUNNER_H_
