// The principal fit against fixtures of an independent implementation
// (tests/golden/generate_principal_fit.py), the cpu version of every instruction set against the reference on
// fresh random problems, and degenerate input.
#include "kernels/cpu/principal_fit.h"

#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/isa.h"
#include "kernels/reference/principal_fit.h"

namespace atp {
namespace {

struct Problem {
  int n, m, held, d, count, forced;
  std::vector<float> keys, values, log_mass, queries, held_out;
  std::vector<int32_t> chosen;                         // fixtures only
  std::vector<float> fitted_values, fitted_mass, gap;  // fixtures only

  PrincipalFitProblem View() const {
    return {keys.data(), values.data(), log_mass.empty() ? nullptr : log_mass.data(), queries.data(), n, m, d,
            count,       forced};
  }
};

struct Fit {
  std::vector<float> keys, values, log_mass;
  std::vector<int32_t> chosen;
  PrincipalFit result;
};

// isa null: the reference.
Fit Solve(const Problem& p, const cpu::Isa* isa) {
  const int r = std::min(p.count, p.n);
  Fit fit{std::vector<float>(r * p.d, NAN),
          std::vector<float>(r * p.d, NAN),
          std::vector<float>(r, NAN),
          std::vector<int32_t>(r, -1),
          {}};
  fit.result = {fit.keys.data(), fit.values.data(), fit.log_mass.data(), fit.chosen.data()};
  if (isa == nullptr) {
    ReferenceFitPrincipal(p.View(), &fit.result);
    return fit;
  }
  const size_t size = cpu::PrincipalFitScratch(p.n, p.m, p.d, p.count);
  std::vector<float> scratch(size + 32, NAN);
  size_t space = scratch.size() * sizeof(float);
  void* aligned = scratch.data();
  std::align(64, size * sizeof(float), aligned, space);
  cpu::PrincipalFitFor(isa->target)(p.View(), static_cast<float*>(aligned), &fit.result);
  for (const float* x = static_cast<float*>(aligned) + size; x < scratch.data() + scratch.size(); ++x)
    EXPECT_TRUE(std::isnan(*x)) << "written beyond the scratch that was asked for";
  return fit;
}

// softmax(q·k + log_mass) values for each query, in double.
std::vector<double> Output(const std::vector<float>& queries, int d, const std::vector<float>& keys,
                           const std::vector<float>& values, const std::vector<float>& log_mass) {
  const size_t n = log_mass.size(), m = queries.size() / d;
  std::vector<double> out(m * d), weight(n);
  for (size_t q = 0; q < m; ++q) {
    double sum = 0;
    for (size_t i = 0; i < n; ++i) {
      double s = log_mass[i];
      for (int c = 0; c < d; ++c) s += double{queries[q * d + c]} * keys[i * d + c];
      sum += weight[i] = std::exp(s);
    }
    for (size_t i = 0; i < n; ++i)
      for (int c = 0; c < d; ++c) out[q * d + c] += weight[i] / sum * values[i * d + c];
  }
  return out;
}

double RelativeError(const std::vector<double>& a, const std::vector<double>& b) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) error += (a[i] - b[i]) * (a[i] - b[i]), norm += b[i] * b[i];
  return std::sqrt(error / norm);
}

Problem ReadFixture(const std::string& name) {
  std::ifstream file(ATP_SOURCE_DIR "/tests/golden/principal_fit/" + name + ".bin", std::ios::binary);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  EXPECT_FALSE(bytes.empty()) << name;
  size_t at = 0;
  auto read = [&](auto* out, size_t count) {
    ASSERT_LE(at + count * 4, bytes.size());
    std::memcpy(out, bytes.data() + at, count * 4);
    at += count * 4;
  };
  Problem p;
  read(&p.n, 6);
  auto floats = [&](std::vector<float>& v, size_t count) { v.resize(count), read(v.data(), count); };
  floats(p.keys, p.n * p.d), floats(p.values, p.n * p.d), floats(p.log_mass, p.n);
  floats(p.queries, p.m * p.d), floats(p.held_out, p.held * p.d);
  p.chosen.resize(p.count), read(p.chosen.data(), p.count);
  floats(p.fitted_values, p.count * p.d), floats(p.fitted_mass, p.count), floats(p.gap, p.count);
  EXPECT_EQ(at, bytes.size());
  return p;
}

