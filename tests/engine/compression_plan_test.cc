// The plan against brute-force statements of its rules.
#include "engine/compression_plan.h"

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

using testing::HasSubstr;

CompressionShape Shape() {
  CompressionShape shape;
  shape.layers = 2;
  shape.heads = 6;
  shape.kv_heads = 3;
  shape.head_dim = 8;
  shape.block_tokens = 16;
  shape.query_blocks_per_head = 2;
  shape.max_positions = 4000;
  return shape;
}

// last: the ratio of the last head.
CompressionSettings Settings(int segment, int window, int cap = 0, double last = 0.3) {
  CompressionSettings settings;
  settings.segment_tokens = segment;
  settings.window_tokens = window;
  settings.max_principal_keys = cap;
  settings.head_ratio = {0.5, 0.25, 1.0 / 32, 0.1, 1.0, last};
  return settings;
}

std::shared_ptr<const CompressionPlan> Make(const CompressionSettings& settings) {
  return MakeCompressionPlan(settings, Shape()).value();
}

const int kSegments[] = {16, 48, 64, 256};
const int kWindows[] = {0, 16, 64, 80, 256};

// A segment is seen compressed when it ends by the beginning of the token's segment, less the window.
TEST(CompressionPlan, VisibleSegmentsAreTheRule) {
  for (const int s : kSegments) {
    for (const int w : kWindows) {
      const auto plan = Make(Settings(s, w));
      for (int p = 0; p < 6 * (s + w); ++p) {
        int begin = p;
        while (begin % s != 0) --begin;
        int visible = 0;
        while ((visible + 1) * s <= begin - w) ++visible;
        ASSERT_EQ(plan->VisibleSegments(p), visible) << "p " << p << " segment " << s << " window " << w;
        ASSERT_EQ(p < plan->UntouchedTokens(), visible == 0);
        ASSERT_EQ(plan->FittedSegments(p + 1), visible);
      }
      EXPECT_EQ(plan->FittedSegments(0), 0);
    }
  }
}

// The state grows segment by segment, up to a quarter above the cap; where a head would exceed that, all
// heads are fitted anew, to what they would have or as much below the cap. A head without entries has the
// four sinks, in the first segment and in every state.
void CheckGroups(double last) {
  for (const int s : kSegments) {
    for (const int cap : {0, 4, 16, 50, 100, 300, 1500}) {
      const auto plan = Make(Settings(s, 64, cap, last));
      std::vector<int> state(6, 0), state_blocks(6, 0);
      int begin = 0;
      for (int k = 0; k < Shape().max_positions / s; ++k) {
        std::vector<int> count(6);
        for (int h = 0; h < 6; ++h) {
          const double ratio = Settings(s, 64, cap, last).head_ratio[h];
          if (ratio > 0) count[h] = std::max(4, static_cast<int>(std::lround(ratio * s)));
        }
        const int room = cap / 4 / *std::max_element(count.begin(), count.end());
        bool replaced = false;
        for (int h = 0; h < 6; ++h) replaced |= cap > 0 && state[h] + count[h] > cap + room * count[h];
        if (replaced) begin = k;
        ASSERT_EQ(plan->Replaces(k), replaced) << "segment " << k << " of " << s << ", cap " << cap;
        ASSERT_EQ(plan->StateBegin(k), begin);
        ASSERT_EQ(plan->ForcedEntries(k), k == 0 || replaced ? 4 : 0);
        int total_blocks = 0, total_entries = 0;
        for (int h = 0; h < 6; ++h) {
          const int before = state_blocks[h];
          ASSERT_EQ(plan->StatePages(k - 1, h), before);
          const int added = k == 0 ? std::max(4, count[h]) : count[h];
          state[h] += added;
          if (replaced) state[h] = std::max(4, std::min((k + 1) * count[h], cap - room * count[h]));
          if (cap > 0) {
            ASSERT_LE(state[h], cap + cap / 4);
          }
          const int entries = replaced ? state[h] : added;
          const int blocks = (entries + 15) / 16;
          ASSERT_EQ(plan->GroupEntries(k)[h], entries);
          ASSERT_EQ(plan->GroupPages(k)[h], blocks);
          state_blocks[h] = replaced ? blocks : before + blocks;
          total_blocks += blocks;
          total_entries += entries;
        }
        ASSERT_EQ(plan->TotalGroupBlocks(k), total_blocks);
        ASSERT_EQ(plan->TotalGroupEntries(k), total_entries);
      }
    }
  }
}

