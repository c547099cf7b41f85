// Which entries become principal, and what mass they get: one block per job, after all products of the
// attention are there.
#ifndef ATP_KERNELS_CUDA_PRINCIPAL_CHOOSE_CUH_
#define ATP_KERNELS_CUDA_PRINCIPAL_CHOOSE_CUH_

#include "kernels/cuda/principal_job.cuh"

namespace atp::cuda {

struct FitShared {
  Shared<double> sums;
  Shared<int32_t> indices;
};

// Entries whose `taken` is `want`, from `first` on: the one with the largest value. NaN is never largest.
__device__ __forceinline__ Largest LargestOf(const double* values, const int32_t* taken, int first, int n,
                                             const FitShared& shared) {
  Largest mine{0, -1};
  for (int i = first + static_cast<int>(threadIdx.x); i < n; i += kFitThreads) {
    if (taken[i] == 0) mine.Take(values[i] == values[i] ? values[i] : -1.0, i);
  }
  return BlockLargest(mine, shared.sums, shared.indices);
}

// Pivoted Cholesky of the Gram matrix: the same pivots as column-pivoted QR of the attention. Leaves
// job.taken[i] = 2 for entries that are chosen.
__device__ __forceinline__ void ChoosePivots(const FitJob& job, int n, const FitShared& shared) {
  const int me = static_cast<int>(threadIdx.x);
  for (int i = me; i < n; i += kFitThreads) {
    job.norms[i] = job.rest[i] = job.gram[static_cast<int64_t>(i) * n + i];
    job.taken[i] = 0;
  }
  __syncthreads();
  const double noise = kPrincipalNoise * LargestOf(job.norms, job.taken, 0, n, shared).value;
  int found = job.forced;
  for (int step = 0; found < job.count; ++step) {
    const Largest pivot = LargestOf(job.rest, job.taken, 0, n, shared);
    if (pivot.index < 0 || !(pivot.value > noise)) break;
    if (pivot.index >= job.forced) ++found;
    const double scale = 1 / sqrt(pivot.value);
    const double* row = job.gram + static_cast<int64_t>(pivot.index) * n;
    double* factor = job.factor + static_cast<int64_t>(step) * n;
    for (int i = me; i < n; i += kFitThreads) {
      if (i == pivot.index) job.taken[i] = i >= job.forced ? 2 : 1;
      if (job.taken[i] != 0) continue;
      double g = row[i];
#pragma unroll 4
      for (int k = 0; k < step; ++k) {
        g -= job.factor[static_cast<int64_t>(k) * n + i] *
             job.factor[static_cast<int64_t>(k) * n + pivot.index];
      }
      factor[i] = g * scale;
      job.rest[i] = fmax(job.rest[i] - factor[i] * factor[i], 0.0);
    }
    __syncthreads();
  }
  for (int i = me; i < job.forced; i += kFitThreads) job.taken[i] = 2;
  __syncthreads();
  // What is left is spanned: the most attended follow.
  for (; found < job.count; ++found) {
    const Largest next = LargestOf(job.norms, job.taken, job.forced, n, shared);
    if (me == 0) job.taken[next.index] = 2;
    __syncthreads();
  }
}

// Ascending indices i in [0, n) with keep(i), by the first warp. Returns their number to that warp.
template <class Keep>
__device__ __forceinline__ int ListWhere(int n, int32_t* out, const Keep& keep) {
  int found = 0;
  const int lane = static_cast<int>(threadIdx.x);
  for (int first = 0; first < n; first += kWarpSize) {
    const int i = first + lane;
    const bool kept = i < n && keep(i);
    const unsigned votes = __ballot_sync(kWarpMask, kept);
    if (kept) out[found + __popc(votes & ((1u << lane) - 1))] = i;
    found += __popc(votes);
  }
  return found;
}

// y = gram x, a warp per row.
__device__ __forceinline__ void MultiplyGram(const double* gram, int r, const double* x, double* y) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int i = static_cast<int>(threadIdx.x) / kWarpSize; i < r; i += kFitWarps) {
    double sum = 0;
#pragma unroll 4
    for (int j = lane; j < r; j += kWarpSize) sum += gram[static_cast<int64_t>(i) * r + j] * x[j];
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(kWarpMask, sum, distance);
    }
    if (lane == 0) y[i] = sum;
  }
  __syncthreads();
}

