// The Backend over the ops of this folder: memory, copies, and errors with the op's name and shapes.
#include "kernels/cuda/cuda_backend.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/cuda/kv_tables.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/staging.h"
#include "kernels/cuda/step_graph.h"
#include "kernels/cuda/upload.h"
#include "kernels/cuda/weight_planes.h"
#include "kernels/host_memory.h"

namespace atp::cuda {
namespace {

// The architectures that the build makes code for begin here.
constexpr int kOldestCapability = 80;

struct Device {
  std::string name;
  int multiprocessors = 0;
  int capability = 0;
  int shared_bytes = 0;
};

std::string Text(cudaError_t error) {
  return absl::StrCat(cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}

std::string MatrixShape(int64_t rows, int64_t cols) { return absl::StrCat("[", rows, ", ", cols, "]"); }

int64_t RowsOf(std::span<const KvSequence> sequences) {
  int64_t rows = 0;
  for (const KvSequence& sequence : sequences) rows += sequence.rows;
  return rows;
}

// A launch that is to be waited for has to be a launch: with this in the environment there are no graphs.
bool LaunchesBlock() {
  const char* value = std::getenv("CUDA_LAUNCH_BLOCKING");
  return value != nullptr && std::string_view(value) == "1";
}

// Each the larger one.
void Include(const StepLimits& more, StepLimits* limits) {
  const auto include = [](auto value, auto* most) { *most = std::max(*most, value); };
  include(more.rows, &limits->rows), include(more.logit_rows, &limits->logit_rows);
  include(more.sequences, &limits->sequences), include(more.vocab, &limits->vocab);
  include(more.widest, &limits->widest), include(more.layers, &limits->layers);
  include(more.heads, &limits->heads), include(more.kv_heads, &limits->kv_heads);
  include(more.head_dim, &limits->head_dim), include(more.blocks, &limits->blocks);
  include(more.fit_entries, &limits->fit_entries), include(more.fit_references, &limits->fit_references);
  include(more.fit_count, &limits->fit_count);
}

// Results of samples and fits.
size_t BytesToReceive(const StepLimits& limits) {
  const int64_t fits = limits.fit_entries > 0 ? limits.layers * limits.sequences * limits.kv_heads : 0;
  const int64_t bytes = limits.logit_rows * static_cast<int64_t>(sizeof(SampledRow)) +
                        fits * static_cast<int64_t>(sizeof(PrincipalFitReport));
  return static_cast<size_t>(bytes + bytes / 4) + (64 << 10);  // size classes
}

class CudaBackend final : public Backend {
 public:
  CudaBackend(Device device, cudaStream_t stream) : device_(std::move(device)), graphs_(!LaunchesBlock()) {
    context_ = {{stream, &graph_},
                device_.multiprocessors,
                device_.capability,
                static_cast<size_t>(device_.shared_bytes),
                &staging_,
                &workspace_,
                &tables_};
  }
  ~CudaBackend() override {
    cudaStreamSynchronize(context_.stream);
    cudaStreamDestroy(context_.stream);
  }

  std::string Description() const override {
    return absl::StrCat("cuda: ", device_.name, ", sm_", device_.capability, ", ", device_.multiprocessors,
                        " multiprocessors");
  }

  bool Supports(const OpDesc& desc) const override {
    // Attention multiplies in steps of 16 dimensions. Weights may be of any dtype: see LoadWeight().
    return desc.head_dim > 0 && desc.head_dim % 16 == 0 && desc.head_dim <= kMaxHeadDim &&
           desc.block_entries > 0 && desc.block_entries % 16 == 0;
  }

  size_t FreeMemoryBytes() override {
    size_t free = 0, total = 0;
    return cudaMemGetInfo(&free, &total) == cudaSuccess ? free : 0;
  }

  absl::StatusOr<Buffer> Allocate(size_t bytes) override {
    void* data = nullptr;
    // A buffer of nothing has an address too.
    cudaError_t error = cudaMalloc(&data, bytes > 0 ? bytes : 1);
    if (error != cudaSuccess) return OutOfMemory(bytes, error);
    Buffer buffer(data, bytes, [](void* memory) { cudaFree(memory); });
    error = cudaMemsetAsync(data, 0, bytes, context_.stream);
    if (error != cudaSuccess)
      return absl::InternalError(absl::StrCat("cuda: clearing memory: ", Text(error)));
    return buffer;
  }

  absl::StatusOr<Weight> LoadWeight(const TensorView& host, DType dtype) override {
    if (absl::Status possible = CheckConversion(host, dtype); !possible.ok()) return possible;
    Weight weight;
    const bool planes = IsQuantized(dtype);
    weight.view = {nullptr, dtype, host.rows, host.cols, planes};
    absl::StatusOr<Buffer> memory =
        Allocate(planes ? PlaneBytes(dtype, host.rows * host.cols).total() : weight.view.bytes());
    if (!memory.ok()) return memory.status();
    const cudaError_t error = planes ? uploader_.CopyAsPlanes(dtype, memory->data(), host, context_.stream)
                                     : uploader_.CopyAs(dtype, memory->data(), host, context_.stream);
    if (error != cudaSuccess) {
      return absl::InternalError(
          absl::StrCat("cuda: copying a weight ", MatrixShape(host.rows, host.cols), ": ", Text(error)));
    }
    weight.memory = *std::move(memory);
    weight.view.data = weight.memory.data();
    return weight;
  }

  absl::Status Reserve(const StepLimits& limits) override {
    Include(limits, &limits_);
    const size_t attention = limits_.sequences > 0 ? context_.attention_bytes : 0;
    const size_t scratch = std::max(
        {attention, MatMulBytes(limits_), SampleTokensBytes(limits_), FitPrincipalKeysBytes(limits_)});
    cudaError_t error = cudaStreamSynchronize(context_.stream);
    if (scratch > workspace_.bytes()) workspace_.Release();
    if (error == cudaSuccess) workspace_.Reserve(scratch, &error);
    if (error != cudaSuccess) return OutOfMemory(scratch, error);
    context_.attention_bytes = std::max(context_.attention_bytes, workspace_.bytes());
    const size_t sent = StepTables::BytesToSend(limits_), received = BytesToReceive(limits_);
    error = staging_.Reserve(sent, received);
    return error == cudaSuccess ? absl::OkStatus() : OutOfMemory(sent + received, error);
  }

  void CopyToDevice(void* device, const void* host, size_t bytes) override {
    Submit();
    Check(uploader_.Copy(device, host, bytes, context_.stream), "CopyToDevice",
          [&] { return absl::StrCat(bytes, " bytes"); });
  }

  void CopyToHost(void* host, const void* device, size_t bytes) override {
    if (bytes == 0) return;
    Submit();
    cudaError_t error = cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, context_.stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(context_.stream);
    Check(error, "CopyToHost", [&] { return absl::StrCat(bytes, " bytes"); });
  }

  // Steps that only decode become graphs: they are many, short and alike.
  void BeginStep(const StepArgs& args) override {
    Submit();
    const size_t count = args.sequences.size() / static_cast<size_t>(args.layers);
    const std::span<const KvSequence> layer = args.sequences.first(count);
    const auto decodes = [](const KvSequence& s) { return s.rows == 1; };
    if (graphs_ && std::all_of(layer.begin(), layer.end(), decodes) && graph_.Wanted()) {
      staging_.Defer();
      graph_.Begin(static_cast<int>(count));
    }
    Check(tables_.Begin(context_, args), "BeginStep", [&] {
      return absl::StrCat(args.layers, " layers, ", count, " sequences, ", args.kv_heads, " kv heads");
    });
  }

  void GatherRows(const GatherRowsArgs& args) override {
    Check(cuda::GatherRows(context_, args), "GatherRows", [&] {
      return absl::StrCat(args.indices.size(), " rows of ", MatrixShape(args.table.rows, args.table.cols));
    });
  }

  void MatMul(const MatMulArgs& args) override { MatMuls({&args, 1}); }

  void MatMuls(std::span<const MatMulArgs> products) override {
    Check(cuda::MatMuls(context_, products), "MatMul", [&] {
      std::string shapes;
      for (const MatMulArgs& args : products) {
        absl::StrAppend(&shapes, shapes.empty() ? MatrixShape(args.rows, args.weight.cols) : " and", " by ",
                        std::string(Name(args.weight.dtype)), " ",
                        MatrixShape(args.weight.rows, args.weight.cols));
      }
      return shapes;
    });
  }

  void RmsNorm(const RmsNormArgs& args) override {
    Check(cuda::RmsNorm(context_, args), "RmsNorm", [&] { return MatrixShape(args.rows, args.dim); });
  }

  void Rope(const RopeArgs& args) override {
    Check(cuda::Rope(context_, args), "Rope", [&] {
      return absl::StrCat(args.positions.size(), " rows of ", args.heads, " heads of ", args.head_dim);
    });
  }

  void SwiGlu(const SwiGluArgs& args) override {
    Check(cuda::SwiGlu(context_, args), "SwiGlu", [&] { return MatrixShape(args.rows, args.dim); });
  }

  void StoreKv(const StoreKvArgs& args) override {
    Check(cuda::StoreKv(context_, args), "StoreKv", [&] {
      return absl::StrCat(RowsOf(args.sequences), " rows of ", args.sequences.size(), " sequences, ",
                          args.kv_heads, " kv heads of ", args.pool.exact->head_dim());
    });
  }

  void RotateAndStore(const RotateAndStoreArgs& args) override {
    Check(cuda::RotateAndStore(context_, args), "RotateAndStore", [&] {
      return absl::StrCat(args.positions.size(), " rows of ", args.sequences.size(), " sequences, ",
                          args.heads, " and ", args.kv_heads, " heads of ", args.pool.exact->head_dim());
    });
  }

  void Attention(const AttentionArgs& args) override {
    Check(cuda::Attention(context_, args), "Attention", [&] {
      return absl::StrCat(RowsOf(args.sequences), " rows of ", args.sequences.size(), " sequences, ",
                          args.heads, " heads over ", args.kv_heads, " kv heads of ",
                          args.pool.exact->head_dim());
    });
  }

  void StoreQueries(const StoreQueriesArgs& args) override {
    Check(cuda::StoreQueries(context_, args), "StoreQueries", [&] {
      return absl::StrCat(args.rows.size(), " rows of ", args.heads, " heads of ", args.page->head_dim());
    });
  }

  void FitPrincipalKeys(const FitPrincipalKeysArgs& args) override {
    Check(cuda::FitPrincipalKeys(context_, args), "FitPrincipalKeys", [&] {
      return absl::StrCat(args.jobs.size(), " jobs of ", args.group, " query heads, head size ",
                          args.query_page->head_dim());
    });
  }

  void SampleTokens(const SampleTokensArgs& args) override {
    Check(cuda::SampleTokens(context_, args), "SampleTokens",
          [&] { return absl::StrCat(args.rows.size(), " rows of ", args.vocab, " logits"); });
  }

  absl::Status Synchronize() override {
    Submit();
    cudaError_t error = status_.ok() ? staging_.Fetch(context_.stream) : cudaSuccess;
    const cudaError_t found = cudaStreamSynchronize(context_.stream);
    if (error == cudaSuccess) error = found;
    tables_.End();
    staging_.Reset();
    workspace_.Reset();
    absl::Status status = std::exchange(status_, absl::OkStatus());
    if (status.ok() && error != cudaSuccess) {
      status = absl::InternalError(absl::StrCat("cuda: ", Text(error), ", in one of ", ops_, " ops up to ",
                                                last_op_,
                                                " (CUDA_LAUNCH_BLOCKING=1 in the environment names the op)"));
    }
    ops_ = 0;
    // An illegal address or a broken memory stays with the process: every later call says the same.
    if (!status.ok() && cudaStreamSynchronize(context_.stream) != cudaSuccess)
      return absl::UnavailableError(absl::StrCat(status.message(), "; the device is lost to this process"));
    return status;
  }

 private:
  // What was kept for a graph goes to the device; nothing of it, where an op has failed.
  void Submit() {
    if (!graph_.open()) return;
    cudaError_t error = staging_.SendAll(context_.stream);
    if (error == cudaSuccess && status_.ok()) error = graph_.Launch(context_.stream);
    graph_.Drop();
    if (error == cudaSuccess || !status_.ok()) return;
    status_ = absl::InternalError(
        absl::StrCat("cuda: launching a step of ", ops_, " ops up to ", last_op_, ": ", Text(error)));
  }

  // Keeps the first error until Synchronize() asks for it. shapes: of the op, for the message.
  template <class Shapes>
  void Check(cudaError_t error, const char* op, const Shapes& shapes) {
    ++ops_;
    last_op_ = op;
    if (error == cudaSuccess || !status_.ok()) return;
    status_ = absl::InternalError(absl::StrCat("cuda: ", op, " of ", shapes(), ": ", Text(error)));
  }

  absl::Status OutOfMemory(size_t bytes, cudaError_t error) const {
    if (error != cudaErrorMemoryAllocation)  // of something before, which more memory does not mend
      return absl::InternalError(absl::StrCat("cuda: allocating ", bytes, " bytes: ", Text(error)));
    cudaGetLastError();  // it was ours; do not let a later op report it
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    return absl::ResourceExhaustedError(absl::StrCat(
        "cannot allocate ", bytes, " bytes on ", device_.name, ": ", free, " of ", total, " bytes are free (",
        cudaGetErrorString(error),
        "). Give the KV cache less (--set kv_cache.memory_bytes=…), or use a smaller model or --device cpu"));
  }

  const Device device_;
  Staging staging_;
  Workspace workspace_;
  Uploader uploader_;
  StepTables tables_;
  StepGraph graph_;
  const bool graphs_;
  StepLimits limits_;  // of all Reserve()
  OpContext context_;
  absl::Status status_;  // first error since the last Synchronize()
  int64_t ops_ = 0;      // since then
  const char* last_op_ = "";
};

absl::Status FillDevice(Device* device) {
  cudaDeviceProp properties;
  int major = 0, minor = 0;
  cudaError_t error = cudaGetDeviceProperties(&properties, 0);
  const auto get = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, 0);
  };
  get(&major, cudaDevAttrComputeCapabilityMajor);
  get(&minor, cudaDevAttrComputeCapabilityMinor);
  get(&device->multiprocessors, cudaDevAttrMultiProcessorCount);
  get(&device->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (error != cudaSuccess) return absl::UnavailableError(absl::StrCat("device 'cuda': ", Text(error)));
  device->name = properties.name;
  device->capability = 10 * major + minor;
  if (device->capability < kOldestCapability) {
    return absl::FailedPreconditionError(absl::StrCat("device 'cuda': ", device->name, " is sm_",
                                                      device->capability, "; this build needs sm_",
                                                      kOldestCapability, " or newer. Use --device cpu"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> MakeBackend() {
  // Kernels are loaded now, not by the first request that needs one: that takes memory and time, which the
  // cache's size and a step have no room for. Where the user has said otherwise, as he says.
  setenv("CUDA_MODULE_LOADING", "EAGER", /*overwrite=*/0);
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    return absl::UnavailableError(absl::StrCat("device 'cuda': no usable NVIDIA driver and GPU here (",
                                               error == cudaSuccess ? "no device" : cudaGetErrorString(error),
                                               "). Use --device cpu"));
  }
  error = cudaSetDevice(0);
  if (error != cudaSuccess) return absl::UnavailableError(absl::StrCat("device 'cuda': ", Text(error)));
  Device device;
  if (absl::Status filled = FillDevice(&device); !filled.ok()) return filled;
  cudaStream_t stream = nullptr;
  error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error != cudaSuccess) return absl::UnavailableError(absl::StrCat("device 'cuda': ", Text(error)));
  return std::make_unique<CudaBackend>(std::move(device), stream);
}

}  // namespace atp::cuda
