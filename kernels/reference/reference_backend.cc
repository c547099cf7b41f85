#include "kernels/reference/reference_backend.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/host_memory.h"
#include "kernels/principal_segment.h"
#include "kernels/quantized.h"
#include "kernels/reference/low_rank.h"
#include "kernels/reference/principal_fit.h"
#include "kernels/sample_tokens.h"

namespace atp {
namespace {

void LoadRow(const TensorView& tensor, int64_t row, float* out) {
  const std::byte* data = static_cast<const std::byte*>(tensor.data);
  DequantizeRow(tensor.dtype, data + static_cast<size_t>(row) * RowBytes(tensor.dtype, tensor.cols),
                tensor.cols, out);
}

// One cache entry, as fp32.
struct Entry {
  std::vector<float> key;
  std::vector<float> value;
  float log_mass = 0;
};

void AppendEntries(const KvPool& pool, const KvPage& page, const BlockId* blocks, int count,
                   std::vector<Entry>& entries) {
  for (int i = 0; i < count; ++i) {
    Entry entry;
    entry.key.resize(page.head_dim());
    entry.value.resize(page.head_dim());
    const std::byte* block = pool.data + static_cast<size_t>(blocks[i / page.entries()]) * pool.block_bytes;
    page.Load(block, i % page.entries(), entry.key.data(), entry.value.data(), &entry.log_mass);
    // An entry that is not there has no key or value worth reading either.
    if (std::isinf(entry.log_mass)) continue;
    entries.push_back(std::move(entry));
  }
}

// out = softmax(scale · q·Kᵀ + log_mass) V over entries [0, count).
void AttendOne(const float* query, const std::vector<Entry>& entries, size_t count, float scale, int head_dim,
               float* out) {
  std::vector<double> scores(count);
  double largest = -std::numeric_limits<double>::infinity();
  for (size_t e = 0; e < count; ++e) {
    double dot = 0;
    for (int i = 0; i < head_dim; ++i) dot += static_cast<double>(query[i]) * entries[e].key[i];
    scores[e] = dot * scale + entries[e].log_mass;
    largest = std::max(largest, scores[e]);
  }
  double total = 0;
  std::vector<double> sum(head_dim, 0.0);
  for (size_t e = 0; e < count; ++e) {
    const double weight = std::exp(scores[e] - largest);
    total += weight;
    for (int i = 0; i < head_dim; ++i) sum[i] += weight * entries[e].value[i];
  }
  for (int i = 0; i < head_dim; ++i) out[i] = total > 0 ? static_cast<float>(sum[i] / total) : 0.0f;
}

class ReferenceBackend final : public Backend {
 public:
  std::string Description() const override { return "reference: naive, 1 thread"; }

  bool Supports(const OpDesc& desc) const override {
    return desc.head_dim > 0 && desc.head_dim % 2 == 0 && desc.block_entries > 0 &&
           desc.block_entries % 16 == 0;
  }

  absl::StatusOr<Buffer> Allocate(size_t bytes) override { return AllocateHostMemory(bytes); }
  absl::StatusOr<Weight> LoadWeight(const TensorView& host, DType dtype) override {
    return LoadHostWeight(host, dtype);
  }
  void CopyToDevice(void* device, const void* host, size_t bytes) override {
    CopyHostMemory(device, host, bytes);
  }
  void CopyToHost(void* host, const void* device, size_t bytes) override {
    CopyHostMemory(host, device, bytes);
  }
  absl::Status Synchronize() override { return absl::OkStatus(); }

  void GatherRows(const GatherRowsArgs& args) override {
    const int64_t dim = args.table.cols;
    for (size_t i = 0; i < args.indices.size(); ++i) {
      LoadRow(args.table, args.indices[i], args.out + i * dim);
    }
  }

  void MatMul(const MatMulArgs& args) override {
    const int64_t in = args.weight.cols;
    const int64_t out = args.weight.rows;
    std::vector<float> weight(static_cast<size_t>(in));
    for (int64_t o = 0; o < out; ++o) {
      LoadRow(args.weight, o, weight.data());
      for (int64_t r = 0; r < args.rows; ++r) {
        double sum = args.bias != nullptr ? args.bias[o] : 0.0;
        if (args.accumulate) sum += args.y[r * out + o];
        for (int64_t i = 0; i < in; ++i) {
          sum += static_cast<double>(args.x[r * in + i]) * weight[i];
        }
        args.y[r * out + o] = static_cast<float>(sum);
      }
    }
  }

