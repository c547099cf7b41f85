#include "engine/kv_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/block_table.h"
#include "kernels/backend_factory.h"

namespace atp {
namespace {

using ::testing::HasSubstr;

std::unique_ptr<Backend> Reference() {
  BackendOptions options;
  options.device = "reference";
  return MakeBackend(options).value();
}

KvCache::Shape SmallShape() {
  KvCache::Shape shape;
  shape.layers = 3;
  shape.kv_heads = 2;
  shape.head_dim = 8;
  return shape;
}

TEST(KvCache, FitsIntoItsBudget) {
  const std::unique_ptr<Backend> backend = Reference();
  const KvPage page(KvFormat::kF32, 16, 8, false);
  const absl::StatusOr<KvCache> cache = KvCache::Create(backend.get(), SmallShape(), 20 * page.bytes() - 1);
  ASSERT_TRUE(cache.ok()) << cache.status();
  EXPECT_EQ(cache->num_blocks(), 19);
  EXPECT_EQ(cache->block_bytes(), page.bytes());
  EXPECT_EQ(cache->token_capacity(), 19 / 6 * 16);
  EXPECT_EQ(cache->pool().block_bytes * kBlockParts, page.bytes());
  EXPECT_EQ(cache->pool().exact->entries(), 16);
}

TEST(KvCache, PoolPointsIntoTheCacheThatHoldsItAfterAMove) {
  const std::unique_ptr<Backend> backend = Reference();
  KvCache first = KvCache::Create(backend.get(), SmallShape(), 1 << 20).value();
  std::byte* const data = first.pool().data;
  const KvCache second = std::move(first);
  EXPECT_EQ(second.pool().data, data);
  EXPECT_EQ(second.pool().exact->bytes(), second.block_bytes());
}

TEST(KvCache, TooSmallABudgetSaysWhatToChange) {
  const std::unique_ptr<Backend> backend = Reference();
  const size_t bytes = KvPage(KvFormat::kF32, 16, 8, false).bytes();
  const absl::Status status = KvCache::Create(backend.get(), SmallShape(), 6 * bytes - 1).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("kv_cache.memory_bytes: expected at least " + std::to_string(6 * bytes)));
  EXPECT_THAT(std::string(status.message()), HasSubstr("raise kv_cache.memory_bytes"));
}

TEST(KvCache, RefusesOddBlocks) {
  const std::unique_ptr<Backend> backend = Reference();
  for (const int tokens : {0, -16, 8, 17}) {
    KvCache::Shape shape = SmallShape();
    shape.block_tokens = tokens;
    const absl::Status status = KvCache::Create(backend.get(), shape, 1 << 20).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr("expected a positive multiple of 16"));
  }
}

TEST(BlockTable, FillsAllHeadsAlike) {
  BlockTable table(2, 3);
  std::vector<BlockId> next = {0, 1, 2, 3, 4, 5};
  for (int block = 0; block < 40; ++block) {  // grows past every first capacity
    table.AppendExact(next);
    for (BlockId& id : next) id += 6;
  }
  EXPECT_EQ(table.exact_blocks(), 40);
  const BlockTable moved = std::move(table);
  for (int layer = 0; layer < 2; ++layer) {
    for (int head = 0; head < 3; ++head) {
      for (int block = 0; block < 40; ++block) {
        EXPECT_EQ(moved.Layer(layer)[head].exact[block], (block * 6 + layer * 3 + head) * kBlockParts);
      }
      EXPECT_EQ(moved.Layer(layer)[head].principal_entries, 0);
    }
  }
}

TEST(KvCache, BlocksAreLargeEnoughForPrincipalEntries) {
  const std::unique_ptr<Backend> backend = Reference();
  KvCache::Shape shape = SmallShape();
  shape.compressible = true;
  const KvCache cache = KvCache::Create(backend.get(), shape, 1 << 20).value();
  const KvPage principal(KvFormat::kF32, 16, 8, true);
  EXPECT_EQ(cache.block_bytes(), principal.bytes());
  EXPECT_LT(cache.pool().exact->bytes(), cache.block_bytes());
  EXPECT_EQ(cache.query_page().samples(), 64);
}

// Pages of one group share blocks: head 0 has a whole block and half of the next, head 2 the other half.
TEST(BlockTable, PrincipalGroupsAreAppendedSeenAndDropped) {
  BlockTable table(1, 3);
  const KvPage small(KvFormat::kF32, 16, 8, true), large(KvFormat::kInt8, 64, 8, true);
  for (const int head : {0, 1}) table.SetPrincipalPage(head, &small);
  table.SetPrincipalPage(2, &large);
  const std::vector<int32_t> blocks = {2, 0, 1}, places = {0, 12, 8};
  table.AppendPrincipal(std::vector<BlockId>{10, 11}, blocks, places);
  table.AppendPrincipal(std::vector<BlockId>{20, 25}, blocks, places);
  EXPECT_EQ(table.Layer(0)[0].principal_entries, 0);
  table.ShowPrincipal(blocks);
  table.ShowPrincipal(blocks);
  EXPECT_EQ(table.Layer(0)[0].principal_entries, 64);
  EXPECT_EQ(table.Layer(0)[1].principal_entries, 0);
  EXPECT_EQ(table.Layer(0)[2].principal_entries, 128);
  EXPECT_EQ(table.Layer(0)[0].principal[2], 20 * kBlockParts);
  EXPECT_EQ(table.Layer(0)[2].principal[0], 11 * kBlockParts);
  EXPECT_EQ(table.Layer(0)[2].principal[1], 25 * kBlockParts);
  table.DropPrincipal(blocks);
  EXPECT_EQ(table.Layer(0)[0].principal_entries, 32);
  EXPECT_EQ(table.Layer(0)[0].principal[0], 20 * kBlockParts);
  EXPECT_EQ(table.Layer(0)[0].principal[1], 25 * kBlockParts + 4);
  table.Clear();
  EXPECT_EQ(table.Layer(0)[0].principal_entries, 0);
  EXPECT_TRUE(table.principal(0).empty());
}

TEST(BlockTable, DropsExactBlocksFromTheFront) {
  BlockTable table(1, 2);
  for (BlockId id = 0; id < 10; id += 2) table.AppendExact(std::vector<BlockId>{id, id + 1});
  table.DropExact(3);
  EXPECT_EQ(table.exact_blocks(), 2);
  EXPECT_EQ(table.Layer(0)[0].exact[0], 6 * kBlockParts);
  EXPECT_EQ(table.Layer(0)[1].exact[1], 9 * kBlockParts);
}

TEST(BlockTable, ClearStartsOver) {
  BlockTable table(1, 2);
  table.AppendExact(std::vector<BlockId>{7, 8});
  table.Clear();
  EXPECT_EQ(table.exact_blocks(), 0);
  table.AppendExact(std::vector<BlockId>{1, 2});
  EXPECT_EQ(table.Layer(0)[0].exact[0], 1 * kBlockParts);
  EXPECT_EQ(table.Layer(0)[1].exact[0], 2 * kBlockParts);
}

}  // namespace
}  // namespace atp
