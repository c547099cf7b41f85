#include "engine/prefix_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <span>
#include <vector>

namespace atp {
namespace {

constexpr int kBlockTokens = 4;
constexpr int kGroupBlocks = 3;
const CompressionKey kExact;

std::vector<TokenId> Iota(int count, TokenId first = 0) {
  std::vector<TokenId> tokens(count);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

class PrefixCacheTest : public testing::Test {
 protected:
  // Computes `tokens` as a sequence would: takes a group per full block and indexes it. Returns the groups.
  std::vector<BlockGroup> Compute(std::span<const TokenId> tokens, const CompressionKey& key = kExact) {
    std::vector<BlockGroup> groups;
    PrefixNode node;
    for (size_t i = 0; i + kBlockTokens <= tokens.size(); i += kBlockTokens) {
      groups.push_back(*allocator_.Allocate(kGroupBlocks));
      node = cache_.Insert(node, tokens.subspan(i, kBlockTokens), key, &groups.back());
    }
    return groups;
  }
  void ExpectSound(std::span<const BlockGroup> held = {}) {
    std::vector<const BlockGroup*> handles;
    cache_.AppendHandles(&handles);
    for (const BlockGroup& group : held) handles.push_back(&group);
    EXPECT_EQ(cache_.Check(), absl::OkStatus());
    EXPECT_EQ(allocator_.Check(handles), absl::OkStatus());
  }

  BlockAllocator allocator_{20 * kGroupBlocks};
  PrefixCache cache_{kBlockTokens, 20};
};

TEST_F(PrefixCacheTest, FindsTheLongestChainOfFullBlocks) {
  const std::vector<TokenId> tokens = Iota(14);
  std::vector<BlockGroup> groups = Compute(tokens);
  ASSERT_EQ(groups.size(), 3u);
  EXPECT_EQ(cache_.Match(tokens, kExact).blocks, 3);
  EXPECT_EQ(cache_.Match(Iota(11), kExact).blocks, 2);
  EXPECT_EQ(cache_.Match(Iota(3), kExact).blocks, 0);
  std::vector<TokenId> other = tokens;
  other[5] = 99;
  EXPECT_EQ(cache_.Match(other, kExact).blocks, 1);
  // The same block of tokens behind another history is another block.
  EXPECT_EQ(cache_.Match(Iota(4, 4), kExact).blocks, 0);
  ExpectSound(groups);
}

TEST_F(PrefixCacheTest, AcquireSharesTheGroupsInOrder) {
  const std::vector<TokenId> tokens = Iota(12);
  std::vector<BlockGroup> computed = Compute(tokens);
  std::vector<BlockId> ids;
  for (const BlockGroup& group : computed) ids.push_back(group.ids()[0]);
  computed.clear();
  const PrefixMatch match = cache_.Match(tokens, kExact);
  EXPECT_EQ(match.idle_blocks, 3 * kGroupBlocks);
  std::vector<BlockGroup> groups;
  cache_.Acquire(match, &groups);
  ASSERT_EQ(groups.size(), 3u);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(groups[i].ids()[0], ids[i]);
  EXPECT_EQ(allocator_.idle_blocks(), 0);
  EXPECT_EQ(cache_.Match(tokens, kExact).idle_blocks, 0);
  ExpectSound(groups);
}

TEST_F(PrefixCacheTest, OtherSettingsNeverShare) {
  CompressionKey half;
  half.ratio = 0.5f;
  Compute(Iota(8));
  EXPECT_EQ(cache_.Match(Iota(8), half).blocks, 0);
  Compute(Iota(4), half);
  EXPECT_EQ(cache_.Match(Iota(8), half).blocks, 1);
  EXPECT_EQ(cache_.Match(Iota(8), kExact).blocks, 2);
  ExpectSound();
}

TEST_F(PrefixCacheTest, WhoComputedTheSameGetsTheKnownBlocks) {
  std::vector<BlockGroup> first = Compute(Iota(8));
  std::vector<BlockGroup> second = Compute(Iota(12));
  EXPECT_EQ(second[0].ids()[0], first[0].ids()[0]);
  EXPECT_EQ(second[1].ids()[0], first[1].ids()[0]);
  EXPECT_EQ(cache_.size(), 3);
  EXPECT_EQ(allocator_.free_blocks(), 17 * kGroupBlocks);  // the copies are free again
  first.clear();
  ExpectSound(second);
}

TEST_F(PrefixCacheTest, EvictsLeastRecentlyUsedLeavesFirst) {
  Compute(Iota(8));       // chain a: 2 blocks
  Compute(Iota(8, 100));  // chain b: 2 blocks
  std::vector<BlockGroup> groups;
  cache_.Acquire(cache_.Match(Iota(8), kExact), &groups);  // a is used after b
  groups.clear();
  ASSERT_TRUE(cache_.EvictOne());
  EXPECT_EQ(cache_.Match(Iota(8, 100), kExact).blocks, 1);  // the end of b went, its beginning stays
  ASSERT_TRUE(cache_.EvictOne());
  EXPECT_EQ(cache_.Match(Iota(8, 100), kExact).blocks, 0);
  EXPECT_EQ(cache_.Match(Iota(8), kExact).blocks, 2);
  ASSERT_TRUE(cache_.EvictOne());
  EXPECT_EQ(cache_.Match(Iota(8), kExact).blocks, 1);
  ASSERT_TRUE(cache_.EvictOne());
  EXPECT_FALSE(cache_.EvictOne());
  EXPECT_EQ(allocator_.free_blocks(), allocator_.total_blocks());
}

TEST_F(PrefixCacheTest, NeverEvictsWhatSomebodyHolds) {
  std::vector<BlockGroup> held = Compute(Iota(8));
  Compute(Iota(4, 50));
  EXPECT_FALSE(cache_.EvictUntil(allocator_, allocator_.total_blocks()));
  EXPECT_EQ(cache_.size(), 2);
  EXPECT_EQ(cache_.Match(Iota(8), kExact).blocks, 2);
  held.clear();
  EXPECT_TRUE(cache_.EvictUntil(allocator_, allocator_.total_blocks()));
  EXPECT_EQ(cache_.size(), 0);
}

TEST_F(PrefixCacheTest, EvictUntilStopsWhenThereIsEnough) {
  Compute(Iota(80));
  EXPECT_EQ(allocator_.free_blocks(), 0);
  EXPECT_TRUE(cache_.EvictUntil(allocator_, 4));  // two groups of three
  EXPECT_EQ(allocator_.free_blocks(), 6);
  EXPECT_EQ(cache_.Match(Iota(80), kExact).blocks, 18);
}

// Against a model that keeps all prefixes in plain lists: a match is a true prefix, eviction keeps trees
// whole.
TEST_F(PrefixCacheTest, RandomUseStaysSound) {
  for (uint32_t seed = 0; seed < 5; ++seed) {
    std::mt19937 random(seed);
    std::vector<std::vector<BlockGroup>> held;
    for (int i = 0; i < 2000; ++i) {
      std::vector<TokenId> tokens(random() % 20);
      for (TokenId& token : tokens) token = static_cast<TokenId>(random() % 2);
      const PrefixMatch match = cache_.Match(tokens, kExact);
      std::vector<BlockGroup> groups;
      cache_.Acquire(match, &groups);
      PrefixNode node = match.last;
      for (size_t b = groups.size(); (b + 1) * kBlockTokens <= tokens.size(); ++b) {
        if (!cache_.EvictUntil(allocator_, kGroupBlocks)) break;
        groups.push_back(*allocator_.Allocate(kGroupBlocks));
        const std::span<const TokenId> block = std::span(tokens).subspan(b * kBlockTokens, kBlockTokens);
        node = cache_.Insert(node, block, kExact, &groups.back());
        ASSERT_GE(cache_.Match(tokens, kExact).blocks, static_cast<int>(b + 1));
      }
      held.push_back(std::move(groups));
      if (held.size() > 3) held.erase(held.begin() + random() % held.size());
      std::vector<const BlockGroup*> handles;
      cache_.AppendHandles(&handles);
      for (const auto& sequence : held) {
        for (const BlockGroup& group : sequence) handles.push_back(&group);
      }
      ASSERT_EQ(cache_.Check(), absl::OkStatus());
      ASSERT_EQ(allocator_.Check(handles), absl::OkStatus());
    }
    held.clear();
    cache_.Clear();
    EXPECT_EQ(allocator_.free_blocks(), allocator_.total_blocks());
  }
}

}  // namespace
}  // namespace atp
