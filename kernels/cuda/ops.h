// The ops, one .cu file each. They check nothing, allocate nothing but growth of `workspace` and `staging`,
// and return as soon as their kernels are queued. The first error of an op is its result.
//
// XxxBytes(): of the workspace, for the largest step within limits.
#ifndef ATP_KERNELS_CUDA_OPS_H_
#define ATP_KERNELS_CUDA_OPS_H_

#include <cuda_runtime.h>

#include "kernels/cuda/staging.h"
#include "kernels/cuda/step_graph.h"
#include "kernels/op_args.h"

namespace atp::cuda {

// Attention keeps the sums of a head in registers.
inline constexpr int kMaxHeadDim = 128;

class StepTables;

struct OpContext {
  Stream stream;
  int multiprocessors = 0;
  int compute_capability = 0;  // 80, 89, 90, …
  size_t shared_bytes = 0;     // the most that a block may have
  Staging* staging = nullptr;
  Workspace* workspace = nullptr;
  StepTables* step = nullptr;  // null: no step was announced
  // What attention may take of the workspace, unless one row needs more; it goes in waves of so much.
  size_t attention_bytes = size_t{64} << 20;
};

cudaError_t GatherRows(const OpContext& context, const GatherRowsArgs& args);          // gather.cu
cudaError_t MatMuls(const OpContext& context, std::span<const MatMulArgs> products);   // matmul.cu
cudaError_t RmsNorm(const OpContext& context, const RmsNormArgs& args);                // norm.cu
cudaError_t Rope(const OpContext& context, const RopeArgs& args);                      // rope.cu
cudaError_t SwiGlu(const OpContext& context, const SwiGluArgs& args);                  // activation.cu
cudaError_t StoreKv(const OpContext& context, const StoreKvArgs& args);                // kv_store.cu
cudaError_t RotateAndStore(const OpContext& context, const RotateAndStoreArgs& args);  // kv_store.cu
cudaError_t StoreQueries(const OpContext& context, const StoreQueriesArgs& args);      // kv_store.cu
cudaError_t Attention(const OpContext& context, const AttentionArgs& args);            // attention.cu
// `out`, and reports of fits, are there when Staging::Receive() says.
cudaError_t SampleTokens(const OpContext& context, const SampleTokensArgs& args);          // sample.cu
cudaError_t FitPrincipalKeys(const OpContext& context, const FitPrincipalKeysArgs& args);  // principal_fit.cu

size_t MatMulBytes(const StepLimits& limits);
size_t SampleTokensBytes(const StepLimits& limits);
size_t FitPrincipalKeysBytes(const StepLimits& limits);

}  // namespace atp::cuda

#endif  // ATP_KERNELS_CUDA_OPS_H_
