// Scheduler::CheckInvariants: every rule of engine/README.md that can be seen between two steps.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "engine/scheduler.h"

namespace atp {

absl::Status Scheduler::CheckCompression(const Sequence& s) const {
  const auto fail = [&s](const char* what) {
    return absl::InternalError(absl::StrCat("sequence ", s.id(), "/", s.index(), ": ", what));
  };
  if (s.fitted_segments_ == 0) {
    if (!s.principal_.empty() || !s.queries_.empty()) return fail("is exact and pays for compression");
    return absl::OkStatus();
  }
  const CompressionPlan& plan = *s.plan_;
  if (s.visible_segments_ != std::min(plan.VisibleSegments(s.position_), s.fitted_segments_))
    return fail("sees other segments compressed than its position says");
  const int closed = std::min(s.position_ / plan.segment_tokens(), s.fitted_segments_);
  const int held_to = s.first_principal_ + static_cast<int>(s.principal_.size());
  if (s.closed_segments_ != closed) return fail("has fitted other segments than its position says");
  if (held_to != closed && held_to != closed + 1) return fail("holds the wrong principal groups");
  if (s.first_principal_ != (s.visible_segments_ > 0 ? plan.StateBegin(s.visible_segments_ - 1) : 0))
    return fail("holds principal groups that were replaced");
  if (!s.queries_.empty() && closed == s.fitted_segments_) return fail("keeps queries for nothing");
  for (int head = 0; head < group_blocks(); ++head) {
    std::vector<BlockId> expected;
    int seen = 0;
    for (size_t g = 0; g < s.principal_.size(); ++g) {
      const int segment = s.first_principal_ + static_cast<int>(g);
      const std::span<const int32_t> pages = plan.GroupPages(segment);
      int offset = 0;
      for (int before = 0; before < head; ++before) offset += pages[before];
      for (int p = 0; p < pages[head]; ++p)
        expected.push_back(PageId(s.principal_[g].ids(), plan.GroupPlaces(segment)[offset + p]));
      if (segment < s.visible_segments_) seen += pages[head] * plan.Page(head)->entries();
    }
    const std::span<const BlockId> pages = s.table_->principal(head);
    if (!std::equal(pages.begin(), pages.end(), expected.begin(), expected.end()))
      return fail("table has other principal pages than the groups");
    const KvHeadBlocks& view = s.table_->Layer(head / options_.kv_heads)[head % options_.kv_heads];
    if (view.principal_entries != seen) return fail("sees the wrong number of principal entries");
    if (seen > 0 && view.principal != pages.data()) return fail("sees principal entries elsewhere");
  }
  return absl::OkStatus();
}

absl::Status Scheduler::CheckInvariants() const {
  std::vector<const BlockGroup*> handles;
  cache_.AppendHandles(&handles);
  const auto fail = [](const Sequence& s, const char* what) {
    return absl::InternalError(absl::StrCat("sequence ", s.id(), "/", s.index(), ": ", what));
  };
  for (size_t i = 0; i < running_.size(); ++i) {
    const Sequence& s = *running_[i];
    if (s.state_ != SequenceState::kRunning) return fail(s, "runs in another state");
    if (i > 0 && !Sequence::Before(*running_[i - 1], s)) return fail(s, "is out of order");
    if (s.position_ > s.total_tokens()) return fail(s, "has computed more than its tokens");
    if (static_cast<int>(s.groups_.size()) < Groups(s.exact_entries_)) return fail(s, "has too few blocks");
    if (s.table_->exact_blocks() != static_cast<int>(s.groups_.size()))
      return fail(s, "table and groups disagree");
    for (size_t g = 0; g < s.groups_.size(); ++g) {
      handles.push_back(&s.groups_[g]);
      for (int head = 0; head < group_blocks(); ++head) {
        const KvHeadBlocks& blocks = s.table_->Layer(head / options_.kv_heads)[head % options_.kv_heads];
        if (blocks.exact[g] != s.groups_[g].ids()[head] * kBlockParts)
          return fail(s, "table has another block than the group");
      }
    }
    if (s.position_ - s.exact_entries_ !=
        (s.plan_ != nullptr ? s.visible_segments_ * s.plan_->segment_tokens() : 0))
      return fail(s, "position and entries disagree");
    for (const BlockGroup& group : s.principal_) handles.push_back(&group);
    if (!s.queries_.empty()) handles.push_back(&s.queries_);
    if (absl::Status status = CheckCompression(s); !status.ok()) return status;
  }
  if (static_cast<int>(running_.size()) > max_running_) return absl::InternalError("too many run");
  for (const auto& [order, s] : waiting_) {
    if (s->state_ != SequenceState::kWaiting) return fail(*s, "waits in another state");
    if (s->held_blocks() != 0) return fail(*s, "waits and holds blocks");
  }
  for (const auto& s : finished_) {
    if (s->held_blocks() != 0) return fail(*s, "has finished and holds blocks");
  }
  if (absl::Status status = cache_.Check(); !status.ok()) return status;
  return allocator_.Check(handles);
}

}  // namespace atp