// The leading eigenvector of a matrix without negative elements has none either: `ones` is never orthogonal
// to it.
__device__ __forceinline__ double LargestEigenvalue(const double* gram, int r, double* x, double* y,
                                                    const FitShared& shared) {
  const int me = static_cast<int>(threadIdx.x);
  for (int i = me; i < r; i += kFitThreads) x[i] = 1.0;
  __syncthreads();
  double value = 0;
  for (int iteration = 0; iteration < 1000; ++iteration) {
    MultiplyGram(gram, r, x, y);
    double squares = 0;
    for (int i = me; i < r; i += kFitThreads) squares += y[i] * y[i];
    const double norm = sqrt(BlockSum(squares, shared.sums));
    if (!(norm > 0) || norm > 1e300) return norm;
    for (int i = me; i < r; i += kFitThreads) x[i] = y[i] / norm;
    __syncthreads();
    if (fabs(norm - value) <= 1e-14 * norm) return norm;
    value = norm;
  }
  return value;
}

// min_{w >= 0} |part w - 1|² by accelerated projected gradient (FISTA) from a uniform start. mass:
// job.vectors[0 .. r).
__device__ __forceinline__ void FitMass(const FitJob& job, int r, const FitShared& shared) {
  const int me = static_cast<int>(threadIdx.x), lane = me % kWarpSize;
  double *mass = job.vectors, *rhs = mass + r, *y = rhs + r, *product = y + r, *spare = product + r;
  const double step = 1.0 / fmax(LargestEigenvalue(job.part_gram, r, spare, product, shared), 1e-12);
  double mine = 0;
  for (int i = me / kWarpSize; i < r; i += kFitWarps) {
    const double* row = job.attention + static_cast<int64_t>(job.chosen[i]) * job.m;
    double sum = 0;
    for (int q = lane; q < job.m; q += kWarpSize) sum += row[q];
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(kWarpMask, sum, distance);
    }
    if (lane == 0) rhs[i] = sum, mine += sum;
  }
  const double start = job.m / fmax(BlockSum(mine, shared.sums), 1e-9);
  for (int i = me; i < r; i += kFitThreads) mass[i] = y[i] = start;
  __syncthreads();
  double t = 1;
  for (int iteration = 0; iteration < kPrincipalMassIterations; ++iteration) {
    const double t_next = (1 + sqrt(1 + 4 * t * t)) / 2;
    const double momentum = (t - 1) / t_next;
    MultiplyGram(job.part_gram, r, y, product);
    for (int i = me; i < r; i += kFitThreads) {
      const double next = fmax(y[i] - (product[i] - rhs[i]) * step, 0.0);
      y[i] = next + momentum * (next - mass[i]);
      mass[i] = next;
    }
    __syncthreads();
    t = t_next;
  }
  for (int i = me; i < r; i += kFitThreads) mass[i] = fmax(mass[i], static_cast<double>(kLeastPrincipalMass));
  __syncthreads();
}

// share[j][q]: softmax over the principal entries, and how far the mass is off.
__device__ __forceinline__ void Shares(const FitJob& job, int r, const FitShared& shared) {
  const int me = static_cast<int>(threadIdx.x), m = job.m;
  double error = 0;
  for (int q = me; q < m; q += kFitThreads) {
    double sum = 0;
    for (int j = 0; j < r; ++j) {
      const double x = job.attention[static_cast<int64_t>(job.chosen[j]) * m + q] * job.vectors[j];
      job.share[static_cast<int64_t>(j) * m + q] = x;
      sum += x;
    }
    error += (sum - 1) * (sum - 1);
    const double scale = 1 / fmax(sum, 1e-9);
    for (int j = 0; j < r; ++j) job.share[static_cast<int64_t>(j) * m + q] *= scale;
  }
  error = BlockSum(error, shared.sums);
  if (me == 0) job.result->mass_error = error;
}

