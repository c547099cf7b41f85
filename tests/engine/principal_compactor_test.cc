#include "engine/principal_compactor.h"

#include <cstdint>
#include <memory>
#include <numeric>
#include <span>
#include <vector>

#include "engine/block_table.h"
#include "engine/compression_plan.h"
#include "gtest/gtest.h"

namespace atp {
namespace {

// Two layers of two kv heads and a query head each; one head of each layer keeps the sinks only.
std::shared_ptr<const CompressionPlan> Plan() {
  CompressionShape shape;
  shape.layers = 2;
  shape.heads = shape.kv_heads = 2;
  shape.head_dim = 8;
  shape.max_positions = 256;
  CompressionSettings settings;
  settings.segment_tokens = 32;
  settings.window_tokens = 0;
  settings.head_ratio = {0, 0.5, 1, 0};
  return MakeCompressionPlan(settings, shape).value();
}

// `count` times the same sequence, whose tokens are 32 of a segment that closes.
Batch Closing(const CompressionPlan& plan, const BlockTable& table, int segment, int exact_entries,
              size_t count) {
  Batch batch;
  for (int i = 0; i < 32; ++i) batch.positions.push_back(segment * 32 + i);
  batch.tokens.assign(32, 0);
  BatchEntry entry;
  entry.table = &table;
  entry.rows = 32;
  entry.exact_entries = exact_entries;
  entry.plan = &plan;
  entry.closes_segment = true;
  batch.entries.assign(count, entry);
  return batch;
}

// Heads that keep nothing of a segment are not fitted; those that are, each have a report of their own.
TEST(PrincipalCompactor, JobsAreOfHeadsThatKeepSomething) {
  const auto plan = Plan();
  PrincipalCompactor compactor(2, 2, 2);
  for (const int segment : {0, 1, 5}) {
    BlockTable table(2, 2);
    std::vector<BlockId> ids(64);
    std::iota(ids.begin(), ids.end(), 0);
    for (int head = 0; head < 4; ++head) table.SetPrincipalPage(head, plan->Page(head));
    for (int block = 0; block < 2; ++block) table.AppendExact({ids.data() + 4 * block, 4});
    table.AppendPrincipal(ids, plan->GroupPages(segment), plan->GroupPlaces(segment));
    table.SetQueries(ids);
    const Batch batch = Closing(*plan, table, segment, 32, 2);
    compactor.Begin(batch);
    const std::vector<int> kept = segment == 0 ? std::vector<int>{4, 16, 32, 4} : std::vector<int>{16, 32};
    const std::span<const PrincipalFitJob> jobs = compactor.Jobs();
    ASSERT_EQ(jobs.size(), 2 * kept.size()) << "segment " << segment;
    for (size_t i = 0; i < jobs.size(); ++i) EXPECT_EQ(jobs[i].count, kept[i % kept.size()]);
    EXPECT_EQ(compactor.reports().size(), jobs.size());
  }
}

// With a cap, what the history has become so far is fitted again together with the segment that closes.
TEST(PrincipalCompactor, AReplacedStateIsFittedAgain) {
  CompressionShape shape;
  shape.layers = 2;
  shape.heads = 4;
  shape.kv_heads = 2;
  shape.head_dim = 8;
  shape.max_positions = 1024;
  CompressionSettings settings;
  settings.segment_tokens = 32;
  settings.window_tokens = 32;
  settings.ratio = 0.5;
  settings.max_principal_keys = 32;
  const auto plan = MakeCompressionPlan(settings, shape).value();
  int segment = 1;
  while (!plan->Replaces(segment)) ++segment;
  ASSERT_LT(segment, 10);
  PrincipalCompactor compactor(shape.layers, shape.heads, shape.kv_heads);
  BlockTable table(shape.layers, shape.kv_heads);
  std::vector<BlockId> ids(400);
  std::iota(ids.begin(), ids.end(), 0);
  const BlockId* next = ids.data();
  for (int head = 0; head < 4; ++head) table.SetPrincipalPage(head, plan->Page(head));
  for (int block = 0; block < 4; ++block, next += 4)
    table.AppendExact({next, 4});  // the window and the segment
  for (int k = plan->StateBegin(segment - 1); k <= segment; ++k, next += 40)
    table.AppendPrincipal({next, 40}, plan->GroupPages(k), plan->GroupPlaces(k));
  table.SetQueries({next, 100});
  const Batch batch = Closing(*plan, table, segment, 64, 1);
  compactor.Begin(batch);
  const std::span<const PrincipalFitJob> jobs = compactor.Jobs();
  ASSERT_EQ(jobs.size(), 4u);
  const int per_head = plan->query_blocks_per_layer() / shape.heads;
  for (int head = 0; head < 4; ++head) {
    const PrincipalFitJob& job = jobs[static_cast<size_t>(head)];
    const int layer = head / 2, state = plan->StatePages(segment - 1, head);
    ASSERT_GT(state, 0);
    EXPECT_EQ(job.principal, table.principal(head).data());
    EXPECT_EQ(job.principal_entries, state * plan->Page(head)->entries());
    EXPECT_EQ(job.out, job.principal + state);
    EXPECT_EQ(job.count, plan->GroupEntries(segment)[static_cast<size_t>(head)]);
    EXPECT_EQ(job.exact, table.exact(head).data() + 2);  // behind the window
    EXPECT_EQ(job.exact_entries, 32);
    EXPECT_EQ(job.queries,
              table.queries().data() + layer * plan->query_blocks_per_layer() + head % 2 * 2 * per_head);
    EXPECT_EQ(job.positions[0], plan->ReferencePosition(layer, head % 2 * 2, segment, 0));
    EXPECT_EQ(job.positions[job.samples], plan->ReferencePosition(layer, head % 2 * 2 + 1, segment, 0));
  }
}

}  // namespace
}  // namespace atp
