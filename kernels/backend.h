// A device and its ops: one virtual call per op. Three implementations: reference (naive fp32 oracle), cpu,
// cuda.
//
// Ops are issued in order from one thread and take no lock; on an asynchronous device an op's failure
// surfaces at the next Synchronize(). Ops never fail for what a user can cause: sizes and formats are checked
// at load with Supports().
#ifndef ATP_KERNELS_BACKEND_H_
#define ATP_KERNELS_BACKEND_H_

#include <cstddef>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/buffer.h"
#include "kernels/op_args.h"

namespace atp {

// What a model needs of a backend, asked once at load.
struct OpDesc {
  DType weight_dtype = DType::kF32;
  KvFormat kv_format = KvFormat::kF32;
  int head_dim = 0;
  int block_entries = 0;
};

// A weight matrix where the backend wants it: a view of the caller's memory where that can be used as it is
// (then `memory` is empty and the caller's mapping must outlive it), or a copy or repacked form in `memory`.
struct Weight {
  TensorView view;
  Buffer memory;
};

class Backend {
 public:
  virtual ~Backend() = default;

  // "cpu: avx512, 2 threads" — for the start line and /version.
  virtual std::string Description() const = 0;
  virtual bool Supports(const OpDesc& desc) const = 0;

  // What Allocate() could still give, on a device with a memory of its own; 0: it is the host's.
  virtual size_t FreeMemoryBytes() { return 0; }
  // Start-up only. ResourceExhausted names the bytes asked for. Memory is zeroed and 64-byte aligned.
  virtual absl::StatusOr<Buffer> Allocate(size_t bytes) = 0;
  // A matrix kept as `dtype`: rows are converted one at a time where the host's is another (then
  // CanQuantizeTo(dtype), kernels/quantized.h). Where the result has `memory`, the host's is no longer
  // needed. InvalidArgument: cols is not a multiple of dtype's block, or there is no such conversion.
  virtual absl::StatusOr<Weight> LoadWeight(const TensorView& host, DType dtype) = 0;
  // Start-up only: memory for what ops of steps up to these limits need beside their arguments, each limit
  // for itself the largest that any call has named. ResourceExhausted as Allocate().
  virtual absl::Status Reserve(const StepLimits& /*limits*/) { return absl::OkStatus(); }
  virtual void CopyToDevice(void* device, const void* host, size_t bytes) = 0;
  virtual void CopyToHost(void* host, const void* device, size_t bytes) = 0;

  // Ops up to the next Synchronize() are one step, which a device may prepare and run as a whole: what its
  // ops do may begin as late as there, or at a copy. The arguments stay as they are until then. No op needs
  // it: outside a step, or with sequences of its own, it does the same.
  virtual void BeginStep(const StepArgs& /*args*/) {}

  virtual void GatherRows(const GatherRowsArgs& args) = 0;
  virtual void MatMul(const MatMulArgs& args) = 0;
  virtual void RmsNorm(const RmsNormArgs& args) = 0;
  virtual void Rope(const RopeArgs& args) = 0;
  virtual void SwiGlu(const SwiGluArgs& args) = 0;
  // MatMuls of the same x and rows; and those of all rows that another op makes. For backends that put x into
  // a form of their own, or gain by one long op instead of several short ones.
  virtual void MatMuls(std::span<const MatMulArgs> products) {
    for (const MatMulArgs& product : products) MatMul(product);
  }
  virtual void RmsNormAndMatMuls(const RmsNormArgs& norm, std::span<const MatMulArgs> products) {
    RmsNorm(norm);
    MatMuls(products);
  }
  virtual void SwiGluAndMatMuls(const SwiGluArgs& swiglu, std::span<const MatMulArgs> products) {
    SwiGlu(swiglu);
    MatMuls(products);
  }
  virtual void StoreKv(const StoreKvArgs& args) = 0;
  // Its three ops one after another, where a backend has nothing better.
  virtual void RotateAndStore(const RotateAndStoreArgs& args) {
    const int head_dim = args.pool.exact->head_dim();
    Rope({args.query, args.positions, args.inverse_frequency, args.heads, head_dim});
    Rope({args.key, args.positions, args.inverse_frequency, args.kv_heads, head_dim});
    StoreKv({args.key, args.value, args.sequences, args.pool, args.kv_heads});
  }
  virtual void Attention(const AttentionArgs& args) = 0;
  virtual void StoreQueries(const StoreQueriesArgs& args) = 0;
  virtual void FitPrincipalKeys(const FitPrincipalKeysArgs& args) = 0;
  virtual void SampleTokens(const SampleTokensArgs& args) = 0;

  // Linear layers with low-rank inputs, for backends that have both ops: how fast MatMul is with such weights
  // as a multiple of fp32 ones, at many rows. 0: this backend has not.
  virtual double LowRankMatMulSpeed(DType /*weight*/) const { return 0; }
  virtual void LowRankInput(const LowRankInputArgs& /*args*/) {}
  virtual void LowRankOutput(const LowRankOutputArgs& /*args*/) {}

  // Waits for all ops. Internal: one of them failed, and its step is lost. Unavailable: the device is, for as
  // long as the process lives.
  virtual absl::Status Synchronize() = 0;
};

}  // namespace atp

#endif  // ATP_KERNELS_BACKEND_H_
