#include "engine/block_table.h"

#include "absl/base/macros.h"

namespace atp {

BlockTable::BlockTable(int layers, int kv_heads)
    : kv_heads_(kv_heads),
      exact_(static_cast<size_t>(layers) * static_cast<size_t>(kv_heads)),
      heads_(exact_.size()) {}

void BlockTable::AppendExact(std::span<const BlockId> ids) {
  ABSL_ASSERT(ids.size() == exact_.size());
  for (size_t i = 0; i < ids.size(); ++i) {
    exact_[i].push_back(ids[i]);
    heads_[i].exact = exact_[i].data();  // push_back may have moved it
  }
  ++exact_blocks_;
}

void BlockTable::Clear() {
  for (std::vector<BlockId>& blocks : exact_) blocks.clear();
  exact_blocks_ = 0;
}

}  // namespace atp
