#include "engine/block_allocator.h"

#include <gtest/gtest.h>

#include <optional>
#include <set>
#include <utility>
#include <vector>

namespace atp {
namespace {

TEST(BlockAllocatorTest, GivesAllOrNothing) {
  BlockAllocator allocator(10);
  std::optional<BlockGroup> a = allocator.Allocate(6);
  ASSERT_TRUE(a);
  EXPECT_EQ(a->ids().size(), 6u);
  EXPECT_EQ(allocator.free_blocks(), 4);
  EXPECT_FALSE(allocator.Allocate(5));
  EXPECT_EQ(allocator.free_blocks(), 4);  // the refusal took nothing
  std::optional<BlockGroup> b = allocator.Allocate(4);
  ASSERT_TRUE(b);
  std::set<BlockId> ids(a->ids().begin(), a->ids().end());
  ids.insert(b->ids().begin(), b->ids().end());
  EXPECT_EQ(ids.size(), 10u);
  EXPECT_EQ(*ids.begin(), 0);
  EXPECT_EQ(*ids.rbegin(), 9);
}

TEST(BlockAllocatorTest, FreesWithTheLastOwner) {
  BlockAllocator allocator(4);
  BlockGroup a = *allocator.Allocate(3);
  EXPECT_EQ(a.owners(), 1);
  BlockGroup b = a.Share();
  EXPECT_EQ(a.owners(), 2);
  EXPECT_EQ(std::vector<BlockId>(a.ids().begin(), a.ids().end()),
            std::vector<BlockId>(b.ids().begin(), b.ids().end()));
  a.Reset();
  EXPECT_TRUE(a.empty());
  EXPECT_EQ(a.owners(), 0);
  EXPECT_TRUE(a.ids().empty());
  EXPECT_EQ(allocator.free_blocks(), 1);
  BlockGroup c = std::move(b);
  EXPECT_EQ(c.owners(), 1);
  c = BlockGroup();
  EXPECT_EQ(allocator.free_blocks(), 4);
}

TEST(BlockAllocatorTest, AssignmentReleasesWhatWasHeld) {
  BlockAllocator allocator(4);
  BlockGroup a = *allocator.Allocate(1);
  a = *allocator.Allocate(2);
  EXPECT_EQ(allocator.free_blocks(), 2);
  a = a.Share();
  EXPECT_EQ(a.owners(), 1);
}

TEST(BlockAllocatorTest, GroupsOfUnevenSizesLiveSideBySide) {
  BlockAllocator allocator(100);
  std::vector<BlockGroup> groups;
  for (int count : {1, 7, 24, 3}) groups.push_back(*allocator.Allocate(count));
  std::vector<const BlockGroup*> handles;
  for (const BlockGroup& group : groups) handles.push_back(&group);
  EXPECT_EQ(allocator.free_blocks(), 65);
  EXPECT_TRUE(allocator.Check(handles).ok());
  groups.erase(groups.begin() + 1);
  EXPECT_EQ(allocator.free_blocks(), 72);
}

TEST(BlockAllocatorTest, RetainedGroupsAreIdleWhileTheirKeeperIsAlone) {
  BlockAllocator allocator(10);
  BlockGroup kept = *allocator.Allocate(4);
  kept.SetRetained(true);
  EXPECT_EQ(allocator.idle_blocks(), 4);
  BlockGroup user = kept.Share();
  EXPECT_EQ(allocator.idle_blocks(), 0);
  user.Reset();
  EXPECT_EQ(allocator.idle_blocks(), 4);
  kept.SetRetained(false);
  EXPECT_EQ(allocator.idle_blocks(), 0);
  EXPECT_EQ(allocator.free_blocks(), 6);
}

TEST(BlockAllocatorTest, CheckFindsOwnersThatNobodyNamed) {
  BlockAllocator allocator(10);
  BlockGroup a = *allocator.Allocate(2);
  BlockGroup b = a.Share();
  const BlockGroup* both[] = {&a, &b};
  EXPECT_TRUE(allocator.Check(both).ok());
  const BlockGroup* one[] = {&a};
  EXPECT_FALSE(allocator.Check(one).ok());  // as a leaked share would look
  const BlockGroup* twice[] = {&a, &b, &b};
  EXPECT_FALSE(allocator.Check(twice).ok());  // as a lost one would
}

}  // namespace
}  // namespace atp
