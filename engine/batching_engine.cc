#include "engine/batching_engine.h"

#include <pthread.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace atp {
namespace {

int MaxPositions(const LlamaConfig& config) {
  // A window smaller than the positions is not implemented as such: the model is served up to it.
  const int64_t positions = config.sliding_window > 0 ? std::min(config.max_positions, config.sliding_window)
                                                      : config.max_positions;
  return static_cast<int>(positions);
}

void SetSteps(const BatchingEngineOptions& options, const ModelLimits& limits, SchedulerOptions* out) {
  out->max_batch_tokens = std::min(options.max_batch_tokens, limits.max_batch_rows);
  out->max_prefill_chunk_tokens = options.max_prefill_chunk_tokens;
  out->max_running_sequences = std::min(options.max_running_sequences, limits.max_batch_entries);
  out->max_logit_rows = limits.max_logit_rows;
}

SchedulerOptions MakeSchedulerOptions(const BatchingEngineOptions& options, const ModelLimits& limits,
                                      const KvCache& kv_cache, int max_positions) {
  SchedulerOptions out;
  SetSteps(options, limits, &out);
  out.prefix_cache = options.prefix_cache;
  out.max_positions = max_positions;
  out.layers = kv_cache.shape().layers;
  out.kv_heads = kv_cache.shape().kv_heads;
  out.block_tokens = kv_cache.shape().block_tokens;
  out.num_blocks = kv_cache.num_blocks();
  out.compressible = kv_cache.shape().compressible;
  return out;
}

// Low-rank inputs need whole segments: where a step may have no room for one they are left out, of the
// engine's settings and of those that requests bring.
absl::Status PlanLowRank(LlamaModel* model, BatchingEngineOptions* options) {
  if (!HasLowRank(options->compression)) return absl::OkStatus();
  SchedulerOptions steps;
  SetSteps(*options, model->limits(), &steps);
  const int longest = Scheduler::LongestSegment(steps), segment = options->compression.segment_tokens;
  if (segment <= longest) return model->ReserveLowRank(segment);
  spdlog::warn(
      "atp.linear_rank is not used: segments of {} tokens (atp.segment_tokens) are longer than the {} that a "
      "step always has room for; raise scheduler.max_batch_tokens and scheduler.max_prefill_chunk_tokens",
      segment, longest);
  options->compression.linear_rank = 1;
  if (options->override_settings == nullptr) return absl::OkStatus();
  options->override_settings = [inner = options->override_settings](
                                   const CompressionOverride& wanted) -> absl::StatusOr<CompressionSettings> {
    absl::StatusOr<CompressionSettings> settings = inner(wanted);
    if (settings.ok()) settings->linear_rank = 1;
    return settings;
  };
  return absl::OkStatus();
}

// Whether the entry's rows reach its sequence's last known token, so that the next one is drawn.
bool Samples(const BatchEntry& entry) {
  return entry.sequence->position() + entry.rows >= entry.sequence->total_tokens();
}

bool ScoresPrompt(const BatchEntry& entry) {
  const Sequence& sequence = *entry.sequence;
  return sequence.scores_prompt() && sequence.scored_tokens() < sequence.prompt_tokens() && entry.logits > 0;
}

// Of the entry's first row with logits.
int FirstPosition(const Batch& batch, const BatchEntry& entry) {
  return batch.positions[static_cast<size_t>(batch.logit_rows[static_cast<size_t>(entry.first_logit)])];
}

// Of the entry's rows of logits, those that judge a token of its prompt, the one behind them.
int ScoredRows(const Batch& batch, const BatchEntry& entry) {
  if (!ScoresPrompt(entry)) return 0;
  return std::min(entry.logits, entry.sequence->prompt_tokens() - 1 - FirstPosition(batch, entry));
}

}  // namespace

