// FitPrincipalKeys on the device (kernels/principal_fit.h is the mathematics), in fp64 like the cpu's. All
// jobs go through the steps together, each step as wide as it can be: products by tiles over as many blocks
// as they have, the sequential ones (pivots, masses, the triangular solve) by one block per job.
#include <algorithm>
#include <vector>

#include "kernels/cuda/key_rounding.cuh"
#include "kernels/cuda/kv_tables.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/principal_choose.cuh"
#include "kernels/cuda/principal_job.cuh"
#include "kernels/cuda/principal_pages.cuh"
#include "kernels/cuda/principal_product.cuh"

namespace atp::cuda {
namespace {

constexpr int kGatherBlocks = 8;            // per job
constexpr int kSoftmaxQueries = kWarpSize;  // per block
// Jobs at once are at most so many, about one for each multiprocessor, and as many as this has room for: one
// of 256 tokens at head_dim 128 takes some 3.5 MB.
constexpr size_t kJobsAtOnce = 128;
constexpr size_t kScratchBytes = size_t{512} << 20;

// Where entry i of a job is: its block, layout and place there.
struct EntryPlace {
  const std::byte* block;
  const PageLayout* page;
  int entry;
};
__device__ __forceinline__ EntryPlace PlaceOf(const FitJob& job, const FitShape& shape, int i) {
  const bool principal = i < job.principal_entries;
  const int at = principal ? i : i - job.principal_entries;
  const PageLayout* page = principal ? &job.page : &job.exact_page;
  const BlockId id = (principal ? job.principal : job.exact)[at / page->entries];
  return {shape.Block(id), page, at % page->entries};
}
__device__ __forceinline__ float LogMassOf(const EntryPlace& place) {
  if (!place.page->with_log_mass) return 0;
  return reinterpret_cast<const float*>(place.block + place.page->log_mass_offset)[place.entry];
}

// Grid: (1, jobs), one warp. Lists the entries that are not padding.
__global__ void ListEntries(const FitJob* jobs, const FitShape shape) {
  const FitJob& job = jobs[blockIdx.y];
  const float padding = __int_as_float(static_cast<int>(0xff800000u));
  const int n =
      ListWhere(job.entries, job.source, [&](int i) { return LogMassOf(PlaceOf(job, shape, i)) != padding; });
  if (threadIdx.x == 0) *job.result = {n, 0, 0.0};
}

// Grid: (kGatherBlocks, jobs). Keys, values and log masses, and each kept query rotated to the position it is
// asked from and scaled by 1/sqrt(d).
__global__ void __launch_bounds__(kFitThreads) Gather(const FitJob* jobs, const FitShape shape) {
  const FitJob& job = jobs[blockIdx.y];
  const int first = static_cast<int>(blockIdx.x) * kFitThreads + static_cast<int>(threadIdx.x);
  constexpr int kStride = kGatherBlocks * kFitThreads;
  const int n = job.result->n, d = shape.head_dim, half = d / 2;
  const int lane = first % kWarpSize;
#pragma unroll 1
  for (int i = first / kWarpSize; i < n; i += kStride / kWarpSize) {
    const EntryPlace place = PlaceOf(job, shape, job.source[i]);
    const PageLayout& page = *place.page;
    float key_scale = 1, value_scale = 1;
    if (HasScales(page.format)) {
      key_scale = ScaleAt(place.block, page.key_scale_offset, place.entry);
      value_scale = ScaleAt(place.block, page.value_scale_offset, place.entry);
    }
    float key[kHeadVectors];
#pragma unroll
    for (int j = 0; j < kHeadVectors; ++j) {
      const int c = lane + j * kWarpSize;
      key[j] = 0;
      if (c >= d) continue;
      key[j] = ElementAt(place.block, page.format, page.KeyIndex(c, place.entry), key_scale);
      job.values[static_cast<int64_t>(i) * d + c] = ElementAt(place.block + page.value_offset, page.format,
                                                              page.ValueIndex(c, place.entry), value_scale);
    }
    if (RotatesKeys(page.format)) WarpWalshHadamard<kWarpSize>(key, d);
    StoreRow(key, d, job.keys + static_cast<int64_t>(i) * d);
    if (lane == 0) job.log_mass[i] = LogMassOf(place);
  }
  const double scale = 1.0 / sqrt(static_cast<double>(d));
  for (int i = first; i < job.m * half; i += kStride) {
    const int q = i / half, c = i % half, g = q / job.samples, s = q % job.samples;
    const BlockId id = job.queries[g * shape.query_blocks_per_head + s / shape.queries_per_block];
    const auto* in = reinterpret_cast<const uint16_t*>(shape.Block(id)) +
                     static_cast<int64_t>(s % shape.queries_per_block) * d;
    const double a = BF16ToFloat(in[c]), b = BF16ToFloat(in[c + half]);
    // The angle is exact in double; the reduction of cos() and sin() for all doubles would cost a stack
    // frame.
    constexpr double kTurnsPerRadian = 0.15915494309189533577;
    const double turns = static_cast<double>(job.positions[q]) * shape.inverse_frequency[c] * kTurnsPerRadian;
    double sine, cosine;
    sincospi(2 * (turns - rint(turns)), &sine, &cosine);
    double* out = job.queries_rotated + static_cast<int64_t>(q) * d + c;
    // Rounded to fp32, as they are handed to the other backends' fits.
    out[0] = static_cast<float>((a * cosine - b * sine) * scale);
    out[half] = static_cast<float>((b * cosine + a * sine) * scale);
  }
}

enum class Step { kScores, kGram, kTarget, kResidual, kShareGram, kShift, kError };

__device__ __forceinline__ Product ProductOf(const FitJob& job, int d, Step step) {
  const int n = job.result->n, m = job.m, r = job.count;
  switch (step) {
    case Step::kScores:
      return {{job.keys, d, 1}, {job.queries_rotated, d, 1}, n, m, d, nullptr, 1, job.attention};
    case Step::kGram:
      return {{job.attention, m, 1}, {job.attention, m, 1}, n, n, m, nullptr, 1, job.gram};
    case Step::kTarget:
      return {{job.attention, 1, m}, {job.values, 1, d}, m, d, n, nullptr, 1, job.target};
    case Step::kResidual:
      return {{job.share, 1, m}, {job.part_values, 1, d}, m, d, r, job.target, -1, job.residual};
    case Step::kShareGram:
      return {{job.share, m, 1}, {job.share, m, 1}, r, r, m, nullptr, 1, job.part_gram};
    case Step::kShift:
      return {{job.share, m, 1}, {job.residual, 1, d}, r, d, m, nullptr, 1, job.shift};
    case Step::kError:
      break;
  }
  return {{job.share, 1, m}, {job.shift, 1, d}, m, d, r, job.residual, -1, job.error};
}

// Grid: (tiles of the first and then of the second product, jobs): a device takes more than 65,535 of the
// former.
__global__ void __launch_bounds__(kProductThreads)
    Multiply(const FitJob* jobs, int head_dim, Step first, Step second, bool both) {
  const FitJob& job = jobs[blockIdx.y];
  if (Keeps(job)) return;
  int tile = static_cast<int>(blockIdx.x);
  Product product = ProductOf(job, head_dim, first);
  const int tiles = TilesOf(product.size_a, product.size_b);
  if (tile >= tiles) {
    if (!both) return;
    tile -= tiles;
    product = ProductOf(job, head_dim, second);
    if (tile >= TilesOf(product.size_a, product.size_b)) return;
  }
  MultiplyTile(product, tile);
}

// Grid: (m / kSoftmaxQueries, jobs). Scores plus log masses become attention, in place: softmax over entries.
__global__ void __launch_bounds__(kFitThreads) Softmax(const FitJob* jobs) {
  const FitJob& job = jobs[blockIdx.y];
  if (Keeps(job)) return;
  SharedArena arena;
  const Shared<double> room = arena.Take<double>(kFitThreads);
  const int n = job.result->n, m = job.m;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize,
            warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int q = static_cast<int>(blockIdx.x) * kSoftmaxQueries + lane;
  const bool there = q < m;
  double top = -1e308;
  for (int i = warp; there && i < n; i += kFitWarps) {
    double& score = job.attention[static_cast<int64_t>(i) * m + q];
    score += job.log_mass[i];
    top = fmax(top, score);
  }
  room[warp * kWarpSize + lane] = top;
  __syncthreads();
  for (int w = 0; w < kFitWarps; ++w) top = fmax(top, static_cast<double>(room[w * kWarpSize + lane]));
  double sum = 0;
  for (int i = warp; there && i < n; i += kFitWarps) {
    double& score = job.attention[static_cast<int64_t>(i) * m + q];
    score = exp(score - top);
    sum += score;
  }
  __syncthreads();
  room[warp * kWarpSize + lane] = sum;
  __syncthreads();
  sum = 0;
  for (int w = 0; w < kFitWarps; ++w) sum += room[w * kWarpSize + lane];
  for (int i = warp; there && i < n; i += kFitWarps) job.attention[static_cast<int64_t>(i) * m + q] /= sum;
}

__device__ __forceinline__ FitShared TakeShared(SharedArena& arena) {
  const Shared<double> sums = arena.Take<double>(kFitWarps);
  return {sums, arena.Take<int32_t>(kFitWarps)};
}
constexpr size_t kFitShared = SharedBytes<double>(kFitWarps) + SharedBytes<int32_t>(kFitWarps);

// Grid: (1, jobs). Pivots, masses and shares.
__global__ void __launch_bounds__(kFitThreads) Choose(const FitJob* jobs, int d) {
  const FitJob& job = jobs[blockIdx.y];
  if (Keeps(job)) return;
  SharedArena arena;
  const FitShared shared = TakeShared(arena);
  const int n = job.result->n, r = job.count, me = static_cast<int>(threadIdx.x);
  ChoosePivots(job, n, shared);
  if (me < kWarpSize) ListWhere(n, job.chosen, [&](int i) { return job.taken[i] == 2; });
  __syncthreads();
  for (int i = me; i < r * r; i += kFitThreads) {
    job.part_gram[i] = job.gram[static_cast<int64_t>(job.chosen[i / r]) * n + job.chosen[i % r]];
  }
  for (int i = me; i < r * d; i += kFitThreads) {
    job.part_values[i] = job.values[static_cast<int64_t>(job.chosen[i / d]) * d + i % d];
  }
  __syncthreads();
  FitMass(job, r, shared);
  Shares(job, r, shared);
}

// Grid: (1, jobs).
__global__ void __launch_bounds__(kFitThreads) Solve(const FitJob* jobs, int d) {
  const FitJob& job = jobs[blockIdx.y];
  if (Keeps(job)) return;
  SharedArena arena;
  const FitShared shared = TakeShared(arena);
  const bool solved = SolveRidge(job, job.count, d, shared);
  double wrong = 0;
  for (int i = static_cast<int>(threadIdx.x); i < job.count * d; i += kFitThreads) {
    wrong += fabs(job.shift[i]) <= 1e300 ? 0.0 : 1.0;
  }
  wrong = BlockSum(wrong, shared.sums);
  if (threadIdx.x == 0) job.result->solved = solved && wrong == 0;
}

// Grid: (1, jobs). Keys for pages of integers: transformed and rounded, their scales in job.norms.
__global__ void __launch_bounds__(kFitThreads) RoundKeys(const FitJob* jobs, int d) {
  const FitJob& job = jobs[blockIdx.y];
  if (!RotatesKeys(job.page.format)) return;
  SharedArena arena;
  PrepareRounding(job, d, arena.Take<double>(kFitWarps));
  const int r = Keeps(job) ? job.result->n : job.count, top = TopOf(job.page.format);
#pragma unroll 1
  for (int j = static_cast<int>(threadIdx.x) / kWarpSize; j < r; j += kFitWarps) {
    double* row = job.keys + static_cast<int64_t>(Keeps(job) ? j : job.chosen[j]) * d;
    float key[kHeadVectors], largest = 0;
    LoadTransformed(row, d, key);
#pragma unroll
    for (int k = 0; k < kHeadVectors; ++k) {
      if (static_cast<int>(threadIdx.x) % kWarpSize + k * kWarpSize < d)
        largest = fmaxf(largest, fabsf(key[k]));
    }
    const float scale = BF16ToFloat(ScaleBits(WarpMax(largest), top));
    RoundKey(job.rounding, d, scale, top, key);
    StoreRow(key, d, row);
    if (threadIdx.x % kWarpSize == 0) job.norms[j] = scale;
  }
}

// Grid: (1, jobs). The report, and the entries into their pages. Degenerate input ends as the chosen keys
// with their own values, each standing for n/r entries.
__global__ void __launch_bounds__(kFitThreads, 1)
    Finish(const FitJob* jobs, const FitShape shape, PrincipalFitReport* reports) {
  const FitJob& job = jobs[blockIdx.y];
  SharedArena arena;
  const FitShared shared = TakeShared(arena);
  const int me = static_cast<int>(threadIdx.x), d = shape.head_dim, n = job.result->n;
  const bool kept = Keeps(job), fitted = !kept && job.result->solved != 0;
  double error = 0, norm = 0;
  for (int i = me; fitted && i < job.m * d; i += kFitThreads) {
    error += job.error[i] * job.error[i], norm += job.target[i] * job.target[i];
  }
  error = BlockSum(error, shared.sums);
  norm = BlockSum(norm, shared.sums);
  if (me == 0) {
    PrincipalFitReport& report = reports[blockIdx.y];
    report.mass_residual = fitted ? static_cast<float>(sqrt(job.result->mass_error / job.m)) : 0.0f;
    report.output_residual = fitted ? static_cast<float>(sqrt(error / fmax(norm, 1e-30))) : 0.0f;
    report.fitted = fitted;
  }
  const int r = kept ? n : job.count;
  const auto source = [&](int j) { return static_cast<int64_t>(kept ? j : job.chosen[j]); };
  const PageLayout& page = job.page;
#pragma unroll 1
  for (int first = 0; first < job.count; first += page.entries) {
    const auto key = [&](int e, int c) {
      return first + e < r ? static_cast<float>(job.keys[source(first + e) * d + c]) : 0.0f;
    };
    const auto value = [&](int e, int c) {
      const int j = first + e;
      if (j >= r) return 0.0f;
      const double shift = fitted ? job.shift[static_cast<int64_t>(j) * d + c] : 0.0;
      return static_cast<float>(job.values[source(j) * d + c] + shift);
    };
    const auto mass = [&](int e) {
      const int j = first + e;
      if (j >= r) return __int_as_float(static_cast<int>(0xff800000u));
      const double more = kept ? 0.0 : log(fitted ? job.vectors[j] : static_cast<double>(n) / job.count);
      return static_cast<float>(job.log_mass[source(j)] + more);
    };
    const auto key_scale = [&](int e) {
      return first + e < r ? FloatToBF16(static_cast<float>(job.norms[first + e])) : uint16_t{0};
    };
    StorePage(page, shape.Block(job.out[first / page.entries]), kFitThreads, key, key_scale, value, mass);
  }
}

// Hands out the workspace; counts first, without memory.
class Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}
  template <class T>
  void Take(T** out, size_t count) {
    *out = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * sizeof(T) + 15) / 16 * 16;
  }
  size_t used() const { return used_; }

 private:
  std::byte* base_;
  size_t used_ = 0;
};

