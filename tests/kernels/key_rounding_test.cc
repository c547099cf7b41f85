#include "kernels/key_rounding.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/walsh_hadamard.h"

namespace atp {
namespace {

constexpr int kDim = 32, kTop = 7;
constexpr float kScale = 0.25f;

// Queries of which three directions make nearly all, as in heads that look things up.
std::vector<float> FewDirections(int m, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  std::vector<float> directions(3 * kDim), queries(static_cast<size_t>(m) * kDim);
  for (float& x : directions) x = normal(rng);
  for (int q = 0; q < m; ++q) {
    for (int r = 0; r < 3; ++r) {
      const float weight = normal(rng);
      for (int i = 0; i < kDim; ++i) queries[q * kDim + i] += weight * directions[r * kDim + i];
    }
    for (int i = 0; i < kDim; ++i) queries[q * kDim + i] += 0.1f * normal(rng);
  }
  return queries;
}

std::vector<float> Nearest(std::vector<float> key) {
  for (float& x : key) x = std::clamp(std::nearbyint(x / kScale), -kTop - 1.0f, kTop + 0.0f) * kScale;
  return key;
}

// Σ_q (q · (rounded - key))², both in the Walsh–Hadamard basis.
double Cost(std::vector<float> queries, const std::vector<float>& key, const std::vector<float>& rounded) {
  double cost = 0;
  for (size_t q = 0; q < queries.size(); q += kDim) {
    WalshHadamard(&queries[q], kDim);
    double product = 0;
    for (int i = 0; i < kDim; ++i) product += queries[q + i] * (double{rounded[i]} - key[i]);
    cost += product * product;
  }
  return cost;
}

TEST(KeyRounding, CostsQueriesThatItHasNotSeenAFractionOfTheNearestSteps) {
  std::mt19937 rng(7);
  std::normal_distribution<float> normal;
  std::vector<float> queries = FewDirections(400, rng);
  const std::vector<float> later(queries.begin() + 200 * kDim, queries.end());
  KeyRounding rounding;
  rounding.Prepare(queries.data(), 200, kDim);
  double cost = 0, nearest = 0;
  for (int k = 0; k < 50; ++k) {
    std::vector<float> key(kDim);
    for (float& x : key) x = 0.6f * normal(rng);
    std::vector<float> rounded = key;
    rounding.Round(rounded.data(), kScale, kTop);
    for (const float x : rounded) {
      EXPECT_EQ(x / kScale, std::nearbyint(x / kScale));
      EXPECT_LE(x, kTop * kScale);
      EXPECT_GE(x, -(kTop + 1) * kScale);
    }
    cost += Cost(later, key, rounded);
    nearest += Cost(later, key, Nearest(key));
  }
  EXPECT_LT(cost, 0.2 * nearest);
}

TEST(KeyRounding, IsTheNearestStepWhereQueriesSayNothing) {
  std::mt19937 rng(8);
  std::normal_distribution<float> normal;
  std::vector<float> key(kDim);
  for (float& x : key) x = normal(rng);
  KeyRounding rounding;
  for (const float query : {0.0f, std::numeric_limits<float>::quiet_NaN(), 1e30f}) {
    const std::vector<float> queries(4 * kDim, query);
    rounding.Prepare(queries.data(), 4, kDim);
    std::vector<float> rounded = key;
    rounding.Round(rounded.data(), kScale, kTop);
    EXPECT_EQ(rounded, Nearest(key)) << query;
  }
  std::vector<float> nothing(kDim, 0.0f);
  rounding.Round(nothing.data(), 0, kTop);
  EXPECT_EQ(nothing, std::vector<float>(kDim, 0.0f));
}

}  // namespace
}  // namespace atp