// Relative to 1 + |value|. The reference computes in double like the fixtures: what is left is the rounding
// of fp32 results (half an ulp) and what the ridge system, of condition at most r/ρ + 1 < 2^14, makes of
// double rounding, which is far below it. The cpu's products are in fp32, summed 32 at a time: relative
// errors of about 2^-23, of which the same condition could make 2^-9 of a shift, as much as storing it in
// bf16, in the one direction that the attention hardly uses. 2^-12 is asked for. The masses' 200 accelerated
// steps add up rounding to at most 200²/4 times that of one step: 2^-23 · 10^4 = 2^-9.7.
struct Tolerance {
  double value, mass;
};
constexpr Tolerance kDouble{0x1p-22, 0x1p-21}, kSingle{0x1p-12, 0x1p-10};
constexpr double kTied = 1e-5;  // norms² of columns that are this close, relative, may come in either order

// Masses are compared, not their logarithms: one near 0 has any logarithm and no effect.
void ExpectSame(const Fit& a, const std::vector<int32_t>& chosen, const std::vector<float>& values,
                const std::vector<float>& mass, const Tolerance& tolerance) {
  ASSERT_THAT(a.chosen, testing::ElementsAreArray(chosen));
  for (size_t i = 0; i < values.size(); ++i)
    ASSERT_NEAR(a.values[i], values[i], tolerance.value * (1 + std::abs(values[i]))) << i;
  for (size_t i = 0; i < mass.size(); ++i) {
    const double expected = std::exp(double{mass[i]});
    ASSERT_NEAR(std::exp(double{a.log_mass[i]}), expected, tolerance.mass * (1 + expected)) << i;
  }
}

// The least relative distance of a pivot's norm² to the runner-up's, in double: of pivots closer than fp32
// can tell apart either may be chosen, and other ones after it.
double LeastGap(const Problem& p) {
  std::vector<std::vector<double>> columns(p.n, std::vector<double>(p.m));
  for (int q = 0; q < p.m; ++q) {
    double sum = 0;
    for (int i = 0; i < p.n; ++i) {
      double score = p.log_mass.empty() ? 0.0 : p.log_mass[i];
      for (int c = 0; c < p.d; ++c) score += double{p.queries[q * p.d + c]} * p.keys[i * p.d + c];
      sum += columns[i][q] = std::exp(score);
    }
    for (auto& column : columns) column[q] /= sum;
  }
  const auto dot = [](const auto& x, const auto& y) {
    return std::inner_product(x.begin(), x.end(), y.begin(), 0.0);
  };
  double least = 1;
  for (int found = 0; found < p.count && columns.size() > 1;) {
    std::vector<double> norms;
    for (const auto& column : columns) norms.push_back(dot(column, column));
    const size_t best = std::max_element(norms.begin(), norms.end()) - norms.begin();
    const double norm = norms[best];
    norms[best] = 0;
    least = std::min(least, 1 - *std::max_element(norms.begin(), norms.end()) / norm);
    const std::vector<double> pivot = columns[best];
    columns.erase(columns.begin() + best);
    ++found;  // forced pivots count too: as many steps at least as the fit takes without them
    for (auto& column : columns) {
      const double share = dot(pivot, column) / norm;
      for (int q = 0; q < p.m; ++q) column[q] -= share * pivot[q];
    }
  }
  return least;
}