void Carve(FitJob& job, size_t d, Carver& carver) {
  const auto n = static_cast<size_t>(job.entries), m = static_cast<size_t>(job.m);
  const auto r = static_cast<size_t>(std::min(job.count, job.entries));
  carver.Take(&job.result, 1);
  carver.Take(&job.source, n), carver.Take(&job.chosen, r), carver.Take(&job.taken, n);
  carver.Take(&job.keys, n * d), carver.Take(&job.values, n * d), carver.Take(&job.log_mass, n);
  carver.Take(&job.queries_rotated, m * d), carver.Take(&job.attention, n * m);
  carver.Take(&job.gram, n * n), carver.Take(&job.factor, r * n);
  carver.Take(&job.norms, n), carver.Take(&job.rest, n);
  carver.Take(&job.part_gram, r * r), carver.Take(&job.vectors, 5 * r), carver.Take(&job.share, r * m);
  carver.Take(&job.target, m * d), carver.Take(&job.residual, m * d), carver.Take(&job.error, m * d);
  carver.Take(&job.shift, r * d), carver.Take(&job.part_values, r * d), carver.Take(&job.rounding, 2 * d * d);
}

// Block ids and positions of the jobs, as one table that the jobs point into.
cudaError_t UploadIds(const OpContext& context, const FitPrincipalKeysArgs& args,
                      std::span<const PrincipalFitJob> jobs, std::vector<FitJob>& out) {
  std::vector<int32_t> ids;
  std::vector<size_t> at;  // five per job
  const auto add = [&](const int32_t* from, int count) {
    at.push_back(ids.size());
    ids.insert(ids.end(), from, from + count);
  };
  const int query_blocks = args.group * args.query_page->blocks_per_head();
  for (const PrincipalFitJob& job : jobs) {
    const int per_page = job.page->entries();
    add(job.principal, CeilDiv(job.principal_entries, per_page));
    add(job.exact, CeilDiv(job.exact_entries, args.pool.exact->entries()));
    add(job.queries, query_blocks);
    add(job.positions, args.group * job.samples);
    add(job.out, CeilDiv(job.count, per_page));
  }
  cudaError_t error = cudaSuccess;
  const int32_t* device = context.staging->Upload(std::span<const int32_t>(ids), context.stream, &error);
  if (error != cudaSuccess) return error;
  for (size_t i = 0; i < jobs.size(); ++i) {
    const PrincipalFitJob& job = jobs[i];
    FitJob fit{};
    fit.principal = device + at[5 * i], fit.exact = device + at[5 * i + 1],
    fit.queries = device + at[5 * i + 2];
    fit.positions = device + at[5 * i + 3], fit.out = device + at[5 * i + 4];
    fit.principal_entries = job.principal_entries, fit.exact_entries = job.exact_entries;
    fit.samples = job.samples, fit.count = job.count, fit.forced = std::min(job.forced, job.count);
    fit.page = LayoutOf(*job.page), fit.exact_page = LayoutOf(*args.pool.exact);
    fit.entries = job.principal_entries + job.exact_entries, fit.m = args.group * job.samples;
    out.push_back(fit);
  }
  return cudaSuccess;
}

