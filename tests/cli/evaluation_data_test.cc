#include "cli/evaluation_data.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

namespace atp {
namespace {

TokenSequences Counted(size_t sequences, int tokens) {
  TokenSequences out(sequences, std::vector<TokenId>(static_cast<size_t>(tokens)));
  for (auto& ids : out) std::iota(ids.begin(), ids.end(), 0);
  return out;
}

TEST(RepeatSpans, EverySecondSequenceNeedsRecall) {
  const TokenSequences before = Counted(4, 512);
  TokenSequences after = before;
  RepeatSpans(256, 2, &after);
  EXPECT_EQ(after[0], before[0]);
  EXPECT_EQ(after[2], before[2]);
  for (const size_t s : {1u, 3u}) {
    ASSERT_EQ(after[s].size(), 512u);
    EXPECT_TRUE(std::equal(after[s].begin(), after[s].begin() + 256, before[s].begin()));
    // Behind: runs of tokens of the first half, from near its beginning as well as its end.
    int breaks = 0, least = 256, most = 0;
    for (size_t i = 256; i < 512; ++i) {
      const int id = after[s][i];
      ASSERT_LT(id, 256);
      least = std::min(least, id);
      most = std::max(most, id);
      if (i > 256 && id != after[s][i - 1] + 1) ++breaks;
    }
    EXPECT_GE(breaks, 3);        // spans of at most 64
    EXPECT_LE(breaks, 256 / 8);  // and at least 8
    EXPECT_GT(most - least, 100);
  }
  EXPECT_NE(after[1], after[3]);
  TokenSequences again = before;
  RepeatSpans(256, 2, &again);
  EXPECT_EQ(again, after);
}

TEST(RepeatSpans, LeavesShortSequences) {
  TokenSequences sequences = Counted(2, 100);
  RepeatSpans(100, 2, &sequences);
  EXPECT_EQ(sequences, Counted(2, 100));
  RepeatSpans(8, 2, &sequences);  // no room for spans
  EXPECT_EQ(sequences, Counted(2, 100));
  TokenSequences ragged = Counted(2, 300);
  ragged[1].resize(20);
  RepeatSpans(150, 1, &ragged);
  EXPECT_EQ(ragged[1].size(), 20u);
  EXPECT_LT(*std::max_element(ragged[0].begin() + 150, ragged[0].end()), 150);
}

}  // namespace
}  // namespace atp
