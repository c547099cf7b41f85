#include "engine/compression_budgets.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <numeric>
#include <string>

namespace atp {
namespace {

using ::testing::DoubleNear;
using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pointwise;

MATCHER_P(PairNear, tolerance, "") { return std::abs(std::get<0>(arg) - std::get<1>(arg)) <= tolerance; }

double Sum(const std::vector<double>& values) { return std::accumulate(values.begin(), values.end(), 0.0); }

// By NumPy: bisection of clip(f * (S + 1e-7) ** (1 / 2.5), 1 / 32, 1) for the mean, in float64.
TEST(ShareBudget, AgreesWithNumPy) {
  const std::vector<double> s = {0.0, 1e-6, 3e-5, 2e-4, 0.004, 0.7};
  const struct {
    double mean;
    std::vector<double> ratio;
  } fixtures[] = {
      {0.5, {0.03125, 0.075843868799, 0.284964002727, 0.607942128474, 1.0, 1.0}},
      {0.25, {0.03125, 0.03125, 0.0428790743499, 0.0914782059411, 0.303142719709, 1.0}},
      {0.125, {0.03125, 0.03125, 0.03125, 0.03125, 0.070284477044, 0.554715522956}},
  };
  for (const auto& fixture : fixtures) {
    EXPECT_THAT(ShareBudget(s, fixture.mean), Pointwise(PairNear(1e-9), fixture.ratio)) << fixture.mean;
  }
}

TEST(ShareBudget, ExtremesAndEqualHeads) {
  EXPECT_THAT(ShareBudget(std::vector<double>{1, 2, 3}, 1), Each(1.0));
  EXPECT_THAT(ShareBudget(std::vector<double>{1, 2, 3}, 0.001), Each(1.0 / 32));
  EXPECT_THAT(ShareBudget(std::vector<double>(4, 0.0), 0.25), Each(DoubleNear(0.25, 1e-9)));
}

TEST(RoundToBlocks, WholeBlocksAndTheSameMean) {
  // In blocks of 16 of a segment of 128: 0.9, 2.6, 4.5, 8 sum to 16.
  const std::vector<double> ratio = {0.9 / 8, 2.6 / 8, 4.5 / 8, 1.0};
  EXPECT_THAT(RoundToBlocks(ratio, 128, 16), ElementsAre(1.0 / 8, 3.0 / 8, 4.0 / 8, 1.0));
  // A head below one block gets one, at the cost of who was rounded up the most.
  EXPECT_THAT(RoundToBlocks(std::vector<double>{0.25 / 8, 0.25 / 8, 3.5 / 8, 4.0 / 8}, 128, 16),
              ElementsAre(1.0 / 8, 1.0 / 8, 3.0 / 8, 3.0 / 8));
  const std::vector<double> shared = ShareBudget(std::vector<double>{1e-5, 3e-4, 2e-6, 0.2, 0.01, 7e-5}, 0.3);
  for (const int segment : {64, 128, 256}) {
    const std::vector<double> rounded = RoundToBlocks(shared, segment, 16);
    for (const double r : rounded) EXPECT_EQ(r * segment / 16, static_cast<int>(r * segment / 16));
    EXPECT_LE(Sum(rounded), Sum(shared) + 1e-9);
    EXPECT_GT(Sum(rounded), Sum(shared) - 16.0 / segment);
  }
}

TEST(RoundToBlocks, LeavesWhatHasNoSuchBlocks) {
  const std::vector<double> tiny = {0.03, 0.05};  // less than a block each
  EXPECT_EQ(RoundToBlocks(tiny, 128, 16), tiny);
  const std::vector<double> odd = {0.3, 0.4};
  EXPECT_EQ(RoundToBlocks(odd, 24, 16), odd);
}

std::string ErrorOf(const std::string& json) {
  const auto budgets = ParseCompressionBudgets(json, "b.json", 2, 3);
  return budgets.ok() ? "" : std::string(budgets.status().message());
}

TEST(CompressionBudgets, ErrorsNameFileKeyAndShape) {
  const std::string good = R"([[0.5, 0.25, 1], [1, 0.1, 0.0625]])";
  EXPECT_EQ(ErrorOf(R"({"ratio": )" + good + "}"), "");
  EXPECT_EQ(ErrorOf(R"({"ratio": )" + good + R"(, "sensitivity": [[0, 1, 2], [3, 4, 5]]})"), "");
  EXPECT_EQ(ErrorOf("{"), "b.json: not JSON");
  EXPECT_EQ(ErrorOf(""), "b.json: not JSON");
  EXPECT_THAT(ErrorOf("[]"),
              HasSubstr("b.json: expected an object with ratio, bits and sensitivity, found array"));
  EXPECT_EQ(ErrorOf("{}"), "b.json: ratio: missing");
  EXPECT_EQ(ErrorOf(R"({"ratio": )" + good + R"(, "bits": [[16, 8, 4], [4, 4, 4]]})"), "");
  EXPECT_EQ(ErrorOf(R"({"ratio": )" + good + R"(, "bits": 8})"),
            "b.json: bits: expected an array of 2 layers, found number");
  EXPECT_EQ(ErrorOf(R"({"ratio": )" + good + R"(, "bits": [[16, 8, 4], [4, 5, 4]]})"),
            "b.json: bits[1][1]: expected 16, 8 or 4, found 5");
  EXPECT_THAT(ErrorOf(R"({"ratio": )" + good + R"(, "bit": 8})"), HasSubstr("b.json: \"bit\": no such key"));
  EXPECT_EQ(ErrorOf(R"({"ratio": )" + good + R"(, "sensitivity_4_bits": [[0, 1, 2], [3, 4, 5]]})"),
            "b.json: sensitivity: missing beside the other sensitivities");
  EXPECT_EQ(ErrorOf(R"({"ratio": 0.5})"), "b.json: ratio: expected an array of 2 layers, found number");
  EXPECT_EQ(ErrorOf(R"({"ratio": [[1, 1, 1]]})"),
            "b.json: ratio: expected an array of 2 layers, found an array of 1");
  EXPECT_EQ(ErrorOf(R"({"ratio": [[1, 1, 1], [1, 1]]})"),
            "b.json: ratio[1]: expected an array of 3 kv heads, found an array of 2");
  for (const char* const wrong : {"-0.5", "1.01", "\"1\"", "null"}) {
    EXPECT_EQ(ErrorOf(std::string(R"({"ratio": [[1, 1, 1], [1, )") + wrong + ", 1]]}"),
              std::string("b.json: ratio[1][1]: expected a number in [0, 1], found ") + wrong);
  }
  EXPECT_EQ(ErrorOf(R"({"ratio": [[0, 0, 0], [0, 0.5, 0]]})"), "");
  EXPECT_EQ(ErrorOf(R"({"ratio": [[0, 0, 0], [0, 0, 0]]})"),
            "b.json: ratio: 0 for all heads; at least one must keep entries");
  EXPECT_EQ(ErrorOf(R"({"ratio": )" + good + R"(, "sensitivity": [[0, 1, -2], [3, 4, 5]]})"),
            "b.json: sensitivity[0][2]: expected a number that is not negative, found -2");
}

TEST(CompressionBudgets, SavesAndLoads) {
  CompressionBudgets budgets;
  budgets.layers = 2;
  budgets.kv_heads = 3;
  budgets.ratio = {0.5, 0.25, 1, 1, 0.1, 0.0625};
  budgets.sensitivity = {1e-9, 0.1 + 0.2, 3, 4, 5, 0};
  const std::string path = ::testing::TempDir() + "/atp_budgets_test.json";
  ASSERT_TRUE(SaveCompressionBudgets(budgets, path).ok());
  const auto loaded = LoadCompressionBudgets(path, 2, 3);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->ratio, budgets.ratio);
  EXPECT_EQ(loaded->sensitivity, budgets.sensitivity);
  EXPECT_TRUE(loaded->bits.empty());
  EXPECT_FALSE(loaded->has_curves());
  budgets.bits = {16, 8, 4, 4, 8, 16};
  budgets.sensitivity_half = {1, 2, 3, 4, 5, 6};
  budgets.sensitivity_quarter = {2, 3, 4, 5, 6, 7};
  budgets.sensitivity_eighth = {3, 4, 5, 6, 7, 8};
  budgets.sensitivity_4_bits = {4, 5, 6, 7, 8, 9};
  budgets.sensitivity_none = {5, 6, 7, 8, 9, 10};
  ASSERT_TRUE(SaveCompressionBudgets(budgets, path).ok());
  const auto curves = LoadCompressionBudgets(path, 2, 3);
  ASSERT_TRUE(curves.ok()) << curves.status();
  EXPECT_TRUE(curves->has_curves());
  EXPECT_EQ(curves->bits, budgets.bits);
  EXPECT_EQ(curves->sensitivity_half, budgets.sensitivity_half);
  EXPECT_EQ(curves->sensitivity_quarter, budgets.sensitivity_quarter);
  EXPECT_EQ(curves->sensitivity_eighth, budgets.sensitivity_eighth);
  EXPECT_EQ(curves->sensitivity_4_bits, budgets.sensitivity_4_bits);
  EXPECT_EQ(curves->sensitivity_none, budgets.sensitivity_none);
  EXPECT_THAT(std::string(LoadCompressionBudgets(path, 3, 3).status().message()), HasSubstr(path));
  std::remove(path.c_str());
  EXPECT_THAT(std::string(LoadCompressionBudgets(path, 2, 3).status().message()),
              HasSubstr("cannot be opened"));
  EXPECT_FALSE(SaveCompressionBudgets(budgets, "/nonexistent/b.json").ok());
}

}  // namespace
}  // namespace atp
