#include "engine/llama_model.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine/block_table.h"
#include "kernels/host_memory.h"

namespace atp {
namespace {

// A batch beyond the limits would write past the activations, so this stays on in release builds.
void Check(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "LlamaModel::Forward: broken precondition: %s\n", what);
  std::abort();
}

void CheckBatch(const Batch& batch, const KvCache& kv_cache, const LlamaConfig& config,
                const ModelLimits& limits, int64_t low_rank_rows) {
  const KvCache::Shape& shape = kv_cache.shape();
  Check(
      shape.layers == config.layers && shape.kv_heads == config.kv_heads && shape.head_dim == config.head_dim,
      "the cache has the model's shape");
  Check(batch.rows() > 0, "at least one row");
  Check(batch.rows() <= limits.max_batch_rows, "rows <= max_batch_rows");
  Check(batch.positions.size() == batch.tokens.size(), "a position for each token");
  Check(batch.logit_rows.size() <= static_cast<size_t>(limits.max_logit_rows),
        "logit rows <= max_logit_rows");
  Check(batch.entries.size() <= static_cast<size_t>(limits.max_batch_entries),
        "entries <= max_batch_entries");
  for (const int32_t token : batch.tokens)
    Check(token >= 0 && token < config.vocab_size, "tokens in the vocabulary");
  for (const int32_t row : batch.logit_rows) Check(row >= 0 && row < batch.rows(), "logit rows in the batch");
  int rows = 0;
  for (const BatchEntry& entry : batch.entries) {
    Check(entry.first_row == rows && entry.rows > 0, "entries cover the rows in order");
    Check(entry.rows <= entry.exact_entries, "exact_entries counts this step's rows");
    Check(entry.exact_entries <= entry.table->exact_blocks() * shape.block_tokens,
          "blocks for all exact entries");
    rows += entry.rows;
    if (entry.low_rank != nullptr) {
      Check(entry.rows == entry.low_rank->segment_tokens() &&
                batch.positions[entry.first_row] % entry.rows == 0 && entry.rows <= low_rank_rows,
            "low rank for whole segments, with memory reserved");
    }
    if (entry.plan == nullptr) continue;
    const int segment = entry.plan->segment_tokens();
    const int first = batch.positions[entry.first_row];
    Check(kv_cache.shape().compressible, "a cache for principal entries");
    Check(first % segment + entry.rows <= segment, "rows of one segment");
    Check(entry.closes_segment == ((first + entry.rows) % segment == 0), "a whole segment closes");
    Check(entry.table->queries().size() == static_cast<size_t>(entry.plan->query_blocks()),
          "blocks for the queries");
  }
  Check(rows == batch.rows(), "every row belongs to an entry");
}

// What makes the x of linear layers.
const float* Made(const RmsNormArgs& args) { return args.y; }
const float* Made(const SwiGluArgs& args) { return args.out; }
void Make(Backend& backend, const RmsNormArgs& args) { backend.RmsNorm(args); }
void Make(Backend& backend, const SwiGluArgs& args) { backend.SwiGlu(args); }
void MakeAndMultiply(Backend& backend, const RmsNormArgs& args, std::span<const MatMulArgs> products) {
  backend.RmsNormAndMatMuls(args, products);
}
void MakeAndMultiply(Backend& backend, const SwiGluArgs& args, std::span<const MatMulArgs> products) {
  backend.SwiGluAndMatMuls(args, products);
}

}  // namespace

struct LlamaModel::Linear {
  const Weight* weight;
  const Weight* bias;
  float* y;  // [rows, out]
  bool accumulate = false;
};

// Device memory that one step needs, for the largest legal step; all fp32, one row per token of the batch.
struct LlamaModel::Activations {
  Buffer hidden;       // [rows, hidden]: the residual stream
  Buffer normed;       // [rows, hidden]
  Buffer query;        // [rows, heads, head_dim]
  Buffer key, value;   // [rows, kv_heads, head_dim]
  Buffer attended;     // [rows, heads, head_dim]
  Buffer gate, up;     // [rows, intermediate]
  Buffer low_left;     // [segment, segment]: of the segment in progress, as the next two
  Buffer low_right;    // [segment, in]
  Buffer low_product;  // [segment, out]
  int64_t low_rank_rows = 0;
  Buffer last;                        // [logit_rows, hidden]
  Buffer logits;                      // [logit_rows, vocab]
  Buffer inverse_frequency;           // [head_dim / 2]
  Buffer host_logits;                 // [logit_rows, vocab]; pages that no step reaches take no memory
  std::vector<KvSequence> sequences;  // scratch: [layers, entries], the batch's entries as ops see them
};

