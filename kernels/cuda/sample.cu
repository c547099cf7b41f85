// The next token of each row of logits, a block per row: only tokens and log probabilities go to the host.
//
// Nothing is sorted. The tokens that may be drawn are the best ones by rank down to a cut, a logit and an id,
// and a cut is found by bisection: how many, or what weight, is at least as good as this? Each question is a
// pass over the row, which the second-level cache holds. All sums have one fixed order.
#include <algorithm>
#include <cstddef>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/ops.h"

namespace atp::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kPieces = 256;                                      // that a row is cut into for the draw
constexpr size_t kScratchBytes = sizeof(double) + sizeof(float);  // per logit
constexpr float kLargest = 3.402823466e38f;

// A SampleRow. Adjustments count from the table's first.
struct Row {
  SampleRow wanted;
  int32_t first_adjustment;
  int32_t adjustments;
};

// What the rows lie in.
struct Vocabulary {
  const float* logits;  // as the model has them
  float* adjusted;      // [rows, size], of the rows that are sampled
  double* weights;      // [rows, size]
  int size;
  int padding = 0;
};

__device__ __forceinline__ float Never() { return __int_as_float(static_cast<int>(0xff800000u)); }

__device__ __forceinline__ float Sane(float logit) {
  return logit != logit ? Never() : fminf(logit, kLargest);
}