TEST(CompressionPlan, GroupsAddUpToStates) {
  CheckGroups(0.3);
  CheckGroups(0);
}

// Pages of a group lie in its blocks, whole, aligned for their size, and nowhere twice.
TEST(CompressionPlan, PagesShareBlocksWithoutTouching) {
  std::mt19937 random(4);
  for (int i = 0; i < 200; ++i) {
    CompressionShape shape = Shape();
    shape.head_dim = std::vector<int>{8, 32, 64, 128}[random() % 4];
    shape.format = random() % 2 == 0 ? KvFormat::kBF16 : KvFormat::kF32;
    shape.block_tokens = random() % 4 == 0 ? 32 : 16;
    // A pool that was made for exact entries only leaves less room.
    const bool exact_blocks = random() % 3 == 0;
    if (exact_blocks)
      shape.block_bytes = KvPage(shape.format, shape.block_tokens, shape.head_dim, false).bytes();
    CompressionSettings settings = Settings(kSegments[2 + random() % 2], 64, random() % 3 == 0 ? 100 : 0);
    for (double& ratio : settings.head_ratio) ratio = (1 + random() % 32) / 32.0;
    for (int h = 0; h < 6; ++h)
      settings.head_bits.push_back(
          std::vector<int>{16, 8, 4}[exact_blocks ? 1 + random() % 2 : random() % 3]);
    const auto plan = MakeCompressionPlan(settings, shape).value();
    for (const int k : {0, 1, 3}) {
      const size_t part_bytes = plan->block_bytes() / kBlockParts;
      std::set<size_t> used;  // in units of 64 bytes
      size_t page = 0;
      int filled = 0;
      for (int h = 0; h < 6; ++h) {
        ASSERT_GE(plan->GroupPages(k)[h] * plan->Page(h)->entries(), plan->GroupEntries(k)[h]);
        for (int p = 0; p < plan->GroupPages(k)[h]; ++p, ++page) {
          const auto place = static_cast<size_t>(plan->GroupPlaces(k)[page]);
          const size_t begin = place * part_bytes, end = begin + plan->Page(h)->bytes();
          if (place % kBlockParts != 0) {
            ASSERT_EQ(begin % 64, 0u);
          }
          ASSERT_LE(end, (place / kBlockParts + 1) * plan->block_bytes()) << "crosses a block";
          for (size_t at = begin / 64; at < (end + 63) / 64; ++at) ASSERT_TRUE(used.insert(at).second);
          filled = std::max(filled, static_cast<int>(place / kBlockParts) + 1);
        }
      }
      ASSERT_EQ(page, plan->GroupPlaces(k).size());
      ASSERT_EQ(filled, plan->TotalGroupBlocks(k));
    }
  }
}

// Counts what a sequence holds, token by token.
int64_t WalkedPeak(const CompressionPlan& plan, int from, int to, int fitted) {
  int64_t peak = 0;
  for (int p = from; p < to; ++p) {
    const int s = plan.segment_tokens();
    const int visible = std::min(plan.VisibleSegments(p), fitted);
    const int exact = p + 1 - visible * s;
    int64_t held = (exact + 15) / 16 * 6;
    const int closing = (p + 1) % s == 0 ? 1 : 0;
    const int first = visible > 0 ? plan.StateBegin(visible - 1) : 0;
    for (int k = first; k < std::min(p / s + closing, fitted); ++k) held += plan.TotalGroupBlocks(k);
    if (p / s < fitted) held += plan.query_blocks();
    peak = std::max(peak, held);
  }
  return peak;
}