absl::StatusOr<std::unique_ptr<LlamaModel>> LlamaModel::Load(const std::string& model_path, Backend* backend,
                                                             const ModelLimits& limits,
                                                             const LoadProgress& progress,
                                                             std::optional<DType> weight_dtype) {
  Check(limits.max_batch_rows > 0 && limits.max_logit_rows > 0 && limits.max_batch_entries > 0,
        "positive limits");
  absl::StatusOr<LlamaConfig> config = LoadLlamaConfig(model_path);
  if (!config.ok()) return config.status();
  absl::StatusOr<LlamaWeights> weights =
      LoadLlamaWeights(model_path, *config, weight_dtype, backend, progress);
  if (!weights.ok()) return weights.status();
  std::unique_ptr<LlamaModel> model(new LlamaModel(*std::move(config), *std::move(weights), backend, limits));
  if (absl::Status allocated = model->AllocateActivations(); !allocated.ok()) return allocated;
  if (absl::Status synchronized = backend->Synchronize(); !synchronized.ok()) return synchronized;
  return model;
}

LlamaModel::LlamaModel(LlamaConfig config, LlamaWeights weights, Backend* backend, const ModelLimits& limits)
    : config_(std::move(config)),
      weights_(std::move(weights)),
      backend_(backend),
      limits_(limits),
      compactor_(config_.layers, config_.heads, config_.kv_heads) {}

LlamaModel::~LlamaModel() = default;

absl::Status LlamaModel::Reserve(Buffer* buffer, int64_t rows, int64_t cols) {
  const size_t bytes = static_cast<size_t>(rows) * static_cast<size_t>(cols) * sizeof(float);
  absl::StatusOr<Buffer> memory = backend_->Allocate(bytes);
  if (!memory.ok()) {
    return absl::Status(memory.status().code(),
                        absl::StrCat("activations of ", rows, " rows: ", memory.status().message(),
                                     "; lower the tokens per step"));
  }
  *buffer = *std::move(memory);
  activation_bytes_ += bytes;
  return absl::OkStatus();
}

absl::Status LlamaModel::ReserveLowRank(int segment_tokens) {
  Activations& a = *activations_;
  if (segment_tokens <= a.low_rank_rows) return absl::OkStatus();
  if (low_rank_matmul_speed() <= 0)
    return absl::FailedPreconditionError("atp.linear_rank: this device has no low-rank linear layers; set 1");
  const int64_t widest = std::max<int64_t>(
      {config_.hidden_size, config_.intermediate_size, int64_t{config_.heads} * config_.head_dim});
  const absl::Status allocated[] = {Reserve(&a.low_left, segment_tokens, segment_tokens),
                                    Reserve(&a.low_right, segment_tokens, widest),
                                    Reserve(&a.low_product, segment_tokens, widest)};
  for (const absl::Status& s : allocated) {
    if (!s.ok()) return s;
  }
  a.low_rank_rows = segment_tokens;
  return absl::OkStatus();
}

absl::Status LlamaModel::AllocateActivations() {
  activations_ = std::make_unique<Activations>();
  Activations& a = *activations_;
  absl::Status status;
  const auto allocate = [&](Buffer* buffer, int64_t rows, int64_t cols) {
    if (status.ok()) status = Reserve(buffer, rows, cols);
  };
  const int64_t rows = limits_.max_batch_rows;
  const int64_t query_dim = static_cast<int64_t>(config_.heads) * config_.head_dim;
  const int64_t kv_dim = static_cast<int64_t>(config_.kv_heads) * config_.head_dim;
  allocate(&a.hidden, rows, config_.hidden_size);
  allocate(&a.normed, rows, config_.hidden_size);
  allocate(&a.query, rows, query_dim);
  allocate(&a.key, rows, kv_dim);
  allocate(&a.value, rows, kv_dim);
  allocate(&a.attended, rows, query_dim);
  allocate(&a.gate, rows, config_.intermediate_size);
  allocate(&a.up, rows, config_.intermediate_size);
  allocate(&a.last, limits_.max_logit_rows, config_.hidden_size);
  allocate(&a.logits, limits_.max_logit_rows, config_.vocab_size);
  allocate(&a.inverse_frequency, 1, config_.head_dim / 2);
  if (!status.ok()) return status;
  backend_->CopyToDevice(a.inverse_frequency.data(), config_.inverse_frequency.data(),
                         a.inverse_frequency.bytes());
  absl::StatusOr<Buffer> host_logits = AllocateHostMemory(a.logits.bytes());
  if (!host_logits.ok()) return host_logits.status();
  a.host_logits = *std::move(host_logits);
  a.sequences.reserve(static_cast<size_t>(limits_.max_batch_entries) * static_cast<size_t>(config_.layers));
  return ReserveScratch();
}

