#include "engine/principal_compactor.h"

#include <cstddef>

#include "absl/base/macros.h"
#include "engine/block_table.h"
#include "engine/compression_plan.h"

namespace atp {

PrincipalCompactor::PrincipalCompactor(int layers, int heads, int kv_heads)
    : layers_(layers), heads_(heads), kv_heads_(kv_heads) {}

void PrincipalCompactor::Begin(const Batch& batch) {
  samples_.clear();
  closings_.clear();
  for (const BatchEntry& entry : batch.entries) {
    if (entry.plan == nullptr) continue;
    const int segment_tokens = entry.plan->segment_tokens();
    const int first = batch.positions[entry.first_row];
    for (int i = 0; i < entry.rows; ++i) {
      const int sample = entry.plan->SampleAt(first % segment_tokens + i);
      if (sample >= 0) samples_.push_back({&entry, entry.first_row + i, sample});
    }
    if (entry.closes_segment) closings_.push_back({&entry, first / segment_tokens});
  }
  jobs_.clear();
  reports_.clear();
}

std::span<const QuerySampleRow> PrincipalCompactor::Queries(int layer) {
  rows_.clear();
  for (const Sample& s : samples_) {
    const BlockId* blocks = s.entry->table->queries().data() +
                            static_cast<size_t>(layer) * s.entry->plan->query_blocks_per_layer();
    rows_.push_back({s.row, s.sample, blocks});
  }
  return rows_;
}

std::span<const PrincipalFitJob> PrincipalCompactor::Jobs() {
  jobs_.clear();
  positions_.clear();
  // jobs_ points into it.
  positions_.reserve(closings_.size() * static_cast<size_t>(layers_ * heads_ * kPrincipalSamples));
  for (const Closing& closing : closings_) {
    for (int head = 0; head < layers_ * kv_heads_; ++head) {
      if (closing.entry->plan->GroupPages(closing.segment)[head] > 0) AddJob(closing, head);
    }
  }
  reports_.assign(jobs_.size(), {});
  return jobs_;
}

void PrincipalCompactor::AddJob(const Closing& c, int head) {
  const CompressionPlan& plan = *c.entry->plan;
  const BlockTable& table = *c.entry->table;
  const int layer = head / kv_heads_, group = heads_ / kv_heads_, first = head % kv_heads_ * group;
  const size_t per_layer = static_cast<size_t>(plan.query_blocks_per_layer()), per_head = per_layer / heads_;
  PrincipalFitJob job;
  // The group of the closing segment is the last one in the table, and the state before it ends there.
  const std::span<const BlockId> principal = table.principal(head);
  job.out = principal.data() + principal.size() - plan.GroupPages(c.segment)[head];
  job.count = plan.GroupEntries(c.segment)[head];
  job.page = plan.Page(head);
  if (plan.Replaces(c.segment)) {
    const int state = plan.StatePages(c.segment - 1, head);
    job.principal = job.out - state;
    job.principal_entries = state * plan.Page(head)->entries();
  }
  // The segment's tokens are the last ones that its sequence holds.
  const int before = c.entry->exact_entries - plan.segment_tokens();
  job.exact = table.exact(head).data() + before / plan.block_tokens();
  job.exact_entries = plan.segment_tokens();
  job.queries = table.queries().data() + layer * per_layer + first * per_head;
  job.positions = positions_.data() + positions_.size();
  job.samples = plan.samples();
  job.forced = plan.ForcedEntries(c.segment);
  for (int query_head = first; query_head < first + group; ++query_head) {
    for (int sample = 0; sample < plan.samples(); ++sample)
      positions_.push_back(plan.ReferencePosition(layer, query_head, c.segment, sample));
  }
  jobs_.push_back(job);
}

}  // namespace atp