TEST(CompressionPlan, PeakBlocksAreWhatAWalkCounts) {
  std::mt19937 random(3);
  for (int i = 0; i < 300; ++i) {
    const auto plan = Make(Settings(kSegments[random() % 4], kWindows[random() % 5],
                                    random() % 2 == 0 ? 0 : static_cast<int>(4 + random() % 200),
                                    random() % 2 == 0 ? 0.3 : 0));
    const int to = static_cast<int>(random() % 2000);
    const int from = to == 0 ? 0 : static_cast<int>(random() % to) / 16 * 16;
    const int fitted = plan->FittedSegments(to - static_cast<int>(random() % 2));
    ASSERT_EQ(plan->PeakBlocks(from, to, fitted), WalkedPeak(*plan, from, to, fitted))
        << from << " to " << to << " fitted " << fitted;
  }
}

TEST(CompressionPlan, WithACapThePeakIsBounded) {
  const auto plan = Make(Settings(64, 64, 100));
  const int64_t at_2000 = plan->PeakBlocks(0, 2000, plan->FittedSegments(2000));
  EXPECT_EQ(plan->PeakBlocks(0, 4000, plan->FittedSegments(4000)), at_2000);
  // Tokens of window and two segments, three states, the queries.
  EXPECT_LE(at_2000, (64 + 2 * 64) / 16 * 6 + 3 * 6 * 7 + plan->query_blocks());
  const auto open = Make(Settings(64, 64));
  EXPECT_GT(open->PeakBlocks(0, 4000, open->FittedSegments(4000)),
            open->PeakBlocks(0, 2000, open->FittedSegments(2000)));
}

TEST(CompressionPlan, SamplesAreSpreadOverTheSegment) {
  for (const int s : {16, 48, 64, 80, 256, 1024}) {
    const auto plan = Make(Settings(s, 64));
    EXPECT_EQ(plan->samples(), std::min(64, s));
    int samples = 0;
    for (int offset = 0; offset < s; ++offset) {
      const int sample = plan->SampleAt(offset);
      if (sample < 0) continue;
      EXPECT_EQ(sample, samples++);
      EXPECT_EQ(plan->SampleOffset(sample), offset);
    }
    EXPECT_EQ(samples, plan->samples());
    EXPECT_GE(plan->SampleAt(s - 1), 0);
  }
}

TEST(CompressionPlan, ReferencesComeFromBehindTheSegmentAndAllOver) {
  const auto plan = Make(Settings(64, 64));
  std::set<int> seen;
  double sum = 0;
  for (int layer = 0; layer < 2; ++layer) {
    for (int head = 0; head < 6; ++head) {
      for (int segment = 0; segment < 3; ++segment) {
        for (int sample = 0; sample < 64; ++sample) {
          const int behind = plan->ReferencePosition(layer, head, segment, sample) - 64 * (segment + 1);
          ASSERT_GE(behind, 0);
          ASSERT_LT(behind, kPrincipalHorizon);
          seen.insert(behind);
          sum += behind;
        }
      }
    }
  }
  EXPECT_GT(seen.size(), 850u);  // of 1024 places, 2304 times: 1 - e^-2.25 of them
  EXPECT_NEAR(sum / 2304, 511.5, 20);
  // It is the absolute token that counts.
  const auto longer = Make(Settings(128, 64));
  EXPECT_EQ(plan->ReferencePosition(1, 2, 1, 63) - 128, longer->ReferencePosition(1, 2, 0, 63) - 128);
}

