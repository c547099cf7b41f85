#include "engine/scheduler.h"

#include <algorithm>

#include "absl/base/macros.h"
#include "absl/strings/str_cat.h"

namespace atp {
namespace {

// Where history is compressed, mostly to no less than a sixteenth of its bytes.
constexpr int kNodesPerGroup = 16;

// A decode step takes a row and a row of logits, so with no more sequences than these every one of them has
// both.
int MaxRunning(const SchedulerOptions& options) {
  return std::max(
      1, std::min({options.max_running_sequences, options.max_batch_tokens, options.max_logit_rows}));
}

}  // namespace

Scheduler::Scheduler(const SchedulerOptions& options)
    : options_(options),
      max_running_(MaxRunning(options)),
      allocator_(options.num_blocks),
      // A group takes a block of every head at least. With compression there are nodes without a group, too:
      // of tokens that live on as principal entries.
      cache_(options.block_tokens, options.num_blocks /
                                       (static_cast<int64_t>(options.layers) * options.kv_heads) *
                                       (options.compressible ? kNodesPerGroup : 1)) {
  running_.reserve(max_running_ + 1);
}

int Scheduler::LongestSegment(const SchedulerOptions& options) {
  return std::min(options.max_prefill_chunk_tokens, options.max_batch_tokens - MaxRunning(options) + 1);
}

int Scheduler::LongestScoredSegment(const SchedulerOptions& options) {
  return std::min(LongestSegment(options), options.max_logit_rows - MaxRunning(options) + 1);
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
    return absl::InvalidArgumentError(
        absl::StrCat("a prompt of ", prompt_tokens, " tokens and ", new_tokens, " new tokens need ", needed,
                     " KV blocks, but the whole cache has ", options_.num_blocks, " (", capacity,
                     " tokens): shorten the prompt, lower max_tokens, or raise kv_cache.memory_bytes"));
  }
  return absl::OkStatus();
}

int Scheduler::LargestFit(int prompt_tokens, const CompressionPlan* plan) const {
  const int room = std::max(0, options_.max_positions - prompt_tokens);
  const auto fits = [&](int tokens) { return CheckFits(prompt_tokens, tokens, plan).ok(); };
  if (room < 2 || fits(room) || !fits(1)) return room;
  int some = 1, none = room;  // the first fits, the second does not
  while (none - some > 1) {
    const int middle = some + (none - some) / 2;
    (fits(middle) ? some : none) = middle;
  }
  return some;
}

absl::Status Scheduler::Admit(std::unique_ptr<Sequence> sequence) {
  if (sequence->prompt_tokens() == 0) return absl::InvalidArgumentError("the prompt is empty");
  const absl::Status fits =
      CheckFits(sequence->prompt_tokens(), sequence->max_new_tokens(), sequence->plan());
  if (!fits.ok()) return fits;
  sequence->arrival_ = ++arrivals_;
  ABSL_ASSERT(sequence->low_rank_segments_ == 0 ||
              sequence->plan()->segment_tokens() <= LongestSegment(options_));
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
    if (IsLowRank(*s, s->position_)) entry.low_rank = s->plan();
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
  if (IsLowRank(s, s.position_)) {  // a whole segment, or it waits for a step that has room for one
    const int segment = s.plan_->segment_tokens();
    return segment <= tokens_left_ && WantedLogits(s, segment) <= logits_left_ ? segment : 0;
  }
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
  int shared = (s.prompt_tokens() - 1) / options_.block_tokens * options_.block_tokens;
  // Of a segment that is fitted or of low rank, all or nothing.
  if (s.plan() != nullptr) {
    const int segment = s.plan()->segment_tokens(), whole = shared / segment;
    if (whole < std::max(s.fitted_segments_, s.low_rank_segments())) shared = whole * segment;
  }
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
  if (s->table_ == nullptr) {
    s->table_ = std::make_unique<BlockTable>(options_.layers, options_.kv_heads);
    for (int head = 0; s->plan() != nullptr && s->plan()->compresses() && head < group_blocks(); ++head)
      s->table_->SetPrincipalPage(head, s->plan()->Page(head));
  }
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
    return cache_.Match(s.prompt().first(s.prompt_tokens() - 1), s.plan(), s.fitted_segments_,
                        s.low_rank_segments_);
  }
  tokens_scratch_.assign(s.prompt().begin(), s.prompt().end());
  tokens_scratch_.insert(tokens_scratch_.end(), s.generated_.begin(), s.generated_.end() - 1);
  return cache_.Match(tokens_scratch_, s.plan(), s.fitted_segments_, s.low_rank_segments_);
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

// ---- endings ----

std::unique_ptr<Sequence> Scheduler::RemoveRunning(Sequence* s) {
  const auto it = std::find_if(running_.begin(), running_.end(), [s](const auto& r) { return r.get() == s; });
  ABSL_ASSERT(it != running_.end());
  std::unique_ptr<Sequence> owned = std::move(*it);
  running_.erase(it);
  return owned;
}

void Scheduler::MoveToFinished(std::unique_ptr<Sequence> s, FinishReason reason) {
  s->held_ = Held(*s);
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

Sequence::Held Scheduler::Held(const Sequence& s) const {
  Sequence::Held held;
  held.tokens = s.position_;
  held.blocks = s.held_blocks();
  held.entries = static_cast<int64_t>(s.exact_entries_) * group_blocks();
  if (s.visible_segments_ == 0) return held;
  held.compressed_tokens = s.visible_segments_ * s.plan_->segment_tokens();
  for (int k = s.first_principal_; k < s.visible_segments_; ++k)
    held.entries += s.plan_->TotalGroupEntries(k);
  return held;
}

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
  for (auto it = running_.begin(); it != running_.end(); ++it) {
    const auto& s = *it;
    // Of several answers to a request the first one counts.
    const auto same = [&](const auto& other) { return &other->request() == &s->request(); };
    if (s->request().sampling.n == 1 || std::none_of(running_.begin(), it, same)) ++stats.running_requests;
    const int64_t exact = static_cast<int64_t>(s->groups_.size()) * group_blocks();
    const int64_t queries = static_cast<int64_t>(s->queries_.ids().size());
    const int64_t principal = s->fitted_segments_ > 0 ? s->held_blocks() - exact - queries : 0;
    stats.exact_blocks += exact;
    stats.query_blocks += queries;
    stats.principal_blocks += principal;
    const Sequence::Held held = Held(*s);
    const int64_t exact_entries = static_cast<int64_t>(s->exact_entries_) * group_blocks();
    stats.exact_entries += exact_entries;
    if (held.compressed_tokens == 0) continue;
    stats.principal_entries += held.entries - exact_entries;
    stats.tokens_compressed += held.compressed_tokens;
    stats.blocks_saved += static_cast<int64_t>(Groups(held.compressed_tokens)) * group_blocks() - principal;
  }
  return stats;
}

}  // namespace atp
