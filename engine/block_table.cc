#include "engine/block_table.h"

#include "absl/base/macros.h"

namespace atp {

BlockTable::BlockTable(int layers, int kv_heads)
    : kv_heads_(kv_heads),
      exact_(static_cast<size_t>(layers) * static_cast<size_t>(kv_heads)),
      principal_(exact_.size()),
      heads_(exact_.size()) {}

void BlockTable::AppendExact(std::span<const BlockId> ids) {
  ABSL_ASSERT(ids.size() == exact_.size());
  for (size_t i = 0; i < ids.size(); ++i) {
    exact_[i].push_back(ids[i] * kBlockParts);
    heads_[i].exact = exact_[i].data();  // push_back may have moved it
  }
  ++exact_blocks_;
}

void BlockTable::DropExact(int blocks) {
  ABSL_ASSERT(blocks <= exact_blocks_);
  for (std::vector<BlockId>& list : exact_) list.erase(list.begin(), list.begin() + blocks);
  exact_blocks_ -= blocks;
}

void BlockTable::AppendPrincipal(std::span<const BlockId> ids, std::span<const int32_t> pages,
                                 std::span<const int32_t> places) {
  ABSL_ASSERT(pages.size() == principal_.size());
  auto place = places.begin();
  for (size_t i = 0; i < pages.size(); ++i) {
    for (int32_t p = 0; p < pages[i]; ++p) principal_[i].push_back(PageId(ids, *place++));
    heads_[i].principal = principal_[i].data();
  }
  ABSL_ASSERT(place == places.end());
}

void BlockTable::SetQueries(std::span<const BlockId> ids) {
  queries_.clear();
  for (const BlockId id : ids) queries_.push_back(id * kBlockParts);
}

void BlockTable::ShowPrincipal(std::span<const int32_t> pages) {
  for (size_t i = 0; i < pages.size(); ++i)
    heads_[i].principal_entries += pages[i] * heads_[i].principal_page->entries();
}

void BlockTable::DropPrincipal(std::span<const int32_t> pages) {
  for (size_t i = 0; i < pages.size(); ++i) {
    principal_[i].erase(principal_[i].begin(), principal_[i].begin() + pages[i]);
    heads_[i].principal_entries -= pages[i] * heads_[i].principal_page->entries();
    ABSL_ASSERT(heads_[i].principal_entries >= 0);
  }
}

void BlockTable::Clear() {
  for (std::vector<BlockId>& blocks : exact_) blocks.clear();
  for (std::vector<BlockId>& blocks : principal_) blocks.clear();
  for (KvHeadBlocks& head : heads_) head.principal_entries = 0;
  queries_.clear();
  exact_blocks_ = 0;
}

}  // namespace atp