TEST(CompressionPlan, TheIdTellsPlansApart) {
  std::set<uint64_t> ids;
  int plans = 0;
  for (const int s : kSegments) {
    for (const int w : kWindows) {
      for (const int cap : {0, 64}) {
        for (const double ratio : {0.5, 0.25}) {
          CompressionSettings settings = Settings(s, w, cap);
          settings.head_ratio[3] = ratio;
          ids.insert(Make(settings)->id());
          ++plans;
        }
      }
    }
  }
  for (int changed = 0; changed < 5; ++changed) {
    CompressionSettings settings = Settings(64, 64);
    if (changed == 0) settings.sink_tokens += 1;
    if (changed == 1) settings.bits = 8;
    if (changed == 2) settings.bits = 4;
    if (changed == 3) settings.linear_rank = 0.5, settings.linear_layers = kDown;
    if (changed == 4) settings.linear_rank = 0.5, settings.linear_layers = kGateUp;
    ids.insert(Make(settings)->id());
    ++plans;
  }
  EXPECT_EQ(ids.size(), static_cast<size_t>(plans));
  EXPECT_FALSE(ids.contains(0));
  EXPECT_TRUE(ids.contains(Make([] {
                             CompressionSettings settings = Settings(64, 64);
                             settings.head_ratio[3] = 0.25;
                             return settings;
                           }())
                               ->id()));
}

TEST(CompressionPlan, NothingToCompressIsNoPlan) {
  CompressionSettings settings;
  settings.segment_tokens = 17;  // would be refused
  EXPECT_FALSE(Compresses(settings));
  EXPECT_EQ(MakeCompressionPlan(settings, Shape()).value(), nullptr);
  settings.segment_tokens = 16;
  settings.head_ratio.assign(6, 1.0);
  EXPECT_EQ(MakeCompressionPlan(settings, Shape()).value(), nullptr);
  settings.head_ratio.assign(6, 0.99);  // of 16: all
  EXPECT_TRUE(Compresses(settings));
  EXPECT_EQ(MakeCompressionPlan(settings, Shape()).value(), nullptr);
  settings.head_ratio.clear();
  settings.max_principal_keys = 100;
  EXPECT_NE(MakeCompressionPlan(settings, Shape()).value(), nullptr);
}

TEST(CompressionPlan, WrongSettingsAreNamed) {
  const auto error = [](void (*change)(CompressionSettings*)) {
    CompressionSettings settings = Settings(64, 64);
    change(&settings);
    const absl::Status status = MakeCompressionPlan(settings, Shape()).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  EXPECT_THAT(error([](CompressionSettings* s) { s->segment_tokens = 24; }), HasSubstr("atp.segment_tokens"));
  EXPECT_THAT(error([](CompressionSettings* s) { s->segment_tokens = 0; }), HasSubstr("atp.segment_tokens"));
  EXPECT_THAT(error([](CompressionSettings* s) { s->window_tokens = -16; }), HasSubstr("atp.window_tokens"));
  EXPECT_THAT(error([](CompressionSettings* s) { s->sink_tokens = 65; }), HasSubstr("atp.sink_tokens"));
  EXPECT_THAT(error([](CompressionSettings* s) { s->max_principal_keys = 3; }),
              HasSubstr("atp.max_principal_keys"));
  EXPECT_THAT(error([](CompressionSettings* s) { s->head_ratio.pop_back(); }), HasSubstr("atp.budgets"));
  EXPECT_THAT(error([](CompressionSettings* s) { s->head_ratio[2] = -0.1; }), HasSubstr("atp.ratio"));
  EXPECT_THAT(error([](CompressionSettings* s) { s->head_ratio.assign(6, 0); }), HasSubstr("atp.budgets"));
  EXPECT_THAT(error([](CompressionSettings* s) { s->head_ratio.clear(), s->ratio = 0; }),
              HasSubstr("atp.ratio"));
  EXPECT_THAT(error([](CompressionSettings* s) { s->head_ratio[2] = 1.5; }), HasSubstr("atp.ratio"));
}

}  // namespace
}  // namespace atp