  void RmsNorm(const RmsNormArgs& args) override {
    for (int64_t r = 0; r < args.rows; ++r) {
      const float* x = args.x + r * args.dim;
      double squares = 0;
      for (int64_t i = 0; i < args.dim; ++i) squares += static_cast<double>(x[i]) * x[i];
      const double inverse = 1.0 / std::sqrt(squares / static_cast<double>(args.dim) + args.epsilon);
      for (int64_t i = 0; i < args.dim; ++i) {
        args.y[r * args.dim + i] = static_cast<float>(x[i] * inverse * args.weight[i]);
      }
    }
  }

  void Rope(const RopeArgs& args) override {
    const int half = args.head_dim / 2;
    for (size_t r = 0; r < args.positions.size(); ++r) {
      for (int h = 0; h < args.heads; ++h) {
        float* x = args.x + (r * args.heads + h) * args.head_dim;
        for (int i = 0; i < half; ++i) {
          const double angle = static_cast<double>(args.positions[r]) * args.inverse_frequency[i];
          const double a = x[i];
          const double b = x[i + half];
          x[i] = static_cast<float>(a * std::cos(angle) - b * std::sin(angle));
          x[i + half] = static_cast<float>(b * std::cos(angle) + a * std::sin(angle));
        }
      }
    }
  }

  void SwiGlu(const SwiGluArgs& args) override {
    for (int64_t i = 0; i < args.rows * args.dim; ++i) {
      const double gate = args.gate[i];
      args.out[i] = static_cast<float>(gate / (1.0 + std::exp(-gate)) * args.up[i]);
    }
  }

  void SampleTokens(const SampleTokensArgs& args) override { sampler_.Sample(args); }

  void StoreKv(const StoreKvArgs& args) override {
    const KvPage& page = *args.pool.exact;
    for (const KvSequence& sequence : args.sequences) {
      for (int h = 0; h < args.kv_heads; ++h) {
        for (int i = 0; i < sequence.rows; ++i) {
          const int entry = sequence.exact_entries - sequence.rows + i;
          const size_t source =
              (static_cast<size_t>(sequence.first_row + i) * args.kv_heads + h) * page.head_dim();
          const BlockId id = sequence.heads[h].exact[entry / page.entries()];
          std::byte* block = args.pool.data + static_cast<size_t>(id) * args.pool.block_bytes;
          page.Store(block, entry % page.entries(), args.key + source, args.value + source);
        }
      }
    }
  }

  void Attention(const AttentionArgs& args) override {
    const KvPage& page = *args.pool.exact;
    const int head_dim = page.head_dim();
    const int group = args.heads / args.kv_heads;
    for (const KvSequence& sequence : args.sequences) {
      for (int kv_head = 0; kv_head < args.kv_heads; ++kv_head) {
        const KvHeadBlocks& blocks = sequence.heads[kv_head];
        std::vector<Entry> entries;
        if (blocks.principal_entries > 0) {
          AppendEntries(args.pool, *blocks.principal_page, blocks.principal, blocks.principal_entries,
                        entries);
        }
        const size_t principal = entries.size();
        AppendEntries(args.pool, page, blocks.exact, sequence.exact_entries, entries);
        for (int i = 0; i < sequence.rows; ++i) {
          const size_t visible = principal + sequence.exact_entries - sequence.rows + i + 1;
          for (int g = 0; g < group; ++g) {
            const size_t offset =
                (static_cast<size_t>(sequence.first_row + i) * args.heads + kv_head * group + g) * head_dim;
            AttendOne(args.query + offset, entries, visible, args.scale, head_dim, args.out + offset);
          }
        }
      }
    }
  }

  void StoreQueries(const StoreQueriesArgs& args) override {
    for (const QuerySampleRow& row : args.rows) StoreQuerySample(args, row);
  }

  double LowRankMatMulSpeed(DType) const override { return 1; }
  void LowRankInput(const LowRankInputArgs& args) override { ReferenceLowRankInput(args); }
  void LowRankOutput(const LowRankOutputArgs& args) override { ReferenceLowRankOutput(args); }

  void FitPrincipalKeys(const FitPrincipalKeysArgs& args) override {
    PrincipalSegment segment;
    for (size_t i = 0; i < args.jobs.size(); ++i) {
      segment.Gather(args, args.jobs[i]);
      ReferenceFitPrincipal(segment.problem(), segment.fit());
      segment.Scatter(args, args.jobs[i]);
      args.reports[i] = segment.report();
    }
  }

 private:
  TokenSampler sampler_;
};

}  // namespace

std::unique_ptr<Backend> MakeReferenceBackend() { return std::make_unique<ReferenceBackend>(); }

}  // namespace atp