// The steps, in order. most: the most entries, queries and count of any job.
cudaError_t RunSteps(const OpContext& context, const FitJob* jobs, unsigned count, const FitJob& most,
                     const FitShape& shape, PrincipalFitReport* reports) {
  const int d = shape.head_dim, n = most.entries, m = most.m, r = std::min(most.count, most.entries);
  cudaError_t error = cudaSuccess;
  const auto launch = [&](const char* name, auto kernel, int blocks, int threads, size_t bytes,
                          const auto&... arguments) {
    if (error != cudaSuccess) return;
    error = Launch(name, kernel, dim3(static_cast<unsigned>(blocks), count),
                   dim3(static_cast<unsigned>(threads)), bytes, context.stream, jobs, arguments...);
  };
  const auto multiply = [&](Step first, Step second, int tiles) {
    launch("FitMultiply", Multiply, tiles, kProductThreads, 0, d, first, second, first != second);
  };
  launch("FitListEntries", ListEntries, 1, kWarpSize, 0, shape);
  launch("FitGather", Gather, kGatherBlocks, kFitThreads, 0, shape);
  multiply(Step::kScores, Step::kScores, TilesOf(n, m));
  launch("FitSoftmax", Softmax, CeilDiv(m, kSoftmaxQueries), kFitThreads, SharedBytes<double>(kFitThreads));
  multiply(Step::kGram, Step::kTarget, TilesOf(n, n) + TilesOf(m, d));
  launch("FitChoose", Choose, 1, kFitThreads, kFitShared, d);
  multiply(Step::kResidual, Step::kResidual, TilesOf(m, d));
  multiply(Step::kShareGram, Step::kShift, TilesOf(r, r) + TilesOf(r, d));
  launch("FitSolve", Solve, 1, kFitThreads, kFitShared, d);
  multiply(Step::kError, Step::kError, TilesOf(m, d));
  launch("FitRoundKeys", RoundKeys, 1, kFitThreads, SharedBytes<double>(kFitWarps), d);
  launch("FitFinish", Finish, 1, kFitThreads, kFitShared, shape, reports);
  return error;
}

