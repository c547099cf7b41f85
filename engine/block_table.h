// Which blocks hold one sequence's entries: a list per (layer, kv head), because heads hold different numbers
// of entries once history is compressed. Exact tokens fill all heads alike. Ids only; ownership is with
// BlockGroup.
#ifndef ATP_ENGINE_BLOCK_TABLE_H_
#define ATP_ENGINE_BLOCK_TABLE_H_

#include <cstddef>
#include <span>
#include <vector>

#include "kernels/op_args.h"

namespace atp {

class BlockTable {
 public:
  BlockTable(int layers, int kv_heads);
  BlockTable(const BlockTable&) = delete;  // heads_ points into exact_
  BlockTable& operator=(const BlockTable&) = delete;
  BlockTable(BlockTable&&) = default;
  BlockTable& operator=(BlockTable&&) = default;

  // Appends one block of exact tokens to every (layer, kv head). ids: [layers * kv_heads], layer-major.
  void AppendExact(std::span<const BlockId> ids);
  void Clear();  // keeps the memory

  int exact_blocks() const { return exact_blocks_; }  // per head
  // The kv heads of one layer, for KvSequence::heads: valid until the next change of the table.
  const KvHeadBlocks* Layer(int layer) const { return &heads_[static_cast<size_t>(layer) * kv_heads_]; }

 private:
  int kv_heads_;
  int exact_blocks_ = 0;
  std::vector<std::vector<BlockId>> exact_;  // [layers * kv_heads][exact_blocks]
  std::vector<KvHeadBlocks> heads_;          // [layers * kv_heads], pointing into exact_
};

}  // namespace atp

#endif  // ATP_ENGINE_BLOCK_TABLE_H_
