// Other ways to choose and weigh the entries of a closed segment, for `atp eval` to compare with: a backend
// that forwards every op, and replaces the principal fit while a baseline is set.
#ifndef ATP_CLI_BASELINE_BACKEND_H_
#define ATP_CLI_BASELINE_BACKEND_H_

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/backend.h"
#include "kernels/principal_segment.h"

namespace atp {

enum class Baseline : uint8_t {
  kNone,       // the real fit
  kRecent,     // sinks and the newest entries (StreamingLLM, arXiv 2309.17453)
  kAttention,  // the entries that the references attend to most (SnapKV, arXiv 2404.14469)
  kUnfitted,   // principal entries with their real values and no log mass
};

std::string_view Name(Baseline baseline);
std::optional<Baseline> BaselineFromName(std::string_view name);

class BaselineBackend : public Backend {
 public:
  // `inner`'s memory must be readable by the host: cpu or reference.
  explicit BaselineBackend(std::unique_ptr<Backend> inner) : inner_(std::move(inner)) {}

  void set_baseline(Baseline baseline) { baseline_ = baseline; }

  std::string Description() const override { return inner_->Description(); }
  bool Supports(const OpDesc& desc) const override { return inner_->Supports(desc); }
  size_t FreeMemoryBytes() override { return inner_->FreeMemoryBytes(); }
  absl::StatusOr<Buffer> Allocate(size_t bytes) override { return inner_->Allocate(bytes); }
  absl::Status Reserve(const StepLimits& limits) override { return inner_->Reserve(limits); }
  absl::StatusOr<Weight> LoadWeight(const TensorView& host, DType dtype) override {
    return inner_->LoadWeight(host, dtype);
  }
  void CopyToDevice(void* device, const void* host, size_t bytes) override {
    inner_->CopyToDevice(device, host, bytes);
  }
  void CopyToHost(void* host, const void* device, size_t bytes) override {
    inner_->CopyToHost(host, device, bytes);
  }
  void BeginStep(const StepArgs& args) override { inner_->BeginStep(args); }
  void GatherRows(const GatherRowsArgs& args) override { inner_->GatherRows(args); }
  void MatMul(const MatMulArgs& args) override { inner_->MatMul(args); }
  void RmsNorm(const RmsNormArgs& args) override { inner_->RmsNorm(args); }
  void Rope(const RopeArgs& args) override { inner_->Rope(args); }
  void SwiGlu(const SwiGluArgs& args) override { inner_->SwiGlu(args); }
  void MatMuls(std::span<const MatMulArgs> products) override { inner_->MatMuls(products); }
  void RmsNormAndMatMuls(const RmsNormArgs& norm, std::span<const MatMulArgs> products) override {
    inner_->RmsNormAndMatMuls(norm, products);
  }
  void SwiGluAndMatMuls(const SwiGluArgs& swiglu, std::span<const MatMulArgs> products) override {
    inner_->SwiGluAndMatMuls(swiglu, products);
  }
  void StoreKv(const StoreKvArgs& args) override { inner_->StoreKv(args); }
  void RotateAndStore(const RotateAndStoreArgs& args) override { inner_->RotateAndStore(args); }
  void Attention(const AttentionArgs& args) override { inner_->Attention(args); }
  void StoreQueries(const StoreQueriesArgs& args) override { inner_->StoreQueries(args); }
  void FitPrincipalKeys(const FitPrincipalKeysArgs& args) override;
  void SampleTokens(const SampleTokensArgs& args) override { inner_->SampleTokens(args); }
  double LowRankMatMulSpeed(DType weight) const override { return inner_->LowRankMatMulSpeed(weight); }
  void LowRankInput(const LowRankInputArgs& args) override { inner_->LowRankInput(args); }
  void LowRankOutput(const LowRankOutputArgs& args) override { inner_->LowRankOutput(args); }
  absl::Status Synchronize() override { return inner_->Synchronize(); }

 private:
  std::unique_ptr<Backend> inner_;
  Baseline baseline_ = Baseline::kNone;
  PrincipalSegment segment_;
};

// Which entries a baseline keeps: ascending, min(count, n) of them, the forced ones first among them.
std::vector<int32_t> ChooseEntries(Baseline baseline, const PrincipalFitProblem& problem);

}  // namespace atp

#endif  // ATP_CLI_BASELINE_BACKEND_H_
