// Which blocks hold one sequence's entries: lists per (layer, kv head), because heads hold different numbers
// of entries once history is compressed. Exact tokens fill all heads alike. Ids only; ownership is with
// BlockGroup.
#ifndef ATP_ENGINE_BLOCK_TABLE_H_
#define ATP_ENGINE_BLOCK_TABLE_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/op_args.h"

namespace atp {

// A block is addressed in this many parts, so that the small pages of several heads share one. The ids that
// backends see are block * kBlockParts + part.
inline constexpr int kBlockParts = 8;

// The page at `place` (in parts of a block) of a group with these blocks.
inline BlockId PageId(std::span<const BlockId> blocks, int place) {
  return blocks[static_cast<size_t>(place / kBlockParts)] * kBlockParts + place % kBlockParts;
}

// Takes ids of whole blocks, and lists ids of pages.
class BlockTable {
 public:
  BlockTable(int layers, int kv_heads);
  BlockTable(const BlockTable&) = delete;  // heads_ points into exact_ and principal_
  BlockTable& operator=(const BlockTable&) = delete;
  BlockTable(BlockTable&&) = default;
  BlockTable& operator=(BlockTable&&) = default;

  // Appends one block of exact tokens to every (layer, kv head). ids: [layers * kv_heads], layer-major.
  void AppendExact(std::span<const BlockId> ids);
  // Forgets the first `blocks` of every head.
  void DropExact(int blocks);

  // Principal history, group by group. A group is appended unseen (it is being fitted, or its segment is
  // still in the window), seen later, and dropped when a later one has replaced it; each from the front.
  // pages: [layers * kv_heads], of the group in each head; places: of each page, layer-major, in the group's
  // blocks `ids`.
  void AppendPrincipal(std::span<const BlockId> ids, std::span<const int32_t> pages,
                       std::span<const int32_t> places);
  void ShowPrincipal(std::span<const int32_t> pages);
  void DropPrincipal(std::span<const int32_t> pages);
  // How the pages of one head's principal entries are laid out, before the first of them; outlives the
  // table.
  void SetPrincipalPage(int head, const KvPage* page) { heads_[head].principal_page = page; }

  // Where the open segment's queries are kept. ids: [layers][blocks per layer]; empty: nowhere.
  void SetQueries(std::span<const BlockId> ids);

  void Clear();  // keeps the memory

  int exact_blocks() const { return exact_blocks_; }  // per head
  // The kv heads of one layer, for KvSequence::heads: valid until the next change of the table.
  const KvHeadBlocks* Layer(int layer) const { return &heads_[static_cast<size_t>(layer) * kv_heads_]; }
  // All principal pages of a head, seen or not. head: layer * kv_heads + kv head.
  std::span<const BlockId> principal(int head) const { return principal_[head]; }
  // Exact pages of a head, each a whole block.
  std::span<const BlockId> exact(int head) const { return exact_[head]; }
  std::span<const BlockId> queries() const { return queries_; }

 private:
  int kv_heads_;
  int exact_blocks_ = 0;
  std::vector<std::vector<BlockId>> exact_;      // [layers * kv_heads][exact_blocks]
  std::vector<std::vector<BlockId>> principal_;  // [layers * kv_heads][differs]
  std::vector<BlockId> queries_;
  std::vector<KvHeadBlocks> heads_;  // [layers * kv_heads], pointing into exact_ and principal_
};

}  // namespace atp

#endif  // ATP_ENGINE_BLOCK_TABLE_H_
