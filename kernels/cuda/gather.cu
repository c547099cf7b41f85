// out[i] = table[indices[i]] as fp32: a block per row.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ops.h"
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

// Of q8_0 in planes (upload.h). scales: [rows of the table, dim / 32].
__global__ void __launch_bounds__(kThreads) GatherQ8Rows(const int8_t* table, const uint16_t* scales,
                                                         const int32_t* indices, float* out, int64_t dim) {
  const int64_t row = indices[blockIdx.x] * dim;
  float* to = out + static_cast<int64_t>(blockIdx.x) * dim;
  for (int64_t i = threadIdx.x; i < dim; i += kThreads)
    to[i] = HalfToFloat(scales[(row + i) / 32]) * static_cast<float>(table[row + i]);
}

}  // namespace

cudaError_t GatherRows(const OpContext& context, const GatherRowsArgs& args) {
  cudaError_t error;
  const int32_t* indices = context.staging->Upload(args.indices, context.stream, &error);
  if (error != cudaSuccess) return error;
  if (args.table.dtype == DType::kQ8_0) {
    const auto* table = static_cast<const int8_t*>(args.table.data);
    return Launch("GatherRows", GatherQ8Rows, dim3(static_cast<unsigned>(args.indices.size())),
                  dim3(kThreads), 0, context.stream, table,
                  reinterpret_cast<const uint16_t*>(table + args.table.rows * args.table.cols), indices,
                  args.out, args.table.cols);
  }
  auto* kernel = GatherRowsKernel<StoredF32>;
  if (args.table.dtype == DType::kBF16) kernel = GatherRowsKernel<StoredBF16>;
  if (args.table.dtype == DType::kF16) kernel = GatherRowsKernel<StoredF16>;
  return Launch("GatherRows", kernel, dim3(static_cast<unsigned>(args.indices.size())), dim3(kThreads), 0,
                context.stream, args.table.data, indices, args.out, args.table.cols);
}

}  // namespace atp::cuda