// Ordered as the logits are; -0 is 0.
__device__ __forceinline__ uint32_t KeyOf(float logit) {
  const uint32_t bits = __float_as_uint(logit + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float LogitOf(uint32_t key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}
// Ordered as the ranks are: the smaller id is the better among equals.
__device__ __forceinline__ uint64_t RankOf(uint32_t key, int token) {
  return static_cast<uint64_t>(key) << 32 | (0xffffffffu - static_cast<uint32_t>(token));
}
__device__ __forceinline__ int TokenOf(uint64_t rank) {
  return static_cast<int>(0xffffffffu - static_cast<uint32_t>(rank));
}
__device__ __forceinline__ uint32_t KeyOfRank(uint64_t rank) { return static_cast<uint32_t>(rank >> 32); }

__device__ __forceinline__ int Lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ __forceinline__ int Warp() { return static_cast<int>(threadIdx.x) / kWarpSize; }

template <class T>
struct Sum {
  __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
};
struct Largest {
  __device__ __forceinline__ uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};

// Over the block; every thread has the result. Eight bytes of `memory` per warp.
class BlockReduction {
 public:
  __device__ __forceinline__ explicit BlockReduction(const Shared<uint64_t>& memory) : memory_(memory) {}

  template <class T, class Combine>
  __device__ __forceinline__ T operator()(T value, const Combine& combine) const {
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      value = combine(value, __shfl_xor_sync(kWarpMask, value, distance));
    }
    __syncthreads();  // who still reads the last one's
    const Bits<T> mine{value};
    if (Lane() == 0) memory_[Warp()] = mine.word;
    __syncthreads();
    T result = At<T>(0);
#pragma unroll 1
    for (int warp = 1; warp < kWarps; ++warp) result = combine(result, At<T>(warp));
    return result;
  }

 private:
  template <class T>
  union Bits {
    __device__ __forceinline__ explicit Bits(T v) : word(0) { value = v; }
    uint64_t word;
    T value;
  };
  template <class T>
  __device__ __forceinline__ T At(int warp) const {
    Bits<T> bits{T{}};
    bits.word = memory_[warp];
    return bits.value;
  }
  Shared<uint64_t> memory_;
};

// Over all tokens of a row; every thread has the result.
template <class T, class Combine, class Of>
__device__ __forceinline__ T OverTokens(const BlockReduction& reduce, int size, const Combine& combine,
                                        const Of& of) {
  T value{};
  for (int i = static_cast<int>(threadIdx.x); i < size; i += kThreads) value = combine(value, of(i));
  return reduce(value, combine);
}

// The largest x in [low, high] of which enough(x), which is true of `low` and never again once it is false.
template <class X, class Enough>
__device__ __forceinline__ X LastEnough(X low, X high, const Enough& enough) {
#pragma unroll 1
  while (low < high) {
    const X middle = low + (high - low + 1) / 2;
    if (enough(middle)) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Copies a row's logits and adjusts them.
__device__ __forceinline__ void Adjust(const Row& row, const LogitAdjustment* adjustments, const float* from,
                                       float* to, int size) {
  for (int i = static_cast<int>(threadIdx.x); i < size; i += kThreads) to[i] = Sane(from[i]);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < row.adjustments; i += kThreads) {
    const LogitAdjustment& adjustment = adjustments[row.first_adjustment + i];
    float x = fminf(to[adjustment.token] + adjustment.bias, kLargest);
    if (adjustment.seen) {
      const float penalty = row.wanted.repetition_penalty;
      x = fminf(x > 0 ? x / penalty : x * penalty, kLargest);
    }
    if (adjustment.times > 0) {
      const float times = static_cast<float>(adjustment.times);
      x -= __fadd_rn(row.wanted.presence_penalty, __fmul_rn(row.wanted.frequency_penalty, times));
    }
    to[adjustment.token] = adjustment.forbidden ? Never() : x;
  }
  __syncthreads();
}

// The rank of the m-th token, in order of ids, whose logit is `key`'s.
__device__ __forceinline__ uint64_t RankOfTie(const BlockReduction& reduce, const float* logits, int size,
                                              uint32_t key, int m) {
  // As a search for the last rank that has m ties at least as good as it.
  return LastEnough(RankOf(key, size - 1), RankOf(key, 0), [&](uint64_t rank) {
    return OverTokens<int>(reduce, size, Sum<int>(), [&](int i) {
             const uint64_t mine = RankOf(KeyOf(logits[i]), i);
             return KeyOfRank(mine) == key && mine >= rank ? 1 : 0;
           }) >= m;
  });
}

// The rank of the last token that top_k leaves.
__device__ __forceinline__ uint64_t CutOfTopK(const BlockReduction& reduce, const float* logits, int size,
                                              int top_k, uint32_t best) {
  const auto count = [&](uint32_t key) {
    return OverTokens<int>(reduce, size, Sum<int>(), [&](int i) { return KeyOf(logits[i]) >= key ? 1 : 0; });
  };
  const uint32_t key = LastEnough(0u, best, [&](uint32_t middle) { return count(middle) >= top_k; });
  return RankOfTie(reduce, logits, size, key, top_k - count(key + 1));
}

// The rank of the last token that top_p leaves of those down to `cut`.
__device__ __forceinline__ uint64_t CutOfTopP(const BlockReduction& reduce, const float* logits,
                                              const double* weights, int size, float top_p, uint32_t best,
                                              float temperature, uint64_t cut) {
  const auto weight = [&](uint32_t key) {
    return OverTokens<double>(reduce, size, Sum<double>(), [&](int i) {
      const uint64_t rank = RankOf(KeyOf(logits[i]), i);
      return KeyOfRank(rank) >= key && rank >= cut ? weights[i] : 0.0;
    });
  };
  const double wanted = top_p * weight(0);
  const uint32_t key =
      LastEnough(KeyOfRank(cut), best, [&](uint32_t middle) { return weight(middle) >= wanted; });
  // Equal logits have equal weights.
  const double each = exp((static_cast<double>(LogitOf(key)) - LogitOf(best)) / temperature);
  const double ties = ceil((wanted - weight(key + 1)) / each);
  const int m = ties < 1 ? 1 : ties < size ? static_cast<int>(ties) : size;
  const uint64_t rank = RankOfTie(reduce, logits, size, key, m);
  return rank > cut ? rank : cut;
}

struct Place {
  int index;
  double left;
};

// Where `left` falls among `count` weights beside each other, and what is left of it there; by one warp. A
// little that rounding leaves falls on the last one that is not zero.
template <class At>
__device__ __forceinline__ Place Fall(int count, double left, const At& at) {
  Place place{0, 1e300};
#pragma unroll 1
  for (int begin = 0; begin < count; begin += kWarpSize) {
    const double weight = begin + Lane() < count ? at(begin + Lane()) : 0.0;
    double sum = weight;  // of the lanes up to this one
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const double other = __shfl_up_sync(kWarpMask, sum, static_cast<unsigned>(distance));
      if (Lane() >= distance) sum += other;
    }
    const unsigned possible = __ballot_sync(kWarpMask, weight > 0);
    const unsigned behind = __ballot_sync(kWarpMask, weight > 0 && left < sum);
    if (behind != 0) {
      const int lane = __ffs(static_cast<int>(behind)) - 1;
      const double before = __shfl_sync(kWarpMask, sum - weight, lane);
      return {begin + lane, left > before ? left - before : 0.0};
    }
    if (possible != 0) place.index = begin + kWarpSize - 1 - __clz(static_cast<int>(possible));
    left -= __shfl_sync(kWarpMask, sum, kWarpSize - 1);
  }
  return place;
}

// Grid: the rows that are drawn.
__global__ void __launch_bounds__(kThreads) DrawTokens(const Row* rows, const LogitAdjustment* adjustments,
                                                       const Vocabulary vocabulary, SampledRow* out) {
  const Row row = rows[blockIdx.x];
  if (row.wanted.given >= 0) {
    if (threadIdx.x == 0) out[blockIdx.x].token = row.wanted.given;
    return;
  }
  const int size = vocabulary.size;
  float* logits = vocabulary.adjusted + static_cast<int64_t>(blockIdx.x) * size;
  double* weights = vocabulary.weights + static_cast<int64_t>(blockIdx.x) * size;
  SharedArena arena;
  const BlockReduction reduce(arena.Take<uint64_t>(kWarps));
  const Shared<double> pieces = arena.Take<double>(kPieces);
  Adjust(row, adjustments, vocabulary.logits + static_cast<int64_t>(row.wanted.row) * size, logits, size);
  const uint64_t top =
      OverTokens<uint64_t>(reduce, size, Largest(), [&](int i) { return RankOf(KeyOf(logits[i]), i); });
  const uint32_t best = KeyOfRank(top);
  const float largest = LogitOf(best);
  if (row.wanted.temperature <= 0 || largest == Never()) {
    if (threadIdx.x == 0) out[blockIdx.x].token = TokenOf(top);
    return;
  }
  for (int i = static_cast<int>(threadIdx.x); i < size; i += kThreads) {
    const double difference = static_cast<double>(logits[i]) - largest;
    weights[i] = difference == 0 ? 1.0 : exp(difference / row.wanted.temperature);
  }
  __syncthreads();
  uint64_t cut = 0;
  if (row.wanted.top_k > 0 && row.wanted.top_k < size) {
    cut = CutOfTopK(reduce, logits, size, row.wanted.top_k, best);
  }
  if (row.wanted.top_p < 1) {
    cut = CutOfTopP(reduce, logits, weights, size, row.wanted.top_p, best, row.wanted.temperature, cut);
  }
  const auto weight = [&](int i) {
    const double w = weights[i];
    return w >= row.wanted.min_p && RankOf(KeyOf(logits[i]), i) >= cut ? w : 0.0;
  };
  const int piece = CeilDiv(size, kPieces);
#pragma unroll 1
  for (int p = Warp(); p < kPieces; p += kWarps) {
    double sum = 0;
    for (int i = p * piece + Lane(); i < min((p + 1) * piece, size); i += kWarpSize) sum += weight(i);
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(kWarpMask, sum, distance);
    }
    if (Lane() == 0) pieces[p] = sum;
  }
  __syncthreads();
  double total = 0;
#pragma unroll 1
  for (int p = 0; p < kPieces; ++p) total += pieces[p];
  if (Warp() != 0) return;  // no barrier follows
  const Place at = Fall(kPieces, row.wanted.uniform * total, [&](int p) -> double { return pieces[p]; });
  const int first = at.index * piece;
  const Place token = Fall(min(piece, size - first), at.left, [&](int i) { return weight(first + i); });
  if (Lane() == 0) out[blockIdx.x].token = first + token.index;
}

