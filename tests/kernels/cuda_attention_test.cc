// The CUDA attention kernels on the emulated machine against the reference, and against themselves: the same
// bits for a row alone, in chunks, and beside others, whichever of the two ways it goes.
//
// Tolerances are error bounds. With pages other than fp32, queries and weights are rounded to bf16 (unit
// roundoff b = 2^-8): a score is wrong by b·S at most, S = scale · Σ|q·k| + |log mass|, which is a relative
// error of numerator and denominator, unless the queries are bf16 to begin with, as they are here where no
// page is fp32; weights add b to the numerator. The fp32 arithmetic is bounded as in op_parity_test.cc.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cuda/ops.h"
#include "kernels/reference/reference_backend.h"
#include "tests/kernels/cuda_emulation/runtime_api.h"
#include "tests/kernels/op_problems.h"

namespace atp {
namespace {

constexpr double kUnit = 0x1p-24, kBF16Unit = 0x1p-8;

class Device {
 public:
  void Attention(const AttentionArgs& args) {
    ASSERT_EQ(cuda::Attention(context_, args), cudaSuccess) << cudaGetErrorString(cudaGetLastError());
    ASSERT_EQ(cudaStreamSynchronize(nullptr), cudaSuccess) << cudaGetErrorString(cudaGetLastError());
    staging_.Reset();
  }
  void set_attention_bytes(size_t bytes) { context_.attention_bytes = bytes; }

 private:
  cuda::Staging staging_;
  cuda::Workspace workspace_;
  cuda::OpContext context_{nullptr, 4, 80, 99 * 1024, &staging_, &workspace_};
};

struct Norms {
  double score = 0;
  double value = 0;
  int entries = 0;
};

// Largest |score| and |value| of a head.
Norms NormsOf(const CacheProblem& problem, const KvSequence& sequence, int kv_head, const float* query,
              double scale) {
  Norms norms;
  problem.ForEachEntry(sequence, kv_head,
                       [&](const KvPage&, const float* key, const float* value, float mass) {
                         double score = std::abs(mass);
                         for (int i = 0; i < problem.shape().head_dim; ++i) {
                           score += scale * std::abs(static_cast<double>(query[i]) * key[i]);
                           norms.value = std::max<double>(norms.value, std::abs(value[i]));
                         }
                         norms.score = std::max(norms.score, score);
                         ++norms.entries;
                       });
  return norms;
}

// rounded_weights: some page of the head is not fp32. rounded_queries: and so are the queries.
double Tolerance(const Norms& norms, int head_dim, bool rounded_weights, bool rounded_queries) {
  const double sums = 6.0 * head_dim + 16;  // of the six products of fp32's terms
  const double tiles = norms.entries / 64.0 + 8;
  const double weight = sums * kUnit * norms.score + (6 * tiles + 6) * kUnit;
  double relative = 2 * (weight + 6 * norms.entries * kUnit) + 2 * kUnit;
  if (rounded_weights) relative += kBF16Unit;
  if (rounded_queries) relative += 2 * norms.score * kBF16Unit;
  return relative * norms.value;
}

struct Problem {
  Problem(Random& random, const CacheShape& shape, const std::vector<SequenceShape>& sequences, int group)
      : cache(random, shape, sequences, true), heads(shape.kv_heads * group), group(group) {
    query = Normals(random, static_cast<size_t>(cache.rows()) * RowFloats());
    if (shape.format != KvFormat::kF32) {
      for (float& q : query) q = BF16ToFloat(FloatToBF16(q));
    }
  }
  size_t RowFloats() const { return static_cast<size_t>(heads) * cache.shape().head_dim; }

  // A step of these sequences whose first row is `first` of the problem's.
  AttentionArgs Args(std::span<const KvSequence> sequences, int first, float* out) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(cache.shape().head_dim));
    return {query.data() + first * RowFloats(),
            out,
            sequences,
            cache.pool(),
            heads,
            cache.shape().kv_heads,
            scale};
  }
  // Rows [begin, end) of sequence `index`, alone.
  std::vector<float> Rows(Device& device, int index, int begin, int end) {
    KvSequence part = cache.sequences()[index];
    const int first = part.first_row + begin;
    part.exact_entries += end - part.rows;
    part.first_row = 0, part.rows = end - begin;
    std::vector<float> out = Poison((end - begin) * RowFloats());
    device.Attention(Args({&part, 1}, first, out.data()));
    return out;
  }

  CacheProblem cache;
  int heads, group;
  std::vector<float> query;
};

class CudaAttention : public ::testing::Test {
 protected:
  CudaAttention() : random_(TestSeed()), reference_(MakeReferenceBackend()) {}

