// One job of FitPrincipalKeys on the device: its description and where its matrices lie in the workspace.
#ifndef ATP_KERNELS_CUDA_PRINCIPAL_JOB_CUH_
#define ATP_KERNELS_CUDA_PRINCIPAL_JOB_CUH_

#include "kernels/cuda/kv_tables.h"
#include "kernels/cuda/launch.h"
#include "kernels/op_args.h"
#include "kernels/principal_fit.h"

namespace atp::cuda {

// Matrices are fp64, row-major; names as in kernels/principal_fit.h. Rows are counted by the most there can
// be: `entries` includes padding that Gather leaves out.
struct FitJob {
  const BlockId *principal, *exact, *queries, *out;
  const int32_t* positions;  // [group * samples]
  int32_t principal_entries, exact_entries, samples, forced, count;
  PageLayout page;        // of principal and out
  PageLayout exact_page;  // the pool's

  int32_t entries;                    // of both kinds
  int32_t m;                          // group * samples
  double *keys, *values, *log_mass;   // [n, d], [n, d], [n]
  double* queries_rotated;            // [m, d], scaled
  double* attention;                  // [n, m]
  double* gram;                       // [n, n]
  double* factor;                     // [count + forced, n]
  double *norms, *rest;               // [n]
  double* part_gram;                  // [r, r]; then of the shares
  double* vectors;                    // [5, r]: mass, and those of its fit
  double* share;                      // [r, m]
  double *target, *residual, *error;  // [m, d]
  double* shift;                      // [r, d]
  double* part_values;                // [r, d]: of the chosen
  float* rounding;                    // [2, d, d]: see key_rounding.cuh
  int32_t* source;                    // [entries]: which entries are there
  int32_t* chosen;                    // [r]
  int32_t* taken;                     // [n]
  struct Result {
    int32_t n;       // entries that are there
    int32_t solved;  // the ridge system was
    double mass_error;
  };
  Result* result;
};

// What all jobs share.
struct FitShape {
  std::byte* pool;
  size_t block_bytes;
  const float* inverse_frequency;
  int group, head_dim;
  int query_blocks_per_head, queries_per_block;

  __device__ std::byte* Block(BlockId id) const { return pool + static_cast<size_t>(id) * block_bytes; }
};

// Entries to choose: none when all are kept as they are.
__device__ __forceinline__ bool Keeps(const FitJob& job) { return job.count >= job.result->n; }

inline constexpr int kFitThreads = 256;
inline constexpr int kFitWarps = kFitThreads / kWarpSize;

// Sums over the block of kFitThreads; every thread has the result. room: [kFitWarps].
__device__ __forceinline__ double BlockSum(double value, const Shared<double>& room) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kWarpMask, value, distance);
  }
  const int me = static_cast<int>(threadIdx.x);
  __syncthreads();  // who still reads the last sum
  if (me % kWarpSize == 0) room[me / kWarpSize] = value;
  __syncthreads();
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kFitWarps; ++i) sum += room[i];
  return sum;
}

// The largest value and its smallest index; -1 when every thread gives index -1.
struct Largest {
  double value;
  int index;

  __device__ __forceinline__ void Take(double other, int at) {
    if (at >= 0 && (index < 0 || other > value || (other == value && at < index))) value = other, index = at;
  }
};
__device__ __forceinline__ Largest BlockLargest(Largest mine, const Shared<double>& room,
                                                const Shared<int32_t>& index_room) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const double value = __shfl_xor_sync(kWarpMask, mine.value, distance);
    const int index = __shfl_xor_sync(kWarpMask, mine.index, distance);
    mine.Take(value, index);
  }
  const int me = static_cast<int>(threadIdx.x);
  __syncthreads();
  if (me % kWarpSize == 0) room[me / kWarpSize] = mine.value, index_room[me / kWarpSize] = mine.index;
  __syncthreads();
  Largest best{0, -1};
#pragma unroll
  for (int i = 0; i < kFitWarps; ++i) best.Take(room[i], index_room[i]);
  return best;
}

}  // namespace atp::cuda

#endif  // ATP_KERNELS_CUDA_PRINCIPAL_JOB_CUH_
