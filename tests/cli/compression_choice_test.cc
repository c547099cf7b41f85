#include "cli/compression_choice.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <tuple>

#include "engine/byte_budget.h"

namespace atp {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;

class CompressionChoiceTest : public ::testing::Test {
 protected:
  CompressionChoiceTest() {
    model_.layers = 2;
    model_.heads = 4;
    model_.kv_heads = 2;
    model_.head_dim = 32;
    std::filesystem::create_directories(directory_);
  }
  ~CompressionChoiceTest() override { std::filesystem::remove_all(directory_); }

  absl::StatusOr<CompressionChoice> Choose() {
    return ChooseCompression(config_, directory_, model_, 16, KvFormat::kBF16, /*block_bytes=*/0);
  }
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

// A preset is bytes where the file says what each head costs, and else what the file has.
TEST_F(CompressionChoiceTest, BytesAreSpentOnEntriesAndBits) {
  const std::string own = R"({"ratio": [[0.1, 0.2], [0.3, 1]], "bits": [[8, 8], [4, 4]])";
  WriteBudgets(own + "}");
  config_.preset = "compact";
  auto choice = Choose();
  ASSERT_TRUE(choice.ok()) << choice.status();
  EXPECT_THAT(choice->settings.head_ratio, testing::ElementsAre(0.1, 0.2, 0.3, 1));
  EXPECT_THAT(choice->settings.head_bits, testing::ElementsAre(8, 8, 4, 4));
  EXPECT_DOUBLE_EQ(choice->ratio, 0.4);

  std::string curves = own;
  for (const auto& [key, idle] :
       {std::pair("sensitivity_half", "1e-5"), std::pair("sensitivity_quarter", "4e-5"),
        std::pair("sensitivity_eighth", "2e-4"), std::pair("sensitivity", "1e-3"),
        std::pair("sensitivity_4_bits", "1e-6")}) {
    const std::string one = idle;
    curves += std::string(", \"") + key + "\": [[" + one + ", " + one + "], [" + one + ", 1]]";
  }
  WriteBudgets(curves + "}");
  double before = 1;
  for (const auto& [preset, share] :
       {std::pair("quality", 0.25), std::pair("balanced", 0.125), std::pair("compact", 0.0625)}) {
    config_.preset = preset;
    choice = Choose();
    ASSERT_TRUE(choice.ok()) << choice.status();
    const CompressionShape shape = CompressionShapeOf(model_, 16, KvFormat::kBF16, 4096);
    const auto plan = MakeCompressionPlan(choice->settings, shape).value();
    EXPECT_LE(ShareOfBf16(*plan, shape), share);
    EXPECT_GT(ShareOfBf16(*plan, shape), 0.8 * share) << preset;
    EXPECT_LT(choice->ratio, before);
    before = choice->ratio;
    if (share > 0.1) {  // enough for the one head that needs its keys
      EXPECT_GT(choice->settings.head_ratio[3], 0.5);
      EXPECT_LT(choice->settings.head_ratio[0], 1);
    }
  }
  config_.ratio = 0.5;  // by hand: entries only
  choice = Choose();
  ASSERT_TRUE(choice.ok()) << choice.status();
  EXPECT_THAT(choice->settings.head_bits, IsEmpty());
  config_.ratio = 0;
  config_.preset = "compact";
  config_.segment_tokens = 32;  // a page of 16 entries is half of it
  choice = Choose();
  ASSERT_TRUE(choice.ok()) << choice.status();
  EXPECT_EQ(choice->settings.bits, 4);
  EXPECT_THAT(choice->settings.head_bits, IsEmpty());
  EXPECT_EQ(choice->settings.head_ratio.size(), 4u);
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
  config_.preset = "auto";  // exact, were there not the bits
  config_.bits = 4;
  EXPECT_EQ(Choose()->preset, "ratio");
  EXPECT_EQ(Choose()->settings.bits, 4);
  config_.preset = "compact";
  config_.bits = 0;
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

TEST_F(CompressionChoiceTest, OverridesKeepTheServersSegmentsAndBudgets) {
  WriteBudgets(R"({"ratio": [[0.1, 0.1], [0.1, 0.7]], "sensitivity": [[1, 1], [1, 30]]})");
  Config config;
  config.model.path = directory_;
  config.atp.segment_tokens = 128;
  config.atp.max_principal_keys = 100;
  config.atp.preset = "quality";
  config_ = config.atp;
  const CompressionChoice own = Choose().value();
  const auto settings_of = OverrideSettings(config, model_, KvFormat::kBF16, own);
  CompressionOverride compact, ratio, exact, all;
  compact.preset = "compact";
  ratio.ratio = 0.5;
  exact.preset = "exact";
  all.ratio = 1;
  EXPECT_EQ(settings_of(compact)->bits, 4);
  EXPECT_EQ(settings_of(compact)->segment_tokens, 128);
  EXPECT_EQ(settings_of(compact)->max_principal_keys, 100);
  double sum = 0;
  const std::vector<double> ratios = settings_of(compact)->head_ratio;
  for (const double r : ratios) sum += r;
  EXPECT_NEAR(sum / 4, 0.25, 0.26 / 4) << "the mean, in whole pages of 16 of 128 entries";
  EXPECT_EQ(settings_of(ratio)->head_ratio.size(), 4u);
  EXPECT_EQ(settings_of(ratio)->bits, 8) << "the server's";
  EXPECT_EQ(settings_of(all)->bits, 16);
  EXPECT_FALSE(Compresses(*settings_of(exact)));
  ratio.bits = 16;
  EXPECT_EQ(settings_of(ratio)->bits, 16);
  config.atp.allow_override = false;
  EXPECT_EQ(OverrideSettings(config, model_, KvFormat::kBF16, own), nullptr);
}

// Its blocks have no room for the log masses of 16 bits: no head of a preset that is spent anew may ask for
// them.
TEST_F(CompressionChoiceTest, PresetsOnAnExactServerFitItsBlocks) {
  WriteBudgets(R"({"ratio": [[1, 0.1], [0.1, 0.1]], "sensitivity": [[1, 1e-5], [1e-5, 1e-5]],
                   "sensitivity_half": [[0.4, 1e-6], [1e-6, 1e-6]], "sensitivity_quarter": [[0.6, 1e-6], [1e-6, 1e-6]],
                   "sensitivity_eighth": [[0.8, 1e-6], [1e-6, 1e-6]], "sensitivity_4_bits": [[0.5, 1e-3], [1e-3, 1e-3]]})");
  Config config;
  config.model.path = directory_;
  CompressionOverride quality;
  quality.preset = "quality";
  for (const std::string preset : {"exact", "balanced"}) {
    config.atp.preset = preset;
    config_ = config.atp;
    const auto settings_of = OverrideSettings(config, model_, KvFormat::kBF16, Choose().value());
    const std::vector<int> bits = settings_of(quality)->head_bits;
    ASSERT_EQ(bits.size(), 4u);
    EXPECT_EQ(std::count(bits.begin(), bits.end(), 16) == 0, preset == "exact")
        << bits[0] << bits[1] << bits[2] << bits[3];
  }
}

// The blocks that are there are made for the server's own compression, and count as they are.
TEST_F(CompressionChoiceTest, PresetsKeepToTheirBytesInBlocksForOthers) {
  WriteBudgets(R"({"ratio": [[1, 0.1], [0.1, 0.1]], "sensitivity": [[1, 1e-2], [1e-2, 1e-2]],
                   "sensitivity_half": [[0.4, 1e-3], [1e-3, 1e-3]], "sensitivity_quarter": [[0.6, 2e-3], [2e-3, 2e-3]],
                   "sensitivity_eighth": [[0.8, 5e-3], [5e-3, 5e-3]], "sensitivity_4_bits": [[1e-3, 1e-5], [1e-5, 1e-5]]})");
  Config config;
  config.model.path = directory_;
  config.atp.ratio = 0.5;  // of 16 bits
  config_ = config.atp;
  const CompressionChoice own = Choose().value();
  const auto settings_of = OverrideSettings(config, model_, KvFormat::kBF16, own);
  CompressionShape shape = CompressionShapeOf(model_, 16, KvFormat::kBF16, 4096);
  shape.block_bytes = CompressedBlockBytes(own.settings, KvFormat::kBF16, 16, model_.head_dim);
  for (const auto& [preset, share] : {std::pair("quality", 0.25), std::pair("balanced", 0.125)}) {
    CompressionOverride wanted;
    wanted.preset = preset;
    EXPECT_LE(ShareOfBf16(*MakeCompressionPlan(*settings_of(wanted), shape).value(), shape), share) << preset;
  }
}

TEST_F(CompressionChoiceTest, OverridesThatTheBudgetsCannotServeDoNotShowTheFile) {
  WriteBudgets(R"({"ratio": [[0.1, 0.1], [0.1, 0.7]]})");
  Config config;
  config.model.path = directory_;
  config.atp.preset = "exact";
  config_ = config.atp;
  const auto settings_of = OverrideSettings(config, model_, KvFormat::kBF16, Choose().value());
  CompressionOverride ratio;
  ratio.ratio = 0.5;
  const absl::Status status = settings_of(ratio).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("mean ratio of 0.5"));
  EXPECT_THAT(std::string(status.message()), testing::Not(HasSubstr(directory_)));
  ratio.ratio = 0.25;  // the file's own mean
  EXPECT_EQ(settings_of(ratio)->head_ratio[3], 0.7);
  EXPECT_EQ(settings_of(ratio)->bits, 8) << "an exact server's";
}

}  // namespace
}  // namespace atp
