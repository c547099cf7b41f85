// From a configuration to a model that runs: backend, weights, tokenizer, KV cache, engine. Used by all
// commands.
#ifndef ATP_CLI_SERVED_ENGINE_H_
#define ATP_CLI_SERVED_ENGINE_H_

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "cli/compression_choice.h"
#include "config/config.h"
#include "engine/batching_engine.h"
#include "engine/llama_model.h"
#include "engine/tokenizer.h"
#include "kernels/backend.h"
#include "server/chat_template.h"
#include "server/generate_service.h"

namespace atp {

// In the order of construction: what comes later uses what comes first.
struct LoadedModel {
  std::unique_ptr<Backend> backend;
  std::unique_ptr<LlamaModel> model;
  std::unique_ptr<Tokenizer> tokenizer;  // null when the directory has none
  KvFormat kv_format = KvFormat::kF32;
  int max_context_tokens = 0;     // prompt and answer together
  CompressionChoice compression;  // of the engine that was made
};

enum class TokenizerNeed { kRequired, kOptional };

// Steps and sequences as `config.scheduler` has them.
ModelLimits LimitsOf(const SchedulerConfig& scheduler);

// Shows progress. Errors name the file, and what was expected and found.
// `wrap`, where given, puts something around the backend before the model sees it.
using WrapBackend = std::function<std::unique_ptr<Backend>(std::unique_ptr<Backend>)>;
absl::StatusOr<LoadedModel> LoadModel(const Config& config, const ModelLimits& limits, TokenizerNeed need,
                                      const WrapBackend& wrap = {});

// A cache of the model's shape, in the configured element type and blocks; not compressible.
KvCache::Shape KvShapeOf(const Config& config, const LoadedModel& loaded);

// kv_cache.memory_bytes, or kv_cache.memory_fraction of the memory that is left now, at most what
// scheduler.max_running_requests sequences of full length can use.
size_t KvMemoryBytes(const Config& config, const LoadedModel& loaded);
// Bytes of the cache that `sequences` of `tokens` each hold at most.
size_t KvBytes(const KvCacheConfig& config, const LoadedModel& loaded, int64_t sequences, int64_t tokens);

// `loaded` and `observer` (may be null) outlive the engine. Sets loaded->compression. `on_device_lost`: of
// BatchingEngineOptions.
absl::StatusOr<std::unique_ptr<BatchingEngine>> MakeEngine(const Config& config, LoadedModel* loaded,
                                                           EngineObserver* observer,
                                                           std::function<void()> on_device_lost = nullptr);

// A line on the model: dtype, device, KV budget in bytes, blocks and tokens, and the setting that changes it;
// and one on compression: how far, and how many tokens of context fit exact and compressed.
void LogStart(const std::string& name, const std::string& model_dir, const LoadedModel& loaded,
              const BatchingEngine& engine);

// The model as clients see it; its id is model.name, or the directory's name.
// InvalidArgument where the model's own sampling defaults are wanted and wrong.
absl::StatusOr<ServedModel> DescribeModel(const ModelConfig& config, const LoadedModel& loaded);
// model.chat_template; auto: from the model's own template.
absl::StatusOr<ChatTemplate> LoadChatTemplate(const ModelConfig& config);

}  // namespace atp

#endif  // ATP_CLI_SERVED_ENGINE_H_
