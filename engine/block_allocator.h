// Ids of KV blocks, lent in groups. A group is the unit of sharing: one reference count for all ids that are
// filled and freed together (exact tokens: one id per (layer, kv head), layer-major). Knows neither bytes nor
// tokens. Used by one thread; nothing here takes a lock.
#ifndef ATP_ENGINE_BLOCK_ALLOCATOR_H_
#define ATP_ENGINE_BLOCK_ALLOCATOR_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "kernels/kv_page.h"

namespace atp {

class BlockAllocator;

// One owner of a group. The group's blocks are free again when its last owner is gone. Sharing is spelled
// out, so that no owner is made by accident. Must not outlive its allocator.
class BlockGroup {
 public:
  BlockGroup() = default;
  BlockGroup(BlockGroup&& other) noexcept;
  BlockGroup& operator=(BlockGroup&& other) noexcept;
  ~BlockGroup() { Reset(); }

  BlockGroup Share() const;  // one owner more; this must hold a group
  void Reset();

  bool empty() const { return allocator_ == nullptr; }
  std::span<const BlockId> ids() const;  // empty where there is no group
  int owners() const;

  // A retained group has an owner that gives it up on demand (the prefix cache): while that is its only
  // owner, its blocks count as idle. The last owner unsets it before it lets go.
  void SetRetained(bool retained);

 private:
  friend class BlockAllocator;
  BlockGroup(BlockAllocator* allocator, int32_t record) : allocator_(allocator), record_(record) {}

  BlockAllocator* allocator_ = nullptr;
  int32_t record_ = -1;
};

class BlockAllocator {
 public:
  explicit BlockAllocator(int64_t num_blocks);
  BlockAllocator(const BlockAllocator&) = delete;
  BlockAllocator& operator=(const BlockAllocator&) = delete;
  ~BlockAllocator();  // no group may be left

  // `count` blocks (at least one) in one group, or none at all. Reuses memory: no heap allocation in the
  // steady state.
  std::optional<BlockGroup> Allocate(int count);

  int64_t total_blocks() const { return total_blocks_; }
  int64_t free_blocks() const { return total_blocks_ - next_id_ + static_cast<int64_t>(free_ids_.size()); }
  // In retained groups with a single owner: free on demand.
  int64_t idle_blocks() const { return idle_blocks_; }

  // Whether every block is either free or in exactly one group, every group has exactly the owners given in
  // `handles` (each handle of the program once, in any order), and the counters agree. For tests; slow.
  absl::Status Check(std::span<const BlockGroup* const> handles) const;

 private:
  friend class BlockGroup;
  struct Record {
    int owners = 0;
    bool retained = false;
    std::vector<BlockId> ids;
  };

  bool Idle(const Record& record) const { return record.retained && record.owners == 1; }
  void Release(int32_t record);

  int64_t total_blocks_;
  int64_t idle_blocks_ = 0;
  // Ids from here on were never lent, and are only once no other is free: what a cache never fills, it does
  // not touch.
  BlockId next_id_ = 0;
  std::vector<BlockId> free_ids_;  // a stack: the block freed last is the warmest
  std::vector<Record> records_;    // groups, live ones and ones to be reused
  std::vector<int32_t> free_records_;
};

}  // namespace atp

#endif  // ATP_ENGINE_BLOCK_ALLOCATOR_H_
