// out[i] = table[indices[i]] as fp32: a block per row.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/quantized_weight.cuh"
#include "kernels/cuda/stored_float.cuh"

namespace atp::cuda {
namespace {

constexpr int kThreads = 256;

template <class From>
__global__ void __launch_bounds__(kThreads)
    GatherRowsKernel(const void* table, const int32_t* indices, float* out, int64_t dim) {
  const auto* row = static_cast<const typename From::Stored*>(table) + indices[blockIdx.x] * dim;
  float* to = out + static_cast<int64_t>(blockIdx.x) * dim;
  for (int64_t i = threadIdx.x; i < dim; i += kThreads) to[i] = From::Value(row[i]);
}

// Eight elements a thread.
template <DType kDType>
__global__ void __launch_bounds__(kThreads)
    GatherQuantizedRows(const WeightPlanes table, const int32_t* indices, float* out, int64_t dim) {
  const int64_t row = indices[blockIdx.x] * dim;
  float* to = out + static_cast<int64_t>(blockIdx.x) * dim;
  for (int64_t i = 8 * static_cast<int64_t>(threadIdx.x); i < dim; i += 8 * kThreads) {
    const Eight eight = LoadEight<kDType>(table, row + i);
#pragma unroll
    for (int e = 0; e < 8; ++e) to[i + e] = eight.value[e];
  }
}

}  // namespace

cudaError_t GatherRows(const OpContext& context, const GatherRowsArgs& args) {
  cudaError_t error;
  const int32_t* indices = context.staging->Upload(args.indices, context.stream, &error);
  if (error != cudaSuccess) return error;
  const dim3 rows(static_cast<unsigned>(args.indices.size()));
  if (IsQuantized(args.table.dtype)) {
    return WithQuantizedType(args.table.dtype, [&](auto dtype) {
      return Launch("GatherRows", GatherQuantizedRows<decltype(dtype)::value>, rows, dim3(kThreads), 0,
                    context.stream, PlanesOf(args.table), indices, args.out, args.table.cols);
    });
  }
  auto* kernel = GatherRowsKernel<StoredF32>;
  if (args.table.dtype == DType::kBF16) kernel = GatherRowsKernel<StoredBF16>;
  if (args.table.dtype == DType::kF16) kernel = GatherRowsKernel<StoredF16>;
  return Launch("GatherRows", kernel, rows, dim3(kThreads), 0, context.stream, args.table.data, indices,
                args.out, args.table.cols);
}

}  // namespace atp::cuda