Problem RandomProblem(std::mt19937& rng, int n, int m, int d, int count, int forced, bool biased) {
  std::normal_distribution<float> normal;
  Problem p{n, m, 0, d, count, forced, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  auto fill = [&](std::vector<float>& v, size_t size, float scale) {
    v.resize(size);
    for (float& x : v) x = normal(rng) * scale;
  };
  fill(p.keys, n * d, 1.0f), fill(p.values, n * d, 1.0f), fill(p.queries, m * d, 2.0f / std::sqrt(d));
  if (biased) fill(p.log_mass, n, 1.0f);
  return p;
}

class Fixture : public testing::TestWithParam<std::string> {};

TEST_P(Fixture, EveryImplementationAgrees) {
  const Problem p = ReadFixture(GetParam());
  for (float gap : p.gap) ASSERT_GT(gap, kTied) << "a tied pivot: this fixture proves nothing";
  const std::vector<double> exact = Output(p.held_out, p.d, p.keys, p.values, p.log_mass);
  std::vector<cpu::Isa> isas = cpu::AvailableIsas();
  for (size_t i = 0; i <= isas.size(); ++i) {
    SCOPED_TRACE(i == 0 ? "reference" : isas[i - 1].name);
    const Fit fit = Solve(p, i == 0 ? nullptr : &isas[i - 1]);
    EXPECT_TRUE(fit.result.fitted);
    ExpectSame(fit, p.chosen, p.fitted_values, p.fitted_mass, i == 0 ? kDouble : kSingle);
    // Queries that were not fitted to get the same answer as from the fixture's entries, and nearly that of
    // all entries.
    const std::vector<double> expected = Output(p.held_out, p.d, fit.keys, p.fitted_values, p.fitted_mass);
    const std::vector<double> got = Output(p.held_out, p.d, fit.keys, fit.values, fit.log_mass);
    EXPECT_LT(RelativeError(got, expected), i == 0 ? 1e-6 : 1e-5);
    // The same keys without fits, each standing for n/r entries, answer clearly worse.
    std::vector<float> kept_values, kept_mass;
    for (int i : fit.chosen) {
      kept_values.insert(kept_values.end(), &p.values[i * p.d], &p.values[(i + 1) * p.d]);
      kept_mass.push_back(p.log_mass[i]);
    }
    const std::vector<double> kept = Output(p.held_out, p.d, fit.keys, kept_values, kept_mass);
    EXPECT_LT(RelativeError(got, exact), 0.5 * RelativeError(kept, exact));
  }
}

INSTANTIATE_TEST_SUITE_P(Golden, Fixture, testing::Values("first_half", "quarter", "eighth", "refit"));

TEST(PrincipalFit, EveryInstructionSetAgreesWithTheReference) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 rng(seed);
  const int shapes[][5] = {
      {17, 5, 8, 4, 0}, {64, 64, 32, 16, 4}, {100, 130, 24, 33, 1}, {48, 16, 64, 47, 4}, {3, 1, 2, 1, 1}};
  for (const auto& s : shapes) {
    for (const bool biased : {false, true}) {
      const Problem p = RandomProblem(rng, s[0], s[1], s[2], s[3], s[4], biased);
      const Fit reference = Solve(p, nullptr);
      const bool tied = LeastGap(p) < kTied;
      for (const cpu::Isa& isa : cpu::AvailableIsas()) {
        SCOPED_TRACE(isa.name + " n=" + std::to_string(p.n) + " r=" + std::to_string(p.count));
        const Fit fit = Solve(p, &isa);
        if (p.m >= p.count) {
          if (tied) continue;
          ExpectSame(fit, reference.chosen, reference.values, reference.log_mass, kSingle);
          EXPECT_NEAR(fit.result.output_residual, reference.result.output_residual, 1e-3);
          EXPECT_NEAR(fit.result.mass_residual, reference.result.mass_residual, 1e-5);
        } else {
          // Fewer queries than entries to choose: the last pivots are ties of nothing, but everything is
          // spanned.
          EXPECT_LT(fit.result.output_residual, kPrincipalRidge);
          EXPECT_LT(fit.result.mass_residual, kPrincipalRidge);
        }
      }
    }
  }
}

TEST(PrincipalFit, IsDeterministic) {
  std::mt19937 rng(1);
  const Problem p = RandomProblem(rng, 128, 64, 32, 32, 4, false);
  for (const cpu::Isa& isa : cpu::AvailableIsas()) {
    const Fit a = Solve(p, &isa), b = Solve(p, &isa);
    EXPECT_EQ(a.values, b.values);
    EXPECT_EQ(a.log_mass, b.log_mass);
  }
}

