#include "engine/scheduler.h"

#include <algorithm>

#include "absl/base/macros.h"
#include "absl/strings/str_cat.h"

namespace atp {
namespace {

constexpr int kNodesPerGroup = 4;  // where history is compressed

}  // namespace

Scheduler::Scheduler(const SchedulerOptions& options)
    : options_(options),
      // A decode step takes a row and a row of logits, so with no more sequences than these every one of them
      // has both.
      max_running_(std::max(
          1, std::min({options.max_running_sequences, options.max_batch_tokens, options.max_logit_rows}))),
      allocator_(options.num_blocks),
      // A group takes a block of every head at least. With compression there are nodes without a group, too:
      // of tokens that live on as principal entries.
      cache_(options.block_tokens, options.num_blocks /
                                       (static_cast<int64_t>(options.layers) * options.kv_heads) *
                                       (options.compressible ? kNodesPerGroup : 1)) {
  running_.reserve(max_running_ + 1);
}

int Scheduler::MaxNewTokens(int prompt_tokens, int max_tokens) const {
  return std::min(max_tokens, options_.max_positions - prompt_tokens);
}

absl::Status Scheduler::CheckFits(int prompt_tokens, int max_tokens, const CompressionPlan* plan) const {
  // A prompt that is only scored needs no position behind it.
  if (prompt_tokens > options_.max_positions - (max_tokens > 0 ? 1 : 0)) {
    return absl::InvalidArgumentError(
        absl::StrCat("the prompt has ", prompt_tokens, " tokens, but the model has ", options_.max_positions,
                     " positions: a prompt can have at most ", options_.max_positions - 1, " tokens"));
  }
  const int new_tokens = MaxNewTokens(prompt_tokens, max_tokens);
  const int total = prompt_tokens + new_tokens;
  const int fitted = plan != nullptr ? plan->FittedSegments(total - (new_tokens > 0 ? 1 : 0)) : 0;
  const int64_t needed = PeakBlocks(plan, fitted, 0, total);
  if (needed > options_.num_blocks) {
    const int64_t capacity = options_.num_blocks / group_blocks() * options_.block_tokens;
    return absl::InvalidArgumentError(absl::StrCat(
        "a prompt of ", prompt_tokens, " tokens and ", new_tokens, " new tokens need ", needed,
        " KV blocks, but the whole cache has ", options_.num_blocks, " (", capacity,
        " tokens): shorten the prompt, lower max_tokens, or raise kv_cache.memory_bytes"));
  }
  return absl::OkStatus();
}

absl::Status Scheduler::Admit(std::unique_ptr<Sequence> sequence) {
  if (sequence->prompt_tokens() == 0) return absl::InvalidArgumentError("the prompt is empty");
  const absl::Status fits =
      CheckFits(sequence->prompt_tokens(), sequence->max_new_tokens(), sequence->plan());
  if (!fits.ok()) return fits;
  sequence->arrival_ = ++arrivals_;
  next_deadline_ = std::min(next_deadline_, sequence->request().deadline);
  const Order order = OrderOf(*sequence);
  waiting_.emplace(order, std::move(sequence));
  return absl::OkStatus();
}

// ---- planning a step ----

const Batch& Scheduler::Schedule(absl::Time now) {
  batch_.Clear();
  ExpireDeadlines(now);
  for (const auto& s : running_) s->planned_rows_ = s->planned_logits_ = 0;
  tokens_left_ = options_.max_batch_tokens;
  logits_left_ = options_.max_logit_rows;
  first_preempted_.reset();
  PlanDecodes();
  PlanPrefillsAndAdmissions();
  BuildBatch();
  ABSL_ASSERT(empty() || !batch_.empty());
  return batch_;
}

void Scheduler::ExpireDeadlines(absl::Time now) {
  if (now < next_deadline_) return;
  next_deadline_ = absl::InfiniteFuture();
  for (size_t i = 0; i < running_.size();) {
    if (running_[i]->request().deadline <= now) {
      Finish(running_[i].get(), FinishReason::kDeadline);
    } else {
      next_deadline_ = std::min(next_deadline_, running_[i++]->request().deadline);
    }
  }
  for (auto it = waiting_.begin(); it != waiting_.end();) {
    if (it->second->request().deadline <= now) {
      MoveToFinished(std::move(it->second), FinishReason::kDeadline);
      it = waiting_.erase(it);
    } else {
      next_deadline_ = std::min(next_deadline_, it->second->request().deadline);
      ++it;
    }
  }
}

// Running streams go first: they take a row each and never stall behind somebody's long prompt.
void Scheduler::PlanDecodes() {
  // Planning may preempt, and always preempts at the end of running_, so the index stays right.
  for (size_t i = 0; i < running_.size(); ++i) {
    Sequence* s = running_[i].get();
    if (s->total_tokens() - s->position_ == 1) PlanRows(s);
  }
}

// Then, in order of service, prompts that are being computed and sequences that wait.
void Scheduler::PlanPrefillsAndAdmissions() {
  size_t next_running = 0;
  auto next_waiting = waiting_.begin();
  bool line_stands = false;  // who does not fit holds back those behind: nobody is overtaken for being large
  while (tokens_left_ > 0 || static_cast<int>(running_.size()) >= max_running_) {
    while (next_running < running_.size() && running_[next_running]->planned_rows_ > 0) ++next_running;
    Sequence* r = next_running < running_.size() ? running_[next_running].get() : nullptr;
    Sequence* w = !line_stands && next_waiting != waiting_.end() ? next_waiting->second.get() : nullptr;
    if (w != nullptr && (r == nullptr || Sequence::Before(*w, *r))) {
      const auto position = next_waiting++;
      if (!WaitsForSibling(*w)) line_stands = !TryAdmit(position);
    } else if (r != nullptr) {
      ++next_running;
      PlanRows(r);
    } else {
      return;
    }
  }
}

void Scheduler::BuildBatch() {
  for (const auto& owned : running_) {
    Sequence* s = owned.get();
    if (s->planned_rows_ == 0) continue;
    BatchEntry entry;
    entry.sequence = s;
    entry.table = s->table_.get();
    entry.first_row = batch_.rows();
    entry.rows = s->planned_rows_;
    entry.exact_entries = s->exact_entries_ + s->planned_rows_;
    entry.first_logit = static_cast<int>(batch_.logit_rows.size());
    entry.logits = s->planned_logits_;
    if (FitsOpenSegment(*s)) {
      entry.plan = s->plan();
      entry.closes_segment = ClosesSegment(*s, s->planned_rows_);
    }
    for (int i = 0; i < entry.rows; ++i) {
      batch_.tokens.push_back(s->token(s->position_ + i));
      batch_.positions.push_back(s->position_ + i);
    }
    for (int i = entry.rows - entry.logits; i < entry.rows; ++i)
      batch_.logit_rows.push_back(entry.first_row + i);
    batch_.entries.push_back(entry);
  }
}

// ---- running sequences ----

bool Scheduler::PlanRows(Sequence* s) {
  const int rows = ChunkRows(*s);
  if (rows <= 0) return true;  // this step has no room for it
  if (!EnsureBlocks(s, rows)) return false;
  // Preempting others can only have given back room, so `rows` still fits.
  s->planned_rows_ = rows;
  s->planned_logits_ = WantedLogits(*s, rows);
  tokens_left_ -= s->planned_rows_;
  logits_left_ -= s->planned_logits_;
  return true;
}

int Scheduler::ChunkRows(const Sequence& s) const {
  int rows = std::min(
      {s.total_tokens() - s.position_, tokens_left_, std::max(1, options_.max_prefill_chunk_tokens)});
  if (s.fitted_segments_ > 0) {  // what a row sees is the same all through a segment
    const int segment = s.plan_->segment_tokens();
    rows = std::min(rows, segment - s.position_ % segment);
  }
  if (s.scores_prompt() && s.scored_tokens_ < s.prompt_tokens()) {
    // Nothing is generated before the prompt is scored, so every row from scored_tokens_ on wants its logits.
    const int without_logits = std::max(0, s.scored_tokens_ - s.position_);
    return std::min(rows, without_logits + logits_left_);
  }
  if (logits_left_ == 0 && s.position_ + rows == s.total_tokens()) --rows;
  return rows;
}

int Scheduler::WantedLogits(const Sequence& s, int rows) const {
  const int end = s.position_ + rows;
  if (s.scores_prompt() && s.scored_tokens_ < s.prompt_tokens()) {
    return std::max(0, end - std::max(s.position_, s.scored_tokens_));
  }
  return end == s.total_tokens() ? 1 : 0;
}

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
    s->table_->AppendPrincipal(group->ids(), s->plan_->GroupBlocks(segment));
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

void Scheduler::Preempt(Sequence* s) {
  ++preemptions_;
  tokens_left_ += s->planned_rows_;
  logits_left_ += s->planned_logits_;
  s->planned_rows_ = s->planned_logits_ = 0;
  ReleaseBlocks(s);
  s->state_ = SequenceState::kWaiting;
  const Order order = OrderOf(*s);
  if (!first_preempted_ || order < *first_preempted_) first_preempted_ = order;
  waiting_.emplace(order, RemoveRunning(s));
}

// ---- waiting sequences ----

// The other answers of a request wait until its first one has computed the prompt, and then find it in the
// cache.
bool Scheduler::WaitsForSibling(const Sequence& s) const {
  if (s.index_ == 0 || !options_.prefix_cache || s.scores_prompt()) return false;
  // What of the prompt can be shared: all but its last token, in full blocks.
  const int shared = (s.prompt_tokens() - 1) / options_.block_tokens * options_.block_tokens;
  return std::any_of(running_.begin(), running_.end(),
                     [&](const auto& r) { return r->id_ == s.id_ && r->position_ < shared; });
}

bool Scheduler::TryAdmit(Waiting::iterator position) {
  Sequence* s = position->second.get();
  // Who has just made room, or comes behind somebody who has, does not take it back.
  if (first_preempted_ && *first_preempted_ <= OrderOf(*s)) return false;
  if (!MakeRoom(*s)) return false;
  const PrefixMatch match = MatchPrefix(*s);
  const int matched_tokens = match.blocks * options_.block_tokens;
  s->position_ = matched_tokens;
  if (ChunkRows(*s) <= 0) {
    s->position_ = 0;
    return false;
  }
  if (!s->was_running_) {
    s->was_running_ = true;
    s->cached_tokens_ = std::min(matched_tokens, s->prompt_tokens());
    prefix_hits_tokens_ += s->cached_tokens_;
    if (options_.prefix_cache && !s->scores_prompt()) prefix_queries_tokens_ += s->prompt_tokens();
    s->generated_.reserve(s->max_new_tokens_);
  }
  if (s->table_ == nullptr) s->table_ = std::make_unique<BlockTable>(options_.layers, options_.kv_heads);
  cache_.Acquire(match, &s->groups_, &s->principal_);
  s->exact_entries_ = (match.blocks - match.first_block) * options_.block_tokens;
  s->first_principal_ = match.first_segment;
  s->closed_segments_ = match.end_segment;
  s->visible_segments_ = match.plan != nullptr ? match.first_block / match.plan->blocks_per_segment() : 0;
  RebuildTable(s);
  s->cache_node_ = match.last;
  s->indexed_blocks_ = match.blocks;
  s->state_ = SequenceState::kRunning;

  std::unique_ptr<Sequence> owned = std::move(position->second);
  waiting_.erase(position);
  const auto place = std::upper_bound(running_.begin(), running_.end(), owned,
                                      [](const auto& a, const auto& b) { return Sequence::Before(*a, *b); });
  running_.insert(place, std::move(owned));
  return PlanRows(s);
}

// Whether there is a place and there are blocks for all tokens of `s` and the next one, after preempting
// sequences that come behind it in the order of service, where that helps: of lower classes, or younger ones
// that overtook it while it waited for its sibling.
bool Scheduler::MakeRoom(const Sequence& s) {
  const auto behind = [&s](const Sequence& r) { return Sequence::Before(s, r); };
  const auto full = [this] { return static_cast<int>(running_.size()) >= max_running_; };
  if (full() && !behind(*running_.back())) return false;
  int64_t reclaimable = 0;  // at most: shared groups count more than once
  for (const auto& r : running_) {
    if (!behind(*r)) continue;
    reclaimable += r->held_blocks() + BlocksStillWanted(*r);
  }
  if (BlocksShort(s) > reclaimable) return false;
  while (!running_.empty() && behind(*running_.back()) && (full() || BlocksShort(s) > 0)) {
    Preempt(running_.back().get());
  }
  return !full() && BlocksShort(s) <= 0;
}

PrefixMatch Scheduler::MatchPrefix(const Sequence& s) const {
  if (!options_.prefix_cache || s.scores_prompt()) return {};
  // All but the last token: at least one must be computed, for its logits.
  if (s.generated_.empty()) {
    return cache_.Match(s.prompt().first(s.prompt_tokens() - 1), s.plan(), s.fitted_segments_);
  }
  tokens_scratch_.assign(s.prompt().begin(), s.prompt().end());
  tokens_scratch_.insert(tokens_scratch_.end(), s.generated_.begin(), s.generated_.end() - 1);
  return cache_.Match(tokens_scratch_, s.plan(), s.fitted_segments_);
}

// How many blocks are lacking to admit `s`, counting what the running ones will still take for their prompts
// and one block more each, so that who is admitted is not preempted at once. Positive: too few.
int64_t Scheduler::BlocksShort(const Sequence& s) const {
  const PrefixMatch match = MatchPrefix(s);
  const int tokens = std::min(s.total_tokens() + 1, s.max_total_tokens());
  int64_t needed = PeakBlocks(s.plan(), s.fitted_segments_, match.blocks * options_.block_tokens, tokens);
  int64_t found = static_cast<int64_t>(match.blocks - match.first_block) * group_blocks();
  for (int segment = match.first_segment; segment < match.end_segment; ++segment)
    found += match.plan->TotalGroupBlocks(segment);
  needed -= found;
  for (const auto& r : running_) needed += BlocksStillWanted(*r);
  return needed - (allocator_.free_blocks() + allocator_.idle_blocks() - match.idle_blocks);
}

int64_t Scheduler::BlocksStillWanted(const Sequence& running) const {
  const int tokens = std::min(running.total_tokens() + options_.block_tokens, running.max_total_tokens());
  const int64_t peak = PeakBlocks(running.plan(), running.fitted_segments_, running.position_, tokens);
  const int64_t held = running.fitted_segments_ > 0
                           ? running.held_blocks()
                           : static_cast<int64_t>(running.groups_.size()) * group_blocks();
  return std::max<int64_t>(0, peak - held);
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
    s->table_->ShowPrincipal(plan.GroupBlocks(s->visible_segments_), options_.block_tokens);
  const int first = plan.StateBegin(visible - 1);
  for (; s->first_principal_ < first; ++s->first_principal_) {
    s->table_->DropPrincipal(plan.GroupBlocks(s->first_principal_), options_.block_tokens);
    s->principal_.erase(s->principal_.begin());
  }
}

// ---- after a step ----

void Scheduler::Commit(const Batch& batch, std::span<const TokenId> tokens) {
  ABSL_ASSERT(tokens.size() == batch.entries.size());
  for (size_t i = 0; i < batch.entries.size(); ++i) {
    Sequence* s = batch.entries[i].sequence;
    s->position_ += batch.entries[i].rows;
    s->exact_entries_ += batch.entries[i].rows;
    s->planned_rows_ = s->planned_logits_ = 0;
    if (s->scores_prompt()) {
      s->scored_tokens_ = std::max(s->scored_tokens_, std::min(s->position_, s->prompt_tokens()));
    }
    if (batch.entries[i].closes_segment) {
      ++s->closed_segments_;
      ++segments_closed_;
      tokens_closed_ += static_cast<uint64_t>(s->plan_->segment_tokens());
    }
    if (options_.prefix_cache) IndexFullBlocks(s);
    if (s->fitted_segments_ > 0) AdvanceWindow(s);
    if (s->position_ == s->total_tokens()) s->generated_.push_back(tokens[i]);
  }
}

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
    const std::span<const int32_t> blocks = s->plan_->GroupBlocks(segment);
    s->table_->AppendPrincipal(s->principal_[i].ids(), blocks);
    if (segment < s->visible_segments_) s->table_->ShowPrincipal(blocks, options_.block_tokens);
  }
}

