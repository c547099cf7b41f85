// The scheduler's blocks: what running sequences take, give back and leave behind in the prefix cache.
#include <algorithm>

#include "absl/base/macros.h"
#include "engine/scheduler.h"

namespace atp {

// ---- taking ----

// Takes blocks until `s` can compute `rows` tokens; preempts from the end of the order while there are none.
// False when the end of the order was `s` itself.
bool Scheduler::EnsureBlocks(Sequence* s, int rows) {
  while (!TakeBlocks(s, rows)) {
    Sequence* victim = running_.back().get();
    Preempt(victim);
    if (victim == s) return false;
  }
  return true;
}

// Exact blocks for the rows; where their segment will be compressed, blocks for its queries; and where it is
// whole with them, blocks for its principal entries. Keeps what it has got when it returns false.
bool Scheduler::TakeBlocks(Sequence* s, int rows) {
  while (static_cast<int>(s->groups_.size()) < Groups(s->exact_entries_ + rows)) {
    std::optional<BlockGroup> group = AllocateGroup(group_blocks());
    if (!group) return false;
    s->table_->AppendExact(group->ids());
    s->groups_.push_back(*std::move(group));
  }
  if (!FitsOpenSegment(*s)) return true;
  if (s->queries_.empty()) {
    std::optional<BlockGroup> group = AllocateGroup(s->plan_->query_blocks());
    if (!group) return false;
    s->table_->SetQueries(group->ids());
    s->queries_ = *std::move(group);
  }
  const int segment = s->closed_segments_;
  const int held_to = s->first_principal_ + static_cast<int>(s->principal_.size());
  if (ClosesSegment(*s, rows) && held_to == segment) {
    std::optional<BlockGroup> group = AllocateGroup(s->plan_->TotalGroupBlocks(segment));
    if (!group) return false;
    s->table_->AppendPrincipal(group->ids(), s->plan_->GroupPages(segment), s->plan_->GroupPlaces(segment));
    s->principal_.push_back(*std::move(group));
  }
  return true;
}

std::optional<BlockGroup> Scheduler::AllocateGroup(int blocks) {
  // Evicting is of no use when it cannot give a whole group.
  if (allocator_.free_blocks() + allocator_.idle_blocks() < blocks) return std::nullopt;
  if (!cache_.EvictUntil(allocator_, blocks)) return std::nullopt;
  return allocator_.Allocate(blocks);
}

// ---- compression ----

// The most blocks that a sequence holds at once while it computes its tokens [from, to).
int64_t Scheduler::PeakBlocks(const CompressionPlan* plan, int fitted_segments, int from, int to) const {
  if (fitted_segments > 0) return plan->PeakBlocks(from, to, fitted_segments);
  return static_cast<int64_t>(Groups(to)) * group_blocks();
}

// Whether the tokens that `s` computes next belong to a segment that it will see compressed.
bool Scheduler::FitsOpenSegment(const Sequence& s) const { return s.closed_segments_ < s.fitted_segments_; }

bool Scheduler::ClosesSegment(const Sequence& s, int rows) const {
  return (s.position_ + rows) % s.plan_->segment_tokens() == 0;
}

// Goes on behind the segments that the next token sees compressed: their exact blocks are free in this very
// step, and so are principal groups that a later one has replaced.
void Scheduler::AdvanceWindow(Sequence* s) {
  const CompressionPlan& plan = *s->plan_;
  const int visible = std::min(plan.VisibleSegments(s->position_), s->fitted_segments_);
  if (s->closed_segments_ == s->fitted_segments_ && !s->queries_.empty()) {
    s->queries_.Reset();
    s->table_->SetQueries({});
  }
  if (visible == s->visible_segments_) return;
  const int segments = visible - s->visible_segments_;
  const int blocks = segments * plan.blocks_per_segment();
  if (options_.prefix_cache && s->indexed_blocks_ > s->visible_segments_ * plan.blocks_per_segment()) {
    // The indexed ones among them; where indexing ended early, those behind are not in the cache.
    const int end = std::min(s->indexed_blocks_, visible * plan.blocks_per_segment());
    cache_.Cover(s->cache_node_, s->indexed_blocks_ - end,
                 end - s->visible_segments_ * plan.blocks_per_segment());
  }
  s->groups_.erase(s->groups_.begin(), s->groups_.begin() + blocks);
  s->table_->DropExact(blocks);
  s->exact_entries_ -= segments * plan.segment_tokens();
  for (; s->visible_segments_ < visible; ++s->visible_segments_)
    s->table_->ShowPrincipal(plan.GroupPages(s->visible_segments_));
  const int first = plan.StateBegin(visible - 1);
  for (; s->first_principal_ < first; ++s->first_principal_) {
    s->table_->DropPrincipal(plan.GroupPages(s->first_principal_));
    s->principal_.erase(s->principal_.begin());
  }
}

// ---- the prefix cache ----

void Scheduler::IndexFullBlocks(Sequence* s) {
  const CompressionPlan* plan = s->fitted_segments_ > 0 ? s->plan() : nullptr;
  const int per_segment = plan != nullptr ? plan->blocks_per_segment() : 0;
  const int full = s->position_ / options_.block_tokens;
  bool replaced = false;
  const auto keep = [&](const std::optional<PrefixNode>& node, const BlockGroup& group, BlockId before) {
    s->indexing_ = node.has_value();
    replaced |= group.ids().front() != before;
  };
  while (s->indexing_ && s->indexed_blocks_ < full) {
    const int first = s->indexed_blocks_ * options_.block_tokens;
    const bool untouched = plan == nullptr || first < plan->UntouchedTokens();
    tokens_scratch_.clear();
    for (int i = 0; i < options_.block_tokens; ++i) tokens_scratch_.push_back(s->token(first + i));
    BlockGroup& group = s->groups_[s->indexed_blocks_ - s->visible_segments_ * per_segment];
    const BlockId before = group.ids().front();
    const std::optional<PrefixNode> node =
        cache_.Insert(s->cache_node_, tokens_scratch_, untouched ? kExactKey : plan->id(), &group);
    keep(node, group, before);
    if (!node) break;
    s->cache_node_ = *node;
    ++s->indexed_blocks_;
    if (plan == nullptr || s->indexed_blocks_ % per_segment != 0) continue;
    const int segment = s->indexed_blocks_ / per_segment - 1;
    if (segment >= s->closed_segments_) continue;
    BlockGroup& principal = s->principal_[segment - s->first_principal_];
    const BlockId principal_before = principal.ids().front();
    keep(cache_.InsertPrincipal(*node, plan->id(), &principal), principal, principal_before);
  }
  if (replaced) RebuildTable(s);
}

void Scheduler::RebuildTable(Sequence* s) {
  s->table_->Clear();
  for (const BlockGroup& group : s->groups_) s->table_->AppendExact(group.ids());
  s->table_->SetQueries(s->queries_.ids());
  for (size_t i = 0; i < s->principal_.size(); ++i) {
    const int segment = s->first_principal_ + static_cast<int>(i);
    const std::span<const int32_t> pages = s->plan_->GroupPages(segment);
    s->table_->AppendPrincipal(s->principal_[i].ids(), pages, s->plan_->GroupPlaces(segment));
    if (segment < s->visible_segments_) s->table_->ShowPrincipal(pages);
  }
}

// ---- giving back ----

void Scheduler::ReleaseBlocks(Sequence* s) {
  if (!s->principal_.empty()) cache_.TouchPrincipal(s->cache_node_, *s->plan_);
  s->groups_.clear();
  s->principal_.clear();
  s->queries_.Reset();
  s->visible_segments_ = s->closed_segments_ = s->first_principal_ = 0;
  if (s->table_ != nullptr) s->table_->Clear();
  s->position_ = s->exact_entries_ = 0;
  s->cache_node_ = PrefixNode();
  s->indexed_blocks_ = 0;
  s->indexing_ = true;
}

}  // namespace atp