absl::Status LlamaModel::ReserveScratch() {
  StepLimits step;
  step.rows = limits_.max_batch_rows;
  step.logit_rows = limits_.max_logit_rows;
  step.sequences = limits_.max_batch_entries;
  step.vocab = config_.vocab_size;
  step.widest = std::max<int64_t>(
      {config_.hidden_size, config_.intermediate_size, int64_t{config_.heads} * config_.head_dim});
  step.layers = config_.layers;
  step.heads = config_.heads;
  step.kv_heads = config_.kv_heads;
  step.head_dim = config_.head_dim;
  const absl::Status reserved = backend_->Reserve(step);
  if (reserved.ok()) return reserved;
  return absl::Status(reserved.code(),
                      absl::StrCat("scratch of steps of ", step.rows, " rows, ", step.logit_rows,
                                   " of them with logits: ", reserved.message(),
                                   "; lower the tokens or the sequences per step"));
}

absl::Status LlamaModel::ReserveFits(const CompressionPlan& plan) {
  const CompressionPlan::FitSize fit = plan.LargestFit();
  StepLimits step;
  step.fit_entries = fit.entries;
  step.fit_count = fit.count;
  step.fit_references = static_cast<int64_t>(config_.heads / config_.kv_heads) * plan.samples();
  const absl::Status reserved = backend_->Reserve(step);
  if (reserved.ok()) return reserved;
  return absl::Status(reserved.code(),
                      absl::StrCat("scratch of fits of ", fit.entries, " keys: ", reserved.message(),
                                   "; lower atp.max_principal_keys or atp.segment_tokens"));
}

absl::StatusOr<std::span<const float>> LlamaModel::Forward(const Batch& batch, const KvCache& kv_cache) {
  ComputeLogits(batch, kv_cache);
  Activations& a = *activations_;
  const size_t logits = batch.logit_rows.size() * static_cast<size_t>(config_.vocab_size);
  if (logits > 0) backend_->CopyToHost(a.host_logits.data(), a.logits.data(), logits * sizeof(float));
  if (absl::Status synchronized = backend_->Synchronize(); !synchronized.ok()) return synchronized;
  return std::span<const float>(a.host_logits.as<float>(), logits);
}

absl::Status LlamaModel::Forward(const Batch& batch, const KvCache& kv_cache, std::span<const SampleRow> rows,
                                 std::span<SampledRow> sampled) {
  ComputeLogits(batch, kv_cache);
  if (!rows.empty())
    backend_->SampleTokens({activations_->logits.as<float>(), config_.vocab_size, rows, sampled});
  return backend_->Synchronize();
}

void LlamaModel::BeginStep(const Batch& batch, const KvCache& kv_cache) {
  CheckBatch(batch, kv_cache, config_, limits_, activations_->low_rank_rows);
  compactor_.Begin(batch);
  fit_time_ = absl::ZeroDuration();
  std::vector<KvSequence>& sequences = activations_->sequences;
  sequences.clear();
  for (int l = 0; l < config_.layers; ++l) {
    for (const BatchEntry& e : batch.entries)
      sequences.push_back({e.first_row, e.rows, e.exact_entries, e.table->Layer(l)});
  }
  backend_->BeginStep({sequences, config_.layers, batch.positions, kv_cache.pool(), config_.kv_heads});
}