absl::StatusOr<std::unique_ptr<BatchingEngine>> BatchingEngine::Create(Backend* backend, LlamaModel* model,
                                                                       const Tokenizer* tokenizer,
                                                                       const BatchingEngineOptions& wanted,
                                                                       EngineObserver* observer) {
  BatchingEngineOptions options = wanted;
  if (absl::Status s = PlanLowRank(model, &options); !s.ok()) return s;
  const LlamaConfig& config = model->config();
  KvCache::Shape shape = model->cache_shape();
  shape.block_tokens = options.block_tokens;
  shape.format = options.kv_format;
  // Blocks are made for the engine's own plan: that others may be asked for costs nobody a byte.
  const bool compresses = Compresses(options.compression);
  shape.compressible = compresses || options.override_settings != nullptr;
  shape.block_bytes =
      compresses ? CompressedBlockBytes(options.compression, shape.format, shape.block_tokens, shape.head_dim)
                 : KvPage(shape.format, shape.block_tokens, shape.head_dim, /*with_log_mass=*/false).bytes();
  absl::StatusOr<KvCache> kv_cache = KvCache::Create(backend, shape, options.kv_memory_bytes);
  if (!kv_cache.ok()) return kv_cache.status();
  CompressionShape compression;
  compression.layers = config.layers;
  compression.heads = config.heads;
  compression.kv_heads = config.kv_heads;
  compression.head_dim = config.head_dim;
  compression.format = options.kv_format;
  compression.block_tokens = options.block_tokens;
  compression.query_blocks_per_head = kv_cache->query_page().blocks_per_head();
  compression.max_positions = MaxPositions(config);
  compression.block_bytes = kv_cache->block_bytes();
  absl::StatusOr<std::shared_ptr<const CompressionPlan>> plan =
      MakeCompressionPlan(options.compression, compression);
  if (!plan.ok()) return plan.status();
  return std::unique_ptr<BatchingEngine>(new BatchingEngine(
      model, tokenizer, options, observer, *std::move(kv_cache), compression, *std::move(plan)));
}

BatchingEngine::BatchingEngine(LlamaModel* model, const Tokenizer* tokenizer,
                               const BatchingEngineOptions& options, EngineObserver* observer,
                               KvCache kv_cache, const CompressionShape& shape,
                               std::shared_ptr<const CompressionPlan> plan)
    : model_(model),
      tokenizer_(tokenizer),
      eos_(options.eos_token_ids),
      observer_(observer),
      on_device_lost_(options.on_device_lost),
      vocab_size_(static_cast<int>(model->config().vocab_size)),
      max_positions_(MaxPositions(model->config())),
      kv_cache_(std::move(kv_cache)),
      plans_(std::move(plan), shape, options.override_settings),
      queue_(options.max_waiting_requests,
             int64_t{options.max_waiting_requests} + options.max_running_sequences),
      scheduler_(MakeSchedulerOptions(options, model->limits(), kv_cache_, max_positions_)),
      sample_rows_(vocab_size_),
      thread_([this] { Run(); }) {}

BatchingEngine::~BatchingEngine() {
  queue_.Stop();
  thread_.join();
}

// ---- any thread ----

absl::StatusOr<RequestId> BatchingEngine::Submit(Request request, std::shared_ptr<OutputSink> sink) {
  if (absl::Status s = ValidateSampling(request.sampling, vocab_size_); !s.ok()) return s;
  if (request.prompt.empty())
    return absl::InvalidArgumentError("prompt: it has no tokens; give it one at least");
  for (TokenId token : request.prompt) {
    if (token >= 0 && token < vocab_size_) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("prompt: has token id ", token, "; ids of this model are 0 to ", vocab_size_ - 1));
  }
  if (tokenizer_ == nullptr && !request.sampling.stop.empty()) {
    return absl::InvalidArgumentError(
        "stop: this model has no tokenizer, so stop strings cannot be found; "
        "use stop_token_ids");
  }
  absl::StatusOr<std::shared_ptr<const CompressionPlan>> plan = plans_.For(request.compression);
  if (!plan.ok()) return plan.status();
  const int prompt_tokens =
      static_cast<int>(std::min<size_t>(request.prompt.size(), std::numeric_limits<int>::max()));
  if (absl::Status s = scheduler_.CheckFits(prompt_tokens, request.sampling.max_tokens, plan->get()); !s.ok())
    return s;
  if (!request.sampling.seed) {
    std::random_device random;
    request.sampling.seed = static_cast<uint64_t>(random()) << 32 | random();
  }
  return queue_.Push(std::move(request), std::move(sink), *std::move(plan));
}