// Log probabilities of the logits as they are. Grid: rows.
__global__ void __launch_bounds__(kThreads)
    ScoreTokens(const Row* rows, const Vocabulary vocabulary, SampledRow* out) {
  const Row row = rows[blockIdx.x];
  if (row.wanted.top_logprobs < 0) return;
  const int size = vocabulary.size;
  const float* logits = vocabulary.logits + static_cast<int64_t>(row.wanted.row) * size;
  SampledRow& result = out[blockIdx.x];
  SharedArena arena;
  const BlockReduction reduce(arena.Take<uint64_t>(kWarps));
  // The best token that is worse than the last one.
  const auto next = [&](uint64_t last) {
    return OverTokens<uint64_t>(reduce, size, Largest(), [&](int i) {
      const uint64_t rank = RankOf(KeyOf(Sane(logits[i])), i);
      return rank < last ? rank : 0;
    });
  };
  uint64_t rank = next(~uint64_t{0});
  const double largest = LogitOf(KeyOfRank(rank));
  const double log_sum = log(OverTokens<double>(reduce, size, Sum<double>(), [&](int i) {
    const float logit = Sane(logits[i]);
    return logit == Never() ? 0.0 : exp(static_cast<double>(logit) - largest);
  }));
  const auto logprob = [&](float logit) {
    return logit == Never() ? Never() : static_cast<float>(static_cast<double>(logit) - largest - log_sum);
  };
  if (threadIdx.x == 0) result.logprob = logprob(Sane(logits[result.token]));
  const int count = min(min(row.wanted.top_logprobs, kMaxTopLogprobs), size);
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    if (threadIdx.x == 0) {
      result.top_tokens[i] = TokenOf(rank);
      result.top_logprobs[i] = logprob(LogitOf(KeyOfRank(rank)));
    }
    if (i + 1 < count) rank = next(rank);
  }
}

}  // namespace

