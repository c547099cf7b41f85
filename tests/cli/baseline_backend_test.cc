#include "cli/baseline_backend.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "kernels/backend_factory.h"

namespace atp {
namespace {

using ::testing::ElementsAre;

// Keys on the line, one query that likes large ones: attention grows with the key.
struct Line {
  std::vector<float> keys{0.1f, 0.5f, -1.0f, 3.0f, 2.0f, 0.0f};
  std::vector<float> values{1, 2, 3, 4, 5, 6};
  std::vector<float> query{1.0f};
  PrincipalFitProblem Problem(int count, int forced) const {
    PrincipalFitProblem p;
    p.keys = keys.data();
    p.values = values.data();
    p.queries = query.data();
    p.n = 6;
    p.m = 1;
    p.d = 1;
    p.count = count;
    p.forced = forced;
    return p;
  }
};

TEST(ChooseEntries, RecentAreSinksAndTheNewest) {
  const Line line;
  EXPECT_THAT(ChooseEntries(Baseline::kRecent, line.Problem(3, 1)), ElementsAre(0, 4, 5));
  EXPECT_THAT(ChooseEntries(Baseline::kRecent, line.Problem(2, 2)), ElementsAre(0, 1));
  EXPECT_THAT(ChooseEntries(Baseline::kRecent, line.Problem(2, 0)), ElementsAre(4, 5));
}

TEST(ChooseEntries, AttentionTakesTheMostAttended) {
  Line line;
  EXPECT_THAT(ChooseEntries(Baseline::kAttention, line.Problem(3, 0)), ElementsAre(1, 3, 4));
  EXPECT_THAT(ChooseEntries(Baseline::kAttention, line.Problem(2, 1)), ElementsAre(0, 3));
  line.query[0] = -1;
  EXPECT_THAT(ChooseEntries(Baseline::kAttention, line.Problem(2, 0)), ElementsAre(2, 5));
}

TEST(ChooseEntries, KeepsAllWhereThereIsRoom) {
  const Line line;
  for (const Baseline b : {Baseline::kRecent, Baseline::kAttention, Baseline::kUnfitted}) {
    EXPECT_THAT(ChooseEntries(b, line.Problem(6, 1)), ElementsAre(0, 1, 2, 3, 4, 5)) << Name(b);
  }
  EXPECT_EQ(ChooseEntries(Baseline::kUnfitted, line.Problem(2, 1)).size(), 2u);
}

TEST(Baseline, NamesReadBack) {
  for (const Baseline b : {Baseline::kNone, Baseline::kRecent, Baseline::kAttention, Baseline::kUnfitted}) {
    EXPECT_EQ(BaselineFromName(Name(b)), b);
  }
  EXPECT_EQ(BaselineFromName("best"), std::nullopt);
}

// Through pages: 16 tokens become 4 entries with their real keys and values, and no log mass.
TEST(BaselineBackend, WritesWhatItChose) {
  constexpr int kHeadDim = 2, kTokens = 16, kCount = 4;
  auto inner = MakeBackend({"reference", 1, "auto"});
  ASSERT_TRUE(inner.ok()) << inner.status();
  BaselineBackend backend(*std::move(inner));
  const KvPage exact(KvFormat::kF32, kTokens, kHeadDim, false),
      principal(KvFormat::kF32, kTokens, kHeadDim, true);
  const size_t block_bytes = principal.bytes();
  auto memory = backend.Allocate(3 * block_bytes);
  ASSERT_TRUE(memory.ok()) << memory.status();
  for (int i = 0; i < kTokens; ++i) {
    const float key[] = {static_cast<float>(i), 0.5f}, value[] = {100.0f + static_cast<float>(i), -1.0f};
    exact.Store(memory->data(), i, key, value);
  }
  const QueryPage queries(block_bytes, 1, kHeadDim);
  const BlockId exact_block = 0, out_block = 1, query_block = 2;
  const int32_t position = 16;
  const float inverse_frequency = 1.0f;
  PrincipalFitJob job;
  job.exact = &exact_block;
  job.exact_entries = kTokens;
  job.queries = &query_block;
  job.positions = &position;
  job.samples = 1;
  job.forced = 1;
  job.count = kCount;
  job.out = &out_block;
  job.page = &principal;
  PrincipalFitReport report;
  FitPrincipalKeysArgs args;
  args.jobs = {&job, 1};
  args.reports = {&report, 1};
  args.pool = {memory->data(), block_bytes, &exact};
  args.query_page = &queries;
  args.inverse_frequency = &inverse_frequency;
  backend.set_baseline(Baseline::kRecent);
  backend.FitPrincipalKeys(args);
  const int wanted[] = {0, 13, 14, 15};
  for (int i = 0; i < kTokens; ++i) {
    float key[kHeadDim], value[kHeadDim], log_mass;
    principal.Load(memory->data() + block_bytes, i, key, value, &log_mass);
    if (i < kCount) {
      EXPECT_EQ(key[0], static_cast<float>(wanted[i]));
      EXPECT_EQ(value[0], 100.0f + static_cast<float>(wanted[i]));
      EXPECT_EQ(log_mass, 0.0f);
    } else {
      EXPECT_EQ(log_mass, -INFINITY);
    }
  }
  EXPECT_FALSE(report.fitted);
  // Without a baseline it is the backend below that fits: few entries stand for many, so masses are not 0.
  backend.set_baseline(Baseline::kNone);
  backend.FitPrincipalKeys(args);
  float key[kHeadDim], value[kHeadDim], log_mass;
  principal.Load(memory->data() + block_bytes, 0, key, value, &log_mass);
  EXPECT_NE(log_mass, 0.0f);
}

}  // namespace
}  // namespace atp