class Degenerate : public testing::Test {
 protected:
  // Finite entries, distinct indices in order, sinks among them, and an answer near the exact one.
  void Check(const Problem& p, double bound) {
    const std::vector<float> zero(p.n, 0.0f);
    const std::vector<double> exact =
        Output(p.queries, p.d, p.keys, p.values, p.log_mass.empty() ? zero : p.log_mass);
    const std::vector<cpu::Isa> isas = cpu::AvailableIsas();
    for (size_t i = 0; i <= isas.size(); ++i) {
      SCOPED_TRACE(i == 0 ? "reference" : isas[i - 1].name);
      const Fit fit = Solve(p, i == 0 ? nullptr : &isas[i - 1]);
      for (const auto* v : {&fit.keys, &fit.values, &fit.log_mass})
        for (float x : *v) ASSERT_TRUE(std::isfinite(x));
      for (size_t j = 0; j < fit.chosen.size(); ++j) {
        ASSERT_GE(fit.chosen[j], j == 0 ? 0 : fit.chosen[j - 1] + 1);
        ASSERT_LT(fit.chosen[j], p.n);
        if (static_cast<int>(j) < p.forced) {
          ASSERT_EQ(fit.chosen[j], static_cast<int>(j));
        }
      }
      EXPECT_LT(RelativeError(Output(p.queries, p.d, fit.keys, fit.values, fit.log_mass), exact), bound);
    }
  }
  std::mt19937 rng{5};
};

TEST_F(Degenerate, NothingButSinks) {
  for (const int count : {1, 4, 7}) Check(RandomProblem(rng, 64, 128, 32, count, count, false), 10.0);
}

TEST_F(Degenerate, IdenticalKeys) {
  Problem p = RandomProblem(rng, 64, 32, 16, 16, 4, false);
  for (int i = 1; i < p.n; ++i) std::copy_n(p.keys.begin(), p.d, p.keys.begin() + i * p.d);
  Check(p, 0.05);
}

TEST_F(Degenerate, IdenticalEntries) {
  Problem p = RandomProblem(rng, 64, 32, 16, 8, 0, false);
  for (int i = 1; i < p.n; ++i) {
    std::copy_n(p.keys.begin(), p.d, p.keys.begin() + i * p.d);
    std::copy_n(p.values.begin(), p.d, p.values.begin() + i * p.d);
  }
  Check(p, 1e-3);
}

TEST_F(Degenerate, OneDominantKey) {
  Problem p = RandomProblem(rng, 64, 32, 16, 16, 0, true);
  p.log_mass[37] = 200.0f;
  Check(p, 1e-3);
}

TEST_F(Degenerate, AllMassOnSinks) {
  Problem p = RandomProblem(rng, 64, 32, 16, 16, 4, true);
  for (int i = 0; i < 4; ++i) p.log_mass[i] = 80.0f;
  Check(p, 1e-3);
}

TEST_F(Degenerate, TinySegments) {
  for (int n = 2; n <= 6; ++n)
    for (int r = 1; r < n; ++r) Check(RandomProblem(rng, n, 8, 8, r, std::min(r, 4), false), 2.0);
}

TEST_F(Degenerate, AsManyAsThereAreKeepsEveryEntryAsItIs) {
  const Problem p = RandomProblem(rng, 20, 8, 8, 20, 4, true);
  const std::vector<cpu::Isa> isas = cpu::AvailableIsas();
  for (size_t i = 0; i <= isas.size(); ++i) {
    const Fit fit = Solve(p, i == 0 ? nullptr : &isas[i - 1]);
    EXPECT_FALSE(fit.result.fitted);
    EXPECT_EQ(fit.keys, p.keys);
    EXPECT_EQ(fit.values, p.values);
    EXPECT_EQ(fit.log_mass, p.log_mass);
  }
}

TEST_F(Degenerate, NotFiniteInputIsKeptAsItIs) {
  Problem p = RandomProblem(rng, 32, 16, 8, 8, 0, false);
  p.values[5] = INFINITY;
  const Fit fit = Solve(p, nullptr);
  EXPECT_FALSE(fit.result.fitted);
  for (const cpu::Isa& isa : cpu::AvailableIsas()) EXPECT_FALSE(Solve(p, &isa).result.fitted);
}

}  // namespace
}  // namespace atp