size_t SampleTokensBytes(const StepLimits& limits) {
  return static_cast<size_t>(limits.logit_rows * limits.vocab) * kScratchBytes;
}

cudaError_t SampleTokens(const OpContext& context, const SampleTokensArgs& args) {
  if (args.rows.empty()) return cudaSuccess;
  size_t adjustments = 0;
  bool scored = false;
  for (const SampleRow& row : args.rows) {
    adjustments += row.adjustments.size();
    scored |= row.top_logprobs >= 0;
  }
  cudaError_t error;
  const size_t adjustments_at = CeilDiv(args.rows.size() * sizeof(Row), size_t{16}) * 16;
  const Staging::Table table =
      context.staging->Take(adjustments_at + adjustments * sizeof(LogitAdjustment), &error);
  if (table.host == nullptr) return error;
  auto* row_out = reinterpret_cast<Row*>(table.host);
  auto* adjustment_out = reinterpret_cast<LogitAdjustment*>(table.host + adjustments_at);
  int32_t used = 0;
  for (const SampleRow& row : args.rows) {
    *row_out++ = {row, used, static_cast<int32_t>(row.adjustments.size())};
    std::copy(row.adjustments.begin(), row.adjustments.end(), adjustment_out + used);
    used += static_cast<int32_t>(row.adjustments.size());
  }
  error = context.staging->Send(table, context.stream);
  if (error != cudaSuccess) return error;
  const size_t count = args.rows.size(), elements = count * static_cast<size_t>(args.vocab);
  auto* out =
      static_cast<SampledRow*>(context.staging->Receive(args.out.data(), count * sizeof(SampledRow), &error));
  if (out == nullptr) return error;
  auto* weights = static_cast<double*>(context.workspace->Reserve(elements * kScratchBytes, &error));
  if (weights == nullptr) return error;
  const Vocabulary vocabulary{args.logits, reinterpret_cast<float*>(weights + elements), weights,
                              static_cast<int>(args.vocab)};
  const auto* rows = reinterpret_cast<const Row*>(table.device);
  const dim3 grid(static_cast<unsigned>(count));
  error = Launch("DrawTokens", DrawTokens, grid, dim3(kThreads),
                 SharedBytes<uint64_t>(kWarps) + SharedBytes<double>(kPieces), context.stream, rows,
                 reinterpret_cast<const LogitAdjustment*>(table.device + adjustments_at), vocabulary, out);
  if (error == cudaSuccess && scored) {
    error = Launch("ScoreTokens", ScoreTokens, grid, dim3(kThreads), SharedBytes<uint64_t>(kWarps),
                   context.stream, rows, vocabulary, out);
  }
  return error;
}

}  // namespace atp::cuda