int BatchingEngine::MaxNewTokens(int prompt_tokens, const std::optional<CompressionOverride>& compression) {
  const absl::StatusOr<std::shared_ptr<const CompressionPlan>> plan = plans_.For(compression);
  return scheduler_.LargestFit(prompt_tokens, plan.ok() ? plan->get() : nullptr);
}

EngineStats BatchingEngine::Stats() const {
  EngineStats stats;
  stats.kv_blocks_total = kv_cache_.num_blocks();
  stats.kv_block_bytes = kv_cache_.block_bytes();
  stats.kv_tokens_capacity = kv_cache_.token_capacity();
  const int active = queue_.active();
  const std::lock_guard<std::mutex> lock(stats_mutex_);
  stats.requests_running = std::min(stats_.running_requests, active);  // some may have ended since
  stats.requests_waiting = active - stats.requests_running;
  stats.kv_blocks_used = stats_.blocks_used;
  stats.kv_blocks_cached = stats_.blocks_cached;
  stats.preemptions_total = stats_.preemptions;
  stats.prefix_cache_queries_tokens_total = stats_.prefix_queries_tokens;
  stats.prefix_cache_hits_tokens_total = stats_.prefix_hits_tokens;
  stats.kv_exact_blocks = stats_.exact_blocks;
  stats.kv_principal_blocks = stats_.principal_blocks;
  stats.kv_query_blocks = stats_.query_blocks;
  stats.kv_exact_entries = stats_.exact_entries;
  stats.kv_principal_entries = stats_.principal_entries;
  stats.kv_tokens_compressed = stats_.tokens_compressed;
  stats.kv_bytes_saved = stats_.blocks_saved * static_cast<int64_t>(kv_cache_.block_bytes());
  stats.tokens_compressed_total = stats_.tokens_closed;
  stats.segments_compressed_total = stats_.segments_closed;
  return stats;
}

// ---- the engine's thread ----

void BatchingEngine::Run() {
  pthread_setname_np(pthread_self(), "atp-engine");
  while (TakeIntake()) Step();
}

bool BatchingEngine::TakeIntake() {
  queue_.Take(/*wait=*/scheduler_.empty(), absl::InfiniteFuture(), &intake_);
  for (Submission& submission : intake_.submissions) Start(std::move(submission));
  for (RequestId id : intake_.cancels) scheduler_.Cancel(id);
  if (intake_.end_all) scheduler_.FinishAll(FinishReason::kShutdown);
  EmitFinished();
  return !intake_.stop;
}

void BatchingEngine::Start(Submission submission) {
  const std::shared_ptr<const CompressionPlan> plan = submission.plan;
  auto active = std::make_shared<ActiveRequest>(std::move(submission));
  const Request& request = *active->request;
  const int max_new_tokens =
      scheduler_.MaxNewTokens(static_cast<int>(request.prompt.size()), request.sampling.max_tokens);
  for (int i = 0; i < request.sampling.n; ++i) {
    auto stream = std::make_unique<AnswerStream>(tokenizer_, eos_, active, i, max_new_tokens);
    const bool scored = request.echo_prompt && request.sampling.logprobs.has_value();
    if (request.echo_prompt && !scored) stream->SendPrompt();
    if (max_new_tokens == 0 && !scored) {
      EmitFinish(stream.get(), FinishReason::kLength, "", CacheUsage(plan.get(), request, {}));
      continue;
    }
    const absl::Status admitted = scheduler_.Admit(
        std::make_unique<Sequence>(active->id, active->request, i, max_new_tokens, std::move(stream), plan));
    if (!admitted.ok()) {
      // Submit asked the same question of the same constants.
      spdlog::critical("event=bug what=\"an accepted request does not fit\" request={} status=\"{}\"",
                       active->id, admitted.ToString());
      std::abort();
    }
  }
}

