#include "cli/evaluation_data.h"

#include <gmock/gmock.h>
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
  ASSERT_TRUE(RepeatSpans(2, &after).ok());
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
  ASSERT_TRUE(RepeatSpans(2, &again).ok());
  EXPECT_EQ(again, after);
}

TEST(RepeatSpans, HalfOfEachSequence) {
  TokenSequences ragged = Counted(3, 300);
  ragged[0].resize(31);  // no room for spans
  ragged[2].resize(40);
  ASSERT_TRUE(RepeatSpans(1, &ragged).ok());
  EXPECT_EQ(ragged[0].size(), 31u);
  EXPECT_EQ(ragged[0].back(), 30);
  EXPECT_EQ(ragged[1][149], 149);
  EXPECT_LT(*std::max_element(ragged[1].begin() + 150, ragged[1].end()), 150);
  EXPECT_EQ(ragged[2].size(), 40u);
  EXPECT_LT(*std::max_element(ragged[2].begin() + 20, ragged[2].end()), 20);
}

TEST(RepeatSpans, SaysWhereNoneDoes) {
  TokenSequences brief = Counted(4, 31), none;
  EXPECT_THAT(std::string(RepeatSpans(1, &brief).message()), ::testing::HasSubstr("at least 32 tokens"));
  EXPECT_EQ(brief, Counted(4, 31));
  EXPECT_FALSE(RepeatSpans(2, &none).ok());
  TokenSequences one = Counted(1, 300);  // of two each second, of one that
  ASSERT_TRUE(RepeatSpans(2, &one).ok());
  EXPECT_LT(one[0].back(), 150);
}

}  // namespace
}  // namespace atp
