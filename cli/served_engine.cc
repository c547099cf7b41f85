#include "cli/served_engine.h"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "cli/load_progress.h"
#include "engine/low_rank.h"
#include "kernels/available_memory.h"
#include "kernels/backend_factory.h"
#include "kernels/kv_page.h"
#include "spdlog/spdlog.h"

namespace atp {
namespace {

KvFormat FormatOf(const KvCacheConfig& config, DType weights) {
  if (config.dtype == "auto") return weights == DType::kF32 ? KvFormat::kF32 : KvFormat::kBF16;
  return *KvFormatFromName(config.dtype);  // Validate() has checked it
}

}  // namespace

ModelLimits LimitsOf(const SchedulerConfig& scheduler) {
  ModelLimits limits;
  limits.max_batch_rows = scheduler.max_batch_tokens;
  limits.max_batch_entries = scheduler.max_running_requests;
  // Each running sequence samples in each step; a few more rows let prompts be scored (echo with logprobs).
  limits.max_logit_rows = std::max(16, scheduler.max_running_requests);
  return limits;
}

absl::StatusOr<LoadedModel> LoadModel(const Config& config, const ModelLimits& limits, TokenizerNeed need,
                                      const WrapBackend& wrap) {
  LoadedModel loaded;
  absl::StatusOr<std::unique_ptr<Backend>> backend =
      MakeBackend({config.backend.device, config.backend.threads, config.backend.cpu_isa,
                   config.model.activation_dtype == "bf16" ? DType::kBF16 : DType::kF32});
  if (!backend.ok()) return backend.status();
  loaded.backend = wrap ? wrap(*std::move(backend)) : *std::move(backend);

  const std::string& path = config.model.path;
  {
    LoadProgressBar bar(path);
    absl::StatusOr<std::unique_ptr<LlamaModel>> model = LlamaModel::Load(
        path, loaded.backend.get(), limits, [&bar](size_t done, size_t total) { bar.Update(done, total); },
        WeightDTypeFromName(config.model.weight_dtype));
    if (!model.ok()) return model.status();
    loaded.model = *std::move(model);
  }
  const LlamaConfig& llama = loaded.model->config();
  if (need == TokenizerNeed::kRequired || HasTokenizer(path)) {
    absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = LoadTokenizer(path, llama.vocab_size);
    if (!tokenizer.ok()) return tokenizer.status();
    loaded.tokenizer = *std::move(tokenizer);
  }
  loaded.kv_format = FormatOf(config.kv_cache, loaded.model->weight_dtype());
  loaded.max_context_tokens = static_cast<int>(
      llama.sliding_window > 0 ? std::min(llama.max_positions, llama.sliding_window) : llama.max_positions);
  return loaded;
}

KvCache::Shape KvShapeOf(const Config& config, const LoadedModel& loaded) {
  KvCache::Shape shape = loaded.model->cache_shape();
  shape.block_tokens = config.kv_cache.block_tokens;
  shape.format = loaded.kv_format;
  return shape;
}

size_t KvBytes(const KvCacheConfig& config, const LoadedModel& loaded, int64_t sequences, int64_t tokens) {
  const LlamaConfig& llama = loaded.model->config();
  const int64_t peak = loaded.compression.peak_blocks;
  const size_t block_bytes =
      peak > 0
          ? CompressedBlockBytes(loaded.compression.settings, loaded.kv_format, config.block_tokens,
                                 llama.head_dim)
          : KvPage(loaded.kv_format, config.block_tokens, llama.head_dim, /*with_log_mass=*/false).bytes();
  const int64_t blocks_per_head = (tokens + config.block_tokens - 1) / config.block_tokens;
  const int64_t exact = blocks_per_head * llama.layers * llama.kv_heads;
  return static_cast<size_t>(sequences * std::max(exact, peak)) * block_bytes;
}

size_t KvMemoryBytes(const Config& config, const LoadedModel& loaded) {
  if (config.kv_cache.memory_bytes > 0) return static_cast<size_t>(config.kv_cache.memory_bytes);
  const size_t on_device = loaded.backend->FreeMemoryBytes();
  const double available = static_cast<double>(on_device > 0 ? on_device : AvailableMemoryBytes());
  const auto share = static_cast<size_t>(available * config.kv_cache.memory_fraction);
  return std::min(share, KvBytes(config.kv_cache, loaded, config.scheduler.max_running_requests,
                                 loaded.max_context_tokens));
}

namespace {

// Which linear layers take low-rank inputs.
void ChooseLinear(LoadedModel* loaded) {
  CompressionSettings& settings = loaded->compression.settings;
  if (settings.linear_rank == 1) return;
  LinearLayersChoice linear =
      ChooseLinearLayers(loaded->model->config(), loaded->model->low_rank_matmul_speed(),
                         settings.linear_rank, settings.segment_tokens);
  settings.linear_layers = linear.layers;
  loaded->compression.linear_layers = std::move(linear.reasons);
}

// Of the largest fits that a request may ask for. (On CUDA such a fit takes what room there is.)
absl::Status ReserveOverrides(const Config& config, CompressionSettings asked, const CompressionShape& shape,
                              LoadedModel* loaded) {
  if (!config.atp.allow_override || config.backend.device == "cuda") return absl::OkStatus();
  asked.head_ratio = {}, asked.head_bits = {};
  asked.ratio = 63.0 / 64;
  const auto plan = MakeCompressionPlan(asked, shape);
  if (!plan.ok() || *plan == nullptr || (*plan)->FittedSegments(loaded->max_context_tokens) == 0)
    return absl::OkStatus();  // such requests are refused, or fit nothing
  const absl::Status reserved = loaded->model->ReserveFits(**plan);
  if (reserved.ok()) return reserved;
  return absl::Status(
      reserved.code(),
      absl::StrCat(reserved.message(), ", or let no request choose (atp.allow_override: false)"));
}

// Fills in what is compressed, and the most blocks that one sequence can hold.
absl::Status PlanCompression(const Config& config, LoadedModel* loaded) {
  const LlamaConfig& model = loaded->model->config();
  absl::StatusOr<CompressionChoice> choice =
      ChooseCompression(config.atp, config.model.path, model, config.kv_cache.block_tokens, loaded->kv_format,
                        /*block_bytes=*/0);
  if (!choice.ok()) return choice.status();
  loaded->compression = *std::move(choice);
  const int context = loaded->max_context_tokens;
  const CompressionShape shape =
      CompressionShapeOf(model, config.kv_cache.block_tokens, loaded->kv_format, context);
  absl::StatusOr<std::shared_ptr<const CompressionPlan>> plan =
      MakeCompressionPlan(loaded->compression.settings, shape);
  if (!plan.ok()) return plan.status();
  if (absl::Status s = ReserveOverrides(config, loaded->compression.settings, shape, loaded); !s.ok())
    return s;
  const int fitted = *plan == nullptr ? 0 : (*plan)->FittedSegments(context);
  if (fitted > 0) {
    loaded->compression.peak_blocks = (*plan)->PeakBlocks(0, context, fitted);
    if (absl::Status reserved = loaded->model->ReserveFits(**plan); !reserved.ok()) return reserved;
  } else {
    const CompressionSettings asked = std::exchange(loaded->compression.settings, {});
    // Nothing is spent on what never happens.
    loaded->compression.settings.segment_tokens = asked.segment_tokens;
    loaded->compression.settings.linear_rank = asked.linear_rank;
  }
  ChooseLinear(loaded);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<BatchingEngine>> MakeEngine(const Config& config, LoadedModel* loaded,
                                                           EngineObserver* observer,
                                                           std::function<void()> on_device_lost) {
  if (absl::Status s = PlanCompression(config, loaded); !s.ok()) return s;
  BatchingEngineOptions options;
  options.on_device_lost = std::move(on_device_lost);
  options.kv_memory_bytes = KvMemoryBytes(config, *loaded);
  options.block_tokens = config.kv_cache.block_tokens;
  options.kv_format = loaded->kv_format;
  options.prefix_cache = config.kv_cache.prefix_cache;
  options.compression = loaded->compression.settings;
  options.override_settings =
      OverrideSettings(config, loaded->model->config(), loaded->kv_format, loaded->compression);
  options.max_batch_tokens = config.scheduler.max_batch_tokens;
  options.max_prefill_chunk_tokens = config.scheduler.max_prefill_chunk_tokens;
  options.max_running_sequences = config.scheduler.max_running_requests;
  options.max_waiting_requests = config.scheduler.max_waiting_requests;
  options.eos_token_ids =
      loaded->tokenizer != nullptr ? loaded->tokenizer->special().eos : loaded->model->config().eos_token_ids;
  return BatchingEngine::Create(loaded->backend.get(), loaded->model.get(), loaded->tokenizer.get(), options,
                                observer);
}

namespace {

// Tokens that the pool holds as sequences of `context` tokens each.
int64_t CompressedTokens(const BatchingEngine& engine, int64_t peak_blocks, int context) {
  return static_cast<int64_t>(static_cast<double>(engine.kv_cache().num_blocks()) /
                              static_cast<double>(peak_blocks) * context);
}

void LogCompression(const std::string& model_dir, const LoadedModel& loaded, const BatchingEngine& engine) {
  const CompressionChoice& choice = loaded.compression;
  const bool compresses = engine.plan() != nullptr && engine.plan()->compresses();
  if (!choice.linear_layers.empty()) {
    spdlog::info("linear_rank={:g} segment_tokens={} layers=\"{}\"", choice.settings.linear_rank,
                 choice.settings.segment_tokens, choice.linear_layers);
  }
  if (!compresses && !choice.exact()) {
    spdlog::info(
        "atp={} ratio={:g} kv_tokens_exact={} context_tokens={} note=\"nothing is ever compressed: no "
        "sequence is "
        "longer than atp.segment_tokens and atp.window_tokens\"",
        choice.preset, choice.ratio, engine.kv_cache().token_capacity(), loaded.max_context_tokens);
    return;
  }
  if (!compresses) {
    spdlog::info(
        "atp=exact kv_tokens_exact={} calibrate_with=\"atp calibrate --model {} --text FILE --bytes {:g}\"",
        engine.kv_cache().token_capacity(), model_dir, BudgetOf("balanced").share);
    return;
  }
  const CompressionSettings& settings = choice.settings;
  spdlog::info(
      "atp={} ratio={:g} bits={} budgets={} segment_tokens={} window_tokens={} max_principal_keys={} "
      "kv_tokens_exact={} "
      "kv_tokens_compressed={} context_tokens={}",
      choice.preset, choice.ratio, settings.head_bits.empty() ? absl::StrCat(settings.bits) : "per_head",
      choice.budgets_file.empty() ? "uniform" : choice.budgets_file, settings.segment_tokens,
      settings.window_tokens, settings.max_principal_keys, engine.kv_cache().token_capacity(),
      CompressedTokens(engine, choice.peak_blocks, loaded.max_context_tokens), loaded.max_context_tokens);
  const double share =
      choice.preset == "ratio" ? choice.ratio * settings.bits / 16 : BudgetOf(choice.preset).share;
  if (choice.budgets_file.empty() && share < 1) {
    spdlog::warn(
        "all kv heads are compressed alike, which loses recall on many models: run atp calibrate --model {} "
        "--text "
        "FILE --bytes {:g}",
        model_dir, share);
  }
}

}  // namespace

void LogStart(const std::string& name, const std::string& model_dir, const LoadedModel& loaded,
              const BatchingEngine& engine) {
  const EngineStats stats = engine.Stats();
  spdlog::info(
      "model={} dtype={} weight_bytes={} activation_bytes={} device=\"{}\" kv_dtype={} kv_bytes={} "
      "kv_blocks={} "
      "kv_tokens={} change_with=kv_cache.memory_bytes",
      name, Name(loaded.model->weight_dtype()), loaded.model->weight_bytes(),
      loaded.model->activation_bytes(), loaded.backend->Description(), Name(loaded.kv_format),
      static_cast<size_t>(stats.kv_blocks_total) * stats.kv_block_bytes, stats.kv_blocks_total,
      stats.kv_tokens_capacity);
  LogCompression(model_dir, loaded, engine);
  if (stats.kv_tokens_capacity < loaded.max_context_tokens) {
    spdlog::warn(
        "the KV cache holds {} tokens, less than one sequence of {}: raise kv_cache.memory_bytes to {}",
        stats.kv_tokens_capacity, loaded.max_context_tokens,
        stats.kv_block_bytes * static_cast<size_t>(engine.kv_cache().shape().heads_total()) *
            static_cast<size_t>((loaded.max_context_tokens + engine.kv_cache().shape().block_tokens - 1) /
                                engine.kv_cache().shape().block_tokens));
  }
}

namespace {

std::string ServedName(const ModelConfig& config) {
  if (!config.name.empty()) return config.name;
  std::error_code error;
  // lexically_normal of "models/default/" ends in an empty name; "." needs the absolute path.
  std::filesystem::path path = std::filesystem::absolute(config.path, error).lexically_normal();
  if (!path.has_filename()) path = path.parent_path();
  const std::string name = (path.extension() == ".gguf" ? path.stem() : path.filename()).string();
  return name.empty() ? "model" : name;
}

}  // namespace

absl::StatusOr<ServedModel> DescribeModel(const ModelConfig& config, const LoadedModel& loaded) {
  ServedModel model;
  model.id = ServedName(config);
  model.created_unix_seconds = absl::ToUnixSeconds(absl::Now());
  model.max_context_tokens = loaded.max_context_tokens;
  model.vocab_size = static_cast<int>(loaded.model->config().vocab_size);
  model.device = loaded.backend->Description();
  if (config.generation_config == "auto") {
    const absl::StatusOr<SamplingParams>& sampling = loaded.model->config().sampling;
    if (!sampling.ok()) {
      return absl::InvalidArgumentError(absl::StrCat(
          sampling.status().message(), "; correct it, or leave it out with model.generation_config=ignore"));
    }
    model.sampling = *sampling;
  }
  return model;
}

absl::StatusOr<ChatTemplate> LoadChatTemplate(const ModelConfig& config) {
  if (config.chat_template != "auto") return ChatTemplate::Create(config.chat_template);
  absl::StatusOr<std::string> jinja = LoadChatTemplateText(config.path);
  if (!jinja.ok()) return jinja.status();
  return ChatTemplate::Detect(*jinja);
}

}  // namespace atp