// One step, read aloud.
void BatchingEngine::Step() {
  const absl::Time begin = absl::Now();
  const Batch& batch = scheduler_.Schedule(begin);
  PublishStats();
  EmitFinished();  // whose deadline has passed
  if (batch.empty()) return;
  NoteStarted(batch, begin);
  AskForTokens(batch);
  const absl::Status computed =
      model_->Forward(batch, kv_cache_, sample_rows_.rows(), sample_rows_.sampled());
  if (!computed.ok()) return Fail(computed);
  scheduler_.Commit(batch, TakeTokens(batch));

  const absl::Time end = absl::Now();
  Report(batch, end - begin);
  Deliver(batch, end);
  EmitFinished();
}

void BatchingEngine::NoteStarted(const Batch& batch, absl::Time now) {
  for (const BatchEntry& entry : batch.entries) {
    ActiveRequest& active = entry.sequence->stream()->active();
    if (active.started) continue;
    active.started = now;
    queue_.NoteStarted();
    if (observer_ != nullptr) observer_->OnStarted(now - active.submitted);
  }
}

// What the entries want of their rows of logits, in order: TakeTokens goes the same way.
void BatchingEngine::AskForTokens(const Batch& batch) {
  sample_rows_.Clear();
  for (const BatchEntry& entry : batch.entries) {
    const Sequence& sequence = *entry.sequence;
    AnswerStream& stream = *sequence.stream();
    const int scored = ScoredRows(batch, entry);
    for (int i = 0; i < scored; ++i) {
      const auto token = static_cast<size_t>(FirstPosition(batch, entry) + i + 1);
      sample_rows_.Score(entry.first_logit + i, sequence.prompt()[token], *stream.sampling().logprobs);
    }
    if (!Samples(entry)) continue;
    SampleContext context;
    context.params = &stream.sampling();
    context.seed = stream.seed();
    context.prompt = stream.active().prompt_tokens;
    context.generated = sequence.generated();
    context.forbidden = stream.forbidden();
    sample_rows_.Draw(entry.first_logit + entry.logits - 1, context);
  }
}

// Returns a token per entry; entries that end before their sequence's last known token have none (and Commit
// does not look).
std::span<const TokenId> BatchingEngine::TakeTokens(const Batch& batch) {
  sampled_.assign(batch.entries.size(), std::nullopt);
  tokens_.assign(batch.entries.size(), 0);
  size_t row = 0;
  for (size_t i = 0; i < batch.entries.size(); ++i) {
    const BatchEntry& entry = batch.entries[i];
    AnswerStream& stream = *entry.sequence->stream();
    const int scored = ScoredRows(batch, entry);
    for (int j = 0; j < scored; ++j) stream.AddPromptLogprob(*sample_rows_.Result(row++).logprob);
    if (ScoresPrompt(entry) && scored < entry.logits) stream.SendPrompt();
    if (!Samples(entry)) continue;
    sampled_[i] = sample_rows_.Result(row++);
    tokens_[i] = sampled_[i]->token;
  }
  return tokens_;
}

void BatchingEngine::Deliver(const Batch& batch, absl::Time now) {
  for (size_t i = 0; i < batch.entries.size(); ++i) {
    if (!sampled_[i]) continue;
    Sequence* sequence = batch.entries[i].sequence;
    if (sequence->max_new_tokens() == 0) {  // only its prompt was asked for
      scheduler_.Finish(sequence, FinishReason::kLength);
      continue;
    }
    AnswerStream& stream = *sequence->stream();
    if (observer_ != nullptr && stream.last_token_time()) {
      observer_->OnInterTokenLatency(now - *stream.last_token_time());
    }
    const ActiveRequest& active = stream.active();
    if (observer_ != nullptr && !active.first_token) observer_->OnFirstToken(now - active.submitted);
    const std::optional<FinishReason> end = stream.Append(*std::move(sampled_[i]), now);
    if (end) scheduler_.Finish(sequence, *end);
  }
}

