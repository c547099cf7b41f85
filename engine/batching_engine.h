// The engine that runs a model: one thread owns the scheduler, the sampler and the KV cache, and repeats
// three calls — Schedule, Forward, Commit. See engine/README.md.
#ifndef ATP_ENGINE_BATCHING_ENGINE_H_
#define ATP_ENGINE_BATCHING_ENGINE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/answer_stream.h"
#include "engine/compression_plan.h"
#include "engine/compression_plans.h"
#include "engine/engine.h"
#include "engine/kv_cache.h"
#include "engine/llama_model.h"
#include "engine/request_queue.h"
#include "engine/sampler.h"
#include "engine/scheduler.h"
#include "engine/tokenizer.h"

namespace atp {

struct BatchingEngineOptions {
  size_t kv_memory_bytes = 0;
  int block_tokens = 16;
  KvFormat kv_format = KvFormat::kF32;
  bool prefix_cache = true;
  int max_batch_tokens = 512;  // each of these is cut to what ModelLimits can take
  int max_prefill_chunk_tokens = 256;
  int max_running_sequences = 64;
  int max_waiting_requests = 1024;
  std::vector<TokenId> eos_token_ids;  // end an answer, unless it ignores them
  CompressionSettings compression;     // of requests that bring no override; the defaults compress nothing
  CompressionPlans::SettingsOf override_settings;  // of the others; null: they are refused
  // Called once, on the engine's thread, when the device is lost: all requests have ended then, and no new
  // one is taken. Must not block. May be null.
  std::function<void()> on_device_lost;
};

class BatchingEngine : public Engine {
 public:
  // `backend`, `model`, `tokenizer` and `observer` outlive the engine, which is the only user of model and
  // backend. `tokenizer` null: answers are tokens without text, and stop strings are refused. `observer` may
  // be null. Fails as KvCache::Create does.
  static absl::StatusOr<std::unique_ptr<BatchingEngine>> Create(Backend* backend, LlamaModel* model,
                                                                const Tokenizer* tokenizer,
                                                                const BatchingEngineOptions& options,
                                                                EngineObserver* observer);
  // Ends whatever still runs with kShutdown.
  ~BatchingEngine() override;

  absl::StatusOr<RequestId> Submit(Request request, std::shared_ptr<OutputSink> sink) override;
  int MaxNewTokens(int prompt_tokens, const std::optional<CompressionOverride>& compression) override;
  void Cancel(RequestId id) override { queue_.Cancel(id); }
  absl::Status Drain(absl::Duration timeout) override { return queue_.Drain(timeout); }
  EngineStats Stats() const override;
  absl::Duration RetryAfter() const override { return queue_.RetryAfter(); }

  const KvCache& kv_cache() const { return kv_cache_; }
  const CompressionPlan* plan() const { return plans_.own().get(); }  // without an override; null: exact
  int max_context_tokens() const { return max_positions_; }           // prompt and answer together

 private:
  BatchingEngine(LlamaModel* model, const Tokenizer* tokenizer, const BatchingEngineOptions& options,
                 EngineObserver* observer, KvCache kv_cache, const CompressionShape& shape,
                 std::shared_ptr<const CompressionPlan> plan);

  // What the engine thread does.
  void Run();
  bool TakeIntake();  // false: stop
  void Start(Submission submission);
  void Step();
  void AskForTokens(const Batch& batch);
  std::span<const TokenId> TakeTokens(const Batch& batch);
  void Deliver(const Batch& batch, absl::Time now);
  void Fail(const absl::Status& status);
  void EmitFinished(const std::string& error = "");  // `error`: what kError answers say
  void EmitFinish(AnswerStream* stream, FinishReason reason, std::string message, Usage usage);
  Usage CacheUsage(const CompressionPlan* plan, const Request& request, const Sequence::Held& held) const;
  void NoteStarted(const Batch& batch, absl::Time now);
  void Report(const Batch& batch, absl::Duration duration);
  void PublishStats();

  LlamaModel* const model_;
  const Tokenizer* const tokenizer_;
  const std::vector<TokenId> eos_;
  EngineObserver* const observer_;
  std::function<void()> on_device_lost_;  // null once called
  const int vocab_size_;
  const int max_positions_;
  const KvCache kv_cache_;
  CompressionPlans plans_;  // used by front ends' threads

  RequestQueue queue_;  // shared with front ends' threads
  Scheduler
      scheduler_;  // CheckFits, LargestFit and MaxNewTokens from any thread, the rest is the engine thread's
  SampleRows sample_rows_;
  std::vector<std::optional<Sampled>>
      sampled_;                  // [entries] of the step; none where the entry does not sample
  std::vector<TokenId> tokens_;  // [entries] of the step
  RequestQueue::Intake intake_;

  // Snapshot for Stats(), written by the engine thread once a step.
  mutable std::mutex stats_mutex_;
  SchedulerStats stats_;

  std::thread thread_;  // last: it uses everything above
};

}  // namespace atp

#endif  // ATP_ENGINE_BATCHING_ENGINE_H_