// Of the rows that are wanted, to Activations::logits.
void LlamaModel::ComputeLogits(const Batch& batch, const KvCache& kv_cache) {
  const LlamaConfig& c = config_;
  Activations& a = *activations_;
  const int64_t rows = batch.rows();
  float* const hidden = a.hidden.as<float>();
  float* const normed = a.normed.as<float>();
  float* const query = a.query.as<float>();
  float* const key = a.key.as<float>();
  float* const value = a.value.as<float>();
  float* const attended = a.attended.as<float>();
  float* const gate = a.gate.as<float>();
  float* const up = a.up.as<float>();
  const float* const inverse_frequency = a.inverse_frequency.as<float>();
  const float scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));

  const auto norm = [&](const float* x, const Weight& weight, float* y, int64_t n) -> RmsNormArgs {
    return {x, static_cast<const float*>(weight.view.data), y, n, c.hidden_size, c.rms_norm_eps};
  };
  BeginStep(batch, kv_cache);
  backend_->GatherRows({weights_.embedding.view, batch.tokens, hidden});
  for (int l = 0; l < c.layers; ++l) {
    const LlamaLayerWeights& w = weights_.layers[static_cast<size_t>(l)];
    const size_t count = batch.entries.size();
    const std::span<const KvSequence> sequences(&a.sequences[static_cast<size_t>(l) * count], count);
    RunLinear(batch, kQueryKeyValue, norm(hidden, w.attention_norm, normed, rows),
              std::array<Linear, 3>{{{&w.query, &w.query_bias, query},
                                     {&w.key, &w.key_bias, key},
                                     {&w.value, &w.value_bias, value}}});
    if (const std::span<const QuerySampleRow> kept = compactor_.Queries(l); !kept.empty()) {
      backend_->StoreQueries({query, kept, kv_cache.pool(), &kv_cache.query_page(), c.heads});
    }
    backend_->RotateAndStore({query, key, value, batch.positions, inverse_frequency, sequences,
                              kv_cache.pool(), c.heads, c.kv_heads});
    backend_->Attention({query, attended, sequences, kv_cache.pool(), c.heads, c.kv_heads, scale});
    backend_->MatMul({attended, w.output.view, static_cast<const float*>(w.output_bias.view.data), hidden,
                      rows, /*accumulate=*/true});

    RunLinear(batch, kGateUp, norm(hidden, w.mlp_norm, normed, rows),
              std::array<Linear, 2>{{{&w.gate, &w.gate_bias, gate}, {&w.up, &w.up_bias, up}}});
    RunLinear(batch, kDown, SwiGluArgs{gate, up, gate, rows, c.intermediate_size},
              std::array<Linear, 1>{{{&w.down, &w.down_bias, hidden, /*accumulate=*/true}}});
  }

  FitPrincipalKeys(kv_cache);

  const int64_t wanted = static_cast<int64_t>(batch.logit_rows.size());
  if (wanted == 0) return;
  float* const last = a.last.as<float>();
  backend_->GatherRows({{hidden, DType::kF32, rows, c.hidden_size}, batch.logit_rows, last});
  const MatMulArgs logits = {last,
                             weights_.lm_head,
                             nullptr,
                             a.logits.as<float>(),
                             wanted,
                             /*accumulate=*/false};
  backend_->RmsNormAndMatMuls(norm(last, weights_.final_norm, last, wanted), {&logits, 1});
}

// Linear layers that read the same x [rows, in], which `maker` makes. Rows of whole segments whose plan says
// so go through a low-rank form of x, each segment through its own; all rows between them go together, as
// they are.
template <class Maker>
void LlamaModel::RunLinear(const Batch& batch, LinearLayers layers, const Maker& maker,
                           std::span<const Linear> linears) {
  const auto is_low_rank = [layers](const BatchEntry& entry) {
    return entry.low_rank != nullptr && (entry.low_rank->linear_layers() & layers) != 0;
  };
  const bool with_product = std::none_of(batch.entries.begin(), batch.entries.end(), is_low_rank);
  if (!with_product) Make(*backend_, maker);
  const float* const x = Made(maker);
  const int64_t in = maker.dim;
  const auto exact = [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    std::array<MatMulArgs, 3> memory;
    const std::span products = std::span(memory).first(linears.size());
    for (size_t i = 0; i < linears.size(); ++i) {
      const Linear& l = linears[i];
      products[i] = {x + begin * in,
                     l.weight->view,
                     static_cast<const float*>(l.bias->view.data),
                     l.y + begin * l.weight->view.rows,
                     end - begin,
                     l.accumulate};
    }
    with_product ? MakeAndMultiply(*backend_, maker, products) : backend_->MatMuls(products);
  };
  float* const left = activations_->low_left.as<float>();
  float* const right = activations_->low_right.as<float>();
  float* const product = activations_->low_product.as<float>();
  int64_t done = 0;
  for (const BatchEntry& entry : batch.entries) {
    if (!is_low_rank(entry)) continue;
    exact(done, entry.first_row);
    done = entry.first_row + entry.rows;
    const int64_t inner = entry.low_rank->linear_rank() + 1;
    backend_->LowRankInput({x + entry.first_row * in, left, right, entry.rows, in, inner - 1});
    for (const Linear& l : linears) {
      const int64_t out = l.weight->view.rows;
      backend_->MatMul({right, l.weight->view, nullptr, product, inner, /*accumulate=*/false});
      backend_->LowRankOutput({left, product, static_cast<const float*>(l.bias->view.data),
                               l.y + entry.first_row * out, entry.rows, inner, out, l.accumulate});
    }
  }
  exact(done, batch.rows());
}

// The segments that this step has made whole. No row of the step sees what is written, so the fits of all
// layers are one op: many independent jobs, which fill a device.
void LlamaModel::FitPrincipalKeys(const KvCache& kv_cache) {
  const std::span<const PrincipalFitJob> jobs = compactor_.Jobs();
  if (jobs.empty()) return;
  const absl::Time begin = absl::Now();
  backend_->FitPrincipalKeys({jobs, compactor_.reports(), kv_cache.pool(), &kv_cache.query_page(),
                              activations_->inverse_frequency.as<float>(), config_.heads / config_.kv_heads});
  fit_time_ = absl::Now() - begin;
}

}  // namespace atp