// ---- endings ----

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

std::unique_ptr<Sequence> Scheduler::RemoveRunning(Sequence* s) {
  const auto it = std::find_if(running_.begin(), running_.end(), [s](const auto& r) { return r.get() == s; });
  ABSL_ASSERT(it != running_.end());
  std::unique_ptr<Sequence> owned = std::move(*it);
  running_.erase(it);
  return owned;
}

void Scheduler::MoveToFinished(std::unique_ptr<Sequence> s, FinishReason reason) {
  ReleaseBlocks(s.get());
  s->state_ = SequenceState::kFinished;
  s->finish_reason_ = reason;
  finished_.push_back(std::move(s));
}

void Scheduler::Finish(Sequence* sequence, FinishReason reason) {
  if (sequence->state_ == SequenceState::kFinished) return;
  if (sequence->state_ == SequenceState::kRunning) {
    MoveToFinished(RemoveRunning(sequence), reason);
    return;
  }
  const auto it = waiting_.find(OrderOf(*sequence));
  ABSL_ASSERT(it != waiting_.end() && it->second.get() == sequence);
  MoveToFinished(std::move(it->second), reason);
  waiting_.erase(it);
}

void Scheduler::Cancel(RequestId id) {
  for (size_t i = running_.size(); i-- > 0;) {
    if (running_[i]->id_ == id) Finish(running_[i].get(), FinishReason::kCancelled);
  }
  for (auto it = waiting_.begin(); it != waiting_.end();) {
    const auto position = it++;
    if (position->second->id_ == id) Finish(position->second.get(), FinishReason::kCancelled);
  }
}

