#include "engine/prefix_cache.h"

#include <algorithm>

#include "absl/base/macros.h"
#include "absl/hash/hash.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"

namespace atp {

PrefixCache::PrefixCache(int block_tokens, int64_t max_nodes)
    : block_tokens_(block_tokens), max_nodes_(static_cast<size_t>(max_nodes)) {
  nodes_.reserve(max_nodes);
  tokens_.reserve(static_cast<size_t>(max_nodes) * block_tokens);
  size_t buckets = 1;
  while (buckets < 2 * static_cast<size_t>(max_nodes)) buckets *= 2;
  buckets_.assign(buckets, -1);
}

size_t PrefixCache::Bucket(int32_t parent, std::span<const TokenId> tokens, CompressionKey key) const {
  // absl's hash differs from process to process, so nobody outside can aim at one bucket.
  return absl::HashOf(parent, key, absl::Span<const TokenId>(tokens.data(), tokens.size())) &
         (buckets_.size() - 1);
}

int32_t PrefixCache::Find(int32_t parent, std::span<const TokenId> tokens, CompressionKey key) const {
  int32_t slot = buckets_[Bucket(parent, tokens, key)];
  for (; slot >= 0; slot = nodes_[slot].next_in_bucket) {
    const std::span<const TokenId> known = Tokens(slot);
    if (nodes_[slot].parent == parent && nodes_[slot].key == key &&
        std::equal(tokens.begin(), tokens.end(), known.begin(), known.end())) {
      return slot;
    }
  }
  return -1;
}

// ---- looking for a prefix ----

CompressionKey PrefixCache::KeyOf(std::span<const TokenId> tokens, size_t block, const CompressionPlan* plan,
                                  int low_rank_segments) const {
  if (plan == nullptr) return kExactKey;
  const size_t first = block * static_cast<size_t>(block_tokens_);
  const auto segment = static_cast<size_t>(plan->segment_tokens());
  if (first < static_cast<size_t>(low_rank_segments) * segment)
    return plan->LowRankKey(tokens.subspan(first / segment * segment, segment));
  return first < static_cast<size_t>(plan->UntouchedTokens()) ? kExactKey : plan->id();
}

PrefixMatch PrefixCache::Match(std::span<const TokenId> tokens, const CompressionPlan* plan,
                               int fitted_segments, int low_rank_segments) const {
  path_.clear();
  size_t full = tokens.size() / static_cast<size_t>(block_tokens_);
  if (low_rank_segments > 0) {
    const size_t segment = static_cast<size_t>(plan->segment_tokens()), whole = tokens.size() / segment;
    if (whole < static_cast<size_t>(low_rank_segments)) full = whole * segment / block_tokens_;
  }
  while (path_.size() < full) {
    const size_t block = path_.size();
    const int32_t slot =
        Find(path_.empty() ? -1 : path_.back(), tokens.subspan(block * block_tokens_, block_tokens_),
             KeyOf(tokens, block, plan, low_rank_segments));
    if (slot < 0 || (fitted_segments == 0 && nodes_[slot].group.empty())) break;
    path_.push_back(slot);
  }
  PrefixMatch match;
  int blocks = static_cast<int>(path_.size());
  const int low_rank_blocks = low_rank_segments > 0 ? low_rank_segments * plan->blocks_per_segment() : 0;
  if (blocks < low_rank_blocks) blocks -= blocks % plan->blocks_per_segment();
  if (fitted_segments == 0) {
    match.blocks = blocks;
    path_.resize(blocks);
    for (const int32_t slot : path_) match.idle_blocks += IdleBlocks(slot);
  } else {
    const int per_segment = plan->blocks_per_segment();
    while (blocks > 0) {
      const int open = blocks % per_segment;
      if (open != 0 && blocks / per_segment < std::max(fitted_segments, low_rank_segments)) blocks -= open;
      if (blocks == 0 || Resumable(blocks, *plan, fitted_segments, &match)) break;
      --blocks;
    }
  }
  if (blocks > 0) match.last = {path_[blocks - 1], nodes_[path_[blocks - 1]].generation};
  return match;
}

// Whether everything is there that a sequence sees behind `blocks` blocks, or will see or compress later.
bool PrefixCache::Resumable(int blocks, const CompressionPlan& plan, int fitted_segments,
                            PrefixMatch* match) const {
  const int per_segment = plan.blocks_per_segment();
  const int visible = std::min(plan.VisibleSegments(blocks * block_tokens_), fitted_segments);
  PrefixMatch found;
  found.plan = &plan;
  found.blocks = blocks;
  found.first_block = visible * per_segment;
  found.first_segment = visible > 0 ? plan.StateBegin(visible - 1) : 0;
  found.end_segment = std::min(blocks / per_segment, fitted_segments);
  for (int block = blocks - 1; block >= found.first_block; --block) {
    if (nodes_[path_[block]].group.empty()) return false;
    found.idle_blocks += IdleBlocks(path_[block]);
  }
  for (int segment = found.first_segment; segment < found.end_segment; ++segment) {
    const int32_t slot = FindPrincipal(path_[(segment + 1) * per_segment - 1], plan.id());
    if (slot < 0) return false;
    found.idle_blocks += IdleBlocks(slot);
  }
  *match = found;
  return true;
}

int64_t PrefixCache::IdleBlocks(int32_t slot) const {
  const BlockGroup& group = nodes_[slot].group;
  return group.owners() == 1 ? static_cast<int64_t>(group.ids().size()) : 0;
}

void PrefixCache::Acquire(const PrefixMatch& match, std::vector<BlockGroup>* exact,
                          std::vector<BlockGroup>* principal) {
  if (match.blocks == 0) return;
  ABSL_ASSERT(Alive(match.last));
  const size_t first_exact = exact->size();
  const size_t first_principal = principal->size();
  exact->resize(first_exact + match.blocks - match.first_block);
  principal->resize(first_principal + match.end_segment - match.first_segment);
  ++clock_;
  const int per_segment = match.plan != nullptr ? match.plan->blocks_per_segment() : 1;
  int32_t slot = match.last.slot;
  for (int block = match.blocks - 1; block >= 0; --block, slot = nodes_[slot].parent) {
    const int segment = block / per_segment;
    if ((block + 1) % per_segment == 0 && segment >= match.first_segment && segment < match.end_segment) {
      const int32_t entries = FindPrincipal(slot, match.plan->id());
      ABSL_ASSERT(entries >= 0);
      (*principal)[first_principal + segment - match.first_segment] = nodes_[entries].group.Share();
      Touch(entries);
    }
    if (block >= match.first_block) {
      (*exact)[first_exact + block - match.first_block] = nodes_[slot].group.Share();
      Touch(slot);
    } else {
      nodes_[slot].covered = true;
      List(slot);
    }
  }
  ABSL_ASSERT(slot == -1);
}

// ---- what is known ----

int PrefixCache::Known(PrefixNode parent, std::span<const TokenId> tokens, CompressionKey key) const {
  int blocks = 0;
  for (int32_t slot = parent.slot; tokens.size() >= static_cast<size_t>(block_tokens_); ++blocks) {
    slot = Find(slot, tokens.first(block_tokens_), key);
    if (slot < 0) break;
    tokens = tokens.subspan(block_tokens_);
  }
  return blocks;
}

std::optional<PrefixNode> PrefixCache::Insert(PrefixNode parent, std::span<const TokenId> tokens,
                                              CompressionKey key, BlockGroup* group) {
  ABSL_ASSERT(tokens.empty() || static_cast<int>(tokens.size()) == block_tokens_);
  ABSL_ASSERT(parent.is_root() || Alive(parent));
  ++clock_;
  int32_t slot = Find(parent.slot, tokens, key);
  if (slot >= 0) {
    if (nodes_[slot].group.empty()) Attach(slot, group);
    Touch(slot);
    if (group->ids().data() != nodes_[slot].group.ids().data()) *group = nodes_[slot].group.Share();
    return PrefixNode{slot, nodes_[slot].generation};
  }
  slot = NewSlot();
  if (slot < 0) return std::nullopt;
  Node& node = nodes_[slot];
  node.used = true;
  node.principal = tokens.empty();
  node.covered = false;
  node.parent = parent.slot;
  node.depth = (parent.is_root() ? 0 : nodes_[parent.slot].depth) + (node.principal ? 0 : 1);
  node.children = 0;
  node.key = key;
  node.bucket = Bucket(parent.slot, tokens, key);
  node.next_in_bucket = buckets_[node.bucket];
  buckets_[node.bucket] = slot;
  std::copy(tokens.begin(), tokens.end(), tokens_.begin() + static_cast<ptrdiff_t>(slot) * block_tokens_);
  Attach(slot, group);
  if (parent.slot >= 0) {
    Node& above = nodes_[parent.slot];
    if (above.children++ == 0 && !above.covered) Unlist(parent.slot);
    above.last_use = above.listed ? above.last_use : clock_;
  }
  ++size_;
  return PrefixNode{slot, node.generation};
}

int32_t PrefixCache::NewSlot() {
  if (free_slot_ < 0 && nodes_.size() < max_nodes_) {
    nodes_.emplace_back();
    tokens_.resize(tokens_.size() + static_cast<size_t>(block_tokens_));
    return static_cast<int32_t>(nodes_.size()) - 1;
  }
  while (free_slot_ < 0 && EvictOne()) {
  }
  const int32_t slot = free_slot_;
  if (slot >= 0) free_slot_ = nodes_[slot].next_in_bucket;
  return slot;
}

void PrefixCache::Attach(int32_t slot, BlockGroup* group) {
  Node& node = nodes_[slot];
  node.group = group->Share();
  node.group.SetRetained(true);
  node.last_use = clock_;
  List(slot);
}

void PrefixCache::Cover(PrefixNode node, int behind, int blocks) {
  ABSL_ASSERT(Alive(node));
  ++clock_;
  int32_t slot = node.slot;
  for (; behind > 0; --behind) slot = nodes_[slot].parent;
  for (; blocks > 0; --blocks, slot = nodes_[slot].parent) {
    if (nodes_[slot].covered) continue;
    nodes_[slot].covered = true;
    if (!nodes_[slot].listed) nodes_[slot].last_use = clock_;
    List(slot);
  }
}

void PrefixCache::TouchPrincipal(PrefixNode node, const CompressionPlan& plan) {
  if (!Alive(node)) return;
  ++clock_;
  for (int32_t slot = node.slot; slot >= 0; slot = nodes_[slot].parent) {
    if (nodes_[slot].depth % plan.blocks_per_segment() != 0) continue;
    if (const int32_t entries = FindPrincipal(slot, plan.id()); entries >= 0) Touch(entries);
  }
}

// ---- eviction ----

bool PrefixCache::EvictOne() {
  // Who is held by somebody has been used just now: it goes to the end, so that no walk meets it again soon.
  ++clock_;
  for (int32_t slot = oldest_; slot >= 0 && nodes_[slot].last_use < clock_;) {
    const int32_t next = nodes_[slot].newer;
    if (nodes_[slot].group.owners() == 1) {
      Evict(slot);
      return true;
    }
    Touch(slot);
    slot = next >= 0 ? next : nodes_[slot].newer;
  }
  return false;
}

bool PrefixCache::EvictUntil(const BlockAllocator& allocator, int64_t blocks) {
  while (allocator.free_blocks() < blocks) {
    if (!EvictOne()) return false;
  }
  return true;
}

void PrefixCache::Clear() {
  while (oldest_ >= 0) Evict(oldest_);
}

void PrefixCache::Evict(int32_t slot) {
  Unlist(slot);
  nodes_[slot].group.SetRetained(false);
  nodes_[slot].group.Reset();
  while (slot >= 0 && nodes_[slot].children == 0 && nodes_[slot].group.empty()) {
    Node& node = nodes_[slot];
    int32_t* link = &buckets_[node.bucket];
    while (*link != slot) link = &nodes_[*link].next_in_bucket;
    *link = node.next_in_bucket;
    node.used = false;
    ++node.generation;
    node.next_in_bucket = free_slot_;
    free_slot_ = slot;
    --size_;
    slot = node.parent;
    if (slot >= 0) --nodes_[slot].children;
  }
  if (slot >= 0) List(slot);  // a leaf now, perhaps
}

void PrefixCache::List(int32_t slot) {
  Node& node = nodes_[slot];
  if (node.listed || node.group.empty() || (node.children > 0 && !node.covered)) return;
  // From the newest end when it is new, which is the rule; a parent that became a leaf belongs near the
  // oldest end.
  int32_t newer = -1;
  if (newest_ >= 0 && nodes_[newest_].last_use > node.last_use) {
    newer = oldest_;
    while (nodes_[newer].last_use < node.last_use) newer = nodes_[newer].newer;
  }
  const int32_t older = newer >= 0 ? nodes_[newer].older : newest_;
  node.newer = newer;
  node.older = older;
  (newer >= 0 ? nodes_[newer].older : newest_) = slot;
  (older >= 0 ? nodes_[older].newer : oldest_) = slot;
  node.listed = true;
}

void PrefixCache::Unlist(int32_t slot) {
  Node& node = nodes_[slot];
  if (!node.listed) return;
  (node.newer >= 0 ? nodes_[node.newer].older : newest_) = node.older;
  (node.older >= 0 ? nodes_[node.older].newer : oldest_) = node.newer;
  node.listed = false;
}

void PrefixCache::Touch(int32_t slot) {
  Unlist(slot);
  nodes_[slot].last_use = clock_;
  List(slot);
}

// ---- tests ----

void PrefixCache::AppendHandles(std::vector<const BlockGroup*>* handles) const {
  for (const Node& node : nodes_) {
    if (!node.group.empty()) handles->push_back(&node.group);
  }
}

absl::Status PrefixCache::Check() const {
  std::vector<int32_t> children(nodes_.size(), 0);
  int64_t size = 0;
  int64_t listed = 0;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    const Node& node = nodes_[i];
    if (!node.used) {
      if (!node.group.empty()) return absl::InternalError(absl::StrCat("free node ", i, " has a group"));
      continue;
    }
    ++size;
    const bool evictable = !node.group.empty() && (node.children == 0 || node.covered);
    if (node.listed != evictable) {
      return absl::InternalError(absl::StrCat("node ", i, " is ", node.listed ? "" : "not ", "listed"));
    }
    listed += node.listed;
    if (node.children == 0 && node.group.empty())
      return absl::InternalError(absl::StrCat("node ", i, " is good for nothing"));
    if (node.parent < 0) continue;
    if (!nodes_[node.parent].used) return absl::InternalError(absl::StrCat("node ", i, " has no parent"));
    ++children[node.parent];
  }
  for (size_t i = 0; i < nodes_.size(); ++i) {
    if (nodes_[i].used && nodes_[i].children != children[i]) {
      return absl::InternalError(
          absl::StrCat("node ", i, " counts ", nodes_[i].children, " children and has ", children[i]));
    }
  }
  uint64_t last_use = 0;
  for (int32_t slot = oldest_; slot >= 0; slot = nodes_[slot].newer, --listed) {
    if (!nodes_[slot].listed || nodes_[slot].last_use < last_use) {
      return absl::InternalError(
          absl::StrCat("node ", slot, " is out of place in the list of what can be evicted"));
    }
    last_use = nodes_[slot].last_use;
  }
  if (listed != 0 || size != size_) return absl::InternalError("the prefix cache lost count of its nodes");
  return absl::OkStatus();
}

}  // namespace atp
