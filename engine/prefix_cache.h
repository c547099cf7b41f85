// Index of computed blocks by the tokens that lead to them, so that equal prefixes are computed once. Holds
// one share of every group it knows; knows no bytes. A tree: a token node is one full block of tokens behind
// its parent's; the principal entries of a compressed segment are a child of their own, a leaf, behind the
// segment's last token node. A lookup hashes (parent, tokens, key) and then compares them, so a hash
// collision costs time and never returns a wrong prefix. Used by one thread. Each method says whether it
// changes the cache.
//
// What is evicted: leaves, so that no chain is cut off from its root, and the exact blocks of segments that
// somebody went on without, because they are compressed: those are "covered", and can go from the middle. A
// node without a group stays as long as it has children, which it names.
#ifndef ATP_ENGINE_PREFIX_CACHE_H_
#define ATP_ENGINE_PREFIX_CACHE_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "engine/block_allocator.h"
#include "engine/compression_plan.h"
#include "engine/request.h"

namespace atp {

// What cached keys and values depend on, besides the tokens: CompressionPlan::id(), or exact attention. Two
// sequences share blocks only when theirs are equal.
using CompressionKey = uint64_t;
inline constexpr CompressionKey kExactKey = 0;

// Names one node for as long as it lives; a name of an evicted node is recognised as such. The default is the
// root, the empty prefix.
struct PrefixNode {
  int32_t slot = -1;
  uint32_t generation = 0;

  bool is_root() const { return slot < 0; }
};

// What a sequence takes over when it goes on behind the matched tokens.
struct PrefixMatch {
  PrefixNode last;        // deepest node
  int blocks = 0;         // full token blocks computed already
  int first_block = 0;    // those before are compressed: only the groups of [first_block, blocks) are needed
  int first_segment = 0;  // and the principal groups of segments [first_segment, end_segment)
  int end_segment = 0;
  const CompressionPlan* plan = nullptr;  // that they were compressed by
  int64_t idle_blocks = 0;  // KV blocks in all these that count as idle now and would not any more
};

class PrefixCache {
 public:
  // Room for `max_nodes` is taken at once, and touched as they come. Without compression there is a node for
  // each group.
  PrefixCache(int block_tokens, int64_t max_nodes);
  ~PrefixCache() { Clear(); }

  // Changes nothing. The longest start of `tokens` behind which a sequence can go on that follows `plan`
  // (null: exact) and fits `fitted_segments` segments. Callers that need logits leave out the last token, so
  // that at least one is computed. Where the next segment will be fitted, that is the end of a segment,
  // because the queries of its first tokens are not kept here. So it is where the next segment is among the
  // first `low_rank_segments`, which are computed whole.
  PrefixMatch Match(std::span<const TokenId> tokens, const CompressionPlan* plan = nullptr,
                    int fitted_segments = 0, int low_rank_segments = 0) const;
  // Changes nothing. How many blocks of `tokens`, from the first on, are known behind `parent`.
  int Known(PrefixNode parent, std::span<const TokenId> tokens, CompressionKey key) const;

  // Changes the order of eviction. Appends a share of each group of `match`, first ones first. The match must
  // be of now: no change of the cache in between.
  void Acquire(const PrefixMatch& match, std::vector<BlockGroup>* exact, std::vector<BlockGroup>* principal);

  // Adds a node. `tokens`: the block_tokens tokens behind `parent`, which the caller keeps alive (it holds
  // its group, or that of a node behind it). Where a group is known already (two sequences computed the same
  // tokens side by side), `group` becomes a share of the known one, which has the same content. Nothing where
  // there is no room for another node.
  std::optional<PrefixNode> Insert(PrefixNode parent, std::span<const TokenId> tokens, CompressionKey key,
                                   BlockGroup* group);
  // The same for the principal entries of the segment that ends with `end`.
  std::optional<PrefixNode> InsertPrincipal(PrefixNode end, CompressionKey key, BlockGroup* group) {
    return Insert(end, {}, key, group);
  }