cudaError_t FitSome(const OpContext& context, const FitPrincipalKeysArgs& args, size_t first, size_t count,
                    const FitShape& shape) {
  std::vector<FitJob> jobs;
  cudaError_t error = UploadIds(context, args, args.jobs.subspan(first, count), jobs);
  if (error != cudaSuccess) return error;
  const auto d = static_cast<size_t>(shape.head_dim);
  FitJob most{};
  const auto carve = [&](std::byte* base) {
    Carver carver(base);
    for (FitJob& job : jobs) {
      Carve(job, d, carver);
      most.entries = std::max(most.entries, job.entries), most.m = std::max(most.m, job.m);
      most.count = std::max(most.count, job.count);
    }
    return carver.used();
  };
  void* memory = context.workspace->Reserve(carve(nullptr), &error);
  if (memory == nullptr) return error;
  carve(static_cast<std::byte*>(memory));
  auto* reports = static_cast<PrincipalFitReport*>(
      context.staging->Receive(args.reports.data() + first, count * sizeof(PrincipalFitReport), &error));
  if (reports == nullptr) return error;
  const FitJob* device = context.staging->Upload(std::span<const FitJob>(jobs), context.stream, &error);
  if (error != cudaSuccess) return error;
  return RunSteps(context, device, static_cast<unsigned>(count), most, shape, reports);
}

