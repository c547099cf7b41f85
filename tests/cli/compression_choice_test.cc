#include "cli/compression_choice.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

namespace atp {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;

class CompressionChoiceTest : public ::testing::Test {
 protected:
  CompressionChoiceTest() {
    model_.layers = 2;
    model_.kv_heads = 2;
    std::filesystem::create_directories(directory_);
  }
  ~CompressionChoiceTest() override { std::filesystem::remove_all(directory_); }

  absl::StatusOr<CompressionChoice> Choose() { return ChooseCompression(config_, directory_, model_, 16); }
  std::string Error() { return std::string(Choose().status().message()); }
  void WriteBudgets(const std::string& json) { std::ofstream(BudgetsFileOf(directory_)) << json; }

  const std::string directory_ =
      ::testing::TempDir() + "/choice_" + ::testing::UnitTest::GetInstance()->current_test_info()->name();
  LlamaConfig model_;
  AtpConfig config_;
};

TEST_F(CompressionChoiceTest, ExactWithoutAFile) {
  const auto choice = Choose();
  ASSERT_TRUE(choice.ok()) << choice.status();
  EXPECT_TRUE(choice->exact());
  EXPECT_EQ(choice->preset, "exact");
}

TEST_F(CompressionChoiceTest, BalancedWithAFile) {
  WriteBudgets(R"({"ratio": [[0.1, 0.1], [0.1, 0.7]], "sensitivity": [[1, 1], [1, 30]]})");
  const auto choice = Choose();
  ASSERT_TRUE(choice.ok()) << choice.status();
  EXPECT_EQ(choice->preset, "balanced");
  EXPECT_EQ(choice->ratio, 0.5);
  EXPECT_EQ(choice->settings.bits, 4);
  EXPECT_EQ(choice->budgets_file, BudgetsFileOf(directory_));
  ASSERT_EQ(choice->settings.head_ratio.size(), 4u);
  double sum = 0;
  for (const double ratio : choice->settings.head_ratio) sum += ratio;
  EXPECT_DOUBLE_EQ(sum / 4, 0.5);
  EXPECT_GT(choice->settings.head_ratio[3], choice->settings.head_ratio[0]);
}

TEST_F(CompressionChoiceTest, ByNameOrByHand) {
  for (const auto& [preset, ratio, bits] :
       {std::tuple("quality", 0.5, 8), std::tuple("balanced", 0.5, 4), std::tuple("compact", 0.25, 4)}) {
    config_.preset = preset;
    const auto choice = Choose();
    ASSERT_TRUE(choice.ok()) << choice.status();
    EXPECT_EQ(choice->ratio, ratio);
    EXPECT_EQ(choice->settings.ratio, ratio);
    EXPECT_EQ(choice->settings.bits, bits);
    EXPECT_THAT(choice->settings.head_ratio, IsEmpty());
  }
  config_.ratio = 0.3;
  config_.max_principal_keys = 100;
  config_.segment_tokens = 64;
  const auto choice = Choose();
  ASSERT_TRUE(choice.ok()) << choice.status();
  EXPECT_EQ(choice->settings.ratio, 0.3);
  EXPECT_EQ(choice->settings.bits, 16);
  EXPECT_EQ(choice->settings.max_principal_keys, 100);
  EXPECT_EQ(choice->settings.segment_tokens, 64);
}

TEST_F(CompressionChoiceTest, UniformOverlooksTheFile) {
  WriteBudgets("not JSON");
  config_.budgets = "uniform";
  ASSERT_TRUE(Choose().ok());
  EXPECT_TRUE(Choose()->exact());
  config_.preset = "exact";
  config_.budgets = "auto";
  EXPECT_TRUE(Choose().ok());  // nothing to read it for
}

TEST_F(CompressionChoiceTest, ErrorsNameFileOrSetting) {
  WriteBudgets("not JSON");
  EXPECT_THAT(Error(), HasSubstr("atp_budgets.json: not JSON"));
  config_.budgets = "/nonexistent/b.json";
  EXPECT_THAT(Error(), HasSubstr("/nonexistent/b.json: cannot be opened"));
  config_.budgets = "uniform";
  config_.max_principal_keys = 64;
  EXPECT_THAT(Error(), HasSubstr("atp.max_principal_keys: 64 caps nothing"));
  config_.budgets = "auto";
  WriteBudgets(R"({"ratio": [[0.3, 0.3], [0.3, 0.3]]})");
  EXPECT_THAT(Error(), HasSubstr("sensitivity: missing"));
}

}  // namespace
}  // namespace atp
