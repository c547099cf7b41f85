// The model with compressed history: how tokens are cut into steps, and what else is in a step, must not
// change a single bit; and what it predicts must stay close to what it predicts with all its keys.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "engine/byte_budget.h"
#include "tests/engine/planned_runner.h"

namespace atp {
namespace {

const std::string kDefaultModel = std::string(ATP_SOURCE_DIR) + "/models/default";
// Seven million parameters, and no head that looks far back.
const std::string kFirstDefaultModel = std::string(ATP_SOURCE_DIR) + "/../shared/data/models/bootstrap";

CompressionSettings Settings(double ratio, int segment, int window, int cap = 0, int bits = 16) {
  CompressionSettings settings;
  settings.ratio = ratio;
  settings.bits = bits;
  settings.segment_tokens = segment;
  settings.window_tokens = window;
  settings.max_principal_keys = cap;
  return settings;
}

std::vector<TokenId> RandomTokens(int count, int64_t vocab, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<TokenId> tokens(count);
  for (TokenId& token : tokens) token = static_cast<TokenId>(random() % vocab);
  return tokens;
}

// A .npy file of int64 [sequences, length] (numpy.lib.format, version 1).
std::vector<std::vector<TokenId>> ReadIds(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const size_t header = static_cast<uint8_t>(bytes.at(8)) + 256u * static_cast<uint8_t>(bytes.at(9));
  const std::string text = bytes.substr(10, header);
  EXPECT_NE(text.find("'<i8'"), std::string::npos) << path;
  size_t rows = 0, columns = 0;
  EXPECT_EQ(std::sscanf(text.c_str() + text.find("'shape': ("), "'shape': (%zu, %zu)", &rows, &columns), 2);
  std::vector<std::vector<TokenId>> ids(rows, std::vector<TokenId>(columns));
  EXPECT_EQ(bytes.size(), 10 + header + rows * columns * sizeof(int64_t));
  for (size_t i = 0; i < rows * columns; ++i) {
    int64_t id;
    std::memcpy(&id, bytes.data() + 10 + header + i * sizeof(id), sizeof(id));
    ids[i / columns][i % columns] = static_cast<TokenId>(id);
  }
  return ids;
}

size_t DifferentBits(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return std::max(a.size(), b.size());
  size_t different = 0;
  for (size_t i = 0; i < a.size(); ++i) different += std::memcmp(&a[i], &b[i], sizeof(float)) != 0;
  return different;
}

// KL(p || q) of the softmax of two rows of logits, in nats.
double Divergence(const float* p, const float* q, size_t vocab) {
  const auto log_total = [vocab](const float* x) {
    double top = x[0], sum = 0;
    for (size_t i = 1; i < vocab; ++i) top = std::max<double>(top, x[i]);
    for (size_t i = 0; i < vocab; ++i) sum += std::exp(x[i] - top);
    return top + std::log(sum);
  };
  const double log_p = log_total(p), log_q = log_total(q);
  double kl = 0;
  for (size_t i = 0; i < vocab; ++i)
    kl += std::exp(p[i] - log_p) * ((p[i] - log_p) - (static_cast<double>(q[i]) - log_q));
  return kl;
}

// In one go, in chunks of every kind, token by token, and beside other sequences.
void ExpectSameHoweverItIsCut(PlannedRunner* runner, const CompressionSettings& settings,
                              const std::vector<TokenId>& tokens) {
  const std::shared_ptr<const CompressionPlan> plan = runner->Plan(settings);
  ASSERT_NE(plan, nullptr);
  ASSERT_GT(plan->FittedSegments(static_cast<int>(tokens.size())), 1);
  const std::vector<float> whole = runner->Logits({tokens}, plan, PlannedRunner::kMaxRows)[0];
  int fitted = 0;
  for (const PrincipalFitReport& fit : runner->fits) fitted += fit.fitted;
  EXPECT_GT(fitted, 0);
  EXPECT_GT(DifferentBits(whole, runner->Logits({tokens}, nullptr, PlannedRunner::kMaxRows)[0]), 0u)
      << "nothing was compressed";
  for (const int chunk : {1, 16, 37}) {
    EXPECT_EQ(DifferentBits(runner->Logits({tokens}, plan, chunk)[0], whole), 0u) << "chunks of " << chunk;
  }
  std::vector<TokenId> other = tokens, shorter = tokens;
  std::reverse(other.begin(), other.end());
  shorter.resize(shorter.size() * 2 / 3);
  const auto batched = runner->Logits({other, tokens, shorter}, plan, 23);
  EXPECT_EQ(DifferentBits(batched[1], whole), 0u) << "in a batch, chunks of 23";
  EXPECT_EQ(DifferentBits(batched[2], {whole.begin(), whole.begin() + batched[2].size()}), 0u);
}

struct Case {
  double ratio;
  int bits;
};
class PrincipalModelTest : public testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(Settings, PrincipalModelTest,
                         testing::Values(Case{0.5, 16}, Case{0.25, 16}, Case{0.125, 16}, Case{0.5, 8},
                                         Case{0.25, 8}, Case{0.25, 4}, Case{0.125, 4}),
                         [](const auto& info) {
                           return "OneOf" + std::to_string(static_cast<int>(1 / info.param.ratio)) + "Bits" +
                                  std::to_string(info.param.bits);
                         });

TEST_P(PrincipalModelTest, ChunksDecodeAndBatchAreBitwiseTheSame) {
  for (const std::string name : {"llama_mha_f32", "llama3_gqa2_bf16", "linear_gqa4_f16"}) {
    PlannedRunner runner(std::string(ATP_SOURCE_DIR) + "/tests/golden/" + name);
    const std::vector<TokenId> tokens = RandomTokens(230, runner.config().vocab_size, 5);
    const struct { int window, cap; } histories[] = {{0, 0}, {16, 40}, {64, 0}};
    for (const auto& h : histories) {
      SCOPED_TRACE(name + ", window " + std::to_string(h.window) + ", cap " + std::to_string(h.cap));
      ExpectSameHoweverItIsCut(&runner, Settings(GetParam().ratio, 48, h.window, h.cap, GetParam().bits),
                               tokens);
    }
  }
}

TEST_P(PrincipalModelTest, DefaultModelChunksDecodeAndBatchAreBitwiseTheSame) {
  PlannedRunner runner(kDefaultModel);
  std::vector<TokenId> tokens = ReadIds(kDefaultModel + "/eval_ids.npy")[0];
  tokens.resize(150);
  ExpectSameHoweverItIsCut(&runner, Settings(GetParam().ratio, 64, 0, 0, GetParam().bits), tokens);
  ExpectSameHoweverItIsCut(&runner, Settings(GetParam().ratio, 32, 32, 24, GetParam().bits), tokens);
}

TEST(PrincipalModel, HeadsWithDifferentBudgetsStandSideBySide) {
  PlannedRunner runner(std::string(ATP_SOURCE_DIR) + "/tests/golden/llama3_gqa2_bf16");
  CompressionSettings settings = Settings(1, 32, 16);
  for (int i = 0; i < runner.cache().shape().heads_total(); ++i) {
    settings.head_ratio.push_back(i % 3 == 0 ? 1.0 : i % 3 == 1 ? 0.25 : i % 4 == 1 ? 0 : 1.0 / 8);
    settings.head_bits.push_back(i % 4 == 0 ? 16 : i % 4 == 1 ? 8 : 4);
  }
  const std::vector<TokenId> tokens = RandomTokens(200, runner.config().vocab_size, 8);
  ExpectSameHoweverItIsCut(&runner, settings, tokens);
  settings.max_principal_keys = 50;
  ExpectSameHoweverItIsCut(&runner, settings, tokens);
}

TEST(PrincipalModel, EntriesOfSixteenBitsAndTheReferenceBackend) {
  const std::string model = std::string(ATP_SOURCE_DIR) + "/tests/golden/llama3_gqa2_bf16";
  for (const std::string device : {"cpu", "reference"}) {
    PlannedRunner runner(model, KvFormat::kBF16, device);
    const std::vector<TokenId> tokens = RandomTokens(120, runner.config().vocab_size, 8);
    ExpectSameHoweverItIsCut(&runner, Settings(0.25, 32, 16), tokens);
    ExpectSameHoweverItIsCut(&runner, Settings(0.5, 32, 0, 20), tokens);
  }
}

// In blocks made for exact tokens pages lie otherwise, and hold the same entries.
TEST(PrincipalModel, BlocksOfAnExactCacheServeToo) {
  const std::string model = std::string(ATP_SOURCE_DIR) + "/tests/golden/llama3_gqa2_bf16";
  PlannedRunner large(model), small(model, KvFormat::kF32, "cpu", /*exact_blocks=*/true);
  ASSERT_LT(small.cache().block_bytes(), large.cache().block_bytes());
  const std::vector<TokenId> tokens = RandomTokens(200, large.config().vocab_size, 8);
  for (const int bits : {8, 4}) {
    const CompressionSettings settings = Settings(0.5, 64, 0, 0, bits);
    ASSERT_GE(small.Plan(settings)->TotalGroupBlocks(0), large.Plan(settings)->TotalGroupBlocks(0));
    ExpectSameHoweverItIsCut(&small, settings, tokens);
    const std::vector<float> expected = large.Logits({tokens}, large.Plan(settings), 64)[0];
    const std::vector<float> actual = small.Logits({tokens}, small.Plan(settings), 64)[0];
    const std::vector<float> exact = small.Logits({tokens}, nullptr, 64)[0];
    double apart = 0, compressed = 0;
    for (size_t p = 0; p < tokens.size(); ++p) {
      apart += Divergence(&expected[p * small.vocab()], &actual[p * small.vocab()], small.vocab());
      compressed += Divergence(&expected[p * small.vocab()], &exact[p * small.vocab()], small.vocab());
    }
    EXPECT_LT(apart, 1e-4 * compressed);
  }
}

// KL per token of an exact cache of this format beside one of fp32, on the model's real text.
double CostOf(const std::string& model, KvFormat format) {
  std::vector<TokenId> tokens = ReadIds(model + "/eval_ids.npy")[0];
  tokens.resize(150);
  const std::vector<float> exact = PlannedRunner(model).Logits({tokens}, nullptr, 64)[0];
  PlannedRunner runner(model, format);
  const std::vector<float> logits = runner.Logits({tokens}, nullptr, 64)[0];
  double sum = 0;
  for (size_t p = 0; p < tokens.size(); ++p)
    sum += Divergence(&exact[p * runner.vocab()], &logits[p * runner.vocab()], runner.vocab());
  return sum / static_cast<double>(tokens.size());
}

// An fp8 has four bits of significand, whatever its size; int8 has seven for the largest element of an entry.
TEST(PrincipalModel, FormatsOfTheCacheCostWhatTheirBitsAre) {
  const double bf16 = CostOf(kDefaultModel, KvFormat::kBF16), fp8 = CostOf(kDefaultModel, KvFormat::kFp8),
               int8 = CostOf(kDefaultModel, KvFormat::kInt8), int4 = CostOf(kDefaultModel, KvFormat::kInt4);
  std::printf("KL of bf16 %.2g, fp8 %.2g, int8 %.2g, int4 %.2g\n", bf16, fp8, int8, int4);
  EXPECT_GT(bf16, 0);
  EXPECT_LT(bf16, fp8);
  EXPECT_LT(int8, fp8);
  EXPECT_LT(fp8, int4);
}

TEST(PrincipalModel, Fp8CostsLittle) {
  if (!std::filesystem::exists(kFirstDefaultModel)) GTEST_SKIP() << kFirstDefaultModel << " is not there";
  EXPECT_LT(CostOf(kFirstDefaultModel, KvFormat::kFp8), 1e-3);
}

// Who keeps all keys keeps all logits: principal entries are then the tokens themselves.
TEST(PrincipalModel, AllKeysKeptIsExactAttention) {
  PlannedRunner runner(std::string(ATP_SOURCE_DIR) + "/tests/golden/llama_mha_f32");
  const std::vector<TokenId> tokens = RandomTokens(200, runner.config().vocab_size, 9);
  // The cap is out of reach, but makes a plan of it. Segments are whole tiles of the attention kernel.
  const std::shared_ptr<const CompressionPlan> plan = runner.Plan(Settings(1.0, 64, 64, 1000));
  ASSERT_NE(plan, nullptr);
  const std::vector<float> kept = runner.Logits({tokens}, plan, 64)[0];
  const std::vector<float> exact = runner.Logits({tokens}, nullptr, 64)[0];
  EXPECT_EQ(DifferentBits(kept, exact), 0u);
}

TEST(PrincipalModel, FitsReportTheirResiduals) {
  PlannedRunner runner(kDefaultModel);
  std::vector<TokenId> tokens = ReadIds(kDefaultModel + "/eval_ids.npy")[1];
  tokens.resize(320);
  runner.Logits({tokens}, runner.Plan(Settings(0.25, 64, 64)), 64);
  // Token 319 sees the segments that end by 256.
  EXPECT_EQ(runner.fits.size(), 3u * runner.cache().shape().heads_total());
  for (const PrincipalFitReport& fit : runner.fits) {
    EXPECT_TRUE(fit.fitted);
    EXPECT_GT(fit.output_residual, 0);
    EXPECT_LT(fit.output_residual, 1);
    EXPECT_LT(fit.mass_residual, 1);
  }
}

TEST(PrincipalModel, WithACapAHistoryOfAnyLengthHoldsTheSameBlocks) {
  PlannedRunner runner(kDefaultModel);
  const std::vector<TokenId> tokens = ReadIds(kDefaultModel + "/eval_ids.npy")[0];
  const std::shared_ptr<const CompressionPlan> plan = runner.Plan(Settings(0.5, 32, 32, 32));
  std::vector<int64_t> most;
  for (const int length : {200, 512}) {
    runner.Logits({{tokens.begin(), tokens.begin() + length}}, plan, 1);
    most.push_back(runner.most_blocks_used);
  }
  EXPECT_EQ(most[0], most[1]);
  runner.Logits({tokens}, nullptr, 1);
  EXPECT_LT(most[1], runner.most_blocks_used / 2);
}

// The bounds of the project's plan, on held-out books after 256 of 512 tokens, with the model's budgets: one
// of its heads needs all of its keys. (At 1/8 of segments of 128 each head has one page, and there is nothing
// to share.)
TEST(PrincipalModel, PredictionsStayCloseToExactOnes) {
  PlannedRunner runner(kDefaultModel);
  const std::vector<std::vector<TokenId>> ids = ReadIds(kDefaultModel + "/eval_ids.npy");
  const std::string path = kDefaultModel + "/atp_budgets.json";
  const CompressionBudgets budgets =
      LoadCompressionBudgets(path, runner.config().layers, runner.config().kv_heads).value();
  constexpr size_t kFirst = 256;
  std::vector<std::vector<float>> exact;
  for (const auto& tokens : ids) exact.push_back(runner.Logits({tokens}, nullptr, 128)[0]);
  const auto mean_kl = [&](double ratio) {
    CompressionSettings settings = Settings(ratio, 128, 128);
    settings.head_ratio = RatiosForMean(budgets, ratio, 128, 16, path).value();
    double kl = 0;
    int64_t count = 0;
    for (size_t i = 0; i < ids.size(); ++i) {
      const auto atp = runner.Logits({ids[i]}, runner.Plan(settings), 128)[0];
      for (size_t p = kFirst; p + 1 < ids[i].size(); ++p, ++count)
        kl += Divergence(&exact[i][p * runner.vocab()], &atp[p * runner.vocab()], runner.vocab());
    }
    return kl / static_cast<double>(count);
  };
  const struct { double ratio, bound; } cases[] = {{0.5, 2e-4}, {0.25, 1e-3}};
  for (const auto& c : cases) {
    const double kl = mean_kl(c.ratio);
    std::printf("ratio %-6g KL %.3g (bound %.0e)\n", c.ratio, kl, c.bound);
    EXPECT_GT(kl, 1e-7);
    EXPECT_LE(kl, c.bound) << "ratio " << c.ratio;
  }
}

}  // namespace
}  // namespace atp