  // The caller goes on without the exact groups of `blocks` nodes, `behind` nodes before `node`, and will not
  // ask for them again: each may be evicted as soon as nobody holds it.
  void Cover(PrefixNode node, int behind, int blocks);
  // Principal groups on the way to `node` count as used now, the first ones last: it is they that all others
  // build on.
  void TouchPrincipal(PrefixNode node, const CompressionPlan& plan);

  // Removes the least recently used group that nobody else holds and nobody needs; false when there is none.
  bool EvictOne();
  // Evicts until `allocator` has `blocks` free ones; false when that is not possible (what could go is gone
  // then).
  bool EvictUntil(const BlockAllocator& allocator, int64_t blocks);
  // Forgets everything, whoever holds it.
  void Clear();

  int64_t size() const { return size_; }  // nodes

  // Changes nothing. For tests: appends every handle, and checks the tree.
  void AppendHandles(std::vector<const BlockGroup*>* handles) const;
  absl::Status Check() const;

 private:
  struct Node {
    bool used = false;  // false: a free slot
    bool principal = false;
    bool covered = false;  // for good
    bool listed = false;   // in the list of what can be evicted: it has a group, and is a leaf or covered
    BlockGroup group;      // empty: evicted from the middle
    uint32_t generation = 0;
    int32_t parent = -1;
    int32_t depth = 0;  // token nodes up to and with this one
    int32_t children = 0;
    int32_t next_in_bucket = -1;  // or next free slot
    int32_t older = -1;
    int32_t newer = -1;
    uint64_t last_use = 0;
    size_t bucket = 0;
    CompressionKey key = kExactKey;
  };

  std::span<const TokenId> Tokens(int32_t slot) const {
    const size_t count = nodes_[slot].principal ? 0 : static_cast<size_t>(block_tokens_);
    return {tokens_.data() + static_cast<size_t>(slot) * block_tokens_, count};
  }
  bool Alive(PrefixNode node) const {
    return node.slot >= 0 && nodes_[node.slot].used && nodes_[node.slot].generation == node.generation;
  }
  size_t Bucket(int32_t parent, std::span<const TokenId> tokens, CompressionKey key) const;
  int32_t Find(int32_t parent, std::span<const TokenId> tokens, CompressionKey key) const;  // -1: none
  // The node of a segment's principal entries behind its last token node `end`, if it has them; else -1.
  int32_t FindPrincipal(int32_t end, CompressionKey key) const {
    const int32_t slot = Find(end, {}, key);
    return slot >= 0 && !nodes_[slot].group.empty() ? slot : -1;
  }
  CompressionKey KeyOf(std::span<const TokenId> tokens, size_t block, const CompressionPlan* plan,
                       int low_rank_segments) const;
  // Match, once the chain of token nodes is in path_.
  bool Resumable(int blocks, const CompressionPlan& plan, int fitted_segments, PrefixMatch* match) const;
  int64_t IdleBlocks(int32_t slot) const;
  int32_t NewSlot();  // -1: none
  void Attach(int32_t slot, BlockGroup* group);
  void List(int32_t slot);    // where it can be evicted, by last_use
  void Unlist(int32_t slot);  // where it is listed
  void Touch(int32_t slot);
  void Evict(int32_t slot);  // its group, and the node and its parents where nothing is left of them

  int block_tokens_;
  size_t max_nodes_;
  std::vector<Node> nodes_;
  std::vector<TokenId> tokens_;   // [nodes, block_tokens]
  std::vector<int32_t> buckets_;  // first node, or -1; a power of two of them
  int32_t free_slot_ = -1;
  int32_t oldest_ = -1;  // of what can be evicted
  int32_t newest_ = -1;
  uint64_t clock_ = 0;  // counts uses
  int64_t size_ = 0;
  mutable std::vector<int32_t> path_;  // of Match
};

}  // namespace atp

#endif  // ATP_ENGINE_PREFIX_CACHE_H_
