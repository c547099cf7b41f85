// Index of computed blocks by the tokens that lead to them, so that equal prefixes are computed once. Holds
// one share of every group it knows; knows no bytes. A tree: a node is one full block of tokens behind its
// parent's. A lookup hashes (parent, tokens) and then compares both, so a hash collision costs time and never
// returns a wrong prefix. Used by one thread. Each method says whether it changes the cache.
#ifndef ATP_ENGINE_PREFIX_CACHE_H_
#define ATP_ENGINE_PREFIX_CACHE_H_

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "engine/block_allocator.h"
#include "engine/request.h"

namespace atp {

// The settings that cached keys and values depend on, besides the tokens. Two sequences share blocks only
// when theirs are equal. The defaults are exact attention.
struct CompressionKey {
  float ratio = 1.0f;  // principal entries per token of a closed segment
  int bits = 0;        // per element of principal entries; 0 = as exact ones
  int segment_tokens = 0;
  int window_tokens = 0;
  int sink_tokens = 0;
  int max_principal_keys = 0;  // 0 = none

  friend bool operator==(const CompressionKey&, const CompressionKey&) = default;
  template <typename H>
  friend H AbslHashValue(H h, const CompressionKey& key) {
    return H::combine(std::move(h), key.ratio, key.bits, key.segment_tokens, key.window_tokens,
                      key.sink_tokens, key.max_principal_keys);
  }
};

// Names one node for as long as it lives; a name of an evicted node is recognised as such. The default is the
// root, the empty prefix.
struct PrefixNode {
  int32_t slot = -1;
  uint32_t generation = 0;

  bool is_root() const { return slot < 0; }
};

struct PrefixMatch {
  PrefixNode last;          // deepest node found
  int blocks = 0;           // full token blocks found
  int64_t idle_blocks = 0;  // KV blocks in them that count as idle now and would not any more
};

class PrefixCache {
 public:
  // `max_groups`: the most groups that can exist; memory for as many nodes is taken at once.
  PrefixCache(int block_tokens, int64_t max_groups);
  ~PrefixCache() { Clear(); }

  // Changes nothing. The longest known chain of full blocks at the start of `tokens`. Callers that need
  // logits leave out the last token, so that at least one is computed.
  PrefixMatch Match(std::span<const TokenId> tokens, const CompressionKey& key) const;

  // Changes the order of eviction. Appends a share of each group of `match` to `groups`, first block first.
  // The match must be of now: no change of the cache in between.
  void Acquire(const PrefixMatch& match, std::vector<BlockGroup>* groups);

  // Adds a node. `tokens`: the block_tokens tokens behind `parent`, whose group the caller holds (so it is
  // there still). Where the node is known already (two sequences computed the same tokens side by side),
  // `group` becomes a share of the known group, which has the same content: who holds a block thus holds all
  // blocks before it, too.
  PrefixNode Insert(PrefixNode parent, std::span<const TokenId> tokens, const CompressionKey& key,
                    BlockGroup* group);

  // Removes the least recently used leaf that nobody else holds; false when there is none. Leaves only, so
  // that no chain is ever cut off from its root.
  bool EvictOne();
  // Evicts until `allocator` has `blocks` free ones; false when that is not possible (what could go is gone
  // then).
  bool EvictUntil(const BlockAllocator& allocator, int64_t blocks);
  // Forgets everything, whoever holds it.
  void Clear();

  int64_t size() const { return size_; }  // nodes, one group each

  // Changes nothing. For tests: appends every handle, and checks the tree.
  void AppendHandles(std::vector<const BlockGroup*>* handles) const;
  absl::Status Check() const;

 private:
  struct Node {
    BlockGroup group;  // empty: a free slot
    uint32_t generation = 0;
    int32_t parent = -1;
    int32_t children = 0;
    int32_t next_in_bucket = -1;  // or next free slot
    // Leaves are in a list, least recently used first. Only leaves can go, so only they are ordered.
    int32_t older = -1;
    int32_t newer = -1;
    uint64_t last_use = 0;
    size_t bucket = 0;
    CompressionKey key;
  };

  std::span<const TokenId> Tokens(int32_t slot) const {
    return {tokens_.data() + static_cast<size_t>(slot) * block_tokens_, static_cast<size_t>(block_tokens_)};
  }
  bool Alive(PrefixNode node) const {
    return node.slot >= 0 && nodes_[node.slot].generation == node.generation &&
           !nodes_[node.slot].group.empty();
  }
  size_t Bucket(int32_t parent, std::span<const TokenId> tokens, const CompressionKey& key) const;
  int32_t Find(int32_t parent, std::span<const TokenId> tokens, const CompressionKey& key) const;  // -1: none
  void LinkLeaf(int32_t slot);  // by last_use
  void UnlinkLeaf(int32_t slot);
  void Touch(int32_t slot);
  void Remove(int32_t slot);  // a leaf

  int block_tokens_;
  std::vector<Node> nodes_;
  std::vector<TokenId> tokens_;   // [nodes, block_tokens]
  std::vector<int32_t> buckets_;  // first node, or -1; a power of two of them
  int32_t free_slot_ = -1;
  int32_t oldest_leaf_ = -1;
  int32_t newest_leaf_ = -1;
  uint64_t clock_ = 0;  // counts uses
  int64_t size_ = 0;
};

}  // namespace atp

#endif  // ATP_ENGINE_PREFIX_CACHE_H_
