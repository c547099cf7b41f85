// Overrides: what is accepted, that equal ones share a plan, and that nobody can make an engine remember more
// and more.
#include "engine/compression_plans.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <set>
#include <string>
#include <vector>

namespace atp {
namespace {

using testing::HasSubstr;
using testing::StartsWith;

CompressionOverride Preset(const std::string& preset) {
  CompressionOverride override;
  override.preset = preset;
  return override;
}
CompressionOverride Ratio(double ratio, std::optional<int> bits = std::nullopt) {
  CompressionOverride override;
  override.ratio = ratio;
  override.bits = bits;
  return override;
}

CompressionShape Shape() {
  CompressionShape shape;
  shape.layers = 2;
  shape.heads = 2;
  shape.kv_heads = 2;
  shape.head_dim = 64;
  shape.format = KvFormat::kBF16;
  shape.max_positions = 4000;
  shape.block_bytes = KvPage(KvFormat::kBF16, 16, 64, /*with_log_mass=*/false).bytes();
  return shape;
}

class CompressionPlansTest : public testing::Test {
 protected:
  CompressionPlansTest()
      : plans_(nullptr, Shape(), [this](const CompressionOverride& override) { return Settings(override); }) {
  }

  absl::StatusOr<CompressionSettings> Settings(const CompressionOverride& override) {
    ++made_;
    CompressionSettings settings;
    if (override.preset == "exact") return settings;
    if (override.preset == "quality") return absl::InvalidArgumentError("atp: not today");
    if (override.preset == "balanced" && made_ < 2) return absl::InternalError("atp: not now");
    settings.ratio = override.ratio.value_or(0.25);
    settings.bits = override.bits.value_or(4);
    return settings;
  }
  const CompressionPlan* For(const CompressionOverride& override) {
    const auto plan = plans_.For(override);
    EXPECT_TRUE(plan.ok()) << plan.status();
    return plan.ok() ? plan->get() : nullptr;
  }
  std::string Error(const CompressionOverride& override) {
    return std::string(plans_.For(override).status().message());
  }