size_t JobBytes(int64_t entries, int64_t references, int64_t count, int64_t head_dim) {
  FitJob job{};
  job.entries = static_cast<int32_t>(entries), job.m = static_cast<int32_t>(references);
  job.count = static_cast<int32_t>(count);
  Carver carver(nullptr);
  Carve(job, static_cast<size_t>(head_dim), carver);
  return carver.used();
}

}  // namespace

size_t FitPrincipalKeysBytes(const StepLimits& limits) {
  if (limits.fit_entries == 0) return 0;
  const size_t one = JobBytes(limits.fit_entries, limits.fit_references, limits.fit_count, limits.head_dim);
  const size_t jobs =
      std::min(kJobsAtOnce, static_cast<size_t>(limits.layers * limits.sequences * limits.kv_heads));
  return std::max(one, std::min(jobs * one, kScratchBytes));
}

cudaError_t FitPrincipalKeys(const OpContext& context, const FitPrincipalKeysArgs& args) {
  const QueryPage& queries = *args.query_page;
  const FitShape shape{args.pool.data,     args.pool.block_bytes,     args.inverse_frequency, args.group,
                       queries.head_dim(), queries.blocks_per_head(), queries.per_block()};
  // What is there already, if one job fits: a request's own compression is not reserved for, and the device
  // may be full.
  const size_t room = context.workspace->bytes();
  cudaError_t error = cudaSuccess;
  for (size_t first = 0; first < args.jobs.size() && error == cudaSuccess;) {
    size_t count = 0, used = 0;
    for (const PrincipalFitJob& job : args.jobs.subspan(first)) {
      used += JobBytes(job.principal_entries + job.exact_entries, args.group * job.samples, job.count,
                       queries.head_dim());
      if (count == kJobsAtOnce || (count > 0 && used > room)) break;
      ++count;
    }
    error = FitSome(context, args, first, count, shape);
    first += count;
  }
  return error;
}

}  // namespace atp::cuda
