// The forward pass of Llama-family models over a paged KV cache: a list of ops, the same for every backend.
#ifndef ATP_ENGINE_LLAMA_MODEL_H_
#define ATP_ENGINE_LLAMA_MODEL_H_

#include <memory>
#include <optional>
#include <span>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/batch.h"
#include "engine/compression_plan.h"
#include "engine/kv_cache.h"
#include "engine/llama_config.h"
#include "engine/llama_weights.h"
#include "engine/principal_compactor.h"
#include "kernels/backend.h"

namespace atp {

struct ModelLimits {
  int max_batch_rows = 512;     // tokens per step
  int max_logit_rows = 64;      // rows of logits per step
  int max_batch_entries = 256;  // sequences per step
};

class LlamaModel {
 public:
  // Loads configuration and weights; `backend` outlives the model. Allocates all activations for `limits`.
  // `model` and `weight_dtype` as in LoadLlamaWeights().
  static absl::StatusOr<std::unique_ptr<LlamaModel>> Load(const std::string& model, Backend* backend,
                                                          const ModelLimits& limits,
                                                          const LoadProgress& progress,
                                                          std::optional<DType> weight_dtype = std::nullopt);
  ~LlamaModel();

  const LlamaConfig& config() const { return config_; }
  const ModelLimits& limits() const { return limits_; }
  DType weight_dtype() const { return weights_.dtype; }
  // A cache's, as far as the model decides it: layers, kv heads, head_dim.
  KvCache::Shape cache_shape() const {
    KvCache::Shape shape;
    shape.layers = config_.layers;
    shape.kv_heads = config_.kv_heads;
    shape.head_dim = config_.head_dim;
    return shape;
  }
  size_t weight_bytes() const { return weights_.bytes; }
  size_t activation_bytes() const { return activation_bytes_; }

  // Takes memory for batches with low-rank segments of up to this many rows; needed before the first of them.
  // A start-up call. ResourceExhausted names the bytes; FailedPrecondition: the backend has no such ops.
  absl::Status ReserveLowRank(int segment_tokens);
  // Takes memory for the fits of sequences with this plan: a start-up call, for what would else be taken by
  // the first of them. ResourceExhausted names the bytes.
  absl::Status ReserveFits(const CompressionPlan& plan);
  // How the backend's products with this model's weights compare: Backend::LowRankMatMulSpeed().
  double low_rank_matmul_speed() const { return backend_->LowRankMatMulSpeed(weights_.dtype); }

  // Runs the batch, writing its keys and values to `kv_cache`. Returns host logits [batch.logit_rows.size(),
  // vocab_size], valid until the next call. Fails only when the device does.
  absl::StatusOr<std::span<const float>> Forward(const Batch& batch, const KvCache& kv_cache);
  // The same, and samples where the logits are, which stay there: `rows` are of them, `sampled` has one for
  // each.
  absl::Status Forward(const Batch& batch, const KvCache& kv_cache, std::span<const SampleRow> rows,
                       std::span<SampledRow> sampled);

  // What the last Forward compressed: a report for each fit of a kv head, and the time they took in all (of
  // the host, so it means little on an asynchronous device).
  std::span<const PrincipalFitReport> fits() const { return compactor_.reports(); }
  absl::Duration fit_time() const { return fit_time_; }

 private:
  struct Activations;
  LlamaModel(LlamaConfig config, LlamaWeights weights, Backend* backend, const ModelLimits& limits);
  absl::Status AllocateActivations();
  absl::Status ReserveScratch();
  absl::Status Reserve(Buffer* buffer, int64_t rows, int64_t cols);
  struct Linear;
  template <class Maker>
  void RunLinear(const Batch& batch, LinearLayers layers, const Maker& maker,
                 std::span<const Linear> linears);
  void BeginStep(const Batch& batch, const KvCache& kv_cache);
  void ComputeLogits(const Batch& batch, const KvCache& kv_cache);
  void FitPrincipalKeys(const KvCache& kv_cache);

  LlamaConfig config_;
  LlamaWeights weights_;
  Backend* backend_;
  ModelLimits limits_;
  size_t activation_bytes_ = 0;
  std::unique_ptr<Activations> activations_;
  PrincipalCompactor compactor_;
  absl::Duration fit_time_;
};

}  // namespace atp

#endif  // ATP_ENGINE_LLAMA_MODEL_H_
