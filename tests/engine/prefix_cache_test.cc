#include "engine/prefix_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <span>
#include <vector>

namespace atp {
namespace {

constexpr int kBlockTokens = 4;
constexpr int kGroupBlocks = 3;

std::vector<TokenId> Iota(int count, TokenId first = 0) {
  std::vector<TokenId> tokens(count);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

class PrefixCacheTest : public testing::Test {
 protected:
  // Computes `tokens` as a sequence would: takes a group per full block and indexes it. Returns the groups.
  std::vector<BlockGroup> Compute(std::span<const TokenId> tokens, const CompressionKey& key = kExactKey) {
    std::vector<BlockGroup> groups;
    PrefixNode node;
    for (size_t i = 0; i + kBlockTokens <= tokens.size(); i += kBlockTokens) {
      groups.push_back(*allocator_.Allocate(kGroupBlocks));
      node = *cache_.Insert(node, tokens.subspan(i, kBlockTokens), key, &groups.back());
    }
    return groups;
  }
  // Segments of 8 tokens and a window of 8; a group takes one block of each of the kGroupBlocks heads.
  static std::shared_ptr<const CompressionPlan> Plan(double ratio, int window = 8, int cap = 0) {
    CompressionSettings settings;
    settings.ratio = ratio;
    settings.segment_tokens = 8;
    settings.window_tokens = window;
    settings.sink_tokens = 1;
    settings.max_principal_keys = cap;
    return *MakeCompressionPlan(settings, {kGroupBlocks, 1, 1, 2, kBlockTokens, KvFormat::kF32, 1, 1000});
  }
  // The same with a plan: every segment that is whole gets a principal group, which principal_ holds.
  std::vector<BlockGroup> Compute(std::span<const TokenId> tokens, const CompressionPlan& plan) {
    std::vector<BlockGroup> groups;
    PrefixNode node;
    for (int i = 0; i + kBlockTokens <= static_cast<int>(tokens.size()); i += kBlockTokens) {
      groups.push_back(*allocator_.Allocate(kGroupBlocks));
      const CompressionKey key = i < plan.UntouchedTokens() ? kExactKey : plan.id();
      node = *cache_.Insert(node, tokens.subspan(i, kBlockTokens), key, &groups.back());
      if ((i + kBlockTokens) % plan.segment_tokens() != 0) continue;
      principal_.push_back(*allocator_.Allocate(plan.TotalGroupBlocks(i / plan.segment_tokens())));
      EXPECT_TRUE(cache_.InsertPrincipal(node, plan.id(), &principal_.back()));
    }
    last_ = node;
    return groups;
  }
  void ExpectSound(std::span<const BlockGroup> held = {}) {
    std::vector<const BlockGroup*> handles;
    cache_.AppendHandles(&handles);
    for (const BlockGroup& group : held) handles.push_back(&group);
    for (const BlockGroup& group : principal_) handles.push_back(&group);
    EXPECT_EQ(cache_.Check(), absl::OkStatus());
    EXPECT_EQ(allocator_.Check(handles), absl::OkStatus());
  }

  BlockAllocator allocator_{20 * kGroupBlocks};
  PrefixCache cache_{kBlockTokens, 20};
  PrefixNode last_;                    // of the last Compute with a plan
  std::vector<BlockGroup> principal_;  // of Compute and Acquire with a plan
};

TEST_F(PrefixCacheTest, FindsTheLongestChainOfFullBlocks) {
  const std::vector<TokenId> tokens = Iota(14);
  std::vector<BlockGroup> groups = Compute(tokens);
  ASSERT_EQ(groups.size(), 3u);
  EXPECT_EQ(cache_.Match(tokens).blocks, 3);
  EXPECT_EQ(cache_.Match(Iota(11)).blocks, 2);
  EXPECT_EQ(cache_.Match(Iota(3)).blocks, 0);
  std::vector<TokenId> other = tokens;
  other[5] = 99;
  EXPECT_EQ(cache_.Match(other).blocks, 1);
  // The same block of tokens behind another history is another block.
  EXPECT_EQ(cache_.Match(Iota(4, 4)).blocks, 0);
  ExpectSound(groups);
}

TEST_F(PrefixCacheTest, AcquireSharesTheGroupsInOrder) {
  const std::vector<TokenId> tokens = Iota(12);
  std::vector<BlockGroup> computed = Compute(tokens);
  std::vector<BlockId> ids;
  for (const BlockGroup& group : computed) ids.push_back(group.ids()[0]);
  computed.clear();
  const PrefixMatch match = cache_.Match(tokens);
  EXPECT_EQ(match.idle_blocks, 3 * kGroupBlocks);
  std::vector<BlockGroup> groups;
  cache_.Acquire(match, &groups, &principal_);
  ASSERT_EQ(groups.size(), 3u);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(groups[i].ids()[0], ids[i]);
  EXPECT_EQ(allocator_.idle_blocks(), 0);
  EXPECT_EQ(cache_.Match(tokens).idle_blocks, 0);
  ExpectSound(groups);
}

TEST_F(PrefixCacheTest, OtherSettingsNeverShare) {
  const std::shared_ptr<const CompressionPlan> half = Plan(0.5), third = Plan(0.3);
  ASSERT_NE(half->id(), third->id());
  ASSERT_EQ(half->UntouchedTokens(), 16);  // a segment of 8 tokens behind a window of 8
  std::vector<BlockGroup> held = Compute(Iota(32), *half);
  EXPECT_EQ(cache_.Match(Iota(32), half.get(), 3).blocks, 8);
  // The first tokens see nothing compressed, so their exact blocks are everybody's; the rest is not.
  EXPECT_EQ(cache_.Match(Iota(32)).blocks, 4);
  EXPECT_EQ(cache_.Match(Iota(16), third.get(), 0).blocks, 4);
  EXPECT_EQ(cache_.Match(Iota(32), third.get(), 3).blocks, 0);  // it needs its own principal entries of them
  principal_.clear();
  ExpectSound(held);
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
  cache_.Acquire(cache_.Match(Iota(8)), &groups, &principal_);  // a is used after b
  groups.clear();
  ASSERT_TRUE(cache_.EvictOne());
  EXPECT_EQ(cache_.Match(Iota(8, 100)).blocks, 1);  // the end of b went, its beginning stays
  ASSERT_TRUE(cache_.EvictOne());
  EXPECT_EQ(cache_.Match(Iota(8, 100)).blocks, 0);
  EXPECT_EQ(cache_.Match(Iota(8)).blocks, 2);
  ASSERT_TRUE(cache_.EvictOne());
  EXPECT_EQ(cache_.Match(Iota(8)).blocks, 1);
  ASSERT_TRUE(cache_.EvictOne());
  EXPECT_FALSE(cache_.EvictOne());
  EXPECT_EQ(allocator_.free_blocks(), allocator_.total_blocks());
}

TEST_F(PrefixCacheTest, NeverEvictsWhatSomebodyHolds) {
  std::vector<BlockGroup> held = Compute(Iota(8));
  Compute(Iota(4, 50));
  EXPECT_FALSE(cache_.EvictUntil(allocator_, allocator_.total_blocks()));
  EXPECT_EQ(cache_.size(), 2);
  EXPECT_EQ(cache_.Match(Iota(8)).blocks, 2);
  held.clear();
  EXPECT_TRUE(cache_.EvictUntil(allocator_, allocator_.total_blocks()));
  EXPECT_EQ(cache_.size(), 0);
}

TEST_F(PrefixCacheTest, EvictUntilStopsWhenThereIsEnough) {
  Compute(Iota(80));
  EXPECT_EQ(allocator_.free_blocks(), 0);
  EXPECT_TRUE(cache_.EvictUntil(allocator_, 4));  // two groups of three
  EXPECT_EQ(allocator_.free_blocks(), 6);
  EXPECT_EQ(cache_.Match(Iota(80)).blocks, 18);
}

// ---- with compression: segments of two blocks ----

TEST_F(PrefixCacheTest, AMatchNeedsTheWindowAndTheHistory) {
  const std::shared_ptr<const CompressionPlan> plan = Plan(0.5);
  std::vector<BlockGroup> computed = Compute(Iota(32), *plan);
  const PrefixMatch match = cache_.Match(Iota(35), plan.get(), 3);
  EXPECT_EQ(match.blocks, 8);
  EXPECT_EQ(match.first_block, 6);  // token 32 sees the segments that end by 24
  EXPECT_EQ(match.first_segment, 0);
  EXPECT_EQ(match.end_segment, 3);  // it will never see the fourth
  std::vector<BlockGroup> exact, principal;
  cache_.Acquire(match, &exact, &principal);
  ASSERT_EQ(exact.size(), 2u);
  EXPECT_EQ(exact[0].ids()[0], computed[6].ids()[0]);
  EXPECT_EQ(exact[1].ids()[0], computed[7].ids()[0]);
  ASSERT_EQ(principal.size(), 3u);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(principal[i].ids()[0], principal_[i].ids()[0]);

  // What it goes on without can be evicted while it runs.
  computed.clear();
  EXPECT_EQ(allocator_.idle_blocks(), 6 * kGroupBlocks);
  EXPECT_TRUE(cache_.EvictUntil(allocator_, allocator_.free_blocks() + 6 * kGroupBlocks));
  EXPECT_EQ(allocator_.idle_blocks(), 0);
}

TEST_F(PrefixCacheTest, ASequenceThatWillFitTheOpenSegmentGoesOnFromItsBeginning) {
  const std::shared_ptr<const CompressionPlan> plan = Plan(0.5);
  const std::vector<BlockGroup> computed = Compute(Iota(28), *plan);  // three segments and a half
  EXPECT_EQ(cache_.Match(Iota(28), plan.get(), 4).blocks, 6);
  EXPECT_EQ(cache_.Match(Iota(28), plan.get(), 3).blocks, 7);
}

TEST_F(PrefixCacheTest, CoveredBlocksGoFromTheMiddleAndNobodyMissesThem) {
  const std::shared_ptr<const CompressionPlan> plan = Plan(0.5);
  std::vector<BlockGroup> groups = Compute(Iota(32), *plan);
  const int64_t nodes = cache_.size();
  cache_.Cover(last_, 2, 6);  // as its sequence does when it goes on from token 32
  groups.erase(groups.begin(), groups.begin() + 6);
  ExpectSound(groups);
  EXPECT_EQ(allocator_.idle_blocks(), 6 * kGroupBlocks);
  for (int i = 0; i < 6; ++i) EXPECT_TRUE(cache_.EvictOne());
  EXPECT_FALSE(cache_.EvictOne()) << "the rest is in use";
  EXPECT_EQ(cache_.size(), nodes);
  ExpectSound(groups);
  EXPECT_EQ(cache_.Match(Iota(33), plan.get(), 3).blocks, 8);
  EXPECT_EQ(cache_.Match(Iota(33)).blocks, 0) << "exact attention needs every block";

  // Somebody computes the beginning again, exactly: it is known again.
  std::vector<BlockGroup> again = Compute(Iota(8));
  EXPECT_EQ(cache_.size(), nodes);
  EXPECT_EQ(cache_.Match(Iota(33)).blocks, 2);
  again.clear();
  groups.clear();
  principal_.clear();
  EXPECT_TRUE(cache_.EvictUntil(allocator_, allocator_.total_blocks()));
  EXPECT_EQ(cache_.size(), 0);
}

TEST_F(PrefixCacheTest, WithoutItsHistoryASequenceGoesOnEarlier) {
  const std::shared_ptr<const CompressionPlan> plan = Plan(0.5, /*window=*/0);
  std::vector<BlockGroup> groups = Compute(Iota(24), *plan);
  const PrefixMatch whole = cache_.Match(Iota(25), plan.get(), 3);
  EXPECT_EQ(whole.blocks, 6);
  EXPECT_EQ(whole.first_block, 6);
  EXPECT_EQ(whole.idle_blocks, 0);
  principal_.pop_back();
  ASSERT_TRUE(cache_.EvictOne()) << "the last principal group";
  const PrefixMatch less = cache_.Match(Iota(25), plan.get(), 3);
  EXPECT_EQ(less.blocks, 4);
  EXPECT_EQ(less.end_segment, 2);
  EXPECT_EQ(cache_.Match(Iota(24), plan.get(), 2).blocks, 6) << "who never sees it does not need it";
}

TEST_F(PrefixCacheTest, WithACapOnlyTheNewestHistoryIsNeeded) {
  const std::shared_ptr<const CompressionPlan> plan = Plan(0.5, /*window=*/0, /*cap=*/4);
  ASSERT_TRUE(plan->Replaces(1));
  std::vector<BlockGroup> groups = Compute(Iota(24), *plan);
  const PrefixMatch match = cache_.Match(Iota(25), plan.get(), 3);
  EXPECT_EQ(match.blocks, 6);
  EXPECT_EQ(match.first_segment, 2);
  EXPECT_EQ(match.end_segment, 3);
}

TEST_F(PrefixCacheTest, FirstPrincipalGroupsOutliveLaterOnes) {
  const std::shared_ptr<const CompressionPlan> plan = Plan(0.5, /*window=*/0);
  std::vector<BlockGroup> groups = Compute(Iota(24), *plan);
  cache_.Cover(last_, 0, 6);
  cache_.TouchPrincipal(last_, *plan);
  groups.clear();
  principal_.clear();
  for (int i = 0; i < 6; ++i) EXPECT_TRUE(cache_.EvictOne());
  EXPECT_EQ(cache_.Match(Iota(25), plan.get(), 3).blocks, 6) << "the exact blocks went first";
  EXPECT_TRUE(cache_.EvictOne());
  EXPECT_EQ(cache_.Match(Iota(25), plan.get(), 3).blocks, 4);
}

TEST_F(PrefixCacheTest, WithoutRoomForNodesThereIsNoNewOne) {
  PrefixCache small(kBlockTokens, 2);
  BlockGroup a = *allocator_.Allocate(1), b = *allocator_.Allocate(1), c = *allocator_.Allocate(1);
  const std::vector<TokenId> tokens = Iota(12);
  const auto block = [&](int i) { return std::span(tokens).subspan(i * kBlockTokens, kBlockTokens); };
  const PrefixNode first = *small.Insert({}, block(0), kExactKey, &a);
  const PrefixNode second = *small.Insert(first, block(1), kExactKey, &b);
  EXPECT_FALSE(small.Insert(second, block(2), kExactKey, &c));
  b.Reset();
  EXPECT_TRUE(small.Insert(first, block(2), kExactKey, &c)) << "takes the place of one that nobody holds";
  EXPECT_EQ(small.Check(), absl::OkStatus());
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
      const PrefixMatch match = cache_.Match(tokens);
      std::vector<BlockGroup> groups;
      cache_.Acquire(match, &groups, &principal_);
      PrefixNode node = match.last;
      for (size_t b = groups.size(); (b + 1) * kBlockTokens <= tokens.size(); ++b) {
        if (!cache_.EvictUntil(allocator_, kGroupBlocks)) break;
        groups.push_back(*allocator_.Allocate(kGroupBlocks));
        const std::span<const TokenId> block = std::span(tokens).subspan(b * kBlockTokens, kBlockTokens);
        node = *cache_.Insert(node, block, kExactKey, &groups.back());
        ASSERT_GE(cache_.Match(tokens).blocks, static_cast<int>(b + 1));
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
