// The ops on the KV cache on every backend against the reference backend, over ragged shapes and fresh random
// inputs. Tolerances: op_parity.h.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/kernels/op_parity.h"

namespace atp {
namespace {

class CacheParity : public OpParity {};

std::vector<CacheShape> CacheShapes() {
  std::vector<CacheShape> shapes;
  for (const KvFormat format : {KvFormat::kF32, KvFormat::kBF16}) {
    for (const int head_dim : {6, 8, 40, 64, 128}) shapes.push_back({format, head_dim, 2, 16, 16});
    shapes.push_back({format, 32, 3, 32, 64});
    shapes.push_back({format, 24, 1, 64, 16});
  }
  for (const KvFormat format : {KvFormat::kFp8, KvFormat::kInt8, KvFormat::kInt4}) {
    shapes.push_back({format, 6, 2, 16, 16});
    shapes.push_back({format, 40, 2, 32, 48});
    shapes.push_back({format, 64, 2, 64, 64});
    shapes.push_back({format, 128, 1, 128, 128});
  }
  return shapes;
}

TEST_P(CacheParity, StoreKv) {
  for (const CacheShape& shape : CacheShapes()) {
    // A first token, a first chunk, a chunk in mid-block, a decode step, a step that touches many blocks.
    CacheProblem problem(random_, shape, {{1, 1, 0}, {17, 17, 3}, {5, 30, 0}, {1, 33, 0}, {100, 177, 0}},
                         false);
    const size_t floats = static_cast<size_t>(problem.rows()) * shape.kv_heads * shape.head_dim;
    const std::vector<float> key = Normals(random_, floats);
    const std::vector<float> value = Normals(random_, floats);
    const StoreKvArgs args{key.data(), value.data(), problem.sequences(), problem.pool(), shape.kv_heads};
    const std::vector<std::byte> before = problem.bytes();
    actual_->StoreKv(args);
    const std::vector<std::byte> actual = problem.bytes();
    problem.bytes() = before;
    reference_->StoreKv(args);
    EXPECT_NE(problem.bytes(), before);
    EXPECT_TRUE(actual == problem.bytes()) << Name(shape.format) << " head_dim " << shape.head_dim;
  }
}

// The same bits as its three ops.
TEST_P(CacheParity, RotateAndStore) {
  for (const CacheShape& shape : CacheShapes()) {
    CacheProblem problem(random_, shape, {{1, 1, 0}, {17, 17, 3}, {5, 30, 0}, {1, 33, 0}, {40, 77, 0}},
                         false);
    const int heads = shape.kv_heads * UniformInt(random_, 1, 9);
    const auto count = [&](int n) { return static_cast<size_t>(problem.rows()) * n * shape.head_dim; };
    std::vector<float> query = Normals(random_, count(heads)), expected_query = query;
    std::vector<float> key = Normals(random_, count(shape.kv_heads)), expected_key = key;
    const std::vector<float> value = Normals(random_, count(shape.kv_heads));
    std::vector<float> frequency(static_cast<size_t>(shape.head_dim / 2));
    for (float& f : frequency) f = std::exp2(-static_cast<float>(UniformInt(random_, 0, 20)));
    std::vector<int32_t> positions(static_cast<size_t>(problem.rows()));
    for (int32_t& p : positions) p = UniformInt(random_, 0, 200000);
    const std::vector<std::byte> before = problem.bytes();
    actual_->RotateAndStore({query.data(), key.data(), value.data(), positions, frequency.data(),
                             problem.sequences(), problem.pool(), heads, shape.kv_heads});
    const std::vector<std::byte> actual = problem.bytes();
    problem.bytes() = before;
    actual_->Rope({expected_query.data(), positions, frequency.data(), heads, shape.head_dim});
    actual_->Rope({expected_key.data(), positions, frequency.data(), shape.kv_heads, shape.head_dim});
    actual_->StoreKv(
        {expected_key.data(), value.data(), problem.sequences(), problem.pool(), shape.kv_heads});
    EXPECT_TRUE(actual == problem.bytes()) << Name(shape.format) << " head_dim " << shape.head_dim;
    EXPECT_TRUE(query == expected_query) << Name(shape.format) << " head_dim " << shape.head_dim;
  }
}

// Largest |score| contributions and values that one query can meet, for the bound below.
struct Norms {
  double score = 0;  // max_e scale·Σ|q_i·k_i| + |log_mass|
  int entries = 0;
  std::vector<double> value;  // max_e |v_i|
  // Of integer pages, whose kernels may round the other side of a product to 16 bits as well:
  double score_rounding =
      0;  // max_e of half a step of the query, at most 2^-15·max|q_i| (int4: 2^-7), times scale·Σ|k_i|
  double value_rounding = 0;  // Σ_e of half a step of a weight, at most 2^-16, times max_ei |v_i|
};

Norms NormsOf(const CacheProblem& problem, const KvSequence& sequence, int kv_head, const float* query,
              double scale) {
  const int head_dim = problem.shape().head_dim;
  Norms norms;
  norms.value.resize(head_dim);
  double largest_query = 0, largest_value = 0;
  int integers = 0;
  for (int i = 0; i < head_dim; ++i) largest_query = std::max<double>(largest_query, std::abs(query[i]));
  const auto add = [&](const KvPage& page, const float* key, const float* value, float log_mass) {
    double score = std::abs(log_mass), keys = 0;
    for (int i = 0; i < head_dim; ++i) {
      score += scale * std::abs(static_cast<double>(query[i]) * key[i]);
      norms.value[i] = std::max<double>(norms.value[i], std::abs(value[i]));
      keys += std::abs(key[i]);
      if (IsInteger(page.format())) largest_value = std::max<double>(largest_value, std::abs(value[i]));
    }
    if (IsInteger(page.format())) {
      norms.score_rounding =
          std::max(norms.score_rounding,
                   (page.format() == KvFormat::kInt4 ? 0x1p-7 : 0x1p-15) * largest_query * scale * keys);
      ++integers;
    }
    norms.score = std::max(norms.score, score);
    ++norms.entries;
  };
  problem.ForEachEntry(sequence, kv_head, add);
  norms.value_rounding = integers * 0x1p-16 * largest_value;
  return norms;
}

// The bound for out_i = Σ p·v_i / Σ p, with p = exp(s - m), n entries of head size d, |s| <= S:
//   a score: scaled query, d products, log mass:                      (d + 2)·u·S
//   s - m, and the same for each change of the running maximum:      2·2·u·S
//   so a weight p is wrong by that factor in the exponent, by exp's own error, and, once per slice of 16
//   entries, by exp's error, and a product for shrinking:                        kExpError + (n/16 +
//   1)·(kExpError + u) sums of n terms:                                                 n·u
// With integer pages, s - m is also wrong by 2·score_rounding, and the numerator by value_rounding, since Σ p
// >= 1. Numerator and denominator each have this relative error against max_e|v_i|; the quotient and the
// reference add 2·u.
// On tensor cores (tensor), fp32 is three terms of bf16, whose products make every sum six times as long;
// with any other format (rounded) a query and a weight are rounded to bf16, which is b·S in the exponent of
// both sums and b in one.
double AttentionTolerance(const Norms& norms, int head_dim, int i, bool tensor, bool rounded) {
  const double slices = norms.entries / 16.0 + 2;  // the principal part may end in a partly filled slice
  const double terms = tensor ? 6 : 1;
  const double weight = (terms * head_dim + 6) * kUnit * norms.score +
                        (tensor ? 0 : 2 * norms.score_rounding) + kExpError + slices * (kExpError + kUnit);
  const double rounding = rounded ? (2 * norms.score + 1) * kBF16Unit : 0;
  return (2 * (weight + terms * norms.entries * kUnit) + 2 * kUnit + rounding) * norms.value[i] +
         (tensor ? 0 : norms.value_rounding);
}

void CheckAttention(Random& random, Backend& backend, Backend& reference, CacheProblem& problem, int group,
                    bool tensor) {
  const CacheShape& shape = problem.shape();
  const int heads = shape.kv_heads * group;
  const size_t floats = static_cast<size_t>(problem.rows()) * heads * shape.head_dim;
  std::vector<float> query = Normals(random, floats);
  for (float& q : query) q *= 2.0f;
  std::vector<float> actual = Poison(floats);
  std::vector<float> expected = Poison(floats);
  const KvPool pool = problem.pool();
  const float scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
  AttentionArgs args{query.data(), actual.data(), problem.sequences(), pool, heads, shape.kv_heads, scale};
  backend.Attention(args);
  args.out = expected.data();
  reference.Attention(args);
  for (const KvSequence& sequence : problem.sequences()) {
    for (int row = 0; row < sequence.rows; ++row) {
      for (int head = 0; head < heads; ++head) {
        const size_t at = (static_cast<size_t>(sequence.first_row + row) * heads + head) * shape.head_dim;
        const Norms norms = NormsOf(problem, sequence, head / group, &query[at], scale);
        const KvHeadBlocks& blocks = sequence.heads[head / group];
        const bool wide =
            shape.format == KvFormat::kF32 &&
            (blocks.principal_entries == 0 || blocks.principal_page->format() == KvFormat::kF32);
        for (int i = 0; i < shape.head_dim; ++i) {
          ExpectNear(actual[at + i], expected[at + i],
                     AttentionTolerance(norms, shape.head_dim, i, tensor, tensor && !wide),
                     std::string(Name(shape.format)) + " head_dim " + std::to_string(shape.head_dim) +
                         " group " + std::to_string(group) + " row " + std::to_string(row));
          if (::testing::Test::HasFailure()) return;
        }
      }
    }
  }
}

TEST_P(CacheParity, AttentionOverShapes) {
  for (const CacheShape& shape : CacheShapes()) {
    if (IsCuda(GetParam()) && shape.head_dim % 16 != 0) continue;  // Supports() refuses them
    for (const int group : {1, 4}) {
      // Empty prefix, whole prompt, chunk in mid-block, decode at and beside block edges, with and without
      // principals.
      CacheProblem problem(
          random_, shape, {{1, 1, 0}, {17, 17, 0}, {5, 30, 40}, {1, 32, 17}, {1, 33, 70}, {40, 45, 1}}, true);
      CheckAttention(random_, *actual_, *reference_, problem, group, IsCuda(GetParam()));
      ASSERT_FALSE(HasFailure());
    }
  }
}

TEST_P(CacheParity, AttentionOverGroups) {
  for (int group = 1; group <= 9; ++group) {
    for (const KvFormat format : kKvFormats) {
      CacheProblem problem(random_, {format, 16, 2, 16, 16}, {{1, 50, 20}, {7, 21, 0}, {1, 1, 16}}, true);
      CheckAttention(random_, *actual_, *reference_, problem, group, IsCuda(GetParam()));
      ASSERT_FALSE(HasFailure());
    }
  }
}

// Chunks of a sequence that go to different threads, and a tile and a chunk that end in mid-slice.
TEST_P(CacheParity, AttentionOverLongSequences) {
  for (const KvFormat format : kKvFormats) {
    CacheProblem problem(random_, {format, 32, 1, 32, 32}, {{1, 1500, 700}, {3, 513, 0}}, true);
    CheckAttention(random_, *actual_, *reference_, problem, 3, IsCuda(GetParam()));
    ASSERT_FALSE(HasFailure());
  }
}

TEST_P(CacheParity, AttentionWithMoreHeadsThanAPartHolds) {
  CacheProblem problem(random_, {KvFormat::kF32, 16, 1, 16, 16}, {{3, 20, 5}}, true);
  CheckAttention(random_, *actual_, *reference_, problem, 40, IsCuda(GetParam()));
}

INSTANTIATE_TEST_SUITE_P(EveryBackend, CacheParity, ::testing::ValuesIn(TestBackendNames()),
                         [](const auto& name) { return name.param; });

}  // namespace
}  // namespace atp