// Cholesky of part_gram (of the shares by now, ridge added here) and shift := gram⁻¹ shift. False when the
// matrix is not positive definite. The factor's rows become columns: upper[k][i] = L[i][k].
__device__ __forceinline__ bool SolveRidge(const FitJob& job, int r, int d, const FitShared& shared) {
  const int me = static_cast<int>(threadIdx.x);
  double* gram = job.part_gram;
  double trace = 0;
  for (int j = me; j < r; j += kFitThreads) trace += gram[static_cast<int64_t>(j) * r + j];
  const double ridge = static_cast<double>(kPrincipalRidge) * BlockSum(trace, shared.sums) / r;
  for (int j = 0; j < r; ++j) {
    double* row = gram + static_cast<int64_t>(j) * r;
    // Symmetric: row j's part from j on becomes upper[j][j..].
    for (int i = j + me; i < r; i += kFitThreads) {
      double sum = row[i] + (i == j ? ridge : 0.0);
#pragma unroll 4
      for (int k = 0; k < j; ++k)
        sum -= gram[static_cast<int64_t>(k) * r + i] * gram[static_cast<int64_t>(k) * r + j];
      row[i] = sum;
    }
    __syncthreads();
    const double pivot = row[j];
    if (!(pivot > 0)) return false;  // every thread reads the same
    __syncthreads();
    const double root = sqrt(pivot);
    for (int i = j + me; i < r; i += kFitThreads) row[i] = i == j ? root : row[i] / root;
    __syncthreads();
  }
  constexpr int kRows = 8;  // that one pass over the rows before or behind them serves
  const int padded = (r + kRows - 1) / kRows * kRows;
  for (int c = me; c < d; c += kFitThreads) {
    double* x = job.shift + c;
    for (int i0 = 0; i0 < padded; i0 += kRows) {
      double sum[kRows];
#pragma unroll
      for (int a = 0; a < kRows; ++a) sum[a] = i0 + a < r ? x[static_cast<int64_t>(i0 + a) * d] : 0.0;
      for (int k = 0; k < i0; ++k) {
        const double other = x[static_cast<int64_t>(k) * d];
#pragma unroll
        for (int a = 0; a < kRows; ++a) {
          if (i0 + a < r) sum[a] -= gram[static_cast<int64_t>(k) * r + i0 + a] * other;
        }
      }
#pragma unroll
      for (int a = 0; a < kRows; ++a) {
        if (i0 + a >= r) continue;
#pragma unroll
        for (int b = 0; b < a; ++b) sum[a] -= gram[static_cast<int64_t>(i0 + b) * r + i0 + a] * sum[b];
        sum[a] /= gram[static_cast<int64_t>(i0 + a) * r + i0 + a];
        x[static_cast<int64_t>(i0 + a) * d] = sum[a];
      }
    }
    for (int i0 = padded - kRows; i0 >= 0; i0 -= kRows) {
      double sum[kRows];
#pragma unroll
      for (int a = 0; a < kRows; ++a) sum[a] = i0 + a < r ? x[static_cast<int64_t>(i0 + a) * d] : 0.0;
      for (int k = min(i0 + kRows, r); k < r; ++k) {
        const double other = x[static_cast<int64_t>(k) * d];
#pragma unroll
        for (int a = 0; a < kRows; ++a) sum[a] -= gram[static_cast<int64_t>(i0 + a) * r + k] * other;
      }
#pragma unroll
      for (int a = kRows - 1; a >= 0; --a) {
        if (i0 + a >= r) continue;
#pragma unroll
        for (int b = a + 1; b < kRows; ++b) {
          if (i0 + b < r) sum[a] -= gram[static_cast<int64_t>(i0 + a) * r + i0 + b] * sum[b];
        }
        sum[a] /= gram[static_cast<int64_t>(i0 + a) * r + i0 + a];
        x[static_cast<int64_t>(i0 + a) * d] = sum[a];
      }
    }
  }
  __syncthreads();
  return true;
}

}  // namespace atp::cuda

#endif  // ATP_KERNELS_CUDA_PRINCIPAL_CHOOSE_CUH_
