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
  reports_.clear();
  first_report_.clear();
  for (int head = 0; head < layers_ * kv_heads_; ++head) {
    if (head % kv_heads_ == 0) first_report_.push_back(reports_.size());
    for (const Closing& c : closings_)
      if (c.entry->plan->GroupEntries(c.segment)[head] > 0) reports_.emplace_back();
  }
  first_report_.push_back(reports_.size());
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

std::span<const PrincipalFitJob> PrincipalCompactor::Jobs(int layer) {
  jobs_.clear();
  positions_.clear();
  if (closings_.empty()) return jobs_;
  positions_.reserve(closings_.size() * heads_ * kPrincipalSamples);  // jobs_ points into it
  const int group = heads_ / kv_heads_;
  for (const Closing& c : closings_) {
    const CompressionPlan& plan = *c.entry->plan;
    const BlockTable& table = *c.entry->table;
    const BlockId* queries =
        table.queries().data() + static_cast<size_t>(layer) * plan.query_blocks_per_layer();
    for (int kv_head = 0; kv_head < kv_heads_; ++kv_head) {
      const int head = layer * kv_heads_ + kv_head;
      const int pages = plan.GroupPages(c.segment)[head];
      if (pages == 0) continue;  // nothing is kept
      PrincipalFitJob job;
      // The group of the closing segment is the last one in the table, and the state before it ends there.
      const std::span<const BlockId> principal = table.principal(head);
      job.out = principal.data() + principal.size() - pages;
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
      job.queries = queries + kv_head * group * (plan.query_blocks_per_layer() / heads_);
      job.positions = positions_.data() + positions_.size();
      job.samples = plan.samples();
      job.forced = plan.ForcedEntries(c.segment);
      for (int g = 0; g < group; ++g) {
        for (int sample = 0; sample < plan.samples(); ++sample)
          positions_.push_back(plan.ReferencePosition(layer, kv_head * group + g, c.segment, sample));
      }
      jobs_.push_back(job);
    }
  }
  return jobs_;
}

std::span<PrincipalFitReport> PrincipalCompactor::Reports(int layer) {
  return std::span(reports_).subspan(first_report_[layer], first_report_[layer + 1] - first_report_[layer]);
}

}  // namespace atp