  void Check(const CacheShape& shape, const std::vector<SequenceShape>& sequences, int group) {
    Problem problem(random_, shape, sequences, group);
    const size_t floats = problem.cache.rows() * problem.RowFloats();
    std::vector<float> actual = Poison(floats), expected = Poison(floats);
    device_.Attention(problem.Args(problem.cache.sequences(), 0, actual.data()));
    const AttentionArgs args = problem.Args(problem.cache.sequences(), 0, expected.data());
    reference_->Attention(args);
    for (const KvSequence& sequence : problem.cache.sequences()) {
      for (int i = 0; i < sequence.rows * problem.heads; ++i) {
        const size_t at = sequence.first_row * problem.RowFloats() + static_cast<size_t>(i) * shape.head_dim;
        const int kv_head = i % problem.heads / group;
        const Norms norms = NormsOf(problem.cache, sequence, kv_head, &problem.query[at], args.scale);
        const KvHeadBlocks& head = sequence.heads[kv_head];
        const bool wide = shape.format == KvFormat::kF32 &&
                          (head.principal_entries == 0 || head.principal_page->format() == KvFormat::kF32);
        const double tolerance =
            Tolerance(norms, shape.head_dim, !wide, !wide && shape.format == KvFormat::kF32);
        for (int c = 0; c < shape.head_dim; ++c) {
          ASSERT_LE(std::abs(static_cast<double>(actual[at + c]) - expected[at + c]), tolerance)
              << Name(shape.format) << " head_dim " << shape.head_dim << " group " << group << " rows "
              << sequence.rows << " exact " << sequence.exact_entries << " query " << i << " dimension " << c
              << ": " << actual[at + c] << ", expected " << expected[at + c];
        }
      }
    }
  }

  Random random_;
  std::unique_ptr<Backend> reference_;
  Device device_;
};

TEST_F(CudaAttention, AgreesWithTheReferenceForEveryFormat) {
  for (const KvFormat format : kKvFormats) {
    // A first token, a first chunk, a chunk in mid-block, decode at and beside block and tile edges.
    Check({format, 64, 2, 16, 16}, {{1, 1, 0}, {17, 17, 0}, {5, 30, 40}, {1, 64, 17}, {1, 65, 70}}, 2);
    ASSERT_FALSE(HasFatalFailure());
  }
}

TEST_F(CudaAttention, AgreesWithTheReferenceOverHeadDims) {
  for (const int head_dim : {16, 48, 80, 128}) {
    for (const KvFormat format : {KvFormat::kF32, KvFormat::kBF16}) {
      Check({format, head_dim, 1, 32, 64}, {{1, 33, 100}, {3, 20, 0}}, 4);
      ASSERT_FALSE(HasFatalFailure());
    }
  }
}

TEST_F(CudaAttention, AgreesWithTheReferenceOverGroups) {
  for (const int group : {1, 3, 7, 8, 9, 40}) {
    Check({KvFormat::kBF16, 16, 2, 16, 32}, {{1, 50, 20}, {7, 21, 0}, {2, 2, 16}}, group);
    ASSERT_FALSE(HasFatalFailure());
  }
}

TEST_F(CudaAttention, AgreesWithTheReferenceAcrossChunks) {
  Check({KvFormat::kBF16, 32, 1, 16, 16}, {{1, 1200, 700}, {70, 600, 600}}, 2);
  Check({KvFormat::kF32, 16, 1, 64, 16}, {{1, 513, 512}, {70, 530, 0}}, 1);
}

TEST_F(CudaAttention, IsTheSameBitsAloneInChunksAndBesideOthers) {
  for (const KvFormat format : {KvFormat::kF32, KvFormat::kBF16}) {
    for (const int group : {1, 4}) {
      Problem problem(random_, {format, 32, 2, 16, 32}, {{1, 70, 0}, {80, 150, 90}, {1, 1, 9}, {3, 700, 0}},
                      group);
      std::vector<float> whole = Poison(problem.cache.rows() * problem.RowFloats());
      device_.Attention(problem.Args(problem.cache.sequences(), 0, whole.data()));
      for (int s = 0; s < 4; ++s) {
        const KvSequence& sequence = problem.cache.sequences()[s];
        // The 80 rows are many queries: alone and in small chunks they go the other way.
        for (int row = 0; row < sequence.rows;) {
          const int end = std::min(sequence.rows, row + UniformInt(random_, 1, 15));
          const std::vector<float> part = problem.Rows(device_, s, row, end);
          ASSERT_EQ(std::memcmp(part.data(), &whole[(sequence.first_row + row) * problem.RowFloats()],
                                part.size() * sizeof(float)),
                    0)
              << Name(format) << " group " << group << " sequence " << s << " rows " << row << " to " << end;
          row = end;
        }
      }
    }
  }
}

// As many chunks at once as there is scratch for, even if that is one tile's.
TEST_F(CudaAttention, IsTheSameBitsInManyWaves) {
  Problem problem(random_, {KvFormat::kBF16, 16, 2, 16, 32},
                  {{1, 1100, 40}, {3, 60, 600}, {1, 5, 0}, {70, 90, 0}}, 2);
  std::vector<float> whole = Poison(problem.cache.rows() * problem.RowFloats());
  device_.Attention(problem.Args(problem.cache.sequences(), 0, whole.data()));
  const emulation::Counts before = emulation::Counted();
  device_.Attention(problem.Args(problem.cache.sequences(), 0, whole.data()));
  const int64_t kernels = emulation::Counted().kernels - before.kernels;
  constexpr size_t kSlot = 6 * (16 + 2) * sizeof(float);
  for (const size_t bytes : {4 * kSlot, 7 * kSlot}) {
    Device small;
    small.set_attention_bytes(bytes);
    std::vector<float> out = Poison(whole.size());
    const int64_t begin = emulation::Counted().kernels;
    small.Attention(problem.Args(problem.cache.sequences(), 0, out.data()));
    EXPECT_GE(emulation::Counted().kernels - begin, kernels + 2);
    EXPECT_EQ(std::memcmp(out.data(), whole.data(), whole.size() * sizeof(float)), 0) << bytes;
  }
}

}  // namespace
}  // namespace atp
