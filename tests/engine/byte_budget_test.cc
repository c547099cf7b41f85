#include "engine/byte_budget.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace atp {
namespace {

using ::testing::HasSubstr;

CompressionShape Shape(int head_dim = 32, KvFormat format = KvFormat::kBF16) {
  CompressionShape shape;
  shape.layers = 3;
  shape.heads = 4;
  shape.kv_heads = 2;
  shape.head_dim = head_dim;
  shape.format = format;
  shape.query_blocks_per_head = 2;
  shape.max_positions = 1024;
  return shape;
}

CompressionSettings Settings(int segment) {
  CompressionSettings settings;
  settings.segment_tokens = segment;
  settings.window_tokens = 0;
  return settings;
}

// Six heads, of which two find earlier tokens: what was measured on such a model, roughly.
CompressionBudgets Measured() {
  CompressionBudgets budgets;
  budgets.layers = 3;
  budgets.kv_heads = 2;
  budgets.ratio.assign(6, 1.0);
  budgets.sensitivity_half = {1e-4, 1e-4, 0.3, 0.3, 1e-5, 1e-5};
  budgets.sensitivity_quarter = {4e-4, 5e-4, 0.5, 0.4, 4e-5, 5e-5};
  budgets.sensitivity_eighth = {8e-4, 2e-3, 0.8, 0.6, 8e-5, 7e-5};
  budgets.sensitivity = {2e-3, 5e-3, 1.0, 1.0, 1e-4, 1e-4};
  budgets.sensitivity_4_bits = {1e-4, 5e-4, 1e-2, 1e-2, 4e-6, 3e-6};
  return budgets;
}

std::shared_ptr<const CompressionPlan> PlanOf(const HeadBudgets& heads, int segment,
                                              const CompressionShape& shape) {
  CompressionSettings settings = Settings(segment);
  settings.head_ratio = heads.ratio;
  settings.head_bits = heads.bits;
  return MakeCompressionPlan(settings, shape).value();
}

TEST(SpendBytes, HeadsThatLookThingsUpKeepTheirKeys) {
  const HeadBudgets spent = SpendBytes(Measured(), 0.15, Settings(128), Shape(), "f").value();
  EXPECT_EQ(spent.ratio[2], 1);
  EXPECT_EQ(spent.ratio[3], 1);
  EXPECT_EQ(spent.bits[2], 4);
  EXPECT_EQ(spent.bits[3], 4);
  for (const size_t idle : {0, 1, 4, 5}) EXPECT_LE(spent.ratio[idle], 0.25) << idle;
  EXPECT_LE(ShareOfBf16(*PlanOf(spent, 128, Shape()), Shape()), 0.15);
}

// Where the budgets know what a head without entries costs, those that mind least pay for the two that look
// things up: in a share with which these could not keep all of their keys otherwise, and in the same way by
// entries.
TEST(SpendBytes, HeadsThatMindNothingKeepTheSinksOnly) {
  CompressionBudgets budgets = Measured();
  EXPECT_LT(SpendBytes(budgets, 0.11, Settings(128), Shape(), "f")->ratio[3], 1);
  budgets.sensitivity_none = {0.02, 0.02, 1.1, 1.1, 2e-4, 2e-4};
  const HeadBudgets spent = SpendBytes(budgets, 0.11, Settings(128), Shape(), "f").value();
  EXPECT_EQ(spent.ratio[2], 1);
  EXPECT_EQ(spent.ratio[3], 1);
  EXPECT_EQ(spent.ratio[4], 0);
  EXPECT_EQ(spent.ratio[5], 0);
  EXPECT_LE(ShareOfBf16(*PlanOf(spent, 128, Shape()), Shape()), 0.11);

  const std::vector<double> shared = *RatiosForMean(budgets, 18.0 / 48, 128, 16, "f");
  EXPECT_THAT(shared, testing::ElementsAre(0.125, 0.125, 1, 1, 0, 0));
  // Enough for everybody.
  EXPECT_THAT(*RatiosForMean(budgets, 0.75, 128, 16, "f"), testing::Each(testing::Gt(0)));
}

// A plan keeps no fewer entries than sinks, whatever a head was given.
TEST(SpendBytes, SinksAreCountedWhereTheyAreManyOfASegment) {
  for (const int sinks : {4, 48, 64, 128}) {
    CompressionSettings settings = Settings(128);
    settings.sink_tokens = sinks;
    const absl::StatusOr<HeadBudgets> spent = SpendBytes(Measured(), 0.35, settings, Shape(), "f");
    ASSERT_TRUE(spent.ok()) << spent.status();
    settings.head_ratio = spent->ratio;
    settings.head_bits = spent->bits;
    EXPECT_LE(ShareOfBf16(*MakeCompressionPlan(settings, Shape()).value(), Shape()), 0.35) << sinks;
  }
}

TEST(SpendBytes, NeverMoreThanWasGivenAndNotMuchLess) {
  std::mt19937 random(5);
  const auto uniform = [&random](double low, double high) {
    return low * std::pow(high / low, static_cast<double>(random()) / static_cast<double>(random.max()));
  };
  for (const KvFormat format : {KvFormat::kBF16, KvFormat::kF32}) {
    for (const int head_dim : {8, 32, 128}) {
      for (const int segment : {128, 256}) {
        CompressionBudgets budgets = Measured();
        for (size_t h = 0; h < 6; ++h) {
          budgets.sensitivity_half[h] = uniform(1e-6, 0.1);
          budgets.sensitivity_quarter[h] = budgets.sensitivity_half[h] * uniform(1, 5);
          budgets.sensitivity_eighth[h] = budgets.sensitivity_quarter[h] * uniform(1, 5);
          budgets.sensitivity[h] = budgets.sensitivity_eighth[h] * uniform(1, 5);
          budgets.sensitivity_4_bits[h] = uniform(1e-6, 0.1);
        }
        if (segment == 256 || head_dim == 8) {
          for (const double kl : budgets.sensitivity) budgets.sensitivity_none.push_back(kl * uniform(1, 5));
        }
        const CompressionShape shape = Shape(head_dim, format);
        double before = 0;
        for (const double share : {0.15, 0.2, 0.3, 0.45}) {
          const HeadBudgets spent = SpendBytes(budgets, share, Settings(segment), shape, "f").value();
          const auto plan = PlanOf(spent, segment, shape);
          const double took = ShareOfBf16(*plan, shape);
          EXPECT_LE(took, share);
          EXPECT_GE(took, before);
          // What is left is less than a block and what its pages leave.
          const double block = static_cast<double>(plan->block_bytes()) / (4.0 * head_dim * 6 * segment);
          EXPECT_GT(took, 0.85 * share - block) << share;
          before = took;
        }
      }
    }
  }
}

TEST(RatiosForMean, TheFilesOwnOrSharedAnew) {
  CompressionBudgets budgets;
  budgets.layers = 1;
  budgets.kv_heads = 2;
  budgets.ratio = {0.375, 0.125};
  EXPECT_EQ(*RatiosForMean(budgets, 0.25, 256, 16, "f"), budgets.ratio);
  const auto none = RatiosForMean(budgets, 0.5, 256, 16, "f");
  ASSERT_FALSE(none.ok());
  EXPECT_THAT(std::string(none.status().message()), HasSubstr("f: sensitivity: missing"));
  EXPECT_THAT(std::string(none.status().message()), HasSubstr("atp calibrate --ratio 0.5"));
  budgets.sensitivity = {0.1, 0.001};
  const auto shared = RatiosForMean(budgets, 0.5, 256, 16, "f");
  ASSERT_TRUE(shared.ok());
  EXPECT_DOUBLE_EQ((*shared)[0] + (*shared)[1], 1.0);
  EXPECT_GT((*shared)[0], (*shared)[1]);
}

// Two heads need all of their entries, four next to none, which at 1/16 two of these do not show: the two get
// them before anybody gets a second block.
TEST(RatiosForMean, CurvesSayWhoNeedsThemAll) {
  CompressionBudgets budgets = Measured();
  budgets.sensitivity = {1, 1, 1, 1, 1e-6, 1e-6};
  const std::vector<double> shared = *RatiosForMean(budgets, 0.45, 128, 16, "f");
  EXPECT_EQ(shared[2], 1);
  EXPECT_EQ(shared[3], 1);
  for (const int segment : {128, 256, 512}) {
    for (const double mean : {0.13, 0.25, 0.4, 0.5, 0.75}) {
      const std::vector<double> ratio = *RatiosForMean(budgets, mean, segment, 16, "f");
      double entries = 0;
      for (const double r : ratio) {
        EXPECT_GE(r * segment, 16);
        EXPECT_EQ(std::fmod(r * segment, 16), 0);
        entries += r * segment;
      }
      EXPECT_LE(entries, mean * 6 * segment);
      EXPECT_GT(entries, mean * 6 * segment - 16) << mean;
    }
  }
  // Too little for a block each: as without curves.
  EXPECT_EQ(*RatiosForMean(budgets, 0.1, 128, 16, "f"),
            RoundToBlocks(ShareBudget(budgets.sensitivity, 0.1), 128, 16));
}

TEST(RatiosForMean, WithoutCurvesAHeadThatNeedsAllIsNotRoundedDownForOthersFirstBlocks) {
  CompressionBudgets budgets;
  budgets.layers = 3;
  budgets.kv_heads = 2;
  budgets.ratio.assign(6, 1.0);
  budgets.sensitivity = {1e-6, 1e-6, 1, 1e-3, 1e-6, 1e-6};
  const std::vector<double> shared = *RatiosForMean(budgets, 0.3, 128, 16, "f");
  EXPECT_EQ(shared[2], 1);
  EXPECT_EQ(std::accumulate(shared.begin(), shared.end(), 0.0), 14.0 / 8);  // of 14.4 blocks
}

TEST(SpendBytes, Refusals) {
  const auto few = SpendBytes(Measured(), 0.02, Settings(128), Shape(), "f");
  EXPECT_EQ(few.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(few.status().message()), HasSubstr("take at least 0.05"));
  EXPECT_THAT(std::string(few.status().message()), HasSubstr("atp.segment_tokens"));
  EXPECT_TRUE(SpendBytes(Measured(), 0.02, Settings(512), Shape(), "f").ok());
  CompressionBudgets none = Measured();  // one page, at least
  none.sensitivity_none = {0.02, 0.02, 1.1, 1.1, 2e-4, 2e-4};
  EXPECT_TRUE(SpendBytes(none, 0.03, Settings(128), Shape(), "f").ok());
  const auto nothing = SpendBytes(none, 0.01, Settings(128), Shape(), "f");
  EXPECT_EQ(nothing.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(nothing.status().message()), HasSubstr("take at least 0.02"));
  CompressionShape exact = Shape(32, KvFormat::kInt4);
  exact.block_bytes = KvPage(KvFormat::kInt4, 16, 32, /*with_log_mass=*/false).bytes();
  EXPECT_THAT(std::string(SpendBytes(Measured(), 0.2, Settings(128), exact, "f").status().message()),
              HasSubstr("no room"));
  CompressionBudgets bare = Measured();
  bare.sensitivity_4_bits.clear();
  EXPECT_THAT(std::string(SpendBytes(bare, 0.5, Settings(128), Shape(), "f").status().message()),
              HasSubstr("f: sensitivity_4_bits: missing"));
}

// 2 heads of 16 bits with 128 of 128 entries, and 4 with 16 of 4 bits that share a block.
TEST(ShareOfBf16, CountsBlocks) {
  const HeadBudgets heads = {{1, 1, 0.125, 0.125, 0.125, 0.125}, {16, 16, 4, 4, 4, 4}};
  const CompressionShape shape = Shape();
  const auto plan = PlanOf(heads, 128, shape);
  EXPECT_EQ(plan->TotalGroupBlocks(0), 8 + 8 + 1);
  EXPECT_EQ(plan->block_bytes(), 64u * (32 / 2 * 2 + 8));
  EXPECT_DOUBLE_EQ(ShareOfBf16(*plan, shape), 17.0 * 2560 / (6 * 128 * 128));
}

}  // namespace
}  // namespace atp