void Scheduler::FinishRunning(FinishReason reason) {
  while (!running_.empty()) Finish(running_.back().get(), reason);
}

void Scheduler::FinishAll(FinishReason reason) {
  FinishRunning(reason);
  while (!waiting_.empty()) Finish(waiting_.begin()->second.get(), reason);
}

void Scheduler::DropPrefixCache() {
  ABSL_ASSERT(running_.empty());
  cache_.Clear();
}

std::vector<std::unique_ptr<Sequence>> Scheduler::TakeFinished() { return std::exchange(finished_, {}); }

// ---- looking ----

SchedulerStats Scheduler::stats() const {
  SchedulerStats stats;
  stats.running = static_cast<int>(running_.size());
  stats.waiting = static_cast<int>(waiting_.size());
  stats.blocks_total = allocator_.total_blocks();
  stats.blocks_cached = allocator_.idle_blocks();
  stats.blocks_used = allocator_.total_blocks() - allocator_.free_blocks() - allocator_.idle_blocks();
  stats.preemptions = preemptions_;
  stats.prefix_queries_tokens = prefix_queries_tokens_;
  stats.prefix_hits_tokens = prefix_hits_tokens_;
  stats.segments_closed = segments_closed_;
  stats.tokens_closed = tokens_closed_;
  for (const auto& s : running_) {
    const int64_t exact = static_cast<int64_t>(s->groups_.size()) * group_blocks();
    const int64_t queries = static_cast<int64_t>(s->queries_.ids().size());
    const int64_t principal = s->fitted_segments_ > 0 ? s->held_blocks() - exact - queries : 0;
    stats.exact_blocks += exact;
    stats.query_blocks += queries;
    stats.principal_blocks += principal;
    stats.exact_entries += static_cast<int64_t>(s->exact_entries_) * group_blocks();
    if (s->visible_segments_ == 0) continue;
    for (int k = s->first_principal_; k < s->visible_segments_; ++k)
      stats.principal_entries += s->plan_->TotalGroupEntries(k);
    const int tokens = s->visible_segments_ * s->plan_->segment_tokens();
    stats.tokens_compressed += tokens;
    stats.blocks_saved += static_cast<int64_t>(Groups(tokens)) * group_blocks() - principal;
  }
  return stats;
}

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
      const std::span<const int32_t> blocks = plan.GroupBlocks(segment);
      int offset = 0;
      for (int before = 0; before < head; ++before) offset += blocks[before];
      for (int b = 0; b < blocks[head]; ++b) expected.push_back(s.principal_[g].ids()[offset + b]);
      if (segment < s.visible_segments_) seen += blocks[head] * options_.block_tokens;
    }
    const std::span<const BlockId> blocks = s.table_->principal(head);
    if (!std::equal(blocks.begin(), blocks.end(), expected.begin(), expected.end()))
      return fail("table has other principal blocks than the groups");
    const KvHeadBlocks& view = s.table_->Layer(head / options_.kv_heads)[head % options_.kv_heads];
    if (view.principal_entries != seen) return fail("sees the wrong number of principal entries");
    if (seen > 0 && view.principal != blocks.data()) return fail("sees principal entries elsewhere");
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
        if (blocks.exact[g] != s.groups_[g].ids()[head])
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
