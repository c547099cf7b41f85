#include "engine/prefix_cache.h"

#include <algorithm>

#include "absl/base/macros.h"
#include "absl/hash/hash.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"

namespace atp {

PrefixCache::PrefixCache(int block_tokens, int64_t max_groups) : block_tokens_(block_tokens) {
  nodes_.resize(max_groups);
  tokens_.resize(static_cast<size_t>(max_groups) * block_tokens);
  for (int64_t slot = max_groups - 1; slot >= 0; --slot) {
    nodes_[slot].next_in_bucket = free_slot_;
    free_slot_ = static_cast<int32_t>(slot);
  }
  size_t buckets = 1;
  while (buckets < 2 * static_cast<size_t>(max_groups)) buckets *= 2;
  buckets_.assign(buckets, -1);
}

size_t PrefixCache::Bucket(int32_t parent, std::span<const TokenId> tokens, const CompressionKey& key) const {
  // absl's hash differs from process to process, so nobody outside can aim at one bucket.
  return absl::HashOf(parent, key, absl::Span<const TokenId>(tokens.data(), tokens.size())) &
         (buckets_.size() - 1);
}

int32_t PrefixCache::Find(int32_t parent, std::span<const TokenId> tokens, const CompressionKey& key) const {
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

PrefixMatch PrefixCache::Match(std::span<const TokenId> tokens, const CompressionKey& key) const {
  PrefixMatch match;
  while (tokens.size() >= static_cast<size_t>(block_tokens_)) {
    const int32_t slot = Find(match.last.slot, tokens.first(block_tokens_), key);
    if (slot < 0) break;
    const Node& node = nodes_[slot];
    match.last = {slot, node.generation};
    ++match.blocks;
    if (node.group.owners() == 1) match.idle_blocks += static_cast<int64_t>(node.group.ids().size());
    tokens = tokens.subspan(block_tokens_);
  }
  return match;
}

void PrefixCache::Acquire(const PrefixMatch& match, std::vector<BlockGroup>* groups) {
  if (match.blocks == 0) return;
  ABSL_ASSERT(Alive(match.last));
  const size_t first = groups->size();
  groups->resize(first + match.blocks);
  ++clock_;
  int32_t slot = match.last.slot;
  for (size_t i = groups->size(); i-- > first; slot = nodes_[slot].parent) {
    (*groups)[i] = nodes_[slot].group.Share();
    Touch(slot);
  }
  ABSL_ASSERT(slot == -1);
}

PrefixNode PrefixCache::Insert(PrefixNode parent, std::span<const TokenId> tokens, const CompressionKey& key,
                               BlockGroup* group) {
  ABSL_ASSERT(static_cast<int>(tokens.size()) == block_tokens_);
  ABSL_ASSERT(parent.is_root() || Alive(parent));
  ++clock_;
  int32_t slot = Find(parent.slot, tokens, key);
  if (slot >= 0) {
    Touch(slot);
    if (group->ids().data() != nodes_[slot].group.ids().data()) *group = nodes_[slot].group.Share();
    return PrefixNode{slot, nodes_[slot].generation};
  }
  slot = free_slot_;
  ABSL_ASSERT(slot >= 0);  // one node per group, and no more groups than nodes
  Node& node = nodes_[slot];
  free_slot_ = node.next_in_bucket;
  node.group = group->Share();
  node.group.SetRetained(true);
  node.parent = parent.slot;
  node.children = 0;
  node.key = key;
  node.last_use = clock_;
  node.bucket = Bucket(parent.slot, tokens, key);
  node.next_in_bucket = buckets_[node.bucket];
  buckets_[node.bucket] = slot;
  std::copy(tokens.begin(), tokens.end(), tokens_.begin() + static_cast<ptrdiff_t>(slot) * block_tokens_);
  LinkLeaf(slot);
  if (parent.slot >= 0) {
    Node& above = nodes_[parent.slot];
    if (above.children++ == 0) UnlinkLeaf(parent.slot);
    above.last_use = clock_;
  }
  ++size_;
  return PrefixNode{slot, node.generation};
}

bool PrefixCache::EvictOne() {
  // Leaves in use are as many as running sequences at most, so the walk is short.
  for (int32_t slot = oldest_leaf_; slot >= 0; slot = nodes_[slot].newer) {
    if (nodes_[slot].group.owners() == 1) {
      Remove(slot);
      return true;
    }
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
  while (oldest_leaf_ >= 0) Remove(oldest_leaf_);
}

void PrefixCache::LinkLeaf(int32_t slot) {
  // From the newest end when it is new, which is the rule; a parent that became a leaf belongs near the
  // oldest end.
  Node& node = nodes_[slot];
  int32_t newer = -1;
  if (newest_leaf_ >= 0 && nodes_[newest_leaf_].last_use > node.last_use) {
    newer = oldest_leaf_;
    while (nodes_[newer].last_use < node.last_use) newer = nodes_[newer].newer;
  }
  const int32_t older = newer >= 0 ? nodes_[newer].older : newest_leaf_;
  node.newer = newer;
  node.older = older;
  (newer >= 0 ? nodes_[newer].older : newest_leaf_) = slot;
  (older >= 0 ? nodes_[older].newer : oldest_leaf_) = slot;
}

void PrefixCache::UnlinkLeaf(int32_t slot) {
  const Node& node = nodes_[slot];
  (node.newer >= 0 ? nodes_[node.newer].older : newest_leaf_) = node.older;
  (node.older >= 0 ? nodes_[node.older].newer : oldest_leaf_) = node.newer;
}

void PrefixCache::Touch(int32_t slot) {
  Node& node = nodes_[slot];
  const bool leaf = node.children == 0;
  if (leaf) UnlinkLeaf(slot);
  node.last_use = clock_;
  if (leaf) LinkLeaf(slot);
}

void PrefixCache::Remove(int32_t slot) {
  Node& node = nodes_[slot];
  ABSL_ASSERT(node.children == 0);
  UnlinkLeaf(slot);
  int32_t* link = &buckets_[node.bucket];
  while (*link != slot) link = &nodes_[*link].next_in_bucket;
  *link = node.next_in_bucket;
  node.group.SetRetained(false);
  node.group.Reset();
  ++node.generation;
  node.next_in_bucket = free_slot_;
  free_slot_ = slot;
  --size_;
  if (node.parent >= 0 && --nodes_[node.parent].children == 0) LinkLeaf(node.parent);
}

void PrefixCache::AppendHandles(std::vector<const BlockGroup*>* handles) const {
  for (const Node& node : nodes_) {
    if (!node.group.empty()) handles->push_back(&node.group);
  }
}

absl::Status PrefixCache::Check() const {
  std::vector<int32_t> children(nodes_.size(), 0);
  int64_t size = 0;
  int64_t leaves = 0;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    const Node& node = nodes_[i];
    if (node.group.empty()) continue;
    ++size;
    leaves += node.children == 0;
    if (node.parent < 0) continue;
    if (nodes_[node.parent].group.empty())
      return absl::InternalError(absl::StrCat("node ", i, " has no parent"));
    ++children[node.parent];
  }
  for (size_t i = 0; i < nodes_.size(); ++i) {
    if (!nodes_[i].group.empty() && nodes_[i].children != children[i]) {
      return absl::InternalError(
          absl::StrCat("node ", i, " counts ", nodes_[i].children, " children and has ", children[i]));
    }
  }
  uint64_t last_use = 0;
  for (int32_t slot = oldest_leaf_; slot >= 0; slot = nodes_[slot].newer, --leaves) {
    if (nodes_[slot].children != 0 || nodes_[slot].last_use < last_use) {
      return absl::InternalError(absl::StrCat("node ", slot, " is out of place in the list of leaves"));
    }
    last_use = nodes_[slot].last_use;
  }
  if (leaves != 0 || size != size_) return absl::InternalError("the prefix cache lost count of its nodes");
  return absl::OkStatus();
}

}  // namespace atp