  int made_ = 0;
  CompressionPlans plans_;
};

TEST_F(CompressionPlansTest, OneOfPresetAndRatioInTheirRanges) {
  EXPECT_EQ(ValidateOverride(Preset("compact")), absl::OkStatus());
  EXPECT_EQ(ValidateOverride(Ratio(1, 16)), absl::OkStatus());
  CompressionOverride both = Preset("compact");
  both.ratio = 0.5;
  const struct {
    CompressionOverride override;
    std::string message;
  } wrong[] = {
      {{}, "atp: must have a preset or a ratio"},
      {both, "atp: must have only one"},
      {Preset("tiny"), "atp.preset: must be exact, quality, balanced or compact, got 'tiny'"},
      {Preset("auto"), "atp.preset: "},
      {Preset(""), "atp.preset: "},
      {Ratio(0), "atp.ratio: must be more than 0 and at most 1, got 0"},
      {Ratio(1.5), "atp.ratio: "},
      {Ratio(-0.5), "atp.ratio: "},
      {Ratio(std::nan("")), "atp.ratio: "},
      {Ratio(0.5, 5), "atp.bits: must be 16, 8 or 4, got 5"},
  };
  for (const auto& w : wrong) {
    EXPECT_EQ(ValidateOverride(w.override).code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(Error(w.override), StartsWith(w.message));
  }
  CompressionOverride with_bits = Preset("compact");
  with_bits.bits = 8;
  EXPECT_THAT(Error(with_bits), StartsWith("atp.bits: goes with a ratio"));
  EXPECT_EQ(made_, 0);
  EXPECT_EQ(plans_.known(), 0u);
}

TEST_F(CompressionPlansTest, WithoutAnOverrideTheEnginesOwn) {
  CompressionSettings settings;
  settings.ratio = 0.5;
  settings.bits = 4;
  const auto own = MakeCompressionPlan(settings, Shape()).value();
  CompressionPlans plans(own, Shape(), [&](const CompressionOverride&) { return settings; });
  EXPECT_EQ(*plans.For(std::nullopt), own);
  EXPECT_EQ(*plans.For(Preset("balanced")), own) << "the same by another name";
  EXPECT_EQ(For(Preset("exact")), nullptr);
  EXPECT_EQ(*plans_.For(std::nullopt), nullptr);
}

TEST_F(CompressionPlansTest, RefusedWhereNobodySaysWhatTheyMean) {
  CompressionPlans plans(nullptr, Shape(), nullptr);
  EXPECT_TRUE(plans.For(std::nullopt).ok());
  const absl::Status refused = plans.For(Preset("compact")).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("atp.allow_override"));
}

TEST_F(CompressionPlansTest, RatiosOnOneStepShareAPlan) {
  const CompressionPlan* quarter = For(Ratio(0.25));
  ASSERT_NE(quarter, nullptr);
  EXPECT_EQ(For(Ratio(0.2501)), quarter);
  EXPECT_EQ(For(Ratio(0.25 - 0.4 / 64)), quarter);
  EXPECT_NE(For(Ratio(0.25 + 1.0 / 64)), quarter);
  EXPECT_EQ(made_, 2);
  EXPECT_EQ(quarter->settings().ratio, 0.25);
  EXPECT_EQ(For(Ratio(1e-9))->settings().ratio, 1.0 / 64);
}

TEST_F(CompressionPlansTest, ErrorsAreRemembered) {
  for (int i = 0; i < 3; ++i) EXPECT_EQ(Error(Preset("quality")), "atp: not today");
  EXPECT_EQ(made_, 1);
}

TEST_F(CompressionPlansTest, WhatTheServerIsToBlameForIsTriedAgain) {
  EXPECT_EQ(plans_.For(Preset("balanced")).status().code(), absl::StatusCode::kInternal);
  EXPECT_TRUE(plans_.For(Preset("balanced")).ok());
}

TEST_F(CompressionPlansTest, ManyRatiosLeaveFewPlans) {
  std::vector<std::weak_ptr<const CompressionPlan>> all;
  for (int i = 1; i <= 10000; ++i) {
    for (const int bits : {8, 4}) all.push_back(*plans_.For(Ratio(i / 10000.0, bits)));
  }
  EXPECT_LE(plans_.known(), 2u * CompressionPlans::kRatioSteps);
  std::set<const CompressionPlan*> alive;
  for (const auto& plan : all) {
    if (!plan.expired()) alive.insert(plan.lock().get());
  }
  EXPECT_EQ(alive.size(), CompressionPlans::kKept);
}

TEST_F(CompressionPlansTest, WhatASequenceUsesIsNotMadeAgain) {
  const std::shared_ptr<const CompressionPlan> held = *plans_.For(Ratio(0.5));
  for (int i = 1; i <= 64; ++i) plans_.For(Ratio(i / 64.0, 8)).IgnoreError();
  const int made = made_;
  EXPECT_EQ(*plans_.For(Ratio(0.5)), held);
  EXPECT_EQ(made_, made);
}

// Blocks of an exact cache leave no room for scales and log masses, so pages have fewer entries there.
TEST_F(CompressionPlansTest, PagesFitTheBlocksThatThereAre) {
  EXPECT_EQ(For(Ratio(0.25, 4))->Page(0)->entries(), 48);
  EXPECT_EQ(For(Ratio(0.25, 8))->Page(0)->entries(), 16);
  EXPECT_LE(For(Ratio(0.25, 4))->Page(0)->bytes(), Shape().block_bytes);
  EXPECT_EQ(For(Ratio(0.5, 4))->GroupPages(0)[0], 3);  // 128 entries
  EXPECT_THAT(Error(Ratio(0.25, 16)), StartsWith("atp.bits: the server's KV blocks of 4096 bytes"));
  CompressionShape large = Shape();
  large.block_bytes = 0;
  CompressionSettings settings;
  settings.ratio = 0.25;
  settings.bits = 4;
  EXPECT_EQ(MakeCompressionPlan(settings, large).value()->Page(0)->entries(), 64);
}

}  // namespace
}  // namespace atp