void BatchingEngine::Fail(const absl::Status& status) {
  spdlog::error("event=device_failed requests={} status=\"{}\"", queue_.active() - queue_.waiting(),
                status.ToString());
  const bool lost = absl::IsUnavailable(status);
  const std::string error = absl::StrCat("the device failed: ", status.message());
  if (lost) {
    queue_.Close(error);
    scheduler_.FinishAll(FinishReason::kError);
  } else {
    scheduler_.FinishRunning(FinishReason::kError);
  }
  scheduler_.DropPrefixCache();  // nobody knows what was written
  EmitFinished(error);
  if (lost && on_device_lost_ != nullptr) std::exchange(on_device_lost_, nullptr)();
}

void BatchingEngine::EmitFinished(const std::string& error) {
  const std::vector<std::unique_ptr<Sequence>> finished = scheduler_.TakeFinished();
  if (finished.empty()) return;
  PublishStats();  // before the callers hear of it, so that the blocks they waited for are seen to be free
  for (const std::unique_ptr<Sequence>& sequence : finished) {
    const FinishReason reason = sequence->finish_reason();
    std::string message;
    if (reason == FinishReason::kShutdown) message = "the server shut down before the answer was whole";
    if (reason == FinishReason::kError) message = error;
    Usage usage = CacheUsage(sequence->plan(), sequence->request(), sequence->held());
    usage.cached_tokens = sequence->cached_tokens();
    EmitFinish(sequence->stream(), reason, std::move(message), std::move(usage));
  }
}

// What an answer is told about its cache. `held`: all zero when it never ran.
Usage BatchingEngine::CacheUsage(const CompressionPlan* plan, const Request& request,
                                 const Sequence::Held& held) const {
  const KvCache::Shape& shape = kv_cache_.shape();
  const int64_t heads = shape.heads_total();
  const KvPage exact(shape.format, shape.block_tokens, shape.head_dim, /*with_log_mass=*/false);
  const int64_t exact_blocks = (held.tokens + shape.block_tokens - 1) / shape.block_tokens * heads;
  Usage usage;
  CompressionUsage& atp = usage.atp;
  const bool compresses = plan != nullptr && plan->compresses();
  atp.preset = compresses ? plan->settings().preset : "exact";
  if (compresses && request.compression) atp.preset = request.compression->preset.value_or("ratio");
  atp.ratio = compresses ? plan->MeanRatio() : 1;
  atp.bits = compresses ? plan->MeanBits() : BitsOf(shape.format);
  atp.tokens = held.tokens;
  atp.compressed_tokens = held.compressed_tokens;
  atp.entries = (held.entries + heads / 2) / heads;
  atp.kv_bytes = held.blocks * static_cast<int64_t>(kv_cache_.block_bytes());
  atp.exact_kv_bytes = exact_blocks * static_cast<int64_t>(exact.bytes());
  return usage;
}

void BatchingEngine::EmitFinish(AnswerStream* stream, FinishReason reason, std::string message, Usage usage) {
  ActiveRequest& active = stream->active();
  if (!stream->Finish(reason, std::move(message), std::move(usage))) return;
  const RequestReport report = active.Report(reason, absl::Now());
  LogFinished(active, report);
  if (observer_ != nullptr) observer_->OnRequestFinished(report);
  queue_.NoteEnded(active.started.has_value());
}

void BatchingEngine::Report(const Batch& batch, absl::Duration duration) {
  if (observer_ == nullptr) return;
  StepReport report;
  report.sequences = static_cast<int>(batch.entries.size());
  report.duration = duration;
  for (const BatchEntry& entry : batch.entries) {
    // A row that follows the prompt continues a stream; several rows of it are being computed again.
    const bool decode =
        entry.rows == 1 && batch.positions[entry.first_row] >= entry.sequence->prompt_tokens();
    (decode ? report.decode_tokens : report.prefill_tokens) += entry.rows;
  }
  report.fits = model_->fits();
  report.fit_time = model_->fit_time();
  observer_->OnStep(report);
}

void BatchingEngine::PublishStats() {
  const SchedulerStats stats = scheduler_.stats();
  const std::lock_guard<std::mutex> lock(stats_mutex_);
  stats_ = stats;
}

}  // namespace atp
